"""Copy, reverse and string addition: token sequences to token sequences, teacher forced.

Tokens: 0 padding, 1 begin, 2 end, then symbols. The source is the symbols and the end token, the
target likewise, the decoder input is the begin token and the target without its end; its valid
positions are those of the target mask. Every target token counts, the end token too.

Copy and reverse, paper encoding (Universal Transformer, section 3.4 of 2018): ten decimal symbols;
in training the whole sequence starts at a random position, so that a model with absolute positions
sees those of the longer test sequences. Here that is padding in front of source, decoder input and
target alike. Original encoding: eight symbols, always at position 0.

String addition: characters of "a+b" or "a+b+c", the target is the sum; no leading zeros.
"""

import jax
import jax.numpy as jnp

from common.errors import require
from halting_jax import losses
from halting_jax.tasks import digits as decimal
from halting_jax.tasks import draws
from halting_jax.types import Batch, Metrics, Ratio, Task, TaskShape

ENCODINGS = ("paper", "original")
PAD, BOS, EOS = 0, 1, 2
FIRST_SYMBOL = 3
SYMBOLS = {"paper": 10, "original": 8}
PLUS = 3
FIRST_DIGIT = 4
ADDITION_VOCAB = 14
OOD_FACTOR = 10


def _written(symbols: jax.Array, counts: jax.Array, offset: jax.Array, width: int) -> jax.Array:
    """Writes symbols and the end token behind `offset` padding tokens.

    Args:
      symbols: int32 [B, N], content beyond `counts` is ignored.
      counts: int32 [B].
      offset: int32 [B].
      width: of the result, at least N + 1 + the largest offset.

    Returns:
      int32 [B, width].
    """
    index = jnp.arange(width, dtype=jnp.int32) - offset[:, None]  # [B, width]
    inside = jnp.clip(index, 0, symbols.shape[1] - 1)
    tokens = jnp.take_along_axis(symbols, inside, axis=1)
    tokens = jnp.where(index < counts[:, None], tokens, EOS)
    return jnp.where((index >= 0) & (index <= counts[:, None]), tokens, PAD)


def _decoder_inputs(targets: jax.Array, mask: jax.Array, offset: jax.Array) -> jax.Array:
    """Shifts [B, T] targets by one behind the begin token at `offset`; padding where masked."""
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    first = jnp.arange(targets.shape[1]) == offset[:, None]
    return jnp.where(mask, jnp.where(first, BOS, shifted), PAD)


def _batch(
    source: jax.Array, targets: jax.Array, offset: jax.Array, difficulty: jax.Array
) -> Batch:
    """Masks are the tokens that are no padding: no symbol has its number."""
    mask = targets != PAD
    return Batch(
        inputs=source,
        input_mask=source != PAD,
        targets=targets,
        target_mask=mask,
        decoder_inputs=_decoder_inputs(targets, mask, offset),
        difficulty=difficulty,
    )


def encode_symbols(
    symbols: jax.Array, counts: jax.Array, offset: jax.Array, width: int, reverse: bool
) -> Batch:
    """Source, target and decoder input of copy or reverse.

    Args:
      symbols: int32 [B, N], 0-based; content beyond `counts` is ignored.
      counts: int32 [B], 1..N.
      offset: int32 [B], padding tokens in front.
      width: of the arrays, at least N + 1 + the largest offset.
      reverse: last symbol first in the target.

    Returns:
      Batch with int32 [B, width] arrays; difficulty is the number of symbols.
    """
    tokens = symbols.astype(jnp.int32) + FIRST_SYMBOL
    source = _written(tokens, counts, offset, width)
    if not reverse:
        return _batch(source, source, offset, counts)
    index = counts[:, None] - 1 - jnp.arange(symbols.shape[1], dtype=jnp.int32)
    turned = jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1)
    return _batch(source, _written(turned, counts, offset, width), offset, counts)


