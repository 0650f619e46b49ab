"""Logic: chains of binary gates, one chain per row of a sequence (Graves 2016, section 3.2).

Paper encoding: a row has b_0, b_1 and up to 10 one-hot chunks, the gates T_1..T_B in order of use;
b_{i+1} = T_i(b_i, b_{i-1}), and the answer of the row is b_{B+1}. Only the first row shows b_0: in
every later row it is the answer of the row before and the input holds 0. Every row is scored.

Original encoding: a row has a, b and one gate at slot 10 x id of 100; a is the value computed so
far, b is new, and the answer, the value after the last row, is scored there alone. Since a is
written into the input, the last row alone decides the answer.
"""

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import require
from halting_jax import losses
from halting_jax.tasks import draws
from halting_jax.types import Batch, Metrics, Ratio, Task, TaskShape

ENCODINGS = ("paper", "original")
# Truth tables for (P, Q) = TT, TF, FT, FF, in the order of the one-hot slots.
PAPER_GATES = {
    "NOR": "FFFT",
    "xq": "FFTF",
    "ABJ": "FTFF",
    "XOR": "FTTF",
    "NAND": "FTTT",
    "AND": "TFFF",
    "XNOR": "TFFT",
    "if/then": "TFTT",
    "then/if": "TTFT",
    "OR": "TTTF",
}
ORIGINAL_GATES = {
    "AND": "TFFF",
    "OR": "TTTF",
    "XOR": "FTTF",
    "NAND": "FTTT",
    "NOR": "FFFT",
    "XNOR": "TFFT",
    "A": "TTFF",
    "B": "TFTF",
    "not A": "FFTT",
    "not B": "FTFT",
}
GATES = 10
MAX_CHUNKS = 10


def _packed(tables: dict[str, str]) -> np.ndarray:
    """Truth tables as integers: bit 2 P + Q of entry g is the value of gate g at (P, Q)."""
    return np.array(
        [sum((row[3 - bit] == "T") << bit for bit in range(4)) for row in tables.values()],
        np.int32,
    )


_PAPER = _packed(PAPER_GATES)
_ORIGINAL = _packed(ORIGINAL_GATES)


