"""One pass over the vocabulary: entropy, best token, confidence, class mass and a drawn token.

Scores [B, G, V] are by far the largest arrays of a step, so they are read in blocks of rows small
enough for the cache, and everything that needs the exponentials is taken from the same block.
Tokens are drawn by a two-level inverse cumulative distribution: one uniform picks a chunk of the
vocabulary by its mass, a second one the token inside it. That needs 2 random numbers per token
instead of V.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# exp(-200) is 0 in float32, so a floor here makes 0 * (-inf) a plain 0 * (-200) = 0.
_FLOOR = -200.0
_BLOCK_ELEMENTS = 2**19
_SHORTEST_CHUNK, _LONGEST_CHUNK = 32, 2048


class ScoreSummary(NamedTuple):
    """What the rest of a step needs to know about scores [B, G, V].

    Attributes:
        best: [B, G] i32, first token of highest score.
        confidence: [B, G] f32, softmax probability of `best`.
        entropy: [B, G] f32, entropy of the softmax in units of the given width.
        log_norm: [B, G] f32, log sum exp.
        class_mass: [B, G, C] f32, softmax mass per token class (C may be 0).
        sampled: [B, G] i32, drawn token (`best` when nothing was to be drawn).
    """

    best: jax.Array
    confidence: jax.Array
    entropy: jax.Array
    log_norm: jax.Array
    class_mass: jax.Array
    sampled: jax.Array


def row_keys(key: jax.Array, step: jax.Array | int, row_ids: jax.Array) -> jax.Array:
    """One key per row, the same however rows are spread over devices.

    Args:
        key: typed random key of the rollout.
        step: [] i32 denoising step.
        row_ids: [B] global row numbers.

    Returns:
        [B] typed keys, fold_in(fold_in(key, step), row).
    """
    stepped = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(stepped, row))(row_ids)


def summarise_scores(
    scores: jax.Array,
    *,
    keys: jax.Array | None = None,
    temperature: float = 1.0,
    log_width: float | jax.Array | None = None,
    suppress_id: int = -1,
    classes: jax.Array | None = None,
) -> ScoreSummary:
    """Summarises scores in one blocked pass.

    Args:
        scores: [B, G, V] unnormalised log-probabilities; -inf allowed.
        keys: [B] typed keys to draw tokens with; None = `sampled` is `best`.
        temperature: tokens are drawn from softmax(scores / max(temperature, 1e-6)); the other
            results belong to temperature 1.
        log_width: unit of the entropy; None = log V.
        suppress_id: token id that counts as impossible; -1 = none.
        classes: [V, C] bool or f32, token classes whose mass is summed.

    Returns:
        The summary.
    """
    batch, length, width = scores.shape
    unit = np.log(max(width, 2)) if log_width is None else log_width
    uniforms = None
    if keys is not None:
        uniforms = jax.vmap(lambda k: jax.random.uniform(k, (length, 2)))(keys)
        uniforms = uniforms.reshape(batch * length, 2)
    rows = scores.reshape(batch * length, width)
    result = _blocked(rows, uniforms, max(temperature, 1e-6), suppress_id, classes)
    best, sampled, peak, total, weighted, mass = result
    log_total = jnp.log(jnp.maximum(total, 1e-30))
    entropy = jnp.maximum(log_total - weighted / jnp.maximum(total, 1e-30), 0.0)

    def shaped(x: jax.Array) -> jax.Array:
        return x.reshape(batch, length, *x.shape[1:])

    return ScoreSummary(
        best=shaped(best),
        confidence=shaped(1.0 / jnp.maximum(total, 1e-30)),
        entropy=shaped(entropy) / unit,
        log_norm=shaped(peak + log_total),
        class_mass=shaped(mass / jnp.maximum(total, 1e-30)[:, None]),
        sampled=shaped(sampled),
    )


def best_of_rows(rows: jax.Array, suppress_id: int = -1) -> tuple[jax.Array, jax.Array]:
    """Best token and confidence of a few rows of scores, as `summarise_scores` gives them.

    Two passes over all rows at once: what they read is small enough for the cache, and on CPUs
    that runs on all threads, which blocks of rows do not. With many rows it is no faster.

    Args:
        rows: [R, V] float32 unnormalised log-probabilities; -inf allowed.
        suppress_id: token id that counts as impossible; -1 = none.

    Returns:
        (first token of highest score [R] int32, its softmax probability [R] float32).
    """

    # Without a remainder nothing has to be copied.
    chunk = _even_chunk_size(rows.shape[1])

    def shifted(start: int, stop: int) -> jax.Array:
        return jnp.exp(rows[:, start:stop] - peak[:, None])

    peaks = _reduce_chunks(lambda i, j: rows[:, i:j], rows.shape, "max", chunk, suppress_id)
    # Without barriers the compiler joins both levels of a reduction and runs that on one thread.
    peak, best = _first_best(rows, lax.optimization_barrier(peaks), chunk, suppress_id)
    sums = _reduce_chunks(shifted, rows.shape, "sum", chunk, suppress_id)
    total = jnp.sum(lax.optimization_barrier(sums), axis=1)
    return best, 1.0 / jnp.maximum(total, 1e-30)


def logit_entropy(
    logits: jax.Array, *, log_width: float | jax.Array | None = None, suppress_id: int = -1
) -> jax.Array:
    """Entropy of softmax(logits [B, G, V]) over log V (or log_width), with 0 * (-inf) = 0; [B, G].

    See `summarise_scores` for the arguments.
    """
    return summarise_scores(logits, log_width=log_width, suppress_id=suppress_id).entropy


def sample_tokens(
    keys: jax.Array, scores: jax.Array, temperature: float = 1.0, *, suppress_id: int = -1
) -> jax.Array:
    """Draws ids [B, G] from softmax(scores [B, G, V] / temperature) with one key per row [B].

    See `summarise_scores` for the arguments.
    """
    return summarise_scores(
        scores, keys=keys, temperature=temperature, suppress_id=suppress_id
    ).sampled


def entropy_and_sample(
    keys: jax.Array, scores: jax.Array, temperature: float = 1.0, *, suppress_id: int = -1
) -> tuple[jax.Array, jax.Array]:
    """Entropies [B, G] over log V and drawn ids [B, G] from the same pass over scores [B, G, V].

    See `summarise_scores` for the arguments.
    """
    summary = summarise_scores(scores, keys=keys, temperature=temperature, suppress_id=suppress_id)
    return summary.entropy, summary.sampled


_Block = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _blocked(
    rows: jax.Array,
    uniforms: jax.Array | None,
    temperature: float,
    suppress_id: int,
    classes: jax.Array | None,
) -> _Block:
    """Runs `_summarise_block` over all rows [R, V], a cache-sized block at a time on CPUs."""
    count, width = rows.shape
    size = max(1, _BLOCK_ELEMENTS // width)

    def block(part: jax.Array, draws: jax.Array | None) -> _Block:
        return _summarise_block(part, draws, temperature, suppress_id, classes)

    # Other devices have no cache to stay in and would pay for every sequential block.
    if size >= count or jax.default_backend() != "cpu":
        return block(rows, uniforms)
    blocks = -(-count // size)
    # The last block overlaps its predecessor instead of padding a copy of the scores.
    starts = np.minimum(np.arange(blocks) * size, count - size)

    def body(_: None, start: jax.Array) -> tuple[None, _Block]:
        part = lax.dynamic_slice_in_dim(rows, start, size, axis=0)
        draws = None
        if uniforms is not None:
            draws = lax.dynamic_slice_in_dim(uniforms, start, size, axis=0)
        return None, block(part, draws)

    _, stacked = lax.scan(body, None, jnp.asarray(starts, jnp.int32))
    index = np.arange(count)
    owner = index // size
    flat = owner * size + index - starts[owner]

    def unstack(x: jax.Array) -> jax.Array:
        x = x.reshape(blocks * size, *x.shape[2:])
        return x if count % size == 0 else x[flat]

    return jax.tree.map(unstack, stacked)


def _summarise_block(
    rows: jax.Array,
    uniforms: jax.Array | None,
    temperature: float,
    suppress_id: int,
    classes: jax.Array | None,
) -> _Block:
    """(best, sampled, peak, sum of weights, sum of score * weight, class sums) of rows [R, V].

    Weights are exp(score - peak).
    """
    count, width = rows.shape
    chunk = _chunk_size(width)
    rows = rows.astype(jnp.float32)

    def reduce_chunks(x: jax.Array, kind: str) -> jax.Array:
        return _reduce_chunks(lambda i, j: x[:, i:j], x.shape, kind, chunk, suppress_id)

    def without_suppressed(total: jax.Array, x: jax.Array) -> jax.Array:
        return total - x[:, suppress_id] if suppress_id >= 0 else total

    peak, best = _first_best(rows, reduce_chunks(rows, "max"), chunk, suppress_id)

    # The upper bound only concerns the suppressed column, which `peak` does not cover.
    shifted = jnp.clip(rows - peak[:, None], _FLOOR, 0.0)
    weight = jnp.exp(shifted)
    sampled = best
    if uniforms is not None:
        heat = weight if temperature == 1.0 else jnp.exp(_scaled(shifted, temperature))
        sums = reduce_chunks(heat, "sum")
        owner = _pick(sums, uniforms[:, 0])
        inside, places = _gather_chunk(rows, owner, chunk, suppress_id)
        inside = jnp.maximum(inside - peak[:, None], _FLOOR)
        inner = _pick(jnp.exp(_scaled(inside, temperature)), uniforms[:, 1])
        sampled = jnp.take_along_axis(places, inner[:, None], axis=1)[:, 0]
    if uniforms is not None and temperature == 1.0:
        total = jnp.sum(sums, axis=1)
    else:
        total = without_suppressed(jnp.sum(weight, axis=1), weight)
    product = shifted * weight
    weighted = without_suppressed(jnp.sum(product, axis=1), product)
    if classes is None:
        mass = jnp.zeros((count, 0), jnp.float32)
    else:
        table = classes.astype(jnp.float32)
        if suppress_id >= 0:
            table = table.at[suppress_id].set(0.0)
        mass = jnp.dot(weight, table, precision=lax.Precision.HIGHEST)
    return best, sampled.astype(jnp.int32), peak, total, weighted, mass


def _reduce_chunks(
    read: Callable[[int, int], jax.Array],
    shape: tuple[int, ...],
    kind: str,
    chunk: int,
    suppress_id: int,
) -> jax.Array:
    """Chunks of the columns reduced, without the suppressed one.

    Args:
        read: columns start .. stop - 1 of an array of `shape` [R, V].
        shape: (R, V).
        kind: "max" | "sum".
        chunk: size of a chunk.
        suppress_id: the column left out; -1 = none.

    Returns:
        [R, chunks (+ 1 for the remainder)].
    """
    count, width = shape
    chunks = width // chunk
    split = chunks * chunk
    parts = [getattr(read(0, split).reshape(count, chunks, chunk), kind)(axis=2)]
    if split < width:
        parts.append(getattr(read(split, width), kind)(axis=1, keepdims=True))
    reduced = jnp.concatenate(parts, axis=1)
    if suppress_id < 0:
        return reduced
    # Redoing one chunk is far cheaper than writing -inf into a copy of the block.
    owner = suppress_id // chunk
    part = read(owner * chunk, min((owner + 1) * chunk, width))
    void = -jnp.inf if kind == "max" else 0.0
    part = jnp.where(jnp.arange(part.shape[1]) == suppress_id - owner * chunk, void, part)
    return reduced.at[:, owner].set(getattr(part, kind)(axis=1))


def _first_best(
    rows: jax.Array, peaks: jax.Array, chunk: int, suppress_id: int
) -> tuple[jax.Array, jax.Array]:
    """(highest score or 0 where none is finite, its first column int32) of rows [R, V], each [R].

    `peaks` [R, N] are the maxima of the chunks.
    """
    peak = jnp.max(peaks, axis=1)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    # First chunk that holds the maximum, then the first place inside it: the first arg-max.
    owner = jnp.argmax(peaks, axis=1)
    inside, places = _gather_chunk(rows, owner, chunk, suppress_id)
    best = jnp.take_along_axis(places, jnp.argmax(inside, axis=1)[:, None], axis=1)[:, 0]
    return peak, best.astype(jnp.int32)


def _chunk_size(width: int) -> int:
    """Power of two near the root of the vocabulary size: both levels are then equally short."""
    return min(width, 2 ** round(np.log2(max(width, 1)) / 2))


def _even_chunk_size(width: int) -> int:
    """The greatest divisor of the vocabulary size that is not too long; if short, `_chunk_size`."""
    even = max(size for size in range(1, min(width, _LONGEST_CHUNK) + 1) if width % size == 0)
    return even if even >= _SHORTEST_CHUNK else _chunk_size(width)


def _scaled(shifted: jax.Array, temperature: float) -> jax.Array:
    """shifted / temperature, with impossible tokens still impossible at high temperatures."""
    if temperature == 1.0:
        return shifted
    return jnp.where(shifted <= _FLOOR, _FLOOR, jnp.maximum(shifted / temperature, _FLOOR))


def _gather_chunk(
    rows: jax.Array, owner: jax.Array, chunk: int, suppress_id: int
) -> tuple[jax.Array, jax.Array]:
    """Scores [R, chunk] of each row's chunk owner [R] and their ids; -inf = not to be taken."""
    start = jnp.minimum(owner * chunk, rows.shape[1] - chunk)
    places = start[:, None] + jnp.arange(chunk)
    values = jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, chunk))(rows, start)
    open_places = (places >= (owner * chunk)[:, None]) & (places != suppress_id)
    return jnp.where(open_places, values, -jnp.inf), places


def _pick(weight: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index [R] drawn in proportion to weight [R, N] by uniform [R] in [0, 1)."""
    ends = lax.cumsum(weight, axis=1)
    index = jnp.sum(ends <= (uniform * ends[:, -1])[:, None], axis=1)
    index = jnp.minimum(index, weight.shape[1] - 1)
    # Rounding of the cumulative sums may point at a neighbour of weight 0: never take that.
    void = jnp.take_along_axis(weight, index[:, None], axis=1)[:, 0] <= 0
    return jnp.where(void, jnp.argmax(weight, axis=1), index)
