"""Training loss of the masked diffusion model: noise the canvas, predict the tokens masked.

Unweighted variant of the E2D2 paper: cross-entropy at masked positions, averaged over them. The
prompt is never noised. `single_block` noises the whole canvas with one t per row; the blockwise
geometry draws one t per block. SEDD minimises its score entropy at the masked positions.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax.backbone import e2d2, score_entropy
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.backbone.dit import DiTConfig
from reoac_jax.backbone.noise import TIME_EPS as MIN_T

CanvasLoss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def stratified_t(key: jax.Array, n: int, row: jax.Array) -> jax.Array:
    """[len(row)] float32 noise levels: one shared uniform, one stratum per global row of n.

    Args:
      key: typed key of this step, the same on every device.
      n: global batch size.
      row: [B] int32 global row indices of the rows at hand.
    """
    offset_key, order_key = jax.random.split(key)
    stratum = jax.random.permutation(order_key, n)[row]
    t = (jax.random.uniform(offset_key) + stratum / n) % 1.0
    return t * (1.0 - MIN_T) + MIN_T


def noise_canvas(
    key: jax.Array, t: jax.Array, target: jax.Array, mask_id: int
) -> tuple[jax.Array, jax.Array]:
    """Mask each token of target [B, G] with probability t [B] or [B, G]; at least one per row.

    Returns:
      noised ids [B, G] int32 and the bool [B, G] mask of what was hidden.
    """
    draw = jax.random.uniform(key, target.shape)
    level = t[:, None] if t.ndim == 1 else t
    hidden = draw < level
    # A row without a masked token would teach nothing: hide the position nearest to being hidden.
    nearest = jax.nn.one_hot(jnp.argmin(draw - level, axis=1), target.shape[1], dtype=bool)
    hidden |= nearest & ~jnp.any(hidden, axis=1, keepdims=True)
    return jnp.where(hidden, mask_id, target), hidden


def canvas_loss(
    params: Params,
    backbone: Backbone,
    canvas: Canvas,
    target: jax.Array,
    key: jax.Array,
    n: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Masked cross-entropy of a single-block backbone.

    Args:
      canvas: batch of prompts; its canvas content is ignored.
      target: [B, G] int32 answer tokens, eos-filled.
      key: typed key of this step.
      n: global batch size (for stratified noise levels).

    Returns:
      (loss scalar, {"pretrain/accuracy", "pretrain/masked_share"}).
    """
    t_key, noise_key = jax.random.split(key)
    t = stratified_t(t_key, n, canvas.row_id.astype(jnp.int32) % n)
    noised, hidden = noise_canvas(noise_key, t, target, backbone.mask_id)
    context = backbone.begin(params, canvas)
    scores = backbone.score(params, context, canvas, noised, t)
    return _masked_cross_entropy(backbone.logits(params, scores.hidden), target, hidden)


