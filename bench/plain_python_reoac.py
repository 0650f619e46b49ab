"""Relation features and operators token by token in plain Python.

The slow way: string rules applied to every pair of tokens at every step. It is the yardstick of
the speed measurements and, written independently of the array version, its judge in the tests.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

NUMBER = re.compile(r"[+-]?(?:\d+\.\d+|\d+|\d+/\d+)%?")
OPERATOR_CHARS = "+-*/=<>&^_"


@dataclass
class PlainVocabulary:
    """Raw token strings and the ids that are never text."""

    strings: Sequence[str]
    eos_id: int
    special_ids: frozenset[int]


def is_number(string: str) -> bool:
    """Whether a token string is a number literal."""
    return NUMBER.fullmatch(string) is not None


def has_operator(string: str) -> bool:
    """Whether a token string contains an operator character."""
    return any(char in OPERATOR_CHARS for char in string)


def similarity(left: int, right: int, vocabulary: PlainVocabulary, path: str) -> float:
    """Relation of one prompt token to one generated token (relation rule, spec 3.1)."""
    a, b = vocabulary.strings[left], vocabulary.strings[right]
    if (left == right) if path == "tensor" else (a == b):
        return 1.0
    if is_number(a) and is_number(b):
        return 0.4
    if has_operator(a) and has_operator(b):
        return 0.6
    if path == "host" and a.lower() == b.lower():
        return 0.5
    return 0.1


def kept_positions(gen_ids: Sequence[int], vocabulary: PlainVocabulary, path: str) -> list[int]:
    """Generated positions that count."""
    if path == "host":
        return list(range(len(gen_ids)))
    kept = []
    for position, token in enumerate(gen_ids):
        if token == vocabulary.eos_id:
            break
        if token not in vocabulary.special_ids:
            kept.append(position)
    return kept


def attention_columns(
    prompt_ids: Sequence[int],
    gen_ids: Sequence[int],
    vocabulary: PlainVocabulary,
    path: str,
    temperature: float = 1.0,
) -> list[list[float]]:
    """Softmax over the prompt for every generated token: one list of prompt shares each."""
    columns = []
    for token in gen_ids:
        weights = [
            math.exp(similarity(left, token, vocabulary, path) / temperature) for left in prompt_ids
        ]
        total = sum(weights)
        columns.append([weight / total for weight in weights])
    return columns


def percentile_90(values: Sequence[float]) -> float:
    """Element at rank round-half-to-even(0.9 (n - 1)) of the sorted values."""
    ordered = sorted(values)
    numerator = 9 * (len(ordered) - 1)
    rank, rest = divmod(numerator, 10)
    if rest > 5 or (rest == 5 and rank % 2 == 1):
        rank += 1
    return ordered[rank]


def features(
    prompt_ids: Sequence[int],
    key_mask: Sequence[bool],
    gen_ids: Sequence[int],
    vocabulary: PlainVocabulary,
    entropies: Sequence[float] | None = None,
    previous_gen_ids: Sequence[int] | None = None,
    *,
    path: str = "tensor",
    temperature: float = 1.0,
) -> list[float]:
    """The 11 features of one episode at one step (spec 3.3).

    Args:
        prompt_ids: prompt tokens.
        key_mask: key token or not, per prompt token.
        gen_ids: generated tokens.
        vocabulary: token strings.
        entropies: normalised logit entropy per generated token; None = no logits.
        previous_gen_ids: generated tokens of the step before; None = no previous relation.
        path: "tensor" or "host".
        temperature: of the relation softmax.

    Returns:
        The features.
    """
    kept = kept_positions(gen_ids, vocabulary, path)
    if not kept or not prompt_ids:
        return [0.0] * 11
    tokens = [gen_ids[j] for j in kept]
    columns = attention_columns(prompt_ids, tokens, vocabulary, path, temperature)
    keys = [i for i, key in enumerate(key_mask) if key]
    mass = [sum(column[i] for i in keys) for column in columns]
    surprise = [entropies[j] if entropies is not None else 0.0 for j in kept]
    coverage = mass_ratio = confidence = 0.0
    if keys:
        coverage = sum(max(column[i] for column in columns) for i in keys) / len(keys)
        mass_ratio = sum(mass) / len(mass)
        sure = [1.0 - surprise[j] for j in range(len(kept)) if mass[j] >= 0.5 - 1e-9]
        if sure and entropies is not None:
            confidence = sum(sure) / len(sure)
    spread = [-sum(a * math.log(a + 1e-12) for a in column) for column in columns]
    suspect = [(1.0 - mass[j]) + surprise[j] for j in range(len(kept))]
    delta = 0.0
    if previous_gen_ids is not None:
        counted = set(kept_positions(previous_gen_ids, vocabulary, path))
        before = attention_columns(prompt_ids, previous_gen_ids, vocabulary, path, temperature)
        changes = [
            abs((before[j][i] if j in counted else 0.0) - column[i])
            for j, column in zip(kept, columns, strict=True)
            for i in range(len(prompt_ids))
        ]
        delta = sum(changes) / len(changes)
    known = {
        literal for token in prompt_ids for literal in NUMBER.findall(vocabulary.strings[token])
    }
    said = [literal for token in tokens for literal in NUMBER.findall(vocabulary.strings[token])]
    invented = sum(literal not in known for literal in said) / len(said) if said else 0.0
    copied = len(known & set(said)) / len(known) if known else 0.0
    pieces = " ".join(vocabulary.strings[token] for token in tokens).split()
    answered = 1.0 if pieces and NUMBER.search(pieces[-1]) else 0.0
    return [
        coverage,
        mass_ratio,
        confidence,
        sum(spread) / len(spread),
        percentile_90(spread),
        delta,
        invented,
        copied,
        answered,
        sum(suspect) / len(suspect),
        percentile_90(suspect),
    ]


def operator_positions(
    name: str, limit: int, gen_ids: Sequence[int], vocabulary: PlainVocabulary
) -> list[int]:
    """The last `limit` generated positions that an operator flags (operators, spec 4)."""
    flagged = []
    for position, token in enumerate(gen_ids):
        string = vocabulary.strings[token]
        if name == "O_NUM" and not any(char.isdecimal() for char in string):
            continue
        if name == "O_OP" and not has_operator(string):
            continue
        flagged.append(position)
    return flagged[-limit:]
