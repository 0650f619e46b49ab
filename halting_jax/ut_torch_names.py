"""Names of a PyTorch Universal Transformer of the original project, and its weights both ways."""

from collections.abc import Mapping

import jax
import numpy as np

from common.errors import require
from common.torch_bridge import Rule, Tensors, export_state, flatten, import_state, linear
from halting_jax.types import Params, TaskShape
from halting_jax.universal_transformer import make_universal_transformer
from halting_jax.ut_settings import UtSettings

LINEAR = linear()


def ut_rules(shape: TaskShape, settings: UtSettings) -> list[Rule]:
    """The name table of a model.

    Args:
      shape: of the task; grids name their readout `decoder`, the other tasks `output_layer`.
      settings: of the model.

    Raises:
      UserError: the original has no such model.
    """
    require(
        settings.conv_size == 0,
        f"PyTorch weights of the original have no convolution (ut.conv_size={settings.conv_size})",
    )
    encoder = "encoder.enc."
    rules = [
        *_attention(f"{encoder}multi_head_attention", "encoder/block/attention"),
        *_feed_forward(f"{encoder}positionwise_feed_forward", "encoder/block/feed_forward"),
        *_norm(f"{encoder}layer_norm_mha", "encoder/block/norm_attention"),
        *_norm(f"{encoder}layer_norm_ffn", "encoder/block/norm_feed_forward"),
        *_norm("encoder.layer_norm", "encoder/norm"),
        *_affine("decoder" if shape.form == "grid" else "output_layer", "readout"),
    ]
    if settings.act:
        rules += _affine("encoder.act_fn.p", "encoder/halting")
    if shape.form in ("grid", "seq2seq"):
        rules.append(Rule("embedding.weight", "embedding/table"))
    else:
        rules += _affine("input_proj", "input_proj")
    if shape.form == "grid" and settings.embedding_size != settings.hidden_size:
        rules.append(Rule("encoder.embedding_proj.weight", "encoder/embedding_proj/kernel", LINEAR))
    if shape.form == "seq2seq":
        decoder = "decoder.dec."
        rules += [
            *_attention(f"{decoder}self_attention", "decoder/block/self_attention"),
            *_attention(f"{decoder}cross_attention", "decoder/block/cross_attention"),
            *_feed_forward(f"{decoder}positionwise_feed_forward", "decoder/block/feed_forward"),
            *_norm(f"{decoder}layer_norm_self", "decoder/block/norm_self"),
            *_norm(f"{decoder}layer_norm_cross", "decoder/block/norm_cross"),
            *_norm(f"{decoder}layer_norm_ffn", "decoder/block/norm_feed_forward"),
            *_norm("decoder.layer_norm", "decoder/norm"),
        ]
    return rules


def _affine(torch_name: str, path: str) -> list[Rule]:
    return [
        Rule(f"{torch_name}.weight", f"{path}/kernel", LINEAR),
        Rule(f"{torch_name}.bias", f"{path}/bias"),
    ]


def _norm(torch_name: str, path: str) -> list[Rule]:
    return [
        Rule(f"{torch_name}.gamma", f"{path}/scale"),
        Rule(f"{torch_name}.beta", f"{path}/bias"),
    ]


def _attention(torch_name: str, path: str) -> list[Rule]:
    return [
        Rule(f"{torch_name}.{part}_linear.weight", f"{path}/{part}/kernel", LINEAR)
        for part in ("query", "key", "value", "output")
    ]


def _feed_forward(torch_name: str, path: str) -> list[Rule]:
    return [rule for fc in ("fc1", "fc2") for rule in _affine(f"{torch_name}.{fc}", f"{path}/{fc}")]


def import_ut(tensors: Mapping[str, np.ndarray], shape: TaskShape, settings: UtSettings) -> Params:
    """Our weights from a PyTorch state dict.

    Args:
      tensors: by PyTorch name.
      shape, settings: of the model.

    Returns:
      nested dictionary of float32 arrays, as `make_universal_transformer(...).init` returns it.

    Raises:
      UserError: a tensor is unknown, missing or mis-shaped; the message names it.
    """
    model = make_universal_transformer(shape, settings)
    expected = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    shapes = {path: tuple(value.shape) for path, value in expected.items()}
    return import_state(tensors, ut_rules(shape, settings), shapes)


def export_ut(params: Params, shape: TaskShape, settings: UtSettings) -> Tensors:
    """A PyTorch state dict from our weights (or gradients, in their own dtype).

    Raises:
      UserError: the weights do not belong to such a model.
    """
    return export_state(params, ut_rules(shape, settings))
