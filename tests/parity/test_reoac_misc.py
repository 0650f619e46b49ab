"""Record normalisation, toy prompts, buffer order, projection and usage counts of the original."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reoac_jax.records import record_of, toy_example
from reoac_jax.replay import ReplayBuffer, push, stack
from reoac_jax.viz import operator_usage, pca_project
from tests.parity.fixtures import fixture_root

FILES = sorted((fixture_root() / "reoac").glob("misc*.json"))


def _content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _projections() -> Iterator[Any]:
    for path in FILES:
        for index, case in enumerate(_content(path).get("projection", [])):
            yield pytest.param(case, id=f"{path.stem}-{index}")


def _number_in(key: str, prefix: str) -> int:
    return int(key[len(prefix) :])


def test_files_were_found() -> None:
    assert FILES and list(_projections())


@pytest.mark.parametrize("case", _projections())
def test_projection(case: dict[str, Any]) -> None:
    ours = pca_project(case["vectors"])
    theirs = np.asarray(case["projected"], np.float64).reshape(len(case["vectors"]), 2)
    if min(np.shape(case["vectors"]), default=0) >= 2:
        # Column 0 of the original is its second component; ours descend.
        theirs = theirs[:, ::-1]
        assert ours[:, 0].var() >= ours[:, 1].var()
    for column in range(2):
        sign = np.sign(np.dot(ours[:, column], theirs[:, column])) or 1.0
        np.testing.assert_allclose(sign * ours[:, column], theirs[:, column], atol=2e-5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_records(path: Path) -> None:
    data = _content(path)["data"]
    found = 0
    for task in ("gsm8k", "math"):
        prefix = f"{task}_record_idx_"
        for key in (key for key in data if key.startswith(prefix)):
            index = _number_in(key, prefix)
            assert record_of(data[f"{task}_raw"], task, index) == data[key]
            found += 1
    assert found
    assert record_of(data["gsm8k_raw"], "gsm8k") == data["prep_generic_on_gsm8k_raw"]
    # The original's generic preparation did not know MATH's field names and gave empty prompts;
    # here one function knows them all.
    assert data["prep_generic_on_math_raw"]["prompt"] == ""
    generic = record_of(data["math_raw"], "math")
    assert generic["prompt"] == data["math_raw"]["problem"]
    assert generic["target_answer"] == data["math_raw"]["solution"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_toy_prompts(path: Path) -> None:
    toy = _content(path)["data"]["toy"]
    assert toy
    for key, expected in toy.items():
        task, parity = key.split("_")
        # The recorded operands are the first two numbers that the even prompts show.
        words = toy[f"{task}_even"]["prompt"].replace(".", "").split()
        a, b = [int(word) for word in words if word.isdigit()][:2]
        prompt, answer = toy_example(task, 0 if parity == "even" else 1, a, b)
        assert {"prompt": prompt, "target_answer": answer} == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_buffer_is_first_in_first_out(path: Path) -> None:
    content = _content(path)
    keys = [key for key in content if key.startswith("buffer_capacity_")]
    assert keys
    for key in keys:
        capacity, pushed = (int(word) for word in key.split("_")[2::2])
        buffer = ReplayBuffer(capacity)
        for number in range(pushed):
            buffer = push(buffer, [{"name": np.int32(number)}])
        assert [str(name) for name in stack(buffer)["name"]] == content[key]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_operator_usage(path: Path) -> None:
    case = _content(path)["operator_usage"]
    assert operator_usage(case["records"]) == case["summary"]