def _apply(tables: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    """Value of each gate, given its packed table; int32, bool, bool [...] -> bool [...]."""
    return (tables >> (2 * p.astype(jnp.int32) + q.astype(jnp.int32)) & 1).astype(bool)


def _chain(first: jax.Array, if_false: jax.Array, if_true: jax.Array) -> jax.Array:
    """Follows y_t = if_true[t] if y_{t-1} else if_false[t] from y_{-1} = first.

    Both answers of every row are computed at once, so that only this choice is sequential.

    Args:
      first: bool [B].
      if_false: bool [B, T].
      if_true: bool [B, T].

    Returns:
      bool [B, T + 1], `first` included.
    """

    def step(value: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value = jnp.where(value, row[1], row[0])
        return value, value

    _, values = jax.lax.scan(step, first, (if_false.T, if_true.T), unroll=min(8, if_true.shape[1]))
    return jnp.concatenate([first[:, None], values.T], axis=1)


def _batch(
    rows: jax.Array, answers: jax.Array, lengths: jax.Array, scored: jax.Array, gates: jax.Array
) -> Batch:
    """Masks rows beyond `lengths`; rows [B, T, F], answers bool, scored bool [B, T], gates [B]."""
    valid = jnp.arange(rows.shape[1]) < lengths[:, None]  # [B, T]
    scored = scored & valid
    return Batch(
        inputs=jnp.where(valid[..., None], rows, 0).astype(jnp.float32),
        input_mask=valid,
        targets=(answers & scored).astype(jnp.int32),
        target_mask=scored,
        decoder_inputs=jnp.zeros((rows.shape[0], 0), jnp.int32),
        difficulty=gates.astype(jnp.int32),
    )


def encode_paper(
    first: jax.Array, second: jax.Array, gates: jax.Array, counts: jax.Array, lengths: jax.Array
) -> Batch:
    """Rows and answers of the paper.

    Args:
      first: bool [B], b_0 of the first row.
      second: bool [B, T], b_1 of every row.
      gates: int32 [B, T, C], numbers in the order of PAPER_GATES; ignored beyond `counts`.
      counts: int32 [B, T], gates per row, 1..C.
      lengths: int32 [B], rows per sequence.

    Returns:
      Batch with inputs [B, T, 2 + 10 C]; difficulty is the largest number of gates in a row.
    """
    chunks = gates.shape[-1]
    tables = jnp.asarray(_PAPER)[gates]  # [B, T, C]

    def answer(start: jax.Array) -> jax.Array:
        previous, current = start, second
        for i in range(chunks):
            value = _apply(tables[..., i], current, previous)
            used = i < counts
            previous, current = jnp.where(used, current, previous), jnp.where(used, value, current)
        return current

    values = _chain(first, answer(jnp.zeros_like(second)), answer(jnp.ones_like(second)))
    used = jnp.arange(chunks) < counts[..., None]  # [B, T, C]
    one_hot = (gates[..., None] == jnp.arange(GATES)) & used[..., None]  # [B, T, C, 10]
    shown = first[:, None] & (jnp.arange(second.shape[1]) == 0)  # [B, T]
    rows = jnp.concatenate(
        [shown[..., None], second[..., None], one_hot.reshape(*second.shape, -1)], axis=-1
    )
    valid = jnp.arange(second.shape[1]) < lengths[:, None]
    most = jnp.max(jnp.where(valid, counts, 0), axis=1)  # [B]
    return _batch(rows, values[:, 1:], lengths, jnp.ones_like(second), most)


def encode_original(
    first: jax.Array, operands: jax.Array, gates: jax.Array, lengths: jax.Array
) -> Batch:
    """Rows and answers of the original generator.

    Args:
      first: bool [B], a of the first row.
      operands: bool [B, T], b of every row.
      gates: int32 [B, T], numbers in the order of ORIGINAL_GATES.
      lengths: int32 [B], rows per sequence.

    Returns:
      Batch with inputs [B, T, 102]; difficulty is the number of gates, that is of rows.
    """
    tables = jnp.asarray(_ORIGINAL)[gates]  # [B, T]
    if_false = _apply(tables, jnp.zeros_like(operands), operands)
    if_true = _apply(tables, jnp.ones_like(operands), operands)
    values = _chain(first, if_false, if_true)  # [B, T + 1]
    slots = jnp.arange(GATES * GATES) == GATES * gates[..., None]  # [B, T, 100]
    rows = jnp.concatenate([values[:, :-1, None], operands[..., None], slots], axis=-1)
    last = jnp.arange(operands.shape[1]) == lengths[:, None] - 1  # [B, T]
    return _batch(rows, values[:, 1:], lengths, last, lengths)


def make_logic(
    encoding: str = "paper",
    train_min_steps: int = 1,
    train_max_steps: int = 10,
    eval_min_steps: int = 1,
    eval_max_steps: int = 10,
    max_gates: int = MAX_CHUNKS,
) -> Task:
    """Makes the logic task; the set "ood" exists when its range differs from training's.

    Args:
      encoding: "paper" or "original".
      train_min_steps: fewest rows of training, validation and the set "id".
      train_max_steps: most rows there.
      eval_min_steps: fewest rows of the set "ood".
      eval_max_steps: most rows there.
      max_gates: most gates per row, paper encoding only (the original has one).

    Raises:
      UserError: if a range is empty or the encoding is unknown.
    """
    require(
        encoding in ENCODINGS, f"task.encoding = {encoding!r} must be one of {', '.join(ENCODINGS)}"
    )
    require(max_gates >= 1, f"task.max_gates = {max_gates} must be at least 1")
    trained = draws.checked_range("task.train_{}_steps", train_min_steps, train_max_steps)
    tested = draws.checked_range("task.eval_{}_steps", eval_min_steps, eval_max_steps)
    ranges = draws.train_and_test_ranges(trained, tested)
    paper = encoding == "paper"
    chunks = max_gates if paper else 1
    words_per_row = 2 + draws.words_for_digits(chunks)

    def sample(key: jax.Array, row_ids: jax.Array, split: str = "train") -> Batch:
        low, high = draws.range_of_split(ranges, split)
        words = draws.row_words(key, row_ids, 2 + high * words_per_row)
        lengths = draws.integers(words[:, 0], low, high)  # [B]
        first = draws.coins(words[:, 1:2], 1)[:, 0]  # [B]
        words = words[:, 2:].reshape(-1, high, words_per_row)
        operands = (words[..., 0] & np.uint32(1)).astype(bool)  # [B, T]
        gates = draws.digits(words[..., 2:], chunks, GATES)  # [B, T, C]
        if not paper:
            return encode_original(first, operands, gates[..., 0], lengths)
        counts = draws.integers(words[..., 1], 1, chunks)  # [B, T]
        return encode_paper(first, operands, gates, counts, lengths)

    return Task(
        name="logic",
        shape=TaskShape(
            form="frames",
            length=train_max_steps,
            features=2 + GATES * (chunks if paper else GATES),
            readout="positions" if paper else "last",
        ),
        sample=sample,
        example_loss=example_loss,
        metrics=metrics,
        example_correct=example_correct,
        eval_sets=tuple(name for name in ranges if name not in ("train", "val")),
        selection_metric="accuracy",
    )


def _answers(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Targets and mask that fit the logits: [B, T], or [B] for a model that answers once a row."""
    if logits.ndim == 2:
        return batch.targets, batch.target_mask
    scored = jnp.where(batch.target_mask, batch.targets, 0)
    return jnp.sum(scored, axis=1, dtype=jnp.int32), jnp.any(batch.target_mask, axis=1)


def example_loss(logits: jax.Array, batch: Batch) -> Ratio:
    """Binary cross-entropy over the scored rows; logits [B, T] or, at the last row only, [B]."""
    return losses.masked_binary_cross_entropy(logits, *_answers(logits, batch))


def metrics(logits: jax.Array, batch: Batch) -> Metrics:
    """`accuracy` over the scored rows and `sequence_error`; logits [B, T] or [B]."""
    targets, mask = _answers(logits, batch)
    return losses.sequence_metrics(losses.correct_bits(logits, targets), mask, "accuracy")


def example_correct(logits: jax.Array, batch: Batch) -> jax.Array:
    """bool [B]: every scored answer is right; logits [B, T] or [B]."""
    targets, mask = _answers(logits, batch)
    return losses.all_correct(losses.correct_bits(logits, targets), mask)
