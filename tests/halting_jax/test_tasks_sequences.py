"""Copy, reverse and string addition against Python lists, strings and integers."""

import numpy as np
import pytest

from halting_jax.tasks.sequences import make_copy, make_string_addition
from tests.halting_jax.task_cases import assert_uniform, batch_of, task_of


def cut(tokens, mask):
    """The unpadded tokens of a row and where they start; they must be contiguous."""
    used = np.flatnonzero(mask)
    assert used.tolist() == list(range(used[0], used[-1] + 1))
    return tokens[mask].tolist(), int(used[0])


def check_decoder(batch, row, target, start):
    shifted, begin = cut(batch.decoder_inputs[row], batch.target_mask[row])
    assert shifted == [1, *target[:-1]] and begin == start


@pytest.mark.parametrize(
    ("case", "symbols", "farthest"), [("copy-paper", 10, 4), ("reverse-original", 8, 0)]
)
def test_symbols(case, symbols, farthest):
    everything = []
    for split, longest, offsets in (("train", 5, farthest), ("id", 5, 0), ("ood", 9, 0)):
        batch = batch_of(case, split)
        assert batch.inputs.shape[1] == longest + 1 + offsets
        starts = []
        for row in range(len(batch.inputs)):
            source, start = cut(batch.inputs[row], batch.input_mask[row])
            target, target_start = cut(batch.targets[row], batch.target_mask[row])
            content = source[:-1]
            assert source[-1] == target[-1] == 2 and start == target_start
            assert target[:-1] == (content[::-1] if "reverse" in case else content)
            assert batch.difficulty[row] == len(content)
            check_decoder(batch, row, target, start)
            everything += content
            starts.append(start)
        assert_uniform(batch.difficulty, 1, longest)
        assert_uniform(np.array(starts), 0, offsets)
    assert_uniform(np.array(everything), 3, 2 + symbols)


@pytest.mark.parametrize(("split", "digits"), [("train", 3), ("ood", 30)])
def test_string_addition(split, digits):
    batch = batch_of("string_addition", split)
    characters = "??" + "$+0123456789"
    sizes, terms, first, later = [], [], [], []
    for row in range(len(batch.inputs)):
        source, start = cut(batch.inputs[row], batch.input_mask[row])
        target, target_start = cut(batch.targets[row], batch.target_mask[row])
        assert start == target_start == 0
        text = "".join(characters[t] for t in source)
        assert text[-1] == "$" and "?" not in text
        numbers = text[:-1].split("+")
        total = "".join(characters[t] for t in target)
        assert total == str(sum(map(int, numbers))) + "$"
        assert batch.difficulty[row] == max(map(len, numbers))
        check_decoder(batch, row, target, 0)
        terms.append(len(numbers))
        sizes += map(len, numbers)
        first += [int(n[0]) for n in numbers]
        later += [int(c) for n in numbers for c in n[1:]]
    assert_uniform(np.array(terms), 2, 3)
    assert_uniform(np.array(sizes), 1, digits)
    assert_uniform(np.array(first), 1, 9)
    assert_uniform(np.array(later), 0, 9)


def test_widths():
    assert task_of("copy-paper").shape.length == 10
    assert make_copy(position_offset=0).shape.length == 41
    assert make_copy().shape.length == 401
    assert make_copy(encoding="original").shape.length == 41
    assert make_copy(train_max_length=4, eval_max_length=4).eval_sets == ("id",)
    task = make_string_addition()
    assert task.shape.length == 12 and task.shape.features == task.shape.classes == 14
    assert task.eval_sets == ("id", "ood")
    assert make_string_addition(test_max_digits=5).eval_sets == ("id",)
