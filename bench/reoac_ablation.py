"""Which parts of the plus method matter: each left out in turn, on the embedded problems.

    python -m bench.reoac_ablation --seeds 0,1,2 --json results/reoac_ablation.json \
        --plot results/reoac_pareto.png

The full method trains the policy with group baselines, void operators masked, progress and hidden
features, trials of other operators at two steps with O_BRANCH open, and the backbone (policy
gradient and supervised loss). Every row leaves one of these out; `paper` is the original's
algorithm. Accuracy, decisions, backbone passes (lookaheads included) and return on held-out
problems, with 95 % intervals over problems (not over seeds: differences are also given by seed).
The picture shows accuracy against passes beside threshold decoding. Finished rows are kept under
--root, so the command can be stopped and repeated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bench.reoac_embedded import THRESHOLDS, Row, evaluate, threshold_row, trained
from common import log
from common.flags import load_config
from common.rundir import atomic_write, atomic_write_json
from common.statistics import mean_interval
from reoac_jax.data import load_prompts
from reoac_jax.defaults import finalize
from reoac_jax.models import load_models
from reoac_jax.settings import RolloutSettings
from reoac_jax.train import grader_for

BRANCH_STEPS = (0, 2)
FULL: dict[str, Any] = {
    "rollout.branch_steps": BRANCH_STEPS,
    "rollout.branching": True,
    "finetune_mode": "full",
    "rollout.use_hidden": True,
    "optim.anneal": False,
}
WITHOUT: dict[str, dict[str, Any]] = {
    "plus": {},
    "without group baseline": {"rollout.group_size": 1},
    "without masking void operators": {"rollout.valid_mask": False},
    "without progress features": {"rollout.use_progress": False},
    "without hidden features": {"rollout.use_hidden": False},
    "without branches": {"rollout.branch_steps": (), "rollout.branching": False},
    "without backbone update": {"finetune_mode": "none"},
}
PAPER = "paper"


def configured(name: str, seed: int, problems: int, iterations: int) -> ConfigDict:
    """The config of a row.

    Args:
      name: of `WITHOUT`, or "paper".
      problems: held-out ones.
      iterations: of training; 0 = the config's.
    """
    config = load_config("configs/gsm8k.py" + (":paper" if name == PAPER else ""))
    changes = {} if name == PAPER else FULL | WITHOUT[name]
    config.update_from_flattened_dict(changes)
    config.seed = seed
    config.dataset.eval_size = problems
    if iterations:
        config.num_iterations = iterations
    finalize(config)
    return config


def measure(name: str, config: ConfigDict, root: Path) -> dict[str, list[float]]:
    """Per-problem results of one trained row; read back if it was measured before."""
    slug = name.replace(" ", "_")
    path = root / f"{slug}_seed{config.seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    models = load_models(config)
    learner = trained(config, models, root / slug)
    # As trained: O_BRANCH is one operator among others, no step is forced to look ahead.
    prompts = load_prompts(config, "test", models.tokenizer)
    result = evaluate(config, models, learner, prompts, "argmax", progress=name)
    found = {
        "rewards": result.rewards.tolist(),
        "costs": result.costs.tolist(),
        "steps": result.steps.tolist(),
        "forwards": result.forwards.tolist(),
    }
    atomic_write_json(path, found, indent=None)
    return found


def draw(points: list[dict[str, Any]], curve: list[dict[str, Any]]) -> bytes:
    """Accuracy against backbone passes, PNG: trained rows, and threshold decoding as a line."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ordered = sorted(curve, key=lambda row: row["forwards"])
    axes.plot(
        [row["forwards"] for row in ordered],
        [row["accuracy"] for row in ordered],
        "k.--",
        label="threshold decoding",
    )
    for row in points:
        low, high = row["accuracy_interval"]
        error = [[row["accuracy"] - low], [high - row["accuracy"]]]
        axes.errorbar(
            row["forwards"], row["accuracy"], yerr=error, fmt="o", capsize=3, label=row["row"]
        )
    axes.set(
        xscale="log", xlabel="backbone passes per problem", ylabel="accuracy on held-out problems"
    )
    axes.xaxis.set_major_locator(FixedLocator([1, 2, 3, 4, 6, 8, 12, 20]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*WITHOUT, PAPER]
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default=",".join(names), help="names separated by commas")
    parser.add_argument("--problems", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=0, help="0 = the config's")
    parser.add_argument("--root", default="runs/bench_ablation")
    parser.add_argument("--json", default="")
    parser.add_argument("--plot", default="")
    options = parser.parse_args()
    unknown = [name for name in options.rows.split(",") if name not in names]
    if unknown:
        parser.error(f"--rows: '{unknown[0]}' is none of {', '.join(names)}")
    log.quiet_libraries()
    root, seeds = Path(options.root), [int(s) for s in options.seeds.split(",")]
    base = configured("plus", seeds[0], options.problems, options.iterations)
    settings = RolloutSettings.from_config(base)
    models = load_models(base)
    prompts = load_prompts(base, "test", models.tokenizer)

    def finished(row: Row, forwards: list[np.ndarray]) -> dict[str, Any]:
        return row.summary(settings.price) | {"forwards": float(np.mean(forwards))}

    full: Row | None = None
    thresholds: list[Row] = []
    summaries, curve = [], []
    with grader_for(base, models, evaluation=True) as grader:
        for tau in (0.2, *THRESHOLDS, 0.8, 0.95):
            row = threshold_row(models, base, prompts, grader, tau)
            curve.append(finished(row, row.steps))
            thresholds.append(row)
    for name in options.rows.split(","):
        row, forwards = Row(name), []
        for seed in seeds:
            config = configured(name, seed, options.problems, options.iterations)
            found = {k: np.asarray(v) for k, v in measure(name, config, root).items()}
            row.add(found["rewards"], found["costs"], found["steps"])
            forwards.append(found["forwards"])
        summaries.append(finished(row, forwards))
        if name == "plus":
            full = row
            summaries[-1]["accuracy_minus_threshold"] = {
                other.name: mean_interval(row.answered() - other.answered()) for other in thresholds
            }
        elif full is not None:
            gain = row.returns(settings.price) - full.returns(settings.price)
            summaries[-1]["return_minus_plus"] = mean_interval(gain.mean(axis=0))
            summaries[-1]["return_minus_plus_by_seed"] = gain.mean(axis=1).tolist()
        s = summaries[-1]
        low, high = s["return_interval"]
        print(
            f"{name:32} accuracy {s['accuracy']:6.1%}  decisions {s['steps']:6.2f}  passes "
            f"{s['forwards']:6.2f}  return {s['return']:7.4f} ({low:.4f} to {high:.4f})"
        )
        if options.json:
            atomic_write_json(
                options.json,
                {
                    "command": (
                        f"python -m bench.reoac_ablation --seeds {options.seeds} --problems "
                        f"{options.problems} --iterations {options.iterations}"
                    ),
                    "problems": len(prompts),
                    "seeds": seeds,
                    "branch_steps": list(BRANCH_STEPS),
                    "rows": summaries,
                    "threshold": curve,
                },
            )
    if options.plot:
        atomic_write(options.plot, draw(summaries, curve))


if __name__ == "__main__":
    main()
