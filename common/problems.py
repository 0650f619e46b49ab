"""Deterministic generator of GSM8K-style word problems that are chains of small operations."""

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.problem_sets import GeneratedProblems, check_place, seeded, split_of_text
from common.problem_wording import FRACTION, GROWS, SETTINGS, TIMES

_SIGNS = ("+", "-", "*", "/")
_MAX_FACTOR = 5  # the wording has words for factors 2..5
_MAX_VALUE_LIMIT = 999


@dataclass(frozen=True)
class Difficulty:
    """Ranges a problem is drawn from.

    Attributes:
        min_ops: smallest number of operations of a problem.
        max_ops: largest number of operations of a problem.
        max_value: largest start value, operand and intermediate result.
        min_value: smallest start value and intermediate result.
        add: weight of additions.
        subtract: weight of subtractions.
        multiply: weight of multiplications (factors 2..5).
        divide: weight of exact divisions (divisors 2..5).
        carry_share: share of additions and subtractions drawn to carry or borrow in the ones,
            where the running result allows it.
    """

    min_ops: int = 1
    max_ops: int = 4
    max_value: int = 99
    min_value: int = 2
    add: float = 0.35
    subtract: float = 0.3
    multiply: float = 0.2
    divide: float = 0.15
    carry_share: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.min_ops <= self.max_ops <= 8:
            raise UserError(
                f"problem difficulty: min_ops={self.min_ops} and max_ops={self.max_ops} must "
                "satisfy 1 <= min_ops <= max_ops <= 8"
            )
        if self.min_value < 0 or not self.min_value + 8 <= self.max_value <= _MAX_VALUE_LIMIT:
            raise UserError(
                f"problem difficulty: min_value={self.min_value} and max_value={self.max_value} "
                f"must satisfy 0 <= min_value <= max_value - 8 and max_value <= {_MAX_VALUE_LIMIT}"
            )
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise UserError(
                "problem difficulty: the weights add, subtract, multiply, divide must not be "
                "negative and one of them must be positive"
            )
        if not 0 <= self.carry_share <= 1:
            raise UserError(
                f"problem difficulty: carry_share={self.carry_share} must be between 0 and 1"
            )

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """Weights of the operations in the order + - * /."""
        return (self.add, self.subtract, self.multiply, self.divide)


Step = tuple[int, str, int, int]  # running result, sign, operand, next running result


def split_of(chain: Sequence[Step]) -> str:
    """Split a chain belongs to, decided by a stable hash of its start, signs and operands.

    Args:
        chain: the steps of the problem.

    Returns:
        "test" for one chain in ten, else "train".
    """
    steps = "".join([f"{sign}{operand}" for _, sign, operand, _ in chain])
    return split_of_text(f"{chain[0][0]}{steps}")


