"""Messages: on stderr, one line each, from the main process; libraries kept quiet."""

import errno
import logging
import sys
import threading

import pytest
from absl import logging as absl_logging

from common import log, processes
from common.startup import Start


def test_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("run %s of %d", "a", 3)
    log.info("100% done")
    log.warning("%s is slow", "it")
    log.warning("5% lost")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "run a of 3",
        "100% done",
        "warning: it is slow",
        "warning: 5% lost",
    ]


def test_other_processes_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_started", Start("explicit", 2, 1, "host:1"))
    log.info("nothing")
    log.warning("nothing")
    assert capsys.readouterr() == ("", "")


def test_libraries_may_only_warn() -> None:
    before = absl_logging.get_verbosity()
    try:
        absl_logging.set_verbosity(absl_logging.INFO)
        log.quiet_libraries()
        logger = absl_logging.get_absl_logger()
        assert logger.isEnabledFor(logging.WARNING) and not logger.isEnabledFor(logging.INFO)
    finally:
        absl_logging.set_verbosity(before)


class Dying:
    """Raises where nobody can catch it."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __del__(self) -> None:
        raise RuntimeError(self.words)


def test_threads_that_run_out_of_disk_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def write(number: int) -> None:
        raise OSError(number, "no")

    before = threading.excepthook, sys.unraisablehook
    try:
        log.quiet_libraries()
        for number in (errno.ENOSPC, errno.EACCES):
            thread = threading.Thread(target=write, args=(number,), name=f"writer-{number}")
            thread.start()
            thread.join()
        for words in ("Event loop is closed", "another"):
            Dying(words)
    finally:
        threading.excepthook, sys.unraisablehook = before
    printed = capsys.readouterr().err
    assert f"writer-{errno.EACCES}" in printed and f"writer-{errno.ENOSPC}" not in printed
    assert "another" in printed and "closed" not in printed
