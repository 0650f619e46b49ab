"""One compiled call per batch of episodes: prompts in, finished canvases and records out.

`plus` (`rollout_plus`): at every denoising step the backbone scores the canvas, the features say
how it relates to the prompt, the actor picks an operator among those that can act, and the k most
confident positions of the operator's set are written. Rows stop as soon as their canvas is
complete. `paper` (`rollout_paper`) repeats the original's step T times.

All randomness of row b at step t comes from fold_in(fold_in(key, t), row_id_b), so results do not
depend on the batch size, on padding rows or on the number of devices.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from common.lm.layers import Params
from reoac_jax import features as feature_rules
from reoac_jax import relation as relation_rules
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.episodes import Episodes, Steps
from reoac_jax.losses import mask_logits
from reoac_jax.networks import FeatureStats, heads_apply, normalise
from reoac_jax.operators import (
    OperatorParams,
    operator_costs,
    operator_params,
    plus_operator_masks,
)
from reoac_jax.sampling import row_keys, summarise_scores
from reoac_jax.schedule import pace
from reoac_jax.tables import Tables
from reoac_jax.types import OPERATORS

NUM_OPERATORS = len(OPERATORS)
TEMPORAL_DELTA = feature_rules.FEATURE_NAMES.index("temporal_delta")


@flax.struct.dataclass
class Agent:
    """Everything the policy consists of, apart from the backbone.

    Attributes:
      actor, critic: parameters of the two heads.
      stats: running mean and variance of the features (identity in paper mode).
    """

    actor: Params
    critic: Params
    stats: FeatureStats


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """Static settings of a rollout; hashable."""

    max_steps: int
    gen_len: int
    operators: OperatorParams
    selection_mode: str = "sample"
    sample_strategy: str = "argmax"
    temperature: float = 1.0
    use_hidden: bool = True
    fast_critic: bool = False
    fast_operator: bool = False
    path: str = "tensor"
    relation_temperature: float = 1.0
    numbers: str = "token"
    tentative: bool = False
    save_relation: bool = False
    # plus
    early_exit: bool = True
    patience: int = 0
    remask_ratio: float = 0.1
    stop_at_eos: bool = True
    # paper
    ensure_update: bool = True
    fallback_operator: str = "O_SCOPE"
    renoise: bool = False
    num_sigma_steps: int = 32
    sigma_schedule: str = "cosine"
    sigma_max: float = 1.0
    sigma_min: float = 0.0

    @classmethod
    def from_config(cls, config: ConfigDict, **overrides: Any) -> "RolloutSettings":
        """Settings of a full configuration tree."""
        values = {
            "max_steps": config.rollout.max_steps,
            "gen_len": config.rollout.gen_len,
            "operators": read_operators(config.operators),
            "selection_mode": config.rollout.selection_mode,
            "sample_strategy": config.backbone.sample_strategy,
            "temperature": config.backbone.temperature,
            "use_hidden": config.rollout.use_hidden,
            "fast_critic": config.rollout.fast_critic,
            "fast_operator": config.rollout.fast_operator,
            "path": "tensor" if config.rollout.gpu_critic else "host",
            "relation_temperature": config.relation.temperature,
            "numbers": config.relation.numbers,
            "tentative": config.relation.canvas == "tentative",
            "save_relation": config.rollout.save_relation,
            "early_exit": config.rollout.early_exit,
            "patience": config.rollout.patience,
            "remask_ratio": config.rollout.remask_ratio,
            "stop_at_eos": config.rollout.stop_at_eos,
            "ensure_update": config.rollout.ensure_update,
            "fallback_operator": config.rollout.fallback_operator,
            "renoise": config.backbone.renoise,
            "num_sigma_steps": config.backbone.num_steps,
            "sigma_schedule": config.backbone.sigma_schedule,
            "sigma_max": config.backbone.sigma_max,
            "sigma_min": config.backbone.sigma_min,
        }
        return cls(**(values | overrides))


def read_operators(section: ConfigDict) -> OperatorParams:
    """Static operator parameters of the config section `operators`."""
    entries = []
    for name in OPERATORS:
        given = section[name]
        limit = "max_tokens" if name in ("O_NUM", "O_OP") else "scope_len"
        params = {limit: given.k, "step_scale": given.step_scale}
        if name == "O_BRANCH":
            params["branch_depth"] = given.branch_depth
        entries.append({"id": name, "params": params})
    return operator_params(entries)


def feature_size(settings: RolloutSettings, hidden_size: int, algo: str) -> int:
    """F: 11 relation features, in plus 4 progress features, and the pooled hidden states."""
    if algo == "plus":
        return 15 + (2 * hidden_size if settings.use_hidden else 0)
    return 11 + (hidden_size if settings.use_hidden else 0)


@flax.struct.dataclass
class _Carry:
    """Loop state of `rollout_plus`; [B, ...] unless said otherwise.

    reference: the canvas when it was last complete (patience > 0); stable: repair rounds in a row
    that changed nothing; previous: A of the last step [B, P, G]; changed: bool [B, G].
    """

    step: jax.Array  # []
    gen_ids: jax.Array
    done: jax.Array
    cost: jax.Array
    previous: jax.Array
    relation: jax.Array
    changed: jax.Array
    reference: jax.Array
    stable: jax.Array
    steps: Steps


def _select(
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


def _pick(masks: jax.Array, operator: jax.Array) -> jax.Array:
    """masks [B, A, G] at operator [B] -> [B, G]."""
    return jnp.take_along_axis(masks, operator[:, None, None], axis=1)[:, 0]


def before_eos(gen_ids: jax.Array, eos_id: int) -> jax.Array:
    """bool [B, G]: positions up to and including the first written eos (all when there is none)."""
    is_eos = gen_ids == eos_id
    earlier = jnp.cumsum(is_eos, axis=1) - is_eos
    return earlier == 0


def rollout_plus(
    backbone: Backbone,
    settings: RolloutSettings,
    tables: Tables,
    params: Params,
    agent: Agent,
    canvas: Canvas,
    key: jax.Array,
) -> Episodes:
    """Run a batch of episodes with the better method (module docstring).

    Args:
      backbone, settings: static.
      tables: per-vocabulary lookups.
      params: backbone parameters.
      agent: actor, critic and feature statistics.
      canvas: prompts with all-mask canvases.
      key: typed key of the rollout.

    Returns:
      Episodes with T = settings.max_steps recorded decisions per row.
    """
    batch, gen_len, horizon = canvas.tokens.shape[0], canvas.gen_len, settings.max_steps
    context = backbone.begin(params, canvas)
    facts = relation_rules.prompt_facts(
        tables, canvas.prompt_ids, canvas.prompt_len, path=settings.path, numbers=settings.numbers
    )
    classes = jnp.stack([tables.has_digit, tables.op_char], axis=1)[: backbone.vocab_size]
    costs = operator_costs(settings.operators)
    num_features = feature_size(settings, backbone.hidden_size, "plus")
    empty_relation = jnp.zeros((batch, canvas.prompt_width, gen_len))

    def body(carry: _Carry) -> _Carry:
        gen_ids, step = carry.gen_ids, carry.step
        active = ~carry.done
        is_mask = gen_ids == backbone.mask_id
        needed = before_eos(gen_ids, backbone.eos_id) if settings.stop_at_eos else True
        masked = is_mask & needed
        remaining = jnp.sum(masked, axis=1)
        keys = jax.vmap(lambda k: jax.random.split(k, 2))(row_keys(key, step, canvas.row_id))

        scores = backbone.score(params, context, canvas, gen_ids, remaining / gen_len)
        summary = summarise_scores(
            backbone.head(params, scores.hidden),
            keys=keys[:, 0] if settings.sample_strategy == "sample" else None,
            temperature=settings.temperature,
            suppress_id=backbone.suppress_id,
            classes=classes,
        )
        shown = jnp.where(is_mask, summary.best, gen_ids) if settings.tentative else gen_ids
        base, aux = feature_rules.base_features(
            tables,
            canvas.prompt_ids,
            canvas.prompt_len,
            canvas.key_mask,
            shown,
            summary.entropy,
            carry.previous,
            path=settings.path,
            temperature=settings.relation_temperature,
            numbers=settings.numbers,
            scale_entropy=True,
            prompt=facts,
        )
        # At step 0 there is no previous relation to differ from.
        base = base.at[:, TEMPORAL_DELTA].multiply(step > 0)
        progress = feature_rules.progress_features(
            step, horizon, masked, summary.confidence, carry.changed
        )
        parts = [base, progress]
        if settings.use_hidden:
            parts.append(feature_rules.normalised_pools(scores.pooled_canvas, scores.pooled_prompt))
        features = jnp.concatenate(parts, axis=1)  # [B, F]
        seen = normalise(agent.stats, features)
        q = heads_apply(agent.critic, seen)

        touchable = jnp.broadcast_to(needed, gen_ids.shape)
        if scores.editable is not None:
            touchable &= scores.editable
        write, remask, valid = plus_operator_masks(
            tables,
            jnp.where(is_mask, summary.best, gen_ids),
            summary.confidence,
            (summary.class_mass[..., 0], summary.class_mass[..., 1]),
            is_mask,
            pace(remaining, horizon - step),
            settings.operators,
            settings.remask_ratio,
            active=touchable,
        )
        operator, log_prob = _select(
            heads_apply(agent.actor, seen), valid, keys[:, 1], settings.selection_mode
        )
        write, remask = _pick(write, operator), _pick(remask, operator)
        # Completion guarantee: the last step writes whatever is still missing, and repairs nothing.
        last = step == horizon - 1
        write = jnp.where(last, masked, write) & active[:, None]
        remask = remask & ~last & active[:, None]
        after = jnp.where(write, summary.sampled, gen_ids)
        after = jnp.where(remask, backbone.mask_id, after)

        complete = ~jnp.any(_open(after, backbone, settings), axis=1)
        unchanged = jnp.all(after == carry.reference, axis=1)
        stable = jnp.where(complete, jnp.where(unchanged, carry.stable + 1, 0), carry.stable)
        done = carry.done | last
        if settings.early_exit:
            done |= complete & (stable >= settings.patience)
        cost = jnp.where(active, costs[operator], 0.0)
        record = Steps(
            features=features,
            operator=operator,
            chosen=operator,
            valid=valid,
            log_prob=log_prob,
            q=q,
            cost=cost,
            gen_before=gen_ids,
            written=write,
            active=active,
        )
        row = active[:, None]

        def record_step(all_: jax.Array, one: jax.Array) -> jax.Array:
            # Rows that have finished keep blank records, however long the others go on.
            running = active.reshape(-1, *[1] * (one.ndim - 1))
            return all_.at[:, step].set(jnp.where(running, one, all_[:, step]))

        return _Carry(
            step=step + 1,
            gen_ids=jnp.where(row, after, gen_ids),
            done=done,
            cost=carry.cost + cost,
            previous=jnp.where(row[..., None], aux.attention, carry.previous),
            relation=jnp.where(row[..., None], aux.relation, carry.relation)
            if settings.save_relation
            else carry.relation,
            changed=jnp.where(row, after != gen_ids, carry.changed),
            reference=jnp.where(row & complete[:, None], after, carry.reference),
            stable=stable,
            steps=jax.tree.map(record_step, carry.steps, record),
        )

    blank_ids = jnp.full((batch, gen_len), backbone.mask_id, jnp.int32)
    no = jnp.zeros((batch, horizon), bool)
    initial = _Carry(
        step=jnp.int32(0),
        gen_ids=canvas.gen_ids(),
        done=jnp.zeros(batch, bool),
        cost=jnp.zeros(batch),
        previous=empty_relation,
        relation=empty_relation if settings.save_relation else jnp.zeros((batch, 0, 0)),
        changed=jnp.zeros((batch, gen_len), bool),
        reference=blank_ids,
        stable=jnp.full(batch, -1, jnp.int32),
        steps=Steps(
            features=jnp.zeros((batch, horizon, num_features)),
            operator=jnp.zeros((batch, horizon), jnp.int32),
            chosen=jnp.zeros((batch, horizon), jnp.int32),
            valid=jnp.ones((batch, horizon, NUM_OPERATORS), bool),
            log_prob=jnp.zeros((batch, horizon)),
            q=jnp.zeros((batch, horizon, NUM_OPERATORS)),
            cost=jnp.zeros((batch, horizon)),
            gen_before=jnp.broadcast_to(blank_ids[:, None], (batch, horizon, gen_len)),
            written=jnp.zeros((batch, horizon, gen_len), bool),
            active=no,
        ),
    )
    final = jax.lax.while_loop(
        lambda carry: (carry.step < horizon) & ~jnp.all(carry.done), body, initial
    )
    return Episodes(
        canvas=canvas,
        final_ids=final.gen_ids,
        steps=final.steps,
        num_steps=jnp.sum(final.steps.active, axis=1, dtype=jnp.int32),
        cost=final.cost,
        relation=final.relation if settings.save_relation else None,
    )


def _open(gen_ids: jax.Array, backbone: Backbone, settings: RolloutSettings) -> jax.Array:
    """bool [B, G]: positions that still have to be written."""
    masked = gen_ids == backbone.mask_id
    return masked & before_eos(gen_ids, backbone.eos_id) if settings.stop_at_eos else masked
