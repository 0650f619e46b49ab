"""The stage mine: rollouts of the training questions, graded, and the pairs made from them.

Both halves are journals: `rollouts.jsonl` grows by one line per finished rollout, the pairs by one
file per batch of questions, so that a killed run loses no more than what was being computed.
"""

import collections
import functools
import json
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common.engines.base import Decoding, Rollout
from common.engines.delimiter import find_ends
from common.errors import UserError, require
from common.rundir import (
    append_jsonl,
    atomic_write,
    atomic_write_json,
    json_text,
    read_jsonl,
    repair_jsonl,
)
from esm.core.reward import reward
from esm.core.sets import SetRules
from esm.datasets import TaskExample
from esm.examples import identities, row_of, train_examples
from esm.files import FORMAT_VERSION, ROLLOUT, read_arrays, save_array, save_arrays
from esm.grading import Grader, grade
from esm.layers import resolve_layers, top_third
from esm.monitor import Monitor
from esm.pairs import (
    GOLD,
    MineRules,
    Pair,
    Rollouts,
    candidate_rows,
    choose_sets,
    keep_best,
    pair_keys,
    pairs_of,
)
from esm.prompts import delimiter_share
from esm.runs import Run
from esm.segments import end_offsets
from esm.session import Session, Sessions

STATES_BATCH = 16
"""Questions per file of pairs."""
FINISH_NAMES = {"delimiter": "stop", "eos": "stop", "length": "length"}


def mine_rollouts(config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor) -> None:
    """Samples K answers to every training question and grades them."""
    mine = config.offline_mine
    examples = train_examples(config)
    path = run.mine / "rollouts.jsonl"
    repair_jsonl(path)
    rows = read_jsonl(path, ROLLOUT) if path.exists() else []
    done = {(row["example_id"], row["k"]) for row in rows}
    references = _with_reference(config, examples)
    # A crash of the machine may tear off the last line even of a journal that was complete.
    complete = done >= {(e.id, k) for e in examples for k in range(mine.K)}
    complete = complete and done >= {(e.id, GOLD) for e in references}
    if complete and (run.mine / "rollouts.json").is_file():
        monitor.info(f"rollouts are complete: {path}")
        return
    session = sessions.get("rollouts")
    run.mine.mkdir(parents=True, exist_ok=True)
    _write_references(config, references, session, path, done)
    wanted = [
        (place, [k for k in range(mine.K) if (example.id, k) not in done])
        for place, example in enumerate(examples)
    ]
    missing = sum(len(ks) for _, ks in wanted)
    total = mine.K * len(examples)
    monitor.info(f"mining {len(examples)} questions, {missing} rollouts to go")
    decoding = Decoding(mine.temperature, mine.top_p, session.stop_ids, config.seed)
    size = mine.batch_size_examples if mine.batch_size_examples > 0 else len(wanted)
    start, tokens = time.monotonic(), 0
    with (
        Grader(config.prompt.template, config.eval.grader, config.eval.grader_workers) as grader,
        monitor.progress("rollouts", total, total - missing) as bar,
    ):

        def save(wait: bool = False) -> None:
            for row, verdict in grader.done(wait):
                row |= verdict.fields(legacy=False)
                row["reward"] = _reward(row["correct"], row["gen_tokens"], config)
                append_jsonl(path, row)
                bar.update()

        for first in range(0, len(wanted), size):
            batch = wanted[first : first + size]

            def finished(
                i: int, j: int, rollout: Rollout, batch: list[tuple[int, list[int]]] = batch
            ) -> None:
                nonlocal tokens
                place, ks = batch[i]
                example = examples[place]
                row = _rollout_row(example.task, example.id, ks[j], rollout, session)
                tokens += len(rollout.token_ids)
                grader.submit(row, example, row["text"], row["finish_reason"])
                save(wait=monitor.stopping)
                bar.set_postfix(tok_s=round(tokens / max(time.monotonic() - start, 1e-9)))
                monitor.check("finished rollouts are")

            session.engine.sample(
                [session.prompt(examples[place]) for place, _ in batch],
                # A row's randomness is its question's and its own number.
                [[row_of(examples[place], k) for k in ks] for place, ks in batch],
                decoding,
                mine.max_new_tokens,
                finished,
                mine.K * len(batch),
            )
            save(wait=True)
    _finish_rollouts(config, examples, run, session, monitor, time.monotonic() - start, tokens)


