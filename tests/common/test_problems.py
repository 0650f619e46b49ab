"""Generated word problems: purity, disjoint splits, arithmetic, wording."""

import re
from collections import Counter

import pytest

from common.answers import grade_gsm8k
from common.errors import UserError
from common.problem_wording import FRACTION, GROWS, SETTINGS, TIMES
from common.problems import Difficulty, ProblemSet, generate, split_of

_LINE = re.compile(r"([1-9]?[0-9])([-+*/])([1-9]?[0-9])=([1-9]?[0-9])")


@pytest.fixture(scope="module")
def train_records():
    return ProblemSet("train", 4000, seed=5)[:]


@pytest.fixture(scope="module")
def test_records():
    return ProblemSet("test", 4000, seed=5)[:]


def _compute(left: int, sign: str, right: int) -> int:
    """Arithmetic by counting, independent of the generator's own operators."""
    if sign == "+":
        return len(range(left)) + len(range(right))
    if sign == "-":
        return len(range(right, left))
    if sign == "*":
        return sum(left for _ in range(right))
    quotients = [q for q in range(left + 1) if sum(right for _ in range(q)) == left]
    assert len(quotients) == 1, f"{left}/{right} is not exact"
    return quotients[0]


def _read_rationale(target: str) -> tuple[list[tuple[int, str, int, int]], int]:
    *lines, answer = target.split("\n")
    steps = []
    for line in lines:
        match = _LINE.fullmatch(line)
        assert match, line
        steps.append((int(match[1]), match[2], int(match[3]), int(match[4])))
    match = re.fullmatch(r"#### ([1-9]?[0-9])", answer)
    assert match, answer
    return steps, int(match[1])


def test_generate_is_a_pure_function_of_its_arguments():
    first = generate("train", 17, seed=3)
    generate("test", 4, seed=9)
    assert generate("train", 17, seed=3, difficulty=Difficulty()) == first
    assert generate("train", 18, seed=3)["prompt"] != first["prompt"]
    assert generate("train", 17, seed=4)["prompt"] != first["prompt"]
    assert generate("test", 17, seed=3)["prompt"] != first["prompt"]
    assert set(first) == {"id", "prompt", "target_answer", "task", "metadata"}
    assert first["task"] == "gsm8k"


def test_generation_is_pinned():
    # Checkpoints name their training set by (split, seed, index): the stream must never change.
    record = generate("train", 0)
    assert record["metadata"]["chain"] == [[39, "*", 2, 78]]
    assert record["target_answer"] == "39*2=78\n#### 78"


def test_problem_set_is_a_sequence():
    problems = ProblemSet("test", 5, seed=2)
    assert len(problems) == 5
    assert [p["id"] for p in problems] == [f"generated-test-2-{i}" for i in range(5)]
    assert problems[-1] == problems[4] == generate("test", 4, seed=2)
    assert problems[1:3] == [problems[1], problems[2]]
    with pytest.raises(IndexError):
        problems[5]


def test_splits_share_no_chain_in_50000_problems():
    def chains(split: str, size: int, seed: int) -> set[str]:
        return {str(p["metadata"]["chain"]) for p in ProblemSet(split, size, seed)}

    train = chains("train", 40_000, 0)
    test = chains("test", 10_000, 0)
    assert len(train) > 20_000 and len(test) > 4_000
    assert not train & test


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_holds_for_other_seeds_and_difficulties(split):
    # One operation and a small range: only the chain's own hash can keep the splits apart here.
    for difficulty in (Difficulty(max_ops=1, max_value=20), Difficulty(max_value=500)):
        for record in ProblemSet(split, 300, seed=8, difficulty=difficulty):
            assert split_of(record["metadata"]["chain"]) == split


@pytest.mark.parametrize("name", ["train_records", "test_records"])
def test_every_rationale_line_is_true_and_feeds_the_next(name, request):
    for record in request.getfixturevalue(name):
        steps, answer = _read_rationale(record["target_answer"])
        assert [list(step) for step in steps] == record["metadata"]["chain"]
        assert record["metadata"]["num_ops"] == len(steps) in (1, 2, 3, 4)
        assert record["metadata"]["ops"] == "".join(step[1] for step in steps)
        for left, sign, right, result in steps:
            assert _compute(left, sign, right) == result
            assert 2 <= result <= 99 and 2 <= left <= 99
            assert 2 <= right <= (5 if sign in "*/" else 97)
        for before, after in zip(steps, steps[1:], strict=False):
            assert before[3] == after[0]
        assert answer == steps[-1][3]


