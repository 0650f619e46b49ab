"""Command-line flags: one config file with overrides, and one-line errors for every bad input.

A main module, run as a program, calls `define_flags(...)` and then `flags.run(main)`. The config
file is loaded once, by `parse`; `--config.section.key=value` then overrides its values.
"""

import difflib
import errno
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags as absl_flags
from ml_collections import config_dict, config_flags

from common import startup
from common.errors import Interrupted, UserError
from common.processes import this
from common.rundir import atomic_write_json

FLAGS = absl_flags.FLAGS
REPOSITORY = Path(__file__).resolve().parent.parent

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 3
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_OVERRIDE = re.compile(r"^--?(?:no)?config\.([^=]+)(?:=|$)")
_CONFIG_FLAG = re.compile(r"^--?config(?:=(.*))?$", re.DOTALL)

# Flags defined below belong to the main module that asks for them.
absl_flags.disclaim_key_flags()


def define_flags(
    default_config: str,
    modes: Sequence[str],
    flag_values: absl_flags.FlagValues = FLAGS,
    mode_flag: str = "mode",
) -> None:
    """Defines the flags that all mains share; a main may define more of its own with absl.

    `--config` itself takes its type from the file, so `parse` defines it.

    Args:
        default_config: `path[:variant]` used when `--config` is not given.
        modes: allowed values of `--mode`; the first is the default.
        flag_values: where to define them, for tests.
        mode_flag: another name for `--mode`.
    """
    define: dict[str, Any] = {"flag_values": flag_values}
    absl_flags.DEFINE_string(
        "default_config", default_config, "config used where --config is not given", **define
    )
    absl_flags.DEFINE_enum(mode_flag, modes[0], list(modes), "what to do", **define)
    absl_flags.DEFINE_string(
        "workdir", "", "run directory, used as it is; the same one resumes", **define
    )
    absl_flags.DEFINE_string("checkpoint", "", "checkpoint directory to start from", **define)
    absl_flags.DEFINE_string("output", "", "file or directory for the result", **define)
    absl_flags.DEFINE_integer(
        "limit", 0, "use only the first records of the data, 0 = all", lower_bound=0, **define
    )
    absl_flags.DEFINE_string("run_dir", "", "an existing run directory to read", **define)
    absl_flags.DEFINE_string("sample", "", "sample file to show", **define)
    absl_flags.DEFINE_string(
        "coordinator", "", "several processes: HOST:PORT of the main one", **define
    )
    absl_flags.DEFINE_integer(
        "num_processes", None, "several processes: how many", lower_bound=1, **define
    )
    absl_flags.DEFINE_integer(
        "process_id", None, "several processes: which this is, from 0", lower_bound=0, **define
    )


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Parses the command line, calls `main([program])` and exits.

    Exit status: 0 done (or what `main` returns), 2 bad input, 3 stopped but resumable. The last
    two print one line on stderr and no traceback; a traceback therefore always means a bug.

    Args:
        main: reads its flags from `FLAGS`.
    """
    guard(lambda: main(parse(sys.argv)))


def guard(work: Callable[[], int | None]) -> NoReturn:
    """Does the work of a command and exits; see `run` for the status and the one line."""
    try:
        status = work() or 0
    except UserError as error:
        status = _complain(f"error: {one_line(str(error))}", EXIT_USER_ERROR)
    except OSError as error:
        # Wherever it shows: a disk that is full or may not be written is the user's to mend.
        if error.errno not in _DISK:
            raise
        where = f" at {error.filename}" if error.filename else ""
        status = _complain(
            f"error: {error.strerror}{where}: make room and run the same command again",
            EXIT_USER_ERROR,
        )
    except (Interrupted, KeyboardInterrupt) as error:
        detail = one_line(str(error)) or "stopped by the user; the same --workdir resumes"
        status = _complain(f"interrupted: {detail}", EXIT_INTERRUPTED)
    sys.stdout.flush()
    sys.exit(status)


def parse(argv: Sequence[str], flag_values: absl_flags.FlagValues = FLAGS) -> list[str]:
    """Loads the config file once, applies the overrides and parses all other flags.

    Args:
        argv: program name and arguments.
        flag_values: flags defined by `define_flags`; afterwards `flag_values.config` holds the
            locked config.

    Returns:
        The program name alone, as a list.

    Raises:
        UserError: for an unknown flag or config key, a value of the wrong type, a bad config
            file or variant, and positional arguments.
        SystemExit: status 0 after printing the help.
    """
    try:
        arguments = flag_values.read_flags_from_files(list(argv), force_gnu=False)
    except (absl_flags.Error, OSError) as error:
        raise UserError(str(error)) from None
    spec, arguments = _take_config(arguments)
    spec = spec or str(flag_values["default_config"].default)
    config = load_config(spec)
    if any(re.fullmatch(r"--?(h|help|helpshort|helpfull)", word) for word in arguments[1:]):
        print(_help_text(config, spec, flag_values))
        raise SystemExit(0)
    keys = sorted(flatten(config))
    _check_overrides(arguments, config, keys)
    defaults = flatten(config)
    try:
        config_flags.DEFINE_config_dict(
            "config", config, "config file", flag_values, sys_argv=arguments
        )
        rest = flag_values(arguments)
    except absl_flags.UnrecognizedFlagError as error:
        known = [name for name in flag_values if not name.startswith("config.")]
        raise UserError(
            f"unknown flag --{error.flagname}{nearest(error.flagname, known, '--')}"
        ) from None
    except (absl_flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_readable(str(error))) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; options are written --name=value")
    flag: Any = flag_values["config"]
    flag._config_filename = spec  # so that config_flags.get_config_filename works as usual
    overrides = config_flags.get_override_values(flag)
    _check_tuples(overrides, defaults)
    for key, value in overrides.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--config.{key}={value} is not a finite number")
    _announce_group(flag_values)
    return rest


def _announce_group(flag_values: absl_flags.FlagValues) -> None:
    """Flags that name the group of processes win over the variables of the same meaning."""
    for name, variable in (
        ("coordinator", startup.COORDINATOR),
        ("num_processes", startup.NUM_PROCESSES),
        ("process_id", startup.PROCESS_ID),
    ):
        value = flag_values[name].value
        if value not in ("", None):
            os.environ[variable] = str(value)


def load_config(spec: str) -> config_dict.ConfigDict:
    """Loads `path[:variant]`, for example `configs/gsm8k.py:tiny`.

    Args:
        spec: a Python file with a function `get_config`, relative to the working directory or,
            failing that, to the repository; the text after the colon is its argument.

    Returns:
        The locked config.

    Raises:
        UserError: if the file is missing or broken, or the variant unknown.
    """
    name, colon, variant = spec.partition(":")
    path = Path(name).expanduser()
    if not path.is_file() and not path.is_absolute() and (REPOSITORY / path).is_file():
        path = REPOSITORY / path
    if not path.is_file():
        others = [_short(p) for p in sorted((REPOSITORY / "configs").glob("*.py"))]
        cure = nearest(name, others) or f"; name one, such as {others[0]}"
        raise UserError(f"config file {name!r} not found{cure}")
    module_spec = importlib.util.spec_from_file_location(f"config_file_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {name!r} is not a Python file; rename it to end in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except UserError:
        raise
    except SyntaxError as error:
        place = f"{path}:{error.lineno}" if error.lineno else str(path)
        raise UserError(f"{place}: {error.msg}; mend this line of the config") from error
    except Exception as error:
        raise UserError(
            f"config file {name!r}: {type(error).__name__}: {error}; mend it"
        ) from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(
            f"config file {name!r} has no function get_config(); add one that returns a ConfigDict"
        )
    if colon and not inspect.signature(get_config).parameters:
        raise UserError(f"config file {name!r} has no variants, got {variant!r}")
    try:
        config = get_config(variant) if colon else get_config()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config {spec!r}: {error}") from error
    except Exception as error:
        raise UserError(f"config {spec!r}: {type(error).__name__}: {error}; mend it") from error
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(f"config {spec!r}: get_config() must return a ConfigDict")
    return config.lock()


def flatten(config: config_dict.ConfigDict) -> dict[str, Any]:
    """Returns {dotted key: value} of all values that are not sections."""
    flat: dict[str, Any] = {}
    for key in config:
        value = config[key]
        if isinstance(value, config_dict.ConfigDict):
            flat.update({f"{key}.{name}": item for name, item in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def refuse_negative(config: config_dict.ConfigDict, allowed: Iterable[str] = ()) -> None:
    """Checks that no number of a config is below 0.

    Args:
        config: the resolved config.
        allowed: dotted names of keys and sections with a rule of their own.

    Raises:
        UserError: names the key.
    """
    free = tuple(allowed)
    for key, value in flatten(config).items():
        if any(key == name or key.startswith(f"{name}.") for name in free):
            continue
        if isinstance(value, (int, float)) and value < 0:
            raise UserError(f"config key {key}={value} must not be negative")


def select(config: config_dict.ConfigDict, sections: Iterable[str]) -> dict[str, Any]:
    """Returns {dotted key: JSON value} of the keys under some sections.

    Args:
        config: the resolved config.
        sections: dotted names of sections or single keys.

    Raises:
        UserError: if the config lacks one of them.
    """
    flat = flatten(config)
    chosen: dict[str, Any] = {}
    for section in sections:
        found = {k: v for k, v in flat.items() if k == section or k.startswith(f"{section}.")}
        if not found:
            parts = [key.split(".") for key in flat]
            known = {".".join(part[:n]) for part in parts for n in range(1, len(part) + 1)}
            raise UserError(f"config has no key {section!r}{nearest(section, sorted(known))}")
        chosen.update(found)
    # Through JSON, so that a tuple and the list it becomes in a file count as equal.
    return json.loads(json.dumps(chosen, default=str))


def dump_config(
    config: config_dict.ConfigDict,
    path: str | Path,
    flag_values: absl_flags.FlagValues | None = None,
) -> None:
    """Writes the resolved config as JSON, with the file and overrides it came from.

    Args:
        config: the resolved config.
        path: usually `RunDir.config`.
        flag_values: parsed flags to take file and overrides from; None leaves them empty.
    """
    source: dict[str, Any] = {"file": "", "overrides": {}}
    if flag_values is not None:
        flag = flag_values["config"]
        source["file"] = config_flags.get_config_filename(flag)
        source["overrides"] = config_flags.get_override_values(flag)
    atomic_write_json(path, {"config": json.loads(config.to_json_best_effort()), **source})


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns `; did you mean a, b?` with the known names most like `name`, or nothing."""
    known = list(known)
    names = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    # A key typed without its section: match the last component too.
    last = name.rsplit(".", 1)[-1]
    tails = difflib.get_close_matches(last, {k.rsplit(".", 1)[-1] for k in known}, n=2, cutoff=0.8)
    names += [k for k in known if k.rsplit(".", 1)[-1] in tails and k not in names]
    if not names:
        return ""
    return f"; did you mean {', '.join(prefix + known_name for known_name in names[:3])}?"