def mine_states(config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor) -> None:
    """Reads the states of chosen answers and writes the candidates."""
    if (run.mine / "manifest.json").is_file():
        monitor.info(f"mining is complete: {run.mine / 'candidates.jsonl'}")
        return
    require(
        (run.mine / "rollouts.json").is_file(),
        f"{run.mine} has no finished rollouts; run --stage=mine.rollouts first",
    )
    session = sessions.get("states")
    engine = session.engine
    layers = mined_layers(config, engine.num_layers)
    rules = mine_rules(config)
    examples = train_examples(config)
    questions = read_rollouts(config, run, session, examples)
    shards = run.mine / "states"
    shards.mkdir(exist_ok=True)
    starts = range(0, len(questions), STATES_BATCH)
    skipped: collections.Counter[str] = collections.Counter()
    pairs: list[Pair] = []
    monitor.info(f"states of layers {', '.join(map(str, layers))} at m = 1..{rules.max_points}")
    read = functools.partial(_read_layers, session, layers)
    with monitor.progress("states", len(questions)) as bar:
        for number, start in enumerate(starts):
            batch = questions[start : start + STATES_BATCH]
            shard = shards / f"{number:05d}.npz"
            if not shard.is_file():
                chosen = choose_sets(batch, rules)
                found, left_out = pairs_of(
                    batch, chosen, layers, read, engine.hidden_size, rules, STATES_BATCH
                )
                _save_shard(shard, found, left_out, engine.hidden_size)
                monitor.check("finished pairs are")
            found, left_out = _load_shard(shard)
            skipped += left_out
            # What cannot be among the best any more need not be held.
            pairs = keep_best([*pairs, *found], rules.keep)
            bar.update(len(batch))
    _finish_states(config, run, session, examples, layers, pairs, skipped, monitor)
    shutil.rmtree(shards)


def mine_rules(config: ConfigDict) -> MineRules:
    """The rules of a config."""
    mine = config.offline_mine
    contrast = mine.require_correct_and_incorrect and mine.method != "random"
    last = 0 if mine.mine_last else 1
    return MineRules(
        sets=SetRules(
            k_pos=mine.K_pos,
            k_neg=mine.K_neg,
            contrast=bool(contrast),
            min_correct=mine.min_correct_rollouts,
            min_incorrect=mine.min_incorrect_rollouts,
            positive_source=mine.pos_source,
        ),
        method=mine.method,
        max_points=max(1, config.control_points.M - last),
        max_tokens=mine.max_new_tokens,
        eta0=mine.eta0,
        quality=mine.quality,
        keep=mine.keep_top_C,
        seed=config.seed,
    )


def mined_layers(config: ConfigDict, num_layers: int) -> tuple[int, ...]:
    """The layers whose states are read."""
    specs = config.offline_mine.candidate_layers
    return resolve_layers(specs, num_layers) if specs else top_third(num_layers)


def read_rollouts(
    config: ConfigDict, run: Run, session: Session, examples: list[TaskExample]
) -> list[Rollouts]:
    """The journal as questions.

    Raises:
        UserError: it lacks a rollout of a question.
    """
    path = run.mine / "rollouts.jsonl"
    by_key = {(row["example_id"], row["k"]): row for row in read_jsonl(path, ROLLOUT)}
    questions: list[Rollouts] = []
    for order, example in enumerate(examples):
        answers: list[dict[str, Any] | None] = []
        for k in range(config.offline_mine.K):
            if (example.id, k) not in by_key:
                raise UserError(
                    f"{path} lacks rollout {k} of question {example.id}; delete "
                    f"{run.mine / 'rollouts.json'} and run --stage=mine again to add it"
                )
            answers.append(by_key[example.id, k])
        answers.append(by_key.get((example.id, GOLD)))
        ids = [[] if answer is None else answer["token_ids"] for answer in answers]
        ends = find_ends(session.automaton, ids)
        prompt = session.prompt(example)
        questions.append(Rollouts(order, example.id, example.task, prompt, answers, ends))
    return questions


