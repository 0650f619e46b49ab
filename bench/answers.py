"""Throughput of the answer graders, and how they stand hostile text.

    python -m bench.answers --json results/answers_speed.json
    python -m bench.answers --math some/math/test.jsonl      # the golds of a real MATH file as well

Pairs per second are per core: CPU time of this process, one thread, every text new to the caches.
`GSM8K` grades worked solutions of generated problems, half of them wrong. `MATH` grades whole
solutions whose answers are numbers, fractions, surds, tuples, intervals, sets, matrices, equations,
expressions and words, half of them wrong. `fuzz` grades random strings over LaTeX pieces with every
grader: it counts exceptions, and texts that took longer than the limit. Pairs that need computer
algebra leave the core: `algebra` sends such pairs to its worker, wall time, start left out.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from common.answers import grade_gsm8k, grade_math, grade_task, symbolic
from common.answers.math_equal import Match, equal
from common.answers.math_text import math_answer
from common.answers.math_values import readings
from common.problems import ProblemSet
from common.rundir import atomic_write_json

BARS = {"GSM8K": 5000.0, "MATH": 1000.0}  # pairs a second and core
FUZZ_LIMIT_S = 1.0
Pair = tuple[str, str]

_PIECES = (
    r"\frac \sqrt \boxed{ { } ( ) [ ] , ^ _ + - * / ! = < > \le \pm \cup \{ \} 1 2 9 0.5 x y n "
    r"\pi \infty \text{ and or cm #### $ % \begin{pmatrix} \end{pmatrix} \\ & \sin \log_2 \binom | "
    r"9^9^9 \sum_{k=1}^{n} e i nan __import__ ' 1,000 \overline{3} . yes C"
)


def gsm8k_pairs(size: int) -> list[Pair]:
    """Worked solutions against references; every second one has another problem's answer."""
    records = ProblemSet("test", size, seed=7)[:]
    golds = [record["target_answer"] for record in records]
    told = [
        f"{record['prompt']} Let us see. {gold}"
        for record, gold in zip(records, golds, strict=True)
    ]
    return [(told[i - i % 2], gold) for i, gold in enumerate(golds)]


def math_pairs(size: int, seed: int = 0) -> list[Pair]:
    """Solutions against references in two notations; every second one has another answer."""
    rng = random.Random(seed)
    pairs = []
    for index in range(size):
        prediction, gold = _FORMS[index % len(_FORMS)](rng)
        if rng.random() < 0.5:
            prediction, _ = _FORMS[index % len(_FORMS)](rng)
        lead = f"Adding {rng.randrange(10**6)} to both sides and dividing, we find the result."
        pairs.append((f"{lead} The answer is $\\boxed{{{prediction}}}$.", f"$\\boxed{{{gold}}}$"))
    return pairs


def _integer(rng: random.Random) -> Pair:
    n = rng.randrange(1000, 10**6)
    return f"{n:,}", str(n)


def _fraction(rng: random.Random) -> Pair:
    a, b = rng.randrange(1, 500), rng.randrange(2, 500)
    return f"\\dfrac{{{2 * a}}}{{{2 * b}}}", f"\\frac{{{a}}}{{{b}}}"


def _decimal(rng: random.Random) -> Pair:
    n = rng.randrange(1, 4000)
    return str(n / 8), f"\\frac{{{n}}}{{8}}"


def _surd(rng: random.Random) -> Pair:
    a, b = rng.randrange(2, 60), rng.randrange(2, 60)
    return f"\\sqrt{{{a * a * b}}}", f"{a}\\sqrt{{{b}}}"


def _tuple(rng: random.Random) -> Pair:
    a, b = rng.randrange(1, 900), rng.randrange(1, 900)
    return f"\\left({a / 2}, {b}\\right)", f"(\\frac{{{a}}}{{2}},{b})"


def _interval(rng: random.Random) -> Pair:
    a = rng.randrange(1, 9000)
    return f"\\left[{a}, \\infty\\right)", f"[{a},\\infty)"


def _set(rng: random.Random) -> Pair:
    a, b, c = rng.sample(range(1, 900), 3)
    return f"{c}, {a}, {b}", f"{a},{b},{c}"


def _matrix(rng: random.Random) -> Pair:
    a, b = rng.randrange(1, 900), rng.randrange(1, 900)
    return (
        f"\\begin{{bmatrix}} {a} \\\\ {b / 4} \\end{{bmatrix}}",
        f"\\begin{{pmatrix}}{a}\\\\\\frac{{{b}}}{{4}}\\end{{pmatrix}}",
    )


def _equation(rng: random.Random) -> Pair:
    a, b = rng.randrange(2, 90), rng.randrange(1, 900)
    return f"2y = {2 * a}x + {2 * b}", f"y={a}x+{b}"