def one_line(text: str) -> str:
    """Joins the lines of a message."""
    return " ".join(text.split())


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Splits `--config=X` or `--config X` off; the last one counts, wherever it stands."""
    spec = None
    rest = arguments[:1]
    words = iter(arguments[1:])
    for word in words:
        if word == "--":
            rest += [word, *words]
            break
        match = _CONFIG_FLAG.match(word)
        if not match:
            rest.append(word)
            continue
        spec = match.group(1) if match.group(1) is not None else next(words, "")
        if not spec or spec.startswith("--"):
            raise UserError("--config needs a value: --config=configs/NAME.py[:variant]")
    return spec, rest


def _check_overrides(
    arguments: Sequence[str], config: config_dict.ConfigDict, keys: Sequence[str]
) -> None:
    for word in arguments[1:]:
        if word == "--":
            return
        match = _OVERRIDE.match(word)
        if not match:
            continue
        # An index such as key[0] belongs to the value.
        key = match.group(1).split("[", 1)[0]
        if key in keys:
            continue
        if any(name.startswith(f"{key}.") for name in keys):
            inner = [name for name in keys if name.startswith(f"{key}.")]
            raise UserError(
                f"--config.{key} is a section; set one of its keys, such as --config.{inner[0]}"
            )
        raise UserError(f"unknown config key --config.{key}{nearest(key, keys, '--config.')}")


def _check_tuples(overrides: dict[str, Any], defaults: dict[str, Any]) -> None:
    # The flag library checks the type of scalars only: '--config.steps=abc' becomes ('abc',).
    for key, value in overrides.items():
        default = defaults.get(key)
        if not (isinstance(default, tuple) and default and isinstance(value, tuple)):
            continue
        allowed: tuple[type, ...] = tuple({type(item) for item in default})
        if float in allowed:
            allowed += (int,)
        bad = [item for item in value if type(item) not in allowed]
        if bad:
            names = " or ".join(sorted(kind.__name__ for kind in allowed))
            raise UserError(f"--config.{key}: every element must be {names}, got {bad[0]!r}")


def _readable(message: str) -> str:
    """Says in words what the flag library reports as a Python conversion error."""
    message = re.sub(r"invalid literal for int\(\) with base 10: .*", "not a whole number", message)
    message = re.sub(r"could not convert string to float: .*", "not a number", message)
    return re.sub(r"\('Non-boolean argument to boolean flag', .*\)", "not true or false", message)


def _help_text(
    config: config_dict.ConfigDict, spec: str, flag_values: absl_flags.FlagValues
) -> str:
    main_module = sys.modules.get("__main__")
    lines = [textwrap.dedent(getattr(main_module, "__doc__", None) or "").strip(), "", "flags:"]
    lines.append(f"  --config=FILE[:VARIANT]   (now: {spec})")
    for flag in sorted(flag_values.get_key_flags_for_module(sys.argv[0]), key=lambda f: f.name):
        if flag.name not in ("config", "default_config"):
            lines.append(f"  --{flag.name}={flag.default!r}   {flag.help}")
    lines += ["", f"config keys and their values in {spec}:"]
    lines += [f"  --config.{key}={value!r}" for key, value in flatten(config).items()]
    return "\n".join(lines)


def _short(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _complain(message: str, status: int) -> int:
    sys.stdout.flush()
    start = this()
    if start.num_processes > 1:
        message += f" [process {start.process_id} of {start.num_processes}]"
    print(message, file=sys.stderr, flush=True)
    return status
