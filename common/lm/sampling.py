"""Drawing tokens: temperature, top-k and top-p without sorting the vocabulary.

Non-negative floats order like their bit patterns, so the k-th largest of a row is found by
bisecting 32 bits, one counting pass each, and the nucleus likewise with masses instead of counts.
Ties at the threshold go to the lower token ids, which a bisection over ids settles.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_BLOCK = 256  # columns per block of the two-level search for a drawn token


class Sampling(NamedTuple):
    """How to draw; every field is an array over rows or None, and None costs nothing.

    Attributes:
        temperature: [B] float32, 0 = greedy; None = every row greedy.
        top_k: [B] int32, at most this many tokens; <= 0 or >= V = all.
        top_p: [B] float32, the shortest prefix of the (top-k-renormalised) distribution whose mass
            reaches it; >= 1 = all.
    """

    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None


def make_sampling(rows: int, temperature: float, top_k: int = -1, top_p: float = 1.0) -> Sampling:
    """The same settings for every row, with the disabled ones as None."""
    if temperature == 0.0:
        return Sampling()
    return Sampling(
        jnp.full((rows,), temperature, jnp.float32),
        jnp.full((rows,), top_k, jnp.int32) if top_k > 0 else None,
        jnp.full((rows,), top_p, jnp.float32) if top_p < 1.0 else None,
    )


def fold_rows(row_keys: jax.Array, index: jax.Array) -> jax.Array:
    """Per row key fold_in(row_keys[b], index[b]); the randomness of the row's index-th token."""
    return jax.vmap(jax.random.fold_in)(row_keys, index)


def sample(
    logits: jax.Array, row_keys: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
        logits: [B, V] float32.
        row_keys: [B] typed keys, used once; row b's draw depends on nothing but row b.
        sampling: Settings.

    Returns:
        Tokens [B] int32, and log-probabilities [B] float32 under softmax(logits), that is at
        temperature 1 and before top-k and top-p.
    """
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # ties go to the lowest id
    if sampling.temperature is not None:
        hot = sampling.temperature > 0.0
        tempered = logits / jnp.where(hot, sampling.temperature, 1.0)[:, None]
        keep = keep_mask(tempered, sampling.top_k, sampling.top_p)
        peak = jnp.max(tempered, axis=-1, keepdims=True)
        weights = jnp.where(keep, jnp.exp(tempered - peak), 0.0)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(row_keys)
        token = jnp.where(hot, draw(weights, uniform), token)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Inverse of the cumulative distribution, by blocks and then within one block.

    Args:
        weights: [B, V] float32, non-negative, not all zero in a row; need not sum to 1.
        uniform: [B] float32 in [0, 1).

    Returns:
        [B] int32: the token at which the cumulative weight passes uniform * total. Its weight is
        never zero.
    """
    batch, size = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -size % _BLOCK)))
    blocks = padded.reshape(batch, -1, _BLOCK)
    sums = blocks.sum(-1)  # [B, V/block]
    total = jnp.cumsum(sums, axis=-1)
    target = uniform * total[:, -1]
    block = _first_above(total, target, sums)
    before = jnp.take_along_axis(total - sums, block[:, None], axis=-1)[:, 0]
    inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [B, block]
    column = _first_above(jnp.cumsum(inner, axis=-1), target - before, inner)
    return jnp.minimum(block * _BLOCK + column, size - 1)  # a row of NaN stays in range too


def _first_above(cumulative: jax.Array, target: jax.Array, weights: jax.Array) -> jax.Array:
    """Index [B] of the first entry of positive weight whose cumulative sum exceeds the target.

    Where rounding leaves none, the last entry of positive weight.
    """
    positive = weights > 0.0
    above = positive & (cumulative > target[:, None])
    last = weights.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    first = jnp.argmax(above, axis=-1)
    return jnp.where(jnp.any(above, axis=-1), first, last).astype(jnp.int32)


