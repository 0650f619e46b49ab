"""The throughput table of the graders at toy size."""

from bench.answers import fuzz, gsm8k_pairs, math_pairs, measure, rate, robust


def test_half_of_the_pairs_are_right():
    assert rate("MATH", math_pairs(130), robust)["right"] > 55
    pairs = gsm8k_pairs(20)
    assert sum(prediction.endswith(gold) for prediction, gold in pairs) >= 10


def test_right_pairs_are_graded_right():
    wrong = [pair for pair in math_pairs(390, seed=1) if not robust(*pair)]
    assert len(wrong) < 230


def test_fuzz_finds_nothing():
    row = fuzz(150, seed=3)
    assert row["exceptions"] == row["hangs"] == 0


def test_table_has_every_row(monkeypatch):
    monkeypatch.setattr("bench.answers.algebra", lambda count: {"name": "algebra"})
    assert [row["name"] for row in measure(20, 5)] == ["GSM8K", "MATH", "fuzz", "algebra"]
