"""The rollout of algo="paper": the original's step, always T times, as one scan."""

from typing import Any

import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.episodes import Episodes, Steps
from reoac_jax.paper_step import PaperOptions, paper_step
from reoac_jax.relation import prompt_facts
from reoac_jax.sampling import row_keys
from reoac_jax.schedule import sigma
from reoac_jax.settings import NUM_OPERATORS, Agent, RolloutSettings
from reoac_jax.tables import Tables


def paper_options(settings: RolloutSettings) -> PaperOptions:
    """The step's static switches."""
    return PaperOptions(
        path=settings.path,
        fast_critic=settings.fast_critic,
        fast_operator=settings.fast_operator,
        use_hidden=settings.use_hidden,
        ensure_update=settings.ensure_update,
        fallback=settings.operators.fallback_index(settings.fallback_operator),
        selection_mode=settings.selection_mode,
        sample_strategy=settings.sample_strategy,
        temperature=settings.temperature,
        save_relation=settings.save_relation,
        relation_temperature=settings.relation_temperature,
        numbers=settings.numbers,
        renoise=settings.renoise,
    )


def noise_level(settings: RolloutSettings, step: jax.Array) -> jax.Array:
    """sigma(step) of the settings' schedule, float32."""
    return sigma(
        step,
        num_steps=settings.num_sigma_steps,
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        schedule=settings.sigma_schedule,
    )


def rollout_paper(
    backbone: Backbone,
    settings: RolloutSettings,
    tables: Tables,
    params: Params,
    agent: Agent,
    canvas: Canvas,
    key: jax.Array,
) -> Episodes:
    """Run a batch of episodes by the original's rules; arguments as for `rollout_plus`."""
    batch, horizon = canvas.tokens.shape[0], settings.max_steps
    options = paper_options(settings)
    context = backbone.begin(params, canvas)
    facts = prompt_facts(
        tables, canvas.prompt_ids, canvas.prompt_len, path=settings.path, numbers=settings.numbers
    )
    # The host path of the original stores its relation whatever the switch says.
    kept = settings.save_relation or settings.path == "host"
    keep_relation = kept and not settings.fast_critic

    def step_fn(carry: tuple[jax.Array, jax.Array], step: jax.Array) -> tuple[Any, Any]:
        gen_ids, _ = carry
        level = jnp.full(batch, noise_level(settings, step))
        after, record = paper_step(
            backbone,
            options,
            settings.operators,
            tables,
            params,
            context,
            agent.actor,
            agent.critic,
            canvas,
            gen_ids,
            level,
            row_keys(key, step, canvas.row_id),
            prompt=facts,
        )
        log_probs = jax.nn.log_softmax(record.actor_logits, axis=-1)
        # Only the last step's relation is ever written out, so only that one is carried.
        relation = record.relation if keep_relation else carry[1]
        return (after, relation), Steps(
            features=record.features,
            operator=record.operator,
            chosen=record.chosen,
            valid=jnp.ones((batch, NUM_OPERATORS), bool),
            log_prob=jnp.take_along_axis(log_probs, record.chosen[:, None], axis=1)[:, 0],
            q=record.q,
            cost=record.cost,
            gen_before=record.gen_before,
            written=record.update_mask,
            confidence=record.confidence,
            active=jnp.ones(batch, bool),
        )

    shape = (batch, canvas.prompt_width, canvas.gen_len) if keep_relation else (batch, 0, 0)
    start = (canvas.gen_ids(), jnp.zeros(shape))
    (final_ids, relation), steps = jax.lax.scan(step_fn, start, jnp.arange(horizon))
    steps = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), steps)
    return Episodes(
        canvas=canvas,
        final_ids=final_ids,
        steps=steps,
        num_steps=jnp.full(batch, horizon, jnp.int32),
        num_forwards=jnp.full(batch, horizon, jnp.int32),
        cost=steps.cost.sum(axis=1),
        relation=relation if keep_relation else None,
    )
