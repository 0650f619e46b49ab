"""A backbone, with or without a trained policy, under the lm-evaluation-harness.

    python -m reoac_jax.harness --tasks=gsm8k --limit=100                       # bundled model
    python -m reoac_jax.harness --config=configs/gsm8k.py --checkpoint=runs/x   # with its policy
    python -m reoac_jax.harness --tasks=gsm8k --data=gsm8k/test.jsonl           # no download

`generate_until` fills a canvas behind the context: by parallel confidence decoding (`--threshold`),
or by the operator policy of a checkpoint. `loglikelihood` is the lower bound that masked diffusion
gives (Sahoo et al., 2024, in the form that draws the number of masked tokens, Nie et al., 2025):

    log p(x | c) >= E_l E_masks [ n / l * sum over the l masked positions of log p(x_i | rest, c) ]

with l uniform in 1..n, estimated from `--samples` draws. Tokens behind the continuation are the
end-of-text tokens the models are trained to fill a canvas with. Needs the package lm_eval
(`pip install lm-eval`).
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from ml_collections import ConfigDict
from tqdm import tqdm

from common import dist, flags, log
from common.errors import UserError
from common.lm.layers import Params
from common.rundir import atomic_write_json
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.corpus import lay_out, pad_rows
from reoac_jax.key_tokens import key_mask
from reoac_jax.rewards import decode_texts
from reoac_jax.samplers import confidence_decode
from reoac_jax.tokenizer import Tokenizer

Fill = Callable[[Canvas], tuple[np.ndarray, np.ndarray]]
"""Canvases -> finished canvases [B, G] int32 and forward passes [B]."""


def log_likelihood_bound(
    backbone: Backbone,
    params: Params,
    canvas: Canvas,
    target: jax.Array,
    length: jax.Array,
    key: jax.Array,
    num_samples: int,
) -> jax.Array:
    """Estimates the bound of the module docstring.

    Args:
      backbone, num_samples: static.
      canvas: the contexts; their canvas content is ignored.
      target: [B, G] int32, the continuation, then end-of-text.
      length: [B] int32, n: tokens of the continuation, at least 1.
      key: typed key; row b's draws depend on it and on canvas.row_id[b] alone.

    Returns:
      [B] float32, nats.
    """
    context = backbone.begin(params, canvas)
    place = jnp.arange(target.shape[1])
    inside = place < length[:, None]
    offset = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(canvas.row_id)

    def one(carry: jax.Array, sample: jax.Array) -> tuple[jax.Array, None]:
        # Stratified: sample k draws l from its own part of 1..n.
        share = ((offset + sample) / num_samples) % 1.0
        count = jnp.minimum((share * length).astype(jnp.int32), length - 1) + 1
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), sample + 1))(
            canvas.row_id
        )
        draw = jax.vmap(lambda k: jax.random.uniform(k, place.shape))(keys)
        rank = jnp.argsort(jnp.argsort(jnp.where(inside, draw, 2.0), axis=1), axis=1)
        hidden = inside & (rank < count[:, None])
        noised = jnp.where(hidden, backbone.mask_id, target)
        scores = backbone.score(
            params, context, canvas, noised, hidden.sum(axis=1) / target.shape[1]
        )
        logits = backbone.logits(params, scores.hidden)
        gold = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        log_prob = gold - jax.nn.logsumexp(logits, axis=-1)
        total = jnp.sum(jnp.where(hidden, log_prob, 0.0), axis=1)
        return carry + total * length / count, None

    start = jnp.zeros(target.shape[0])
    total, _ = jax.lax.scan(one, start, jnp.arange(num_samples))
    return total / num_samples


class Runner:
    """The compiled calls of one model, and everything around them that handles text.

    A request is a row of a fixed-shape batch; rows that are missing repeat the last one, so nothing
    is compiled twice.
    """

    def __init__(
        self,
        backbone: Backbone,
        params: Params,
        tokenizer: Tokenizer,
        fill: Fill,
        *,
        prompt_width: int,
        gen_len: int,
        batch_size: int = 32,
        num_samples: int = 32,
        seed: int = 0,
    ) -> None:
        """See `harness_model`; prompt_width and gen_len are P and G."""
        self.backbone, self.params, self.tokenizer, self.fill = backbone, params, tokenizer, fill
        self.prompt_width, self.gen_len, self.batch_size = prompt_width, gen_len, batch_size
        self.key = jax.random.key(seed)
        self.num_cut = 0
        self.forwards: list[int] = []
        self._bound = jax.jit(
            functools.partial(log_likelihood_bound, backbone, num_samples=num_samples)
        )
        self._greedy = jax.jit(functools.partial(confidence_decode, backbone, num_steps=gen_len))

    def canvas(self, contexts: Sequence[Sequence[int]], first: int) -> Canvas:
        """A batch of contexts (their tails where they are too long), numbered from `first`."""
        self.num_cut += sum(len(c) > self.prompt_width for c in contexts)
        kept = [list(c)[-self.prompt_width :] for c in contexts]
        rows = [*kept, *[kept[-1]] * (self.batch_size - len(kept))]
        prompt, length = pad_rows(rows, self.prompt_width, self.tokenizer.pad_id)
        blank = np.full((len(rows), self.gen_len), self.backbone.mask_id, np.int32)
        marks = np.zeros(prompt.shape, bool)
        for i, row in enumerate(rows):
            text = self.tokenizer.decode(row)
            ids, spans = self.tokenizer.encode_with_offsets(text)
            if ids == row:  # else the cut split a token: no key tokens then
                marks[i, : len(row)] = key_mask(text, spans)
        return Canvas(
            tokens=lay_out(prompt, length, blank, self.tokenizer.pad_id),
            prompt_len=length,
            key_mask=marks,
            row_id=np.arange(first, first + len(rows), dtype=np.uint32),
        )

    def generate(self, requests: Sequence[tuple[str, Sequence[str]]], progress: str) -> list[str]:
        """Texts behind (context, stop strings), each cut before its first stop string."""
        texts: list[str] = []
        for start in tqdm(range(0, len(requests), self.batch_size), progress, unit="batch"):
            part = requests[start : start + self.batch_size]
            canvas = self.canvas([self.tokenizer.encode(c) for c, _ in part], start)
            ids, forwards = self.fill(canvas)
            self.forwards += forwards[: len(part)].tolist()
            found = decode_texts(ids[: len(part)], self.tokenizer, self.backbone.mask_id, True)
            for text, (_, stops) in zip(found, part, strict=True):
                ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
                texts.append(text[: min(ends)] if ends else text)
        return texts

    def score(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], progress: str
    ) -> list[tuple[float, bool]]:
        """(bound on log p in nats, whether greedy decoding says the same) per (context, tokens).

        Raises:
          UserError: a continuation is longer than the canvas.
        """
        longest = max((len(tokens) for _, tokens in requests), default=0)
        if longest > self.gen_len:
            raise UserError(
                f"a continuation of {longest} tokens does not fit the canvas of {self.gen_len}: "
                "raise --config.rollout.gen_len"
            )
        scores: list[tuple[float, bool]] = []
        for start in tqdm(range(0, len(requests), self.batch_size), progress, unit="batch"):
            part = requests[start : start + self.batch_size]
            rows = [*part, *[part[-1]] * (self.batch_size - len(part))]
            canvas = self.canvas([context for context, _ in part], start)
            eos = self.tokenizer.eos_id
            target, length = pad_rows([t for _, t in rows], self.gen_len, eos)
            length = np.maximum(length, 1)  # an empty continuation: the end itself
            bound = self._bound(self.params, canvas, target, length, self.key)
            inside = np.arange(self.gen_len) < length[:, None]
            open_ = canvas.with_gen(jnp.where(inside, self.backbone.mask_id, target))
            greedy = np.asarray(self._greedy(self.params, open_).gen_ids)
            same = np.all((greedy == target) | ~inside, axis=1)
            scores += [
                (float(b), bool(s))
                for b, s in zip(np.asarray(bound)[: len(part)], same[: len(part)], strict=True)
            ]
        return scores

    def windows(self, tokens: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """A long text as (context, next G tokens) pairs that cover it once."""
        tokens = list(tokens)
        return [
            (
                tokens[max(0, start - self.prompt_width) : start] or [self.tokenizer.bos_id],
                tokens[start : start + self.gen_len],
            )
            for start in range(0, len(tokens), self.gen_len)
        ]


def harness_model(runner: Runner) -> Any:
    """The runner behind the harness's model interface (`lm_eval.api.model.LM`).

    Raises:
      UserError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError(f"lm_eval cannot be imported ({error}): pip install lm-eval") from error

    class DiffusionModel(LM):
        """Requests of the harness, answered by a runner."""

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            """Texts behind contexts, up to their stop strings."""
            pairs = []
            for request in requests:
                context, options = request.args
                until = options.get("until") or []
                pairs.append((context, [until] if isinstance(until, str) else until))
            return runner.generate(pairs, "generate")

        def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            """Bounds of continuations."""
            encode = runner.tokenizer.encode
            pairs = []
            for request in requests:
                context, continuation = request.args
                before = encode(context) if context else [runner.tokenizer.bos_id]
                pairs.append((before, encode(continuation)))
            return runner.score(pairs, "log-likelihood")

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            """Bounds of whole texts, window by window."""
            parts = [runner.windows(runner.tokenizer.encode(r.args[0])) for r in requests]
            flat = runner.score([pair for part in parts for pair in part], "log-likelihood")
            totals, start = [], 0
            for part in parts:
                totals.append(sum(value for value, _ in flat[start : start + len(part)]))
                start += len(part)
            return totals

    return DiffusionModel()


