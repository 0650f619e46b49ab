"""MDLM and SEDD behind the forward contract: invariants of scoring, and a few training steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from reoac_jax.backbone import dit, dit_loss, noise
from reoac_jax.backbone.dit_backbone import dit_backbone, with_tokenizer_ids
from reoac_jax.masked_diffusion import loss_of
from tests.reoac_jax.toy_setting import GEN, PROMPT, SPECIAL, VOCAB, toy_canvas

ROWS = [0, 3, 5]


def tiny_dit(family: str, score_mode: str = "bidirectional", **changes) -> dit.DiTConfig:
    """Two blocks of width 16; the mask must be the last id."""
    assert SPECIAL.mask_id == VOCAB - 1
    sedd = family == "sedd"
    cfg = dit.DiTConfig(
        vocab_size=VOCAB,
        mask_id=SPECIAL.mask_id,
        pad_id=SPECIAL.pad_id,
        bos_id=SPECIAL.bos_id,
        eos_id=SPECIAL.eos_id,
        hidden_size=16,
        cond_dim=8,
        num_blocks=2,
        num_heads=2,
        intermediate_size=32,
        length=PROMPT + GEN,
        time_conditioning=sedd,
        parameterization="sedd" if sedd else "subs",
        scale_by_sigma=sedd,
        dropout=0.0,
        score_mode=score_mode,
    )
    return dataclasses.replace(cfg, **changes)


def lively(params, seed=1, scale=0.3):
    """The parameters with noise: fresh ones have all modulations and the output at zero."""
    rng = np.random.default_rng(seed)

    def noisy(x):
        return jnp.asarray(np.asarray(x) + scale * rng.standard_normal(x.shape).astype(np.float32))

    return jax.tree.map(noisy, params)


_output = jax.jit(dit.network_output, static_argnums=1)
_score = jax.jit(dit.score, static_argnums=1)


@pytest.fixture(scope="module", params=["mdlm", "sedd"])
def network(request):
    cfg = tiny_dit(request.param)
    return cfg, lively(dit.init_params(jax.random.key(0), cfg))


def scorer(cfg):
    backbone = dit_backbone(cfg)

    @jax.jit
    def run(params, canvas, gen_ids, t):
        scores = backbone.score(params, backbone.begin(params, canvas), canvas, gen_ids, t)
        return scores, backbone.logits(params, scores.hidden)

    return run


def gen_ids_of(rows):
    ids = np.full((len(rows), GEN), SPECIAL.mask_id, np.int32)
    for index, row in enumerate(rows):
        ids[index, row % GEN] = 1 + row
    return jnp.asarray(ids)


def test_scores_are_those_of_the_network(network):
    cfg, params = network
    canvas, gen_ids, t = toy_canvas(ROWS), gen_ids_of(ROWS), jnp.asarray([0.2, 0.5, 0.9])
    scores, logits = scorer(cfg)(params, canvas, gen_ids, t)
    filled = canvas.with_gen(gen_ids)
    out = _score(
        params,
        cfg,
        filled.tokens,
        attention_mask=canvas.attention_mask,
        t=t,
        positions=canvas.gen_index,
    )
    masked = np.asarray(gen_ids == SPECIAL.mask_id)
    ours = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(ours[masked], out.log_probs[masked], atol=1e-4)
    np.testing.assert_allclose(scores.pooled_canvas, out.hidden.mean(axis=1), atol=1e-5)
    # At written positions the scores are raw: they may differ from the carried-over token.
    raw = jnp.where(jnp.arange(VOCAB) == SPECIAL.mask_id, -1e9, out.logits)
    np.testing.assert_allclose(logits[~masked], raw[~masked], atol=1e-4)


def test_padding_and_other_rows_do_not_matter(network):
    cfg, params = network
    run, t = scorer(cfg), jnp.asarray([0.2, 0.5, 0.9])
    whole = run(params, toy_canvas(ROWS), gen_ids_of(ROWS), t)
    padded = run(params, toy_canvas(ROWS, padding=5), gen_ids_of(ROWS), t)
    part = [2, 0, 2]
    rows = [ROWS[i] for i in part]
    others = run(params, toy_canvas(rows), gen_ids_of(rows), t[np.array(part)])
    for a, b, c in zip(*map(jax.tree.leaves, (whole, padded, others)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a[np.array(part)], c, atol=1e-5)


def test_every_position_sees_every_other(network):
    cfg, params = network
    run, t = scorer(cfg), jnp.full(1, 0.5)
    canvas = toy_canvas([2])
    ids = gen_ids_of([2])
    base = run(params, canvas, ids, t)[1]
    changed = run(params, canvas, ids.at[0, GEN - 1].set(3), t)[1]
    assert np.all(np.abs(base - changed).max(axis=-1) > 1e-6)


def test_noise_level_matters_only_with_time_conditioning(network):
    cfg, params = network
    run, canvas, ids = scorer(cfg), toy_canvas(ROWS), gen_ids_of(ROWS)
    early, late = (run(params, canvas, ids, jnp.full(3, t))[1] for t in (0.1, 0.9))
    assert (float(jnp.abs(early - late).max()) > 1e-3) == cfg.time_conditioning


def test_cached_prompt_is_exact_on_a_masked_canvas(network):
    cfg, params = network
    canvas, t = toy_canvas(ROWS), jnp.ones(3)
    blank = jnp.full((3, GEN), SPECIAL.mask_id, jnp.int32)
    cached = scorer(dataclasses.replace(cfg, score_mode="prompt_cached"))
    exact, kept = scorer(cfg)(params, canvas, blank, t), cached(params, canvas, blank, t)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    # With something written the prompt's states differ, so the scores do, a little.
    ids = gen_ids_of(ROWS)
    exact, kept = scorer(cfg)(params, canvas, ids, t)[1], cached(params, canvas, ids, t)[1]
    assert float(jnp.abs(exact - kept)[..., :-1].max()) > 1e-5


def test_blocks_start_as_the_identity(network):
    cfg, _ = network
    fresh = dit.init_params(jax.random.key(3), cfg)
    tokens = toy_canvas(ROWS).tokens
    mask = jnp.ones_like(tokens, bool)
    out = _score(fresh, cfg, tokens, attention_mask=mask, t=jnp.full(3, 0.5))
    np.testing.assert_allclose(out.hidden, fresh["embed"]["embedding"][tokens], atol=1e-6)
    assert float(jnp.abs(out.logits).max()) == 0.0


@pytest.mark.slow
def test_dropout_and_rematerialisation(network):
    cfg, params = network
    tokens = toy_canvas(ROWS).tokens
    sigma = jnp.full(3, 0.5)
    plain = _output(params, cfg, tokens, sigma)
    dropping = dataclasses.replace(cfg, dropout=0.5)
    np.testing.assert_array_equal(plain, _output(params, dropping, tokens, sigma))
    keys = jax.random.split(jax.random.key(0), 2)
    one, two = (_output(params, dropping, tokens, sigma, key=k) for k in keys)
    assert float(jnp.abs(one - two).max()) > 1e-3

    def loss(params, cfg):
        return jnp.sum(jnp.sin(dit.network_output(params, cfg, tokens, sigma)))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    grads = [grad(params, c) for c in (cfg, dataclasses.replace(cfg, remat=True))]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3)
    moved = float(jnp.abs(grads[0]["sigma"]["fc0"]["kernel"]).max()) > 0
    # Without time conditioning sigma is 0 everywhere; the map still shapes the modulations.
    assert moved


def test_refusals():
    with pytest.raises(UserError, match="uniform graph"):
        dit_backbone(tiny_dit("sedd", graph="uniform", mask_id=-1))
    nameless = tiny_dit("mdlm", eos_id=-1, pad_id=-1)
    with pytest.raises(UserError, match="eos"):
        dit_backbone(nameless)
    named = with_tokenizer_ids(nameless, 7, 8, 9)
    assert (named.eos_id, named.pad_id, named.bos_id) == (7, 9, SPECIAL.bos_id)
    with pytest.raises(ValueError, match="noise level"):
        cfg = tiny_dit("sedd")
        dit.network_output(
            dit.init_params(jax.random.key(0), cfg), cfg, jnp.zeros((1, 2), int), None
        )


# ---------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("family", ["mdlm", "sedd"])
def test_a_few_steps_lower_the_loss(family):
    cfg = tiny_dit(family)
    backbone, loss = dit_backbone(cfg), loss_of(cfg)
    canvas = toy_canvas(list(range(8)))
    # The answer repeats the prompt's first token: learnable through attention alone.
    target = jnp.broadcast_to(canvas.tokens[:, :1], (8, GEN))
    optimizer = optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        (value, _), grads = jax.value_and_grad(
            lambda p: loss(p, backbone, canvas, target, key, 8), has_aux=True
        )(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    params = dit.init_params(jax.random.key(0), cfg)
    keys = jax.random.split(jax.random.key(1), 150)
    run = jax.jit(lambda c: jax.lax.scan(step, c, keys))
    (params, _), values = run((params, optimizer.init(params)))
    first, last = float(values[:20].mean()), float(values[-20:].mean())
    assert last < 0.5 * first
    assert np.isfinite(values).all()


@pytest.mark.parametrize("family", ["mdlm", "sedd"])
def test_likelihood_bound_of_a_uniform_model(family):
    """An untrained network predicts nothing: MDLM's bound is log V per token whatever t is."""
    cfg = tiny_dit(family)
    params = dit.init_params(jax.random.key(0), cfg)
    ids = jax.random.randint(jax.random.key(2), (512, 6), 0, VOCAB - 1)
    everything, nothing = jnp.ones_like(ids, bool), jnp.zeros_like(ids, bool)
    uniform = jax.random.uniform(jax.random.key(3), (512,))
    bound = jax.jit(lambda t, k: dit_loss.bound_loss(params, cfg, ids, everything, nothing, t, k))
    spread = float(bound(noise.spread_times(uniform), jax.random.key(4)))
    independent = float(bound(noise.floor_times(uniform), jax.random.key(5)))
    assert spread == pytest.approx(np.log(VOCAB - 1), rel=0.15)
    assert independent == pytest.approx(spread, rel=0.25)


