"""Records from every known row form, the lookup order of data files, and `run_prep`."""

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from common.data import read_records
from common.errors import UserError
from common.rundir import json_text
from reoac_jax import prep
from reoac_jax.prep import DatasetOptions, load_dataset, load_split, run_prep
from reoac_jax.records import FieldNames, prepare, record_of, slug, toy_records

GSM8K_ROWS: list[dict[str, Any]] = [
    {"question": "One and one?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
    {"question": "  ", "answer": "#### 3"},
    {"question": "Two and two?", "answer": "#### 4", "level": "easy"},
    {"question": "Three?", "answer": None},
]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COMMIT = "c" * 40


def _config(**dataset: Any) -> ConfigDict:
    names = {"task": "gsm8k", "train_path": "generated", "eval_path": "generated"}
    return ConfigDict({"seed": 0, "dataset": {**names, **dataset}})


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REOAC_DATA_ROOT", raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    """Replaces the hub client by a function or an error; returns the calls made."""

    def install(answer: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load(name: str, config: str | None, split: str, revision: str) -> Any:
            assert revision == COMMIT
            calls.append((name, config, split))
            if isinstance(answer, Exception):
                raise answer
            return answer(config)

        module = types.ModuleType("datasets")
        module.load_dataset = load  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        monkeypatch.setattr("common.hub.commit_of", lambda *name: COMMIT)
        return calls

    return install


def test_rows_without_text_are_dropped_and_counted() -> None:
    records, dropped = prepare(GSM8K_ROWS, "gsm8k", "train")
    assert dropped == 2
    assert [r["id"] for r in records] == ["gsm8k-train-0", "gsm8k-train-2"]
    assert records[1]["metadata"] == {"level": "easy"}
    assert list(records[0]) == ["id", "prompt", "target_answer", "task", "metadata"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"input": "p", "output": "a", "qid": "x7"}, ("x7", "p", "a", {})),
        ({"question": "p", "answer": 51.0, "idx": 3}, ("gsm8k-test-3", "p", "51.0", {})),
        ({"body": "p", "answer": "a", "prompt": "q"}, ("gsm8k-test-9", "p", "a", {"prompt": "q"})),
        (
            {"id": "i", "prompt": "p", "target_answer": "a", "task": "math", "metadata": {"k": 1}},
            ("i", "p", "a", {"k": 1}),
        ),
    ],
)
def test_generic_rows(row: dict[str, Any], expected: tuple[Any, ...]) -> None:
    record = record_of(row, "gsm8k", 9, "test", fields=FieldNames(prompt="body"))
    keys = ("id", "prompt", "target_answer", "metadata")
    assert tuple(record[key] for key in keys) == expected
    assert record["task"] == row.get("task", "gsm8k")


def test_math_ids_are_unique_across_subjects_and_splits() -> None:
    rows = [
        {"problem": "p", "solution": "s", "answer": "5", "subject": subject}
        for subject in ("Algebra", "Counting & Probability", "Algebra")
    ]
    train, _ = prepare(rows, "math", "train")
    test, _ = prepare(rows, "math", "test")
    assert [r["id"] for r in train] == [
        "math-algebra-train-0",
        "math-counting_and_probability-train-0",
        "math-algebra-train-1",
    ]
    assert not {r["id"] for r in train} & {r["id"] for r in test}
    assert train[0]["target_answer"] == "s" and train[0]["metadata"]["answer"] == "5"
    assert prepare(rows[:1], "math", subject="geometry").records[0]["metadata"]["subject"]
    assert slug("Number Theory") == "number_theory"


def test_repeated_ids_are_told_apart() -> None:
    rows = [{"id": "same", "prompt": "p", "target_answer": "a"}] * 3
    assert [r["id"] for r in prepare(rows, "gsm8k").records] == ["same", "same#2", "same#3"]


def test_preparing_records_again_changes_nothing() -> None:
    once = prepare(GSM8K_ROWS, "gsm8k", "train").records
    assert prepare(once, "gsm8k", "train").records == once


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_toy_records(task: str) -> None:
    train = toy_records(task, 200, seed=1, split="train")
    assert train == toy_records(task, 200, seed=1, split="train")
    test = toy_records(task, 200, seed=1, split="test")
    assert [r["prompt"] for r in train] != [r["prompt"] for r in test]
    assert len({r["id"] for r in train + test}) == 400
    assert toy_records(task, 1)[0]["id"] == f"toy-{task}-0"
    operands = {int(digits) for r in train for digits in re.findall(r"\d+", r["prompt"])}
    assert operands == set(range(1, 13))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_raw_file_as_train_path(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"train{suffix}", GSM8K_ROWS)
    records = load_dataset(path, "gsm8k", "train")
    assert [r["prompt"] for r in records] == ["One and one?", "Two and two?"]
    assert len(load_dataset(path, "gsm8k", "train", limit=1)) == 1


def test_lookup_order(tmp_path: Path, hub: Callable[[Any], list[Any]]) -> None:
    calls = hub(lambda config: [{"question": "hub", "answer": "1"}])
    options = DatasetOptions(root=tmp_path, allow_toy=True, download_on_missing=True)

    def first_prompt(options: DatasetOptions = options, **kwargs: Any) -> str:
        return load_dataset("", "gsm8k", "test", options=options, **kwargs)[0]["prompt"]

    assert first_prompt(DatasetOptions(root=tmp_path, allow_toy=True)).startswith("If you have")
    assert first_prompt() == "hub" and calls == [("openai/gsm8k", "main", "test")]
    _write(options.raw_path("gsm8k", "test"), [{"question": "raw", "answer": "1"}])
    assert first_prompt() == "raw"
    _write(tmp_path / "mine.jsonl", [{"question": "mine", "answer": "1"}])
    assert first_prompt(raw_path="mine.jsonl") == "mine"
    _write(options.processed_path("gsm8k", "test"), [{"prompt": "done", "target_answer": "1"}])
    assert first_prompt() == "done" and len(calls) == 1


def test_unreachable_hub(tmp_path: Path, hub: Callable[[Any], list[Any]]) -> None:
    hub(ConnectionError("no route\nto the host"))
    options = DatasetOptions(root=tmp_path, download_on_missing=True)
    with pytest.raises(UserError) as error:
        load_dataset("", "gsm8k", "test", options=options)
    message = str(error.value)
    assert "\n" not in message
    for part in ("openai/gsm8k (main)", "no route", "dataset.eval_path", "generated"):
        assert part in message
    both = DatasetOptions(root=tmp_path, download_on_missing=True, allow_toy=True)
    assert load_dataset("", "gsm8k", "test", options=both)[0]["id"] == "toy-gsm8k-test-0"


def test_errors_name_the_key(tmp_path: Path) -> None:
    options = DatasetOptions(root=tmp_path)
    with pytest.raises(UserError, match=r"dataset\.train_path.*generated"):
        load_dataset("missing.jsonl", "gsm8k", "train", options=options)
    with pytest.raises(UserError, match="gsm8k, math"):
        load_dataset("missing.jsonl", "chess", "train", options=options)
    with pytest.raises(UserError, match="train, test"):
        load_dataset("missing.jsonl", "gsm8k", "eval", options=options)
    path = _write(tmp_path / "other.jsonl", [{"text": "t", "label": "l"}])
    with pytest.raises(UserError, match=r"none of its 1 rows.*dataset\.prompt_field"):
        load_dataset(path, "gsm8k", "train")
    fields = FieldNames(prompt="text", answer="label")
    options = DatasetOptions(fields=fields)
    assert load_dataset(path, "gsm8k", "train", options=options)[0]["prompt"] == "t"


def test_load_split_reads_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.jsonl", GSM8K_ROWS)
    config = _config(train_path="a.jsonl", data_root=str(tmp_path))
    assert len(load_split(config, "train")) == 2
    monkeypatch.setenv("REOAC_DATA_ROOT", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="elsewhere"):
        load_split(config, "train")


def test_run_prep_from_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REOAC_DATA_ROOT", str(tmp_path / "root"))
    train = _write(tmp_path / "rows.parquet", [{"level": None, **row} for row in GSM8K_ROWS])
    test = _write(tmp_path / "rows.jsonl", GSM8K_ROWS[:1])
    config = _config(raw_train_path=str(train), eval_path=str(test))
    reports = run_prep(config, show_progress=False)
    assert [(r.split, r.records, r.dropped) for r in reports] == [("train", 2, 2), ("test", 1, 0)]
    root = tmp_path / "root" / "dataset"
    files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    assert files == {
        "raw/gsm8k/train.jsonl",
        "raw/gsm8k/test.jsonl",
        "processed/gsm8k_train.jsonl",
        "processed/gsm8k_test.jsonl",
    }
    assert len(read_records(root / "raw/gsm8k/train.jsonl")) == 4
    records = read_records(root / "processed/gsm8k_train.jsonl")
    assert [r["id"] for r in records] == ["gsm8k-train-0", "gsm8k-train-2"]
    assert [r["metadata"] for r in records] == [{"level": None}, {"level": "easy"}]
    # Later runs start from the raw copy, or keep what is there.
    before = (root / "processed/gsm8k_train.jsonl").read_bytes()
    assert run_prep(_config(), show_progress=False)[0].records == 2
    assert (root / "processed/gsm8k_train.jsonl").read_bytes() == before
    (root / "raw/gsm8k/train.jsonl").unlink()
    assert run_prep(_config(), ("train",), False)[0].source == "already prepared"


def test_run_prep_math_from_the_hub(tmp_path: Path, hub: Callable[[Any], list[Any]]) -> None:
    row = {"problem": "p", "solution": "s", "level": "Level 1", "type": "T"}
    calls = hub(lambda config: [dict(row), dict(row)])
    subjects = ("algebra", "geometry")
    config = _config(
        task="math", data_root=str(tmp_path), dump_math_subjects=True, math_subjects=subjects
    )
    (report,) = run_prep(config, ("test",), show_progress=False)
    assert report.records == 4
    assert calls == [("EleutherAI/hendrycks_math", name, "test") for name in subjects]
    assert len(read_records(tmp_path / "dataset/raw/math/geometry/test.jsonl")) == 2
    records = read_records(tmp_path / "dataset/processed/math_test.jsonl")
    assert [r["id"] for r in records] == [
        f"math-{name}-test-{i}" for name in subjects for i in range(2)
    ]
    source = f"EleutherAI/hendrycks_math@{COMMIT}"
    extra = {"level": "Level 1", "type": "T", "subject": "algebra", "source": source}
    assert records[0]["metadata"] == extra
    again = prep.load_dataset(tmp_path / "dataset/raw/math/test.jsonl", "math", "test")
    assert [json_text(r) for r in again] == [json_text(r) for r in records]


def test_run_prep_never_hides_real_data_behind_toys(
    tmp_path: Path, hub: Callable[[Any], list[Any]]
) -> None:
    calls = hub(ConnectionError("offline"))
    config = _config(data_root=str(tmp_path), allow_toy=True, toy_size=4)
    reports = run_prep(config, show_progress=False)
    assert [r.path.name for r in reports] == ["toy_gsm8k_train.jsonl", "toy_gsm8k_test.jsonl"]
    assert not calls and all(r.records == 4 for r in reports)
    assert not (tmp_path / "dataset/processed/gsm8k_train.jsonl").exists()
    with pytest.raises(UserError, match="from the hub"):
        run_prep(_config(data_root=str(tmp_path)), show_progress=False)


def test_run_prep_errors(tmp_path: Path) -> None:
    config = _config(data_root=str(tmp_path), raw_train_path="missing.jsonl")
    with pytest.raises(UserError, match=r"dataset\.raw_train_path=missing\.jsonl"):
        run_prep(config, ("train",), False)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "dataset").write_text("in the way")
    config = _config(
        data_root=str(blocked), raw_train_path=str(_write(tmp_path / "r.jsonl", GSM8K_ROWS))
    )
    with pytest.raises(UserError, match="REOAC_DATA_ROOT"):
        run_prep(config, ("train",), False)
