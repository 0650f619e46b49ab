"""Block decoding of E2D2 against the recorded generations."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone import e2d2_bridge
from reoac_jax.backbone.e2d2_cache import decode_weights
from reoac_jax.backbone.e2d2_decode import DecodeSettings, generate
from tests.parity import e2d2_cases
from tests.parity.e2d2_cases import assert_close

CASES = e2d2_cases.cases("gen_*.npz")
each_file = pytest.mark.parametrize("file", CASES)


@functools.cache
def load(folder):
    model = e2d2_bridge.load_hf_directory(folder)
    return model.config, jax.jit(decode_weights, static_argnums=1)(model.params, model.config)


def settings_of(file, want) -> DecodeSettings:
    return DecodeSettings(
        align=bool(want.align),
        threshold=float(want.threshold),
        confidence="margin" if "margin" in file.stem else "probability",
        original_blocks=True,
    )


def run(file, **changes):
    """Recorded arrays and our generation with the recorded settings."""
    want = SimpleNamespace(**e2d2_cases.arrays(file))
    cfg, weights = load(file.parent)
    assert cfg.block_size == int(want.block_size)
    settings = settings_of(file, want)
    if changes:
        settings = DecodeSettings(**{**vars(settings), **changes})
    with jax.default_matmul_precision("highest"):
        got = generate(
            weights,
            cfg,
            jnp.asarray(want.prompt),
            jnp.full(len(want.prompt), want.prompt.shape[1]),
            max_new_tokens=int(want.max_new_tokens),
            settings=settings,
            record=True,
        )
    return want, got, cfg


def test_fixtures_are_found():
    assert CASES


@each_file
def test_tokens_trajectory_and_calls(file):
    want, got, cfg = run(file)
    prompt_len = want.prompt.shape[1]
    np.testing.assert_array_equal(got.tokens, want.output[:, prompt_len:])
    calls = int(got.decoder_calls)
    np.testing.assert_array_equal(got.trace.tokens[:calls, 0], want.step_tokens)
    assert_close(got.trace.logits[:calls, 0], want.step_logits)
    steps = np.asarray(got.steps)[: np.count_nonzero(got.steps)]
    recorded = bytes(want.calls.tolist()).decode()
    assert "E" + "".join("D" * n + "E" for n in steps) == recorded
    assert int(got.encoder_calls) == recorded.count("E")


@pytest.mark.parametrize("file", e2d2_cases.cases("gen_align*.npz"))
def test_no_mask_is_left_and_no_call_wasted(file):
    """Without the original's slips: same tokens where it finished, the rest filled in."""
    want, got, cfg = run(file, original_blocks=False)
    recorded = want.output[:, want.prompt.shape[1] :]
    finished = recorded != cfg.mask_id
    assert not np.any(np.asarray(got.tokens) == cfg.mask_id)
    np.testing.assert_array_equal(np.asarray(got.tokens)[finished], recorded[finished])
    assert int(got.encoder_calls) == np.count_nonzero(got.steps)
