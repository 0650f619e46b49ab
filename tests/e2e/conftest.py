"""One finished run that many tests read, and the main function inside this process."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags

from common import flags
from common.checkpoint import Checkpointer
from reoac_jax import main as reoac_main
from tests.e2e import commands

Main = Callable[..., int | None]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished plus run (do not change it) and what it printed; run as a command."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = commands.run(f"--workdir={workdir}", *commands.PLUS)
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir, done.stdout


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished[0], tmp_path / "copied")
    return tmp_path / "copied"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """Parses arguments and calls the main function, as `python -m reoac_jax.main` does."""

    def call(*args: str) -> int | None:
        values = absl_flags.FlagValues()
        flags.define_flags("configs/gsm8k.py", reoac_main.MODES, values)
        monkeypatch.setattr(flags, "FLAGS", values)
        flags.parse(["reoac_jax.main", *args], values)
        return reoac_main.main([])

    return call


@pytest.fixture
def terminate_before_save(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sends SIGTERM to this process right before the checkpoint of a step is written, once."""

    def install(step: int) -> None:
        save = Checkpointer.save
        sent: list[int] = []

        def saving(self: Checkpointer, number: int, *args: Any, **kwargs: Any) -> None:
            if number >= step and not sent:
                sent.append(number)
                os.kill(os.getpid(), signal.SIGTERM)
            save(self, number, *args, **kwargs)

        monkeypatch.setattr(Checkpointer, "save", saving)

    return install
