"""The part of the page about one sample: question, label, answer, and the way to it."""

from collections.abc import Sequence
from html import escape
from typing import Any

from halting_jax import viewer_svg as svg
from halting_jax.viewer_data import Frame, Sample
from halting_jax.viewer_marks import Mark, Marks

_HINT = "Point at a cell, or focus a grid and use the arrow keys."


def sample_data(sample: Sample) -> dict[str, Any]:
    """What the script needs of a sample; marks are numbers into one list."""
    frames: tuple[Frame | None, ...] = (*sample.frames, None)
    drawn = [frame or sample.final for frame in frames]
    marks = dict.fromkeys(
        [*sample.inputs, *sample.label, *(mark for frame in drawn for mark in frame.answers)]
    )
    code = {mark: i for i, mark in enumerate(marks)}
    shown = [
        {
            "steps": answer.steps,
            "answers": [code[mark] for mark in answer.answers],
            "right": [int(good) for good in answer.right],
            "said": said_of(sample, frame),
        }
        for frame, answer in zip(frames, drawn, strict=True)
    ]
    return {
        "side": sample.side,
        "palette": [list(mark) for mark in marks],
        "input": [code[mark] for mark in sample.inputs],
        "label": [code[mark] for mark in sample.label],
        "steps": sample.answer_steps if sample.side else (),
        "settled": sample.settled,
        "frames": shown,
        "hint": _HINT,
    }


def said_of(sample: Sample, frame: Frame | None = None) -> str:
    """One line about the answer of a frame; None = the sample's own answer."""
    when = f"after {frame.steps} of {sample.max_steps}" if frame else "as it halts"
    if frame is None and sample.fixed_steps:
        when = f"after {sample.fixed_steps} steps, halting overruled"
    frame = frame or sample.final
    parts = [
        f"{frame.accuracy:.1%} right",
        "exact" if frame.exact else "not exact",
        f"mean probability {frame.confidence:.0%}",
    ]
    if frame.valid is not None:
        parts.append(f"path: {path_word(frame)}")
    return f"{when}: {', '.join(parts)}"


def path_word(frame: Frame) -> str:
    """Whether a maze's marks form a path."""
    if frame.optimal:
        return "shortest"
    return "valid" if frame.valid else "none"


def sample_card(sample: Sample, number: int = 1) -> str:
    """The part of the page about one sample; without scripts it is complete too."""
    body = _boards(sample) if sample.side else _strips(sample)
    return (
        f'<article class="card sample" id="sample-{number}" aria-label="sample {number}">'
        f'{_badges(sample)}{body}{_controls(sample, number)}<p class="said" aria-live="polite">'
        f"{escape(said_of(sample))}</p>{_maps(sample)}</article>"
    )


