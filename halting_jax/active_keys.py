"""Which config keys act: one that would do nothing under the chosen task or model is refused."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from common.errors import UserError

FILE_TASKS = ("maze", "sudoku")
"""Tasks whose examples come from files; the others are drawn in the training step."""

# Keys that act for some tasks only.
_TASK_KEYS = {
    "bits": ("parity",),
    "placement": ("parity",),
    "near_ood_bits": ("parity",),
    "ood_bits": ("parity",),
    "input_proj": ("parity",),
    "sequence_length": ("addition",),
    "max_digits": ("addition", "string_addition"),
    "fixed_sequence_length": ("addition",),
    "encoding": ("logic", "sort", "copy", "reverse"),
    "train_min_steps": ("logic",),
    "train_max_steps": ("logic",),
    "eval_min_steps": ("logic",),
    "eval_max_steps": ("logic",),
    "min_n": ("sort",),
    "max_n": ("sort",),
    "train_min_length": ("copy", "reverse"),
    "train_max_length": ("copy", "reverse"),
    "eval_min_length": ("copy", "reverse"),
    "eval_max_length": ("copy", "reverse"),
    "position_offset": ("copy", "reverse"),
    "max_terms": ("string_addition",),
    "test_max_digits": ("string_addition",),
}
# Keys of `act` that the Universal Transformer shares; all others belong to the ponder loop.
_ACT_SHARED = {
    "time_penalty_start",
    "time_penalty_warmup_steps",
    "disable_ponder_cost",
    "halt_warmup_steps",
    "fixed_ponder_steps",
    "ponder_reduce",
}
_GENERATED_DATA = (
    "style",
    "side",
    "min_path_moves",
    "loops",
    "labels",
    "train_size",
    "val_size",
    "test_size",
    "seed",
)


def inactive_reason(config: ConfigDict, key: str) -> str:
    """Why a key does nothing under this config; "" if it acts.

    Args:
      config: finalized tree.
      key: dotted name.
    """
    section, _, name = key.partition(".")
    task, model = config.task.name, config.model.type
    if section == "task" and name in _TASK_KEYS and task not in _TASK_KEYS[name]:
        return f"task.name={task} has no such key (it is of {', '.join(_TASK_KEYS[name])})"
    if key == "task.input_proj" and model != "act_rnn":
        return f"model.type={model} always projects its input"
    if section == "ut":
        if model != "universal_transformer":
            return f"model.type={model} is no universal_transformer"
        needs_act = name.startswith("act_") or name in ("halt_bias", "halt_kernel")
        if needs_act and not config.ut.act:
            return "ut.act is False"
    if section == "trm" and model != "trm":
        return f"model.type={model} is not trm"
    if section == "act" and model != "act_rnn":
        if model == "trm" and name != "fixed_ponder_steps":
            return "model.type=trm halts by its own head (section trm)"
        if name not in _ACT_SHARED:
            return f"model.type={model} has its own keys (section ut)"
        if name != "fixed_ponder_steps" and not config.ut.act:
            return "ut.act is False"
    if section == "act" and model == "act_rnn":
        kind = config.act.kind
        if name in ("prior", "kl_weight") and kind != "pondernet":
            return f"act.kind={kind} is not pondernet"
        charged = name.startswith("time_penalty") or name in ("ponder_reduce", "epsilon")
        if (charged or name == "disable_ponder_cost") and kind != "act":
            return f"act.kind={kind} pays no time penalty"
        if name == "embedding_size" and task not in FILE_TASKS:
            return f"task.name={task} has no grid"
        if name == "lstm_reset_cell" and config.act.cell != "lstm":
            return f"act.cell={config.act.cell} is not lstm"
        if name == "chunk" and config.act.execution != "chunked":
            return f"act.execution={config.act.execution} is not chunked"
    if section == "data" and name != "batch_size":
        if task not in FILE_TASKS:
            return f"task.name={task} is generated in the training step"
        if name == "aug" and task != "maze":
            return f"task.name={task} has no such symmetry"
        if name in _GENERATED_DATA and config.data.dir != "generated":
            return f"data.dir={config.data.dir} is read as it is"
        if name == "loops" and config.data.style != "perfect":
            return f"data.style={config.data.style} is not perfect"
    if key in ("train.max_epochs", "train.save_every_epochs", "optim.warmup_epochs") and (
        task not in FILE_TASKS
    ):
        return f"task.name={task} has no epochs"
    if key == "optim.schedule_unit" and task not in FILE_TASKS:
        return f"task.name={task} has no epochs"
    if key.startswith("optim.warmup") and config.optim.schedule == "constant":
        return "optim.schedule=constant has no warm-up"
    if key == "optim.ema.decay" and not config.optim.ema.enabled:
        return "optim.ema.enabled is False"
    if key == "optim.decay_mask" and not config.optim.weight_decay:
        return "optim.weight_decay is 0"
    return ""


def check_overrides(config: ConfigDict, keys: Iterable[str]) -> None:
    """Refuse overrides that would do nothing.

    Raises:
      UserError: names the key and the reason.
    """
    for key in keys:
        reason = inactive_reason(config, key)
        if reason:
            raise UserError(f"--config.{key} would be ignored: {reason}")
