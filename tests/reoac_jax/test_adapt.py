"""A language model becomes an E2D2: same layers, one more token; saved, loaded and trained."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.lm import decoder
from common.lm.weights import Model
from reoac_jax.adapt import from_decoder
from reoac_jax.backbone import e2d2
from reoac_jax.backbone.base import e2d2_backbone
from reoac_jax.backbone.e2d2_bridge import load_hf_directory, save_hf_directory
from reoac_jax.backbone.e2d2_cache import decode_weights
from reoac_jax.backbone.e2d2_decode import DecodeSettings, generate
from reoac_jax.masked_diffusion import blockwise_canvas_loss
from reoac_jax.pretrain import canvas_of
from tests.common.lm_models import CONFIGS, random_model

FAMILIES = tuple(CONFIGS)


class _Tokenizer:
    """As many ids as the models have rows, less one row of padding."""

    pad_id, bos_id, eos_id = 0, 1, 2

    def __len__(self) -> int:
        return 36


def adapted(name: str, **options: Any) -> tuple[Model, e2d2.E2D2Config, Any]:
    model = random_model(name)
    values: dict[str, Any] = {"decoder_layers": 1, "block_size": 4, "length": 16}
    network, params = from_decoder(model, _Tokenizer(), **(values | options))  # type: ignore[arg-type]
    return model, network, params


@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_is_the_language_model(name: str) -> None:
    """Read causally, it computes the model's own hidden states; the head its logits."""
    model, network, params = adapted(name)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 36, (2, 9)), jnp.int32)
    wanted = decoder.forward(model.params, model.cfg, ids).hidden
    causal = jnp.broadcast_to(jnp.tri(9, dtype=bool), (2, 9, 9))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    found, _ = e2d2.encode(params, network, ids, causal, positions)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    logits = e2d2.head(params, network, found)
    expected = decoder.head_logits(model.params, model.cfg, wanted)
    np.testing.assert_allclose(logits[..., :-1], expected, atol=1e-4)
    assert network.mask_id == logits.shape[-1] - 1 == model.cfg.vocab_size
    # The mask's row is the mean of the others, so its logit is the mean of theirs.
    np.testing.assert_allclose(logits[..., -1], expected.mean(-1), atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_files_keep_every_switch(name: str, tmp_path: Path) -> None:
    _, network, params = adapted(name)
    save_hf_directory(tmp_path, network, params)
    found = load_hf_directory(tmp_path)
    assert found.config == dataclasses.replace(network, prompt_attention="bidirectional")
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_cached_decoding_computes_the_same(name: str) -> None:
    """Greedy block decoding from caches, against passes over the whole sequence."""
    _, network, params = adapted(name, decoder_layers=2)
    prompt = np.random.default_rng(1).integers(3, 36, (1, 8)).astype(np.int32)
    settings = DecodeSettings(stop_at_eos=False)
    weights = decode_weights(params, network)
    found = np.asarray(
        generate(
            weights,
            network,
            jnp.asarray(prompt),
            jnp.asarray([8]),
            max_new_tokens=8,
            settings=settings,
        ).tokens
    )[0]
    arrays = jax.device_put(params)
    score = jax.jit(functools.partial(e2d2.score, arrays, network, score_mode="blockwise"))
    tokens = np.concatenate([prompt[0], np.full(8, network.mask_id, np.int32)])
    context = np.arange(16) < 8
    for start in (8, 12):
        for _ in range(4):
            out = score(
                jnp.asarray(tokens)[None],
                attention_mask=jnp.ones((1, 16), bool),
                context_mask=jnp.asarray(context)[None],
            )
            probs = np.exp(np.asarray(out.log_probs[0, start : start + 4]))
            sure = np.where(tokens[start : start + 4] == network.mask_id, probs.max(-1), -1.0)
            tokens[start + sure.argmax()] = probs[sure.argmax()].argmax()
    np.testing.assert_array_equal(found, tokens[8:])


def test_blockwise_loss_reads_clean_blocks_before_and_noisy_ones_within() -> None:
    """The loss falls under gradient steps, and no later block changes what an earlier one sees."""
    _, network, params = adapted("llama", length=20)
    backbone = e2d2_backbone(network)
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.integers(3, 36, (4, 8)), jnp.int32)
    tokens = jnp.asarray(rng.integers(3, 36, (4, 16)), jnp.int32)
    canvas = canvas_of(tokens, jnp.full(4, 8, jnp.int32), 8)

    @jax.jit
    def step(p: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        (loss, _), grads = jax.value_and_grad(
            lambda q: blockwise_canvas_loss(network, q, backbone, canvas, target, key, 4),
            has_aux=True,
        )(p)
        return jax.tree.map(lambda w, g: w - 0.05 * g, p, grads), loss

    p, losses = params, []
    for i in range(30):
        p, loss = step(p, jax.random.fold_in(jax.random.key(0), i % 3))
        losses.append(float(loss))
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])

    clean = canvas.with_gen(target).tokens
    changed = clean.at[:, 12:].set(3)
    noisy = canvas.with_gen(jnp.full_like(target, network.mask_id)).tokens

    def first_block(source: jax.Array) -> jax.Array:
        hidden, _ = e2d2.blockwise_hidden(
            params, network, source, noisy, canvas.attention_mask, canvas.context_mask
        )
        return hidden[:, 8:12]

    np.testing.assert_allclose(first_block(clean), first_block(changed), atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="pretrain.decoder_layers=3: the language model has 2"):
        adapted("llama", decoder_layers=3)
    with pytest.raises(UserError, match="36 ids, the language model 20 rows"):
        model = random_model(dataclasses.replace(CONFIGS["llama"], vocab_size=20))
        from_decoder(model, _Tokenizer(), decoder_layers=1, block_size=4, length=8)  # type: ignore[arg-type]
