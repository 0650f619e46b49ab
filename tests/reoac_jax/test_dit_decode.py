"""Rules of parallel decoding, and block decoding with and without caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from reoac_jax.backbone import dit
from reoac_jax.backbone.denoising import DecodeSettings, keep_surest
from reoac_jax.backbone.dit_decode import BlockSettings, decode_blocks
from reoac_jax.unmasking import unmask
from tests.reoac_jax.test_dit_backbone import lively, tiny_dit
from tests.reoac_jax.toy_setting import SPECIAL, toy_canvas

GEN, ROWS = 8, [0, 3, 5]


# ------------------------------------------------------------------------------------------- rules
def plain_unmask(confidence, candidates, at_least, threshold, factor):
    """The rules by their definition, row by row."""
    chosen = np.zeros_like(candidates)
    for row in range(len(confidence)):
        order = sorted(np.flatnonzero(candidates[row]), key=lambda j: (-confidence[row, j], j))
        count = at_least
        if factor is not None:
            for n in range(1, len(order) + 1):
                if (n + 1) * (1 - confidence[row, order[n - 1]]) < factor:
                    count = max(count, n)
        for place, j in enumerate(order):
            above = threshold is not None and confidence[row, j] >= threshold
            chosen[row, j] = place < count or above
    return chosen


@pytest.mark.parametrize("threshold", [None, 0.0, 0.8, 1.0])
@pytest.mark.parametrize("factor", [None, 0.3, 1.0, 3.0])
def test_rules_are_their_definitions(threshold, factor):
    rng = np.random.default_rng(0)
    confidence = rng.beta(4, 1, (6, 9)).astype(np.float32)
    candidates = rng.random((6, 9)) < 0.7
    for at_least in (0, 1, 4):
        ours = unmask(
            jnp.asarray(confidence),
            jnp.asarray(candidates),
            at_least,
            threshold=threshold,
            factor=factor,
        )
        theirs = plain_unmask(confidence, candidates, at_least, threshold, factor)
        np.testing.assert_array_equal(ours, theirs)


def test_factor_one_only_writes_what_sequential_decoding_would():
    # (n + 1)(1 - c_(n)) < 1: with n = 1 the best position needs more than one half.
    confidence = jnp.asarray([[0.55, 0.70, 0.76], [0.45, 0.3, 0.2]])
    chosen = unmask(confidence, jnp.ones((2, 3), bool), 0, factor=1.0)
    # n = 1: 2 * 0.24 < 1; n = 2: 3 * 0.30 < 1; n = 3: 4 * 0.45 >= 1.
    np.testing.assert_array_equal(chosen, [[False, True, True], [False] * 3])


def test_blocks_of_e2d2_know_the_factor_rule():
    probability = jnp.asarray([[0.95, 0.70, 0.76, 0.2]])
    masked = jnp.asarray([[True, True, False, True]])
    share = jnp.int32(2)  # the schedule alone would write one position
    plain = keep_surest(probability, probability, masked, share, DecodeSettings())
    np.testing.assert_array_equal(plain & masked, [[True, False, False, False]])
    # n = 2: 3 * 0.30 < 1.
    ruled = keep_surest(probability, probability, masked, share, DecodeSettings(factor=1.0))
    np.testing.assert_array_equal(ruled & masked, [[True, True, False, False]])


# ----------------------------------------------------------------------------------------- decoding
@pytest.fixture(scope="module", params=["mdlm", "sedd"])
def network(request):
    cfg = tiny_dit(request.param)
    params = lively(dit.init_params(jax.random.key(0), cfg))
    # Never the end token, so that nothing stops early by chance.
    bias = params["final"]["linear"]["bias"].at[SPECIAL.eos_id].set(-50.0)
    params["final"]["linear"]["bias"] = bias
    return cfg, params


def decode(network, rows=ROWS, padding=SPECIAL.pad_id, given=None, **settings):
    cfg, params = network
    canvas = toy_canvas(rows, padding=padding, gen_len=GEN)
    if given is not None:
        canvas = canvas.with_gen(given)
    chosen = BlockSettings(**{"block_size": 4, **settings})
    return jax.device_get(_decode(params, cfg, canvas, chosen))


_decode = functools.partial(jax.jit, static_argnums=(1, 3))(decode_blocks)


def reference(network, settings):
    """Uncached decoding with a Python loop over steps."""
    cfg, params = network
    canvas = toy_canvas(ROWS, gen_len=GEN)
    ids = np.array(canvas.gen_ids())
    steps = []
    score = jax.jit(
        lambda c, t: (
            dit.score(
                params, cfg, c.tokens, attention_mask=c.attention_mask, t=t, positions=c.gen_index
            ).log_probs
        )
    )
    for start in range(0, GEN, settings.block_size):
        here = slice(start, start + settings.block_size)
        for step in range(settings.block_size):
            masked = ids[:, here] == cfg.mask_id
            if not masked.any():
                break
            share = jnp.mean(ids == cfg.mask_id, axis=1)
            probs = np.exp(score(canvas.with_gen(jnp.asarray(ids)), share))[:, here]
            chosen = plain_unmask(probs.max(-1), masked, 1, settings.threshold, settings.factor)
            ids[:, here] = np.where(chosen, probs.argmax(-1), ids[:, here])
            steps.append(step)
    return ids, len(steps)


@pytest.mark.parametrize("rule", [{}, {"threshold": 0.25}, {"factor": 2.6}])
def test_uncached_decoding_is_the_plain_loop(network, rule):
    done = decode(network, **rule)
    ids, passes = reference(network, BlockSettings(4, **rule))
    np.testing.assert_array_equal(done.gen_ids, ids)
    assert done.full_passes == passes == done.steps.sum() and done.cached_passes == 0
    if rule:
        assert passes < GEN


@pytest.mark.parametrize(
    "cache",
    ["dual", *(pytest.param(c, marks=pytest.mark.slow) for c in ("none", "prefix"))],
)
def test_threshold_one_writes_one_token_per_step(network, cache):
    done = decode(network, cache=cache, threshold=1.0)
    assert done.steps.tolist() == [4, 4]
    assert done.full_passes + done.cached_passes == GEN
    assert done.full_passes == (GEN if cache == "none" else 2)
    assert not np.any(done.gen_ids == network[0].mask_id)
    # The default without a rule is the same.
    np.testing.assert_array_equal(done.gen_ids, decode(network, cache=cache).gen_ids)


@pytest.mark.parametrize("cache", [pytest.param("prefix", marks=pytest.mark.slow), "dual"])
def test_caches_are_exact_where_blocks_take_one_step(network, cache):
    cases = [{"threshold": 0.0}, {"block_size": 1}]
    # Every block of the prefix cache is compiled on its own: only the short case.
    for settings in cases[: 1 if cache == "prefix" else 2]:
        cached, plain = decode(network, cache=cache, **settings), decode(network, **settings)
        np.testing.assert_array_equal(cached.gen_ids, plain.gen_ids)
        assert cached.cached_passes == 0 and cached.full_passes == plain.full_passes


@pytest.mark.parametrize("cache", ["prefix", pytest.param("dual", marks=pytest.mark.slow)])
def test_cached_passes_are_exact_while_nothing_outside_changed(network, cache):
    """A cached pass over unchanged tokens gives the full pass's states."""
    cfg, params = network
    canvas = toy_canvas(ROWS, gen_len=GEN)
    mods = dit.modulation(params, cfg, cfg.schedule.sigma(jnp.full(3, 0.5)))
    column = jnp.broadcast_to(jnp.arange(canvas.tokens.shape[1]), canvas.tokens.shape)
    whole = dit.run_blocks(
        params,
        cfg,
        canvas.tokens,
        mods,
        positions=column,
        mask=canvas.attention_mask[:, None],
        collect_kv=True,
    )
    span = 4 if cache == "dual" else GEN - 4
    first = canvas.prompt_len + (2 if cache == "dual" else 4)
    at = first[:, None] + jnp.arange(span)
    inside = (column >= first[:, None]) & (column < first[:, None] + span)
    kv = jax.vmap(lambda k, v: (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)))(*whole.kv)
    part = dit.run_blocks(
        params,
        cfg,
        jnp.take_along_axis(canvas.tokens, at, axis=1),
        mods,
        positions=at,
        mask=None,
        context=(*kv, (canvas.attention_mask & ~inside)[:, None]),
    )
    wanted = jnp.take_along_axis(whole.hidden, at[..., None], axis=1)
    np.testing.assert_allclose(part.hidden, wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_rows_do_not_depend_on_padding_or_each_other(network, cache):
    whole = decode(network, cache=cache)
    part = decode(network, rows=[5, 0], padding=7, cache=cache)
    np.testing.assert_array_equal(part.gen_ids, whole.gen_ids[[2, 0]])


def test_given_tokens_stay(network):
    given = np.full((3, GEN), SPECIAL.mask_id, np.int32)
    given[:, :4] = 3
    given[1, 6] = 2
    done = decode(network, given=jnp.asarray(given), cache="dual")
    assert np.all(done.gen_ids[:, :4] == 3) and done.gen_ids[1, 6] == 2
    assert done.steps.tolist() == [0, 4]


def test_rows_end_with_the_end_token(network):
    cfg, params = network
    bias = params["final"]["linear"]["bias"].at[SPECIAL.eos_id].set(500.0)
    ending = {
        **params,
        "final": {**params["final"], "linear": {**params["final"]["linear"], "bias": bias}},
    }
    done = decode((cfg, ending), stop_at_eos=True)
    assert np.all(done.gen_ids[:, :4] == SPECIAL.eos_id)
    assert np.all(done.gen_ids[:, 4:] == cfg.pad_id) and done.steps.tolist() == [4, 0]


def test_settings_are_checked(network):
    with pytest.raises(UserError, match="'double'"):
        BlockSettings(4, cache="double")
    with pytest.raises(UserError, match="block_size"):
        BlockSettings(0)
    with pytest.raises(UserError, match="does not divide"):
        decode(network, block_size=3)
