"""Speed of REOAC as ratios to the bare model work of the same shapes, in one process.

    python -m bench.reoac_rollout --json results/reoac_rollout.json
    python -m bench.reoac_rollout --only rollout,update

Groups (`--only`) and what stands in the column `floor`:
  rollout   T jitted calls of one naive denoising step: encode the prompt, decode the canvas, head
            on all its positions. "once" = the same with the prompt encoded once per episode (the
            floor of the single-block geometry). Blockwise has nothing to keep: the floors are one.
            All features on, early exit off, so that all T steps run.
  update    value and gradient of the mean cross-entropy over the update's own rows, micro-batch by
            micro-batch as the update takes them, head on the counted positions only.
  features  features, relation and operator positions token by token in plain Python.
  episodes  episodes per second, all T steps run; `floor` is batch 1.
  score     one padded call at the training length with the head on all positions, beside a call
            at the bucketed length with the head on the canvas only. ratio = padded / bucketed.
  decode    block decoding, tokens per second at batch 8 beside batch 1, and the same of the bare
            matrix products of a pass: more rows cannot gain more than the products do.

`compile s` counts the first calls of both sides; `traces` how often their Python was traced by
then, and `later` what the rounds added: 0 = nothing was compiled again.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import (
    Row,
    Timings,
    TraceCounter,
    compare,
    format_rows,
    machine,
    plain_python_reoac,
    rates,
    take_turns,
)
from bench.reoac_decode import decode_rows
from bench.reoac_scenes import (
    Scene,
    Sizes,
    embedded_scene,
    first_rows,
    large_scene,
    network,
    random_canvas,
    vocabulary,
)
from common import dist
from common.lm.layers import Params
from common.rundir import atomic_write_json
from configs.gsm8k import get_config
from reoac_jax.backbone import e2d2
from reoac_jax.backbone.base import Canvas, e2d2_backbone
from reoac_jax.engine import compile_rollout, compile_update
from reoac_jax.episodes import Episodes
from reoac_jax.features import base_features
from reoac_jax.learner import LearnerSettings
from reoac_jax.learner_paper import PaperEpisode
from reoac_jax.operators import operator_masks
from reoac_jax.settings import RolloutSettings
from reoac_jax.tables import Tables, build_tables
from reoac_jax.types import OPERATORS, SpecialIds

GROUPS = ("rollout", "update", "features", "episodes", "score", "decode")


def rollout_call(scene: Scene, batch: int, **overrides: Any) -> Callable[[], Episodes]:
    """A compiled rollout of `batch` rows, bound to its arguments."""
    settings = RolloutSettings.from_config(scene.config, **overrides)
    mesh = dist.make_mesh(1)
    run = compile_rollout(scene.backbone, settings, scene.tables, scene.config.algo, mesh)
    agent = scene.state(settings).agent
    canvas = dist.shard_batch(mesh, first_rows(scene.canvas, batch))
    params, agent = dist.replicate(mesh, (scene.params, agent))
    return lambda: run(params, agent, canvas, jax.random.key(2))


def step_floors(scene: Scene, batch: int) -> dict[str, Callable[[], Any]]:
    """T naive steps, and T steps behind one encoding of the prompt."""
    backbone, params = scene.backbone, scene.params
    canvas = jax.device_put(first_rows(scene.canvas, batch))
    level = jnp.ones(batch)
    horizon = scene.config.rollout.max_steps

    def decode(params: Params, context: Any, canvas: Canvas) -> Any:
        scores = backbone.score(params, context, canvas, canvas.gen_ids(), level)
        return backbone.head(params, scores.hidden), scores.pooled_prompt, scores.pooled_canvas

    naive = scene.counter.jit(lambda p, c: decode(p, backbone.begin(p, c), c))
    begin, step = scene.counter.jit(backbone.begin), scene.counter.jit(decode)

    def once() -> Any:
        context = begin(params, canvas)
        return repeat(lambda: step(params, context, canvas), horizon)

    return {"naive": lambda: repeat(lambda: naive(params, canvas), horizon), "once": once}


def repeat(call: Callable[[], Any], times: int) -> Any:
    """The result of the last of several calls, each waited for: logits are large."""
    result = None
    for _ in range(times):
        result = jax.block_until_ready(call())
    return result


def rollout_rows(sizes: Sizes, repeats: int) -> list[Row]:
    """Rollouts beside their forward passes."""
    rows = []

    def measure(title: str, scene: Scene, batch: int, bar: float, single: bool) -> None:
        things = {"work": rollout_call(scene, batch), **step_floors(scene, batch)}
        timings = take_turns(things, repeats, scene.counter)
        rows.append(compare(f"rollout {title}", timings, "work", "naive", bar))
        if single:
            rows.append(compare(f"rollout {title}, once", timings, "work", "once"))

    for algo in sizes.embedded:
        scene = embedded_scene(sizes, algo)
        batch = sizes.batch or get_config().rollout.batch_size
        measure(f"{algo} embedded", scene, batch, 1.15, True)
    for algo, mode in sizes.random:
        scene = large_scene(sizes, algo, mode, sizes.large)
        title = f"{algo} V={sizes.vocab} {mode}"
        measure(title, scene, sizes.large[0], 1.25, mode == "single_block")
    return rows


def update_floor(
    scene: Scene, canvases: list[jax.Array], counted_: list[Any], rows: np.ndarray
) -> Callable[[], Any]:
    """Gradients of the bare cross-entropy at the counted positions of the update's rows.

    Args:
      canvases: per canvas that a row contributes, [N, G] int32.
      counted_: for each, bool [N, G].
      rows: [N] row of the prompt.
    """
    backbone, micro = scene.backbone, scene.config.updates.backbone_batch
    prompts = jax.device_put(first_rows(scene.canvas, len(scene.target)))
    parts = []
    for start in range(0, len(rows) // micro * micro, micro):
        part = slice(start, start + micro)
        flat = [np.flatnonzero(np.asarray(c[part])) for c in counted_]
        parts.append((jax.tree.map(lambda x, p=part: x[rows[p]], prompts), part, flat))
    # One static width per canvas, so that the floor is one compiled function.
    widths = [max(max(len(p[2][i]) for p in parts), 1) for i in range(len(canvases))]

    def loss(params: Params, canvas: Canvas, ids: Any, index: Any, gold: Any) -> jax.Array:
        context = backbone.begin(params, canvas)
        total = jnp.float32(0.0)
        for one, where, wanted in zip(ids, index, gold, strict=True):
            hidden = backbone.score(params, context, canvas, one, jnp.ones(micro)).hidden
            logits = backbone.head(params, hidden.reshape(-1, hidden.shape[-1])[where])
            picked = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
            total += jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)
        return total

    gradient = scene.counter.jit(jax.grad(loss))
    arguments = []
    for canvas, part, flat in parts:
        ids = [jnp.asarray(c[part]) for c in canvases]
        index = [jnp.asarray(np.resize(f, w)) for f, w in zip(flat, widths, strict=True)]
        arguments.append((canvas, ids, index, [i * 0 for i in index]))
    params = scene.params

    def run() -> Any:
        result = None
        for one in arguments:
            result = jax.block_until_ready(gradient(params, *one))
        return result

    return run


def update_rows(sizes: Sizes, repeats: int) -> list[Row]:
    """Update iterations beside forward and backward passes of the same rows."""
    rows, cases = [], []
    for algo in sizes.embedded:
        batch = sizes.batch or get_config().rollout.batch_size
        count = sizes.episodes if algo == "plus" else sizes.buffer
        cases.append((f"{algo} embedded", embedded_scene(sizes, algo), batch, count))
    for algo, mode in sizes.random:
        if mode == "single_block":
            scene = large_scene(sizes, algo, mode, sizes.large_update)
            batch = sizes.large_update[0]
            cases.append((f"{algo} V={sizes.vocab}", scene, batch, batch))
    for title, scene, batch, count in cases:
        finished = jax.device_get(rollout_call(scene, batch, save_relation=False)())
        index = np.resize(np.arange(batch), count)
        episodes = jax.tree.map(lambda x, i=index: x[i], finished)
        call = plus_update if scene.config.algo == "plus" else paper_update
        work, floor = call(scene, episodes, index)
        timings = take_turns({"work": work, "floor": floor}, repeats, scene.counter)
        rows.append(compare(f"update {title}", timings, "work", "floor", 1.15))
    return rows


def bound_update(scene: Scene, *arguments: Any) -> Callable[[], Any]:
    """A compiled update that goes on from its own last state."""
    settings = RolloutSettings.from_config(scene.config)
    learner = LearnerSettings.from_config(scene.config, settings.operators.max_cost)
    mesh = dist.make_mesh(1)
    run = compile_update(scene.backbone, learner, settings, mesh)
    state = dist.replicate(mesh, scene.state(settings))
    arguments = jax.device_put(arguments)

    def call() -> Any:
        nonlocal state
        state, metrics = run(state, *arguments)
        return state, metrics

    return call


def plus_update(
    scene: Scene, episodes: Episodes, index: np.ndarray
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The update of plus, and its floor over as many useful decisions as it draws."""
    rng = np.random.default_rng(2)
    count, horizon, gen_len = episodes.steps.written.shape
    reward = (rng.random(count) < 0.5).astype(np.float32)
    target = scene.target[index]
    work = bound_update(scene, episodes, reward, target, jax.random.key(3))
    written = episodes.steps.written & episodes.steps.active[..., None]
    useful = np.flatnonzero(written.any(axis=2).reshape(-1))
    drawn = rng.permutation(useful)[: scene.config.updates.backbone_rows or None]
    drawn = np.resize(drawn, scene.config.updates.backbone_rows or count * horizon)
    row, step = drawn // horizon, drawn % horizon
    hidden = rng.random((len(drawn), gen_len)) < rng.random((len(drawn), 1))
    noised = np.where(hidden, scene.backbone.mask_id, target[row])
    before = jnp.asarray(episodes.steps.gen_before[row, step])
    masks = [written[row, step], hidden]
    return work, update_floor(scene, [before, jnp.asarray(noised)], masks, index[row])