def _rollout_row(
    task: str, example_id: str, k: int, rollout: Rollout, session: Session
) -> dict[str, Any]:
    return {
        "task": task,
        "example_id": example_id,
        "k": k,
        "source": "rollout",
        "gen_tokens": len(rollout.token_ids),
        "text": session.text(rollout.token_ids),
        "token_ids": rollout.token_ids,
        "finish_reason": FINISH_NAMES[rollout.finish],
        "logprob_sum": round(float(np.sum(rollout.log_probs)), 6),
    }


def _with_reference(config: ConfigDict, examples: list[TaskExample]) -> list[TaskExample]:
    """The questions whose reference answer is mined: it reaches a control point."""
    if config.offline_mine.pos_source == "rollout":
        return []
    delimiter = config.control_points.segment_delimiter
    return [example for example in examples if end_offsets(str(example.answer), delimiter)]


def _write_references(
    config: ConfigDict,
    examples: list[TaskExample],
    session: Session,
    path: Any,
    done: set[tuple[str, int]],
) -> None:
    """Reference answers, as rows with k = -1."""
    for example in examples:
        text = str(example.answer)
        if (example.id, GOLD) in done:
            continue
        ids = session.encode(text)
        verdict = grade(example, text, "stop", config.prompt.template, config.eval.grader)
        row = {
            "task": example.task,
            "example_id": example.id,
            "k": GOLD,
            "source": "gold",
            "gen_tokens": len(ids),
            "text": text,
            "token_ids": ids,
            "finish_reason": "reference",
            "logprob_sum": None,
            **verdict.fields(legacy=False),
        }
        row["reward"] = _reward(verdict.correct, len(ids), config)
        append_jsonl(path, row)


def _reward(correct: bool, tokens: int, config: ConfigDict) -> float:
    mine = config.offline_mine
    with jax.enable_x64(True):
        value = reward(jnp.asarray(correct), jnp.asarray(tokens), mine.max_new_tokens, mine.eta0)
        return float(value)


def _finish_rollouts(
    config: ConfigDict,
    examples: list[TaskExample],
    run: Run,
    session: Session,
    monitor: Monitor,
    seconds: float,
    tokens: int,
) -> None:
    """Sorts the journal and says what came out."""
    path = run.mine / "rollouts.jsonl"
    order = {example.id: place for place, example in enumerate(examples)}
    rows = read_jsonl(path, ROLLOUT)
    if strange := [row for row in rows if row["example_id"] not in order]:
        raise UserError(
            f"{path} holds question {strange[0]['example_id']}, which is not mined; choose another "
            "--run_id, or remove its rows"
        )
    rows.sort(key=lambda row: (order[row["example_id"]], row["k"]))
    atomic_write(path, "".join(json_text(row) + "\n" for row in rows))
    sampled = [row for row in rows if row["k"] != GOLD]
    texts = (row["text"] for row in sampled)
    share = delimiter_share(config.prompt.template, texts, session.delimiter)
    right = collections.Counter(row["example_id"] for row in sampled if row["correct"])
    mixed = sum(0 < right[example.id] < config.offline_mine.K for example in examples)
    accuracy = float(np.mean([row["correct"] for row in sampled]))
    ends = session.delimiter
    summary = {
        "format_version": FORMAT_VERSION,
        "questions": len(examples),
        "rollouts": len(sampled),
        "accuracy": accuracy,
        "mixed_questions": mixed,
        "delimiter_share": share.share,
        "segments_mean": float(np.mean([len(end_offsets(r["text"], ends)) for r in sampled])),
        "gen_tokens_mean": float(np.mean([row["gen_tokens"] for row in sampled])),
        "template": config.prompt.template,
    }
    atomic_write_json(run.mine / "rollouts.json", summary)
    monitor.scalars(
        len(sampled),
        {
            "mine/accuracy": accuracy,
            "mine/delimiter_share": share.share,
            "mine/tokens_per_second": tokens / max(seconds, 1e-9),
        },
    )
    monitor.info(
        f"rollouts: {len(sampled)}, {accuracy:.1%} correct, right and wrong ones for {mixed} of "
        f"{len(examples)} questions, {share.share:.0%} with a segment end, {tokens} tokens in "
        f"{seconds:.0f} s"
    )
    if share.warning():
        monitor.warning(share.warning())


