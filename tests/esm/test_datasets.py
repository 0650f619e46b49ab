"""Data sets: rows to examples, splits, offsets, and one clear line for what is wrong."""

import json

import pytest

from common.answers import grade_task
from common.errors import UserError
from esm.datasets import (
    DATASETS,
    Part,
    check_dataset,
    check_disjoint,
    load_examples,
    plan_parts,
    split_of,
)


def _jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def root(tmp_path):
    """Small files in the hub's layout, with the fields of the released sets."""
    part = "00000-of-00001.parquet"
    _parquet(
        tmp_path / f"openai/gsm8k/main/train-{part}",
        [{"question": f"{n} + 1?", "answer": f"{n}+1\n#### {n + 1}"} for n in range(6)],
    )
    _jsonl(
        tmp_path / "svamp/test.jsonl",
        [{"Body": "Two pens.", "Question": "How many?", "Answer": 2.0}],
    )
    _jsonl(
        tmp_path / "HuggingFaceH4/MATH-500/test.jsonl",
        [
            {
                "problem": "1+1",
                "solution": "So \\boxed{2}.",
                "answer": "2",
                "subject": "Algebra",
                "level": 1,
                "unique_id": f"test/{n}.json",
            }
            for n in range(5)
        ],
    )
    _jsonl(tmp_path / "math/test.jsonl", [{"problem": "1+1", "answer": "2", "level": "Level 1"}])
    _parquet(
        tmp_path / f"math-ai/amc23/test-{part}",
        [{"id": 0, "answer": 27.0, "url": "u", "question": "q"}],
    )
    _parquet(
        tmp_path / f"allenai/ai2_arc/ARC-Challenge/test-{part}",
        [
            {
                "id": "digits",
                "question": "Which?",
                "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]},
                "answerKey": "2",
            },
            {
                "id": "letters",
                "question": "Which?",
                "choices": {"text": ["w", "x"], "label": ["A", "B"]},
                "answerKey": "A",
            },
        ],
    )
    _jsonl(
        tmp_path / "strategyqa/test.jsonl",
        [
            {"qid": "a", "question": "Is it?", "answer": True},
            {"qid": "b", "question": "Is it?", "answer": "no"},
        ],
    )
    return tmp_path


@pytest.mark.parametrize(
    ("name", "split", "answer", "response"),
    [
        ("gsm8k", "train", "0+1\n#### 1", "#### 1"),
        ("svamp", "test", "2.0", "#### 2"),
        ("math500", "dev", "So \\boxed{2}.", "\\boxed{2}"),
        ("math", "test", "$\\boxed{2}$", "\\boxed{2}"),
        ("amc23", "test", "27.0", "\\boxed{27}"),
        ("arc-c", "test", "B", "#### B"),
        ("strategyqa", "test", "Yes", "#### yes"),
    ],
)
def test_rows_become_examples_that_can_be_graded(root, name, split, answer, response):
    example = load_examples(name, split, root)[0]
    assert (example.task, example.answer) == (name, answer)
    assert grade_task(name, response, example.answer, answer=example.meta.get("answer")).correct


def test_numeric_labels_become_letters_for_options_and_key(root):
    digits, letters = load_examples("arc_challenge", "test", root)
    assert digits.meta["options"] == (("A", "w"), ("B", "x"), ("C", "y"))
    assert (digits.answer, letters.answer) == ("B", "A")
    assert digits.key == "arc-c/test/digits"


def test_names_and_splits():
    assert check_dataset("HuggingFaceH4/MATH-500") == "math500"
    assert check_dataset("AIME_2025") == "aime25"
    assert split_of("aime2024", "test") == "train"
    assert split_of("gsm8k", "dev") == "dev"
    with pytest.raises(UserError, match="mmlu"):
        check_dataset("mmlu")


def test_offset_limit_and_shuffle_keep_row_ids(root):
    ids = [example.id for example in load_examples("gsm8k", "train", root)]
    assert ids == ["0", "1", "2", "3", "4", "5"]
    shuffled = [e.id for e in load_examples("gsm8k", "train", root, split_seed=3)]
    assert sorted(shuffled) == ids and shuffled != ids
    part = load_examples("gsm8k", "train", root, split_seed=3, offset=2, limit=2)
    assert [example.id for example in part] == shuffled[2:4]
    with pytest.raises(UserError, match="offset 6"):
        load_examples("gsm8k", "train", root, offset=6)


def test_generated_problems_need_no_file(tmp_path):
    train = load_examples("problems", "train", tmp_path, limit=40)
    test = load_examples("problems", "test", tmp_path, limit=40)
    assert not {e.id for e in train} & {e.id for e in test}
    assert train == load_examples("problems", "train", tmp_path, limit=40)
    assert all(grade_task("problems", e.answer, e.answer).correct for e in test)


def test_truncated_file_is_named_with_its_line(root):
    path = root / "strategyqa/test.jsonl"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(UserError, match=r"test\.jsonl:2: .*truncated"):
        load_examples("strategyqa", "test", root)


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("gsm8k", "test", "holds its splits train, not test"),
        ("openbookqa", "test", "openbookqa/main/test-00000-of-00001.parquet"),
    ],
)
def test_missing_data_says_where_it_should_lie(root, monkeypatch, name, split, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=words):
        load_examples(name, split, root)


def test_bad_rows_are_named(root):
    _jsonl(root / "svamp/train.jsonl", [{"Body": "Two pens.", "Question": "How many?"}])
    with pytest.raises(UserError, match=r"row 0: field 'Answer' is missing"):
        load_examples("svamp", "train", root)
    _jsonl(root / "strategyqa/train.jsonl", [{"qid": "a", "question": "?", "answer": "maybe"}])
    with pytest.raises(UserError, match="neither yes nor no"):
        load_examples("strategyqa", "train", root)


def test_split_without_answers_is_refused(root):
    choices = {"text": ["x"], "label": ["A"]}
    rows = [{"id": "a", "question": "?", "choices": choices, "answerKey": ""}]
    _parquet(root / "tau/commonsense_qa/data/test-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match="holds no answers"):
        load_examples("commonsense_qa", "test", root)


def test_parts_of_one_split_follow_each_other():
    parts = plan_parts("math500", Part("test", 0, 100), Part("", -1, 50), Part("test", -1, 0))
    assert (parts.train, parts.dev, parts.eval) == (
        Part("test", 0, 100),
        Part("test", 100, 50),
        Part("test", 150, 0),
    )
    unused = plan_parts(
        "math500", Part("test", 0, 100), Part("", -1, 50), Part("test", -1, 0), use_dev=False
    )
    assert unused.eval.offset == 100
    two = plan_parts("gsm8k", Part("train", 0, 100), Part("", -1, 50), Part("test", -1, 0))
    assert (two.dev.offset, two.eval.offset) == (100, 0)
    given = plan_parts("math500", Part("test", 0, 100), Part("", 7, 50), Part("test", 3, 0))
    assert (given.dev.offset, given.eval.offset) == (7, 3)
    with pytest.raises(UserError, match="none is left"):
        plan_parts("math500", Part("test", 0, 0), Part("", -1, 50), Part("test", -1, 0))


def test_overlap_is_refused_unless_allowed():
    assert check_disjoint(["a", "b"], ["c"]) == 0
    with pytest.raises(UserError, match="1 of the evaluated"):
        check_disjoint(["a", "b"], ["b", "c"])
    assert check_disjoint(["a", "b"], ["b", "c"], allow_overlap=True) == 1


def test_every_data_set_has_a_grader():
    from common.answers.tasks import TASK_KINDS

    assert set(DATASETS) == set(TASK_KINDS)
