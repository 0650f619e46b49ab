"""One denoising step of the "paper" method as a pure function (rollout, spec 2.2).

Score the canvas, compute the features, let the actor choose an operator, fall back where it is
void, and overwrite the operator's positions with tokens of this step's scores.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from common.lm.layers import Params
from reoac_jax.backbone.base import Backbone, Canvas, Scores
from reoac_jax.features import base_features
from reoac_jax.networks import HeadParams, heads_apply
from reoac_jax.operators import (
    OperatorParams,
    operator_costs,
    operator_masks,
    select_and_fallback,
)
from reoac_jax.relation import PromptFacts
from reoac_jax.sampling import summarise_scores
from reoac_jax.tables import Tables


@dataclasses.dataclass(frozen=True)
class PaperOptions:
    """Static switches of a step; hashable (rollout switches, spec 2.6).

    Attributes:
        path: "tensor" or "host" relation rules.
        fast_critic: the 11 relation features are 0 and no relation is computed.
        fast_operator: with fast_critic, operators see no token strings.
        use_hidden: append the mean contextual state to the features.
        ensure_update: run the fallback where the chosen operator flags nothing.
        fallback: index of the fallback operator.
        selection_mode: "argmax" or "sample".
        sample_strategy: tokens by "argmax" or "sample".
        temperature: of sampled tokens.
        save_relation: keep the relation of the step.
        relation_temperature: of the relation softmax.
        numbers: "token" or "span".
        renoise: mask every position with probability t before scoring, carry the others over.
    """

    path: str = "tensor"
    fast_critic: bool = False
    fast_operator: bool = False
    use_hidden: bool = True
    ensure_update: bool = True
    fallback: int = 2
    selection_mode: str = "argmax"
    sample_strategy: str = "argmax"
    temperature: float = 1.0
    save_relation: bool = True
    relation_temperature: float = 1.0
    numbers: str = "token"
    renoise: bool = False


@struct.dataclass
class PaperRecord:
    """What one step leaves behind.

    Attributes:
        features: [B, F] f32.
        q: [B, A] f32.
        actor_logits: [B, A] f32.
        chosen: [B] i32, the actor's choice.
        operator: [B] i32, the executed operator.
        update_mask: [B, G] bool, overwritten positions.
        confidence: [B, G] f32, probability of each position's best token.
        cost: [B] f32.
        gen_before: [B, G] i32.
        relation: [B, P, G] f32, or None when not saved.
    """

    features: jax.Array
    q: jax.Array
    actor_logits: jax.Array
    chosen: jax.Array
    operator: jax.Array
    update_mask: jax.Array
    confidence: jax.Array
    cost: jax.Array
    gen_before: jax.Array
    relation: jax.Array | None


def pooled_state(scores: Scores, canvas: Canvas) -> jax.Array:
    """Mean contextual state over prompt and canvas, [B, D] f32, from the two separate means."""
    prompt = canvas.prompt_len[:, None].astype(jnp.float32)
    total = jnp.maximum(prompt + canvas.gen_len, 1.0)
    return (prompt * scores.pooled_prompt + canvas.gen_len * scores.pooled_canvas) / total


def paper_step(
    backbone: Backbone,
    options: PaperOptions,
    operators: OperatorParams,
    tables: Tables,
    params: Params,
    context: Any,
    actor: HeadParams,
    critic: HeadParams,
    canvas: Canvas,
    gen_ids: jax.Array,
    t: jax.Array,
    keys: jax.Array,
    *,
    prompt: PromptFacts | None = None,
) -> tuple[jax.Array, PaperRecord]:
    """One step for a batch of rows.

    Args:
        backbone: static bundle of functions.
        options: static switches.
        operators: static operators.
        tables: lookup tables.
        params: backbone parameters.
        context: what `backbone.begin` returned.
        actor: actor parameters.
        critic: critic parameters.
        canvas: the prompts; its own canvas content is not read.
        gen_ids: [B, G] i32, tokens before the step.
        t: [B] f32 noise level of the step.
        keys: [B] typed keys of this step, one per row.
        prompt: precomputed facts about the prompt.

    Returns:
        Tokens after the step [B, G] i32 and the record of the step.
    """
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)  # operator, tokens, noise
    shown = gen_ids
    if options.renoise:
        noise = jax.vmap(lambda key: jax.random.uniform(key, gen_ids.shape[1:]))(keys[:, 2])
        shown = jnp.where(noise < t[:, None], backbone.mask_id, gen_ids)
    scores = backbone.score(params, context, canvas, shown, t)
    summary = summarise_scores(
        backbone.head(params, scores.hidden),
        keys=keys[:, 1] if options.sample_strategy == "sample" else None,
        temperature=options.temperature,
        suppress_id=backbone.suppress_id,
    )
    entropy, token = summary.entropy, summary.sampled
    if options.renoise:
        carried = shown != backbone.mask_id
        entropy = jnp.where(carried, 0.0, entropy)
        token = jnp.where(carried, gen_ids, token)

    relation = None
    if options.fast_critic:
        features = jnp.zeros((gen_ids.shape[0], 11))
    else:
        features, aux = base_features(
            tables,
            canvas.prompt_ids,
            canvas.prompt_len,
            canvas.key_mask,
            gen_ids,
            entropy,
            path=options.path,
            temperature=options.relation_temperature,
            numbers=options.numbers,
            prompt=prompt,
        )
        # The host path of the original stores its relation whatever the switch says.
        if options.save_relation or options.path == "host":
            relation = aux.relation
    if options.use_hidden and backbone.hidden_size > 0:
        features = jnp.concatenate([features, pooled_state(scores, canvas)], axis=1)

    q = heads_apply(critic, features)
    actor_logits = heads_apply(actor, features)
    if options.selection_mode == "sample":
        chosen = jax.vmap(jax.random.categorical)(keys[:, 0], actor_logits).astype(jnp.int32)
    else:
        chosen = jnp.argmax(actor_logits, axis=1).astype(jnp.int32)

    use_strings = not (options.fast_critic and options.fast_operator)
    masks = operator_masks(tables, gen_ids, operators, use_strings)
    if scores.editable is not None:
        masks = masks & scores.editable[:, None]
    executed = select_and_fallback(
        masks, operator_costs(operators), chosen, options.fallback, options.ensure_update
    )
    after = jnp.where(executed.mask, token, gen_ids)
    record = PaperRecord(
        features=features,
        q=q,
        actor_logits=actor_logits,
        chosen=chosen,
        operator=executed.operator,
        update_mask=executed.mask,
        confidence=summary.confidence,
        cost=executed.cost,
        gen_before=gen_ids,
        relation=relation,
    )
    return after, record
