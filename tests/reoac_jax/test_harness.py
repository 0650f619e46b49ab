"""The likelihood bound against enumeration, and the text side of the harness adapter."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from reoac_jax.harness import Runner, log_likelihood_bound
from reoac_jax.tokenizer import load_tokenizer
from tests.reoac_jax.toy_setting import GEN, SPECIAL, toy_backbone, toy_canvas, toy_params

BACKBONE = toy_backbone()
PARAMS = toy_params(BACKBONE)
TOKENIZER = load_tokenizer("embedded_e2d2")
ROWS = [0, 3, 4]


def target_of(rows: list[int], length: list[int]) -> np.ndarray:
    rng = np.random.default_rng(5)
    ids = rng.integers(0, SPECIAL.eos_id, (len(rows), GEN))
    return np.where(np.arange(GEN) < np.asarray(length)[:, None], ids, SPECIAL.eos_id)


def exact(rows: list[int], target: np.ndarray, length: int) -> np.ndarray:
    """E over l and over all sets of l masked positions, by enumeration."""
    canvas = toy_canvas(rows)
    score = jax.jit(functools.partial(BACKBONE.score, PARAMS, BACKBONE.begin(PARAMS, canvas)))
    total = np.zeros(len(rows))
    for count in range(1, length + 1):
        sets = list(itertools.combinations(range(length), count))
        for chosen in sets:
            noised = target.copy()
            noised[:, list(chosen)] = SPECIAL.mask_id
            level = jnp.full(len(rows), count / GEN)
            hidden = score(canvas, jnp.asarray(noised), level).hidden
            log_prob = jax.nn.log_softmax(BACKBONE.logits(PARAMS, hidden), axis=-1)
            gold = np.take_along_axis(np.asarray(log_prob), target[..., None], axis=-1)[..., 0]
            total += gold[:, list(chosen)].sum(1) * length / count / len(sets) / length
    return total


def bound(rows: list[int], target: np.ndarray, length: list[int], samples: int) -> np.ndarray:
    call = jax.jit(functools.partial(log_likelihood_bound, BACKBONE, num_samples=samples))
    return np.asarray(
        call(PARAMS, toy_canvas(rows), target, jnp.asarray(length), jax.random.key(3))
    )


def test_one_token_is_exact() -> None:
    target = target_of(ROWS, [1] * 3)
    np.testing.assert_allclose(bound(ROWS, target, [1] * 3, 2), exact(ROWS, target, 1), rtol=1e-5)


def test_bound_is_the_mean_over_masks() -> None:
    target = target_of(ROWS, [3] * 3)
    wanted = exact(ROWS, target, 3)
    few = bound(ROWS, target, [3] * 3, 64)
    many = bound(ROWS, target, [3] * 3, 1024)
    assert np.abs(many - wanted).max() < 0.03 * np.abs(wanted).max()
    assert np.abs(few - wanted).max() > np.abs(many - wanted).max()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    lengths = [2, 5, 3]
    target = target_of(ROWS, lengths)
    whole = bound(ROWS, target, lengths, 8)
    for i, row in enumerate(ROWS):
        alone = bound([row], target[i : i + 1], [lengths[i]], 8)
        np.testing.assert_allclose(alone, whole[i : i + 1], rtol=1e-5)


# --------------------------------------------------------------------------------- the runner
def runner(answer: str = "12\nQuestion: more", **options: Any) -> Runner:
    """A runner whose canvases always hold one answer."""

    def fill(canvas: Any) -> tuple[np.ndarray, np.ndarray]:
        ids = [*TOKENIZER.encode(answer), TOKENIZER.eos_id]
        row = np.asarray((ids + [TOKENIZER.eos_id] * 24)[:24], np.int32)
        return np.tile(row, (len(canvas.prompt_len), 1)), np.full(len(canvas.prompt_len), 3)

    values: dict[str, Any] = {"prompt_width": 8, "gen_len": 24, "batch_size": 4, "num_samples": 2}
    return Runner(BACKBONE, PARAMS, TOKENIZER, fill, **(values | options))


def test_texts_end_before_the_first_stop_string() -> None:
    found = runner()
    contexts = [("1 and 1", ["Question:"]), ("2", []), ("3", ["zzz", "2\n", "\n"])] * 2
    texts = found.generate(contexts, "test")
    assert texts == ["12\n", "12\nQuestion: more", "1"] * 2
    assert found.forwards == [3] * 6 and found.num_cut == 0


def test_long_contexts_keep_their_ends() -> None:
    found = runner()
    ids = TOKENIZER.encode("Ann has 12 apples and gives 3 of them to Ben")
    canvas = found.canvas([ids, ids[:5]], 7)
    assert canvas.tokens.shape == (4, 32) and found.num_cut == 1
    assert canvas.tokens[0, :8].tolist() == ids[-8:]
    assert canvas.tokens[1, :5].tolist() == ids[:5] and canvas.prompt_len.tolist() == [8, 5, 5, 5]
    assert canvas.row_id.tolist() == [7, 8, 9, 10]
    assert canvas.key_mask[0].any() and not canvas.key_mask[1, 5:].any()


def test_windows_cover_a_text_once() -> None:
    found = runner(gen_len=5)
    pairs = found.windows(list(range(12)))
    assert [t for _, tokens in pairs for t in tokens] == list(range(12))
    assert [context for context, _ in pairs] == [
        [TOKENIZER.bos_id],
        [0, 1, 2, 3, 4],
        [2, 3, 4, 5, 6, 7, 8, 9],
    ]


def test_too_long_a_continuation_is_refused() -> None:
    with pytest.raises(UserError, match="30 tokens does not fit the canvas of 24"):
        runner().score([([1], list(range(30)))], "test")
