"""Relation matrix and features against both recorded code paths."""

import collections
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.features import FEATURE_NAMES, base_features, heuristic_scores, p90
from reoac_jax.relation import relation
from reoac_jax.sampling import logit_entropy
from tests.parity.reoac_vocabulary import load_tables, reoac_files

TOLERANCE = 2e-5
PATHS = ("tensor", "host")


def load_cases() -> list[dict[str, Any]]:
    cases = []
    for path in reoac_files("relation_features*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert tuple(record["feature_names"]) == FEATURE_NAMES
        logits = np.load(path.parent / record["logits_file"])
        for case in record["cases"]:
            key = f"{case['id']}_logits"
            cases.append({**case, "logits": logits[key] if case["has_logits"] else None})
    return cases


CASES = load_cases()
ROOM = (
    max(len(case["prompt_ids"]) for case in CASES) + 2,
    max(len(case["gen_ids"]) for case in CASES) + 2,
)


compiled_features = jax.jit(base_features, static_argnames="path")
compiled_relation = jax.jit(relation, static_argnames="path")
compiled_entropy = jax.jit(logit_entropy)


def entropies(logits: np.ndarray | None, width: int) -> np.ndarray | None:
    if logits is None or logits.shape[0] == 0:
        return None
    rows = max(ROOM[1], logits.shape[0])
    padded = np.pad(logits, ((0, rows - len(logits)), (0, 0)))
    found = compiled_entropy(jnp.asarray(padded)[None], log_width=np.log(width))
    return np.asarray(found)[:, : len(logits)]


def run(case: dict[str, Any], path: str, rows: int, columns: int) -> tuple[np.ndarray, Any]:
    """Features of one case inside a batch row of rows x columns, padded with numbers."""
    tables = load_tables()
    filler = int(np.flatnonzero(tables.num_full)[0])
    prompt = np.full((1, rows), filler, np.int32)
    prompt[0, : len(case["prompt_ids"])] = case["prompt_ids"]
    gen = np.full((1, columns), filler, np.int32)
    gen[0, : len(case["gen_ids"])] = case["gen_ids"]
    mask = np.arange(columns)[None] < len(case["gen_ids"])
    key = np.ones((1, rows), bool)
    key[0, : len(case["key_mask"])] = np.asarray(case["key_mask"], bool)
    length = np.asarray([len(case["prompt_ids"])], np.int32)
    entropy = None
    if case["logits"] is not None:
        found = entropies(case["logits"], case["logits"].shape[1])
        entropy = np.full((1, columns), 0.7, np.float32)
        if found is not None:
            entropy[:, : found.shape[1]] = found
    previous = None
    if case["prev_gen_ids"] is not None:
        before = np.full((1, columns), filler, np.int32)
        before[0, : len(case["prev_gen_ids"])] = case["prev_gen_ids"]
        previous = compiled_relation(
            tables, prompt, length, before, path=path, gen_mask=mask
        ).attention
    features, aux = compiled_features(
        tables,
        jnp.asarray(prompt),
        jnp.asarray(length),
        jnp.asarray(key),
        jnp.asarray(gen),
        entropy,
        previous,
        path=path,
        gen_mask=jnp.asarray(mask),
    )
    return np.asarray(features), aux


def selected() -> Iterator[Any]:
    for case in CASES:
        for path in PATHS:
            # An empty prompt never occurs; the host path of it is not required.
            if case["prompt_ids"] or path == "tensor":
                yield pytest.param(case, path, id=f"{case['id']}-{case['name']}-{path}")


@pytest.mark.parametrize(("case", "path"), selected())
def test_case(case: dict[str, Any], path: str) -> None:
    features, aux = run(case, path, *ROOM)
    expected = case[path]
    kept = expected.get("kept_gen_index", list(range(len(case["gen_ids"]))))
    length = len(case["prompt_ids"])
    np.testing.assert_allclose(features[0], expected["features"], atol=TOLERANCE)
    np.testing.assert_array_equal(np.flatnonzero(aux.keep[0]), kept)
    values = np.asarray(aux.relation)[0, :length][:, kept]
    wanted = np.asarray(expected["relation"], np.float32)
    if wanted.size:
        np.testing.assert_allclose(values, wanted, atol=1e-6)
    if length and len(kept):
        np.testing.assert_allclose(
            np.asarray(heuristic_scores(features))[0], list(scores(expected)), atol=TOLERANCE
        )


def scores(expected: dict[str, Any]) -> list[float]:
    found = expected["heuristic_scores"]
    if isinstance(found, dict):
        return [found[name] for name in ("O_NUM", "O_OP", "O_SCOPE", "O_BRANCH", "O_FAST")]
    return found


# The most frequent shape only: each one is compiled.
SHAPES = [
    shape
    for shape, _ in collections.Counter(
        (len(case["prompt_ids"]), len(case["gen_ids"])) for case in CASES if case["gen_ids"]
    ).most_common(1)
    if shape[0]
]


@pytest.mark.parametrize("path", PATHS)
def test_padding_never_matters(path: str) -> None:
    for case in CASES:
        shape = len(case["prompt_ids"]), len(case["gen_ids"])
        if shape not in SHAPES:
            continue
        tight, _ = run(case, path, *shape)
        loose, _ = run(case, path, *ROOM)
        np.testing.assert_allclose(tight, loose, atol=1e-6)


def test_percentile_rank() -> None:
    for path in reoac_files("misc*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in record["p90_of_0_to_n_minus_1"] if row["n"]]
        counts = np.asarray([row["n"] for row in rows])
        values = np.tile(np.arange(counts.max(), dtype=np.float32)[::-1], (len(rows), 1))
        mask = values < counts[:, None]
        found = jax.jit(p90)(values, mask)
        np.testing.assert_array_equal(found, [row["p90_index"] for row in rows])