# --------------------------------------------------------------------------------------- filters
def keep_mask(
    logits: jax.Array, top_k: jax.Array | None = None, top_p: jax.Array | None = None
) -> jax.Array:
    """Which tokens survive top-k and then top-p.

    Args:
        logits: [B, V] float32 log weights, not normalised; -inf = impossible.
        top_k: [B] int32 or None.
        top_p: [B] float32 or None.

    Returns:
        [B, V] bool; at least one token per row that has a possible one, and never an impossible
        one. The kept set is the k most probable tokens, cut to the shortest prefix whose mass among
        these k is >= p; ties go to the lower ids.
    """
    keep = logits > -jnp.inf
    if top_k is None and top_p is None:
        return keep
    order = _order(logits)
    vocab = logits.shape[-1]
    if top_k is not None:
        count = jnp.where(top_k <= 0, vocab, jnp.minimum(top_k, vocab))
        threshold = _bisect_bits(order, lambda above: above.sum(-1) >= count)
        keep &= _cut(order, threshold, lambda above, ties: count - above.sum(-1))
    if top_p is not None:
        weights = jnp.where(keep, jnp.exp(logits - jnp.max(logits, -1, keepdims=True)), 0.0)
        # A mass that reaches p exactly must not miss it by the rounding of a long sum.
        goal = jnp.minimum(top_p, 1.0) * weights.sum(-1) * (1.0 - 1e-6)

        def mass(members: jax.Array) -> jax.Array:
            return jnp.where(members, weights, 0.0).sum(-1)

        def needed(above: jax.Array, ties: jax.Array) -> jax.Array:
            each = jnp.max(jnp.where(ties, weights, 0.0), axis=-1)
            missing = jnp.ceil((goal - mass(above)) / jnp.where(each > 0.0, each, 1.0))
            return jnp.clip(missing, 1, vocab).astype(jnp.int32)

        threshold = _bisect_bits(order, lambda above: mass(above) >= goal)
        nucleus = keep & _cut(order, threshold, needed, keep)
        keep = jnp.where((top_p >= 1.0)[:, None], keep, nucleus)
    return keep


def _order(x: jax.Array) -> jax.Array:
    """int32 that sorts like the float32 x."""
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32)  # no -0
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _bisect_bits(order: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Largest threshold [B] for which `enough(order >= threshold)` ([B, V] -> [B]) holds."""
    rows = order.shape[0]
    low = jnp.full((rows,), jnp.iinfo(jnp.int32).min, jnp.int32)
    high = jnp.max(order, axis=-1)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # rounded down without overflow
        middle = jnp.where(middle < high, middle + 1, middle)  # so that low < middle <= high
        good = enough(order >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, jnp.maximum(middle - 1, low))

    return jax.lax.fori_loop(0, 33, halve, (low, high))[0]


def _cut(
    order: jax.Array,
    threshold: jax.Array,
    wanted: Callable[[jax.Array, jax.Array], jax.Array],
    among: jax.Array | None = None,
) -> jax.Array:
    """Tokens above the threshold, and the first `wanted(above, ties)` ([B]) of those at it."""
    above = order > threshold[:, None]
    ties = order == threshold[:, None]
    if among is not None:
        above, ties = above & among, ties & among
    count = wanted(above, ties)  # [B]
    ids = jnp.arange(order.shape[-1], dtype=jnp.int32)
    rows = order.shape[0]
    # The smallest id up to which there are `count` ties; the last id if there are fewer.
    low = jnp.zeros((rows,), jnp.int32)
    high = jnp.full((rows,), order.shape[-1] - 1, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        enough = (ties & (ids <= middle[:, None])).sum(-1) >= count
        return jnp.where(enough, low, jnp.minimum(middle + 1, high)), jnp.where(
            enough, middle, high
        )

    steps = max(order.shape[-1] - 1, 1).bit_length()
    low, _ = jax.lax.fori_loop(0, steps, halve, (low, high))
    return above | (ties & (ids <= low[:, None]))
