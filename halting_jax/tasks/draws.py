"""Random numbers of generated tasks: one block of random words per row, cut into small integers.

Threefry is the dearest part of making a batch, so every word is used for as much as it can give.
"""

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError, require

# Four digits of base <= 16 from a word of 32 bits are uniform to within 16^4 / 2^32 = 2e-5.
DIGITS_PER_WORD = 4
MAX_BASE = 16


def row_words(key: jax.Array, row_ids: jax.Array, count: int) -> jax.Array:
    """Random words that depend on the key and the row's own number alone.

    Args:
      key: typed RNG key.
      row_ids: int32 [B].
      count: words per row.

    Returns:
      uint32 [B, count].
    """

    def words(row_id: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, row_id), (count,), jnp.uint32)

    return jax.vmap(words)(row_ids)


def integers(words: jax.Array, low: int, high: int) -> jax.Array:
    """Uniform integers low..high, both included; uint32 [...] -> int32 [...]."""
    return low + (words % np.uint32(high - low + 1)).astype(jnp.int32)


def words_for_digits(count: int) -> int:
    """How many words `digits` needs for `count` digits."""
    return -(-count // DIGITS_PER_WORD)


def digits(words: jax.Array, count: int, base: int) -> jax.Array:
    """Uniform integers 0..base-1, four from each word.

    Args:
      words: uint32 [..., words_for_digits(count)].
      count: how many to return.
      base: at most 16.

    Returns:
      int32 [..., count].
    """
    if base > MAX_BASE:
        raise ValueError(f"base {base} is above {MAX_BASE}: four digits would not be uniform")
    powers = np.array([base**place for place in range(DIGITS_PER_WORD)], np.uint32)
    parts = words[..., None] // powers % np.uint32(base)  # [..., words, 4]
    return parts.reshape(*words.shape[:-1], -1)[..., :count].astype(jnp.int32)


def coins(words: jax.Array, count: int) -> jax.Array:
    """Fair bits, 32 from each word; uint32 [B, ceil(count / 32)] -> bool [B, count]."""
    bits = words[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)  # [B, words, 32]
    return bits.reshape(words.shape[0], -1)[:, :count].astype(bool)


def subset(words: jax.Array, sizes: jax.Array) -> jax.Array:
    """A uniformly random subset of the columns, with a given size per row.

    A column belongs to it when fewer than `size` columns have a smaller word: all pairs are
    compared, which at these widths is much cheaper than a sort.

    Args:
      words: uint32 [B, W].
      sizes: int32 [B], 0..W.

    Returns:
      bool [B, W].
    """
    width = words.shape[1]
    index_mask = np.uint32((1 << (width - 1).bit_length()) - 1)
    # The column number in the lowest bits makes the words of a row different from each other.
    unique = (words & ~index_mask) | np.arange(width, dtype=np.uint32)  # [B, W]
    rank = jnp.sum(unique[:, :, None] < unique[:, None, :], axis=1, dtype=jnp.int32)  # [B, W]
    return rank < sizes[:, None]


def normals(words: jax.Array) -> jax.Array:
    """Standard normal numbers, sqrt(2) erfinv(u) of a uniform u in (-1, 1); uint32 -> float32."""
    # 23 bits and a half step: exact in float32 and never -1 or 1, where erfinv is infinite.
    middle = (words >> np.uint32(9)).astype(jnp.float32) + np.float32(0.5)
    uniform = middle * np.float32(2.0**-22) - np.float32(1)
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)


def range_of_split(ranges: dict[str, tuple[int, int]], split: str) -> tuple[int, int]:
    """The range of lengths a split is drawn from.

    Raises:
      UserError: if the task has no such split.
    """
    if split not in ranges:
        raise UserError(f"no split {split!r}: this task has {', '.join(ranges)}")
    return ranges[split]


def checked_range(keys: str, low: int, high: int) -> tuple[int, int]:
    """Returns (low, high) if 1 <= low <= high.

    Args:
      keys: names of both config keys with {} for "min" and "max", for the message.
      low: smallest value.
      high: largest value.

    Raises:
      UserError: if the range is empty or starts below 1.
    """
    require(
        1 <= low <= high,
        f"{keys.format('min')} = {low} and {keys.format('max')} = {high} must be a range that "
        "starts at 1 or above",
    )
    return low, high


def train_and_test_ranges(
    trained: tuple[int, int], tested: tuple[int, int]
) -> dict[str, tuple[int, int]]:
    """Ranges per split: train, val and id alike, and ood where the test range is another one."""
    ranges = {"train": trained, "val": trained, "id": trained}
    return ranges if tested == trained else {**ranges, "ood": tested}
