"""One-step problems: purity, disjoint facts, arithmetic, few-shot prompts."""

import re
from collections import Counter

import pytest

from common.answers import grade_gsm8k
from common.errors import UserError
from common.problems import split_of
from common.problems_one_step import (
    INSTRUCTION,
    MAX_VALUE,
    OneStepProblemSet,
    few_shot_messages,
    few_shot_text,
    generate_one_step,
    one_step_split,
)

_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def sets():
    return {split: OneStepProblemSet(split, 600, seed=1)[:] for split in ("train", "test")}


def test_generation_is_pinned_and_pure():
    record = generate_one_step("test", 1)
    generate_one_step("train", 5, seed=3)
    assert record == generate_one_step("test", 1)
    assert record["prompt"].startswith("Max has 13 pencils. Max buys 17 more. How many pencils")
    assert record["target_answer"].endswith("\n\n13 + 17 = 30\n\n#### 30")


def test_solutions_are_true_and_name_the_numbers_of_the_question(sets):
    for record in sets["train"] + sets["test"]:
        [[a, sign, b, result]] = record["metadata"]["chain"]
        assert re.findall(r"\d+", record["prompt"]) == [str(a), str(b)]
        reading, equation, answer = record["target_answer"].split("\n\n")
        assert _EQUATION.fullmatch(equation).groups() == (str(a), sign, str(b), str(result))
        assert {"+": a + b, "-": a - b, "*": a * b}.get(sign, a / b) == result
        assert max(a, b, result) <= MAX_VALUE and min(a, b, result) >= 2
        assert re.findall(r"\d+", reading) == [str(a), str(b)]
        assert answer == f"#### {result}"
        assert grade_gsm8k(record["target_answer"], answer) == 1.0


def test_splits_share_no_fact_with_each_other_or_with_the_longer_problems(sets):
    facts = {
        split: {tuple(record["metadata"]["chain"][0]) for record in records}
        for split, records in sets.items()
    }
    assert not facts["train"] & facts["test"]
    for fact in facts["train"]:
        assert split_of([fact]) == "train"


def test_a_set_repeats_no_fact_early_and_keeps_its_mix(sets):
    for records in sets.values():
        facts = [tuple(record["metadata"]["chain"][0]) for record in records[:500]]
        assert len(set(facts)) == 500
        shares = Counter(record["metadata"]["ops"] for record in records)
        assert shares == {"+": 240, "-": 240, "*": 60, "/": 60}
        assert len({record["prompt"] for record in records}) == 600


def test_set_is_a_sequence_and_other_seeds_differ():
    problems = OneStepProblemSet("test", 5, seed=2)
    assert [p["id"] for p in problems] == [f"one-step-test-2-{i}" for i in range(5)]
    assert problems[-1] == problems[4:][0] == generate_one_step("test", 4, seed=2)
    assert problems[0]["prompt"] != generate_one_step("test", 0, seed=3)["prompt"]
    with pytest.raises(IndexError):
        problems[5]


@pytest.mark.parametrize(
    "call",
    [
        lambda: generate_one_step("validation", 0),
        lambda: generate_one_step("train", -1),
        lambda: OneStepProblemSet("dev", 3),
        lambda: OneStepProblemSet("train", -3),
        lambda: few_shot_messages("?", shots=9),
    ],
)
def test_bad_arguments_are_user_errors(call):
    with pytest.raises(UserError):
        call()


def test_few_shot_prompt_shows_train_facts_and_ends_with_the_question():
    messages = few_shot_messages("How many?", shots=3)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3 + ["user"]
    assert messages[-1]["content"] == f"{INSTRUCTION}\n\nHow many?"
    for message in messages[1::2]:
        a, sign, b, _ = _EQUATION.search(message["content"]).groups()
        assert one_step_split(int(a), sign, int(b)) == "train"
    text = few_shot_text("How many?", shots=1)
    assert text.endswith("Question: How many?\n\nAnswer:")
    assert text.count("Question:") == 2
    assert few_shot_messages("How many?", shots=0) == messages[-1:]
