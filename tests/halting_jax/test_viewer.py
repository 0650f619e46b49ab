"""What the viewer reads from a run and says about an example; the page; the command line."""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.errors import UserError
from common.rundir import append_jsonl
from halting_jax import viewer, viewer_svg
from halting_jax.tasks import logic
from halting_jax.types import Batch
from halting_jax.viewer_cards import sample_data
from halting_jax.viewer_compare import measure
from halting_jax.viewer_curve import recursive_settings
from halting_jax.viewer_data import Frame, Sample, Sheet, describe, frame_steps, settled_steps
from halting_jax.viewer_marks import answer_marks, grid_mark, input_marks, joined, number_text
from halting_jax.viewer_metrics import (
    Series,
    charts,
    columns,
    find_metrics,
    read_metrics,
    read_report,
    run_facts,
    series,
    smooth,
    split_name,
    thinned,
)
from halting_jax.viewer_page import render_page, render_samples
from halting_jax.viewer_run import OpenRun, open_run
from tests.halting_jax.task_cases import batch_of
from tests.halting_jax.viewer_runs import MAZES, STEPS, write_run

Open = Callable[[str], OpenRun]
VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens a run of a kind; each is written and loaded once."""
    root = tmp_path_factory.mktemp("runs")
    runs: dict[str, OpenRun] = {}

    def get(kind: str) -> OpenRun:
        if kind not in runs:
            runs[kind] = open_run(write_run(root / kind, kind))
        return runs[kind]

    return get


@pytest.fixture(scope="module")
def maze(opened: Open) -> Sample:
    """The first test maze as the Universal Transformer solves it."""
    return describe(opened("maze_ut"), "", 0)


@pytest.fixture(scope="module")
def parity(opened: Open) -> Sample:
    """The first parity example."""
    return describe(opened("parity"), "id", 0, frame_limit=2)


# ------------------------------------------------------------------------------- one example
def test_maze_description_agrees_with_the_model(opened: Open, maze: Sample) -> None:
    run = opened("maze_ut")
    batch = run.batch("test", 0)
    outputs = jax.jit(run.model.apply)(run.trained.params, batch)
    ids = np.argmax(np.asarray(outputs.logits[0]), -1)
    label = np.asarray(batch.targets[0])
    side = MAZES["data.side"]
    assert (maze.task, maze.split, maze.index, maze.side) == ("maze", "test", 0, side)
    assert maze.inputs == tuple(grid_mark("maze", int(i)) for i in batch.inputs[0])
    assert maze.label == tuple(grid_mark("maze", int(i)) for i in label)
    assert maze.final.answers == tuple(grid_mark("maze", int(i)) for i in ids)
    assert maze.final.right == tuple(bool(x) for x in ids == label)
    assert maze.final.accuracy == pytest.approx(float((ids == label).mean()))
    assert maze.final.exact == bool((ids == label).all())
    nu = np.asarray(outputs.ponder.steps[0])
    assert maze.answer_steps == tuple(nu)
    assert maze.mean_steps == pytest.approx(nu.mean())
    assert maze.final.steps == nu.max()
    assert maze.difficulty == int(batch.difficulty[0])


def test_frames_are_the_answers_after_fixed_steps(opened: Open, maze: Sample) -> None:
    run = opened("maze_ut")
    assert [frame.steps for frame in maze.frames] == [1, 2, 3]
    batch = run.batch("test", 0)
    apply = jax.jit(run.model.apply, static_argnames="fixed_steps")
    for frame in maze.frames[1:]:
        logits = apply(run.trained.params, batch, fixed_steps=frame.steps).logits
        ids = np.argmax(np.asarray(logits[0]), -1)
        assert frame.answers == tuple(grid_mark("maze", int(i)) for i in ids)


def test_curve_of_positions_ends_at_the_mass_given(maze: Sample) -> None:
    assert len(maze.curve) == maze.max_steps == 3
    assert np.all(np.diff(maze.curve) >= 0) and 0 < maze.curve[0] < maze.curve[-1] <= 1


def test_label_as_answer_is_exact_and_shortest(opened: Open) -> None:
    run = opened("maze_ut")
    batch = run.batch("test", 1)
    sheet = Sheet.of(run, batch)
    reply = run.reply(batch)
    said = sheet.frame(dataclasses.replace(reply, ids=batch.targets, exact=np.array([True])), 1)
    assert (said.accuracy, said.exact, said.valid, said.optimal) == (1.0, True, True, True)
    assert all(said.right)
    # Without its marks the answer is no path any more.
    unmarked = sheet.frame(dataclasses.replace(reply, ids=batch.inputs), 1)
    assert unmarked.valid is False and unmarked.optimal is False and unmarked.accuracy < 1


def test_fixed_steps_overrule_halting(opened: Open) -> None:
    sample = describe(opened("maze_ut"), "val", 0, fixed_steps=2, frame_limit=0)
    assert set(sample.answer_steps) == {2.0} and sample.mean_steps == 2
    assert sample.curve == () and sample.frames == ()


@pytest.mark.slow
def test_recursive_curve_tells_when_the_row_stops(opened: Open) -> None:
    run = opened("maze_trm")
    sample = describe(run, "", 0, frame_limit=0)
    assert len(sample.curve) == sample.max_steps == 3
    asked = [n for n, q in enumerate(sample.curve, 1) if q > 0.5]
    assert sample.mean_steps == (asked[0] if asked else sample.max_steps)
    assert sample.answer_steps == ()
    assert recursive_settings(run.trained.config).supervision_steps == 3


def test_parity_description(opened: Open, parity: Sample) -> None:
    run = opened("parity")
    outputs = jax.jit(run.model.apply)(run.trained.params, run.batch("id", 0))
    odd = parity.question.count("+") % 2 == 1
    assert parity.label_text == ("odd" if odd else "even")
    assert parity.answer_text == ("odd" if outputs.logits[0] > 0 else "even")
    assert parity.final.exact == (parity.label_text == parity.answer_text)
    assert parity.difficulty == len(parity.inputs) and parity.unit == "bits"
    np.testing.assert_allclose(parity.curve, outputs.ponder.mass, rtol=1e-6)
    probability = float(jax.nn.sigmoid(abs(outputs.logits[0])))
    assert parity.final.confidence == pytest.approx(probability, rel=1e-5)


@pytest.mark.slow
def test_addition_has_longer_sums_out_of_distribution(opened: Open) -> None:
    run = opened("addition")
    trained = run.trained.config.task.sequence_length
    assert run.test_splits == ("id", "ood")
    sample = describe(run, "ood", 0, frame_limit=0)
    numbers = [int(text) for text in sample.question.split(" + ")]
    assert len(numbers) > trained
    sums = [str(s) for s in itertools.accumulate(numbers)][1:]
    assert [mark.text.lstrip("0") or "0" for mark in sample.label] == sums
    assert len(sample.input_steps) == len(numbers)
    measured = measure(run, "ood", 4, shown=2)
    assert measured.examples == 4 and len(measured.answered) == 2
    assert measured.answered[0].question == sample.question
    assert measured.answered[0].answer == sample.answer_text
    assert measured.answered[0].steps == pytest.approx(sample.mean_steps)


@pytest.mark.parametrize(
    "kind",
    [
        "sort",
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in ("maze_act", "pondernet", "logic", "copy")
        ),
    ],
)
def test_every_kind_of_model_and_task_renders(opened: Open, kind: str) -> None:
    run = opened(kind)
    samples = [describe(run, split, 1, frame_limit=2) for split in run.splits[:2]]
    for sample in samples:
        assert len(sample.final.answers) == len(sample.label) == len(sample.final.right)
        assert len(sample.input_steps) in (0, len(sample.inputs))
        assert len(sample.answer_steps) in (0, len(sample.label))
        assert sample.final.accuracy == 1.0 or not sample.final.exact
        assert 1 <= sample.mean_steps <= sample.max_steps
    check_page(render_page(samples, run_facts(run.trained, run.directory)))


# ---------------------------------------------------------------------------- writing examples
def rows_of(case: str) -> list[Batch]:
    """Some examples of a case of `task_cases`, each without its row axis."""
    batch = batch_of(case, "train", 20)
    return [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(20)]


def test_logic_rows_are_written_as_their_gates() -> None:
    for row in rows_of("logic-paper"):
        shown = input_marks("logic", "paper", row.inputs, row.input_mask)
        values: list[bool] = []
        for mark in shown.marks:
            bits, *names = mark.text.split()
            previous = values[-1] if values else bits[0] == "1"
            current = bits[1] == "1"
            for name in names:
                table = logic.PAPER_GATES[name]
                result = table[2 * (not current) + (not previous)] == "T"
                previous, current = current, result
            values.append(current)
        answers = answer_marks("logic", row.targets[:, None], range(len(values)))
        assert [mark.text for mark in answers] == [str(int(v)) for v in values]


def test_original_logic_names_one_gate_a_row() -> None:
    for row in rows_of("logic-original"):
        shown = input_marks("logic", "original", row.inputs, row.input_mask)
        assert len(shown.marks) == row.difficulty
        for mark, frame in zip(shown.marks, row.inputs, strict=False):
            gate = list(logic.ORIGINAL_GATES)[int(np.flatnonzero(frame[2:])[0]) // 10]
            assert mark.text == f"{int(frame[0])}{int(frame[1])} {gate}"


@pytest.mark.parametrize("case", ["sort-paper", "sort-original"])
def test_sort_answers_name_the_items_in_order(case: str) -> None:
    for row in rows_of(case):
        asked = input_marks("sort", "", row.inputs, row.input_mask & ~row.target_mask).marks
        said = answer_marks("sort", row.targets[:, None], np.flatnonzero(row.target_mask))
        ordered = [float(asked[int(mark.text)].text) for mark in said]
        assert ordered == sorted(float(mark.text) for mark in asked)


@pytest.mark.parametrize("case", ["copy-paper", "reverse-original"])
def test_symbols_are_written_without_padding(case: str) -> None:
    name, encoding = case.split("-")
    for row in rows_of(case):
        shown = input_marks(name, encoding, row.inputs, row.input_mask)
        said = answer_marks(name, row.targets[:, None], np.flatnonzero(row.target_mask))
        asked = joined(name, shown.marks)
        assert len(asked) == row.difficulty
        assert joined(name, said) == (asked if name == "copy" else asked[::-1])
        assert shown.marks[-1].name == "end"


def test_string_sums_are_written_as_characters() -> None:
    name = "string_addition"
    for row in rows_of(name):
        asked = joined(name, input_marks(name, "paper", row.inputs, row.input_mask).marks)
        positions = np.flatnonzero(row.target_mask)
        said = joined(name, answer_marks(name, row.targets[:, None], positions))
        assert "+" in asked and sum(int(number) for number in asked.split("+")) == int(said)


def test_scattered_bits_keep_their_places() -> None:
    for row in rows_of("parity-random"):
        asked = joined("parity", input_marks("parity", "", row.inputs, row.input_mask).marks)
        assert len(asked.replace("·", "")) == row.difficulty and not asked.endswith("·")
        label = answer_marks("parity", row.targets.reshape(1, 1), [0])
        assert label[0].text == ("odd" if asked.count("+") % 2 else "even")


def test_numbers_keep_blanks_between_digits() -> None:
    assert number_text([1, 0, 10, 10]) == "10"
    assert number_text([1, 10, 3, 10]) == "1_3"
    assert number_text([10, 10]) == "none"


def test_grid_marks() -> None:
    shown = [(m.text, m.kind) for m in (grid_mark("maze", i) for i in (*range(6), 9))]
    assert shown == [
        ("·", "pad"),
        ("", "wall"),
        ("", "open"),
        ("S", "start"),
        ("G", "goal"),
        ("o", "path"),
        ("?", "unknown"),
    ]
    assert [grid_mark("sudoku", i).text for i in (0, 1, 2, 10, 11)] == ["·", "", "1", "9", "?"]


# --------------------------------------------------------------------------- frames and curves
def test_frames_of_long_thinkers_are_chosen() -> None:
    assert frame_steps(4, 2, 16) == (1, 2, 3, 4)
    assert frame_steps(4, 2, 0) == ()
    chosen = frame_steps(100, 37, 16)
    assert chosen[:8] == tuple(range(1, 9)) and chosen[-1] == 100 and 37 in chosen
    assert len(chosen) <= 17 and list(chosen) == sorted(set(chosen))


def test_cells_settle_once_they_stay() -> None:
    frames = [
        Frame(n, tuple(grid_mark("maze", i) for i in ids), (), 0.0, 0.0, False, None, None)
        for n, ids in ((1, (1, 2, 3)), (2, (5, 2, 4)), (4, (1, 2, 4)))
    ]
    assert settled_steps(frames) == (4, 1, 2)
    assert settled_steps([]) == ()


def test_smoothing_is_a_rolling_mean() -> None:
    assert smooth([1, 3, 5, 7], 1) == [1, 3, 5, 7]
    assert smooth([1, 3, 5, 7], 2) == [1, 2, 4, 6]
    assert smooth([], 5) == []
    for window in (0, 101):
        with pytest.raises(UserError, match="1 to 100"):
            smooth([1.0], window)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train/accuracy", ("train", "accuracy")),
        ("test/near_ood/accuracy_ema", ("test/near_ood, averaged weights", "accuracy")),
        ("val_cell_acc", ("val", "cell_acc")),
        ("val_acc_ema", ("val, averaged weights", "acc")),
        ("train_loss", ("train", "loss")),
        ("puz_acc", ("train", "puz_acc")),
        ("debug/grad_norm", ("train", "debug/grad_norm")),
    ],
)
def test_logged_names_are_taken_apart(key: str, expected: tuple[str, str]) -> None:
    assert split_name(key) == expected


def test_charts_join_the_splits_of_a_quantity() -> None:
    rows = [
        {"iteration": 1, "puz_acc": 0.1, "val_acc": 0.2, "val_acc_ema": 0.3, "text": "x"},
        {"iteration": 2, "puz_acc": 0.4, "epoch": 0.5, "train_loss": None},
    ]
    assert columns(rows) == ["puz_acc", "val_acc", "val_acc_ema", "epoch"]
    (chart,) = charts(rows)
    assert chart.title == "Examples right"
    assert chart.series == (
        Series("train", (1.0, 2.0), (0.1, 0.4)),
        Series("val", (1.0,), (0.2,)),
        Series("val, averaged weights", (1.0,), (0.3,)),
    )
    assert series(rows, "puz_acc", "epoch") == Series("puz_acc", (0.5,), (0.4,))
    with pytest.raises(UserError, match="step, epoch"):
        series(rows, "puz_acc", "time")


def test_long_curves_are_thinned_to_means() -> None:
    long = Series("a", tuple(range(1000)), tuple(range(0, 2000, 2)))
    short = thinned(long, 10)
    assert len(short.x) == 10
    assert short.x[0] == pytest.approx(49.5) and short.y[0] == pytest.approx(99.0)
    assert thinned(short, 10) is short


def test_metrics_are_found_below_a_root(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        find_metrics(tmp_path / "none")
    with pytest.raises(UserError, match="no metrics"):
        find_metrics(tmp_path)
    append_jsonl(tmp_path / "a" / "x" / "metrics.jsonl", {"iteration": 1})
    (tmp_path / "a" / "latest").symlink_to("x")
    assert find_metrics(tmp_path) == [(tmp_path / "a" / "x" / "metrics.jsonl").resolve()]
    assert read_metrics(tmp_path / "a" / "x") == [{"iteration": 1}]
    assert read_report(tmp_path) is None
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_report(tmp_path)


def test_shades_run_from_least_to_most() -> None:
    assert viewer_svg.level_of([2, 2, 2]) == [3, 3, 3]
    assert viewer_svg.level_of([1, 2, 3]) == [0, 3, 6]
    legend = viewer_svg.legend([1, 3, 3], "steps")
    assert "steps" in legend and legend.count("<li>") == 2


def test_squares_join_neighbours_within_a_row() -> None:
    assert viewer_svg.squares([0, 1, 2, 3], 3) == "M0 0h3v1h-3zM0 1h1v1h-1z"
    assert viewer_svg.crosses([True, False, True], 3) == "M1.1 0.1l.8 .8m0-.8l-.8 .8"


# ------------------------------------------------------------------------------------ the page
class Balance(HTMLParser):
    """Fails on a tag that is not closed, or closed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def check_page(page: str) -> list[tuple[str, dict[str, str | None]]]:
    """Balanced, one of each id, and nothing that would be loaded; its tags."""
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    ids = [attributes["id"] for _, attributes in parser.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"/\*.*?\*/", "", page))
    for tag, attributes in parser.tags:
        assert tag not in ("link", "img", "iframe") and "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")
    return parser.tags


