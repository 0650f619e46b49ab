"""Sizes and switches of a Universal Transformer, and the check that they fit together."""

import dataclasses
import math

from common.errors import require
from halting_jax.signals import POSITIONS
from halting_jax.types import FORMS, TaskShape

MIXES = ("basic", "accumulated")
LEVELS = ("token", "example")
ATTENTION_MODES = ("auto", "full", "causal")
EXECUTIONS = ("scan", "while")
DTYPES = ("float32", "bfloat16")
ATTENTION_IMPLEMENTATIONS = ("auto", "plain", "xla", "cudnn")
HALT_KERNELS = ("uniform", "zero")


@dataclasses.dataclass(frozen=True)
class UtSettings:
    """Static description of a Universal Transformer.

    Attributes:
      hidden_size: H, width of the state.
      embedding_size: E of grid tokens; E = H needs no projection. Sequences of tokens use E = H.
      heads: they divide key_depth and value_depth.
      key_depth: width of all queries and of all keys together.
      value_depth: width of all values together.
      filter_size: inner width of the position-wise network.
      conv_size: odd width of a depth-wise convolution over the grid inside that network; 0 = none.
      max_hops: most applications of the shared block.
      supervise_every: training scores the answer after so many hops again and again, and cuts the
        gradient there (deep supervision); 0 = once, after the last hop. It divides max_hops.
      act: positions halt by themselves; otherwise every position takes max_hops.
      act_epsilon: a position halts once its mass exceeds 1 - act_epsilon.
      act_mix: "basic" (out <- u x + (1 - u) out, as in tensor2tensor; not convex) or
        "accumulated" (out <- out + u x with sum(u) = 1).
      act_level: "token" or "example": all positions of an example halt together, by the mean of
        their halting logits.
      halt_bias: initial bias of the halting unit.
      halt_kernel: its initial weights, "uniform" or "zero".
      attention_mode: "full", "causal", or "auto", what the task asks for.
      pos: "1d" or "2d" (row and column of a square grid).
      remat: recompute each hop in the backward pass instead of storing its attention.
      execution: "scan", or "while" for inference: it leaves the loop, but has no gradient.
      dtype: of matrix products, "float32" or "bfloat16"; norms, logits and halting are float32.
      attn_impl: "plain" (matrix products), "xla" and "cudnn" (jax.nn.dot_product_attention), or
        "auto": plain on CPU, the fastest that applies on a GPU.
    """

    hidden_size: int = 512
    embedding_size: int = 64
    heads: int = 4
    key_depth: int = 256
    value_depth: int = 256
    filter_size: int = 256
    conv_size: int = 0
    max_hops: int = 6
    supervise_every: int = 0
    act: bool = False
    act_epsilon: float = 0.01
    act_mix: str = "basic"
    act_level: str = "token"
    halt_bias: float = 1.0
    halt_kernel: str = "uniform"
    attention_mode: str = "auto"
    pos: str = "1d"
    remat: bool = False
    execution: str = "scan"
    dtype: str = "float32"
    attn_impl: str = "auto"

    def causal(self, shape: TaskShape) -> bool:
        """Whether positions see only those before them."""
        if self.attention_mode == "auto":
            return shape.causal
        return self.attention_mode == "causal"


def check_settings(shape: TaskShape, settings: UtSettings) -> None:
    """Refuses settings that cannot work together.

    Raises:
      UserError: names the config key.
    """
    choices = {
        "ut.act_mix": (settings.act_mix, MIXES),
        "ut.act_level": (settings.act_level, LEVELS),
        "ut.attention_mode": (settings.attention_mode, ATTENTION_MODES),
        "ut.halt_kernel": (settings.halt_kernel, HALT_KERNELS),
        "ut.pos": (settings.pos, POSITIONS),
        "ut.execution": (settings.execution, EXECUTIONS),
        "ut.attn_impl": (settings.attn_impl, ATTENTION_IMPLEMENTATIONS),
        "model.dtype": (settings.dtype, DTYPES),
        "task form": (shape.form, FORMS),
        "task readout": (shape.readout, ("positions", "last")),
    }
    for name, (value, allowed) in choices.items():
        require(value in allowed, f"{name}={value!r} is none of {', '.join(allowed)}")
    for name in (
        "hidden_size",
        "embedding_size",
        "heads",
        "key_depth",
        "value_depth",
        "filter_size",
        "max_hops",
    ):
        value = getattr(settings, name)
        require(value >= 1, f"ut.{name}={value} must be at least 1")
    for name in ("key_depth", "value_depth"):
        value = getattr(settings, name)
        require(
            value % settings.heads == 0,
            f"ut.{name}={value} must be a multiple of ut.heads={settings.heads}",
        )
    require(
        0.0 < settings.act_epsilon < 1.0,
        f"ut.act_epsilon={settings.act_epsilon} must lie between 0 and 1",
    )
    require(
        settings.attn_impl not in ("xla", "cudnn") or settings.key_depth == settings.value_depth,
        f"ut.attn_impl={settings.attn_impl} needs ut.key_depth equal to ut.value_depth; "
        "set ut.attn_impl=plain",
    )
    require(
        settings.attn_impl != "cudnn" or settings.dtype == "bfloat16",
        "ut.attn_impl=cudnn needs model.dtype=bfloat16",
    )
    every = settings.supervise_every
    require(
        every >= 0 and (not every or settings.max_hops % every == 0),
        f"ut.supervise_every={every} does not divide ut.max_hops={settings.max_hops}",
    )
    require(not every or not settings.act, "ut.supervise_every needs ut.act=False")
    require(
        settings.conv_size == 0 or settings.conv_size % 2 == 1,
        f"ut.conv_size={settings.conv_size} must be odd, or 0 for none",
    )
    require(
        settings.conv_size == 0
        or (shape.form == "grid" and math.isqrt(shape.length) ** 2 == shape.length),
        "ut.conv_size needs a square grid; set ut.conv_size=0 for this task",
    )
    require(
        settings.pos == "1d" or shape.form == "grid",
        f"ut.pos=2d needs a grid, this task's form is {shape.form}; use ut.pos=1d",
    )
