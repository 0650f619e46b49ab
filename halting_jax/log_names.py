"""The names under which measurements are logged, one place for all tasks and models."""

from collections.abc import Mapping
from typing import Any

from halting_jax.defaults import FILE_TASKS

# Metrics of a task that stand in the log as they are; the ponder statistics are added here.
_MAZE_STATISTICS = ("steps", "steps_p50", "steps_p90", "remainder_mean", "remainder_std")
_STEP_NAME = {
    "parity": "steps",
    "logic": "ponder_steps",
    "addition": "ponder_steps",
    "sort": "ponder_steps",
    "copy": "ponder_steps",
    "reverse": "ponder_steps",
    "string_addition": "ponder_steps",
}


def train_row(
    task: str,
    model: str,
    metrics: Mapping[str, float],
    ponder: Mapping[str, Any],
    losses: Mapping[str, float],
    tau: float,
) -> dict[str, float]:
    """One row of training metrics.

    Args:
      task, model: `task.name` and `model.type`.
      metrics: of the task, without prefix.
      ponder: of `ponder_sums.ponder_report`.
      losses: "classification", "ponder" (mean N + R), "total", "ponder_added" (what was added).
      tau: time penalty (or weight of the ponder loss) now.
    """
    if task in FILE_TASKS:
        row = {
            "train_loss": losses["total"],
            "loss_cls": losses["classification"],
            "ponder_cost": tau * losses["ponder"],
            "ponder_cost_effective": losses["ponder_added"],
            **metrics,
            **{name: ponder[name] for name in _MAZE_STATISTICS},
        }
        if model == "act_rnn":
            row["time_penalty_current"] = tau
            row["halt_natural_ratio"] = ponder["halt_natural_ratio"]
            row["halt_forced_ratio"] = ponder["halt_forced_ratio"]
            curve = ponder["accumulated_p"]
            row |= {f"accumulated_p_t{n:02d}": float(v) for n, v in enumerate(curve, start=1)}
        else:
            row["forced_halt_ratio"] = ponder["halt_forced_ratio"]
        return row
    row = {
        "loss_classification": losses["classification"],
        "loss_ponder": losses["ponder_added"],
        "loss_total": losses["total"],
        **metrics,
        **_toy_steps(task, model, ponder),
        "ponder_steps": ponder["steps"],
        "time_penalty_current": tau,
    }
    return {f"train/{name}": value for name, value in row.items()}


def eval_row(
    task: str,
    model: str,
    split: str,
    metrics: Mapping[str, float],
    ponder: Mapping[str, Any],
    losses: Mapping[str, float],
    suffix: str = "",
) -> dict[str, float]:
    """One row of evaluation metrics of a set.

    Args:
      task, model, metrics, ponder, losses: as in `train_row`.
      split: "val", "test" or the name of a test set.
      suffix: "_ema" for the averaged weights.
    """
    if task in FILE_TASKS:
        renamed = dict(metrics)
        # The original's name of the share of examples that are right in every cell.
        if "puz_acc" in renamed:
            renamed["acc"] = renamed.pop("puz_acc")
        row = {"loss_cls": losses["classification"], **renamed}
        row |= {name: ponder[name] for name in _MAZE_STATISTICS}
        if model == "act_rnn":
            row["halt_natural_ratio"] = ponder["halt_natural_ratio"]
            row["halt_forced_ratio"] = ponder["halt_forced_ratio"]
        else:
            row["forced_halt_ratio"] = ponder["halt_forced_ratio"]
        row["mean_inner_steps_executed"] = ponder["mean_inner_steps_executed"]
        return {f"{split}_{name}{suffix}": value for name, value in row.items()}
    row = {
        "loss_classification": losses["classification"],
        "loss_ponder": losses["ponder_added"],
        **metrics,
        **_toy_steps(task, model, ponder),
        "mean_inner_steps_executed": ponder["mean_inner_steps_executed"],
    }
    prefix = "val" if split == "val" else f"test/{split}"
    return {f"{prefix}/{name}{suffix}": value for name, value in row.items()}


def _toy_steps(task: str, model: str, ponder: Mapping[str, Any]) -> dict[str, float]:
    row = {_STEP_NAME[task]: ponder["steps"]}
    if model == "universal_transformer":
        row |= {
            "mean_steps": ponder["steps"],
            "steps_p50": ponder["steps_p50"],
            "steps_p90": ponder["steps_p90"],
            "forced_halt_ratio": ponder["halt_forced_ratio"],
        }
    return row
