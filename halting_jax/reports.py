"""What a run says: rows of the log, the progress bar, the final table."""

from typing import Any

from ml_collections import ConfigDict

from common import dist
from common.rundir import RunDir, atomic_write_json
from halting_jax import log_names
from halting_jax.build import Built
from halting_jax.evaluate import SetResult, difficulty_rows, format_difficulty
from halting_jax.learner import Sums
from halting_jax.ponder_sums import ponder_report
from halting_jax.source import is_file_task
from halting_jax.tasks.maze_metrics import finalize as maze_finalize


def training_row(config: ConfigDict, built: Built, sums: Sums) -> dict[str, float]:
    """The logged values of the steps behind some sums."""
    finalize = maze_finalize if is_file_task(config) else _mean_values
    means = dict(sums.means)
    terms = {name: _value(means.pop(name)) for name in ("classification", "ponder")}
    tau = float(sums.tau)
    charged = config.act.kind == "act" or config.model.type == "universal_transformer"
    added = 0.0 if config.act.disable_ponder_cost or not charged else tau * terms["ponder"]
    losses = {
        "classification": terms["classification"],
        "ponder": terms["ponder"],
        "ponder_added": added,
        "total": terms["classification"] + added,
    }
    row = log_names.train_row(
        config.task.name,
        config.model.type,
        finalize(means),
        ponder_report(sums.ponder),
        losses,
        tau,
    )
    row["debug/grad_norm"] = float(sums.grad_norm)
    row["lr"] = float(sums.rate)
    row["mean_inner_steps_executed"] = ponder_report(sums.ponder)["mean_inner_steps_executed"]
    if sums.nan_count or sums.inf_count:
        row["debug/grad_nan_param_count"] = int(sums.nan_count)
        row["debug/grad_inf_param_count"] = int(sums.inf_count)
        row["debug/grad_norm_at_anomaly"] = row["debug/grad_norm"]
    return row


def _value(ratio: Any) -> float:
    return float(ratio.total) / float(ratio.count) if ratio.count else 0.0


def _mean_values(means: dict[str, Any]) -> dict[str, float]:
    return {name: _value(ratio) for name, ratio in means.items()}


def progress_text(config: ConfigDict, row: dict[str, float], timing: dict[str, float]) -> str:
    """What the progress bar shows beside its rate."""
    prefix = "" if is_file_task(config) else "train/"
    loss = row[f"{prefix}loss_cls" if not prefix else f"{prefix}loss_classification"]
    steps = row["steps" if not prefix else f"{prefix}ponder_steps"]
    shown = [f"loss={loss:.4f}", f"ponder={steps:.2f}"]
    shown += [
        f"{name.removeprefix(prefix)}={row[name]:.3f}"
        for name in (f"{prefix}{n}" for n in _ACCURACIES)
        if name in row
    ]
    return " ".join([*shown, f"ex/s={timing['speed/examples_per_second']:.0f}"])


_ACCURACIES = (
    "puz_acc",
    "cell_acc",
    "accuracy",
    "accuracy_sequence",
    "sequence_accuracy",
    "per_token_accuracy",
)


def write_report(
    config: ConfigDict,
    run: RunDir,
    step: int,
    table: dict[str, dict[str, float]],
    results: dict[str, SetResult],
    trivial: dict[str, dict[str, float]],
    seconds: float,
) -> None:
    """Writes eval.json and prints the final table; the main process does."""
    if not dist.is_main():
        return
    report: dict[str, Any] = {"step": step, "seconds": seconds, "sets": table}
    if config.eval.by_difficulty:
        report["by_difficulty"] = {name: difficulty_rows(r) for name, r in results.items()}
    if trivial:
        report["copy_input"] = trivial
    atomic_write_json(run.path / "eval.json", report)
    print("\n" + format_table(results) + format_trivial(trivial))
    last = list(results)[-1] if len(results) > 1 else "val"
    shown = next((n for n in results if n not in ("val", last)), last)
    if config.eval.by_difficulty:
        print(f"\n{shown}, by difficulty (bits, digits, gates, items, symbols or moves)")
        print(format_difficulty(report["by_difficulty"][shown]))
    print(f"\n{step} steps, {seconds:.0f} s of training; files in {run.path}")


def format_table(results: dict[str, SetResult]) -> str:
    """One line per set: examples, loss, steps, and every metric; "-" where a set has none."""
    names = list(dict.fromkeys(n for result in results.values() for n in result.metrics))
    head = ["set", "examples", "loss", "steps", *names]
    lines = ["  ".join(f"{h:>10}" for h in head)]
    lines.append("-" * len(lines[0]))
    for name, result in results.items():
        cells = [f"{name:>10}", f"{len(result.correct):>10}"]
        cells += [f"{result.losses['classification']:>10.4f}", f"{result.ponder['steps']:>10.2f}"]
        for metric in names:
            value = result.metrics.get(metric)
            cells.append(f"{'-' if value is None else f'{value:.4f}':>{max(len(metric), 10)}}")
        lines.append("  ".join(cells))
    return "\n".join(lines)


def format_trivial(trivial: dict[str, dict[str, float]]) -> str:
    """A line per set about the predictor that returns its input, to be put below the table."""
    return "".join(
        f"\ncopying the input, {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items())
        for name, values in trivial.items()
    )
