"""One episode as a self-contained page: the canvas after every decision.

Each line of the film shows a decision: its operator, its price, and the canvas it left. Tokens it
wrote are shaded by the model's confidence in them, positions it masked again are struck out.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from reoac_jax.types import OPERATORS

_COLORS = dict(zip(OPERATORS, ("#2b6cb0", "#b7791f", "#2f855a", "#6b46c1", "#c53030"), strict=True))

_STYLE = """
:root { color-scheme: light dark; --ink: #1a202c; --muted: #667085; --line: #d8dee8; --page: #fff;
  --new: 43, 108, 176; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --muted: #9aa5b5; --line: #39424f;
  --page: #161b22; --new: 110, 170, 240; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 24px auto; max-width: 1180px; padding: 0 16px; }
h1 { font-size: 1.25rem; margin: 0 0 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0 0 16px; }
dt { color: var(--muted); } dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.controls { display: flex; align-items: center; gap: 10px; margin: 12px 0; }
.controls input { flex: 1; max-width: 480px; }
ol { list-style: none; padding: 0; margin: 0; }
li { display: grid; grid-template-columns: 2.2em 7.5em 1fr; gap: 8px; padding: 5px 0;
  border-top: 1px solid var(--line); }
li.later { opacity: .18; }
.op { color: #fff; border-radius: 4px; padding: 0 6px; font-size: .8rem; height: 1.5em;
  text-align: center; }
.cost { color: var(--muted); font-size: .78rem; text-align: center; }
.canvas { font: 13px/1.9 ui-monospace, monospace; }
.t { border: 1px solid var(--line); border-radius: 3px; padding: 1px 3px; margin: 0 1px;
  white-space: pre; }
.mask { color: var(--muted); border-style: dashed; }
.new { border-color: rgb(var(--new)); }
.undone { text-decoration: line-through; }
.legend { color: var(--muted); font-size: .85rem; }
"""

_SCRIPT = """
(function () {
  var range = document.getElementById("step"), said = document.getElementById("said");
  var lines = Array.prototype.slice.call(document.querySelectorAll("li"));
  function show() {
    var n = +range.value;
    lines.forEach(function (line, i) { line.classList.toggle("later", i > n); });
    said.textContent = n + " of " + (lines.length - 1);
  }
  range.addEventListener("input", show);
  document.addEventListener("keydown", function (event) {
    var by = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    if (by && event.target !== range) { range.value = +range.value + by; show(); }
  });
  show();
})();
"""


def episode_page(sample: Mapping[str, Any], title: str) -> str:
    """The page of a sample file.

    Args:
      sample: its content; `trace` as made by `reoac_jax.trace.episode_trace`.
      title: shown on top.

    Returns:
      HTML that needs no other file.

    Raises:
      KeyError, TypeError, ValueError: the trace is damaged.
    """
    trace = sample["trace"]
    decisions: Sequence[Mapping[str, Any]] = trace["decisions"]
    canvases = [d["canvas"] for d in decisions] + [trace["final"]]
    mask, pieces = trace["mask_id"], trace["pieces"]
    blank = "".join(_token(i, mask, pieces) for i in canvases[0])
    lines = [_line("0", "", f'<span class="canvas">{blank}</span>')]
    for number, decision in enumerate(decisions):
        before, after = canvases[number], canvases[number + 1]
        written, sure = set(decision["written"]), decision["confidence"]
        cells = []
        for j, (old, new) in enumerate(zip(before, after, strict=True)):
            shade = float(sure[j]) if j in written or old == mask != new else None
            cells.append(_token(new, mask, pieces, shade, undone=old != mask == new))
        lines.append(
            _line(
                str(number + 1),
                _badge(decision["operator"], float(decision["cost"])),
                f'<span class="canvas">{"".join(cells)}</span>',
            )
        )
    facts = [
        ("Prompt", sample.get("prompt", "")),
        ("Answer", sample.get("final_text", "")),
        ("Gold", sample.get("gold", "")),
        ("Reward", f"{float(sample['reward']):g}"),
        ("Cost", f"{float(sample['cost']):g} over {len(decisions)} decisions"),
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts)
    count = len(decisions)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><dl>{listed}</dl>"
        f'<div class="controls"><label for="step">Decision</label><input id="step" type="range" '
        f'min="0" max="{count}" value="{count}"><span id="said"></span></div>'
        '<p class="legend">Blue: written by this decision, the fuller the surer the model is '
        "(hover for the number). Dashed: not written yet. Struck out: masked again.</p>"
        f"<ol>{''.join(lines)}</ol><script>{_SCRIPT}</script></body></html>\n"
    )


def _line(number: str, badge: str, canvas: str) -> str:
    return f"<li><span>{number}</span><span>{badge}</span>{canvas}</li>"


def _badge(operator: str, cost: float) -> str:
    color = _COLORS.get(operator, "#4a5568")
    return (
        f'<div class="op" style="background:{color}">{escape(operator)}</div>'
        f'<div class="cost">{cost:g}</div>'
    )


def _token(
    token: int,
    mask: int,
    pieces: Mapping[str, str],
    confidence: float | None = None,
    undone: bool = False,
) -> str:
    if token == mask:
        return f'<span class="t mask{" undone" if undone else ""}">&#183;</span>'
    text = json.dumps(pieces[str(token)], ensure_ascii=False)[1:-1].replace('\\"', '"')
    if confidence is None:
        return f'<span class="t">{escape(text) or "&#160;"}</span>'
    style = f"background:rgba(var(--new), {0.08 + 0.42 * min(max(confidence, 0.0), 1.0):.2f})"
    return (
        f'<span class="t new" style="{style}" title="{confidence:.3f}">'
        f"{escape(text) or '&#160;'}</span>"
    )
