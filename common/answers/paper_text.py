r"""Where the published MATH verifier looks for an answer, its faults included."""

import re

_ESCAPED_BOX = re.compile(r"\\\\boxed\{([^}]*)\}")


def paper_answer(text: str) -> str:
    r"""Finds the answer of a text as published (paper verifier, MATH extraction).

    A box counts if it is written with two backslashes, or if the text ends in its brace; otherwise
    all of the text is the answer.
    """
    text = text.strip()
    box = _ESCAPED_BOX.search(text)
    if box is not None:
        text = box.group(1)
    elif text.endswith("}") and "\\boxed" in text:
        text = text.rpartition("\\boxed")[2].strip("{}")
    return text


def plain_answer(text: str) -> str:
    """The answer as it is parsed: without dollar signs, doubled backslashes halved."""
    return paper_answer(text).replace("$", "").replace("\\\\", "\\").strip()
