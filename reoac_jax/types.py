"""Small structures that several modules of reoac_jax exchange."""

from typing import Any, NamedTuple

import jax

# A leaf of a batch that is built on the host and used on devices: NumPy or jax.Array.
BatchArray = Any

OPERATORS = ("O_NUM", "O_OP", "O_SCOPE", "O_BRANCH", "O_FAST")


class SpecialIds(NamedTuple):
    """Token ids with a role. A role that the tokenizer lacks is -1."""

    eos_id: int
    pad_id: int
    bos_id: int
    mask_id: int


class BackboneOutput(NamedTuple):
    """What a backbone says about a batch at K positions (K = L when none were chosen).

    Attributes:
      logits: [B, K, V] float32, the head's raw output.
      log_probs: [B, K, V] float32, SUBS-normalised: the mask id excluded, decoded tokens carried.
      hidden: [B, K, D] contextual states.
      aux: further arrays by name.
    """

    logits: jax.Array
    log_probs: jax.Array
    hidden: jax.Array
    aux: dict[str, jax.Array]
