"""The decoder against recorded float64 logits and greedy decodes of random small checkpoints."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.lm import decoder, weights
from common.lm.cache import empty_cache
from common.lm.generate import pad_prompts
from tests.parity.fixtures import fixture_root

ROOT = fixture_root() / "qstar" / "tiny"
EXPECTED = json.loads((ROOT / "expected.json").read_text()) if ROOT.is_dir() else {}


@functools.cache
def load(name: str) -> weights.Model:
    """One checkpoint, read once."""
    return weights.load_model(ROOT / name)


def name_of(case: dict) -> str:
    """Test id of a case."""
    return case.get("model") or f"{case['theta']}-{case['t']}"


@pytest.mark.parametrize("case", EXPECTED.get("teacher_forced", []), ids=name_of)
def test_logits(case):
    """The whole sequence at once, and a padded prompt followed by one token after the other."""
    model = load(case["model"])
    cfg, ids = model.cfg, case["input_ids"]
    read = len(ids) // 2
    padded, sizes, slots = pad_prompts([ids[:read]], [1], read + 3, 2)
    padded[padded == 0] = 5  # padding of another id
    active = jnp.asarray([False, True, False])

    @jax.jit
    def at_once(params):
        hidden = decoder.forward(params, cfg, jnp.asarray([ids], jnp.int32)).hidden
        return decoder.head_logits(params, cfg, hidden)[0]

    @jax.jit
    def through_the_cache(params):
        cache = decoder.prefill(
            params, cfg, empty_cache(cfg, 3, len(ids) + 2), padded, sizes, slots
        ).cache

        def step(cache, token):
            logits, cache = decoder.decode_step(params, cfg, cache, jnp.full((3,), token), active)
            return cache, logits[1]

        return jax.lax.scan(step, cache, jnp.asarray(ids[read:], jnp.int32))

    logits = at_once(model.params)
    np.testing.assert_allclose(logits[0], case["logits_first"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(logits[-1], case["logits_last"], atol=1e-4, rtol=1e-4)
    cache, steps = through_the_cache(model.params)
    np.testing.assert_allclose(steps, logits[read:], atol=1e-4, rtol=1e-4)
    assert cache.lengths.tolist() == [0, len(ids), 0]


@pytest.mark.parametrize("run", EXPECTED.get("runs", []), ids=name_of)
def test_two_models_decode_one_sequence(run):
    """Greedy tokens of the recorded mixtures, with the recorded exponents, both models at once."""
    theta, target = load(run["theta"]), load(run["t"])
    rows, width = run["rows"], min(theta.cfg.vocab_size, target.cfg.vocab_size)
    count = len(rows)
    lengths = jnp.asarray([len(row["tokens"]) for row in rows], jnp.int32)
    alpha = np.zeros((count, lengths.max()), np.float32)
    for line, row in zip(alpha, rows, strict=True):
        line[: len(row["alpha"])] = row["alpha"]

    @jax.jit
    def decode(prompts):
        first, caches = [], []
        for model, (ids, sizes) in zip((theta, target), prompts, strict=True):
            cache = empty_cache(model.cfg, count, ids.shape[1] + alpha.shape[1])
            read = decoder.prefill(
                model.params, model.cfg, cache, ids, sizes, jnp.arange(count, dtype=jnp.int32)
            )
            first.append(read.logits)
            caches.append(read.cache)

        def mixed(logits, step):
            share = jnp.asarray(alpha)[:, step, None]
            x, y = (part[:, :width] for part in logits)
            return jnp.argmax(share * x + (1 - share) * y, axis=-1).astype(jnp.int32)

        def body(state):
            step, token, out, caches = state
            active = step < lengths
            logits, grown = [], []
            for model, cache in zip((theta, target), caches, strict=True):
                part, cache = decoder.decode_step(model.params, model.cfg, cache, token, active)
                logits.append(part)
                grown.append(cache)
            token = mixed(logits, step)
            return step + 1, token, out.at[:, step].set(token), tuple(grown)

        token = mixed(first, 0)
        out = jnp.zeros(alpha.shape, jnp.int32).at[:, 0].set(token)
        state = (jnp.int32(1), token, out, tuple(caches))
        return jax.lax.while_loop(lambda state: state[0] < alpha.shape[1], body, state)[2]

    prompts = []
    for role in ("theta", "t"):
        every = [row[f"prompt_ids_{role}"] for row in rows]
        bucket = max(map(len, every))
        prompts.append(pad_prompts(every, range(count), bucket, count)[:2])
    tokens = np.asarray(decode(prompts))
    for line, row in zip(tokens, rows, strict=True):
        assert line[: len(row["tokens"])].tolist() == row["tokens"]