def paper_update(
    scene: Scene, episodes: Episodes, index: np.ndarray
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The update of paper on a full buffer, and its floor over every stored step."""
    steps, canvas = episodes.steps, episodes.canvas
    count, horizon, gen_len = steps.written.shape
    buffer = PaperEpisode(
        features=steps.features,
        operator=steps.operator,
        gen_before=steps.gen_before,
        written=steps.written,
        canvas=canvas,
        returns=np.random.default_rng(2).random(count).astype(np.float32),
        target=scene.absolute[index],
        target_len=scene.absolute_len[index],
    )
    work = bound_update(scene, buffer, jnp.int32(count))
    end = (scene.absolute_len[index] - canvas.prompt_len)[:, None, None]
    masks = steps.written & (np.arange(gen_len) < end)
    flat = [x.reshape(-1, gen_len) for x in (steps.gen_before, masks)]
    return work, update_floor(scene, flat[:1], flat[1:], np.repeat(index, horizon))


def feature_rows(sizes: Sizes, repeats: int) -> list[Row]:
    """Compiled features and operators beside plain Python."""
    batch, width, gen_len = sizes.features
    strings = vocabulary(sizes.vocab)
    eos, mask = sizes.vocab - 2, sizes.vocab - 1
    special = SpecialIds(eos, eos, eos, mask)
    tables = build_tables(strings, special)
    plain = plain_python_reoac.PlainVocabulary(strings, eos, frozenset(special))
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, eos, (batch, width)).astype(np.int32)
    keys = rng.random((batch, width)) < 0.3
    gen, before = rng.integers(0, eos, (2, batch, gen_len)).astype(np.int32)
    entropy = rng.random((batch, gen_len)).astype(np.float32)
    lengths = np.full(batch, width, np.int32)
    counter = TraceCounter()
    operators = RolloutSettings.from_config(get_config("paper")).operators

    ids, sizes_of, key_of = jnp.asarray(prompt), jnp.asarray(lengths), jnp.asarray(keys)
    scores = jnp.asarray(entropy)

    def arrays(tables: Tables, previous: jax.Array) -> Any:
        found, aux = base_features(tables, ids, sizes_of, key_of, gen, scores, previous)
        return found, aux.attention, operator_masks(tables, gen, operators)

    compiled = counter.jit(arrays)
    previous = jax.jit(
        lambda tables: base_features(tables, ids, sizes_of, key_of, before)[1].attention
    )(tables)

    def python() -> None:
        for b in range(batch):
            ids = gen[b].tolist()
            given = prompt[b].tolist(), keys[b].tolist(), ids, plain
            plain_python_reoac.features(*given, entropy[b].tolist(), before[b].tolist())
            for spec in operators.specs:
                plain_python_reoac.operator_positions(spec.name, spec.limit, ids, plain)

    things = {"plain": python, "ours": lambda: compiled(tables, previous)}
    timings = take_turns(things, min(repeats, 3), counter)
    return [faster("features and operators (floor = plain Python)", timings, "plain", "ours", 100)]


def faster(name: str, timings: Timings, slow: str, fast: str, bar: float) -> Row:
    """The row of a speed-up: work is the fast side, floor the slow one."""
    row = compare(name, timings, slow, fast, bar)
    return dataclasses.replace(row, work=row.floor, floor=row.work, at_least=True)


def episode_rows(sizes: Sizes, repeats: int) -> list[Row]:
    """Episodes per second over the batch size."""
    scene = embedded_scene(sizes, "plus")
    things = {str(b): rollout_call(scene, b) for b in sizes.batches}
    timings = take_turns(things, repeats, scene.counter)
    first = (str(sizes.batches[0]), sizes.batches[0])
    return [rates(f"episodes/s, batch {b}", timings, first, (str(b), b)) for b in sizes.batches]


def score_rows(sizes: Sizes, repeats: int) -> list[Row]:
    """One scoring call, padded and whole, beside bucketed and canvas only."""
    batch, width, gen_len, bucket, length = sizes.score
    cfg = network(sizes, 4, length, "blockwise")
    backbone = e2d2_backbone(cfg)
    params = backbone.init(jax.random.key(0))
    counter = TraceCounter()
    full = jax.device_put(random_canvas(cfg, batch, width, gen_len, length))
    short = jax.device_put(random_canvas(cfg, batch, width, gen_len, bucket))

    def whole(params: Params, canvas: Canvas) -> jax.Array:
        return e2d2.score(
            params,
            cfg,
            canvas.tokens,
            attention_mask=canvas.attention_mask,
            context_mask=canvas.context_mask,
        ).logits

    def canvas_only(params: Params, canvas: Canvas) -> jax.Array:
        scores = backbone.score(params, (), canvas, canvas.gen_ids(), jnp.ones(batch))
        return backbone.head(params, scores.hidden)

    padded, bucketed = counter.jit(whole), counter.jit(canvas_only)
    things = {"padded": lambda: padded(params, full), "ours": lambda: bucketed(params, short)}
    timings = take_turns(things, repeats, counter)
    return [faster(f"score {length} padded / {bucket} bucketed", timings, "padded", "ours", 4)]


MEASURES: dict[str, Callable[[Sizes, int], list[Row]]] = {
    "rollout": rollout_rows,
    "update": update_rows,
    "features": feature_rows,
    "episodes": episode_rows,
    "score": score_rows,
    "decode": decode_rows,
}


def run(groups: list[str], sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure, print the table and return everything for the JSON file.

    Args:
      groups: of GROUPS.
      repeats: rounds per comparison.
    """
    before, start = machine(), time.perf_counter()
    rows = []
    for group in groups:
        for row in MEASURES[group](sizes, repeats):
            rows.append(row)
            print(f"{row.name}: {row.ratio:.2f} {row.met}", file=sys.stderr, flush=True)
    print(format_rows(rows))
    return {
        "command": "python -m bench.reoac_rollout",
        "machine": before | {"load_average_after": machine()["load_average"]},
        "seconds": round(time.perf_counter() - start, 1),
        "repeats": repeats,
        "sizes": dataclasses.asdict(sizes),
        "operators": list(OPERATORS),
        "rows": [row.as_dict() for row in rows],
    }


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="", help="also write everything to this file")
    parser.add_argument("--repeats", type=int, default=5, help="rounds per comparison")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, separated by commas")
    given = parser.parse_args(arguments)
    groups = given.only.split(",")
    unknown = [g for g in groups if g not in GROUPS]
    if unknown or given.repeats < 1:
        parser.error(f"--only takes {', '.join(GROUPS)}; --repeats at least 1")
    result = run(groups, sizes or Sizes(), given.repeats)
    if given.json:
        atomic_write_json(given.json, result)


if __name__ == "__main__":
    main()
