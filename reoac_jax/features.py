"""Relation matrix between prompt and generation, and the features computed from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from reoac_jax.numbers import NumberSpans, number_spans
from reoac_jax.relation import (
    PromptFacts,
    kept_columns,
    prompt_facts,
    relate,
    same_number,
    take,
)
from reoac_jax.tables import Tables

FEATURE_NAMES: tuple[str, ...] = (
    "key_coverage",
    "key_mass_ratio",
    "key_conditioned_confidence",
    "prompt_entropy_mean",
    "prompt_entropy_p90",
    "temporal_delta",
    "hallucinated_number_rate",
    "number_copy_rate",
    "answer_form_valid",
    "suspect_mean",
    "suspect_p90",
)
PROGRESS_NAMES: tuple[str, ...] = (
    "time",
    "masked_share",
    "masked_confidence",
    "changed_share",
)


class FeatureAux(NamedTuple):
    """By-products of the features.

    Attributes:
        suspect: [B, G] f32, 0 at dropped columns.
        attention: [B, P, G] f32, column softmax of the relation, 0 at dropped columns and rows.
        relation: [B, P, G] f32.
        keep: [B, G] bool.
        key_mass: [B, G] f32.
    """

    suspect: jax.Array
    attention: jax.Array
    relation: jax.Array
    keep: jax.Array
    key_mass: jax.Array


def base_features(
    tables: Tables,
    prompt_ids: jax.Array,
    prompt_len: jax.Array,
    key_mask: jax.Array,
    gen_ids: jax.Array,
    entropy: jax.Array | None = None,
    previous_attention: jax.Array | None = None,
    *,
    path: str = "tensor",
    temperature: float = 1.0,
    numbers: str = "token",
    scale_entropy: bool = False,
    gen_mask: jax.Array | None = None,
    prompt: PromptFacts | None = None,
) -> tuple[jax.Array, FeatureAux]:
    """The 11 relation features (spec 3.3; order of `FEATURE_NAMES`).

    Args:
        tables: lookup tables.
        prompt_ids: [B, P] i32.
        prompt_len: [B] i32.
        key_mask: [B, P] bool, key tokens.
        gen_ids: [B, G] i32.
        entropy: [B, G] f32 logit entropies in units of log V; None = no logits.
        previous_attention: [B, P, G] f32, A of the previous step; None = temporal delta is 0.
        path: "tensor" or "host".
        temperature: of the relation softmax.
        numbers: "token" or "span".
        scale_entropy: divide the prompt entropies by log P of the row.
        gen_mask: [B, G] bool of existing columns; None = all.
        prompt: precomputed facts about the prompt.

    Returns:
        features [B, 11] f32, all 0 where nothing is kept or the prompt is empty, and by-products.
    """
    facts = prompt
    if facts is None:
        facts = prompt_facts(tables, prompt_ids, prompt_len, path=path, numbers=numbers)
    batch, width = gen_ids.shape
    if width == 0 or prompt_ids.shape[1] == 0:
        empty = jnp.zeros((batch, width))
        none = jnp.zeros((batch, prompt_ids.shape[1], width))
        return jnp.zeros((batch, 11)), FeatureAux(empty, none, none, empty > 0, empty)

    keep = kept_columns(tables, gen_ids, path=path, gen_mask=gen_mask)
    spans = number_spans(tables, gen_ids, keep) if numbers == "span" else None
    values, attention, prompt_entropy = relate(
        tables, facts, gen_ids, keep, spans, path, temperature
    )
    count = jnp.sum(keep, axis=1).astype(jnp.float32)  # [B]
    columns = jnp.maximum(count, 1.0)
    key = key_mask & facts.valid
    keys = jnp.sum(key, axis=1).astype(jnp.float32)

    best = jnp.max(attention, axis=2)  # [B, P]
    coverage = jnp.sum(jnp.where(key, best, 0.0), axis=1) / jnp.maximum(keys, 1.0)
    key_mass = jnp.einsum("bp,bpg->bg", key.astype(jnp.float32), attention)  # [B, G]
    mass_ratio = jnp.sum(key_mass, axis=1) / columns

    confidence = jnp.zeros(batch)
    logit_entropy = jnp.zeros((batch, width))
    if entropy is not None:
        logit_entropy = jnp.where(keep, entropy, 0.0)
        # Equal shares often add up to exactly one half; rounding must not decide those.
        related = keep & (key_mass >= 0.5 - 1e-6) & (keys > 0)[:, None]
        confidence = jnp.sum(jnp.where(related, 1.0 - logit_entropy, 0.0), axis=1) / jnp.maximum(
            jnp.sum(related, axis=1), 1
        )
    if scale_entropy:
        rows = jnp.maximum(jnp.sum(facts.valid, axis=1), 2).astype(jnp.float32)
        prompt_entropy = prompt_entropy / jnp.log(rows)[:, None]
    suspect = jnp.where(keep, (1.0 - key_mass) + logit_entropy, 0.0)

    delta = jnp.zeros(batch)
    if previous_attention is not None:
        change = jnp.where(keep[:, None, :], jnp.abs(previous_attention - attention), 0.0)
        rows = jnp.maximum(jnp.sum(facts.valid, axis=1), 1)
        delta = jnp.sum(change, axis=(1, 2)) / (rows * columns)

    hallucinated, copied = _number_rates(tables, facts, gen_ids, keep, spans)
    ordered = _sort_kept(jnp.stack([prompt_entropy, suspect], axis=1), keep[:, None, :])
    p90 = _p90_of_sorted(ordered, jnp.sum(keep, axis=1))  # [B, 2]
    features = jnp.stack(
        [
            coverage,
            mass_ratio,
            confidence,
            jnp.sum(jnp.where(keep, prompt_entropy, 0.0), axis=1) / columns,
            p90[:, 0],
            delta,
            hallucinated,
            copied,
            _answer_form(tables, gen_ids, keep),
            jnp.sum(suspect, axis=1) / columns,
            p90[:, 1],
        ],
        axis=1,
    )
    usable = (count > 0) & jnp.any(facts.valid, axis=1)
    features = jnp.where(usable[:, None], features, 0.0)
    return features, FeatureAux(suspect, attention, values, keep, key_mass)


def heuristic_scores(features: jax.Array) -> jax.Array:
    """Hand-made operator scores from features [B, >= 11]; [B, 5] in the default operator order."""
    f = features
    return jnp.stack(
        [
            f[:, 1] + f[:, 7] - f[:, 6],
            f[:, 0] + 1.0 - f[:, 3],
            1.0 - f[:, 3],
            f[:, 4] + f[:, 5],
            f[:, 0] + f[:, 2],
        ],
        axis=1,
    )


def progress_features(
    t: jax.Array | int,
    max_steps: int,
    masked: jax.Array,
    confidence: jax.Array,
    changed: jax.Array,
) -> jax.Array:
    """Where the episode stands (spec 10.1; order of `PROGRESS_NAMES`).

    Args:
        t: [] or [B] i32 step.
        max_steps: number of steps T.
        masked: [B, G] bool.
        confidence: [B, G] f32, top-1 probability.
        changed: [B, G] bool, positions that the last step changed.

    Returns:
        [B, 4] f32.
    """
    left = jnp.sum(masked, axis=1)
    time = jnp.broadcast_to(jnp.asarray(t, jnp.float32) / max_steps, left.shape)
    sure = jnp.sum(jnp.where(masked, confidence, 0.0), axis=1) / jnp.maximum(left, 1)
    return jnp.stack([time, masked.mean(axis=1), sure, changed.mean(axis=1)], axis=1)


def pool_hidden(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of hidden [B, L, H] over mask [B, L] (denominator at least 1); [B, H] f32.

    Masked-out states may hold anything, NaN included.
    """
    kept = jnp.where(mask[..., None], hidden, 0).astype(jnp.float32)
    return kept.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)[:, None]


