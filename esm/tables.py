"""The tables of a run as files; every number in them comes from `esm.compare`."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.rundir import atomic_write, atomic_write_json

METHOD_TITLES = {
    "greedy": "Greedy-CoT",
    "esm": "ESM",
    "static": "Static",
    "self_consistency": "Self-consistency",
}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows that share their columns; nothing for no rows."""
    if not rows:
        return
    buffer = io.StringIO()
    columns = list(rows[0])
    writer = csv.DictWriter(buffer, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows([{key: _cell(row.get(key, "")) for key in columns} for row in rows])
    atomic_write(path, buffer.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a table, cells as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_main(
    directory: Path, dataset: str, split: str, max_tokens: int, accuracies: Mapping[str, float]
) -> None:
    """`main_results_single.csv`: one accuracy column per method.

    Args:
        directory: `tables`.
        dataset: evaluated.
        split: evaluated.
        max_tokens: T.
        accuracies: method -> accuracy.
    """
    row: dict[str, Any] = {"dataset": dataset, "split": split, "T_max": max_tokens}
    row |= {METHOD_TITLES[method]: accuracy for method, accuracy in accuracies.items()}
    write_csv(directory / "main_results_single.csv", [row])


def write_diagnostics(
    directory: Path, max_tokens: int, rows: Mapping[str, Mapping[str, Any]]
) -> None:
    """`diagnostics_T*.csv` and `.json`, one row per method."""
    stem = directory / f"diagnostics_T{max_tokens}"
    write_csv(stem.with_suffix(".csv"), list(rows.values()))
    atomic_write_json(stem.with_suffix(".json"), {"T_max": max_tokens, **rows})


def write_comparison(directory: Path, row: Mapping[str, Any]) -> None:
    """`compare_T*.csv` and `.json`."""
    stem = directory / f"compare_T{row['T_max']}"
    write_csv(stem.with_suffix(".csv"), [row])
    atomic_write_json(stem.with_suffix(".json"), row)


def text_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows for a terminal, columns aligned."""
    cells = [list(columns)] + [[_shown(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(c, widths, strict=True)) for c in cells]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> Any:
    return f"{value:.10g}" if isinstance(value, float) else value


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
