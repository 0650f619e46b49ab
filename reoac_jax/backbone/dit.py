"""The diffusion transformer of MDLM (Sahoo et al., 2024) and SEDD (Lou et al., 2024).

A bidirectional transformer whose layer norms are modulated by the noise level (adaLN):

    c = silu(W2 silu(W0 s(sigma)))                    s: sines and cosines of sigma, 256 wide
    (shift1, scale1, gate1, shift2, scale2, gate2) = W_ada c, per block
    x <- x + gate1 * W_out Attn(LN1(x) (1 + scale1) + shift1)
    x <- x + gate2 * MLP(LN2(x) (1 + scale2) + shift2)
    out = W_lin (LN_f(x) (1 + scale_f) + shift_f)

MDLM reads `out` as logits of the clean token (SUBS), usually without time conditioning: then
sigma counts as 0 and every modulation is a constant. SEDD reads it as log-ratios of probabilities
(`reoac_jax.backbone.score_entropy`). Parameters:

    embed/embedding [V, D]          sigma/{fc0,fc2}/{kernel,bias}
    blocks/norm{1,2}/scale [n, D]   blocks/attn_qkv/kernel [n, D, 3, H, K]
    blocks/attn_out/kernel [n, H, K, D]                 blocks/mlp/{fc1,fc2}/{kernel,bias}
    blocks/ada/{kernel,bias}        final/norm/scale    final/{ada,linear}/{kernel,bias}
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.lm import layers
from common.lm.layers import KeyValue, Params
from reoac_jax.backbone.e2d2 import NEG_INF, subs_log_probs, take_positions
from reoac_jax.backbone.noise import Schedule, make_schedule
from reoac_jax.backbone.parameter_tree import declare
from reoac_jax.types import BackboneOutput

FREQUENCIES = 128  # of the noise level's embedding, which is twice as wide
MAX_PERIOD = 1e4
PARAMETERIZATIONS = ("subs", "sedd")
GRAPHS = ("absorb", "uniform")
SCORE_MODES = ("bidirectional", "prompt_cached")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Static description of a network; hashable, so it can be a static jit argument.

    Attributes:
      vocab_size: V, the mask included.
      mask_id: V - 1; -1 = none (uniform graph).
      length: longest sequence of training, in tokens.
      time_conditioning: the network reads sigma; False: it reads 0.
      parameterization: what the output means: "subs" | "sedd".
      graph: "absorb" (tokens become the mask) | "uniform" (they become any token).
      scale_by_sigma: sedd, absorb: the output leaves the factor 1 / (e^sigma - 1) out.
      pad_id, bos_id, eos_id: -1 = the files do not say; the tokenizer does.
      score_mode: "bidirectional", or "prompt_cached": an approximation whose prompt keys and
        values come from one pass over the masked canvas.
      remat: recompute each block in the backward pass.
    """

    vocab_size: int
    mask_id: int
    hidden_size: int
    cond_dim: int
    num_blocks: int
    num_heads: int
    intermediate_size: int
    length: int
    time_conditioning: bool = False
    parameterization: str = "subs"
    graph: str = "absorb"
    scale_by_sigma: bool = False
    noise: str = "loglinear"
    noise_eps: float = 1e-3
    sigma_min: float = 1e-4
    sigma_max: float = 20.0
    pad_id: int = -1
    bos_id: int = -1
    eos_id: int = -1
    dropout: float = 0.1
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    score_mode: str = "bidirectional"
    dtype: str = "float32"
    attn_impl: str = "auto"
    remat: bool = False

    @property
    def activation_dtype(self) -> Any:
        """The jnp dtype of activations."""
        return jnp.dtype(self.dtype)

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads

    @property
    def schedule(self) -> Schedule:
        """The noise schedule of training."""
        return make_schedule(
            self.noise, self.noise_eps, sigma_min=self.sigma_min, sigma_max=self.sigma_max
        )


class Modulation(NamedTuple):
    """What the noise level does to the network; leading axis B, or 1 = the same for every row.

    Attributes:
      blocks: [n, B, 6, D] shift, scale and gate of attention, then of the MLP.
      final: [B, 2, D] shift and scale in front of the output layer.
    """

    blocks: jax.Array
    final: jax.Array


