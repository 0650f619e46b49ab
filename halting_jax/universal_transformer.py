"""The Universal Transformer: one shared block applied over and over, with or without halting.

    tokens -> embedding -> hops of the shared block -> layer norm -> linear readout

Forms of `TaskShape`: grid (tokens to as many classes), vector (every entry is a position of width
1, mean over the valid ones, one answer), frames (rows of features; every position or the last valid
one answers), seq2seq (an encoder as above and a decoder, see `ut_decoder`). Padding is masked
everywhere: as key of attention, in the halting bookkeeping, in means and in the ponder cost.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from common.errors import require
from halting_jax import ut_act
from halting_jax.signals import Signals, make_signals
from halting_jax.types import Batch, Model, Outputs, Params, Ponder, TaskShape
from halting_jax.ut_act import HaltingRule, HopCarry, HopFunctions
from halting_jax.ut_decoder import EOS, decode_states, greedy_tokens
from halting_jax.ut_network import UniversalTransformer
from halting_jax.ut_settings import UtSettings, check_settings

__all__ = ["UtRows", "UtSettings", "make_greedy_decoder", "make_universal_transformer"]
MODEL_TYPE = "universal_transformer"
HALTING_PATH = r"(^|/)halting/"


@flax.struct.dataclass
class UtRows:
    """Rows on their way through the hops; every leaf starts with the rows B.

    Rows of several batches, at different hops, may stand in one as long as their shapes agree.

    Attributes:
      batch: what the rows are.
      carry: how far they are.
    """

    batch: Batch
    carry: HopCarry


def make_universal_transformer(shape: TaskShape, settings: UtSettings) -> Model:
    """The model as a bundle of functions.

    Args:
      shape: of the task.
      settings: sizes and switches.

    Returns:
      Model. Its `apply` also takes `signals` (Signals of at least the batch's positions and hops)
      in place of the tables of `halting_jax.signals`. With halting it can be run in pieces.

    Raises:
      UserError: the settings do not fit together or not to the task.
    """
    check_settings(shape, settings)
    unbound = UniversalTransformer(shape, settings)

    def tables(batch: Batch, fixed_steps: int = 0) -> Signals:
        length = max(batch.inputs.shape[1], batch.decoder_inputs.shape[1])
        hops = max(settings.max_hops, fixed_steps)
        return make_signals(length, settings.hidden_size, hops, settings.pos)

    def init(key: jax.Array) -> Params:
        return _init(unbound, key)

    def apply(
        params: Params, batch: Batch, fixed_steps: int = 0, signals: Signals | None = None
    ) -> Outputs:
        net = unbound.bind({"params": params})
        signals = tables(batch, fixed_steps) if signals is None else signals
        encoded, ponder = encode(net, batch, signals, fixed_steps)
        return Outputs(_answer(net, batch, encoded, signals), ponder)

    def stretches(params: Params, batch: Batch) -> tuple[jax.Array, Outputs]:
        net, mask, hops = unbound.bind({"params": params}), batch.input_mask, settings.max_hops
        signals, every = tables(batch), settings.supervise_every
        block = hop_functions(net, mask, signals).block

        def stretch(state: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Only the first stretch trains the embedding.
            state = jnp.where(first == 0, state, jax.lax.stop_gradient(state))
            state = ut_act.fixed_hops(state, signals, block, every, settings.remat, first)
            return state, _answer(net, batch, net.encoder_norm(state), signals)

        state = net.embed(batch.inputs, mask)
        state, logits = jax.lax.scan(stretch, state, jnp.arange(0, hops, every))
        return logits, Outputs(logits[-1], ut_act.fixed_ponder(state, mask, hops, charged=False))

    def start(params: Params, batch: Batch) -> UtRows:
        state = unbound.bind({"params": params}).embed(batch.inputs, batch.input_mask)
        return UtRows(batch, ut_act.start(state, batch.input_mask))

    def advance(params: Params, rows: UtRows, count: int) -> UtRows:
        net = unbound.bind({"params": params})
        functions = hop_functions(net, rows.batch.input_mask, tables(rows.batch))
        carry = ut_act.advance(rows.carry, functions, halting_rule(settings), count)
        return UtRows(rows.batch, carry)

    def running(rows: UtRows) -> jax.Array:
        return ut_act.rows_running(rows.carry, settings.max_hops)

    def finish(params: Params, rows: UtRows) -> Outputs:
        net, batch = unbound.bind({"params": params}), rows.batch
        encoded = net.encoder_norm(rows.carry.mixed)
        logits = _answer(net, batch, encoded, tables(batch))
        return Outputs(logits, ut_act.halting_ponder(rows.carry, batch.input_mask))

    model = Model(
        type=MODEL_TYPE,
        init=init,
        apply=apply,
        halting_path=HALTING_PATH if settings.act else "",
        max_steps=settings.max_hops,
    )
    if settings.supervise_every:
        model = dataclasses.replace(model, stretches=stretches)
    if not settings.act:
        return model  # no row is done before the last hop
    return dataclasses.replace(model, start=start, advance=advance, running=running, finish=finish)


def make_greedy_decoder(
    shape: TaskShape, settings: UtSettings, eos: int = EOS
) -> Callable[[Params, Batch, int], jax.Array]:
    """Greedy decoding of the same model, compiled as one loop.

    Args:
      shape: of a seq2seq task.
      settings: of the model.
      eos: token that ends a sequence.

    Returns:
      (params, batch, max_len) -> int32 [B, max_len]: the tokens up to and including `eos`, zeros
      behind it. The first decoder input of every row is read from the batch; max_len is static.

    Raises:
      UserError: the settings do not fit, or the task is no seq2seq task.
    """
    check_settings(shape, settings)
    require(shape.form == "seq2seq", f"a task of form {shape.form} has nothing to decode")
    unbound = UniversalTransformer(shape, settings)

    def decode(params: Params, batch: Batch, max_len: int) -> jax.Array:
        net = unbound.bind({"params": params})
        length = max(batch.inputs.shape[1], max_len)
        signals = make_signals(length, settings.hidden_size, settings.max_hops, settings.pos)
        encoded, _ = encode(net, batch, signals)
        return greedy_tokens(net, batch, encoded, signals, max_len, eos)

    return jax.jit(decode, static_argnums=2)


def halting_rule(settings: UtSettings) -> HaltingRule:
    """The static part of the bookkeeping that these settings ask for."""
    return HaltingRule(settings.max_hops, settings.act_epsilon, settings.act_mix, settings.remat)


def hop_functions(net: UniversalTransformer, mask: jax.Array, signals: Signals) -> HopFunctions:
    """The pieces of a hop.

    Args:
      net: the network, bound to its weights.
      mask: bool [B, S], positions that are there.
      signals: tables.
    """

    def probability(state: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(net.halting_logits(state, mask))

    def block(state: jax.Array) -> jax.Array:
        return net.encoder_block(state, mask)

    return HopFunctions(signals, probability, block)


def encode(
    net: UniversalTransformer, batch: Batch, signals: Signals, fixed_steps: int = 0
) -> tuple[jax.Array, Ponder]:
    """All hops of the encoder.

    Args:
      net: the network, bound to its weights.
      batch: `inputs` and `input_mask` are read.
      signals: tables of at least as many rows as there are positions and hops.
      fixed_steps: > 0 runs that many hops without halting (static).

    Returns:
      the normalised state [B, S, H], and how long every position ran.
    """
    settings, mask = net.settings, batch.input_mask
    state = net.embed(batch.inputs, mask)
    functions = hop_functions(net, mask, signals)
    if settings.act and not fixed_steps:
        rule, carry = halting_rule(settings), ut_act.start(state, mask)
        if settings.execution == "while":
            carry = ut_act.run_out(carry, functions, rule)
        else:
            carry = ut_act.advance(carry, functions, rule, settings.max_hops)
        state, ponder = carry.mixed, ut_act.halting_ponder(carry, mask)
    else:
        hops = fixed_steps or settings.max_hops
        state = ut_act.fixed_hops(state, signals, functions.block, hops, settings.remat)
        ponder = ut_act.fixed_ponder(state, mask, hops, charged=settings.act)
    return net.encoder_norm(state), ponder


def _answer(
    net: UniversalTransformer, batch: Batch, encoded: jax.Array, signals: Signals
) -> jax.Array:
    """Logits of the form the task asks for, from the normalised encoder state [B, S, H]."""
    shape, mask = net.shape, batch.input_mask
    if shape.form == "seq2seq":
        encoded = decode_states(net, batch, encoded, signals)  # [B, T_out, H]
    elif shape.form == "vector":
        count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        encoded = jnp.sum(jnp.where(mask[..., None], encoded, 0), axis=1) / count  # [B, H]
    elif shape.readout == "last":
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # [B]
        encoded = jnp.take_along_axis(encoded, last[:, None, None], axis=1)[:, 0]  # [B, H]
    logits = net.logits(encoded)
    if shape.places > 1:
        return logits.reshape(*logits.shape[:-1], shape.places, shape.classes)
    return logits[..., 0] if shape.classes == 1 else logits


def _init(net: UniversalTransformer, key: jax.Array) -> Params:
    """Weights as the module declares them, from an example of one position."""
    mask = jnp.ones((1, 1), bool)
    if net.shape.form in ("grid", "seq2seq"):
        inputs = jnp.zeros((1, 1), jnp.int32)
    elif net.shape.form == "vector":
        inputs = jnp.zeros((1, 1), jnp.float32)
    else:
        inputs = jnp.zeros((1, 1, net.shape.features), jnp.float32)
    # Compiled as a whole: run op by op it takes seconds.
    return jax.jit(net.init)(key, inputs, mask)["params"]
