"""Prompt templates: what is asked, as chat messages, and the token ids a model reads.

A template has an id and a hash of its wording; both go into the resolved config, so numbers of two
wordings are never taken for one. Answers need blank lines between steps: those are the places where
corrections act.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.errors import UserError
from common.problems_one_step import few_shot_messages
from esm.datasets import TaskExample

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

SYSTEM = "You are a helpful assistant that follows the user's instructions carefully."
MIN_DELIMITER_SHARE = 0.5

_STEPS = (
    "Solve the problem step by step. Show every intermediate step, and leave a blank line between "
    "two steps."
)
_BRIEF_STEPS = (
    "Solve the problem step by step, briefly: one short line per step, a blank line between two "
    "steps, plain text without markdown or LaTeX."
)
_TEMPLATES: dict[str, str] = {
    "gsm8k_0shot": (
        f"{_STEPS} Finish with one line of the form\n#### <answer>\nwhere <answer> is only the "
        "final number.\n\nProblem: {question}"
    ),
    "gsm8k_0shot_compact": (
        f"{_BRIEF_STEPS} Finish with one line of the form\n#### <answer>\nwhere <answer> is only "
        "the final number.\n\nProblem: {question}"
    ),
    "math_0shot": (
        f"{_STEPS} On the last line, put the final answer, and nothing else, inside "
        "\\boxed{{}}.\n\nProblem: {question}"
    ),
    "arc_0shot": (
        "Answer the question. First explain your reasoning step by step, with a blank line between "
        "two steps; then choose one of the options A to E. Finish with one line of the form\n"
        "#### <letter>\nwhere <letter> is the letter of your choice.\n\nQuestion: {question}\n"
        "{options}"
    ),
    "strategyqa_0shot": (
        "Answer the question. Think it through step by step, with a blank line between two steps, "
        "then decide: Yes or No. Finish with one line of the form\n#### <Yes/No>\n\n"
        "Question: {question}"
    ),
}
_FEW_SHOT = {"problems_0shot": 0, "problems_1shot": 1, "problems_3shot": 3}
TEMPLATES = (*_TEMPLATES, *_FEW_SHOT)
_ALIASES = {
    "svamp_0shot": "gsm8k_0shot",
    "arc-c_0shot": "arc_0shot",
    "arc_challenge_0shot": "arc_0shot",
    "openbookqa_0shot": "arc_0shot",
    "commonsense_qa_0shot": "arc_0shot",
}


def check_template(name: str) -> str:
    """The canonical id of a template.

    Raises:
        UserError: there is no such template.
    """
    canonical = _ALIASES.get(name, name)
    if canonical not in TEMPLATES:
        known = ", ".join((*TEMPLATES, *_ALIASES))
        raise UserError(f"prompt.template={name!r} is unknown; use one of {known}")
    return canonical


def template_hash(name: str) -> str:
    """Sixteen hex digits that change with the wording of a template, system message included."""
    canonical = check_template(name)
    if canonical in _FEW_SHOT:
        shots = few_shot_messages("{question}", _FEW_SHOT[canonical])
        text = "\n".join(f"{m['role']}: {m['content']}" for m in shots)
    else:
        text = _TEMPLATES[canonical]
    return hashlib.blake2b(f"{SYSTEM}\n{text}".encode(), digest_size=8).hexdigest()


def build_messages(example: TaskExample, template: str) -> list[Message]:
    """What is asked about an example.

    Args:
        example: the question, with options where the template shows them.
        template: id or alias.

    Returns:
        A system message and a user message; templates with examples have them in between.

    Raises:
        UserError: the template is unknown, or needs options that the example lacks.
    """
    canonical = check_template(template)
    system = {"role": "system", "content": SYSTEM}
    if canonical in _FEW_SHOT:
        return [system, *few_shot_messages(example.question, _FEW_SHOT[canonical])]
    options = example.meta.get("options")
    if "{options}" in _TEMPLATES[canonical] and not options:
        raise UserError(
            f"prompt.template={template} shows options, and {example.task} has none; use another"
        )
    lines = "\n".join(f"({letter}) {text}" for letter, text in options or ())
    content = _TEMPLATES[canonical].format(question=example.question.strip(), options=lines)
    return [system, {"role": "user", "content": content}]


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Token ids of a conversation, ready for the answer to begin.

    Args:
        messages: the conversation.
        tokenizer: a `transformers` tokenizer. With a chat template, that one is used with its
            generation prompt; without, roles are written out.

    Returns:
        Ids.
    """
    if getattr(tokenizer, "chat_template", None):
        # return_dict: transformers 5 would return a mapping by default, 4 a list.
        ids = tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return [int(token) for token in ids]
    return [int(token) for token in tokenizer.encode(labelled_text(messages))]


def labelled_text(messages: Sequence[Message]) -> str:
    """A conversation as plain text with role labels, for tokenizers without a chat template."""
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*lines, "Assistant:"])


@dataclasses.dataclass(frozen=True)
class DelimiterShare:
    """How many answers of a template have at least one place where a correction can act."""

    template: str
    count: int
    total: int

    @property
    def share(self) -> float:
        """count / total; 1 where there is no answer."""
        return self.count / self.total if self.total else 1.0

    def warning(self) -> str:
        """One line for the log if the share is low, else nothing."""
        if self.share >= MIN_DELIMITER_SHARE:
            return ""
        return (
            f"prompt.template={self.template}: only {self.count} of {self.total} answers hold the "
            "segment delimiter; corrections cannot act in the others"
        )


def delimiter_share(template: str, answers: Iterable[str], delimiter: str) -> DelimiterShare:
    """Counts answers that hold the segment delimiter."""
    found = [delimiter in answer for answer in answers]
    return DelimiterShare(check_template(template), sum(found), len(found))


def prompt_record(template: str) -> Mapping[str, str]:
    """Id and hash of a template for the resolved config."""
    return {"template": check_template(template), "hash": template_hash(template)}