# ------------------------------------------------------------------------------------ parameters
def parameter_shapes(cfg: DiTConfig) -> dict[str, Any]:
    """Nested {name: shape} of every parameter, in float32."""
    n, d, c = cfg.num_blocks, cfg.hidden_size, cfg.cond_dim
    inner, v = cfg.intermediate_size, cfg.vocab_size

    def linear(inputs: tuple[int, ...], outputs: tuple[int, ...], lead: int = 0) -> dict[str, Any]:
        return {"kernel": (*inputs, *outputs), "bias": (*inputs[:lead], *outputs)}

    return {
        "embed": {"embedding": (v, d)},
        "sigma": {"fc0": linear((2 * FREQUENCIES,), (c,)), "fc2": linear((c,), (c,))},
        "blocks": {
            "norm1": {"scale": (n, d)},
            "attn_qkv": {"kernel": (n, d, 3, cfg.num_heads, cfg.head_dim)},
            "attn_out": {"kernel": (n, cfg.num_heads, cfg.head_dim, d)},
            "norm2": {"scale": (n, d)},
            "mlp": {"fc1": linear((n, d), (inner,), 1), "fc2": linear((n, inner), (d,), 1)},
            "ada": linear((n, c), (6 * d,), 1),
        },
        "final": {
            "norm": {"scale": (d,)},
            "ada": linear((c,), (2 * d,)),
            "linear": linear((d,), (v,)),
        },
    }


def _initializer(path: str, shape: tuple[int, ...]) -> nn.initializers.Initializer:
    """Zeros for adaLN, output layer and biases, uniform(+-1/sqrt(fan)) for tables and matrices.

    With adaLN at zero every block starts as the identity.
    """
    if path.endswith("scale"):
        return nn.initializers.ones
    if path.endswith("bias") or "/ada/" in path or path.startswith("final/linear"):
        return nn.initializers.zeros
    if path == "embed/embedding":
        fan_in = shape[1]
    elif "attn_out" in path:
        fan_in = math.prod(shape[1:3])
    else:
        fan_in = shape[1] if path.startswith("blocks/") else shape[0]
    bound = fan_in**-0.5

    def uniform(key: jax.Array, size: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, size, dtype, -bound, bound)

    return uniform


