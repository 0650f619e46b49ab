"""The figure of a run: how long answers are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.rundir import atomic_write
from esm.tables import METHOD_TITLES, write_csv

BINS = 20
_COLUMNS = (
    "method",
    "task",
    "example_id",
    "tokens_used",
    "budget_used",
    "probe_tokens_used",
    "finish_reason",
    "correct",
)


def draw_lengths(
    directory: Path, max_tokens: int, rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """`tokens_hist_T*.pdf` and the numbers behind it as `.csv`.

    Args:
        directory: `figures`.
        max_tokens: T, drawn as a line.
        rows: method -> rows.
    """
    table = [
        {key: {"method": method, **row}.get(key, "") for key in _COLUMNS}
        for method, of_method in rows.items()
        for row in of_method
    ]
    write_csv(directory / f"tokens_hist_T{max_tokens}.csv", table)
    _draw(directory / f"tokens_hist_T{max_tokens}.pdf", max_tokens, rows)


def _draw(path: Path, max_tokens: int, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    import io

    # The object interface: no global state, no window system.
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    lengths = [row["tokens_used"] for of_method in rows.values() for row in of_method]
    edges = np.linspace(0, max(max_tokens, *lengths, 1), BINS + 1)
    for method, of_method in rows.items():
        values = [row["tokens_used"] for row in of_method]
        title = METHOD_TITLES.get(method, method)
        axes.hist(values, bins=list(edges), alpha=0.55, label=title)
    axes.axvline(max_tokens, color="black", linestyle="--", linewidth=1, label=f"T = {max_tokens}")
    axes.set_xlabel("committed tokens")
    axes.set_ylabel("questions")
    axes.legend()
    buffer = io.BytesIO()
    # Without the date equal runs give equal files.
    FigureCanvasPdf(figure).print_pdf(buffer, metadata={"CreationDate": None})
    atomic_write(path, buffer.getvalue())
