"""Wrong configs, generated: every key of a main misspelt, of the wrong type, out of range."""

import dataclasses
import importlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags as absl_flags

from common import flags
from common.errors import UserError

# Values that no key of that kind accepts.
WRONG_TYPE: dict[type, tuple[str, ...]] = {
    bool: ("maybe", "2.5"),
    int: ("many", "1.5", "[1]"),
    float: ("much", "[1]"),
    tuple: (),  # a single value is a tuple of one; elements are checked where they are used
}
OUT_OF_RANGE: dict[type, tuple[str, ...]] = {
    int: ("-1000003",),
    float: ("-1000003.5", "nan"),
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A main whose config is checked in this process.

    Attributes:
        module: with `define`; defaults: with `finalize`.
        config: `path[:variant]`.
        any_number: names of keys that take every finite number of their type (a seed, a bias).
    """

    module: str
    config: str
    any_number: tuple[str, ...] = (
        *("seed", "split_seed", "random_seed", "problem_seed", "halt_bias"),
        *("static_strength", "k_scale", "min_sim", "tau_null"),  # signed by their meaning
        *("top_k", "support_top_k"),  # 0 and below switch them off
    )

    @property
    def defaults(self) -> Any:
        """The module that validates."""
        return importlib.import_module(f"{self.module.partition('.')[0]}.defaults")

    def check(self, *arguments: str) -> None:
        """Everything a main does before it touches data, weights or files.

        Raises:
            UserError: the command is refused.
        """
        values = absl_flags.FlagValues()
        main = importlib.import_module(self.module)
        if hasattr(main, "define_own_flags"):
            main.define_own_flags(values)
        else:
            flags.define_flags(self.config, main.MODES, values)
        flags.parse(["main", f"--config={self.config}", *arguments], values)
        config: Any = values.config
        self.defaults.finalize(config)
        if hasattr(self.defaults, "check_overrides"):
            from ml_collections import config_flags

            overrides = config_flags.get_override_values(values["config"])
            self.defaults.check_overrides(config, overrides)


COMMANDS = {
    "reoac": Command("reoac_jax.main", "configs/gsm8k.py:tiny"),
    "halting": Command("halting_jax.main", "configs/halting_parity.py:tiny"),
    "halting_maze": Command("halting_jax.main", "configs/halting_maze_ut.py:tiny"),
    "qstar": Command("qstar.main", "configs/qstar.py:tiny"),
    "esm": Command("esm.main", "configs/esm_gsm8k_small.py:tiny"),
}


def misspelt(key: str, rng: random.Random) -> str:
    """A key with one letter lost, doubled, or swapped with its neighbour."""
    head, _, name = key.rpartition(".")
    place = rng.randrange(len(name))
    kind = rng.choice(("lose", "double", "swap"))
    if kind == "lose" and len(name) > 2:
        wrong = name[:place] + name[place + 1 :]
    elif kind == "swap" and place + 1 < len(name) and name[place] != name[place + 1]:
        wrong = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
    else:
        wrong = name[:place] + name[place] + name[place:]
    return f"{head}.{wrong}" if head else wrong


def cases(command: Command, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """(kind, key, argument) of every wrong command: `misspelt`, `type`, `range`."""
    flat = flags.flatten(flags.load_config(command.config))
    rng = random.Random(seed)
    for key, value in flat.items():
        wrong = misspelt(key, rng)
        if wrong not in flat:
            yield "misspelt", key, f"--config.{wrong}=1"
        for text in WRONG_TYPE.get(type(value), ()):
            yield "type", key, f"--config.{key}={text}"
        signed = key.rpartition(".")[2] in command.any_number
        for text in OUT_OF_RANGE.get(type(value), ()):
            if text == "nan" or not signed:
                yield "range", key, f"--config.{key}={text}"
        if isinstance(value, str) and _is_choice(command, key):
            yield "range", key, f"--config.{key}=no_such_choice"


def _is_choice(command: Command, key: str) -> bool:
    """Whether a text key has a fixed set of values: its check says `none of`."""
    try:
        command.check(f"--config.{key}=no_such_choice")
    except UserError as error:
        return "none of" in str(error) or "one of" in str(error)
    return False


def refused(check: Callable[..., None], argument: str) -> str:
    """What is wrong with how a command refuses; "" if one line names the key."""
    try:
        check(argument)
    except UserError as error:
        text = str(error)
        name = argument.removeprefix("--config.").partition("=")[0]
        if "\n" in text:
            return f"{argument}: more than one line"
        # A rule about two keys may name the other one first.
        if name.rpartition(".")[2] not in text:
            return f"{argument}: the line does not name the key: {text[:120]}"
        return ""
    except SystemExit as error:
        return f"{argument}: exit {error.code}"
    except Exception as error:
        return f"{argument}: {type(error).__name__}: {error}"
    return f"{argument}: accepted"


def sample(command: Command, share: float, seed: int) -> list[tuple[str, str, str]]:
    """A random part of the cases, at least a few."""
    found = list(cases(command, seed))
    count = max(math.ceil(share * len(found)), min(12, len(found)))
    return random.Random(seed).sample(found, count)