class DiT(nn.Module):
    """The Linen face of the network: `init` makes the parameters, `apply` scores a batch."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, **kwargs: Any) -> BackboneOutput:
        """See `score`."""
        params = declare(parameter_shapes(self.cfg), _initializer)
        return score(params, self.cfg, tokens, **kwargs)


def init_params(key: jax.Array, cfg: DiTConfig) -> Params:
    """Fresh float32 parameters; jitted, so that no eager op runs per leaf."""

    def init(k: jax.Array) -> Any:
        tokens = jnp.zeros((1, 1), jnp.int32)
        ones = jnp.ones_like(tokens, bool)
        variables = DiT(cfg).init(k, tokens, attention_mask=ones, context_mask=~ones, t=jnp.ones(1))
        return variables["params"]

    return jax.jit(init)(key)


# --------------------------------------------------------------------------------------- network
def condition(params: Params, sigma: jax.Array) -> jax.Array:
    """c [B, C] float32 of noise levels sigma [B] float32 (0 where time conditioning is off)."""
    index = jnp.arange(FREQUENCIES, dtype=jnp.float32)
    frequency = jnp.exp(-math.log(MAX_PERIOD) * index / FREQUENCIES)
    angle = sigma.astype(jnp.float32)[:, None] * frequency
    waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)  # [B, 256]
    hidden = jax.nn.silu(layers.project(waves, params["sigma"]["fc0"]))
    # The network's blocks read silu of the embedding, once more than its own activation.
    return jax.nn.silu(layers.project(hidden, params["sigma"]["fc2"]))


def modulation(params: Params, cfg: DiTConfig, sigma: jax.Array | None) -> Modulation:
    """Every modulation of noise levels sigma [B]; None or no time conditioning: one row, sigma 0.

    Raises:
      ValueError: the network is time-conditioned and there is no sigma.
    """
    if not cfg.time_conditioning:
        sigma = jnp.zeros(1)
    if sigma is None:
        raise ValueError("a time-conditioned network needs the noise level")
    c = condition(params, sigma)
    ada, final = params["blocks"]["ada"], params["final"]["ada"]
    # One matmul for all blocks: [B, C] x [n, C, 6D].
    per_block = jnp.einsum("bc,nco->nbo", c, ada["kernel"]) + ada["bias"][:, None]
    blocks = per_block.reshape(*per_block.shape[:2], 6, cfg.hidden_size)
    last = layers.project(c, final).reshape(-1, 2, cfg.hidden_size)
    return Modulation(blocks.astype(cfg.activation_dtype), last.astype(cfg.activation_dtype))


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x [B, L, D] (1 + scale) + shift, with shift and scale [B | 1, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def _block(
    block: Params,
    cfg: DiTConfig,
    x: jax.Array,
    mods: jax.Array,
    rope: layers.Rope,
    contexts: tuple[layers.Context, ...],
    mask: jax.Array | None,
    key: jax.Array | None,
) -> tuple[jax.Array, KeyValue]:
    """One block on x [B, T, D]; see `run_blocks`."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (mods[:, i] for i in range(6))
    first, second = (None, None) if key is None else jax.random.split(key)
    a = _modulate(layers.layer_norm(x, block["norm1"]["scale"], cfg.norm_eps), shift1, scale1)
    qkv = layers.project(a, block["attn_qkv"])  # [B, T, 3, H, K]
    query, own = layers.apply_rope(qkv[:, :, 0], rope), layers.apply_rope(qkv[:, :, 1], rope)
    value = qkv[:, :, 2]
    if contexts:
        mine = layers.Context(*layers.cache_layout(own, value), mask)
        attended = layers.attend(query, *contexts, mine)
    else:
        attended = layers.attention(query, own, value, mask, cfg.attn_impl)
    out = layers.merge_heads(attended, block["attn_out"]["kernel"])
    x = x + gate1[:, None] * _dropout(out, cfg.dropout, first)
    a = _modulate(layers.layer_norm(x, block["norm2"]["scale"], cfg.norm_eps), shift2, scale2)
    inner = jax.nn.gelu(layers.project(a, block["mlp"]["fc1"]), approximate=True)
    out = layers.project(inner, block["mlp"]["fc2"])
    return x + gate2[:, None] * _dropout(out, cfg.dropout, second), (own, value)


class Pass(NamedTuple):
    """What `run_blocks` gives.

    Attributes:
      hidden: [B, T, D] residual stream behind the last block.
      kv: keys and values of every block, each [n, B, T, H, K], or None.
      states: [n, B, T, D] residual stream behind every block, or None.
    """

    hidden: jax.Array
    kv: KeyValue | None
    states: jax.Array | None


