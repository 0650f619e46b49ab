"""One denoising step of a block: which tokens are proposed and where they are written."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from common.errors import UserError
from reoac_jax.backbone.e2d2 import NEG_INF, E2D2Config
from reoac_jax.sampling import summarise_scores
from reoac_jax.selection import descending_rank
from reoac_jax.unmasking import unmask

STRATEGIES = ("predict_and_noise", "posterior")
CONFIDENCES = ("probability", "margin", "none")


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """How blocks are denoised; hashable, a static argument.

    Attributes:
        num_steps: Denoising steps per block; 0 = the block size.
        strategy: "predict_and_noise" (predict all, mask the least sure again) or "posterior"
            (sample the reverse process). "predict_then_noise" is the same as the first.
        confidence: What "sure" means: the token's probability, its margin over the second best
            token, or "none" (positions are masked again at random).
        threshold: Positions with at least this probability stay decoded; above 1 = off.
        factor: The factor rule of `unmasking.unmask`; 0 = off.
        greedy: Best token instead of a sample.
        temperature: Of samples.
        first_hitting: No more steps than tokens in a block.
        align: Blocks start at multiples of S, the first one with the prompt's tail; otherwise
            they start behind the prompt.
        stop_at_eos: A row ends with the block in which it wrote the end token.
        original_blocks: Repeat two slips of the original implementation: with `align` the
            number of blocks is rounded down, which leaves trailing masks, and the last block is
            encoded although nothing follows.
    """

    num_steps: int = 0
    strategy: str = "predict_and_noise"
    confidence: str = "probability"
    threshold: float = 1e6
    factor: float = 0.0
    greedy: bool = True
    temperature: float = 1.0
    first_hitting: bool = True
    align: bool = True
    stop_at_eos: bool = True
    original_blocks: bool = False

    def __post_init__(self) -> None:
        if self.strategy == "predict_then_noise":
            object.__setattr__(self, "strategy", "predict_and_noise")
        for name, choices in (("strategy", STRATEGIES), ("confidence", CONFIDENCES)):
            if getattr(self, name) not in choices:
                raise UserError(f"decoding {name} '{getattr(self, name)}' is none of {choices}")

    def steps_per_block(self, block_size: int) -> int:
        """Most denoising steps a block gets."""
        steps = self.num_steps or block_size
        return min(steps, block_size) if self.first_hitting else steps


def _sample(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """One token per position: keys [B], logits [B, S, V] -> [B, S] int32.

    Plain float32 Gumbel noise has too short a tail for large vocabularies, hence mode "high".
    """
    draw = functools.partial(jax.random.categorical, mode="high")
    return jax.vmap(draw)(keys, logits).astype(jnp.int32)


def predict_step(
    logits: jax.Array,
    masked: jax.Array,
    noise_share: jax.Array,
    keys: jax.Array,
    cfg: E2D2Config,
    settings: DecodeSettings,
) -> tuple[jax.Array, jax.Array]:
    """Predicts every masked position and keeps the surest: (tokens, where to write), [B, S].

    Args:
        logits: [B, S, V] raw.
        masked: bool [B, S].
        noise_share: int32, masks a whole block has at the next time.
        keys: [B].
        cfg: The network.
        settings: Strategy.
    """
    summary = summarise_scores(logits, suppress_id=cfg.mask_id)
    token_key, order_key = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    token, probability = summary.best, summary.confidence
    vocab = jnp.arange(cfg.vocab_size)
    if not settings.greedy:
        open_logits = jnp.where(vocab == cfg.mask_id, NEG_INF, logits)
        token = _sample(token_key, open_logits / settings.temperature)
        chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        probability = jnp.exp(chosen - summary.log_norm)
    sureness = probability
    if settings.confidence == "margin":
        rest = (vocab == summary.best[..., None]) | (vocab == cfg.mask_id)
        second = jnp.where(rest, NEG_INF, logits).max(axis=-1)
        sureness = summary.confidence - jnp.exp(second - summary.log_norm)
    elif settings.confidence == "none":
        sureness = jax.vmap(lambda k: jax.random.uniform(k, masked.shape[1:]))(order_key)
    return token, keep_surest(sureness, probability, masked, noise_share, settings)


def predict_open_step(
    best_tokens: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    sizes: Sequence[int],
    hidden: jax.Array,
    masked: jax.Array,
    noise_share: jax.Array,
    keys: jax.Array,
    cfg: E2D2Config,
    settings: DecodeSettings,
) -> tuple[jax.Array, jax.Array]:
    """`predict_step` with the head on the masked positions alone; same results.

    With a large vocabulary the head is most of a step, and only masked positions are ever read:
    on average little more than half of a block, of finished rows none.

    Args:
        best_tokens: states [R, D] -> best token but the mask and its probability, each [R].
        sizes: Rows it may be given, ascending, the last at least B * S; every one is compiled.
        hidden: [B, S, D] states.
        masked, noise_share, keys, cfg, settings: as in `predict_step`; see `reads_open_only`.
    """
    batch, size, width = hidden.shape
    total = batch * size
    order = jnp.argsort(~masked.reshape(-1), stable=True)  # masked ones first
    rows = jnp.pad(hidden.reshape(total, width)[order], ((0, sizes[-1] - total), (0, 0)))

    def summarise(count: int) -> tuple[jax.Array, jax.Array]:
        best, confidence = best_tokens(rows[:count])
        pad = (0, max(total - count, 0))
        return jnp.pad(best, pad)[:total], jnp.pad(confidence, pad)[:total]

    branch = jnp.searchsorted(jnp.asarray(sizes), jnp.sum(masked))
    branches = [functools.partial(summarise, count) for count in sizes]
    best, confidence = jax.lax.switch(branch, branches)
    token = jnp.zeros(total, best.dtype).at[order].set(best).reshape(batch, size)
    probability = jnp.zeros(total).at[order].set(confidence).reshape(batch, size)
    sureness = probability
    if settings.confidence == "none":
        order_key = jax.vmap(jax.random.split)(keys)[:, 1]
        sureness = jax.vmap(lambda k: jax.random.uniform(k, (size,)))(order_key)
    return token, keep_surest(sureness, probability, masked, noise_share, settings)


def reads_open_only(settings: DecodeSettings) -> bool:
    """Whether `predict_open_step` serves these settings: nothing but best tokens is asked for."""
    plain = settings.strategy == "predict_and_noise" and settings.greedy
    return plain and settings.confidence != "margin"


def keep_surest(
    sureness: jax.Array,
    probability: jax.Array,
    masked: jax.Array,
    noise_share: jax.Array,
    settings: DecodeSettings,
) -> jax.Array:
    """Where to write, bool [B, S]: all masked positions but the `noise_share` least sure ones."""
    count = jnp.sum(masked, axis=1)
    # At least one position is decoded, whatever the schedule says.
    keep_masked = jnp.maximum(jnp.minimum(noise_share, count - 1), 0)
    write = descending_rank(sureness, masked) < (count - keep_masked)[:, None]
    write |= probability >= settings.threshold
    if settings.factor:
        write |= unmask(probability, masked, 0, factor=settings.factor)
    return write


def posterior_step(
    logits: jax.Array,
    alphas: tuple[jax.Array, jax.Array],
    last: jax.Array,
    keys: jax.Array,
    cfg: E2D2Config,
    settings: DecodeSettings,
) -> tuple[jax.Array, jax.Array]:
    """One step of the reverse process: (tokens, where to write), [B, S].

    The mask's share of the last step, about 1e-5, goes to the tokens: no mask may remain.
    """
    alpha_t, alpha_s = alphas
    is_mask = jnp.arange(cfg.vocab_size) == cfg.mask_id
    logits = jnp.where(is_mask, NEG_INF, logits / settings.temperature)
    tokens = jax.nn.log_softmax(logits) + jnp.log(alpha_s - alpha_t)
    stay = jnp.where(last, NEG_INF, jnp.log(1.0 - alpha_s))
    posterior = jnp.where(is_mask, stay, tokens)
    if settings.greedy:
        token = jnp.argmax(posterior, axis=-1).astype(jnp.int32)
    else:
        token = _sample(keys, posterior)
    return token, token != cfg.mask_id
