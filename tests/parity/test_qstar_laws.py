"""Filters, special tokens, vocabulary alignment and the exact laws of outputs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from qstar.diagnostics import diagnose
from qstar.law import LawSettings, log_weights
from qstar.tilt import AlphaSettings, tilt
from qstar.vocabulary import align, require_same, take_columns
from tests.parity import qstar_cases as cases

FILTERS = cases.read("filters.json")["cases"]
LAWS = cases.read("toy_decode.json")


@functools.cache
def filtered(top_k: int, top_p: float, width: int, by_support: bool) -> Any:
    """The law of given probabilities under top-k and top-p, as q's filter or as pi_t's support."""
    if by_support:
        settings = LawSettings(support="target", support_top_k=top_k, support_top_p=top_p)
    else:
        settings = LawSettings(top_k=top_k, top_p=top_p)

    def run(log_p: jax.Array) -> jax.Array:
        found = tilt(log_p, log_p, AlphaSettings("fixed"))
        return jax.nn.softmax(log_weights(found, settings), axis=-1)

    return jax.jit(run)


@pytest.mark.parametrize("by_support", [False, True], ids=["filter", "support"])
def test_filters(by_support: bool) -> None:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for case in FILTERS:
        groups.setdefault((case["top_k"], case["top_p"]), []).append(case)
    # One width per settings: impossible columns at the end change nothing. Settings that switch
    # top-k off by being too large must stay so.
    width = max(len(case["p"]) for case in FILTERS)
    for (top_k, top_p), group in groups.items():
        p = np.stack([np.pad(case["p"], (0, width - len(case["p"]))) for case in group])
        with np.errstate(divide="ignore"):
            log_p = np.log(p).astype(np.float32)
        q = np.asarray(filtered(top_k, top_p, width, by_support)(log_p))
        for case, got in zip(group, q, strict=True):
            where = (case["p"], top_k, top_p)
            assert np.flatnonzero(got).tolist() == case["keep"], where
            wanted = np.pad(case["q"], (0, width - len(case["q"])))
            np.testing.assert_allclose(got, wanted, atol=1e-6, err_msg=str(where))


@functools.partial(jax.jit, static_argnums=3)
def special_law(
    x: jax.Array, y: jax.Array, special: jax.Array, mode: str
) -> tuple[jax.Array, jax.Array]:
    found = tilt(x, y, AlphaSettings())
    return found.alpha, jax.nn.softmax(log_weights(found, LawSettings(mode), special), axis=-1)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_special_tokens(double: bool) -> None:
    recorded = cases.read("special_tokens.json")["cases"]
    width = max(len(case["logits_t"]) for case in recorded)
    for case in recorded:
        size = len(case["logits_t"])
        special = np.isin(np.arange(width), case["special_ids"])
        with jax.enable_x64(double):
            # One shape: columns that are impossible in both models change nothing.
            rows = [
                jnp.pad(
                    jnp.asarray(case[f"logits_{m}"])[None],
                    ((0, 0), (0, width - size)),
                    constant_values=-jnp.inf,
                )
                for m in ("theta", "t")
            ]
            alpha, kept = jax.device_get(special_law(*rows, special, "target_mass"))
            _, mixed = jax.device_get(special_law(*rows, special, "mix"))
        assert abs(alpha[0] - case["alpha"]) <= (1e-9 if double else 1e-5)
        np.testing.assert_allclose(kept[0, :size], case["q_target_mass"], rtol=0, atol=1e-6)
        assert abs(kept[0, special].sum() - case["pi_t_special_mass"]) <= 1e-6
        assert abs(mixed[0, special].sum() - case["plain_q_special_mass"]) <= 1e-5


def test_aligned_vocabularies() -> None:
    case = cases.read("vocab_align.json")
    aligned = align(case["vocab_theta"], case["vocab_t"])
    count = len(aligned.tokens)
    assert list(aligned.tokens) == case["common_tokens"]
    assert aligned.columns_theta[:count].tolist() == case["ids_theta"]
    assert aligned.columns_t[:count].tolist() == case["ids_t"]
    x = take_columns(jnp.asarray(case["logits_theta"], jnp.float32)[None], aligned.columns_theta)
    y = take_columns(jnp.asarray(case["logits_t"], jnp.float32)[None], aligned.columns_t)
    found = tilt(x, y, AlphaSettings())
    got = diagnose(found)
    assert abs(float(found.alpha[0]) - case["alpha"]) <= 1e-5
    assert abs(float(got.overlap_theta[0]) - case["overlap_mass_theta"]) <= 1e-5
    assert abs(float(got.overlap_t[0]) - case["overlap_mass_t"]) <= 1e-5
    weights = log_weights(found, LawSettings(), allowed=jnp.asarray(aligned.allowed))
    q = np.asarray(jax.nn.softmax(weights, axis=-1))[0]
    np.testing.assert_allclose(q[:count], case["q_over_common"], rtol=0, atol=1e-5)
    assert np.all(q[count:] == 0)
    with pytest.raises(UserError, match=str(len(case["vocab_t"]))):
        require_same(case["vocab_theta"], case["vocab_t"])


@functools.partial(jax.jit, static_argnums=(2, 3))
def table_law(
    x: jax.Array, y: jax.Array, settings: AlphaSettings, temperature: float, forced: jax.Array
) -> tuple[jax.Array, jax.Array]:
    found = tilt(x, y, settings, temperature, forced)
    return found.alpha, jax.nn.softmax(log_weights(found, LawSettings()), axis=-1)


@pytest.mark.parametrize("law", LAWS["laws"], ids=lambda law: law["method"])
def test_exact_probability_of_every_output(law: dict[str, Any]) -> None:
    x, y = (jnp.asarray(LAWS[f"table_{m}"], jnp.float32) for m in ("theta", "t"))
    fixed = law["fixed_alpha"]
    settings = AlphaSettings(law["method"], fixed=0.5 if fixed is None else fixed)
    no = jnp.zeros(len(x), bool)
    alpha, q = jax.device_get(table_law(x, y, settings, law["temperature"], no))
    np.testing.assert_allclose(alpha, law["alpha_by_previous_token"], rtol=0, atol=1e-5)
    first = q
    if law["force_first_token"]:
        alpha, first = jax.device_get(table_law(x, y, settings, law["temperature"], ~no))
        assert np.all(alpha == 0)
    total = 0.0
    for output, wanted in law["probability"].items():
        probability, previous, table = 1.0, LAWS["start"], first
        for token in map(int, output.split()):
            probability *= table[previous, token]
            previous, table = token, q
        assert abs(probability - wanted) <= 1e-5, output
        total += probability
    assert abs(total - 1) <= 1e-5
