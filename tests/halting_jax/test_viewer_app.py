"""The Streamlit viewer, driven by Streamlit's own test runner."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from halting_jax import viewer
from tests.halting_jax.viewer_runs import write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("streamlit") is None,
        reason="Streamlit is not installed (pip install streamlit)",
    ),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a parity and a maze run."""
    root = tmp_path_factory.mktemp("app")
    for kind in ("parity", "maze_act"):
        write_run(root / kind, kind)
    return root


@pytest.fixture
def app(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The app, opened on the parity run but not run yet."""
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv(viewer.CHECKPOINT, str(runs / "parity"))
    monkeypatch.setenv(viewer.DATA, "")
    monkeypatch.setenv(viewer.ROOT, str(runs))
    return AppTest.from_file(str(viewer.APP), default_timeout=280)


def labelled(widgets: Any, label: str) -> Any:
    """The widget of a label."""
    return next(widget for widget in widgets if widget.label.startswith(label))


def test_samples_page_shows_numbers_and_takes_an_index(app: Any) -> None:
    app.run()
    assert not app.exception and [title.value for title in app.title] == ["Samples"]
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["Exact"] in ("yes", "no") and shown["Mean steps"] == "2.00" and "Bits" in shown
    assert labelled(app.sidebar.selectbox, "Split").options == ["id", "near_ood", "ood", "val"]
    labelled(app.sidebar.checkbox, "Step").uncheck()
    labelled(app.sidebar.slider, "Fixed").set_value(3)
    app.run()
    assert {m.label: m.value for m in app.metric}["Mean steps"] == "3.00"
    labelled(app.sidebar.number_input, "Sample").set_value(64)
    app.run()
    assert not app.exception
    assert "sample index 64 is out of range" in app.error[0].value
    labelled(app.sidebar.text_input, "Checkpoint").set_value("/no/such/run")
    app.run()
    assert "no such directory" in app.error[0].value
    labelled(app.sidebar.text_input, "Checkpoint").set_value("")
    app.run()
    assert not app.error and "Name the directory" in app.info[0].value


def test_samples_page_shows_mazes(app: Any, runs: Path) -> None:
    app.run()
    labelled(app.sidebar.text_input, "Checkpoint").set_value(str(runs / "maze_act"))
    labelled(app.sidebar.checkbox, "Step").uncheck()
    app.run()
    assert not app.exception
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["Path"] == "none" and shown["Cells right"].endswith("%")
    app.sidebar.radio[0].set_value("In and out of distribution")
    app.run()
    assert "read from files" in app.info[0].value


def test_metrics_page_draws_the_chosen_curves(app: Any, runs: Path) -> None:
    app.run()
    app.sidebar.radio[0].set_value("Metrics")
    app.run()
    assert not app.exception
    assert len(labelled(app.sidebar.selectbox, "Run").options) == 2
    assert [header.value for header in app.subheader] == ["train/loss_classification"]
    app.multiselect[0].set_value(["val/accuracy", "lr"])
    labelled(app.sidebar.radio, "Horizontal").set_value("epoch")
    labelled(app.sidebar.slider, "Rolling").set_value(2)
    app.run()
    assert not app.exception
    assert [header.value for header in app.subheader] == ["val/accuracy", "lr"]
    assert len(app.dataframe[0].value) == 4
    labelled(app.sidebar.text_input, "Look").set_value(str(runs / "none"))
    app.run()
    assert "no such directory" in app.error[0].value


def test_sets_page_puts_lengths_side_by_side(app: Any) -> None:
    app.run()
    app.sidebar.radio[0].set_value("In and out of distribution")
    app.run()
    labelled(app.sidebar.slider, "Examples").set_value(16)
    app.run()
    assert not app.exception
    assert [header.value for header in app.subheader] == ["id", "near_ood", "ood"]
    tables = [table.value for table in app.dataframe]
    assert [len(table) for table in tables] == [10, 10, 10]
    for table in tables:
        for _, row in table.iterrows():
            assert row["label"] == ("odd" if row["question"].count("+") % 2 else "even")
            assert row["right"] == (row["label"] == row["answer"])