def _expression(rng: random.Random) -> Pair:
    a, b = rng.randrange(1, 90), rng.randrange(1, 90)
    return f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})"


def _word(rng: random.Random) -> Pair:
    name = "".join(rng.choice("abcdefghijklmnop") for _ in range(7))
    return f"\\text{{{name}}}", name.capitalize()


_FORMS: tuple[Callable[[random.Random], Pair], ...] = (
    *(_integer, _integer, _fraction, _fraction, _decimal, _surd),
    *(_tuple, _interval, _set, _matrix, _equation, _expression, _word),
)


def file_pairs(path: Path) -> list[Pair]:
    """Answers of a MATH file against themselves in a sentence, shifted by one for every second."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    golds = [f"\\boxed{{{row['answer']}}}" for row in rows]
    return [(f"So it is ${golds[i - i % 2]}$.", gold) for i, gold in enumerate(golds)]


def rate(name: str, pairs: Sequence[Pair], grade: Callable[[str, str], Any]) -> dict[str, Any]:
    """Pairs a second of CPU time, and the share graded right."""
    start = time.process_time()
    right = sum(bool(grade(prediction, gold)) for prediction, gold in pairs)
    seconds = time.process_time() - start
    speed = len(pairs) / seconds
    bar = BARS.get(name)
    return {
        "name": name,
        "pairs": len(pairs),
        "right": right,
        "pairs_per_cpu_s": round(speed),
        "bar": bar,
        "met": None if bar is None else speed >= bar,
    }


def robust(prediction: str, gold: str) -> bool:
    """Robust MATH grading without computer algebra: what a core does."""
    match = equal(readings(math_answer(prediction)), readings(math_answer(gold)))
    return match is Match.EQUAL


def fuzz(count: int, seed: int = 0) -> dict[str, Any]:
    """Random strings through every grader: exceptions, slow ones, undecided ones."""
    rng = random.Random(seed)
    pieces = [*_PIECES.split(), " ", "\n", "the answer is ", "\u00bd", "\u2212", "\u221e"]
    exceptions = slow = undecided = 0
    worst = 0.0
    for _ in range(count):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 40)))
        other = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
        start = time.process_time()
        try:
            match = equal(readings(math_answer(text)), readings(math_answer(other)))
            undecided += match is Match.UNKNOWN
            grade_gsm8k(text, other)
            for task, gold in (("arc-c", "C"), ("strategyqa", "yes"), ("amc23", "2")):
                grade_task(task, text, gold)
                grade_task(task, text, gold, grader="legacy")
            grade_task("math500", text, "$\\boxed{2}$", grader="legacy")
        except Exception:
            exceptions += 1
        seconds = time.process_time() - start
        worst = max(worst, seconds)
        slow += seconds > FUZZ_LIMIT_S
    return {
        "name": "fuzz",
        "strings": count,
        "exceptions": exceptions,
        "hangs": slow,
        "worst_ms": round(1000 * worst, 1),
        "need_algebra": undecided,
    }


def algebra(count: int) -> dict[str, Any]:
    """Pairs that only computer algebra decides, through its isolated worker."""
    pairs = [(f"\\sum_{{k=1}}^{{{n}}} k", str(n * (n + 1) // 2)) for n in range(3, 3 + count)]
    pairs += [(f"0.{'3' * (20 + n)}", "\\sqrt{\\frac{1}{9}}") for n in range(count)]
    grade_math(*pairs[0])
    start = time.perf_counter()
    right = sum(bool(grade_math(prediction, gold)) for prediction, gold in pairs)
    seconds = time.perf_counter() - start
    return {
        "name": "algebra",
        "pairs": len(pairs),
        "right": right,
        "pairs_per_wall_s": round(len(pairs) / seconds, 1),
        "failures": dict(symbolic.failures),
    }


def measure(pairs: int, strings: int, math_file: str = "") -> list[dict[str, Any]]:
    """All rows of the table."""
    rows = [
        rate("GSM8K", gsm8k_pairs(pairs), grade_gsm8k),
        rate("MATH", math_pairs(pairs), robust),
    ]
    if math_file:
        rows.append(rate("MATH file", file_pairs(Path(math_file)), robust))
    rows += [fuzz(strings), algebra(20)]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=20000)
    parser.add_argument("--strings", type=int, default=10000)
    parser.add_argument("--math", default="", help="a MATH file with the field `answer`")
    parser.add_argument("--json", default="", help="file to write")
    options = parser.parse_args(arguments)
    rows = measure(options.pairs, options.strings, options.math)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if options.json:
        atomic_write_json(Path(options.json), {"machine": machine(), "rows": rows})
    missed = [row for row in rows if row.get("met") is False or row.get("exceptions")]
    missed += [row for row in rows if row.get("hangs")]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
