"""Shows what a trained halting model does, as one HTML file or in the browser with Streamlit.

    python -m halting_jax.viewer --checkpoint=runs/x --html=out.html
    python -m halting_jax.viewer --checkpoint=runs/x            # Streamlit, if installed

The page needs nothing but a browser: samples with label and answer, how long the model thought
where, what it would have answered after every step, training curves, accuracy and steps by
difficulty. Exit status: 0 done, 2 bad usage or input.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from common import log
from common.errors import Interrupted, UserError, require
from common.flags import EXIT_INTERRUPTED, EXIT_USER_ERROR, one_line
from common.rundir import atomic_write

if TYPE_CHECKING:
    from halting_jax.viewer_run import OpenRun

APP = Path(__file__).with_name("viewer_app.py")
CHECKPOINT, DATA, ROOT = (f"HALTING_VIEWER_{name}" for name in ("CHECKPOINT", "DATA", "ROOT"))


def main(argv: Sequence[str]) -> int:
    """Writes the page, or starts Streamlit.

    Args:
      argv: program name and arguments.

    Raises:
      UserError: bad usage, a missing run or data set, an index out of range.
    """
    options = _parse(argv[1:])
    log.quiet_libraries()
    if not options.html:
        return start_streamlit(options.checkpoint, options.data, options.root, options.port)
    require(
        bool(options.checkpoint), "--html needs --checkpoint=RUN, the directory of a trained run"
    )
    print(write_page(options))
    return 0


def write_page(options: argparse.Namespace) -> Path:
    """Runs the model on the samples and writes the page.

    Returns:
      the file.
    """
    from halting_jax.viewer_data import describe
    from halting_jax.viewer_metrics import read_metrics, read_report, run_facts
    from halting_jax.viewer_page import render_page
    from halting_jax.viewer_run import open_run

    target = Path(options.html).expanduser()
    require(not target.is_dir(), f"--html={options.html} is a directory; name a file")
    run = open_run(options.checkpoint, options.data)
    samples = []
    for split, index in chosen_samples(run, options.split, options.first, options.samples):
        samples.append(describe(run, split, index, options.fixed_steps, options.frames))
        log.info("%s %d: %s", split, index, "right" if samples[-1].final.exact else "wrong")
    path = run.trained.path
    metrics = read_metrics(path) if (path / "metrics.jsonl").is_file() else []
    facts = run_facts(run.trained, run.directory)
    try:
        atomic_write(target, render_page(samples, facts, metrics, read_report(path)))
    except OSError as error:
        raise UserError(f"cannot write {options.html} ({error.strerror})") from error
    return target


def chosen_samples(run: "OpenRun", split: str, first: int, count: int) -> list[tuple[str, int]]:
    """Which samples a page shows: (split, index) pairs.

    Args:
      run: the opened run.
      split: "" spreads the samples over all test sets.
      first: index of the first one in each split.
      count: how many altogether; cut where a set ends.

    Raises:
      UserError: no such split, or `first` is beyond its end.
    """
    splits = (split,) if split else run.test_splits
    shares = [len(part) for part in np.array_split(np.arange(count), len(splits))]
    pairs = []
    for name, share in zip(splits, shares, strict=True):
        size = run.examples(name).size
        # A first index beyond the end stays, for the error that names the set's size.
        pairs += [(name, first + i) for i in range(min(share, max(size - first, 1)))]
    return pairs


def start_streamlit(checkpoint: str, data: str, root: str, port: int) -> int:
    """Replaces this process by Streamlit's server on this machine.

    Raises:
      UserError: Streamlit is not installed.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise UserError(
            "the interactive viewer needs Streamlit: pip install streamlit; or write a page with "
            "--html=out.html, which needs nothing"
        )
    repository = str(APP.parent.parent)
    paths = [repository, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    server = [
        "--server.address=localhost",
        f"--server.port={port}",
        "--server.headless=true",
        "--browser.gatherUsageStats=false",
    ]
    # Streamlit owns the command line of the app, so the paths go by the environment.
    os.environ |= {CHECKPOINT: checkpoint, DATA: data, ROOT: root}
    sys.stdout.flush()
    command = [sys.executable, "-m", "streamlit", "run", str(APP), *server]
    os.execv(sys.executable, command)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m halting_jax.viewer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", default="", help="RUN, RUN/checkpoints or RUN/checkpoints/STEP")
    add("--html", default="", help="write one self-contained page to this file")
    add("--data", default="", help="directory of other puzzle files (maze, sudoku)")
    add("--split", default="", help="test, val, train or id, near_ood, ood; default: all test sets")
    add("--first", type=_whole(0), default=0, help="index of the first sample")
    add("--samples", type=_whole(1), default=6, help="how many samples")
    add("--frames", type=_whole(0), default=16, help="most numbers of steps shown, 0 = none")
    add("--fixed_steps", type=_whole(0), default=0, help="overrule halting; 0 = as trained")
    add("--root", default="runs", help="where Streamlit's metrics page looks for runs")
    add("--port", type=_whole(0), default=8501, help="of Streamlit's server on this machine")
    return parser.parse_args(arguments)


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    whole.__name__ = "whole number"  # as argparse names it in its messages
    return whole


def run() -> NoReturn:
    """Calls `main` with the command line; bad input ends in one line and exit status 2."""
    try:
        status = main(sys.argv)
    except UserError as error:
        status = _complain(f"error: {one_line(str(error))}", EXIT_USER_ERROR)
    except (Interrupted, KeyboardInterrupt):
        status = _complain("interrupted: nothing was written", EXIT_INTERRUPTED)
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    run()
