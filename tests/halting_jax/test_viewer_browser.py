"""The viewer's page in a real browser without a window: its script, its widths, its picture."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halting_jax.viewer_data import Frame, Sample, settled_steps
from halting_jax.viewer_marks import Mark, grid_mark
from halting_jax.viewer_metrics import RunFacts
from halting_jax.viewer_page import render_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason=f"no browser ({', '.join(NAMES)})"),
]
WATCH = (
    "<script>window.wrong = []; window.onerror = (text) => { window.wrong.push(text); };</script>"
)


def maze() -> Sample:
    """A maze of 3 x 3 whose answer changes with every step."""
    rows = ([3, 2, 2, 1, 1, 2, 4, 2, 2], [3, 5, 5, 1, 1, 5, 4, 5, 5])
    inputs, label = (tuple(grid_mark("maze", i) for i in row) for row in rows)
    frames = []
    for steps, ids in enumerate(([3, 1, 1, 1, 1, 1, 4, 1, 1], rows[0], rows[1]), 1):
        answers = tuple(grid_mark("maze", i) for i in ids)
        right = tuple(a == b for a, b in zip(answers, label, strict=True))
        share = sum(right) / 9
        frames.append(Frame(steps, answers, right, share, 0.5, all(right), all(right), all(right)))
    return Sample(
        task="maze",
        split="test",
        index=0,
        difficulty=6,
        unit="moves",
        side=3,
        inputs=inputs,
        label=label,
        question="3 x 3 maze",
        label_text="",
        answer_text="",
        final=frames[-1],
        fixed_steps=0,
        mean_steps=2.0,
        max_steps=3,
        input_steps=(),
        answer_steps=(1.0, 2.0, 3.0) * 3,
        curve=(0.25, 0.75, 1.0),
        curve_name="accumulated halting probability",
        frames=tuple(frames),
        settled=settled_steps(frames),
    )


def bits() -> Sample:
    """A parity example."""
    answers = [Mark(text, "symbol", text) for text in ("even", "odd")]
    frames = [
        Frame(n, (answer,), (good,), float(good), 0.6, good, None, None)
        for n, (answer, good) in enumerate(zip(answers, (False, True), strict=True), 1)
    ]
    return Sample(
        task="parity",
        split="id",
        index=1,
        difficulty=40,
        unit="bits",
        side=0,
        inputs=(Mark("+", "plus", "+1"), Mark("-", "minus", "-1")) * 20,
        label=(answers[1],),
        question="+-" * 20,
        label_text="odd",
        answer_text="odd",
        final=frames[-1],
        fixed_steps=0,
        mean_steps=2.0,
        max_steps=2,
        input_steps=(1.0, 2.0) * 20,
        answer_steps=(),
        curve=(0.5, 1.0),
        curve_name="accumulated halting probability",
        frames=tuple(frames),
        settled=(2,),
    )


def page() -> str:
    """A page with everything on it."""
    rows = [
        {"iteration": n, "train/loss_classification": 1 / n, "val/accuracy": n / 50}
        for n in range(1, 51)
    ]
    difficulty = [{"low": 1, "high": 2, "n": 3, "accuracy": 0.5, "steps": 2.0}]
    report = {
        "step": 50,
        "sets": {"test": {"test_acc": 0.5, "test_mean_inner_steps_executed": 3.0}},
        "by_difficulty": {"test": difficulty},
    }
    facts = RunFacts("a_run", "maze", "act_rnn", (("step", "50"), ("data", "generated")))
    return render_page([maze(), bits()], facts, rows, report)


def browse(file: Path, *options: str, width: int = 1200, height: int = 2600) -> str:
    """Loads a file and returns what the browser prints."""
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={file.parent / 'profile'}",
        f"--window-size={width},{height}",
        *options,
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


def result_of(tmp_path: Path, text: str, script: str) -> Any:
    """Runs a script at the end of a page; what it stores in `result` comes back."""
    file = tmp_path / "page.html"
    store = 'document.body.setAttribute("data-result", JSON.stringify(result));'
    text = text.replace("<head>", f"<head>{WATCH}", 1)
    text = text.replace("</body>", f"<script>{script}; {store}</script></body>")
    file.write_text(text, encoding="utf-8")
    found = re.search(r'data-result="([^"]*)"', browse(file, "--dump-dom"))
    assert found, "the script at the end did not run"
    return json.loads(html.unescape(found[1]))


SCRIPT = """
const [card, words] = document.querySelectorAll(".sample");
const slider = card.querySelector(".steps"), result = {wrong: window.wrong, said: [], walls: []};
const count = (kind) => {
  const path = card.querySelector(".answer ." + kind);
  return path ? path.getAttribute("d").split("M").length - 1 : 0;
};
for (const value of [0, 1, 2, 3]) {
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
  result.said.push(card.querySelector(".said").textContent);
  result.walls.push([count("wall"), count("path"), count("diff")]);
}
slider.value = 1; slider.dispatchEvent(new Event("input"));
const now = card.querySelector(".now");
result.now = [now.hasAttribute("hidden"), now.getAttribute("x1")];
const grids = card.querySelectorAll("svg.grid");
result.grids = grids.length;
grids[0].focus();
for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) {
  grids[0].dispatchEvent(new KeyboardEvent("keydown", {key: key, bubbles: true}));
}
result.readout = card.querySelector(".readout").textContent;
result.cursors = card.querySelectorAll(".cursor:not([hidden])").length;
const diff = card.querySelector(".differences"), crosses = card.querySelector(".answer .diff");
result.shown = [getComputedStyle(crosses).display];
diff.click();
result.shown.push(getComputedStyle(crosses).display);
const word = words.querySelector(".steps");
word.value = 0; word.dispatchEvent(new Event("input"));
result.word = words.querySelector(".answer li").textContent;
result.wrongWord = words.querySelector(".answer li").className;
const line = document.querySelector("polyline.mean"), before = line.getAttribute("points");
const smoothing = document.querySelector(".smoothing");
smoothing.dispatchEvent(new Event("input"));
result.same = before === line.getAttribute("points");
smoothing.value = 10; smoothing.dispatchEvent(new Event("input"));
result.smoother = before !== line.getAttribute("points");
words.querySelector(".play").click();
result.playing = words.querySelector(".play").textContent;
"""


def test_script_plays_the_thinking(tmp_path: Path) -> None:
    result = result_of(tmp_path, page(), SCRIPT)
    assert result["wrong"] == []
    assert [text.split(":")[0] for text in result["said"]] == [
        "after 1 of 3",
        "after 2 of 3",
        "after 3 of 3",
        "as it halts",
    ]
    # Walls, marks and crosses of the answer after every step.
    assert result["walls"] == [[7, 0, 5], [2, 0, 5], [2, 5, 0], [2, 5, 0]]
    hidden, x = result["now"]
    assert not hidden and 46 < float(x) < 328
    assert result["grids"] == 5 and result["cursors"] == 5
    assert result["readout"] == (
        "row 2, column 2 · input wall · label wall · answer wall · 2 steps · settled after 1"
    )
    assert result["shown"] == ["inline", "none"]
    assert result["word"].strip() == "even" and "wrong" in result["wrongWord"]
    assert result["same"] and result["smoother"]
    assert result["playing"] == "Pause"


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_nothing_overflows(tmp_path: Path, width: int) -> None:
    # A window cannot be as narrow as a phone, a frame can.
    inner = html.escape(page(), quote=True)
    outer = (
        "<!DOCTYPE html><html><head></head><body>"
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{inner}"></iframe></body>'
        "</html>"
    )
    script = """
    const result = {};
    const frame = document.querySelector("iframe");
    frame.addEventListener("load", () => {
      const root = frame.contentDocument.documentElement;
      const report = {width: root.scrollWidth, room: root.clientWidth};
      document.body.setAttribute("data-result", JSON.stringify(report));
    });
    """
    file = tmp_path / "frame.html"
    file.write_text(outer.replace("</body>", f"<script>{script}</script></body>"))
    dumped = browse(file, "--dump-dom", "--virtual-time-budget=3000")
    found = re.search(r'data-result="(\{[^"]*)"', dumped)
    assert found
    result = json.loads(html.unescape(found[1]))
    assert result["room"] == width and result["width"] <= width


def test_picture_shows_the_cells(tmp_path: Path) -> None:
    from matplotlib.image import imread

    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page(), encoding="utf-8")
    browse(file, f"--screenshot={picture}")
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)  # [H, W, 3]
    colours = {tuple(int(v) for v in pixel) for pixel in np.unique(pixels.reshape(-1, 3), axis=0)}
    # A path, S and G: on a white page nothing else has these colours.
    assert colours >= {(0x4A, 0x8C, 0xF0), (0x1A, 0x8A, 0x4F), (0xD9, 0x54, 0x0B)}
