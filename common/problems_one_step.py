"""One-step word problems in plain chat style: a question set for small language models.

Numbers stay at or below 50 and every problem needs one operation, so a model of about 100 million
parameters answers some of its samples right and some wrong: what methods need that contrast
rollouts of the same question. Worked solutions have blank lines between their steps.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.problem_sets import GeneratedProblems, check_place, seeded, split_of_text

DATASET = "problems"  # the name under which configs ask for this set
MAX_VALUE = 50
INSTRUCTION = (
    "Solve the problem step by step. Put a blank line between the steps, and write the answer "
    "as #### followed by the number on the last line."
)

# Of ten problems in a row, four add, four subtract, one multiplies and one divides.
_BLOCK = "++++----*/"
# fmt: off
_NAMES = (
    "Tom", "Anna", "Ben", "Maya", "Sam", "Lucy", "Jack", "Emma", "Max", "Nora", "Will", "Ella",
    "Adam", "Ruby", "Luke", "Ivy", "Paul", "Jane", "Eric", "Rosa",
)
_THINGS = (
    "pens", "books", "apples", "coins", "stamps", "cards", "marbles", "shells", "cookies",
    "stickers", "balloons", "pencils", "oranges", "buttons", "toys", "beads",
)
# fmt: on
_CONTAINERS = ("boxes", "bags", "baskets", "jars", "drawers")


@dataclass(frozen=True)
class _Story:
    """A question and its first solution step for one kind of change.

    Attributes:
        question: slots {N} name, {x} thing, {c} containers, {a} and {b} the two numbers.
        reading: what the question says, as the first step of the solution.
    """

    question: str
    reading: str


_STORIES: dict[str, tuple[_Story, ...]] = {
    "+": (
        _Story(
            "{N} has {a} {x}. {N} buys {b} more. How many {x} does {N} have now?",
            "{N} starts with {a} {x} and buys {b} more.",
        ),
        _Story(
            "{N} finds {a} {x} in the morning and {b} {x} in the evening. How many {x} does {N} "
            "find in all?",
            "{N} finds {a} {x} and then {b} {x}.",
        ),
        _Story(
            "{N} has {a} {x}. A friend gives {N} {b} more {x}. How many {x} does {N} have now?",
            "{N} starts with {a} {x} and gets {b} more.",
        ),
        _Story(
            "There are {a} {x} on a table. {N} puts {b} more {x} on it. How many {x} are on the "
            "table now?",
            "The table holds {a} {x} and {N} adds {b} more.",
        ),
    ),
    "-": (
        _Story(
            "{N} has {a} {x}. {N} gives {b} of them to a friend. How many {x} does {N} have left?",
            "{N} starts with {a} {x} and gives away {b}.",
        ),
        _Story(
            "{N} had {a} {x} and lost {b} of them. How many {x} are left?",
            "{N} starts with {a} {x} and loses {b}.",
        ),
        _Story(
            "There are {a} {x} in a shop. {N} buys {b} of them. How many {x} are left in the shop?",
            "The shop has {a} {x} and {N} takes {b}.",
        ),
        _Story(
            "{N} has {a} {x}. {N} sells {b} {x}. How many {x} does {N} still have?",
            "{N} starts with {a} {x} and sells {b}.",
        ),
    ),
    "*": (
        _Story(
            "{N} has {a} {c}. There are {b} {x} in each of them. How many {x} does {N} have?",
            "There are {a} {c} with {b} {x} each.",
        ),
        _Story(
            "{N} fills {a} {c} with {b} {x} each. How many {x} does {N} use?",
            "{N} fills {a} {c} with {b} {x} each.",
        ),
    ),
    "/": (
        _Story(
            "{N} shares {a} {x} equally among {b} friends. How many {x} does each friend get?",
            "{a} {x} are split equally among {b} friends.",
        ),
        _Story(
            "{N} puts {a} {x} into {b} {c} with the same number in each. How many {x} are in each "
            "of the {c}?",
            "{a} {x} go equally into {b} {c}.",
        ),
    ),
}


def one_step_split(a: int, sign: str, b: int) -> str:
    """Split of an arithmetic fact, decided by a stable hash; the splits are halves."""
    # Even hashes include those of the longer problems' test split (multiples of ten), so a model
    # trained on this train split has seen no chain of either test split.
    return split_of_text(f"{a}{sign}{b}", share=2)


@functools.cache
def _facts(split: str, sign: str, seed: int) -> tuple[tuple[int, int], ...]:
    """All operand pairs of a split in the order in which a seed uses them."""
    numbers = range(2, MAX_VALUE + 1)
    if sign == "+":
        pairs = [(a, b) for a in numbers for b in numbers if a + b <= MAX_VALUE]
    elif sign == "-":
        pairs = [(a, b) for a in numbers for b in numbers if a - b >= 2]
    elif sign == "*":
        pairs = [(a, b) for a in numbers for b in numbers if a * b <= MAX_VALUE]
    else:
        pairs = [(a, b) for a in numbers for b in numbers if a % b == 0 and a // b >= 2]
    pairs = [pair for pair in pairs if one_step_split(pair[0], sign, pair[1]) == split]
    seeded("facts", split, sign, seed).shuffle(pairs)
    return tuple(pairs)


def generate_one_step(split: str, index: int, seed: int = 0) -> dict[str, Any]:
    """One problem, a pure function of its arguments.

    Every arithmetic fact of a split comes up once before any comes up again (in other words), so
    the first several hundred problems differ in more than names.

    Args:
        split: "train" or "test"; the two never share a fact, whatever the seeds.
        index: position of the problem, >= 0.
        seed: seed of the whole set.

    Returns:
        Record {id, prompt, target_answer, task: "gsm8k", metadata: {ops, chain}} where the target
        has three paragraphs (reading, equation, `#### n`) and chain is one step
        [a, sign, b, result].

    Raises:
        UserError: unknown split or negative index.
    """
    check_place(split, index)
    block, place = divmod(index, len(_BLOCK))
    order = list(_BLOCK)
    seeded("block", split, seed, block).shuffle(order)
    sign = order[place]
    facts = _facts(split, sign, seed)
    number = block * _BLOCK.count(sign) + order[:place].count(sign)
    a, b = facts[number % len(facts)]
    rng = seeded("words", split, seed, index)
    story = rng.choice(_STORIES[sign])
    words = {
        "N": rng.choice(_NAMES),
        "x": rng.choice(_THINGS),
        "c": rng.choice(_CONTAINERS),
        "a": a,
        "b": b,
    }
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    reading = story.reading.format_map(words)
    return {
        "id": f"one-step-{split}-{seed}-{index}",
        "prompt": story.question.format_map(words),
        "target_answer": f"{reading}\n\n{a} {sign} {b} = {result}\n\n#### {result}",
        "task": "gsm8k",
        "metadata": {"ops": sign, "chain": [[a, sign, b, result]]},
    }


class OneStepProblemSet(GeneratedProblems):
    """A fixed number of one-step problems."""

    def problem(self, position: int) -> dict[str, Any]:
        """The problem at a position, 0 <= position < size."""
        return generate_one_step(self.split, position, self.seed)


# Written out, so that they are the same for every seed; their facts are of the train split.
_SHOTS = (
    (
        "Kate has 12 plums. Kate buys 7 more. How many plums does Kate have now?",
        "Kate starts with 12 plums and buys 7 more.\n\n12 + 7 = 19\n\n#### 19",
    ),
    (
        "Dan has 31 rings. Dan gives 13 of them to a friend. How many rings does Dan have left?",
        "Dan starts with 31 rings and gives away 13.\n\n31 - 13 = 18\n\n#### 18",
    ),
    (
        "Leo has 4 trays. There are 7 eggs in each of them. How many eggs does Leo have?",
        "There are 4 trays with 7 eggs each.\n\n4 * 7 = 28\n\n#### 28",
    ),
)


def few_shot_messages(question: str, shots: int = 3) -> list[dict[str, str]]:
    """Chat messages that ask a question after worked examples.

    Args:
        question: the `prompt` of a problem.
        shots: number of examples, 0 to 3.

    Returns:
        Messages {role, content}: per example one of the user and one of the assistant, then the
        question. Every user message starts with `INSTRUCTION`.

    Raises:
        UserError: there are not that many examples.
    """
    if not 0 <= shots <= len(_SHOTS):
        raise UserError(f"few-shot prompt: {shots} examples asked for, 0 to {len(_SHOTS)} exist")
    messages = []
    for example, answer in _SHOTS[:shots]:
        messages.append({"role": "user", "content": f"{INSTRUCTION}\n\n{example}"})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": f"{INSTRUCTION}\n\n{question}"})
    return messages


def few_shot_text(question: str, shots: int = 3) -> str:
    """The same without a chat template: `Question:` and `Answer:` paragraphs.

    Args:
        question: the `prompt` of a problem.
        shots: number of examples, 0 to 3.

    Returns:
        One text that ends in `Answer:`.

    Raises:
        UserError: there are not that many examples.
    """
    lines = [INSTRUCTION]
    messages: list[Mapping[str, str]] = list(few_shot_messages(question, shots))
    for message in messages:
        content = message["content"].removeprefix(f"{INSTRUCTION}\n\n")
        label = "Question" if message["role"] == "user" else "Answer"
        lines.append(f"{label}: {content}")
    return "\n\n".join([*lines, "Answer:"])
