"""Two backbones without a transformer: closed-form `table` (recorded traces) and `simple`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax.backbone.base import Backbone, Canvas, Scores, masked_mean
from reoac_jax.types import SpecialIds

HiddenFn = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


def table_hidden(
    params: Params, tokens: jax.Array, attention_mask: jax.Array, t: jax.Array
) -> jax.Array:
    """h_l = tanh(E[x_l] + P[l] + mean_{l' <= n} E[x_l'] + t u), contextual states of `table`.

    Args:
        params: {"embed" [V, D], "position" [N, D], "time" [D], "kernel" [D, V], "bias" [V]}.
        tokens: [B, L] i32, L <= N.
        attention_mask: [B, L] bool, the n true tokens.
        t: [B] f32 noise level.

    Returns:
        [B, L, D] f32.
    """
    embedded = params["embed"][tokens]
    context = masked_mean(embedded, attention_mask)[:, None]
    place = params["position"][: tokens.shape[1]]
    return jnp.tanh(embedded + place + context + t[:, None, None] * params["time"])


def simple_hidden(
    params: Params, tokens: jax.Array, attention_mask: jax.Array, t: jax.Array
) -> jax.Array:
    """E[x_l]: every token by itself; arguments as for `table_hidden`; [B, L, D] f32."""
    del attention_mask, t
    return params["embed"][tokens]


def table_backbone(
    vocab_size: int, hidden_size: int, special: SpecialIds, max_length: int
) -> Backbone:
    """The closed-form test backbone; its plain logits may pick the mask id.

    Args:
        vocab_size: V.
        hidden_size: D.
        special: ids with a role.
        max_length: longest sequence N.

    Returns:
        The backbone.
    """

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 4)
        scale = hidden_size**-0.5
        return {
            "embed": jax.random.normal(keys[0], (vocab_size, hidden_size)) * scale,
            "position": jax.random.normal(keys[1], (max_length, hidden_size)) * scale,
            "time": jax.random.normal(keys[2], (hidden_size,)) * scale,
            "kernel": jax.random.normal(keys[3], (hidden_size, vocab_size)),
            "bias": jnp.zeros(vocab_size),
        }

    sizes = (vocab_size, hidden_size, max_length)
    return _backbone("table", init, table_hidden, sizes, special, suppress_mask=False)


def simple_backbone(
    vocab_size: int, hidden_size: int, special: SpecialIds, max_length: int
) -> Backbone:
    """Embedding and linear head, for smoke tests; arguments as for `table_backbone`."""

    def init(key: jax.Array) -> Params:
        first, second = jax.random.split(key)
        scale = hidden_size**-0.5
        return {
            "embed": jax.random.normal(first, (vocab_size, hidden_size)) * scale,
            "kernel": jax.random.normal(second, (hidden_size, vocab_size)) * scale,
            "bias": jnp.zeros(vocab_size),
        }

    sizes = (vocab_size, hidden_size, max_length)
    return _backbone("simple", init, simple_hidden, sizes, special, suppress_mask=True)


def _backbone(
    family: str,
    init: Callable[[jax.Array], Params],
    hidden_of: HiddenFn,
    sizes: tuple[int, int, int],
    special: SpecialIds,
    suppress_mask: bool,
) -> Backbone:
    def begin(params: Params, canvas: Canvas) -> Any:
        del params, canvas
        return ()

    def score(
        params: Params, context: Any, canvas: Canvas, gen_ids: jax.Array, t: jax.Array
    ) -> Scores:
        del context
        tokens, attention_mask = canvas.with_gen(gen_ids).tokens, canvas.attention_mask
        hidden = hidden_of(params, tokens, attention_mask, t)
        return Scores(
            jnp.take_along_axis(hidden, canvas.gen_index[..., None], axis=1),
            masked_mean(hidden, canvas.context_mask),
            masked_mean(hidden, attention_mask & ~canvas.context_mask),
        )

    def head(params: Params, hidden: jax.Array) -> jax.Array:
        flat = hidden.reshape(-1, hidden.shape[-1]) @ params["kernel"] + params["bias"]
        return flat.reshape(*hidden.shape[:-1], flat.shape[-1])

    vocab_size, hidden_size, max_length = sizes
    return Backbone(
        family=family,
        vocab_size=vocab_size,
        mask_id=special.mask_id,
        pad_id=special.pad_id,
        eos_id=special.eos_id,
        bos_id=special.bos_id,
        hidden_size=hidden_size,
        max_length=max_length,
        block_size=None,
        score_mode="toy",
        init=init,
        begin=begin,
        score=score,
        head=head,
        suppress_mask=suppress_mask,
    )
