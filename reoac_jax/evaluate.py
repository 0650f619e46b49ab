"""Evaluation: the greedy policy on held-out prompts, with intervals and a table to read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from common import dist
from common.answers.harness import harness_scores
from common.lm.layers import Params
from common.rundir import atomic_write_json
from common.statistics import mean_interval, wilson_interval
from reoac_jax.episodes import Episodes
from reoac_jax.prompts import PromptSet, make_canvas
from reoac_jax.rewards import Grader
from reoac_jax.settings import Agent
from reoac_jax.types import OPERATORS

RolloutFn = Callable[[Params, Agent, Any, jax.Array], Episodes]


class Evaluation(NamedTuple):
    """Per-problem results of a policy; all arrays [N].

    Attributes:
      rewards, costs, steps: reward in [0, 1], total operator price, decisions taken.
      forwards: backbone passes, those of lookaheads included.
      usage: [5] int, how often each operator ran.
      texts: decoded answers.
      num_failed: answers without a verdict (time limit, crash, undecided); they count as wrong.
      num_timeouts: those of them that hit the time limit.
    """

    rewards: np.ndarray
    costs: np.ndarray
    steps: np.ndarray
    forwards: np.ndarray
    usage: np.ndarray
    texts: list[str]
    num_failed: int
    num_timeouts: int = 0

    def returns(self, cost_lambda: float, max_steps: int, max_cost: float) -> np.ndarray:
        """Reward minus lambda * cost / (T * max_cost), [N]."""
        return self.rewards - cost_lambda * self.costs / (max_steps * max_cost)


def run_policy(
    rollout: RolloutFn,
    params: Params,
    agent: Agent,
    prompts: PromptSet,
    grader: Grader,
    mesh: Mesh,
    key: jax.Array,
    *,
    mask_id: int,
    pad_id: int,
    batch_size: int,
    limit: int = 0,
    progress: str = "",
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Roll out every prompt once, in padded batches of one size (so nothing retraces).

    Args:
      rollout: compiled rollout.
      key: the same key gives the same results; row ids are prompt numbers.
      limit: 0 = all.
      progress: text of the progress bar; "" = no bar.
      before_batch: called before every batch; may raise to leave.
    """
    total = min(limit, len(prompts)) if limit else len(prompts)
    devices = mesh.shape[dist.DATA_AXIS]
    size = -(-min(batch_size, total) // devices) * devices
    pending, costs, steps, forwards = [], [], [], []
    texts: list[str] = []
    usage = np.zeros(len(OPERATORS), np.int64)
    queued: tuple[int, int, Episodes] | None = None

    mine = dist.own_rows(mesh, size)

    def collect(start: int, keep: int, episodes: Episodes) -> None:
        nonlocal usage
        ids, cost, count, passes, operator, active = dist.gather(
            (
                episodes.final_ids,
                episodes.cost,
                episodes.num_steps,
                episodes.num_forwards,
                episodes.steps.operator,
                episodes.steps.active,
            )
        )
        # Each process grades the rows of its own devices.
        golds = prompts.golds[start : start + keep][mine]
        grading = grader.submit(ids[:keep][mine], golds)
        pending.append(grading)
        texts.extend(grading.texts if len(grading.texts) == keep else grader.texts(ids[:keep]))
        costs.append(cost[:keep])
        steps.append(count[:keep])
        forwards.append(passes[:keep])
        usage += np.bincount(operator[:keep][active[:keep]], minlength=len(OPERATORS))

    bar = tqdm(
        total=total, desc=progress, unit="problem", disable=not (progress and dist.is_main())
    )
    with bar:
        for start in range(0, total, size):
            before_batch()
            index = np.minimum(np.arange(start, start + size), total - 1)
            canvas = make_canvas(prompts, index, index, mask_id, pad_id)
            episodes = rollout(params, agent, dist.shard_batch(mesh, canvas), key)
            if queued is not None:  # decode and grade while the next batch rolls out
                collect(*queued)
            queued = (start, min(size, total - start), episodes)
            bar.update(queued[1])
        if queued is not None:
            collect(*queued)
    graded = [p.result() for p in pending]
    share = mine.stop - mine.start
    own = np.stack([np.pad(g.rewards, (0, share - len(g.rewards))) for g in graded], axis=1)
    rewards = np.ascontiguousarray(dist.gather_rows(own).T).reshape(-1)[:total]
    counts = [[sum(g.num_failed for g in graded), sum(g.num_timeouts for g in graded)]]
    failed, late = dist.gather_rows(np.array(counts)).sum(0)
    return Evaluation(
        rewards=rewards,
        costs=np.concatenate(costs),
        steps=np.concatenate(steps),
        forwards=np.concatenate(forwards),
        usage=usage,
        texts=texts,
        num_failed=int(failed),
        num_timeouts=int(late),
    )


def summary(
    result: Evaluation, *, cost_lambda: float, max_steps: int, max_cost: float
) -> dict[str, Any]:
    """Numbers of an evaluation, JSON-ready; intervals are 95 %."""
    n = len(result.rewards)
    correct = int((result.rewards > 0).sum())
    mean, low, high = mean_interval(result.returns(cost_lambda, max_steps, max_cost))
    total = max(int(result.usage.sum()), 1)
    usage = {name: int(c) / total for name, c in zip(OPERATORS, result.usage, strict=True)}
    return {
        "accuracy": correct / n,
        "accuracy_interval": list(wilson_interval(correct, n)),
        "avg_reward": float(result.rewards.mean()),
        "avg_cost": float(result.costs.mean()),
        "avg_steps": float(result.steps.mean()),
        "avg_forwards": float(result.forwards.mean()),
        "avg_return": mean,
        "avg_return_interval": [low, high],
        "operators": usage,
        "n": n,
        "grading_failures": result.num_failed,
        "grading_timeouts": result.num_timeouts,
    }


def breakdown(result: Evaluation, prompts: PromptSet) -> dict[str, Any]:
    """Accuracy by subject and by level, where the data set has them; intervals are 95 %."""
    tables: dict[str, Any] = {}
    for name, labels in (("by_subject", prompts.subjects), ("by_level", prompts.levels)):
        shown = labels[: len(result.rewards)]
        rows: dict[str, Any] = {}
        for label in sorted(set(filter(None, shown))):
            right = [
                bool(r > 0) for r, own in zip(result.rewards, shown, strict=True) if own == label
            ]
            rows[label] = {
                "accuracy": sum(right) / len(right),
                "accuracy_interval": list(wilson_interval(sum(right), len(right))),
                "n": len(right),
            }
        if rows:
            tables[name] = rows
    return tables


def write_report(
    path: Path, numbers: dict[str, Any], result: Evaluation, prompts: PromptSet, num_samples: int
) -> None:
    """eval_<task>.json: summary, tables by subject and level, first samples.

    GSM8K answers are also scored as the lm-evaluation-harness does (`harness`).

    The main process writes.
    """
    if not dist.is_main():
        return
    shown = min(num_samples, len(result.texts))
    samples = [
        {
            "prompt": prompts.texts[i],
            "gold": prompts.golds[i],
            "final_text": result.texts[i],
            "reward": float(result.rewards[i]),
            "cost": float(result.costs[i]),
            "steps": int(result.steps[i]),
        }
        for i in range(shown)
    ]
    golds = list(prompts.golds[: len(result.texts)])
    compared: dict[str, Any] = {}
    if golds and all("####" in gold for gold in golds):
        compared["harness"] = harness_scores(result.texts, golds)._asdict()
    atomic_write_json(path, numbers | compared | breakdown(result, prompts) | {"samples": samples})


def format_table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A table of summaries, one named row each."""
    width = max(len(name) for name, _ in rows)
    head = f"{'':{width}}   accuracy  (95 % interval)   steps    cost   return  (95 % interval)"
    lines = [head, "-" * len(head)]
    for name, s in rows:
        low, high = s["accuracy_interval"]
        rlow, rhigh = s["avg_return_interval"]
        lines.append(
            f"{name:{width}}   {s['accuracy']:7.1%}  ({low:6.1%} to {high:6.1%}) "
            f"{s['avg_steps']:7.2f} {s['avg_cost']:7.2f}  {s['avg_return']:7.3f}  "
            f"({rlow:.3f} to {rhigh:.3f})"
        )
    return "\n".join(lines)
