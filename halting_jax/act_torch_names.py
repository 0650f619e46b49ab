"""Names of ACT-RNN weights in PyTorch checkpoints, and the exchange in both directions."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from common.torch_bridge import Rule, Tensors, export_state, flatten, import_state, linear
from halting_jax.act_networks import ActRnnSettings
from halting_jax.act_rnn import make_act_rnn
from halting_jax.types import TaskShape


def _linear_rules(torch_name: str, path: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{torch_name}.weight", f"{path}/kernel", linear()),
        Rule(f"{torch_name}.bias", f"{path}/bias"),
    )


def unit_rules(torch_prefix: str = "", path: str = "act/", halting: bool = True) -> Sequence[Rule]:
    """Names of one ACT module: cell and halting layer.

    Args:
      torch_prefix: in front of `rnn_cell` and `halting_layer`, e.g. "cell.".
      path: in front of `cell` and `halting` in our tree.
      halting: whether there is a halting unit.
    """
    cell = f"{torch_prefix}rnn_cell"
    rules: tuple[Rule, ...] = (
        Rule(f"{cell}.weight_ih", f"{path}cell/input/kernel", linear()),
        Rule(f"{cell}.weight_hh", f"{path}cell/state/kernel", linear()),
        Rule(f"{cell}.bias_ih", f"{path}cell/input/bias"),
        Rule(f"{cell}.bias_hh", f"{path}cell/state/bias"),
    )
    if halting:
        rules += _linear_rules(f"{torch_prefix}halting_layer", f"{path}halting")
    return rules


def act_rules(shape: TaskShape, settings: ActRnnSettings) -> Sequence[Rule]:
    """The name table of a model.

    Args:
      shape: of its task: mazes call the linear layer before the cell `encoder` and the readout
        `decoder`, the others `input_proj` and `output_layer`. The ACT module is `cell` in mazes
        and where it reads bits directly, else `rnn_cell`.
      settings: sizes and choices.
    """
    grid = shape.form == "grid"
    bare = shape.form == "vector" and not settings.input_proj
    prefix = "cell." if grid or bare else "rnn_cell."
    rules = [
        *unit_rules(prefix, halting=settings.kind != "none"),
        *_linear_rules("decoder" if grid else "output_layer", "readout"),
    ]
    if grid or shape.form == "seq2seq":
        rules.append(Rule("embedding.weight", "embedding"))
    if grid or settings.input_proj:
        rules.extend(_linear_rules("encoder" if grid else "input_proj", "context"))
    if shape.form == "seq2seq":
        rules.extend(_linear_rules("encoder_summary", "summary"))
    return rules


def import_act_rnn(
    tensors: Mapping[str, np.ndarray], shape: TaskShape, settings: ActRnnSettings
) -> dict[str, Any]:
    """Parameters from the tensors of a PyTorch state dict.

    Raises:
      UserError: a tensor is unknown, missing or mis-shaped; the message names it.
    """
    init = make_act_rnn(shape, settings).init
    expected = flatten(jax.eval_shape(init, jax.random.key(0)))
    shapes = {path: tuple(leaf.shape) for path, leaf in expected.items()}
    return import_state(tensors, act_rules(shape, settings), shapes)


def export_act_rnn(
    params: Mapping[str, Any], shape: TaskShape, settings: ActRnnSettings
) -> Tensors:
    """Tensors under the names of the PyTorch module; inverse of `import_act_rnn`."""
    return export_state(params, act_rules(shape, settings))