def normalised_pools(*pooled: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Layer-normalises pooled states [B, H] each and joins them; [B, H * number of states]."""
    parts = []
    for state in pooled:
        centred = state - state.mean(axis=1, keepdims=True)
        parts.append(centred * jax.lax.rsqrt(jnp.square(centred).mean(1, keepdims=True) + epsilon))
    return jnp.concatenate(parts, axis=1)


def p90(values: jax.Array, mask: jax.Array) -> jax.Array:
    """90th percentile over the last axis, rank rounded half to even; 0 where nothing counts.

    Args:
        values: [..., N] f32.
        mask: [..., N] bool, which values count.

    Returns:
        [...] f32.
    """
    return _p90_of_sorted(_sort_kept(values, mask), jnp.sum(mask, axis=-1))


def _sort_kept(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sort(jnp.where(mask, values, jnp.inf), axis=-1)


def _p90_of_sorted(ordered: jax.Array, count: jax.Array) -> jax.Array:
    """Element 0.9 (n - 1) of ordered [..., N]; count [...] may lack inner axes of ordered."""
    ninefold = 9 * jnp.maximum(count - 1, 0)
    whole, rest = ninefold // 10, ninefold % 10
    rank = whole + (rest > 5) + jnp.where(rest == 5, whole % 2, 0)
    missing = ordered.ndim - 1 - rank.ndim
    rank = jnp.broadcast_to(rank.reshape(rank.shape + (1,) * missing), ordered.shape[:-1])
    picked = jnp.take_along_axis(ordered, rank[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.isfinite(picked), picked, 0.0)


def _number_rates(
    tables: Tables,
    facts: PromptFacts,
    gen_ids: jax.Array,
    keep: jax.Array,
    spans: NumberSpans | None,
) -> tuple[jax.Array, jax.Array]:
    """Hallucinated number rate [B] and number copy rate [B]."""
    if spans is not None:
        same = same_number(facts, spans)
        occurs = spans.is_last
    else:
        assert facts.literals is not None  # facts and generation are looked up in the same mode
        literals = take(tables.num_ids, gen_ids)  # [B, G, M]
        literals = jnp.where(keep[..., None], literals, -2).reshape(gen_ids.shape[0], -1)
        occurs = literals >= 0
        same = (facts.literals[:, :, None] == literals[:, None, :]) & occurs[:, None, :]
    known = jnp.any(same, axis=1)
    copied = jnp.any(same, axis=2) & facts.distinct
    hallucinated = jnp.sum(occurs & ~known, axis=1) / jnp.maximum(jnp.sum(occurs, axis=1), 1)
    return hallucinated, jnp.sum(copied, axis=1) / jnp.maximum(jnp.sum(facts.distinct, axis=1), 1)


def _answer_form(tables: Tables, gen_ids: jax.Array, keep: jax.Array) -> jax.Array:
    """[B] f32: 1 where the last piece of the kept text contains a number literal."""
    tail = jnp.where(keep, take(tables.tail, gen_ids), 2).astype(jnp.int32)
    index = jnp.arange(gen_ids.shape[1])
    # Position and code in one maximum: the right-most column that is not blank wins.
    code = jnp.max(jnp.where(tail != 2, 2 * index + tail, -2), axis=1)
    return ((code >= 0) & (code % 2 == 1)).astype(jnp.float32)
