r"""Deterministic MATH-style problems: seven subjects, five levels, answers in `\boxed{..}`.

Short questions whose answers take the forms of competition mathematics (fractions, surds, points,
lists, intervals), for runs and tests of MATH code without the data set.
"""

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from common.problem_sets import GeneratedProblems, check_place, seeded, split_of_text

LEVELS = (1, 2, 3, 4, 5)
Problem = tuple[str, str, str]  # question, work, answer


def _fraction(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _algebra(rng: random.Random, top: int) -> Problem:
    a, b, c = rng.randint(2, 9), rng.randint(1, top), rng.randint(1, top)
    question = f"Solve for $x$: ${a}x + {b} = {c}$."
    return question, f"{a}x={c - b}", _fraction(Fraction(c - b, a))


def _counting(rng: random.Random, top: int) -> Problem:
    n, k = rng.randint(4, 4 + top // 4), rng.randint(2, 3)
    return f"In how many ways can one choose {k} of {n} books?", "", str(math.comb(n, k))


def _geometry(rng: random.Random, top: int) -> Problem:
    a, b = rng.randint(1, top), rng.randint(1, top)
    question = f"A right triangle has legs {a} and {b}. How long is its hypotenuse?"
    square = a * a + b * b
    root = math.isqrt(square)
    answer = str(root) if root * root == square else f"\\sqrt{{{square}}}"
    return question, f"{a * a}+{b * b}={square}", answer


def _roots(rng: random.Random, top: int) -> Problem:
    p, q = sorted((rng.randint(1, top), rng.randint(1, top)))
    question = f"Find all roots of $x^2 - {p + q}x + {p * q}$."
    return question, "", str(p) if p == q else f"{p},{q}"


def _remainder(rng: random.Random, top: int) -> Problem:
    a, b = rng.randint(10, 10 * top), rng.randint(3, 12)
    return f"What is the remainder when ${a}$ is divided by ${b}$?", "", str(a % b)


def _sum_of_fractions(rng: random.Random, top: int) -> Problem:
    a, b = rng.randint(2, 2 + top // 2), rng.randint(2, 2 + top // 2)
    question = f"What is $\\frac{{1}}{{{a}}} + \\frac{{1}}{{{b}}}$?"
    return question, f"{a + b}/{a * b}", _fraction(Fraction(1, a) + Fraction(1, b))


def _midpoint(rng: random.Random, top: int) -> Problem:
    a, b, c, d = (rng.randint(-top, top) for _ in range(4))
    question = f"What is the midpoint of $({a},{b})$ and $({c},{d})$?"
    return question, "", f"({_fraction(Fraction(a + c, 2))},{_fraction(Fraction(b + d, 2))})"


_SUBJECTS: dict[str, Callable[[random.Random, int], Problem]] = {
    "algebra": _algebra,
    "counting_and_probability": _counting,
    "geometry": _geometry,
    "intermediate_algebra": _roots,
    "number_theory": _remainder,
    "prealgebra": _sum_of_fractions,
    "precalculus": _midpoint,
}
SUBJECTS = tuple(_SUBJECTS)


def math_split_of(question: str) -> str:
    """Split of a question, decided by a stable hash; one in ten is a test question."""
    return split_of_text(question)


def generate_math(split: str, index: int, seed: int = 0) -> dict[str, Any]:
    """One problem, a pure function of its arguments; the subjects take turns.

    Args:
        split: "train" or "test"; the two never share a question, whatever the seeds.
        index: position of the problem, >= 0.
        seed: seed of the whole set.

    Returns:
        Record {id, prompt, target_answer, task: "math", metadata: {subject, level, answer}}.

    Raises:
        UserError: unknown split or negative index.
    """
    check_place(split, index)
    rng = seeded("math", split, seed, index)
    subject = SUBJECTS[index % len(SUBJECTS)]
    while True:
        # A level may have too few questions for a split; drawn anew, some level has one.
        level = rng.choice(LEVELS)
        question, work, answer = _SUBJECTS[subject](rng, 6 * level)
        if math_split_of(question) == split:
            break
    return {
        "id": f"generated-math-{split}-{seed}-{index}",
        "prompt": question,
        "target_answer": f"{work}\n\\boxed{{{answer}}}".lstrip(),
        "task": "math",
        "metadata": {"subject": subject, "level": f"Level {level}", "answer": answer},
    }


class MathProblemSet(GeneratedProblems):
    """A fixed number of generated MATH-style problems."""

    def problem(self, position: int) -> dict[str, Any]:
        """The problem at a position, 0 <= position < size."""
        return generate_math(self.split, position, self.seed)
