"""Training-style forward passes of E2D2 against the recorded ones."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone import e2d2, noise
from reoac_jax.backbone.e2d2_bridge import load_hf_directory
from reoac_jax.masked_diffusion import blockwise_loss
from tests.parity import e2d2_cases
from tests.parity.e2d2_cases import assert_close


@functools.cache
def load(folder: Path) -> SimpleNamespace:
    model = load_hf_directory(folder)
    params = jax.tree.map(jnp.asarray, model.params)
    return SimpleNamespace(cfg=model.config, params=params)


# Inputs are arguments, so that the files of one folder share a compilation.
@functools.partial(jax.jit, static_argnums=1)
def forward(params, cfg, clean, noisy, real, prompt):
    with jax.default_matmul_precision("highest"):
        decoder, encoder = e2d2.blockwise_hidden(params, cfg, clean, noisy, real, prompt)
        logits = e2d2.head(params, cfg, decoder)
    return decoder, encoder, logits, e2d2.subs_log_probs(logits, noisy, cfg.mask_id)


@functools.partial(jax.jit, static_argnums=1)
def score(params, cfg, tokens, real, prompt, index, clean):
    return e2d2.score(
        params,
        cfg,
        tokens,
        attention_mask=real,
        context_mask=prompt,
        positions=index,
        score_mode="blockwise",
        clean_ids=clean,
    )


@functools.cache
def run(file: Path) -> SimpleNamespace:
    """Recorded arrays `want` and our pass `got` on the same inputs."""
    want = SimpleNamespace(**e2d2_cases.arrays(file))
    model = load(file.parent)
    cfg, real = model.cfg, want.attention_mask.astype(bool)
    clean, noisy = jnp.asarray(want.input_ids), jnp.asarray(want.xt)
    prompt = jnp.asarray(want.context_mask.astype(bool))

    names = ("decoder", "encoder", "logits", "log_probs")
    out = forward(model.params, cfg, clean, noisy, jnp.asarray(real), prompt)
    got = SimpleNamespace(**dict(zip(names, out, strict=True)))
    return SimpleNamespace(want=want, got=got, cfg=cfg, real=real, prompt=prompt)


CASES = e2d2_cases.cases("forward_*.npz")
forward_files = pytest.mark.parametrize("file", CASES)


def test_fixtures_are_found():
    assert CASES, f"no fixtures in {e2d2_cases.e2d2_root()}"


@forward_files
def test_attention_masks(file):
    case = run(file)
    real = jnp.asarray(case.real)
    encoder = e2d2.encoder_mask(real, case.prompt, case.cfg.block_size, case.cfg.encoder_causal)
    np.testing.assert_array_equal(encoder, case.want.encoder_attend)
    decoder = e2d2.decoder_mask(real, case.cfg.block_size)
    np.testing.assert_array_equal(decoder, case.want.decoder_attend)


@forward_files
def test_hidden_states(file):
    case = run(file)
    assert_close(case.got.encoder, case.want.encoder_last_hidden, case.real)
    assert_close(case.got.decoder, case.want.decoder_hidden, case.real)


@forward_files
def test_logits_and_log_probs(file):
    case = run(file)
    assert_close(case.got.logits, case.want.logits, case.real)
    assert_close(case.got.log_probs, case.want.log_probs, case.real)


@forward_files
def test_scoring_contract(file):
    """`score` on the noisy ids with gathered positions gives the recorded rows."""
    case = run(file)
    index = np.argsort(~case.real, axis=1, kind="stable")[:, :3].copy()  # three real positions

    out = score(
        load(file.parent).params,
        case.cfg,
        jnp.asarray(case.want.xt),
        jnp.asarray(case.real),
        case.prompt,
        jnp.asarray(index),
        jnp.asarray(case.want.input_ids),
    )
    rows = np.arange(len(index))[:, None]
    where = case.real[rows, index]
    for ours, theirs in (
        (out.logits, case.want.logits),
        (out.log_probs, case.want.log_probs),
        (out.hidden, case.want.decoder_hidden),
    ):
        assert_close(ours, theirs[rows, index], where)


@pytest.mark.parametrize(
    "file", [case for case in CASES if "eval_loss" in e2d2_cases.arrays(case.values[0])]
)
def test_losses(file):
    case = run(file)
    want = case.want
    schedule = noise.make_schedule(case.cfg.noise)
    t = jnp.asarray(want.t)
    assert_close(schedule.alpha(t), want.alpha_t)
    assert_close(schedule.alpha_prime(t), want.alpha_t_prime)
    true = np.take_along_axis(np.asarray(case.got.log_probs), want.input_ids[..., None], 2)[..., 0]
    weight = jnp.asarray(want.tokens_mask, jnp.float32)
    nll = noise.likelihood_bound(jnp.asarray(true), schedule, t)
    assert_close(nll * weight, want.eval_nlls)
    assert_close(noise.mean_over_rows(nll, weight), want.eval_loss)
    loss = jax.jit(blockwise_loss, static_argnums=1)(
        load(file.parent).params,
        case.cfg,
        jnp.asarray(want.input_ids),
        jnp.asarray(case.real),
        case.prompt,
        jnp.asarray(want.xt),
    )
    assert_close(loss, want.train_loss)
