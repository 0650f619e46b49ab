"""Cross-entropy over the positions that count, with the head on those alone.

An update counts few positions of a canvas, how many is known only at run time, and with a large
vocabulary the head is most of its work. So positions are sorted, counted ones first, and the head
runs on a chunk of them at a time, as many chunks as there are counted positions. A loop of dynamic
length has no reverse mode; the gradient of a chunk is therefore taken in the forward pass, while
its logits are at hand, and the backward pass merely scales it. Logits never exist for more than
one chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax.losses import token_log_probs

CHUNK = 128  # rows per call of the head
Head = Callable[[Params, jax.Array], jax.Array]
Sums = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def counted_loss(
    head: Head, params: Params, hidden: jax.Array, ids: jax.Array, weight: jax.Array
) -> Sums:
    """sum_n weight_n * -log softmax(head(params, hidden_n))[ids_n] where weight_n is not 0.

    Args:
      head: (params, hidden [C, D]) -> logits [C, V]; static.
      params: what the head reads, and nothing else: its gradient is added up chunk by chunk.
      hidden: [N, D].
      ids: [N] int32.
      weight: [N] float32, a constant; 0 = the position does not count.

    Returns:
      The sum, differentiable by params and hidden, and -log p [N] float32 as a constant, 0 where
      the position does not count.
    """
    return _sweep(head, params, hidden, ids, weight, gradient=False)[0]


def _forward(head: Head, *arguments: Any) -> tuple[Sums, tuple[Params, jax.Array]]:
    params, hidden, ids, weight = arguments
    return _sweep(head, params, hidden, ids, weight, gradient=True)


def _backward(head: Head, grads: tuple[Params, jax.Array], cotangent: Sums) -> tuple[Any, ...]:
    del head
    by_params, by_hidden = jax.tree.map(lambda g: (g * cotangent[0]).astype(g.dtype), grads)
    return by_params, by_hidden, None, None


counted_loss.defvjp(_forward, _backward)


def _sweep(
    head: Head,
    params: Params,
    hidden: jax.Array,
    ids: jax.Array,
    weight: jax.Array,
    gradient: bool,
) -> tuple[Sums, tuple[Params, jax.Array]]:
    """((sum, -log p [N]), gradients by params and hidden: zeros unless asked for)."""
    total = hidden.shape[0]
    chunk = min(CHUNK, total)
    counted = weight != 0
    order = jnp.argsort(~counted, stable=True)
    # Indices beyond the last row read zeros and are dropped when written.
    order = jnp.pad(order, (0, -total % chunk), constant_values=total)

    def loss(params: Params, rows: jax.Array, ids: jax.Array, weight: jax.Array) -> Sums:
        nll = jnp.where(weight != 0, -token_log_probs(head(params, rows), ids), 0.0)
        return jnp.sum(weight * nll), nll

    def body(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        value, nll, by_params, by_hidden = carry
        index = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        rows, wanted, factor = (
            jnp.take(x, index, axis=0, mode="fill", fill_value=0) for x in (hidden, ids, weight)
        )
        # Rows that do not count may hold anything, and 0 * NaN in a gradient is NaN.
        rows = jnp.where((factor != 0)[:, None], rows, 0)
        if gradient:
            grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            (part, part_nll), (d_params, d_rows) = grad(params, rows, wanted, factor)
            by_params = jax.tree.map(jnp.add, by_params, d_params)
            by_hidden = by_hidden.at[index].set(d_rows, mode="drop")
        else:
            part, part_nll = loss(params, rows, wanted, factor)
        return value + part, nll.at[index].set(part_nll, mode="drop"), by_params, by_hidden

    start = (
        jnp.float32(0.0),
        jnp.zeros(total, jnp.float32),
        jax.tree.map(jnp.zeros_like, params) if gradient else (),
        jnp.zeros_like(hidden) if gradient else (),
    )
    chunks = (jnp.sum(counted) + chunk - 1) // chunk
    value, nll, by_params, by_hidden = jax.lax.fori_loop(0, chunks, body, start)
    return (value, nll), (by_params, by_hidden)