def run_blocks(
    params: Params,
    cfg: DiTConfig,
    ids: jax.Array,
    mods: Modulation,
    *,
    positions: jax.Array,
    mask: jax.Array | None,
    context: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    key: jax.Array | None = None,
    collect_kv: bool = False,
    collect_states: bool = False,
) -> Pass:
    """Embedding and all blocks.

    Args:
      ids: [B, T] int32.
      mods: from `modulation`.
      positions: [B, T] int32 rotary positions.
      mask: bool, broadcastable to [B, T, T], True = may attend; None = everything.
      context: further keys [n, B, H, K, S] and values [n, B, H, S, K] in cache layout, and their
        mask, bool, broadcastable to [B, T, S].
      key: RNG key of dropout; None = off.
      collect_kv, collect_states: what else to return.
    """
    x = params["embed"]["embedding"][ids].astype(cfg.activation_dtype)
    rope = layers.rope_angles(positions, cfg.head_dim, cfg.rope_theta)
    keys = None if key is None else jax.random.split(key, cfg.num_blocks)
    blocks = {name: value for name, value in params["blocks"].items() if name != "ada"}
    cached = None if context is None else context[:2]

    def step(carry: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        block, mods_i, cached_i, key_i = inputs
        contexts: tuple[layers.Context, ...] = ()
        if context is not None:
            contexts = (layers.Context(cached_i[0], cached_i[1], context[2]),)
        y, kv = _block(block, cfg, carry, mods_i, rope, contexts, mask, key_i)
        return y, (kv if collect_kv else None, y if collect_states else None)

    body = jax.checkpoint(step) if cfg.remat else step
    unroll = cfg.num_blocks <= layers.UNROLL_LAYERS
    x, (kv, states) = jax.lax.scan(body, x, (blocks, mods.blocks, cached, keys), unroll=unroll)
    return Pass(x, kv, states)


def final_states(params: Params, cfg: DiTConfig, hidden: jax.Array, mods: Modulation) -> jax.Array:
    """Input of the output layer, [B, T, D], of the residual stream [B, T, D]."""
    normed = layers.layer_norm(hidden, params["final"]["norm"]["scale"], cfg.norm_eps)
    return _modulate(normed, mods.final[:, 0], mods.final[:, 1])


def head(params: Params, states: jax.Array) -> jax.Array:
    """Raw float32 output [..., V] of `final_states` [..., D]."""
    return layers.project(states, params["final"]["linear"], round_to=jnp.float32)


def network_output(
    params: Params,
    cfg: DiTConfig,
    ids: jax.Array,
    sigma: jax.Array | None,
    *,
    attention_mask: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The whole network, [B, L, V] float32: logits (subs) or unscaled log-ratios (sedd).

    Args:
      ids: [B, L] int32.
      sigma: [B] float32; may be None without time conditioning.
      attention_mask: bool [B, L], True = real token; None = all.
      key: RNG key of dropout; None = off.
    """
    mods = modulation(params, cfg, sigma)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    mask = None if attention_mask is None else attention_mask[:, None, :]
    hidden = run_blocks(params, cfg, ids, mods, positions=positions, mask=mask, key=key).hidden
    return head(params, final_states(params, cfg, hidden, mods))


# --------------------------------------------------------------------------------------- scoring
def output_log_probs(cfg: DiTConfig, output: jax.Array, ids: jax.Array) -> jax.Array:
    """SUBS log-probabilities [B, K, V] of network outputs [B, K, V] at ids [B, K].

    A SEDD score at a masked position is p(x0 = y | xt) up to a factor that no y has
    (Lou et al., 2024), so normalising it over the tokens gives the same distribution.

    Raises:
      ValueError: a uniform graph has no masked positions.
    """
    if cfg.mask_id < 0:
        raise ValueError("the uniform graph has no mask, hence no SUBS log-probabilities")
    return subs_log_probs(output, ids, cfg.mask_id)


def score(
    params: Params,
    cfg: DiTConfig,
    tokens: jax.Array,
    *,
    attention_mask: jax.Array,
    context_mask: jax.Array | None = None,
    t: jax.Array | None = None,
    positions: jax.Array | None = None,
    key: jax.Array | None = None,
    collect_states: bool = False,
) -> BackboneOutput:
    """Score a partially masked sequence.

    Args:
      tokens: [B, L] int32, prompt, then canvas, then padding.
      attention_mask: bool [B, L], True = real token.
      context_mask: unused: every position sees every real one.
      t: [B] noise level in [0, 1]; may be None without time conditioning.
      positions: [B, K] int32, gathered before the head; None = all L.
      key: RNG key of dropout; None = off.
      collect_states: aux["states"] = [n, B, L, D] residual stream behind every block.

    Returns:
      BackboneOutput; hidden is the residual stream behind the last block. For the uniform graph
      log_probs is all NEG_INF.
    """
    del context_mask
    sigma = None if t is None else cfg.schedule.sigma(t)
    mods = modulation(params, cfg, sigma)
    ordinal = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    done = run_blocks(
        params,
        cfg,
        tokens,
        mods,
        positions=ordinal,
        mask=attention_mask.astype(bool)[:, None, :],
        key=key,
        collect_states=collect_states,
    )
    hidden, ids = done.hidden, tokens
    if positions is not None:
        hidden, ids = take_positions(hidden, positions), take_positions(tokens, positions)
    output = head(params, final_states(params, cfg, hidden, mods))
    log_probs = jnp.full_like(output, NEG_INF)
    if cfg.mask_id >= 0:
        log_probs = output_log_probs(cfg, output, ids)
    aux = {} if done.states is None else {"states": done.states}
    return BackboneOutput(output, log_probs, hidden, aux)
