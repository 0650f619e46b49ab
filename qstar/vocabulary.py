"""Two tokenizers: are they equal, which tokens do they share, which ids end a text.

Equal tokenizers share one vocabulary and both rows of logits are cut to its size. Otherwise
("exact" alignment) both models are laid out over the same columns: common tokens first, then
those of pi_theta alone, then those of pi_t alone. A model that lacks a column is -inf there, so
each keeps the normaliser of its own real vocabulary; embedding rows beyond a tokenizer's size
disappear.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError

_ABSENT = -1
_UNDERFLOW = 1e4  # nats


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The columns of two aligned vocabularies.

    Attributes:
        tokens: the common tokens, in the order of pi_theta's ids.
        columns_theta, columns_t: int32 [U], each model's own id per column, -1 = none.
    """

    tokens: tuple[str, ...]
    columns_theta: np.ndarray
    columns_t: np.ndarray

    @property
    def allowed(self) -> np.ndarray:
        """[U] bool, the columns that both models can read."""
        return np.arange(len(self.columns_theta)) < len(self.tokens)


def same_vocabulary(theta: Mapping[str, int], t: Mapping[str, int]) -> bool:
    """Whether two token -> id maps are equal in full."""
    return dict(theta) == dict(t)


def require_same(theta: Mapping[str, int], t: Mapping[str, int]) -> None:
    """Refuses two different tokenizers.

    Raises:
        UserError: with both sizes and three differing tokens.
    """
    if same_vocabulary(theta, t):
        return
    different = sorted(k for k in {*theta, *t} if theta.get(k, _ABSENT) != t.get(k, _ABSENT))
    shown = ", ".join(
        f"{token!r} ({theta.get(token, 'none')} / {t.get(token, 'none')})"
        for token in different[:3]
    )
    raise UserError(
        f"the tokenizers differ ({len(theta)} and {len(t)} tokens; e.g. {shown}): use models with "
        "one tokenizer, or model.vocab_align=exact to mix over their common tokens"
    )


def align(theta: Mapping[str, int], t: Mapping[str, int]) -> Alignment:
    """Lays two vocabularies out over common columns.

    Raises:
        UserError: if they have no token in common.
    """
    ordered = sorted(theta, key=theta.__getitem__)
    common = tuple(token for token in ordered if token in t)
    if not common:
        raise UserError("model.vocab_align=exact: the tokenizers have no token in common")
    only_theta = [theta[token] for token in ordered if token not in t]
    only_t = sorted(t[token] for token in t if token not in theta)
    none_theta, none_t = [_ABSENT] * len(only_t), [_ABSENT] * len(only_theta)
    return Alignment(
        common,
        np.array([theta[k] for k in common] + only_theta + none_theta, np.int32),
        np.array([t[k] for k in common] + none_t + only_t, np.int32),
    )


def take_columns(logits: jax.Array, columns: np.ndarray | jax.Array) -> jax.Array:
    """Logits [B, W] of one model over aligned columns [U] -> [B, U], -inf where it has none."""
    columns = jnp.asarray(columns)
    taken = jnp.take(logits, jnp.maximum(columns, 0), axis=-1)
    return jnp.where(columns == _ABSENT, -jnp.inf, taken)


def merge_columns(logits: jax.Array, columns: Sequence[int], temperature: float = 1.0) -> jax.Array:
    """Gives the first of several columns the probability of all; the others get none.

    For end-of-text ids: without it a pair that ends with different symbols hardly ever stops. The
    others become finite logits whose probability underflows to 0: solvers take a slower way where
    they meet -inf.

    Args:
        logits: [B, V] of one model.
        columns: the ids, the one that is to stand for all first.
        temperature: the probabilities to be added are those at this temperature; 0 counts as 1.
    """
    temperature = temperature or 1.0
    index = np.asarray(columns)
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits = logits.astype(dtype)
    merged = temperature * jax.nn.logsumexp(logits[:, index] / temperature, axis=-1)
    floor = jnp.max(logits, axis=-1, keepdims=True) - _UNDERFLOW * temperature
    return logits.at[:, index].set(floor).at[:, index[0]].set(merged)
