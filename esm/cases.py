"""Questions one method gets right and the other wrong, as pages to read."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.rundir import atomic_write
from esm.compare import common_rows
from esm.datasets import TaskExample

TEXT_LIMIT = 2000
CASE_TEXT_LIMIT = 4000
Rows = Sequence[Mapping[str, Any]]


def write_cases(
    path: Path, examples: Sequence[TaskExample], greedy: Rows, steered: Rows, top: int
) -> None:
    """`cases_T*.md`: up to `top` improved and as many regressed questions."""
    questions = {example.id: example.question for example in examples}
    pairs = common_rows(greedy, steered)
    improved = [(a, b) for a, b in pairs if not a["correct"] and b["correct"]]
    regressed = [(a, b) for a, b in pairs if a["correct"] and not b["correct"]]
    lines = ["# Cases", ""]
    for title, chosen in (("Improved", improved), ("Regressed", regressed)):
        lines += [f"## {title}: {len(chosen)}", ""]
        for before, after in chosen[:top]:
            name = before["example_id"]
            lines += [f"### {name}", "", "Question:", "", *_quote(questions.get(name, "")), ""]
            lines += [f"Gold: `{before['gold']}`", ""]
            for method, row in (("greedy", before), ("esm", after)):
                lines += _answer(method, row, TEXT_LIMIT)
            lines += [*_steps(after), ""]
    atomic_write(path, "\n".join(lines) + "\n")


def write_case_page(path: Path, examples: Sequence[TaskExample], rows: Mapping[str, Rows]) -> None:
    """The page of the stage case: every method on a few questions, with the step table."""
    lines = ["# Cases", ""]
    by_method = {name: {row["example_id"]: row for row in found} for name, found in rows.items()}
    for example in examples:
        lines += [f"## {example.id}", "", "Question:", "", *_quote(example.question), ""]
        first = next(iter(by_method.values()))[example.id]
        lines += [f"Gold: `{first['gold']}`", ""]
        for method, found in by_method.items():
            row = found[example.id]
            lines += _answer(method, row, CASE_TEXT_LIMIT)
            lines += [*_steps(row), ""]
    atomic_write(path, "\n".join(lines) + "\n")


def _answer(method: str, row: Mapping[str, Any], limit: int) -> list[str]:
    verdict = "correct" if row["correct"] else "wrong"
    text = str(row["text"])
    shown = text if len(text) <= limit else text[:limit] + " [...]"
    head = f"{method}: `{row['pred']}` ({verdict}, {row['tokens_used']} tokens)"
    return [head, "", *_quote(shown), ""]


def _steps(row: Mapping[str, Any]) -> Iterator[str]:
    """The step log as a table."""
    if "steps" not in row:
        return
    yield "| m | chosen | score | strength | lookup | most similar | tokens | probe tokens |"
    yield "|---|---|---|---|---|---|---|---|"
    for step in row["steps"]:
        top = step.get("mem_top_sim")
        cells = (
            f"{step['m']} (rest)" if step.get("phase") == "tail" else str(step["m"]),
            step["chosen"],
            f"{step['chosen_score']:.4g}",
            f"{step['chosen_scale']:.4g}",
            str(step.get("mem_reason", "-")),
            "-" if top is None else f"{top:.4f}",
            str(step["spent_commit"]),
            str(step["spent_probe"]),
        )
        yield "| " + " | ".join(cells) + " |"


def _quote(text: str) -> list[str]:
    # A fence longer than any in the text keeps the page intact.
    fence = "~" * 3
    while fence in text:
        fence += "~"
    return [fence, text, fence]