def embedded(page: str, name: str) -> Any:
    """The data under a name in the page."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_page_is_whole_and_loads_nothing(opened: Open, maze: Sample, parity: Sample) -> None:
    run = opened("parity")
    path = run.trained.path
    facts = run_facts(run.trained, run.directory)
    page = render_page([maze, parity], facts, read_metrics(path), read_report(path))
    tags = check_page(page)
    assert sum("sample" in str(a.get("class", "")).split() for _, a in tags) == 2
    first, second = embedded(page, "samples-data")
    assert first["side"] == maze.side and len(first["frames"]) == len(maze.frames) + 1
    names = [first["palette"][code][2] for code in first["frames"][-1]["answers"]]
    assert names == [mark.name for mark in maze.final.answers]
    assert second["side"] == 0 and parity.label_text in [mark[0] for mark in second["palette"]]
    curves = embedded(page, "curves-data")
    assert curves[0][0]["x"] == [10.0, 20.0, 30.0, 40.0]
    assert len(curves) == sum("curve" in str(a.get("class", "")).split() for _, a in tags)
    assert "62.5%" in page  # of the averaged weights, in the final test
    assert "2 to 4" in page and f"step {STEPS}" in page


def test_page_of_an_unfinished_run(opened: Open, maze: Sample) -> None:
    facts = dataclasses.replace(run_facts(opened("parity").trained), name="</script><b>&")
    page = render_page([maze], facts)
    check_page(page)
    assert "<b>" not in page and "has not come to its final test" in page
    check_page(render_samples([maze]))


def test_text_of_a_sample_cannot_leave_its_element(parity: Sample) -> None:
    evil = dataclasses.replace(
        parity, inputs=(parity.inputs[0]._replace(text="</script><i>", name='"><i>'),)
    )
    page = render_samples([evil])
    check_page(page)
    assert "<i>" not in page
    assert sample_data(evil)["palette"][0][0] == "</script><i>"


# --------------------------------------------------------------------------------- the command
def test_command_writes_the_page(
    opened: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = opened("parity").trained.path
    target = tmp_path / "new" / "page.html"
    command = ["viewer", f"--checkpoint={path}", f"--html={target}", "--samples=4", "--frames=1"]
    assert viewer.main(command) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert [p.name for p in target.parent.iterdir()] == ["page.html"]
    page = target.read_text()
    check_page(page)
    # Spread over the three test sets.
    shown = re.findall(r"<h3>(\w+) (\d+)</h3>", page)
    assert shown == [("id", "0"), ("id", "1"), ("near_ood", "0"), ("ood", "0")]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--split=nosuch"], "no split 'nosuch'; choose id, near_ood, ood, val"),
        (["--first=64", "--split=id"], "64 is out of range: split id has 64 samples, 0 to 63"),
        (["--data=x"], "parity, which is generated"),
        (["--samples=0"], "at least 1"),
        (["--samples=many"], "invalid whole number value"),
        (["--nosuch=1"], "unrecognized arguments: --nosuch=1"),
        (["--html=."], "is a directory"),
    ],
)
def test_bad_arguments_are_refused(opened: Open, extra: list[str], message: str) -> None:
    path = opened("parity").trained.path
    with pytest.raises(UserError, match=re.escape(message)):
        viewer.main(["viewer", f"--checkpoint={path}", "--html=x.html", *extra])


def test_missing_run_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["viewer", f"--checkpoint={tmp_path}/no", "--html=x.html"])
    with pytest.raises(SystemExit) as stopped:
        viewer.run()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "no such directory" in error


def test_page_needs_a_checkpoint() -> None:
    with pytest.raises(UserError, match="--html needs --checkpoint"):
        viewer.main(["viewer", "--html=x.html"])


def test_other_data_must_have_the_model_s_size(opened: Open, tmp_path: Path) -> None:
    path = opened("maze_ut").trained.path
    with pytest.raises(UserError, match="no such data directory"):
        open_run(path, tmp_path / "none")
    with pytest.raises(UserError, match="none of the directories test, val, train"):
        open_run(path, tmp_path)


def test_streamlit_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install streamlit"):
        viewer.main(["viewer"])