def encode_sum(digits: jax.Array, counts: jax.Array, terms: jax.Array) -> Batch:
    """Source, target and decoder input of string addition.

    Args:
      digits: int32 [B, M, D], most significant first; content beyond `counts` is ignored.
      counts: int32 [B, M], digits per number, 1..D.
      terms: int32 [B], numbers added, 1..M.

    Returns:
      Batch with inputs int32 [B, M (D + 1)], targets int32 [B, K + 1], K places of the largest sum;
      difficulty is the digit count of the longest number.
    """
    rows, max_terms, max_digits = digits.shape
    used = jnp.arange(max_terms) < terms[:, None]  # [B, M]
    sizes = jnp.where(used, counts + 1, 0)  # with the sign or the end token behind
    ends = jnp.cumsum(sizes, axis=1)  # [B, M]
    position = jnp.arange(max_terms * (max_digits + 1), dtype=jnp.int32)
    source = jnp.full((rows, position.shape[0]), PAD, jnp.int32)
    for term in range(max_terms):
        index = position - (ends - sizes)[:, term, None]  # [B, S], position inside the number
        inside = jnp.clip(index, 0, max_digits - 1)
        tokens = jnp.take_along_axis(digits[:, term], inside, axis=1) + FIRST_DIGIT
        behind = jnp.where(terms == term + 1, EOS, PLUS)[:, None]
        tokens = jnp.where(index < counts[:, term, None], tokens, behind)
        own = (index >= 0) & (index < sizes[:, term, None])
        source = jnp.where(own, tokens, source)

    places = decimal.places_of_sum(max_digits, max_terms)
    columns = decimal.least_significant_first(digits, counts, places)  # [B, M, K]
    columns = jnp.sum(jnp.where(used[..., None], columns, 0), axis=1, dtype=jnp.int32)  # [B, K]
    total, size = decimal.most_significant_first(decimal.carry(columns))
    start = jnp.zeros((rows,), jnp.int32)
    targets = _written(total + FIRST_DIGIT, size, start, places + 1)
    return _batch(source, targets, start, jnp.max(jnp.where(used, counts, 0), axis=1))


def _make_symbols(
    name: str,
    encoding: str,
    train_min_length: int,
    train_max_length: int,
    eval_min_length: int,
    eval_max_length: int,
    position_offset: int,
) -> Task:
    """Copy and reverse, see make_copy."""
    require(
        encoding in ENCODINGS, f"task.encoding = {encoding!r} must be one of {', '.join(ENCODINGS)}"
    )
    trained = draws.checked_range("task.train_{}_length", train_min_length, train_max_length)
    tested = draws.checked_range("task.eval_{}_length", eval_min_length, eval_max_length)
    ranges = draws.train_and_test_ranges(trained, tested)
    if position_offset < 0:
        room = max(eval_max_length - train_max_length, 0)
        position_offset = room if encoding == "paper" else 0
    base = SYMBOLS[encoding]

    def sample(key: jax.Array, row_ids: jax.Array, split: str = "train") -> Batch:
        low, high = draws.range_of_split(ranges, split)
        farthest = position_offset if split in ("train", "val") else 0
        words = draws.row_words(key, row_ids, 2 + draws.words_for_digits(high))
        counts = draws.integers(words[:, 0], low, high)
        offset = draws.integers(words[:, 1], 0, farthest)
        symbols = draws.digits(words[:, 2:], high, base)  # [B, high]
        return encode_symbols(symbols, counts, offset, high + 1 + farthest, name == "reverse")

    return Task(
        name=name,
        shape=TaskShape(
            form="seq2seq",
            length=train_max_length + 1 + position_offset,
            features=base + FIRST_SYMBOL,
            classes=base + FIRST_SYMBOL,
        ),
        sample=sample,
        example_loss=example_loss,
        metrics=metrics,
        example_correct=example_correct,
        eval_sets=tuple(split for split in ranges if split not in ("train", "val")),
        selection_metric="sequence_accuracy",
    )


