"""Logits, hidden states and steering of random small models, recorded with transformers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.lm import decoder, weights
from common.lm.cache import empty_cache
from common.lm.decoder import Capture, Steering
from common.lm.generate import generate
from tests.parity.fixtures import fixture_root

ROOT = fixture_root() / "esm" / "tiny_models"
MODELS = sorted(path.parent for path in ROOT.glob("*/expected.json"))
ATOL = 2e-3


@functools.cache
def load(directory):
    """Model, recorded values and recorded arrays of one directory."""
    expected = json.loads((directory / "expected.json").read_text())
    with np.load(directory / "expected.npz") as arrays:
        return weights.load_model(directory), expected, dict(arrays)


@functools.partial(jax.jit, static_argnums=1)
def read(params, cfg, ids, steering, capture):
    """Logits of every position, and the captured states."""
    out = decoder.forward(params, cfg, ids, steering=steering, capture=capture)
    return decoder.head_logits(params, cfg, out.hidden), out.captured


@pytest.fixture(params=MODELS, ids=lambda path: path.name)
def recorded(request):
    """One model after the other."""
    return load(request.param)


def padded(sequences):
    """Right-padded ids [B, T] and lengths."""
    width = max(map(len, sequences))
    ids = np.zeros((len(sequences), width), np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return jnp.asarray(ids), [len(sequence) for sequence in sequences]


def everything(cfg, batch, width):
    """Capture of all layers at all positions."""
    return Capture(
        jnp.arange(cfg.num_layers, dtype=jnp.int32),
        jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width)),
    )


def test_logits_and_hidden_states(recorded):
    """All prompts as one right-padded batch."""
    model, expected, arrays = recorded
    ids, lengths = padded(expected["prompts"])
    capture = everything(model.cfg, *ids.shape)
    logits, states = read(model.params, model.cfg, ids, None, capture)
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(logits[i, :length], arrays[f"p{i}_logits"], atol=ATOL)
        np.testing.assert_allclose(states[:, i, :length], arrays[f"p{i}_layer_out"], atol=ATOL)


def test_greedy_tokens_and_log_probabilities(recorded):
    model, expected, _ = recorded
    cases = expected["greedy"]
    result = generate(
        model.params,
        model.cfg,
        [expected["prompts"][case["prompt"]] for case in cases],
        max_new_tokens=max(len(case["tokens"]) for case in cases),
    )
    for row, log_probs, case in zip(result.rows(), result.log_probs, cases, strict=True):
        assert row == case["tokens"]
        np.testing.assert_allclose(log_probs[: len(row)], case["logprobs"], atol=ATOL)


def test_steered_generations(recorded):
    """Every case is one row: its own prompt, layer, strength and vector."""
    model, expected, arrays = recorded
    cases = expected["steer"]
    prompts = [expected["prompts"][case["prompt"]] for case in cases]
    steering = Steering(
        layer=jnp.asarray([case["layer"] for case in cases], jnp.int32),
        position=jnp.asarray([len(prompt) - 1 for prompt in prompts], jnp.int32),
        vector=jnp.asarray([arrays[f"s{k}_v"] for k in range(len(cases))]),
        strength=jnp.asarray([case["alpha"] for case in cases], jnp.float32),
    )
    ids, lengths = padded(prompts)
    logits, _ = read(model.params, model.cfg, ids, steering, everything(model.cfg, len(cases), 1))
    for k, length in enumerate(lengths):
        np.testing.assert_allclose(
            logits[k, length - 1], arrays[f"s{k}_first_logits"], atol=ATOL, err_msg=str(k)
        )
    steps = max(len(case["tokens"]) for case in cases)
    result = generate(model.params, model.cfg, prompts, max_new_tokens=steps, steering=steering)
    for k, case in enumerate(cases):
        assert result.rows()[k] == case["tokens"]
        np.testing.assert_allclose(result.log_probs[k], case["logprobs"], atol=ATOL)


def test_states_after_a_steered_generation(recorded):
    """The steered cache kept, and the same tokens read again without steering."""
    model, expected, arrays = recorded
    cases = expected["steer"]
    prompts = [expected["prompts"][case["prompt"]] for case in cases]
    count, layers = len(cases), jnp.arange(model.cfg.num_layers, dtype=jnp.int32)
    steering = Steering(
        layer=jnp.asarray([case["layer"] for case in cases], jnp.int32),
        position=jnp.asarray([len(prompt) - 1 for prompt in prompts], jnp.int32),
        vector=jnp.asarray([arrays[f"s{k}_v"] for k in range(count)]),
        strength=jnp.asarray([case["alpha"] for case in cases], jnp.float32),
    )
    ids, lengths = padded(prompts)
    tokens, _ = padded([case["tokens"] for case in cases])
    new = jnp.asarray([len(case["tokens"]) for case in cases], jnp.int32)
    last = (jnp.asarray(lengths) + new - 1)[:, None]

    @jax.jit
    def persistent(params):
        cache = empty_cache(model.cfg, count, ids.shape[1] + tokens.shape[1])
        slots = jnp.arange(count, dtype=jnp.int32)
        sizes = jnp.asarray(lengths, jnp.int32)
        steered = decoder.prefill(params, model.cfg, cache, ids, sizes, slots, steering=steering)
        # All new tokens in one pass over the steered cache.
        capture = Capture(layers, last)
        return decoder.extend(params, model.cfg, steered.cache, tokens, new, capture=capture)

    kept = persistent(model.params)
    whole, _ = padded([p + case["tokens"] for p, case in zip(prompts, cases, strict=True)])
    _, clean = read(model.params, model.cfg, whole, None, Capture(layers, last))
    for k in range(count):
        want = arrays[f"s{k}_state_persistent"]
        np.testing.assert_allclose(kept.captured[:, k, 0], want, atol=ATOL, err_msg=str(k))
        want = arrays[f"s{k}_state_clean"]
        np.testing.assert_allclose(clean[:, k, 0], want, atol=ATOL, err_msg=str(k))
