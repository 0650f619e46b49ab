"""Around a rollout, on the host: batches of episodes, their grades, buffer rows, sample files."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common import dist
from common.rundir import RunDir, atomic_write_json
from reoac_jax.episodes import Episodes
from reoac_jax.learner_paper import PaperEpisode
from reoac_jax.learner_state import LearnerState
from reoac_jax.models import Models
from reoac_jax.prompts import PromptSet, make_canvas
from reoac_jax.rewards import Graded, Grader, PendingGrades
from reoac_jax.trace import episode_trace
from reoac_jax.types import OPERATORS


def roll_out_and_grade(
    rollout: Callable[..., Episodes],
    state: LearnerState,
    prompts: PromptSet,
    rows: np.ndarray,
    row_ids: np.ndarray,
    batch_size: int,
    models: Models,
    mesh: Mesh,
    grader: Grader,
    key: jax.Array,
    grade_trials: bool = False,
) -> tuple[Episodes, Graded]:
    """Episodes for prompts `rows`, in batches; each batch is graded while the next rolls out.

    Every process builds and grades the rows on its own devices; rewards are then exchanged.

    Args:
      grade_trials: the episodes' branches were played to their ends; their rewards are filled in.

    Returns:
      the episodes, and their grades: rewards of all rows, texts of this process's rows alone.
    """
    finished: list[Episodes] = []
    pending: list[PendingGrades] = []
    trials: list[PendingGrades] = []
    mine = dist.own_rows(mesh, batch_size)

    def submit(episodes: Episodes, start: int) -> None:
        ids = dist.local_rows(episodes.final_ids)  # waits for this batch; the next one is queued
        golds = [prompts.golds[i] for i in rows[start : start + batch_size][mine]]
        pending.append(grader.submit(ids, golds))
        if grade_trials and episodes.branches is not None:
            ends = dist.local_rows(episodes.branches.final_ids)  # [own rows, S, K, G]
            each = ends.shape[1] * ends.shape[2]
            repeated = [gold for gold in golds for _ in range(each)]
            trials.append(grader.submit(ends.reshape(-1, ends.shape[-1]), repeated))

    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        canvas = make_canvas(
            prompts,
            rows[part][mine],
            row_ids[part][mine],
            models.backbone.mask_id,
            models.backbone.pad_id,
        )
        batch = dist.from_own_rows(mesh, canvas, batch_size)
        episodes = rollout(state.backbone, state.agent, batch, key)
        if finished:
            submit(finished[-1], start - batch_size)
        finished.append(episodes)
    submit(finished[-1], len(rows) - batch_size)
    graded = [p.result() for p in pending]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *finished)
    # [own rows, batches] -> [rows, batches]: one exchange for the whole iteration.
    rewards = dist.gather_rows(np.stack([g.rewards for g in graded], axis=1))
    if grade_trials:
        tried = joined.branches.tried
        own = np.stack([p.result().rewards.reshape(mine.stop - mine.start, -1) for p in trials], 1)
        outcome = np.moveaxis(dist.gather_rows(own), 1, 0).reshape(tried.shape)
        reward = dist.shard_batch(mesh, outcome) * tried
        branches = dataclasses.replace(joined.branches, reward=reward)
        joined = dataclasses.replace(joined, branches=branches)
    counts = [[sum(g.num_failed for g in graded), sum(g.num_timeouts for g in graded)]]
    failed, late = dist.gather_rows(np.array(counts)).sum(0)
    return joined, Graded(
        texts=[text for g in graded for text in g.texts],
        rewards=np.ascontiguousarray(rewards.T).reshape(-1),
        num_failed=int(failed),
        num_timeouts=int(late),
    )


def paper_episodes(
    episodes: Episodes, rewards: np.ndarray, prompts: PromptSet, rows: np.ndarray, lam: float
) -> PaperEpisode:
    """What the buffer keeps of a batch, on the host."""
    host = dist.gather(dataclasses.replace(episodes, relation=None))
    return PaperEpisode(
        features=host.steps.features,
        operator=host.steps.operator,
        gen_before=host.steps.gen_before,
        written=host.steps.written,
        canvas=host.canvas,
        returns=(rewards - lam * host.cost).astype(np.float32),
        target=prompts.absolute_target[rows],
        target_len=prompts.absolute_len[rows],
    )


def write_samples(
    run: RunDir,
    iteration: int,
    episodes: Episodes,
    rewards: np.ndarray,
    models: Models,
    grader: Grader,
    prompts: PromptSet,
    rows: np.ndarray,
    config: ConfigDict,
) -> None:
    """samples/iter{i}_step{j}.json of the first episodes; features are those of the last step.

    Collective: the rows may lie on other processes; the main one writes.
    """
    count = min(config.logging.num_samples, len(rows))
    # Null where there is none, empty where it was not kept.
    missing: list[float] | None = None if config.rollout.fast_critic else []
    branches = tuple(config.rollout.branch_steps), config.rollout.branch_k
    part = dist.gather(jax.tree.map(lambda x: x[:count], episodes))
    if not dist.is_main():
        return
    texts = grader.texts(part.final_ids)
    decode = functools.partial(models.tokenizer.decode, skip_special=False)
    for j in range(count):
        last = max(int(part.num_steps[j]) - 1, 0)
        relation = missing
        if part.relation is not None and not config.rollout.fast_critic:
            relation = part.relation[j, : int(part.canvas.prompt_len[j])].round(6).tolist()
        ran = part.steps.operator[j][part.steps.active[j]]
        atomic_write_json(
            run.samples / f"iter{iteration}_step{j}.json",
            {
                "prompt": prompts.texts[rows[j]],
                "gold": prompts.golds[rows[j]],
                "final_text": texts[j],
                "reward": float(rewards[j]),
                "cost": float(part.cost[j]),
                "steps": int(part.num_steps[j]),
                "operators": [OPERATORS[a] for a in ran],
                "operator_id": OPERATORS[int(part.steps.operator[j, last])],
                "feature_vector": part.steps.features[j, last].round(6).tolist(),
                "relation": relation,
                "branch_candidates": _branch_candidates(part, j, *branches),
                "trace": episode_trace(part, j, decode, models.backbone.mask_id),
            },
        )


def _branch_candidates(
    episodes: Episodes, row: int, branch_steps: tuple[int, ...], branch_k: int
) -> list[dict[str, Any]]:
    """The top operators by Q at the steps named, and wherever O_BRANCH ran (a log field)."""
    found = []
    for t in range(int(episodes.num_steps[row])):
        branched = OPERATORS[int(episodes.steps.operator[row, t])] == "O_BRANCH"
        if t in branch_steps or branched:
            q = episodes.steps.q[row, t]
            best = np.argsort(-q, kind="stable")[:branch_k]
            found.append({"step": t, "candidates": [[OPERATORS[a], float(q[a])] for a in best]})
    return found