def make_copy(
    encoding: str = "paper",
    train_min_length: int = 1,
    train_max_length: int = 40,
    eval_min_length: int = 1,
    eval_max_length: int = 400,
    position_offset: int = -1,
) -> Task:
    """Makes the copy task; the set "ood" exists when its range differs from training's.

    Args:
      encoding: "paper" (10 symbols) or "original" (8 symbols).
      train_min_length: fewest symbols of training, validation and the set "id".
      train_max_length: most symbols there.
      eval_min_length: fewest symbols of the set "ood".
      eval_max_length: most symbols there.
      position_offset: most padding tokens in front of a training sequence, which makes the arrays
        of training as much wider; -1 = up to the longest test sequence in the paper encoding and
        none in the original. Models without absolute positions need none.

    Raises:
      UserError: if a range is empty or the encoding is unknown.
    """
    lengths = (train_min_length, train_max_length, eval_min_length, eval_max_length)
    return _make_symbols("copy", encoding, *lengths, position_offset)


def make_reverse(
    encoding: str = "paper",
    train_min_length: int = 1,
    train_max_length: int = 40,
    eval_min_length: int = 1,
    eval_max_length: int = 400,
    position_offset: int = -1,
) -> Task:
    """Makes the reverse task; arguments and errors as for make_copy."""
    lengths = (train_min_length, train_max_length, eval_min_length, eval_max_length)
    return _make_symbols("reverse", encoding, *lengths, position_offset)


def make_string_addition(max_digits: int = 5, max_terms: int = 2, test_max_digits: int = 0) -> Task:
    """Makes the string addition task; "ood" exists when it has more digits than training.

    Args:
      max_digits: most digits per number in training, validation and the set "id".
      max_terms: most numbers in a sum; how many is uniform in 2..max_terms.
      test_max_digits: most digits in the set "ood"; 0 = 10 max_digits.

    Raises:
      UserError: if a size is too small.
    """
    require(max_digits >= 1, f"task.max_digits = {max_digits} must be at least 1")
    require(max_terms >= 2, f"task.max_terms = {max_terms} must be at least 2")
    longest = test_max_digits or OOD_FACTOR * max_digits
    require(
        longest >= max_digits,
        f"task.test_max_digits = {longest} must be at least task.max_digits = {max_digits}",
    )
    ranges = draws.train_and_test_ranges((1, max_digits), (1, longest))

    def sample(key: jax.Array, row_ids: jax.Array, split: str = "train") -> Batch:
        low, high = draws.range_of_split(ranges, split)
        words_per_number = 2 + draws.words_for_digits(high)
        words = draws.row_words(key, row_ids, 1 + max_terms * words_per_number)
        terms = draws.integers(words[:, 0], 2, max_terms)  # [B]
        words = words[:, 1:].reshape(-1, max_terms, words_per_number)
        counts = draws.integers(words[..., 0], low, high)  # [B, M]
        digits = draws.digits(words[..., 2:], high, 10)  # [B, M, D]
        leading = draws.integers(words[..., 1], 1, 9)  # [B, M]
        digits = digits.at[..., 0].set(leading)
        return encode_sum(digits, counts, terms)

    return Task(
        name="string_addition",
        shape=TaskShape(
            form="seq2seq",
            length=max_terms * (max_digits + 1),
            features=ADDITION_VOCAB,
            classes=ADDITION_VOCAB,
        ),
        sample=sample,
        example_loss=example_loss,
        metrics=metrics,
        example_correct=example_correct,
        eval_sets=tuple(split for split in ranges if split not in ("train", "val")),
        selection_metric="sequence_accuracy",
    )


def example_loss(logits: jax.Array, batch: Batch) -> Ratio:
    """Cross-entropy over the target tokens; logits [B, T_out, V] -> Ratio of [B] arrays."""
    return losses.masked_cross_entropy(logits, batch.targets, batch.target_mask)


def metrics(logits: jax.Array, batch: Batch) -> Metrics:
    """`char_accuracy`, `sequence_accuracy`, `sequence_error`; logits [B, T_out, V]."""
    correct = losses.correct_classes(logits, batch.targets)
    return losses.sequence_metrics(correct, batch.target_mask, "char_accuracy", "sequence_accuracy")


def example_correct(logits: jax.Array, batch: Batch) -> jax.Array:
    """bool [B]: every target token is right; logits [B, T_out, V]."""
    correct = losses.correct_classes(logits, batch.targets)
    return losses.all_correct(correct, batch.target_mask)
