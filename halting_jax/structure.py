"""What a run directory says about its model, and what a checkpoint and a run must agree in."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from common import flags
from common.errors import UserError
from common.json_files import Fields, read_json_object
from halting_jax.defaults import get_default_config

# A checkpoint can only continue a run that agrees in these; lengths and cadence may change.
STRUCTURE = ("task", "model", "act", "ut", "trm", "optim.ema.enabled", "seed", "data.batch_size")
# What a model and its data must share for an evaluation.
_NOT_STRUCTURE = (
    "act.time_penalty",
    "act.disable_ponder_cost",
    "act.ponder_reduce",
    "act.halt_warmup_steps",
    "act.fixed_ponder_steps",
    "act.execution",
    "act.chunk",
    "act.prior",
    "act.kl_weight",
    "act.epsilon",
    "ut.act_loss_weight",
    "ut.remat",
    "ut.attn_impl",
    "ut.supervise_every",
    "trm.halt_exploration",
    "trm.halt_at_eval",
    "task.near_ood_bits",
    "task.ood_bits",
    "task.eval_",
    "task.test_max_digits",
)


def structure(config: ConfigDict, facts: dict[str, Any]) -> dict[str, Any]:
    """Keys that a checkpoint and a run must agree in, with the sizes of the data."""
    chosen = flags.select(config, STRUCTURE)
    chosen = {k: v for k, v in chosen.items() if not k.startswith(_NOT_STRUCTURE)}
    return chosen | {f"dataset.{k}": facts[k] for k in ("seq_len", "vocab_size") if k in facts}


def default_structure() -> dict[str, Any]:
    """What `structure` gives for the default config."""
    return structure(get_default_config(), {})


def checkpoint_path(name: str) -> tuple[Path, int | None]:
    """The checkpoint directory behind RUN, RUN/checkpoints or RUN/checkpoints/STEP, and the step.

    Raises:
      UserError: there is no such directory.
    """
    path = Path(name).expanduser()
    step = int(path.name) if path.name.isdigit() and path.parent.name == "checkpoints" else None
    path = path.parent if step is not None else path
    if not path.is_dir():
        raise UserError(f"{name}: no such directory; name the run directory of a training run")
    inner = path / "checkpoints"
    return (inner if inner.is_dir() else path), step


def saved_config(run: Path) -> dict[str, Any]:
    """The resolved config that a run directory holds.

    Raises:
      UserError: there is none.
    """
    cure = "train first, or name the run directory of a training run"
    path = run / "config_resolved.json"
    fields: Fields = {"config": dict, "config.model": dict, "config.task": dict}
    config: dict[str, Any] = read_json_object(path, cure, fields)["config"]
    return config
