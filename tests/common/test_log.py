"""Messages: on stderr, one line each, from the main process; libraries kept quiet."""

import logging

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
