"""One denoising step of `algo="plus"`: look at the canvas, then execute an operator.

`observe` runs the backbone and computes everything a decision rests on; `execute` changes the
canvas. A rollout alternates them; a lookahead (`reoac_jax.branches`) runs them for several
operators from the same canvas.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax import features as feature_rules
from reoac_jax import relation as relation_rules
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.losses import mask_logits
from reoac_jax.networks import heads_apply, normalise
from reoac_jax.operators import plus_operator_masks
from reoac_jax.sampling import ScoreSummary, row_keys, summarise_scores
from reoac_jax.schedule import pace
from reoac_jax.settings import NUM_OPERATORS, Agent, RolloutSettings
from reoac_jax.tables import Tables
from reoac_jax.types import OPERATORS
from reoac_jax.unmasking import before_eos

BRANCH = OPERATORS.index("O_BRANCH")
_TEMPORAL_DELTA = feature_rules.FEATURE_NAMES.index("temporal_delta")


@flax.struct.dataclass
class Ground:
    """What stays fixed while a batch of episodes runs.

    Attributes:
      params: backbone parameters; agent: actor, critic and feature statistics; tables: lookups.
      canvas: the prompts; context: what the backbone computed of them; facts: their relation side.
      classes: bool [V, 2], number and operator tokens.
    """

    params: Params
    agent: Agent
    tables: Tables
    canvas: Canvas
    context: Any
    facts: relation_rules.PromptFacts
    classes: jax.Array


@flax.struct.dataclass
class Cursor:
    """Where episodes stand between two decisions; [B, ...] unless said otherwise.

    Attributes:
      step: [] int32, decisions taken by rows that are still running.
      gen_ids: int32 [B, G], the canvas.
      done: bool [B].
      previous: A of the last step [B, P, G].
      relation: R of the last step [B, P, G], or [B, 0, 0] when it is not kept.
      changed: bool [B, G], positions the last decision changed.
      reference: int32 [B, G], the canvas when it was last complete (patience > 0).
      stable: int32 [B], repair rounds in a row that changed nothing.
      cache: of a backbone that scores block by block, otherwise ().
    """

    step: jax.Array
    gen_ids: jax.Array
    done: jax.Array
    previous: jax.Array
    relation: jax.Array
    changed: jax.Array
    reference: jax.Array
    stable: jax.Array
    cache: Any


class Observation(NamedTuple):
    """What one forward pass says about canvases.

    Attributes:
      sampled: [B, G] int32, the token each position would receive.
      confidence: [B, G] float32, probability of each position's best token.
      masked: bool [B, G], positions that still have to be written.
      features: [B, F] float32; q, logits: [B, A] float32 of critic and actor.
      write, remask: bool [B, A, G], positions of each operator; valid: bool [B, A].
      attention, relation: [B, P, G] float32.
      operator_keys: [B] typed keys for drawing the operator.
      cache: the cursor's cache with what this pass added.
    """

    sampled: jax.Array
    confidence: jax.Array
    masked: jax.Array
    features: jax.Array
    q: jax.Array
    logits: jax.Array
    write: jax.Array
    remask: jax.Array
    valid: jax.Array
    attention: jax.Array
    relation: jax.Array
    operator_keys: jax.Array
    cache: Any


class _Look(NamedTuple):
    """One forward pass at every canvas position, scored or not.

    Attributes:
      summary: of the scores, [B, G].
      pooled_canvas, pooled_prompt: [B, D] float32.
      editable: bool [B, G], or None = all.
      cache: see `Cursor`.
    """

    summary: ScoreSummary
    pooled_canvas: jax.Array
    pooled_prompt: jax.Array
    editable: jax.Array | None
    cache: Any


def _look(
    backbone: Backbone,
    settings: RolloutSettings,
    ground: Ground,
    cursor: Cursor,
    t: jax.Array,
    keys: jax.Array,
) -> _Look:
    """Runs the backbone at noise level t [B]; keys [B] draw tokens.

    Positions that a blockwise backbone did not score have no prediction (the mask), no confidence
    and, where they are masked, full entropy. If the last step has to complete them all the same
    they end the answer.
    """

    def summarise(hidden: jax.Array) -> ScoreSummary:
        return summarise_scores(
            backbone.head(ground.params, hidden),
            keys=keys if settings.sample_strategy == "sample" else None,
            temperature=settings.temperature,
            suppress_id=backbone.suppress_id,
            classes=ground.classes,
        )

    canvas, gen_len = ground.canvas, ground.canvas.gen_len
    if backbone.blocks is None:
        scores = backbone.score(ground.params, ground.context, canvas, cursor.gen_ids, t)
        return _Look(
            summarise(scores.hidden),
            scores.pooled_canvas,
            scores.pooled_prompt,
            scores.editable,
            cursor.cache,
        )
    block, cache = backbone.blocks.score(ground.context, cursor.cache, canvas, cursor.gen_ids)
    of_block = summarise(block.hidden)
    editable = block.spread(jnp.ones(block.places.shape, bool), gen_len, False)
    entropy = block.spread(of_block.entropy, gen_len, 1.0)
    unknown = (cursor.gen_ids == backbone.mask_id) | editable
    summary = ScoreSummary(
        best=block.spread(of_block.best, gen_len, backbone.mask_id),
        confidence=block.spread(of_block.confidence, gen_len, 0.0),
        entropy=jnp.where(unknown, entropy, 0.0),
        log_norm=block.spread(of_block.log_norm, gen_len, 0.0),
        class_mass=block.spread(of_block.class_mass, gen_len, 0.0),
        sampled=block.spread(of_block.sampled, gen_len, backbone.eos_id),
    )
    return _Look(summary, block.pooled_canvas, block.pooled_prompt, editable, cache)


def make_ground(
    backbone: Backbone,
    settings: RolloutSettings,
    tables: Tables,
    params: Params,
    agent: Agent,
    canvas: Canvas,
) -> tuple[Ground, Any]:
    """What stays fixed (the backbone's context, the facts about the prompts), and the first cache.

    The cache is () unless the backbone scores block by block.
    """
    facts = relation_rules.prompt_facts(
        tables, canvas.prompt_ids, canvas.prompt_len, path=settings.path, numbers=settings.numbers
    )
    classes = jnp.stack([tables.has_digit, tables.op_char], axis=1)[: backbone.vocab_size]
    cache: Any = ()
    if backbone.blocks is None:
        context = backbone.begin(params, canvas)
    else:
        context, cache = backbone.blocks.begin(params, canvas)
    return Ground(params, agent, tables, canvas, context, facts, classes), cache


def first_cursor(
    backbone: Backbone, settings: RolloutSettings, canvas: Canvas, cache: Any
) -> Cursor:
    """Canvases before any decision, and the first cache of `make_ground`."""
    batch, gen_len = canvas.tokens.shape[0], canvas.gen_len
    no_relation = jnp.zeros((batch, canvas.prompt_width, gen_len))
    return Cursor(
        step=jnp.int32(0),
        gen_ids=canvas.gen_ids(),
        done=jnp.zeros(batch, bool),
        previous=no_relation,
        relation=no_relation if settings.save_relation else jnp.zeros((batch, 0, 0)),
        changed=jnp.zeros((batch, gen_len), bool),
        reference=jnp.full((batch, gen_len), backbone.mask_id, jnp.int32),
        stable=jnp.full(batch, -1, jnp.int32),
        cache=cache,
    )


def _needed(gen_ids: jax.Array, backbone: Backbone, settings: RolloutSettings) -> jax.Array:
    if settings.stop_at_eos:
        return before_eos(gen_ids, backbone.eos_id)
    return jnp.ones(gen_ids.shape, bool)


def observe(
    backbone: Backbone,
    settings: RolloutSettings,
    ground: Ground,
    cursor: Cursor,
    key: jax.Array,
    branching: bool = False,
) -> Observation:
    """One forward pass with features, values, policy logits and every operator's positions.

    Args:
      backbone, settings, branching: static; branching = O_BRANCH may be chosen (never at the last
        decision, which has nothing to look ahead to).
      key: typed key of the rollout; row b of step t uses fold_in(fold_in(key, t), row_id_b).
    """
    canvas, gen_ids, step = ground.canvas, cursor.gen_ids, cursor.step
    is_mask = gen_ids == backbone.mask_id
    needed = _needed(gen_ids, backbone, settings)
    masked = is_mask & needed
    remaining = jnp.sum(masked, axis=1)
    keys = jax.vmap(lambda k: jax.random.split(k, 2))(row_keys(key, step, canvas.row_id))

    looked = _look(backbone, settings, ground, cursor, remaining / canvas.gen_len, keys[:, 0])
    summary = looked.summary
    shown = jnp.where(is_mask, summary.best, gen_ids) if settings.tentative else gen_ids
    base, aux = feature_rules.base_features(
        ground.tables,
        canvas.prompt_ids,
        canvas.prompt_len,
        canvas.key_mask,
        shown,
        summary.entropy,
        cursor.previous,
        path=settings.path,
        temperature=settings.relation_temperature,
        numbers=settings.numbers,
        scale_entropy=True,
        prompt=ground.facts,
    )
    # At step 0 there is no previous relation to differ from.
    base = base.at[:, _TEMPORAL_DELTA].multiply(step > 0)
    progress = feature_rules.progress_features(
        step, settings.max_steps, masked, summary.confidence, cursor.changed
    )
    if not settings.use_progress:
        progress = jnp.zeros_like(progress)
    parts = [base, progress]
    if settings.use_hidden:
        parts.append(feature_rules.normalised_pools(looked.pooled_canvas, looked.pooled_prompt))
    features = jnp.concatenate(parts, axis=1)  # [B, F]
    seen = normalise(ground.agent.stats, features)

    touchable = needed if looked.editable is None else needed & looked.editable
    write, remask, valid = plus_operator_masks(
        ground.tables,
        jnp.where(is_mask, summary.best, gen_ids),
        summary.confidence,
        (summary.class_mass[..., 0], summary.class_mass[..., 1]),
        is_mask,
        pace(remaining, settings.max_steps - step),
        settings.operators,
        settings.remask_ratio,
        active=touchable,
        branching=branching,
    )
    if not settings.valid_mask:
        # A void operator changes nothing and costs its price; O_BRANCH exists only with branching.
        valid = jnp.ones_like(valid).at[:, BRANCH].set(branching)
    if branching:
        valid = valid.at[:, BRANCH].set(valid[:, BRANCH] & (step < settings.max_steps - 1))
    return Observation(
        sampled=summary.sampled,
        confidence=summary.confidence,
        masked=masked,
        features=features,
        q=heads_apply(ground.agent.critic, seen),
        logits=heads_apply(ground.agent.actor, seen),
        write=write,
        remask=remask,
        valid=valid,
        attention=aux.attention,
        relation=aux.relation,
        operator_keys=keys[:, 1],
        cache=looked.cache,
    )


def select(
    logits: jax.Array, valid: jax.Array, keys: jax.Array, mode: str
) -> tuple[jax.Array, jax.Array]:
    """Operator index [B] and its log-probability [B] under the masked softmax.

    Args:
      logits: [B, A] actor logits.
      valid: bool [B, A]; where nothing is valid every operator stays open (and does nothing).
      keys: [B] typed keys.
      mode: argmax | sample | random (uniform over valid) | fixed:<operator>, which falls back to
        the first valid operator of (O_SCOPE, then order) where it is void.
    """
    if mode == "random":
        logits = jnp.zeros_like(logits)
    masked = mask_logits(logits, valid)
    log_probs = jax.nn.log_softmax(masked, axis=-1)
    if mode in ("sample", "random"):
        operator = jax.vmap(jax.random.categorical)(keys, masked)
    elif mode == "argmax":
        operator = jnp.argmax(masked, axis=-1)
    else:
        wanted = OPERATORS.index(mode.removeprefix("fixed:"))
        order = jnp.zeros(NUM_OPERATORS).at[OPERATORS.index("O_SCOPE")].set(1.0)
        order = order.at[wanted].set(2.0)
        operator = jnp.argmax(jnp.where(valid, order, -1.0), axis=-1)
    operator = operator.astype(jnp.int32)
    return operator, jnp.take_along_axis(log_probs, operator[:, None], axis=1)[:, 0]


def execute(
    backbone: Backbone,
    settings: RolloutSettings,
    cursor: Cursor,
    seen: Observation,
    operator: jax.Array,
) -> tuple[Cursor, jax.Array]:
    """Writes (or re-masks) the positions of operator [B] in rows that are still running.

    Returns:
      the next cursor, and bool [B, G] positions that received a token.
    """
    active = ~cursor.done
    write = jnp.take_along_axis(seen.write, operator[:, None, None], axis=1)[:, 0]
    remask = jnp.take_along_axis(seen.remask, operator[:, None, None], axis=1)[:, 0]
    # Completion guarantee: the last step writes whatever is still missing, and repairs nothing.
    last = cursor.step >= settings.max_steps - 1
    write = jnp.where(last, seen.masked, write) & active[:, None]
    remask = remask & ~last & active[:, None]
    after = jnp.where(write, seen.sampled, cursor.gen_ids)
    after = jnp.where(remask, backbone.mask_id, after)

    open_ = (after == backbone.mask_id) & _needed(after, backbone, settings)
    complete = ~jnp.any(open_, axis=1)
    unchanged = jnp.all(after == cursor.reference, axis=1)
    stable = jnp.where(complete, jnp.where(unchanged, cursor.stable + 1, 0), cursor.stable)
    done = cursor.done | last
    if settings.early_exit:
        done |= complete & (stable >= settings.patience)
    row = active[:, None]
    return Cursor(
        step=cursor.step + 1,
        gen_ids=jnp.where(row, after, cursor.gen_ids),
        done=done,
        previous=jnp.where(row[..., None], seen.attention, cursor.previous),
        relation=jnp.where(row[..., None], seen.relation, cursor.relation)
        if settings.save_relation
        else cursor.relation,
        changed=jnp.where(row, after != cursor.gen_ids, cursor.changed),
        reference=jnp.where(row & complete[:, None], after, cursor.reference),
        stable=jnp.where(active, stable, cursor.stable),
        cache=seen.cache,
    ), write
