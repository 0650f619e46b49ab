"""What the policy learns on the embedded problems: fixed, random, threshold, paper and plus.

    python -m bench.reoac_embedded --seeds 0,1,2 --json results/reoac_embedded.json

Trains `configs/gsm8k.py` (plus) and `configs/gsm8k.py:paper` once per seed, then evaluates every
row on the same held-out problems and prints accuracy, steps, cost and return, with 95 % intervals
over problems (results of a problem are averaged over seeds first). The return of every row is
R - lambda * cost / (T * max_cost) with the values of the plus config. A threshold sampler pays the
cheapest operator's price (1.0) per forward pass. Runs are kept and resumed under --root.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import dist, log
from common.flags import load_config
from common.fsdp import Layout
from common.rundir import RunDir, atomic_write_json
from common.statistics import mean_interval, wilson_interval
from reoac_jax.data import load_prompts
from reoac_jax.defaults import finalize
from reoac_jax.engine import compile_rollout
from reoac_jax.evaluate import Evaluation, run_policy
from reoac_jax.evaluation_mode import load_learner
from reoac_jax.learner import LearnerSettings
from reoac_jax.models import Models, load_models
from reoac_jax.pretrain import canvas_of
from reoac_jax.prompts import make_canvas
from reoac_jax.samplers import confidence_decode
from reoac_jax.settings import RolloutSettings
from reoac_jax.train import fresh_state, grader_for, train

FIXED = ("O_NUM", "O_OP", "O_SCOPE", "O_FAST")  # O_BRANCH needs rollout.branching
THRESHOLDS = (0.3, 0.4, 0.5, 0.7, 0.9)


class Row:
    """Per-problem results of one row, [seeds, N] each."""

    def __init__(self, name: str) -> None:
        """A row without results."""
        self.name = name
        self.rewards: list[np.ndarray] = []
        self.costs: list[np.ndarray] = []
        self.steps: list[np.ndarray] = []

    def add(self, rewards: np.ndarray, costs: np.ndarray, steps: np.ndarray) -> None:
        """Results of one seed."""
        self.rewards.append(rewards)
        self.costs.append(costs)
        self.steps.append(steps)

    def returns(self, price: float) -> np.ndarray:
        """[seeds, N] returns; price = lambda / (T * max_cost)."""
        return np.stack(self.rewards) - price * np.stack(self.costs)

    def answered(self) -> np.ndarray:
        """[N] share of the seeds that answer a problem."""
        share: np.ndarray = (np.stack(self.rewards) > 0).mean(axis=0)
        return share

    def summary(self, price: float) -> dict[str, Any]:
        """Means and intervals."""
        returns = self.returns(price)
        accuracy = self.answered()
        mean, low, high = mean_interval(returns.mean(axis=0))
        share, share_low, share_high = mean_interval(accuracy)
        if len(self.rewards) == 1:
            share_low, share_high = wilson_interval(float(accuracy.sum()), len(accuracy))
        return {
            "row": self.name,
            "seeds": len(self.rewards),
            "n": len(accuracy),
            "accuracy": share,
            "accuracy_interval": [share_low, share_high],
            "steps": float(np.mean(self.steps)),
            "cost": float(np.mean(self.costs)),
            "return": mean,
            "return_interval": [low, high],
            "return_by_seed": returns.mean(axis=1).tolist(),
        }


def threshold_row(models: Models, config: Any, prompts: Any, grader: Any, tau: float) -> Row:
    """Parallel confidence decoding at a threshold."""
    backbone, row = models.backbone, Row(f"threshold {tau}")
    index = np.arange(len(prompts))
    decode = jax.jit(
        lambda p, c: confidence_decode(
            backbone, p, c, num_steps=config.rollout.gen_len, threshold=tau
        )
    )
    rewards, forwards = [], []
    for start in range(0, len(prompts), config.eval.batch_size):
        part = np.minimum(np.arange(start, start + config.eval.batch_size), len(prompts) - 1)
        keep = min(config.eval.batch_size, len(prompts) - start)
        canvas = make_canvas(prompts, part, part, backbone.mask_id, backbone.pad_id)
        canvas = canvas_of(canvas.tokens, canvas.prompt_len, config.backbone.max_length)
        done = jax.device_get(decode(models.params, canvas))
        golds = [prompts.golds[i] for i in index[start : start + keep]]
        rewards.append(grader.submit(done.gen_ids[:keep], golds).result().rewards)
        forwards.append(done.forwards[:keep])
    steps = np.concatenate(forwards)
    row.add(np.concatenate(rewards), steps.astype(np.float32), steps)
    return row


def evaluate(
    config: Any, models: Models, learner: Any, prompts: Any, mode: str, progress: str = ""
) -> Evaluation:
    """One greedy (or random, or fixed) evaluation of a learner state; `progress` names its bar."""
    mesh = dist.make_mesh(1)
    settings = RolloutSettings.from_config(config, selection_mode=mode, save_relation=False)
    rollout = compile_rollout(models.backbone, settings, models.tables, config.algo, mesh)
    with grader_for(config, models, evaluation=True) as grader:
        return run_policy(
            rollout,
            learner.backbone,
            learner.agent,
            prompts,
            grader,
            mesh,
            jax.random.key(config.seed + 1000),
            mask_id=models.backbone.mask_id,
            pad_id=models.backbone.pad_id,
            batch_size=config.eval.batch_size,
            progress=progress or f"{config.algo} {mode}",
        )


def untrained(config: Any, models: Models) -> Any:
    """The learner before any update."""
    settings = RolloutSettings.from_config(config)
    learner = LearnerSettings.from_config(config, settings.operators.max_cost)
    return fresh_state(config, models, learner, settings, dist.make_mesh(1), Layout())


def trained(config: Any, models: Models, root: Path) -> Any:
    """Train (or continue, or reuse) a run and return its learner."""
    config = config.copy_and_resolve_references()
    config.eval.limit = 64  # the run's own evaluations; this command makes its own, of all problems
    run = RunDir.create(root, "unused", str(root / f"{config.algo}_seed{config.seed}"))
    if not run.finished:
        with run.lock():
            train(config, run)
    return load_learner(config, models, run.path, dist.make_mesh(1))[0]


def _gain(rows: dict[str, Row], price: float, start: str) -> dict[str, Any]:
    """Return of the trained policy minus that of the best row whose name starts so, paired."""
    others = [row for name, row in rows.items() if name.startswith(start)]
    best = max(others, key=lambda row: row.returns(price).mean())
    trained_returns = rows["plus, trained"].returns(price).mean(axis=0)
    mean, low, high = mean_interval(trained_returns - best.returns(price).mean(axis=0))
    return {"best": best.name, "mean": mean, "interval": [low, high]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--config", default="configs/gsm8k.py")
    parser.add_argument("--problems", type=int, default=2048, help="held-out problems")
    parser.add_argument("--root", default="runs/bench_embedded")
    parser.add_argument("--skip-paper", action="store_true")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    log.quiet_libraries()
    seeds = [int(s) for s in options.seeds.split(",")]
    root = Path(options.root)

    def configured(variant: str, seed: int) -> Any:
        config = load_config(options.config + variant)
        config.seed = seed
        config.dataset.eval_size = options.problems
        finalize(config)
        return config

    started = time.time()
    base = configured("", seeds[0])
    models = load_models(base)
    prompts = load_prompts(base, "test", models.tokenizer)
    max_cost = RolloutSettings.from_config(base).operators.max_cost
    price = base.rollout.cost_lambda / (base.rollout.max_steps * max_cost)
    rows: dict[str, Row] = {}

    def add(name: str, result: Evaluation) -> None:
        rows.setdefault(name, Row(name)).add(result.rewards, result.costs, result.steps)

    with grader_for(base, models, evaluation=True) as grader:
        for tau in THRESHOLDS:
            row = threshold_row(models, base, prompts, grader, tau)
            rows[row.name] = row
    start_state = untrained(base, models)
    for name in FIXED:
        add(f"fixed {name}", evaluate(base, models, start_state, prompts, f"fixed:{name}"))
    train_seconds: dict[str, list[float]] = {"plus": [], "paper": []}
    for seed in seeds:
        config = configured("", seed)
        add("random operators", evaluate(config, models, start_state, prompts, "random"))
        add(
            "plus, untrained",
            evaluate(config, models, untrained(config, models), prompts, "argmax"),
        )
        begin = time.time()
        learner = trained(config, models, root)
        train_seconds["plus"].append(time.time() - begin)
        add("plus, trained", evaluate(config, models, learner, prompts, "argmax"))
        if options.skip_paper:
            continue
        paper = configured(":paper", seed)
        paper_models = load_models(paper)
        state = untrained(paper, paper_models)
        add("paper, untrained", evaluate(paper, paper_models, state, prompts, "argmax"))
        begin = time.time()
        learner = trained(paper, paper_models, root)
        train_seconds["paper"].append(time.time() - begin)
        add("paper, trained", evaluate(paper, paper_models, learner, prompts, "argmax"))

    summaries = [row.summary(price) for row in rows.values()]
    gains = [_gain(rows, price, start) for start in ("fixed", "threshold")]
    print(f"\n{len(prompts)} held-out problems, seeds {options.seeds}")
    head = f"{'':20} {'accuracy':>9} {'(95 %)':>16} {'steps':>7} {'cost':>7} {'return':>8} (95 %)"
    print(head + "\n" + "-" * (len(head) + 10))
    for s in summaries:
        a, r = s["accuracy_interval"], s["return_interval"]
        print(
            f"{s['row']:20} {s['accuracy']:9.1%} ({a[0]:6.1%} to {a[1]:6.1%}) {s['steps']:7.2f} "
            f"{s['cost']:7.2f} {s['return']:8.4f} ({r[0]:.4f} to {r[1]:.4f})"
        )
    for gain in gains:
        low, high = gain["interval"]
        print(
            f"plus, trained minus {gain['best']}: {gain['mean']:+.4f} ({low:+.4f} to {high:+.4f}), "
            "paired over problems"
        )
    if options.json:
        atomic_write_json(
            options.json,
            {
                "command": (
                    f"python -m bench.reoac_embedded --seeds {options.seeds} "
                    f"--problems {options.problems}"
                ),
                "jax": jax.__version__,
                "problems": len(prompts),
                "seeds": seeds,
                "cost_lambda": base.rollout.cost_lambda,
                "max_steps": base.rollout.max_steps,
                "max_cost": max_cost,
                "rows": summaries,
                "gain_over_best_fixed": gains[0],
                "gain_over_best_threshold": gains[1],
                "train_seconds": train_seconds,
                "total_seconds": time.time() - started,
            },
        )
        print(f"written to {options.json}")


if __name__ == "__main__":
    main()
