"""Which retrieved correction to try, which to take, and how strongly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from esm.core.retrieval import Entries, Retrieved

TIE = 1e-12
NO_TOOL = -1


class Candidates(NamedTuple):
    """The corrections worth trying at a control point.

    Attributes:
        tool: [B, L] int32 entry index, NO_TOOL where there is none.
        ahat: [B, L] float32 estimated advantage sim * quality; 0 where there is none.
        sim: [B, L] float32.
        null_ahat: [B] float32, of doing nothing.
    """

    tool: jax.Array
    ahat: jax.Array
    sim: jax.Array
    null_ahat: jax.Array


class Decision(NamedTuple):
    """What is done next.

    Attributes:
        choice: [B] int32: 0 = nothing, i = candidate i - 1.
        score: [B] float32 of the winner; of the tool where only its strength ruled it out.
        alpha: [B] float32 strength; 0 where nothing is done.
        scores: [B, L + 1] float32, nothing first; -inf where there is no candidate.
    """

    choice: jax.Array
    score: jax.Array
    alpha: jax.Array
    scores: jax.Array


def candidates(found: Retrieved, entries: Entries, count: int) -> Candidates:
    """The `count` tools of largest (advantage, similarity, quality), in this order of importance.

    Args:
        found: what retrieval returned.
        entries: the memory.
        count: L, static; rows with fewer tools are padded.
    """
    batch, k = found.entry.shape
    if k == 0:  # sorting has nothing to sort
        none = jnp.zeros((batch, count))
        return Candidates(
            none.astype(jnp.int32) + NO_TOOL, none, none, jnp.zeros((batch,), jnp.float32)
        )
    quality = entries.quality[found.entry]
    is_null = entries.is_null[found.entry]
    ahat = found.sim * quality
    null_ahat = jnp.where(found.valid & is_null, ahat, 0).max(axis=1, initial=0)
    is_tool = found.valid & ~is_null
    last = jnp.where(is_tool, 0, 1)
    order = jnp.lexsort((-quality, -found.sim, -ahat, last), axis=-1)[:, :count]
    short = count - order.shape[1]
    kept = jnp.pad(jnp.take_along_axis(is_tool, order, axis=1), ((0, 0), (0, max(0, short))))

    def take(x: jax.Array, empty: float) -> jax.Array:
        chosen = jnp.take_along_axis(x, order, axis=1)
        return jnp.where(kept, jnp.pad(chosen, ((0, 0), (0, max(0, short)))), empty)

    return Candidates(
        tool=take(found.entry, NO_TOOL).astype(jnp.int32),
        ahat=take(ahat, 0),
        sim=take(found.sim, 0),
        null_ahat=null_ahat,
    )


def decide(
    cand: Candidates,
    conf: jax.Array,
    beta: float | jax.Array,
    rho: float | jax.Array,
    tau: float | jax.Array,
    k_scale: float | jax.Array,
    probed: jax.Array,
    forced: jax.Array | None = None,
    alpha_max: float | jax.Array = jnp.inf,
) -> Decision:
    """Scores the candidates, takes the best and sets its strength.

    Doing nothing scores beta * A_null, tool i scores beta * A_i + rho * (c_i - c_null). The first
    tool strictly above the running best wins, nothing standing first; a winner below tau or without
    positive strength k_scale * score is not used.

    Args:
        cand: L candidates per row.
        conf: [B, L + 1] mean log-probability of the probes, nothing first; ignored unless probed.
        beta: weight of the advantage.
        rho: weight of the confidence gain.
        tau: least score of a tool.
        k_scale: strength per score.
        probed: [B] bool, the row's candidates were probed.
        forced: [B] int32, takes this candidate (as `Decision.choice`) instead of the best; it is
            subject to the same gates.
        alpha_max: largest strength.
    """
    gain = jnp.where(probed[:, None], conf[:, 1:] - conf[:, :1], 0)
    valid = cand.tool != NO_TOOL
    tools = jnp.where(valid, beta * cand.ahat + rho * gain, -jnp.inf)
    null = beta * cand.null_ahat
    scores = jnp.concatenate([null[:, None], tools], axis=1)
    # argmax takes the first of equal scores: what a scan for "strictly above" does.
    choice = jnp.argmax(scores, axis=1) if forced is None else forced
    score = jnp.take_along_axis(scores, choice[:, None], axis=1)[:, 0]
    tied = probed & (jnp.abs(score - null) <= TIE)
    dropped = (choice > 0) & (tied | (score < tau))
    choice = jnp.where(dropped, 0, choice)
    score = jnp.where(dropped, null, score)
    alpha = jnp.minimum(k_scale * score, alpha_max)
    used = (choice > 0) & (alpha > 0)
    return Decision(
        choice=jnp.where(used, choice, 0).astype(jnp.int32),
        score=score,
        alpha=jnp.where(used, alpha, 0),
        scores=scores,
    )


def uniform_choice(tool: jax.Array, draw: jax.Array) -> jax.Array:
    """A candidate drawn uniformly, as `Decision.choice`; 0 where there is none.

    Args:
        tool: [B, L] int32; the candidates stand first.
        draw: [B] float32 uniform in [0, 1).
    """
    count = (tool != NO_TOOL).sum(axis=1)
    return jnp.where(count > 0, 1 + jnp.minimum((draw * count).astype(jnp.int32), count - 1), 0)
