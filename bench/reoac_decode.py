"""Rows of `bench.reoac_rollout`: block decoding at a larger batch beside batch 1."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import Row, TraceCounter, rates, take_turns
from bench.reoac_scenes import Sizes, network
from common.lm import layers
from reoac_jax.backbone import e2d2
from reoac_jax.backbone.denoising import DecodeSettings
from reoac_jax.backbone.e2d2_cache import decode_weights
from reoac_jax.backbone.e2d2_decode import generate


def decoding_network(name: str, sizes: Sizes) -> e2d2.E2D2Config:
    """The random E2D2 of a row of block decoding: sizes, then the dtype unless it is float32.

    "e2d2-owt sizes" are those of the release.
    """
    _, prompt_width, gen_len, block_size = sizes.decode
    name, _, dtype = name.partition(", ")
    if name == "bundled sizes":
        sizes = dataclasses.replace(sizes, vocab=sizes.small_vocab, width=sizes.small_width)
    cfg = network(sizes, block_size, prompt_width + gen_len, "blockwise")
    cfg = dataclasses.replace(cfg, dtype=dtype or "float32")
    if name != "e2d2-owt sizes":
        return cfg
    return dataclasses.replace(
        cfg,
        hidden_size=768,
        intermediate_size=3072,
        num_encoder_layers=10,
        num_decoder_layers=2,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
    )


def decode_rows(sizes: Sizes, repeats: int) -> list[Row]:
    """Tokens per second of block decoding at batch 1 and at a larger one.

    At the bundled model's sizes a step of one row is mostly overhead; with a large vocabulary it is
    products, whose own gain from more rows is measured beside it.
    """
    batch, width, gen_len, block_size = sizes.decode
    rows = []
    for title in sizes.decoded:
        cfg = decoding_network(title, sizes)
        params = e2d2.init_params(jax.random.key(0), cfg)
        weights = jax.jit(decode_weights, static_argnums=1)(params, cfg)
        settings = DecodeSettings(stop_at_eos=False)
        prompt = np.random.default_rng(0).integers(0, cfg.pad_id, (batch, width)).astype(np.int32)
        counter = TraceCounter()

        def decode(weights: Any, ids: jax.Array, cfg: Any = cfg, settings: Any = settings) -> Any:
            lengths = jnp.full(ids.shape[0], width)
            return generate(
                weights, cfg, ids, lengths, max_new_tokens=gen_len, settings=settings
            ).tokens

        def products(weights: Any, x: jax.Array, calls: int = gen_len) -> Any:
            """Every matrix of a decoder pass, as many rows as it has tokens, once per pass."""
            parts = [m for layer in weights.decoder for m in layer if m is not None]
            matrices = [m for m in parts if m.ndim == 2]
            head = weights.embedding.T if weights.head is None else weights.head

            def one_pass(_: jax.Array, x: jax.Array) -> jax.Array:
                for m in (*matrices, head):
                    wide = jnp.tile(x, (1, -(-m.shape[0] // x.shape[1])))[:, : m.shape[0]]
                    # The sum is carried on, so that no product can be left out.
                    x = x + 1e-6 * jnp.mean(layers.matmul(wide, m))
                return x

            return jax.lax.fori_loop(0, calls, one_pass, x)

        run, bare = counter.jit(decode), counter.jit(products)
        things: dict[str, Callable[[], Any]] = {}
        for b in (1, batch):
            x = jnp.ones((b * block_size, cfg.hidden_size), cfg.activation_dtype)
            things[str(b)] = functools.partial(run, weights, jnp.asarray(prompt[:b]))
            things[f"products {b}"] = functools.partial(bare, weights, x)
        timings = take_turns(things, repeats, counter)
        name = f"decode tokens/s {title}, batch {batch} / 1"
        tokens = (str(batch), batch * gen_len)
        rows.append(rates(name, timings, ("1", gen_len), tokens, bar=4.0))
        base, other = ("products 1", block_size), (f"products {batch}", batch * block_size)
        rows.append(rates(f"decode, bare products {title}, {batch} / 1", timings, base, other))
    return rows