def blockwise_canvas_loss(
    network: e2d2.E2D2Config,
    params: Params,
    backbone: Backbone,
    canvas: Canvas,
    target: jax.Array,
    key: jax.Array,
    n: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Masked cross-entropy of a blockwise E2D2: the encoder reads the clean answer, the decoder
    denoises each block given the clean blocks before it; one noise level per block.

    Arguments and metrics as of `canvas_loss`.
    """
    t_key, noise_key = jax.random.split(key)
    clean = canvas.with_gen(target)
    row = canvas.row_id.astype(jnp.int32) % n
    t = blockwise_t(t_key, n, row, clean.tokens.shape[1], network.block_size)  # [B, L]
    level = jnp.take_along_axis(t, canvas.gen_index, axis=1)
    noised, hidden = noise_canvas(noise_key, level, target, backbone.mask_id)
    states, _ = e2d2.blockwise_hidden(
        params,
        network,
        clean.tokens,
        canvas.with_gen(noised).tokens,
        canvas.attention_mask,
        canvas.context_mask,
    )
    states = e2d2.take_positions(states, canvas.gen_index)
    return _masked_cross_entropy(backbone.logits(params, states), target, hidden)


def _masked_cross_entropy(
    logits: jax.Array, target: jax.Array, hidden: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of target [B, G] at the hidden positions of logits [B, G, V]."""
    log_norm = jax.nn.logsumexp(logits, axis=-1)
    gold = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    weight = hidden.astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    loss = jnp.sum((log_norm - gold) * weight) / count
    accuracy = jnp.sum((gold >= logits.max(-1)) * weight) / count
    return loss, {"pretrain/accuracy": accuracy, "pretrain/masked_share": weight.mean()}


def score_entropy_loss(
    network: DiTConfig,
    params: Params,
    backbone: Backbone,
    canvas: Canvas,
    target: jax.Array,
    key: jax.Array,
    n: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Likelihood bound of SEDD per canvas token; arguments and metrics as of `canvas_loss`."""
    t_key, noise_key = jax.random.split(key)
    t = stratified_t(t_key, n, canvas.row_id.astype(jnp.int32) % n)
    sigma, rate = network.schedule.sigma(t), network.schedule.sigma_prime(t)
    hidden = jax.random.uniform(noise_key, target.shape) < -jnp.expm1(-sigma)[:, None]
    noised = jnp.where(hidden, network.mask_id, target)
    context = backbone.begin(params, canvas)
    output = backbone.head(params, backbone.score(params, context, canvas, noised, t).hidden)
    scores = score_entropy.log_score(output, noised, sigma, network.scale_by_sigma)
    entropy = score_entropy.score_entropy(scores, noised, target, sigma, network.graph)
    loss = jnp.mean(entropy * rate[:, None])
    gold = jnp.take_along_axis(output, target[..., None], axis=-1)[..., 0]
    best = jnp.where(jnp.arange(network.vocab_size) == network.mask_id, -jnp.inf, output).max(-1)
    weight = hidden.astype(jnp.float32)
    accuracy = jnp.sum((gold >= best) * weight) / jnp.maximum(weight.sum(), 1.0)
    return loss, {"pretrain/accuracy": accuracy, "pretrain/masked_share": weight.mean()}


def loss_of(network: e2d2.E2D2Config | DiTConfig) -> CanvasLoss:
    """The training loss of a network, called like `canvas_loss`."""
    if isinstance(network, DiTConfig) and network.parameterization == "sedd":
        return functools.partial(score_entropy_loss, network)
    if isinstance(network, e2d2.E2D2Config) and network.score_mode != "single_block":
        return functools.partial(blockwise_canvas_loss, network)
    return canvas_loss


def blockwise_t(key: jax.Array, n: int, row: jax.Array, length: int, block_size: int) -> jax.Array:
    """[B, L] float32: one stratified noise level per block of each row."""
    num_blocks = -(-length // block_size)
    keys = jax.random.split(key, num_blocks)
    per_block = jax.vmap(lambda k: stratified_t(k, n, row), out_axes=1)(keys)  # [B, L/S]
    return jnp.repeat(per_block, block_size, axis=1)[:, :length]


def blockwise_loss(
    params: Params,
    cfg: e2d2.E2D2Config,
    tokens: jax.Array,
    attention_mask: jax.Array,
    context_mask: jax.Array,
    noised: jax.Array,
) -> jax.Array:
    """E2D2 training loss in the blockwise geometry: mean over rows of sum(CE) / eligible tokens.

    Args:
      tokens, noised: [B, L] int32 clean and noised ids.
      attention_mask, context_mask: bool [B, L].
    """
    hidden, _ = e2d2.blockwise_hidden(params, cfg, tokens, noised, attention_mask, context_mask)
    log_probs = e2d2.subs_log_probs(e2d2.head(params, cfg, hidden), noised, cfg.mask_id)
    nll = -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    eligible = attention_mask if cfg.train_on_context else attention_mask & ~context_mask
    weight = eligible.astype(jnp.float32)
    per_row = jnp.sum(nll * weight, axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)
    return per_row.mean()
