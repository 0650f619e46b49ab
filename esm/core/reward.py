"""What an answer is worth: correctness, less a small price for its length."""

import jax
import jax.numpy as jnp


def reward(
    correct: jax.Array, num_tokens: jax.Array, max_tokens: int | jax.Array, eta0: float | jax.Array
) -> jax.Array:
    """R = correct - eta0 * num_tokens / max(1, max_tokens).

    Args:
        correct: [B] bool.
        num_tokens: [B] int, generated tokens, the end token included.
        max_tokens: budget of a rollout.
        eta0: price of a whole budget.

    Returns:
        [B], float64 in a scope of double precision and float32 otherwise.
    """
    dtype = jnp.result_type(float)
    share = num_tokens.astype(dtype) / jnp.maximum(1, max_tokens)
    return correct.astype(dtype) - eta0 * share
