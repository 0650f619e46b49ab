"""The Streamlit viewer; `python -m halting_jax.viewer` starts it.

Three pages: one example at a time, the curves of any run, and the sets of a generated task side by
side. What is shown comes from the pure functions of the other viewer modules.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import streamlit as st

from common.errors import UserError
from halting_jax.viewer import CHECKPOINT, DATA, ROOT
from halting_jax.viewer_cards import path_word
from halting_jax.viewer_compare import Measured, measure
from halting_jax.viewer_data import FRAME_LIMIT, Sample, describe
from halting_jax.viewer_metrics import (
    AXES,
    MAX_WINDOW,
    columns,
    find_metrics,
    read_metrics,
    series,
    smooth,
)
from halting_jax.viewer_page import render_samples
from halting_jax.viewer_run import OpenRun, open_run

Result = TypeVar("Result")


def main() -> None:
    """Draws the chosen page."""
    st.set_page_config(page_title="Halting models", layout="wide")
    pages: dict[str, Callable[[], None]] = {
        "Samples": samples_page,
        "Metrics": metrics_page,
        "In and out of distribution": sets_page,
    }
    chosen = st.sidebar.radio("Page", list(pages))
    pages[chosen]()


def samples_page() -> None:
    """One example: input, label and answer, and how the model came to it."""
    st.title("Samples")
    run = _chosen_run()
    split = st.sidebar.selectbox("Split", run.splits)
    size = _or_stop(lambda: run.examples(split)).size
    st.sidebar.caption(f"{size} samples, 0 to {size - 1}")
    index = st.sidebar.number_input("Sample index", min_value=0, value=0, step=1)
    limit = max(run.model.max_steps, 2)
    fixed = st.sidebar.slider("Fixed steps (0 = the model halts by itself)", 0, limit, 0)
    frames = st.sidebar.checkbox("Step by step answers", value=True)
    with st.spinner("The model is thinking"):
        sample = _or_stop(lambda: describe(run, split, int(index), fixed, frames * FRAME_LIMIT))
    _numbers(sample)
    st.iframe(render_samples([sample]), height="content")


def metrics_page() -> None:
    """Curves of any metrics.jsonl."""
    st.title("Metrics")
    root = st.sidebar.text_input("Look for runs under", os.environ.get(ROOT, "runs"))
    files = _or_stop(lambda: find_metrics(root))
    path = st.sidebar.selectbox("Run", files, format_func=_run_name)
    rows = _or_stop(lambda: read_metrics(path))
    names = columns(rows)
    axis = st.sidebar.radio("Horizontal axis", AXES)
    window = st.sidebar.slider("Rolling mean over so many points", 1, MAX_WINDOW, 1)
    first = [name for name in names if "loss" in name][:2]
    chosen = st.multiselect("Curves", names, default=first)
    for name in chosen:
        points = series(rows, name, axis)
        if not points.x:
            st.info(f"{name} was not logged with its {axis}")
            continue
        st.subheader(name)
        st.line_chart({axis: points.x, name: smooth(points.y, window)}, x=axis, y=name)
    with st.expander("Every logged number"):
        st.dataframe(rows)


def sets_page() -> None:
    """Lengths that were trained beside lengths that were not."""
    st.title("In and out of distribution")
    run = _chosen_run()
    if run.directory is not None:
        st.info(
            f"{run.task.name} is read from files, which hold one kind of example; this page is for "
            "generated tasks such as parity and addition"
        )
        return
    count = st.sidebar.slider("Examples per set", 16, 1024, 256, step=16)
    places = st.columns(len(run.test_splits))
    for place, split in zip(places, run.test_splits, strict=True):
        with place, st.spinner(f"Measuring {split}"):
            _show_set(_or_stop(functools.partial(measure, run, split, count)))


def _show_set(measured: Measured) -> None:
    st.subheader(measured.name)
    st.metric("Examples right", f"{measured.right:.1%}")
    st.metric("Mean steps", f"{measured.steps:.2f}")
    st.caption(", ".join(f"{name} {value:.3f}" for name, value in measured.metrics.items()))
    rows = measured.by_difficulty
    if rows:
        table: dict[str, list[Any]] = {
            "difficulty": [row["low"] for row in rows],
            "right": [row["accuracy"] for row in rows],
            "steps": [row["steps"] for row in rows],
        }
        st.line_chart(table, x="difficulty", y=["right"], height=180)
        st.line_chart(table, x="difficulty", y=["steps"], height=180)
    st.dataframe(
        [
            {
                "question": row.question,
                "label": row.label,
                "answer": row.answer,
                "right": row.right,
                "steps": row.steps,
                "difficulty": row.difficulty,
            }
            for row in measured.answered
        ]
    )


def _numbers(sample: Sample) -> None:
    final = sample.final
    shown = {
        "Cells right" if sample.side else "Answers right": f"{final.accuracy:.1%}",
        "Exact": "yes" if final.exact else "no",
        "Mean steps": f"{sample.mean_steps:.2f}",
        sample.unit.capitalize(): str(sample.difficulty),
    }
    if final.valid is not None:
        shown["Path"] = path_word(final)
    for place, (name, value) in zip(st.columns(len(shown)), shown.items(), strict=True):
        place.metric(name, value)


def _chosen_run() -> OpenRun:
    checkpoint = st.sidebar.text_input("Checkpoint", os.environ.get(CHECKPOINT, ""))
    data = st.sidebar.text_input("Data set (empty: the run's own)", os.environ.get(DATA, ""))
    if not checkpoint:
        st.info("Name the directory of a trained run on the left.")
        st.stop()
    return _or_stop(lambda: _opened(checkpoint, data, _age(checkpoint)))


@st.cache_resource(max_entries=4, show_spinner="Loading the model")
def _opened(checkpoint: str, data: str, age: float) -> OpenRun:
    del age  # a run that trains on is loaded anew
    return open_run(checkpoint, data)


def _age(checkpoint: str) -> float:
    path = Path(checkpoint).expanduser()
    inner = path / "checkpoints"
    path = inner if inner.is_dir() else path
    return path.stat().st_mtime if path.exists() else 0.0


def _run_name(path: Path) -> str:
    return f"{path.parent.parent.name}/{path.parent.name}"


def _or_stop(action: Callable[[], Result]) -> Result:
    """The result, or the error's one line in the page."""
    try:
        return action()
    except UserError as error:
        st.error(" ".join(str(error).split()))
        st.stop()


if __name__ == "__main__":
    main()
