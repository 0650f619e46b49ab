"""One self-contained page of a trained model: what it was, how it learnt, and how it thinks.

Everything is inline; nothing is loaded. Without scripts the page still shows every sample, curve
and table; the script adds the step by step answers, the smoothing and the cursor.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from common.rundir import json_text
from halting_jax import viewer_svg as svg
from halting_jax.viewer_cards import sample_card, sample_data
from halting_jax.viewer_data import Sample
from halting_jax.viewer_metrics import (
    MAX_WINDOW,
    Chart,
    RunFacts,
    charts,
    split_name,
)

_HERE = Path(__file__).parent
_TASK_METRICS = (
    "acc",
    "puz_acc",
    "accuracy_sequence",
    "sequence_accuracy",
    "accuracy",
)


def render_page(
    samples: Sequence[Sample],
    facts: RunFacts,
    metrics: Sequence[Mapping[str, Any]] = (),
    report: Mapping[str, Any] | None = None,
) -> str:
    """The page as text.

    Args:
      samples: of `viewer_data.describe`.
      facts: of the run.
      metrics: rows of metrics.jsonl.
      report: eval.json of the run, None where there is none.

    Returns:
      HTML without any reference to another file or address.
    """
    drawn = charts(metrics)
    window = default_window(drawn)
    sections = [
        _head(facts),
        "<main>",
        _results(report),
        _sample_section(samples),
        _difficulty(report, samples),
        _training(drawn, window),
        "</main>",
        "<footer>Written by halting_jax.viewer. This page is one file and loads nothing.</footer>",
        _data("samples-data", [sample_data(sample) for sample in samples]),
        _data(
            "curves-data",
            [[{"x": c.x, "y": c.y} for c in chart.series] for chart in drawn],
        ),
        f"<script>{_asset('viewer_page.js')}</script>",
    ]
    return _document(f"{facts.name}: {facts.task}, {facts.model}", sections)


def render_samples(samples: Sequence[Sample]) -> str:
    """A page of the sample cards alone, for a frame inside another page."""
    cards = [sample_card(sample, n) for n, sample in enumerate(samples, 1)]
    sections = [
        "<main>",
        *cards,
        "</main>",
        _data("samples-data", [sample_data(sample) for sample in samples]),
        _data("curves-data", []),
        f"<script>{_asset('viewer_page.js')}</script>",
    ]
    return _document("samples", sections)


def _document(title: str, sections: Sequence[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_asset('viewer_page.css')}</style>\n"
        "</head>\n<body>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def default_window(drawn: Sequence[Chart]) -> int:
    """A rolling mean over about a fiftieth of the longest curve."""
    longest = max((len(c.x) for chart in drawn for c in chart.series), default=1)
    return min(max(longest // 50, 1), MAX_WINDOW)


def _head(facts: RunFacts) -> str:
    pairs = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in facts.facts
    )
    return (
        '<a class="skip" href="#samples">Skip to the samples</a><header>'
        f"<h1>{escape(facts.name)}</h1>"
        f'<p class="muted">{escape(facts.model)} on {escape(facts.task)}</p>'
        f'<dl class="facts">{pairs}</dl></header>'
    )


def _results(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return (
            '<section><h2>Final test</h2><p class="muted">The run has not come to its final test '
            "(no eval.json).</p></section>"
        )
    tiles = []
    for name, row in report.get("sets", {}).items():
        values = _best_values(row)
        chosen = next((key for key in _TASK_METRICS if key in values), next(iter(values), ""))
        shown = {k: v for k, v in values.items() if k != chosen}
        head = f'<div class="big">{values[chosen]:.1%}</div>{escape(chosen)}' if chosen else ""
        rest = "".join(f"<dt>{escape(k)}</dt><dd>{v:.4g}</dd>" for k, v in shown.items())
        tiles.append(f'<div class="card"><h3>{escape(name)}</h3>{head}<dl>{rest}</dl></div>')
    step = report.get("step")
    when = f", step {step:,}" if isinstance(step, int) else ""
    return (
        f'<section aria-label="final test"><h2>Final test{when}</h2>'
        f'<div class="tiles">{"".join(tiles)}</div></section>'
    )


def _best_values(row: Mapping[str, Any]) -> dict[str, float]:
    """Values of a set without its prefix, of the averaged weights where there are any."""
    values: dict[str, float] = {}
    for key, value in row.items():
        split, quantity = split_name(key)
        if isinstance(value, (int, float)) and (quantity not in values or "averaged" in split):
            values[quantity] = float(value)
    return values


def _training(drawn: Sequence[Chart], window: int) -> str:
    if not drawn:
        return '<section><h2>Training</h2><p class="muted">Nothing was logged yet.</p></section>'
    figures = []
    for chart in drawn:
        keys = "".join(
            '<li><svg class="plot" viewBox="0 0 26 8" aria-hidden="true">'
            f'<polyline class="{svg.style_of(c.name)}" points="1,4 25,4"/></svg>{escape(c.name)} '
            f"{c.y[-1]:.4g}</li>"
            for c in chart.series
        )
        figures.append(
            f'<figure class="card"><h4>{escape(chart.title)}</h4>{svg.line_chart(chart, window)}'
            f'<figcaption><ul class="keys">{keys}</ul></figcaption></figure>'
        )
    return (
        '<section aria-label="training"><h2>Training</h2><div class="controls"><label class="wide">'
        f'Rolling mean over <input class="smoothing" type="range" min="1" max="{MAX_WINDOW}" '
        f'value="{window}"><span><span class="window">{window}</span> points</span></label>'
        '<span class="note">Faint: as logged. Numbers: last values. Horizontal: optimiser steps.'
        f'</span></div><div class="charts">{"".join(figures)}</div></section>'
    )


def _difficulty(report: Mapping[str, Any] | None, samples: Sequence[Sample]) -> str:
    tables = (report or {}).get("by_difficulty") or {}
    unit = samples[0].unit if samples else "difficulty"
    parts = [difficulty_table(name, rows, unit) for name, rows in tables.items() if rows]
    if not parts:
        return ""
    return (
        '<section aria-label="difficulty"><h2>Harder inputs, more steps?</h2>'
        f'<div class="pair">{"".join(parts)}</div></section>'
    )


def difficulty_table(name: str, rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Accuracy and steps per difficulty, with bars."""
    most = max(float(row["steps"]) for row in rows) or 1.0
    lines = []
    for row in rows:
        low, high = row["low"], row["high"]
        span = str(low) if low == high else f"{low} to {high}"
        lines.append(
            f"<tr><td>{span}</td><td>{row['n']}</td>"
            f"<td>{row['accuracy']:.1%}{_bar(row['accuracy'])}</td>"
            f"<td>{row['steps']:.2f}{_bar(row['steps'] / most, 'steps')}</td></tr>"
        )
    return (
        f'<div class="card scroll"><h3>{escape(name)}</h3><table><thead><tr>'
        f'<th scope="col">{escape(unit)}</th><th scope="col">examples</th>'
        '<th scope="col">right</th><th scope="col">mean steps</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _bar(share: float, kind: str = "") -> str:
    width = min(max(share, 0.0), 1.0)
    return f'<span class="bar {kind}"><i style="width:{width:.1%}"></i></span>'


def _sample_section(samples: Sequence[Sample]) -> str:
    links = "".join(
        f'<li><a href="#sample-{n}">{escape(s.split)} {s.index} '
        f"{'&#10003;' if s.final.exact else '&#10007;'}"
        f'<span class="skip">{"right" if s.final.exact else "wrong"}</span></a></li>'
        for n, s in enumerate(samples, 1)
    )
    cards = "".join(sample_card(s, n) for n, s in enumerate(samples, 1))
    return (
        '<section id="samples"><h2>Samples</h2><noscript><p class="note">The step by step answers '
        "need scripts; everything else is here.</p></noscript>"
        f'<nav aria-label="samples"><ol>{links}</ol></nav>{cards}</section>'
    )


def _data(name: str, value: Any) -> str:
    # "<" cannot stand in a script element as it is: "</script>" would end it.
    text = json_text(value).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