def _badges(sample: Sample) -> str:
    final = sample.final
    badges = [("nothing is asked", "")]
    if sample.label:
        badges = [
            ("exact: yes", "good") if final.exact else ("exact: no", "bad"),
            (f"{final.accuracy:.1%} of {'cells' if sample.side else 'answers'}", ""),
        ]
    if final.valid is not None:
        badges.append((f"valid path: {_yes(final.valid)}", "good" if final.valid else "bad"))
        badges.append(
            (f"shortest: {_yes(bool(final.optimal))}", "good" if final.optimal else "bad")
        )
    badges.append((f"mean steps {sample.mean_steps:.2f} of {sample.max_steps}", ""))
    shown = "".join(f'<span class="badge {kind}">{escape(text)}</span>' for text, kind in badges)
    title = f"{sample.split} {sample.index}"
    return (
        f'<div class="top"><h3>{escape(title)}</h3><span class="muted">{sample.difficulty} '
        f"{escape(sample.unit)}</span>{shown}</div>"
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _boards(sample: Sample) -> str:
    side = sample.side
    answer = svg.grid(sample.final.answers, side, "answer of the model", sample.final.right)
    return (
        f'<div class="boards"><figure><h4>Input</h4>{svg.grid(sample.inputs, side, "input")}'
        f"</figure><figure><h4>Label</h4>{svg.grid(sample.label, side, 'label')}</figure>"
        f'<figure class="answer"><h4>Answer</h4>{answer}</figure></div>'
        f'<p class="readout note" aria-live="polite">{escape(_HINT)}</p>'
    )


def _strips(sample: Sample) -> str:
    steps = (*sample.input_steps, *sample.answer_steps)
    levels = svg.level_of(steps)
    split = len(sample.input_steps)
    final = sample.final
    asked = _strip(sample.inputs, sample.input_steps, levels[:split])
    label = _strip(sample.label, (), ())
    answer = _strip(final.answers, sample.answer_steps, levels[split:], final.right)
    key = svg.legend(steps, "steps") if steps else ""
    return (
        f"<h4>Input</h4>{asked}<h4>Label</h4>{label}"
        f'<div class="answer"><h4>Answer</h4>{answer}</div>{key}'
    )


def _strip(
    marks: Marks,
    steps: Sequence[float],
    levels: Sequence[int],
    right: Sequence[bool] | None = None,
) -> str:
    if not marks:
        return '<p class="muted">nothing is asked here</p>'
    items = []
    for i, mark in enumerate(marks):
        count = ""
        if steps:
            count = f'<small class="h{levels[i]}">{svg.number(steps[i])}</small>'
        wrong = " wrong" if right is not None and not right[i] else ""
        items.append(f'<li class="{mark.kind}{wrong}">{_symbol(mark)}{count}</li>')
    return f'<ul class="strip">{"".join(items)}</ul>'


def _symbol(mark: Mark) -> str:
    return f'<span title="{escape(mark.name, quote=True)}">{escape(mark.text) or "&nbsp;"}</span>'


def _controls(sample: Sample, number: int) -> str:
    last = len(sample.frames)
    slider = ""
    if sample.frames:
        slider = (
            '<button type="button" class="play">Play</button><label class="wide">'
            f'<span>Thinking</span><input class="steps" type="range" min="0" max="{last}" '
            f'value="{last}" aria-valuetext="{escape(said_of(sample), quote=True)}">'
            "</label>"
        )
    return (
        f'<div class="controls">{slider}<label><input type="checkbox" class="differences" checked '
        f'id="differences-{number}">mark differences from the label</label></div>'
    )


def _maps(sample: Sample) -> str:
    figures = []
    if sample.side and sample.answer_steps:
        figures.append(
            f"<figure><h4>Steps per cell</h4>"
            f"{svg.heat(sample.answer_steps, sample.side, 'inner steps each cell took')}"
            f"<figcaption>{svg.legend(sample.answer_steps, 'steps')}</figcaption></figure>"
        )
    if sample.side and len(sample.frames) > 1:
        figures.append(
            f"<figure><h4>Answer settled after</h4>"
            f"{svg.heat(sample.settled, sample.side, 'steps after which a cell stays as it is')}"
            f"<figcaption>{svg.legend(sample.settled, 'steps')}</figcaption></figure>"
        )
    if sample.curve:
        figures.append(
            f"<figure><h4>Halting</h4>"
            f"{svg.halting(sample.curve, sample.mean_steps, sample.curve_name)}"
            f'<figcaption class="note">{escape(sample.curve_name)}; dashed: mean steps taken'
            "</figcaption></figure>"
        )
    if sample.frames:
        figures.append(_step_table(sample))
    if not figures:
        return ""
    return f'<div class="maps">{"".join(figures)}</div>'


def _step_table(sample: Sample) -> str:
    """The frames in numbers; for a single answer, the answer itself."""
    alone = not sample.side and len(sample.label) == 1
    head = ["steps", "answer" if alone else "right", "sure", "exact"]
    if sample.final.valid is not None:
        head.append("path")
    lines = []
    for frame in sample.frames:
        row = [
            str(frame.steps),
            frame.answers[0].text if alone else f"{frame.accuracy:.1%}",
            f"{frame.confidence:.0%}",
            _yes(frame.exact),
        ]
        if frame.valid is not None:
            row.append(path_word(frame))
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        '<figure class="scroll"><h4>Stopped after so many steps</h4><table class="frames"><thead>'
        f"<tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        '<figcaption class="note">sure: mean probability of its answers</figcaption></figure>'
    )
