"""The stage postprocess: one page per run with its tables, figures and the end of its log."""

from pathlib import Path
from typing import Any

from common.rundir import atomic_write
from esm import tables
from esm.files import MINED_MANIFEST, read_object
from esm.monitor import Monitor
from esm.runs import Run

LOG_LINES = 40


def write_report(run: Run, monitor: Monitor) -> Path:
    """Writes `report.md`; parts that do not exist are left out."""
    lines = [f"# {run.path.parent.name} / {run.path.name}", ""]
    lines += _mining(run)
    for path in sorted(run.tables.glob("*.csv")):
        rows = tables.read_csv(path)
        if rows:
            lines += [f"## {path.stem}", "", *_markdown(rows), ""]
    figures = sorted((run.path / "figures").glob("*.pdf"))
    pages = sorted((run.path / "cases").glob("*.md"))
    if figures or pages:
        lines += ["## Files", ""]
        lines += [f"- [{p.name}]({p.relative_to(run.path)})" for p in (*figures, *pages)] + [""]
    lines += _log(run)
    target = run.path / "report.md"
    atomic_write(target, "\n".join(lines) + "\n")
    monitor.info(f"report: {target}")
    return target


def _mining(run: Run) -> list[str]:
    lines: list[str] = []
    for title, path in (
        ("Rollouts", run.mine / "rollouts.json"),
        ("Tuned", run.tune / "chosen.json"),
    ):
        if path.exists():
            content = read_object(path, "delete it to leave its part of the report out")
            content.pop("dev", None)
            lines += [f"## {title}", "", *_markdown([content]), ""]
    manifest = run.mine / "manifest.json"
    if manifest.exists():
        content = read_object(manifest, "run --stage=mine again", MINED_MANIFEST)
        lines += [f"{content['pairs']} pairs; left out: {content['skipped'] or 'none'}.", ""]
    return lines


def _markdown(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return str(value) if number == int(number) else f"{number:.4g}"


def _log(run: Run) -> list[str]:
    path = run.path / "logs" / "run.log"
    if not path.is_file():
        return []
    last = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return ["## End of the log", "", "~~~", *last, "~~~"]
