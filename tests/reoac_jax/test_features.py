"""Array features against plain Python on random inputs; padding; compilation; plus options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import plain_python_reoac as plain
from reoac_jax.features import (
    base_features,
    normalised_pools,
    pool_hidden,
    progress_features,
)
from reoac_jax.relation import prompt_facts, relation
from reoac_jax.tables import Tables, build_tables
from reoac_jax.types import SpecialIds

WORDS = ["Ġapples", "apples", "Apples", "Ġ12", "12", "34", "1", "2", "3", "Ġ3", "5", ".", ",", "Ġ"]
STRINGS = [*WORDS, "+", "Ġ=", "a_b", "1/2", "3.5%", "-7", "x", "200", "Ġ1", "<eos>", "<|mask|>"]
SPECIAL = SpecialIds(len(STRINGS) - 2, len(STRINGS) - 2, len(STRINGS) - 2, len(STRINGS) - 1)
VOCABULARY = plain.PlainVocabulary(STRINGS, SPECIAL.eos_id, frozenset(SPECIAL))
OPTIONS = ("path", "numbers", "temperature", "scale_entropy")
compiled = jax.jit(base_features, static_argnames=OPTIONS)


@pytest.fixture(scope="module")
def tables() -> Tables:
    return build_tables(STRINGS, SPECIAL)


def ids(text: list[str]) -> np.ndarray:
    return np.asarray([[STRINGS.index(piece) for piece in text]], np.int32)


def random_batch(seed: int, batch: int = 12, rows: int = 14, columns: int = 11) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "prompt_ids": rng.integers(0, len(STRINGS), (batch, rows)).astype(np.int32),
        "prompt_len": rng.integers(1, rows + 1, batch).astype(np.int32),
        "key_mask": rng.random((batch, rows)) < 0.4,
        "gen_ids": rng.integers(0, len(STRINGS), (batch, columns)).astype(np.int32),
        "entropy": rng.random((batch, columns)).astype(np.float32),
    }


@pytest.mark.parametrize("path", ["tensor", "host"])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_plain_python_agrees(tables: Tables, path: str, temperature: float) -> None:
    for seed in range(3):
        given = random_batch(seed)
        before = np.random.default_rng(seed + 99).permutation(given["gen_ids"].ravel())
        before = before.reshape(given["gen_ids"].shape)
        previous = relation(
            tables, given["prompt_ids"], given["prompt_len"], before, path=path,
            temperature=temperature,
        ).attention  # fmt: skip
        found, _ = compiled(
            tables, **given, previous_attention=previous, path=path, temperature=temperature
        )
        for row in range(found.shape[0]):
            length = int(given["prompt_len"][row])
            wanted = plain.features(
                given["prompt_ids"][row, :length].tolist(),
                given["key_mask"][row, :length].tolist(),
                given["gen_ids"][row].tolist(),
                VOCABULARY,
                given["entropy"][row].tolist(),
                before[row].tolist(),
                path=path,
                temperature=temperature,
            )
            np.testing.assert_allclose(found[row], wanted, atol=2e-5)


@pytest.mark.parametrize("numbers", ["token", "span"])
def test_padding_never_matters(tables: Tables, numbers: str) -> None:
    given = random_batch(7)
    found, aux = compiled(tables, **given, numbers=numbers)
    rng = np.random.default_rng(1)
    outside = np.arange(given["prompt_ids"].shape[1]) >= given["prompt_len"][:, None]
    noise = rng.integers(0, len(STRINGS), outside.shape)
    given["prompt_ids"] = np.where(outside, noise, given["prompt_ids"]).astype(np.int32)
    given["key_mask"] = given["key_mask"] | outside
    again, other = compiled(tables, **given, numbers=numbers)
    np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(aux.attention, other.attention)


def test_one_compilation_for_all_batches_of_a_shape(tables: Tables) -> None:
    traces = []

    @jax.jit
    def counted(**given: jax.Array) -> jax.Array:
        traces.append(1)
        return base_features(tables, **given)[0]

    for seed in range(4):
        counted(**random_batch(seed))
    assert len(traces) == 1


def test_columns_are_distributions(tables: Tables) -> None:
    given = random_batch(3)
    found = relation(tables, given["prompt_ids"], given["prompt_len"], given["gen_ids"])
    np.testing.assert_allclose(found.attention.sum(axis=1), found.keep, atol=1e-6)


def test_precomputed_prompt_changes_nothing(tables: Tables) -> None:
    given = random_batch(5)
    for numbers in ("token", "span"):
        facts = prompt_facts(tables, given["prompt_ids"], given["prompt_len"], numbers=numbers)
        direct, _ = compiled(tables, **given, numbers=numbers)
        quick, _ = compiled(tables, **given, numbers=numbers, prompt=facts)
        np.testing.assert_array_equal(direct, quick)


def test_span_numbers(tables: Tables) -> None:
    """ "Ġ12","34" is not the 34 of the prompt, and 1,200 equals 1200."""
    prompt = ids(["34", "Ġapples", "Ġ1", ",", "200", "Ġapples", "3", ".", "5"])
    gen = ids(["Ġ12", "34", "Ġapples", "12", "Ġ", "1", "200", "Ġ", "3", ".", "5"])
    length = np.asarray([prompt.shape[1]], np.int32)
    key = np.zeros(prompt.shape, bool)
    by_token, _ = compiled(tables, prompt, length, key, gen)
    by_span, aux = compiled(tables, prompt, length, key, gen, numbers="span")
    # 1234 and 12 are new; 1200 and 3.5 are copied, 34 is not.
    np.testing.assert_allclose(by_span[0, 6], 2 / 4)
    np.testing.assert_allclose(by_span[0, 7], 2 / 3)
    # Digit pieces make nearly everything look copied.
    np.testing.assert_allclose(by_token[0, 6], 2 / 7)
    np.testing.assert_allclose(by_token[0, 7], 1.0 - 0 / 5)
    values = np.asarray(aux.relation[0])
    assert values[0, 1] == pytest.approx(0.4)  # 34 against 1234
    np.testing.assert_allclose(values[2:5, 5:7], 1.0)  # 1,200 against 1200, every token
    np.testing.assert_allclose(values[6:, 8:], 1.0)  # 3.5, its point included
    assert values[1, 2] == 1.0


def test_stripped_strings_find_what_raw_ones_miss(tables: Tables) -> None:
    stripped = build_tables(STRINGS, SPECIAL, "stripped")
    prompt, length = ids(["Ġ12", "Ġapples", "Ġ3"]), np.asarray([3], np.int32)
    gen = ids(["12", "Apples", "5", "a_b"])
    raw = np.asarray(relation(tables, prompt, length, gen).relation)[0]
    found = np.asarray(relation(stripped, prompt, length, gen).relation)[0]
    assert raw[0, 0] == pytest.approx(0.1) and found[0, 0] == 1.0
    assert raw[2, 2] == pytest.approx(0.1) and found[2, 2] == pytest.approx(0.4)
    assert np.asarray(tables.op_char)[STRINGS.index("a_b")]
    assert not np.asarray(stripped.op_char)[STRINGS.index("a_b")]
    assert not np.asarray(stripped.op_char)[SPECIAL.mask_id]
    host = relation(stripped, prompt, length, gen, path="host").relation
    assert host[0, 1, 1] == pytest.approx(0.5)


def test_scaled_entropy_is_a_share(tables: Tables) -> None:
    given = random_batch(11)
    plain_entropy, _ = compiled(tables, **given)
    scaled, _ = compiled(tables, **given, scale_entropy=True)
    unit = np.log(np.maximum(given["prompt_len"], 2))
    np.testing.assert_allclose(scaled[:, 3] * unit, plain_entropy[:, 3], rtol=1e-5)
    assert float(scaled[:, 3:5].max()) <= 1.0 + 1e-6


def test_progress() -> None:
    masked = jnp.asarray([[True, True, False, False], [False] * 4])
    confidence = jnp.asarray([[0.2, 0.6, 0.9, 0.9], [0.5] * 4])
    changed = jnp.asarray([[False, False, True, False], [True] * 4])
    found = progress_features(3, 12, masked, confidence, changed)
    np.testing.assert_allclose(found, [[0.25, 0.5, 0.4, 0.25], [0.25, 0.0, 0.0, 1.0]], rtol=1e-6)


def test_pooling() -> None:
    hidden = jnp.asarray(np.arange(24, dtype=np.float32).reshape(2, 4, 3))
    mask = jnp.asarray([[True, True, False, False], [False] * 4])
    np.testing.assert_allclose(pool_hidden(hidden, mask), [[1.5, 2.5, 3.5], [0.0] * 3])
    joined = normalised_pools(hidden[:, 0], hidden[:, 1] * 7)
    assert joined.shape == (2, 6)
    np.testing.assert_allclose(joined[:, :3].std(axis=1), 1.0, rtol=1e-3)
