"""Statistics, checks and pictures of diagnostics files.

    python -m qstar.analyze runs/a.diagnostics.jsonl runs/b.diagnostics.jsonl --json summary.json

Survives what a running or killed generation leaves: empty files, nulls, missing fields, torn lines.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.rundir import atomic_write_json

STATISTICS = ("mean", "std", "min", "max", "median", "q25", "q75")
ESS_RATIO_RANGE, ALPHA_RANGE, KL_LIMIT = (0.8, 1.2), (0.2, 0.8), 0.05
_INDEX_FIELDS = ("sample_idx", "repeat")
_PICTURED = ("alpha_mean", "ess_ratio_mean", "kl_theta_mean", "kl_t_mean")


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, in order; lines that are none are left out.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def numeric_fields(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Finite numbers per field, in order; fields without any and index fields are left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and name not in _INDEX_FIELDS and math.isfinite(value):
                found.setdefault(name, []).append(float(value))
    return {name: np.array(values) for name, values in found.items()}


def describe(values: np.ndarray) -> dict[str, float]:
    """Mean, population standard deviation, extremes, median and quartiles (interpolated)."""
    quartiles = np.quantile(values, [0.25, 0.5, 0.75])
    numbers = (
        values.mean(),
        values.std(),
        values.min(),
        values.max(),
        quartiles[1],
        quartiles[0],
        quartiles[2],
    )
    return dict(zip(STATISTICS, map(float, numbers), strict=True))


def check(statistics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Whether the file's means lie where a balanced mixture puts them; None = no such field."""

    def mean(name: str) -> float | None:
        return statistics[name]["mean"] if name in statistics else None

    def within(value: float | None, low: float, high: float) -> bool | None:
        return None if value is None else low <= value <= high

    theta, t = mean("kl_theta_mean"), mean("kl_t_mean")
    apart = None if theta is None or t is None else abs(theta - t)
    return {
        "ess_ratio_ok": within(mean("ess_ratio_mean"), *ESS_RATIO_RANGE),
        "alpha_ok": within(mean("alpha_mean"), *ALPHA_RANGE),
        "kl_symmetry_ok": None if apart is None else apart < KL_LIMIT,
        "kl_abs_diff": apart,
    }


def analyze(path: str | Path) -> dict[str, Any]:
    """Name, number of samples, statistics per numeric field, and checks of one file."""
    rows = read_lines(path)
    statistics = {name: describe(values) for name, values in numeric_fields(rows).items()}
    return {
        "file": Path(path).name,
        "samples": len(rows),
        "statistics": statistics,
        "checks": check(statistics),
    }


def format_report(report: Mapping[str, Any]) -> str:
    """One file's statistics and checks as text."""
    lines = [f"{report['file']}: {report['samples']} samples"]
    names = report["statistics"]
    width = max((len(name) for name in names), default=0)
    if names:
        lines.append(" ".join([f"{'':{width}}", *(f"{s:>9}" for s in STATISTICS)]))
    for name, values in names.items():
        lines.append(" ".join([f"{name:{width}}", *(f"{values[s]:9.4f}" for s in STATISTICS)]))
    words = {True: "ok", False: "outside the expected range", None: "not recorded"}
    checks = report["checks"]
    for name, title in (
        ("ess_ratio_ok", f"mean ESS ratio in {list(ESS_RATIO_RANGE)}"),
        ("alpha_ok", f"mean alpha in {list(ALPHA_RANGE)}"),
        ("kl_symmetry_ok", f"means of both divergences within {KL_LIMIT}"),
    ):
        lines.append(f"{title}: {words[checks[name]]}")
    return "\n".join(lines)


def format_comparison(reports: Sequence[Mapping[str, Any]]) -> str:
    """One line per file: alpha, ESS ratio and distance of the divergences."""
    width = max(len(report["file"]) for report in reports)
    lines = [f"{'':{width}} {'alpha':>9} {'ESS ratio':>9} {'KL diff':>9}"]
    for report in reports:
        statistics = report["statistics"]
        values = [statistics.get(k, {}).get("mean") for k in ("alpha_mean", "ess_ratio_mean")]
        values.append(report["checks"]["kl_abs_diff"])
        shown = " ".join("        -" if v is None else f"{v:9.4f}" for v in values)
        lines.append(f"{report['file']:{width}} {shown}")
    return "\n".join(lines)


def draw_pictures(path: str | Path, folder: Path) -> list[Path]:
    """distributions.png, alpha_vs_ess.png and evolution.png of one file, where it has the fields.

    Raises:
        UserError: if matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("pictures need matplotlib; install it or use --no_plots") from None
    rows = read_lines(path)
    fields = numeric_fields(rows)
    shown = [
        n for n in ("alpha_mean", "ess_ratio_mean", "kl_theta_mean", "kl_t_mean") if n in fields
    ]
    folder.mkdir(parents=True, exist_ok=True)
    made = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        pyplot.close(figure)
        made.append(folder / name)

    if shown:
        figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 3), squeeze=False)
        for axis, name in zip(axes[0], shown, strict=True):
            axis.hist(fields[name], bins=50)
            axis.set_xlabel(name)
        save(figure, "distributions.png")
        figure, axes = pyplot.subplots(len(shown), 1, figsize=(7, 2 * len(shown)), squeeze=False)
        for axis, name in zip(axes[:, 0], shown, strict=True):
            axis.plot(fields[name], linewidth=0.8)
            axis.set_ylabel(name)
        axes[-1, 0].set_xlabel("sample, in order of completion")
        save(figure, "evolution.png")
    both = ("alpha_mean", "ess_ratio_mean")
    pairs = [
        [row[name] for name in both]
        for row in rows
        if all(isinstance(row.get(name), (int, float)) for name in both)
    ]
    if pairs:
        figure, axis = pyplot.subplots(figsize=(4.5, 3.5))
        axis.scatter(*np.array(pairs, float).T, s=6)
        axis.set_xlabel("mean alpha (weight of pi_theta)")
        axis.set_ylabel("mean ESS ratio")
        save(figure, "alpha_vs_ess.png")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="diagnostics files")
    parser.add_argument("--output_dir", default="diagnostics_analysis", help="for the pictures")
    parser.add_argument("--no_plots", action="store_true", help="numbers only")
    parser.add_argument("--json", default="", help="also write everything to this file")
    given = parser.parse_args(arguments)
    try:
        reports = [analyze(path) for path in given.files]
        if len(reports) > 1:
            print(format_comparison(reports) + "\n")
        print("\n\n".join(map(format_report, reports)))
        if given.json:
            atomic_write_json(given.json, {"files": reports})
        if not given.no_plots:
            for path in given.files:
                name = Path(path).name.removesuffix(".jsonl").removesuffix(".diagnostics")
                folder = Path(given.output_dir)
                folder = folder / name if len(given.files) > 1 else folder
                for picture in draw_pictures(path, folder):
                    print(picture)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
