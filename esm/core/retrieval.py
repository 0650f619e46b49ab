"""Finding the entries of the memory that resemble the current state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

OK, EMPTY_MEMORY, NO_ENTRIES, FEW_ENTRIES, NO_QUERY, LOW_SIM = range(6)
REASONS = (
    "ok",
    "empty_memory",
    "no_entries_for_m",
    "too_few_entries",
    "no_query_for_layers",
    "low_sim",
)
ANY_POINT = -1
PADDING = -2
NO_LAYER = -1
MIN_NORM = 1e-12


class Entries(NamedTuple):
    """The memory on the device, padded to a capacity of N >= 1.

    Attributes:
        keys: [N, H] float32 unit vectors (zero where the norm is).
        layer: [N] int32, index into the queried layers; NO_LAYER = not queried.
        point: [N] int32 control point m; PADDING = no entry.
        quality: [N] float32.
        is_null: [N] bool, the entry stands for "do nothing".
    """

    keys: jax.Array
    layer: jax.Array
    point: jax.Array
    quality: jax.Array
    is_null: jax.Array


class Retrieved(NamedTuple):
    """The most similar entries of every row.

    Attributes:
        entry: [B, k] int32.
        sim: [B, k] float32 cosine, descending.
        valid: [B, k] bool; all False unless the reason is OK.
        reason: [B] int32, index into REASONS.
        num_entries: [B] int32, entries of the control point in all layers.
        used: [B] int32, entries compared and kept, before `min_sim`.
        top_sim: [B] float32, the largest cosine; NaN where nothing was compared.
    """

    entry: jax.Array
    sim: jax.Array
    valid: jax.Array
    reason: jax.Array
    num_entries: jax.Array
    used: jax.Array
    top_sim: jax.Array


def unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis; a norm <= MIN_NORM gives zeros."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.where(norm > MIN_NORM, x / jnp.maximum(norm, MIN_NORM), 0)


def retrieve(
    entries: Entries,
    query: jax.Array,
    point: jax.Array,
    k: int,
    min_sim: float | jax.Array,
    min_entries: int | jax.Array,
    center: jax.Array | None = None,
) -> Retrieved:
    """Top k entries by cosine among those of the row's control point and a queried layer.

    Equal similarities keep the order of the entries. Where the best is below `min_sim`, the whole
    list is dropped.

    Args:
        entries: N entries.
        query: [B, LQ, H] states, raw.
        point: [B] int32 control point; ANY_POINT = all.
        k: static; 0 gives an empty list.
        min_sim: -inf = no gate.
        min_entries: fewest entries of the control point.
        center: [LQ, P, H], what is subtracted from unit queries of layer l at control point
            min(m, P - 1); the keys were centred the same way.
    """
    q = unit(query.astype(jnp.float32))
    if center is not None:
        at = jnp.clip(point, 0, center.shape[1] - 1)
        q = unit(q - center[:, at].swapaxes(0, 1))
    batch, layers = query.shape[:2]
    count = entries.keys.shape[0]
    sim = jnp.zeros((batch, count), jnp.float32)
    if layers:
        cosine = jnp.matmul(
            q.reshape(batch * layers, -1), entries.keys.T, precision=jax.lax.Precision.HIGHEST
        ).reshape(batch, layers, count)
        slot = jnp.broadcast_to(jnp.maximum(entries.layer, 0), (batch, 1, count))
        sim = jnp.take_along_axis(cosine, slot, axis=1)[:, 0]
    filled = entries.point != PADDING
    of_point = filled & ((entries.point == point[:, None]) | (point[:, None] == ANY_POINT))
    queried = of_point & (entries.layer != NO_LAYER)
    top, index = jax.lax.top_k(jnp.where(queried, sim, -jnp.inf), min(k, count))
    valid = jnp.take_along_axis(queried, index, axis=1)
    num = of_point.sum(axis=1).astype(jnp.int32)
    used = valid.sum(axis=1).astype(jnp.int32)
    best = jnp.where(used > 0, top.max(axis=1, initial=-jnp.inf), jnp.nan)

    reason = jnp.where((used > 0) & (best < min_sim), LOW_SIM, OK)
    reason = jnp.where(queried.any(axis=1), reason, NO_QUERY)
    reason = jnp.where(num < min_entries, FEW_ENTRIES, reason)
    reason = jnp.where(num == 0, NO_ENTRIES, reason)
    reason = jnp.where(filled.any(), reason, EMPTY_MEMORY).astype(jnp.int32)
    compared = (reason == OK) | (reason == LOW_SIM)
    return Retrieved(
        entry=index.astype(jnp.int32),
        sim=jnp.where(valid, top, 0).astype(jnp.float32),
        valid=valid & (reason == OK)[:, None],
        reason=reason,
        num_entries=num,
        used=jnp.where(compared, used, 0),
        top_sim=jnp.where(compared, best, jnp.nan),
    )