def local_task(name: str, path: str, bare_prompt: bool) -> dict[str, Any]:
    """The harness's own task on a local jsonl file, without few-shot examples.

    Args:
      name: of the task.
      path: rows in the form of the task's data set.
      bare_prompt: the context is the question alone, as the models here were trained.

    Raises:
      UserError: there is no such file or task.
    """
    if not Path(path).is_file():
        raise UserError(f"--data={path}: no such file")
    from lm_eval.tasks import TaskManager

    entry = TaskManager().task_index.get(name)
    if entry is None or not entry.cfg:
        raise UserError(f"--tasks={name}: the harness has no single task of this name")
    task = {
        **entry.cfg,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"train": path, "test": path}},
        "num_fewshot": 0,
    }
    if bare_prompt:
        task["doc_to_text"] = "{{question}}"
    return task


def make_runner(config: ConfigDict, checkpoint: str, threshold: float, samples: int) -> Runner:
    """A runner of what the config names; with a checkpoint its policy fills the canvases."""
    from reoac_jax.engine import compile_rollout
    from reoac_jax.evaluation_mode import load_learner
    from reoac_jax.models import load_models
    from reoac_jax.settings import evaluation_settings

    mesh = dist.make_mesh(1)  # requests are few; one device is the least to explain
    models = load_models(config)
    params: Params = models.params
    if checkpoint:
        learner, iteration = load_learner(config, models, checkpoint, mesh)
        params = learner.backbone
        log.info("policy of iteration %d", iteration)
        rollout = compile_rollout(
            models.backbone,
            evaluation_settings(config),
            models.tables,
            config.algo,
            mesh,
            config.parallel.mode,
        )
        key = jax.random.fold_in(jax.random.key(config.seed), 2)

        def fill(canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
            episodes = rollout(params, learner.agent, dist.shard_batch(mesh, canvas), key)
            return np.asarray(episodes.final_ids), np.asarray(episodes.num_forwards)
    else:
        decode = jax.jit(
            functools.partial(
                confidence_decode,
                models.backbone,
                num_steps=config.rollout.gen_len,
                threshold=threshold,
            )
        )

        def fill(canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
            done = decode(params, canvas)
            return np.asarray(done.gen_ids), np.asarray(done.forwards)

    return Runner(
        models.backbone,
        params,
        models.tokenizer,
        fill,
        prompt_width=config.backbone.max_length,
        gen_len=config.rollout.gen_len,
        batch_size=config.eval.batch_size,
        num_samples=samples,
        seed=config.seed,
    )


def main(argv: list[str]) -> int:
    """Evaluates the tasks of the command line; prints the harness's table, writes JSON."""
    del argv
    given = flags.FLAGS
    log.quiet_libraries()
    try:
        import lm_eval
        from lm_eval.utils import make_table
    except ImportError as error:
        raise UserError(f"lm_eval cannot be imported ({error}): pip install lm-eval") from error
    from reoac_jax.defaults import finalize

    for warning in finalize(given.config):
        log.warning(warning)
    tasks: list[Any] = [name for name in given.tasks.split(",") if name]
    if given.data:
        if len(tasks) != 1:
            raise UserError("--data belongs to one task: give a single name in --tasks")
        tasks = [local_task(tasks[0], given.data, given.bare_prompt)]
    runner = make_runner(given.config, given.checkpoint, given.threshold, given.samples)
    model = harness_model(runner)
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            limit=given.limit or None,
            num_fewshot=0 if given.data else None,
            bootstrap_iters=1000,
        )
    except (ConnectionError, OSError) as error:
        raise UserError(
            f"the task's data cannot be had ({' '.join(str(error).split())[:160]}): "
            "give a local file with --data"
        ) from error
    print(make_table(results))
    if runner.num_cut:
        log.warning(
            "%d contexts were longer than backbone.max_length; their ends were kept", runner.num_cut
        )
    report = {
        "results": results["results"],
        "n_samples": results.get("n-samples"),
        "mean_forwards": float(np.mean(runner.forwards)) if runner.forwards else None,
        "contexts_cut": runner.num_cut,
    }
    if given.output:
        atomic_write_json(given.output, report)
        print(f"written to {given.output}")
    return 0


def define_harness_flags() -> None:
    """The flags of this command."""
    absl_flags.DEFINE_string("tasks", "gsm8k", "tasks of the harness, separated by commas")
    absl_flags.DEFINE_string("data", "", "local jsonl file of the task, in place of the hub")
    absl_flags.DEFINE_bool("bare_prompt", True, "with --data: the context is the question alone")
    absl_flags.DEFINE_float("threshold", 0.9, "of parallel confidence decoding")
    absl_flags.DEFINE_integer("samples", 32, "draws of every likelihood bound", lower_bound=1)


if __name__ == "__main__":
    flags.define_flags("configs/gsm8k.py", ("eval",))
    define_harness_flags()
    flags.run(main)