def test_operations_and_carries_have_their_shares(train_records):
    steps = [step for record in train_records for step in record["metadata"]["chain"]]
    shares = {sign: n / len(steps) for sign, n in Counter(s[1] for s in steps).items()}
    assert shares == pytest.approx({"+": 0.35, "-": 0.3, "*": 0.2, "/": 0.15}, abs=0.03)
    carries = [
        a % 10 + b % 10 >= 10 if sign == "+" else a % 10 < b % 10
        for a, sign, b, _ in steps
        if sign in "+-"
    ]
    assert sum(carries) / len(carries) > 0.5
    answers = Counter(record["metadata"]["chain"][-1][3] for record in train_records)
    assert len(answers) > 90 and max(answers.values()) < 0.06 * len(train_records)
    lengths = Counter(record["metadata"]["num_ops"] for record in train_records)
    assert min(lengths[n] for n in (1, 2, 3, 4)) > 0.2 * len(train_records)


def test_difficulty_is_respected():
    only_plus = Difficulty(2, 3, 30, add=1.0, subtract=0.0, multiply=0.0, divide=0.0)
    for record in ProblemSet("train", 200, difficulty=only_plus):
        assert set(record["metadata"]["ops"]) == {"+"}
        assert record["metadata"]["num_ops"] in (2, 3)
        assert max(step[3] for step in record["metadata"]["chain"]) <= 30


@pytest.mark.parametrize(
    "settings",
    [
        {"min_ops": 0},
        {"min_ops": 3, "max_ops": 2},
        {"max_value": 5},
        {"max_value": 10_000},
        {"add": -1.0},
        {"add": 0.0, "subtract": 0.0, "multiply": 0.0, "divide": 0.0},
        {"carry_share": 1.5},
    ],
)
def test_impossible_difficulty_is_a_user_error(settings):
    with pytest.raises(UserError, match=next(iter(settings)).split("_")[0]):
        Difficulty(**settings)


def test_unknown_split_and_negative_index_are_user_errors():
    with pytest.raises(UserError, match="validation"):
        generate("validation", 0)
    with pytest.raises(UserError, match="validation"):
        ProblemSet("validation", 3)
    with pytest.raises(UserError, match="-1"):
        generate("train", -1)
    with pytest.raises(UserError, match="-3"):
        ProblemSet("train", -3)


def test_wording_is_varied(train_records):
    assert len({o for s in SETTINGS for o in s.opening}) >= 8
    assert len({q for s in SETTINGS for q in s.question}) >= 6
    for sign in "+-*/":
        assert len({c for s in SETTINGS for c in s.steps[sign]}) >= 7
    assert len({record["prompt"].split(".")[0] for record in train_records}) > 2000


def test_clauses_are_short():
    for setting in SETTINGS:
        clauses = [*setting.opening, *setting.question]
        clauses += [clause for sign in "+-*/" for clause in setting.steps[sign]]
        for clause in clauses:
            assert len(clause.split()) <= 10, clause


def _clause_pattern(clause: str) -> re.Pattern[str]:
    pattern = re.escape(clause)
    pattern = pattern.replace(r"\{n\}", r"(?P<n>\d+)", 1)
    for slot, table in (("T", TIMES), ("V", GROWS), ("F", FRACTION)):
        pattern = pattern.replace(rf"\{{{slot}\}}", f"(?P<{slot}>{'|'.join(table.values())})")
    return re.compile(re.sub(r"\\\{[NSsopxc]\\\}", r"[A-Za-z]+(?: [a-z]+)?", pattern))


def test_each_clause_tells_exactly_one_operation_and_operand(train_records):
    # A reader who knows the clauses, but not the chain, must recover the chain from the prompt.
    patterns = [
        (sign, _clause_pattern(clause))
        for setting in SETTINGS
        for sign in "+-*/"
        for clause in setting.steps[sign]
    ]
    openings = [_clause_pattern(clause) for setting in SETTINGS for clause in setting.opening]
    values = {text: n for table in (TIMES, GROWS, FRACTION) for n, text in table.items()}
    for record in train_records[:400]:
        sentences = re.findall(r"[^.?]+[.?]", record["prompt"])
        opening, *clauses = [sentence.strip() for sentence in sentences[:-1]]
        starts = {int(m["n"]) for p in openings if (m := p.fullmatch(opening))}
        assert starts == {record["metadata"]["chain"][0][0]}
        told = []
        for clause in clauses:
            readings = set()
            for sign, pattern in patterns:
                if match := pattern.fullmatch(clause):
                    (text,) = match.groupdict().values()
                    readings.add((sign, int(text) if text.isdigit() else values[text]))
            assert len(readings) == 1, (clause, readings)
            told.append(readings.pop())
        assert told == [(sign, n) for _, sign, n, _ in record["metadata"]["chain"]]
        assert sentences[-1].endswith("?")


def test_targets_are_graded_right(train_records):
    for record in train_records[:200]:
        target = record["target_answer"]
        answer = record["metadata"]["chain"][-1][3]
        assert grade_gsm8k(target, target) == 1.0
        assert grade_gsm8k(f"#### {answer}", target) == 1.0
        assert grade_gsm8k(f"#### {answer + 1}", target) == 0.0
