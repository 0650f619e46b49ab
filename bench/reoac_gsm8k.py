"""What an adapted language model answers of GSM8K: plain sampler, threshold decoding, the policy.

    python -m bench.reoac_gsm8k --model RUN/model --policy RUN2 --data gsm8k/test.jsonl \\
        --json results/reoac_gsm8k_adapted.json

Every row is one greedy pass over all problems with the caches of the config: exact match by our
grader and by the two rules of the evaluation harness, backbone passes per problem, and wall time of
decoding (compilation left out, grading runs beside it). Decoding stops at the end token in every
row. Batches that are done are kept under --root, so the command can be stopped and repeated.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from bench import machine
from common import dist, log
from common.answers.harness import harness_scores
from common.errors import UserError
from common.flags import load_config
from common.rundir import atomic_write_json
from common.statistics import wilson_interval
from reoac_jax.backbone.base import Canvas
from reoac_jax.data import load_prompts
from reoac_jax.defaults import finalize
from reoac_jax.engine import compile_rollout
from reoac_jax.evaluation_mode import load_learner
from reoac_jax.models import Models, load_models
from reoac_jax.prompts import PromptSet, make_canvas
from reoac_jax.samplers import confidence_decode
from reoac_jax.settings import evaluation_settings
from reoac_jax.train import grader_for

# (canvas) -> canvases [B, G] and passes [B]
Decoder = Callable[[Canvas], tuple[Any, Any]]


def sampler(models: Models, num_steps: int, threshold: float | None) -> Decoder:
    """The plain sampler, or threshold decoding."""
    decode = jax.jit(
        functools.partial(
            confidence_decode,
            models.backbone,
            num_steps=num_steps,
            threshold=threshold,
            stop_at_eos=True,
        )
    )

    def run(canvas: Canvas) -> tuple[Any, Any]:
        done = decode(models.params, canvas)
        return done.gen_ids, done.forwards

    return run


def policy(config: ConfigDict, models: Models, checkpoint: str) -> Decoder:
    """The greedy policy of a training run."""
    mesh = dist.make_mesh(1)
    learner, _ = load_learner(config, models, checkpoint, mesh)
    rollout = compile_rollout(
        models.backbone, evaluation_settings(config), models.tables, config.algo, mesh
    )
    key = jax.random.fold_in(jax.random.key(config.seed), 2)

    def run(canvas: Canvas) -> tuple[Any, Any]:
        episodes = rollout(models.params, learner.agent, dist.shard_batch(mesh, canvas), key)
        return episodes.final_ids, episodes.num_forwards

    return run


def measure(
    name: str,
    decode: Decoder,
    models: Models,
    prompts: PromptSet,
    size: int,
    path: Path,
    of: dict[str, Any],
) -> dict[str, Any]:
    """{"ids", "forwards"} per problem and {"seconds"} per batch; goes on where `path` ends.

    Args:
      size: problems per batch.
      path: what was measured before, and is added to.
      of: what is measured; a file of anything else is refused.

    Raises:
      UserError: the file is of another model, policy, data set, config or batch size.
    """
    found: dict[str, Any] = {"of": of, "ids": [], "forwards": [], "seconds": []}
    if path.is_file():
        found = json.loads(path.read_text())
        other = [key for key in of if found.get("of", {}).get(key) != of[key]]
        if other:
            raise UserError(
                f"{path} was measured with another {other[0]} "
                f"({found.get('of', {}).get(other[0])!r}, not {of[other[0]]!r}): set another --root"
            )
    total, started = len(prompts), len(found["ids"])
    with tqdm(total=total, initial=started, desc=name, unit="problem") as bar:
        for start in range(started, total, size):
            index = np.minimum(np.arange(start, start + size), total - 1)
            canvas = make_canvas(
                prompts, index, index, models.backbone.mask_id, models.backbone.pad_id
            )
            if start == started:
                # Compiled, and run once for nothing, on prompts alone: canvases without a mask.
                blank = np.asarray(canvas.tokens) == models.backbone.mask_id
                full = np.where(blank, models.backbone.eos_id, canvas.tokens)
                jax.block_until_ready(decode(dataclasses.replace(canvas, tokens=full)))
            begin = time.perf_counter()
            ids, forwards = jax.device_get(decode(canvas))
            found["seconds"].append(time.perf_counter() - begin)
            keep = min(size, total - start)
            found["ids"] += np.asarray(ids)[:keep].tolist()
            found["forwards"] += np.asarray(forwards)[:keep].tolist()
            atomic_write_json(path, found, indent=None)
            bar.update(keep)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="directory of the adapted model")
    parser.add_argument("--policy", default="", help="run directory of the policy; default: none")
    parser.add_argument("--data", required=True, help="test.jsonl of GSM8K")
    parser.add_argument("--config", default="configs/adapt.py:cpu_policy")
    parser.add_argument("--steps", default="64", help="passes of the plain sampler")
    parser.add_argument("--thresholds", default="0.9")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--limit", type=int, default=0, help="0 = all problems")
    parser.add_argument("--root", default="runs/bench_gsm8k")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    for name, kind in (("steps", int), ("thresholds", float)):
        try:
            [kind(word) for word in getattr(options, name).split(",") if word]
        except ValueError as error:
            parser.error(f"--{name}: {error}")
    log.quiet_libraries()
    try:
        run(options)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def run(options: argparse.Namespace) -> None:
    """Measures every row, prints it and writes the file.

    Raises:
      UserError: data, model or policy are missing or do not fit each other.
    """
    config = load_config(options.config)
    config.backbone.model_name_or_path = options.model
    # The policy was trained on these files too; only the held-out ones are read here.
    config.dataset.train_path = config.dataset.eval_path = options.data
    finalize(config)
    models = load_models(config)
    prompts = load_prompts(config, "test", models.tokenizer, options.limit)
    rows: dict[str, Callable[[], Decoder]] = {}
    for steps in filter(None, options.steps.split(",")):
        rows[f"plain, {steps} passes"] = functools.partial(sampler, models, int(steps), None)
    for tau in filter(None, options.thresholds.split(",")):
        rows[f"threshold {tau}"] = functools.partial(
            sampler, models, config.rollout.gen_len, float(tau)
        )
    if options.policy:
        rows["policy"] = functools.partial(policy, config, models, options.policy)
    root = Path(options.root)
    root.mkdir(parents=True, exist_ok=True)
    golds = list(prompts.golds)
    of = {
        "config": options.config,
        "model": str(Path(options.model).resolve()),
        "data": str(Path(options.data).resolve()),
        "problems": len(golds),
        "batch": options.batch,
    }
    table = []
    with grader_for(config, models, evaluation=True) as grader:
        for name, make in rows.items():
            path = root / (name.replace(" ", "_").replace(",", "") + ".json")
            own = of
            if name == "policy":
                own = of | {"policy": str(Path(options.policy).resolve())}
            found = measure(name, make(), models, prompts, options.batch, path, own)
            graded = grader.submit(np.asarray(found["ids"], np.int32), golds).result()
            correct = int((graded.rewards > 0).sum())
            table.append(
                {
                    "row": name,
                    "correct": correct,
                    "n": len(golds),
                    "accuracy": correct / len(golds),
                    "accuracy_interval": list(wilson_interval(correct, len(golds))),
                    "harness": harness_scores(graded.texts, golds)._asdict(),
                    "passes": statistics.mean(found["forwards"]),
                    "seconds": sum(found["seconds"]),
                    "samples": graded.texts[:4],
                }
            )
            r = table[-1]
            low, high = r["accuracy_interval"]
            print(
                f"{name:20} {correct:4}/{len(golds)} {r['accuracy']:6.2%} ({low:.2%} to "
                f"{high:.2%})  passes {r['passes']:6.2f}  {r['seconds'] / 60:5.1f} min"
            )
            if options.json:
                report = {
                    "command": (
                        f"python -m bench.reoac_gsm8k --config {options.config} --steps "
                        f"{options.steps} --thresholds {options.thresholds}"
                    ),
                    "batch": options.batch,
                    "gen_len": config.rollout.gen_len,
                    "machine": machine(),
                    "rows": table,
                }
                atomic_write_json(options.json, report)


if __name__ == "__main__":
    main()
