"""Greedy decoding with an ACT-RNN: the next token is the most likely one, until the end token."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from common.errors import UserError
from halting_jax.act import act
from halting_jax.act_networks import ActRnnSettings, TranslationNetwork
from halting_jax.act_rnn import make_network
from halting_jax.cells import State
from halting_jax.types import Batch, Params, TaskShape

PAD, BOS, EOS = 0, 1, 2


class Decoded(NamedTuple):
    """What was decoded.

    Attributes:
      tokens: int32 [B, max_len], up to and with the end token, pad behind it.
      steps: float32 [B, max_len], inner steps spent on each token, 0 behind the end.
      executed: int32 [], inner steps computed, encoder included.
    """

    tokens: jax.Array
    steps: jax.Array
    executed: jax.Array


class _Writing(NamedTuple):
    """Carry of the loop: next position [], last token [B], which rows still write [B], ..."""

    position: jax.Array
    token: jax.Array
    writing: jax.Array
    state: State
    result: Decoded


def make_decode(
    shape: TaskShape, settings: ActRnnSettings
) -> Callable[[Params, Batch, int], Decoded]:
    """decode(params, batch, max_len), compiled once per batch shape and max_len.

    Only the source of the batch is read. The loop ends when every row has written its end token.

    Raises:
      UserError: the task is not one of token sequences.
    """
    network = make_network(shape, settings)
    if not isinstance(network, TranslationNetwork):
        raise UserError(f"decoding works for seq2seq tasks, not for form '{shape.form}'")

    def run(params: Params, method: str, *args: Any) -> Any:
        return network.apply({"params": params}, *args, method=method)

    @functools.partial(jax.jit, static_argnums=2)
    def decode(params: Params, batch: Batch, max_len: int) -> Decoded:
        table = run(params, "token_products")
        encoded = run(params, "encode", table, batch.inputs, batch.input_mask)
        rows = batch.inputs.shape[0]

        def body(loop: _Writing) -> _Writing:
            at, result = loop.position, loop.result
            call = act(
                params["act"],
                table[loop.token],
                loop.state,
                settings.act,
                valid=loop.writing,
                fixed_steps=settings.fixed_steps(0),
            )
            best = jnp.argmax(run(params, "logits", call.state[0]), axis=-1).astype(jnp.int32)
            token = jnp.where(loop.writing, best, PAD)
            return _Writing(
                position=at + 1,
                token=token,
                writing=loop.writing & (token != EOS),
                state=call.state,
                result=Decoded(
                    tokens=result.tokens.at[:, at].set(token),
                    steps=result.steps.at[:, at].set(call.steps.astype(jnp.float32)),
                    executed=result.executed + call.executed,
                ),
            )

        def go_on(loop: _Writing) -> jax.Array:
            return (loop.position < max_len) & jnp.any(loop.writing)

        start = _Writing(
            position=jnp.int32(0),
            token=jnp.full((rows,), BOS, jnp.int32),
            writing=jnp.any(batch.input_mask, axis=1),
            state=run(params, "decoder_state", encoded),
            result=Decoded(
                tokens=jnp.full((rows, max_len), PAD, jnp.int32),
                steps=jnp.zeros((rows, max_len), jnp.float32),
                executed=encoded.executed,
            ),
        )
        return lax.while_loop(go_on, body, start).result

    return decode
