"""Text records as arrays: cutting, key tokens, both kinds of targets, canvases."""

import re

import numpy as np
import pytest

from common.errors import UserError
from reoac_jax.corpus import encode_supervised, lay_out, pad_rows
from reoac_jax.prompts import PromptSet, encode_prompts, make_canvas
from reoac_jax.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("embedded_e2d2")
RECORDS = [
    {"prompt": "Ann has 12 apples.", "target_answer": "She eats 2: 12-2=<<12-2=10>>10.\n#### 10"},
    {"prompt": "Add 3 and 4", "target_answer": "#### 7"},
    {"prompt": "He buys 5 pens for 15. " * 9, "target_answer": "a long answer 1 2 3 " * 9},
    {"prompt": "Nothing is known", "target_answer": ""},
]
P, G = 24, 20


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    return encode_prompts(RECORDS, TOKENIZER, prompt_width=P, gen_len=G)


def test_prompt_arrays(prompts: PromptSet) -> None:
    assert len(prompts) == 4 and prompts.num_cut == 1
    assert prompts.prompt.dtype == prompts.prompt_len.dtype == np.int32
    for row, record in enumerate(RECORDS):
        ids = TOKENIZER.encode(record["prompt"])[:P]
        length = int(prompts.prompt_len[row])
        assert prompts.prompt[row, :length].tolist() == ids
        assert (prompts.prompt[row, length:] == TOKENIZER.pad_id).all()
        assert not prompts.key_mask[row, length:].any()
    assert prompts.texts[1] == "Add 3 and 4" and prompts.golds[1] == "#### 7"


def key_text(prompts: PromptSet, row: int) -> str:
    """The key tokens of a row, with a blank between any two of them."""
    return " ".join(TOKENIZER.decode([i]) for i in prompts.prompt[row][prompts.key_mask[row]])


def test_key_tokens(prompts: PromptSet) -> None:
    assert key_text(prompts, 1).split() == ["3", "4"]
    assert not prompts.key_mask[3].any()
    whole = encode_prompts(
        RECORDS, TOKENIZER, prompt_width=P, gen_len=G, sentence_final_numbers=True
    )
    # One token per digit: the 15 before the full stop only counts when it is asked for.
    assert set(key_text(prompts, 2).split()) == {"5"} and "1 5" in key_text(whole, 2)
    # A cut prompt has the marks of the beginning of the whole one.
    longer = encode_prompts(RECORDS, TOKENIZER, prompt_width=200, gen_len=G)
    np.testing.assert_array_equal(longer.key_mask[2, :P], prompts.key_mask[2])


def test_absolute_targets(prompts: PromptSet) -> None:
    """Tokens of "prompt answer" from the first column on, annotations included, cut to P."""
    for row, record in enumerate(RECORDS[:3]):
        ids = TOKENIZER.encode(record["prompt"] + " " + record["target_answer"])[:P]
        length = int(prompts.absolute_len[row])
        assert length == len(ids) and prompts.absolute_target[row, :length].tolist() == ids
    assert prompts.absolute_len[3] == 0  # no answer, no target


def test_canvas_targets(prompts: PromptSet) -> None:
    """The answer alone, without annotations; always closed by eos, which fills the rest."""
    text = TOKENIZER.decode(prompts.canvas_target[0])
    assert "She eats 2: 12-2=10.\n#### 10".startswith(text) and "<<" not in text
    for row, record in enumerate(RECORDS):
        target = prompts.canvas_target[row].tolist()
        end = target.index(TOKENIZER.eos_id)
        assert target[end:] == [TOKENIZER.eos_id] * (G - end)
        plain = record["target_answer"].replace("<<12-2=10>>", "")
        assert target[:end] == TOKENIZER.encode(plain)[: G - 1]
    assert (prompts.canvas_target[3] == TOKENIZER.eos_id).all()
    assert prompts.canvas_target[2, -1] == TOKENIZER.eos_id  # also where the answer was cut


def test_canvases(prompts: PromptSet) -> None:
    rows, mask_id = np.asarray([2, 0, 0]), 7
    canvas = make_canvas(prompts, rows, np.asarray([5, 6, 7]), mask_id, pad_id=1)
    assert canvas.tokens.shape == (3, P + G) and canvas.row_id.tolist() == [5, 6, 7]
    assert canvas.row_id.dtype == np.uint32 and canvas.tokens.dtype == np.int32
    np.testing.assert_array_equal(canvas.key_mask, prompts.key_mask[rows])
    assert (np.asarray(canvas.gen_ids()) == mask_id).all()
    for index, row in enumerate(rows):
        length = int(prompts.prompt_len[row])
        np.testing.assert_array_equal(canvas.tokens[index, :length], prompts.prompt[row, :length])
        assert (canvas.tokens[index, length : length + G] == mask_id).all()
        assert (canvas.tokens[index, length + G :] == 1).all()


def test_messages() -> None:
    with pytest.raises(UserError, match="no usable rows"):
        encode_prompts([], TOKENIZER, prompt_width=P, gen_len=G)
    with pytest.raises(UserError, match=r"row 1 has no field 'target_answer'.*answer_field"):
        encode_prompts([RECORDS[0], {"prompt": "x"}], TOKENIZER, prompt_width=P, gen_len=G)
    with pytest.raises(UserError, match="record 1 has no field 'prompt'"):
        encode_supervised([RECORDS[0], {"target_answer": "x"}], TOKENIZER, P, G)


def test_other_fields() -> None:
    records = [{"question": "1+1", "answer": 2}]
    found = encode_prompts(
        records,
        TOKENIZER,
        prompt_width=P,
        gen_len=G,
        prompt_field="question",
        answer_field="answer",
    )
    assert found.golds == ["2"]


def test_supervised_arrays() -> None:
    found = encode_supervised(RECORDS, TOKENIZER, P, G)
    assert found.num_cut == 2  # the first answer is a token too long, the third far too long
    assert any("<<" in record["target_answer"] for record in RECORDS)
    for row, record in enumerate(RECORDS):
        ids = TOKENIZER.encode(re.sub("<<.*?>>", "", record["target_answer"]))[: G - 1]
        assert found.target_len[row] == len(ids) + 1
        assert found.target[row].tolist() == ids + [TOKENIZER.eos_id] * (G - len(ids))


def test_rows_and_layout() -> None:
    rows, lengths = pad_rows([[1, 2, 3], [], [4]], 2, 9)
    assert rows.tolist() == [[1, 2], [9, 9], [4, 9]] and lengths.tolist() == [2, 0, 1]
    canvas = np.asarray([[5, 6], [7, 8], [5, 8]])
    # What stands behind a prompt in its own array is not copied.
    rows[1] = 3
    laid = lay_out(rows, lengths, canvas, 0)
    assert laid.tolist() == [[1, 2, 5, 6], [7, 8, 0, 0], [4, 5, 8, 0]]
