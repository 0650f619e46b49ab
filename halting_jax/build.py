"""From the config to the task, the model and what is minimised; no maths here."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from halting_jax.act_decode import make_decode
from halting_jax.act_rnn import ActRnnSettings, make_act_rnn
from halting_jax.defaults import FILE_TASKS
from halting_jax.objective import Objective, act_objective, stretches_objective
from halting_jax.pondernet import pondernet_objective
from halting_jax.tasks.factory import make_task
from halting_jax.trm import TrmSettings, make_trm, trm_objective
from halting_jax.types import Batch, Model, Task
from halting_jax.universal_transformer import (
    UtSettings,
    make_greedy_decoder,
    make_universal_transformer,
)

# Keys of the section `task` that are no sizes of a task; the factory refuses any other it does not
# know, so a key without a reader cannot stay.
_NO_SIZES = ("name", "input_proj")


@dataclasses.dataclass(frozen=True)
class Built:
    """What a config describes.

    Attributes:
      task, model: bundles of functions.
      objective: what the training step minimises.
      init_carry: rows [B, ...] the model carries over steps; None for models without.
    """

    task: Task
    model: Model
    objective: Objective
    init_carry: Callable[[Batch], Any] | None = None


def build_task(config: ConfigDict, seq_len: int = 0, vocab_size: int = 0) -> Task:
    """The task of a config; tasks from files need their sizes."""
    if config.task.name in FILE_TASKS:
        return make_task(config.task.name, seq_len=seq_len, vocab_size=vocab_size)
    sizes = {name: value for name, value in config.task.items() if name not in _NO_SIZES}
    return make_task(config.task.name, **sizes)


def build(config: ConfigDict, seq_len: int = 0, vocab_size: int = 0) -> Built:
    """The task, model and objective of a config.

    Args:
      config: finalized tree.
      seq_len, vocab_size: of the data set, for tasks from files.

    Raises:
      UserError: a size does not fit the task.
    """
    task = build_task(config, seq_len, vocab_size)
    if config.model.type == "trm":
        return _recursive(config, task)
    if config.model.type == "universal_transformer":
        model = make_universal_transformer(task.shape, ut_settings(config))
        if task.shape.form == "seq2seq":
            decode = make_greedy_decoder(task.shape, ut_settings(config))
            model = dataclasses.replace(model, decode=decode)
        if model.stretches:
            return Built(task, model, stretches_objective(task, model))
        charged = config.ut.act and not config.act.disable_ponder_cost
        return Built(task, model, act_objective(task, model, config.act.ponder_reduce, charged))
    model = make_act_rnn(task.shape, act_rnn_settings(config))
    if task.shape.form == "seq2seq":
        write = make_decode(task.shape, act_rnn_settings(config))
        model = dataclasses.replace(model, decode=lambda *given: write(*given).tokens)
    if config.act.kind == "pondernet":
        objective = pondernet_objective(task, model, config.act.prior, config.act.kl_weight)
        return Built(task, model, objective)
    charged = config.act.kind == "act" and not config.act.disable_ponder_cost
    return Built(task, model, act_objective(task, model, config.act.ponder_reduce, charged))


def time_penalty_target(config: ConfigDict) -> float:
    """tau of the evaluation: the weight of the ponder cost once its warm-up is over."""
    if config.model.type == "universal_transformer":
        return config.ut.act_loss_weight
    return config.act.time_penalty


def act_rnn_settings(config: ConfigDict) -> ActRnnSettings:
    """Sizes and choices of the config's ACT-RNN."""
    section = config.act
    return ActRnnSettings(
        hidden_size=config.model.hidden_size,
        embedding_size=section.embedding_size,
        cell=section.cell,
        time_limit=section.time_limit,
        epsilon=section.epsilon,
        halt_bias=section.halt_bias,
        lstm_reset_cell=section.lstm_reset_cell,
        input_proj=config.task.input_proj,
        kind=section.kind,
        execution=section.execution,
        chunk=section.chunk,
        dtype=config.model.dtype,
    )


def ut_settings(config: ConfigDict) -> UtSettings:
    """Sizes and choices of the config's Universal Transformer."""
    section = config.ut
    return UtSettings(
        hidden_size=config.model.hidden_size,
        embedding_size=section.embedding_size,
        heads=section.heads,
        key_depth=section.key_depth,
        value_depth=section.value_depth,
        filter_size=section.filter_size,
        conv_size=section.conv_size,
        supervise_every=section.supervise_every,
        max_hops=section.max_hops,
        act=section.act,
        act_epsilon=section.act_epsilon,
        act_mix=section.act_mix,
        act_level=section.act_level,
        halt_bias=section.halt_bias,
        halt_kernel=section.halt_kernel,
        attention_mode=section.attention_mode,
        pos=section.pos,
        remat=section.remat,
        dtype=config.model.dtype,
        attn_impl=section.attn_impl,
    )


def _recursive(config: ConfigDict, task: Task) -> Built:
    section = config.trm
    settings = TrmSettings(
        hidden_size=config.model.hidden_size,
        layers=section.layers,
        heads=section.heads,
        expansion=section.expansion,
        mixer=section.mixer,
        conv_size=section.conv_size,
        inner_cycles=section.inner_cycles,
        cycles=section.cycles,
        supervision_steps=section.supervision_steps,
        halt_exploration=section.halt_exploration,
        halt_at_eval=section.halt_at_eval,
        dtype=config.model.dtype,
    )
    model = make_trm(task.shape, settings)
    objective, init_carry = trm_objective(task, model, settings)
    return Built(task, model, objective, init_carry)


def parameter_count(params: Any) -> int:
    """Number of weights."""
    return sum(int(x.size) for x in jax.tree.leaves(params))