class _ChainSampler:
    """Draws chains of one difficulty; remembers from which values a run of signs can be told."""

    def __init__(self, difficulty: Difficulty) -> None:
        self.difficulty = difficulty
        self._values: dict[str, frozenset[int]] = {
            "": frozenset(range(difficulty.min_value, difficulty.max_value + 1))
        }
        self._starts: dict[str, tuple[int, ...]] = {}
        self._factors: dict[tuple[str, int], tuple[int, ...]] = {}

    def values(self, signs: str) -> frozenset[int]:
        """Values from which every operation of `signs` can be applied within the range."""
        known = self._values.get(signs)
        if known is None:
            targets = self.values(signs[1:])
            known = frozenset(
                value for value in self._values[""] if _some(self._operands(signs, value, targets))
            )
            self._values[signs] = known
        return known

    def _operands(self, signs: str, value: int, targets: frozenset[int]) -> Iterator[int]:
        low, high = self.difficulty.min_value, self.difficulty.max_value
        if signs[0] == "+":
            return (n for n in range(2, high - value + 1) if value + n in targets)
        if signs[0] == "-":
            return (n for n in range(2, value - low + 1) if value - n in targets)
        factors = range(2, _MAX_FACTOR + 1)
        if signs[0] == "*":
            return (n for n in factors if value * n in targets)
        return (n for n in factors if value % n == 0 and value // n in targets)

    def _linear(self, rng: random.Random, signs: str, value: int) -> int:
        """Operand of + or -; drawn, not enumerated, because this is the hot path."""
        targets = self.values(signs[1:])
        plus = signs[0] == "+"
        difficulty = self.difficulty
        room = (difficulty.max_value - value if plus else value - difficulty.min_value) - 1
        ones = value % 10
        tries = 6 if rng.random() < difficulty.carry_share else 0
        for attempt in range(40):
            operand = 2 + int(rng.random() * room)
            if (value + operand if plus else value - operand) not in targets:
                continue
            carries = ones + operand % 10 >= 10 if plus else ones < operand % 10
            if carries or attempt >= tries:
                return operand
        options = tuple(self._operands(signs, value, targets))
        return options[int(rng.random() * len(options))]

    def _factor(self, rng: random.Random, signs: str, value: int) -> int:
        options = self._factors.get((signs, value))
        if options is None:
            options = tuple(self._operands(signs, value, self.values(signs[1:])))
            self._factors[signs, value] = options
        return options[int(rng.random() * len(options))]

    def draw(self, rng: random.Random) -> list[Step]:
        """One chain; the signs come first so that their shares follow the weights."""
        difficulty = self.difficulty
        span = difficulty.max_ops - difficulty.min_ops + 1
        starts: tuple[int, ...] = ()
        while not starts:
            count = difficulty.min_ops + int(rng.random() * span)
            signs = "".join(rng.choices(_SIGNS, difficulty.weights, k=count))
            known = self._starts.get(signs)
            if known is None:
                known = self._starts[signs] = tuple(sorted(self.values(signs)))
            starts = known
        value = starts[int(rng.random() * len(starts))]
        chain = []
        for position, sign in enumerate(signs):
            rest = signs[position:]
            if sign in "+-":
                operand = self._linear(rng, rest, value)
                result = value + operand if sign == "+" else value - operand
            else:
                operand = self._factor(rng, rest, value)
                result = value * operand if sign == "*" else value // operand
            chain.append((value, sign, operand, result))
            value = result
        return chain


def _some(options: Iterator[int]) -> bool:
    return next(options, None) is not None


@functools.lru_cache(maxsize=8)
def _sampler(difficulty: Difficulty) -> _ChainSampler:
    return _ChainSampler(difficulty)


def _tell(rng: random.Random, chain: Sequence[Step]) -> str:
    """Word the chain: an opening, one clause per operation, a question."""

    def pick(options: Sequence[Any]) -> Any:
        return options[int(rng.random() * len(options))]

    setting = pick(SETTINGS)
    name, capital, small, objective, possessive = pick(setting.subjects)
    words = {
        "N": name,
        "S": capital,
        "s": small,
        "o": objective,
        "p": possessive,
        "x": pick(setting.things),
        "c": pick(setting.containers),
        "n": chain[0][0],
    }
    clauses = [pick(setting.opening).format_map(words)]
    previous = ""
    for _, sign, operand, _ in chain:
        options = setting.steps[sign]
        clause = pick(options)
        if clause == previous:  # the same sentence twice in a row reads like a slip
            clause = options[(options.index(clause) + 1) % len(options)]
        previous = clause
        words["n"] = operand
        if sign in "*/":
            words["T"], words["V"] = TIMES[operand], GROWS[operand]
            words["F"] = FRACTION[operand]
        clauses.append(clause.format_map(words))
    clauses.append(pick(setting.question).format_map(words))
    return " ".join(clauses)


def rationale(chain: Sequence[Step]) -> str:
    """Worked solution of a chain.

    Args:
        chain: the steps of the problem.

    Returns:
        One line per step and the answer line, e.g. "12+7=19\\n19*2=38\\n#### 38".
    """
    lines = [f"{value}{sign}{operand}={result}" for value, sign, operand, result in chain]
    return "\n".join([*lines, f"#### {chain[-1][3]}"])


def generate(
    split: str, index: int, seed: int = 0, difficulty: Difficulty | None = None
) -> dict[str, Any]:
    """One problem, a pure function of its arguments.

    Args:
        split: "train" or "test"; the two never share a chain, whatever seed and difficulty.
        index: position of the problem, >= 0.
        seed: seed of the whole set.
        difficulty: ranges of the problem; None takes `Difficulty()`.

    Returns:
        Record {id, prompt, target_answer, task, metadata: {num_ops, ops, chain}} where chain lists
        [running result, sign, operand, next result].

    Raises:
        UserError: unknown split or negative index.
    """
    check_place(split, index)
    sampler = _sampler(Difficulty() if difficulty is None else difficulty)
    rng = seeded(split, seed, index)
    chain = sampler.draw(rng)
    while split_of(chain) != split:
        chain = sampler.draw(rng)
    return {
        "id": f"generated-{split}-{seed}-{index}",
        "prompt": _tell(rng, chain),
        "target_answer": rationale(chain),
        "task": "gsm8k",
        "metadata": {
            "num_ops": len(chain),
            "ops": "".join([step[1] for step in chain]),
            "chain": [list(step) for step in chain],
        },
    }


class ProblemSet(GeneratedProblems):
    """A fixed number of generated problems of one difficulty."""

    def __init__(
        self, split: str, size: int, seed: int = 0, difficulty: Difficulty | None = None
    ) -> None:
        """Describe the set; nothing is generated before it is read.

        Args:
            split: "train" or "test".
            size: number of problems.
            seed: seed of the whole set.
            difficulty: ranges of the problems; None takes `Difficulty()`.

        Raises:
            UserError: unknown split or negative size.
        """
        super().__init__(split, size, seed)
        self.difficulty = Difficulty() if difficulty is None else difficulty

    def problem(self, position: int) -> dict[str, Any]:
        """The chain at a position, 0 <= position < size."""
        return generate(self.split, position, self.seed, self.difficulty)
