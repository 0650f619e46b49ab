"""Relation matrix between the tokens of the prompt and those of the generation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from reoac_jax.numbers import NumberSpans, number_spans
from reoac_jax.tables import Tables

EQUAL, OPERATORS, CASE, NUMBERS, OTHER = 1.0, 0.6, 0.5, 0.4, 0.1


@struct.dataclass
class PromptFacts:
    """What the features need to know about the prompt; constant during an episode.

    Attributes:
        ids: [B, P] i32, identities compared by the first relation rule.
        lower: [B, P] i32, identities after lower-casing.
        valid, number, operator: [B, P] bool; number = literal, or part of a span number.
        spans: span numbers of the prompt (None in token mode).
        literals: [B, N] i32 number literals (N = P * M; -1 = none; None in span mode).
        distinct: [B, N] bool, first occurrence of a number.
    """

    ids: jax.Array
    lower: jax.Array
    valid: jax.Array
    number: jax.Array
    operator: jax.Array
    spans: NumberSpans | None
    literals: jax.Array | None
    distinct: jax.Array


class Relation(NamedTuple):
    """R [B, P, G] f32, its column softmax A [B, P, G] f32 and kept columns keep [B, G] bool."""

    relation: jax.Array
    attention: jax.Array
    keep: jax.Array


def prompt_facts(
    tables: Tables,
    prompt_ids: jax.Array,
    prompt_len: jax.Array,
    *,
    path: str = "tensor",
    numbers: str = "token",
) -> PromptFacts:
    """Looks up the prompt side of the relation once per episode.

    Args:
        tables: lookup tables.
        prompt_ids: [B, P] i32.
        prompt_len: [B] i32.
        path: "tensor" or "host".
        numbers: "token" = number literals inside tokens, "span" = numbers across tokens.

    Returns:
        The facts.
    """
    batch, width = prompt_ids.shape
    valid = jnp.arange(width) < prompt_len[:, None]
    spans, literals = None, None
    if numbers == "span":
        spans = number_spans(tables, prompt_ids, valid)
        number = spans.in_run
        code, present = spans, spans.is_last
        same = (code.mantissa[:, :, None] == code.mantissa[:, None, :]) & (
            code.scale[:, :, None] == code.scale[:, None, :]
        )
    else:
        number = take(tables.num_full, prompt_ids)
        literals = take(tables.num_ids, prompt_ids)  # [B, P, M]
        literals = jnp.where(valid[..., None], literals, -1).reshape(batch, -1)
        present = literals >= 0
        same = literals[:, :, None] == literals[:, None, :]
    order = jnp.arange(present.shape[1])
    earlier = same & (order[None, :] < order[:, None]) & present[:, None, :]
    return PromptFacts(
        ids=_identity(tables, prompt_ids, path),
        lower=take(tables.lower_id, prompt_ids),
        valid=valid,
        number=number & valid,
        operator=take(tables.op_char, prompt_ids) & valid,
        spans=spans,
        literals=literals,
        distinct=present & ~jnp.any(earlier, axis=2),
    )


def kept_columns(
    tables: Tables, gen_ids: jax.Array, *, path: str = "tensor", gen_mask: jax.Array | None = None
) -> jax.Array:
    """Columns that count: tensor = text before the first eos, host = all (spec 3.2).

    Args:
        tables: lookup tables.
        gen_ids: [B, G] i32.
        path: "tensor" or "host".
        gen_mask: [B, G] bool of existing columns; None = all.

    Returns:
        [B, G] bool.
    """
    keep = jnp.ones(gen_ids.shape, bool) if gen_mask is None else gen_mask
    if path == "tensor":
        width = gen_ids.shape[1]
        index = jnp.arange(width)
        is_eos = (gen_ids == tables.eos_id) & keep
        first = jnp.min(jnp.where(is_eos, index, width), axis=1, initial=width)
        keep = keep & (index < first[:, None]) & ~take(tables.special, gen_ids)
    return keep


def relation(
    tables: Tables,
    prompt_ids: jax.Array,
    prompt_len: jax.Array,
    gen_ids: jax.Array,
    *,
    path: str = "tensor",
    temperature: float = 1.0,
    numbers: str = "token",
    gen_mask: jax.Array | None = None,
    prompt: PromptFacts | None = None,
) -> Relation:
    """Relation of every prompt token to every generated one (relation rule, spec 3.1-3.2).

    A_ij = exp(R_ij / T) / sum_i' exp(R_i'j / T) over the true prompt rows.

    Args:
        tables: lookup tables.
        prompt_ids: [B, P] i32.
        prompt_len: [B] i32.
        gen_ids: [B, G] i32.
        path: "tensor" (text columns before eos) or "host" (all columns, and the case rule).
        temperature: T.
        numbers: "token" or "span".
        gen_mask: [B, G] bool of existing columns; None = all.
        prompt: precomputed facts about the prompt.

    Returns:
        R (0 in padded rows), A (0 in padded rows and dropped columns) and the kept columns.
    """
    facts = prompt
    if facts is None:
        facts = prompt_facts(tables, prompt_ids, prompt_len, path=path, numbers=numbers)
    keep = kept_columns(tables, gen_ids, path=path, gen_mask=gen_mask)
    spans = number_spans(tables, gen_ids, keep) if numbers == "span" else None
    values, attention, _ = relate(tables, facts, gen_ids, keep, spans, path, temperature)
    return Relation(values, attention, keep)


def relate(
    tables: Tables,
    facts: PromptFacts,
    gen_ids: jax.Array,
    keep: jax.Array,
    spans: NumberSpans | None,
    path: str,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R [B, P, G], A [B, P, G] and column entropies h [B, G].

    R has five values only, so one softmax per column needs five exponentials and five logarithms,
    not P of each: rows are counted per value.
    """
    rows = facts.valid[:, :, None]
    equal = facts.ids[:, :, None] == _identity(tables, gen_ids, path)[:, None, :]
    if spans is not None:
        number = facts.number[:, :, None] & spans.in_run[:, None, :]
        equal = jnp.where(number, same_number(facts, spans), equal)
    else:
        number = facts.number[:, :, None] & take(tables.num_full, gen_ids)[:, None, :]
    operator = facts.operator[:, :, None] & take(tables.op_char, gen_ids)[:, None, :]
    rules = [(equal, EQUAL), (number, NUMBERS), (operator, OPERATORS)]
    if path == "host":
        lower = facts.lower[:, :, None] == take(tables.lower_id, gen_ids)[:, None, :]
        rules.append((lower, CASE))

    total = jnp.sum(facts.valid, axis=1)[:, None]  # [B, 1]
    open_rows, counts = rows, []
    for rule, _ in rules:
        hit = rule & open_rows
        counts.append(jnp.sum(hit, axis=1, dtype=jnp.int32))  # [B, G]
        open_rows = open_rows & ~rule
    counts.append(total - sum(counts))
    levels = [value for _, value in rules] + [OTHER]
    number_of = jnp.stack(counts).astype(jnp.float32)  # [levels, B, G]
    level = jnp.asarray(levels, jnp.float32)[:, None, None]
    peak = jnp.max(jnp.where(number_of > 0, level, 0.0), axis=0)
    weight = jnp.exp((level - peak) / temperature)
    weight = jnp.where(number_of > 0, weight, 0.0)
    share = weight / jnp.maximum(jnp.sum(number_of * weight, axis=0), 1e-30)  # [levels, B, G]
    column_entropy = -jnp.sum(number_of * share * jnp.log(share + 1e-12), axis=0)

    kept_share = jnp.where(keep, share, 0.0)
    values = jnp.full(equal.shape, OTHER, jnp.float32)
    attention = jnp.broadcast_to(kept_share[-1][:, None, :], equal.shape)
    for (rule, value), part in zip(rules[::-1], kept_share[-2::-1], strict=True):
        values = jnp.where(rule, value, values)
        attention = jnp.where(rule, part[:, None, :], attention)
    return (
        jnp.where(rows, values, 0.0),
        jnp.where(rows, attention, 0.0),
        jnp.where(keep, column_entropy, 0.0),
    )


def take(table: object, ids: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(table), ids, axis=0, mode="clip")


def _identity(tables: Tables, ids: jax.Array, path: str) -> jax.Array:
    """What the equality rule compares: ids on the raw tensor path, else strings."""
    if path == "tensor" and tables.strings_mode == "raw":
        return ids
    return take(tables.str_id, ids)


def same_number(facts: PromptFacts, spans: NumberSpans) -> jax.Array:
    """[B, P, G] bool: equal span numbers."""
    left = facts.spans
    assert left is not None  # facts and generation are looked up in the same mode
    return (
        (left.mantissa[:, :, None] == spans.mantissa[:, None, :])
        & (left.scale[:, :, None] == spans.scale[:, None, :])
        & facts.number[:, :, None]
        & spans.in_run[:, None, :]
    )
