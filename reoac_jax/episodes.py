"""What one compiled rollout returns, and what the learner reads."""

import flax.struct
import jax

from reoac_jax.backbone.base import Canvas


@flax.struct.dataclass
class Steps:
    """Records of every decision; leading axes [B, T].

    Rows that had finished before step t have active = False there; their other fields are then
    blank (zeros, mask ids) and nothing may be read from them.

    Attributes:
      features: [B, T, F] float32, what actor and critic saw.
      operator: [B, T] int32, index of the executed operator.
      chosen: [B, T] int32, the actor's choice (differs where the fallback ran, paper mode).
      valid: bool [B, T, A], operators that were open to the policy.
      log_prob: [B, T] float32, log-probability of the executed operator when it was drawn.
      q: [B, T, A] float32, the critic's values.
      cost: [B, T] float32, price of the executed operator.
      gen_before: [B, T, G] int32, the canvas before the step.
      written: bool [B, T, G], positions that received a token.
      confidence: [B, T, G] float32, probability of each position's best token.
      active: bool [B, T], the row was still running.
    """

    features: jax.Array
    operator: jax.Array
    chosen: jax.Array
    valid: jax.Array
    log_prob: jax.Array
    q: jax.Array
    cost: jax.Array
    gen_before: jax.Array
    written: jax.Array
    confidence: jax.Array
    active: jax.Array


@flax.struct.dataclass
class Branches:
    """Trials of other operators at some steps of a batch of episodes; S steps, K trials each.

    Attributes:
      step: [B, S] int32, the steps (equal in all rows).
      operator: [B, S, K] int32, the operator that was forced.
      tried: bool [B, S, K]; where False the row had ended or the operator was void.
      cost: [B, S, K] float32, price from the forced decision on.
      estimate: [B, S, K] float32, the critic's value where a trial was cut off; 0 where it ended.
      reward: [B, S, K] float32, grade of the answer; 0 where a trial was cut off.
      final_ids: [B, S, K, G] int32, the canvas at the trial's end.
    """

    step: jax.Array
    operator: jax.Array
    tried: jax.Array
    cost: jax.Array
    estimate: jax.Array
    reward: jax.Array
    final_ids: jax.Array


@flax.struct.dataclass
class Episodes:
    """A batch of finished episodes.

    Attributes:
      canvas: the prompts, with the canvas all masks.
      final_ids: [B, G] int32.
      steps: records of every decision.
      num_steps: [B] int32, decisions taken.
      num_forwards: [B] int32, backbone passes spent on the row: one per decision, and those of
        lookaheads; not those of trials, which only training makes.
      cost: [B] float32, total price.
      relation: [B, P, G] float32 relation of the last step, or None when not saved.
      branches: trials of other operators, or None when there were none.
    """

    canvas: Canvas
    final_ids: jax.Array
    steps: Steps
    num_steps: jax.Array
    num_forwards: jax.Array
    cost: jax.Array
    relation: jax.Array | None
    branches: Branches | None = None