def _finish_states(
    config: ConfigDict,
    run: Run,
    session: Session,
    examples: list[TaskExample],
    layers: Sequence[int],
    pairs: list[Pair],
    skipped: collections.Counter[str],
    monitor: Monitor,
) -> None:
    hidden = session.engine.hidden_size
    keys, vectors = pair_keys(pairs, hidden)
    save_array(run.mine / "keys.npy", keys)
    save_array(run.mine / "vectors.npy", vectors)
    rows = list(candidate_rows(pairs))
    atomic_write(run.mine / "candidates.jsonl", "".join(json_text(row) + "\n" for row in rows))
    per_point = collections.Counter(pair.meta["control_point_m"] for pair in pairs)
    atomic_write_json(
        run.mine / "manifest.json",
        {
            "format_version": FORMAT_VERSION,
            **session.record,
            "pairs": len(pairs),
            "pairs_per_control_point": dict(sorted(per_point.items())),
            "skipped": dict(sorted(skipped.items())),
            "layers": list(layers),
            "num_layers": session.engine.num_layers,
            "hidden_size": hidden,
            "delimiter": session.delimiter,
            "M": config.control_points.M,
            "dataset": config.task.dataset,
            "split": examples[0].meta["split"],
            "dataset_commit": examples[0].meta.get("commit", ""),
            "mined": identities(examples),
        },
    )
    monitor.scalars(len(pairs), {f"mine/pairs_m{m}": n for m, n in sorted(per_point.items())})
    monitor.histogram(len(pairs), "mine/quality", [pair.meta["quality"] for pair in pairs])
    listed = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
    monitor.info(f"pairs: {len(pairs)} kept; left out: {listed or 'none'}")
    if not pairs:
        monitor.warning(
            "no question has right and wrong rollouts that reach the same control point: the "
            "memory will be empty; mine more questions or rollouts, or set "
            "offline_mine.pos_source=rollout_or_gold"
        )


def _read_layers(
    session: Session,
    layers: Sequence[int],
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    return session.engine.states_at(sequences, positions, layers)


def _save_shard(
    path: Any, pairs: list[Pair], skipped: collections.Counter[str], hidden: int
) -> None:
    note = {"pairs": [[pair.order, pair.meta] for pair in pairs], "skipped": dict(skipped)}

    def stack(arrays: list[np.ndarray]) -> np.ndarray:
        return np.asarray(arrays, np.float32).reshape(-1, hidden)

    save_arrays(
        path,
        {
            "note": np.frombuffer(json.dumps(note).encode(), np.uint8),
            "right": stack([pair.right for pair in pairs]),
            "wrong": stack([pair.wrong for pair in pairs]),
            "vector": stack([pair.vector for pair in pairs]),
        },
    )


def _load_shard(path: Any) -> tuple[list[Pair], collections.Counter[str]]:
    cure = "delete it and run the same command again"
    arrays = read_arrays(path, cure)
    try:
        note = json.loads(arrays["note"].tobytes().decode())
        pairs = [
            Pair(order, meta, arrays["right"][i], arrays["wrong"][i], arrays["vector"][i])
            for i, (order, meta) in enumerate(note["pairs"])
        ]
        return pairs, collections.Counter(note["skipped"])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path} holds no pairs ({type(error).__name__}); {cure}") from None