def test_context_is_neither_noised_nor_scored():
    cfg = tiny_dit("mdlm")
    params = lively(dit.init_params(jax.random.key(0), cfg))
    ids = jnp.ones((4, 6), jnp.int32)
    context = jnp.arange(6) < jnp.asarray([[6], [6], [6], [3]])
    everything = jnp.ones_like(ids, bool)
    t = jnp.full(4, 0.999)
    # `bound_loss` splits its key before it draws the noise.
    noisy = dit_loss.corrupt(cfg, jax.random.split(jax.random.key(0))[0], ids, t, context)
    assert np.all(np.asarray(noisy)[np.asarray(context)] == 1)
    assert np.all(np.asarray(noisy)[3, 3:] == cfg.mask_id)
    key = jax.random.key(0)
    one = jax.jit(dit_loss.bound_loss, static_argnums=1)(
        params, cfg, ids, everything, context, t, key
    )
    alone = jax.jit(dit_loss.token_bounds, static_argnums=1)(params, cfg, ids, noisy, t)
    assert float(one) == pytest.approx(float(alone[3, 3:].mean()), rel=1e-4)


def test_uniform_graph_replaces_tokens():
    cfg = tiny_dit("sedd", graph="uniform", mask_id=-1, scale_by_sigma=False)
    ids = jnp.zeros((64, 16), jnp.int32)
    keep = jnp.arange(16) < 4
    noisy = dit_loss.corrupt(
        cfg, jax.random.key(0), ids, jnp.full(64, 1.0), keep[None] & (ids == 0)
    )
    assert np.all(np.asarray(noisy)[:, :4] == 0)
    assert len(np.unique(noisy[:, 4:])) == VOCAB
