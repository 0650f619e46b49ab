"""A command line run in this process: its status and output as a shell would see them.

Starting an interpreter costs seconds, and compiled programs are lost with it; hundreds of refused
commands are therefore run here, each with flags of its own and its streams caught by descriptor.
"""

import contextlib
import dataclasses
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any
from unittest import mock

from absl import flags as absl_flags

from common import flags, processes

CRASHED = 1  # what Python exits with after a traceback


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: exit status.
        stdout: what it printed.
        stderr: messages; a traceback where it crashed.
    """

    status: int
    stdout: str
    stderr: str


def run(module: str, arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> Ended:
    """Runs `python -m module arguments` here.

    Args:
        module: one of the four mains.
        arguments: its command line.
        environ: variables for the time of the call.
    """
    main = importlib.import_module(module)
    values = absl_flags.FlagValues()
    command = [module, *arguments]
    status = CRASHED
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environ or {}))
        stack.enter_context(mock.patch.object(flags, "FLAGS", values))
        stack.enter_context(mock.patch.object(processes, "_started", None))
        out, err = stack.enter_context(_caught())
        try:
            flags.guard(lambda: main.main(flags.parse(_define(main, command, values), values)))
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else CRASHED
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        texts = [_content(file) for file in (out, err)]
    return Ended(status, *texts)


def _define(main: Any, command: list[str], values: absl_flags.FlagValues) -> list[str]:
    """Defines the flags of a main as its `__main__` part does; the command in its own spelling."""
    package = main.__name__.partition(".")[0]
    if package == "esm":
        main.define_own_flags(values)
        return list(main.translate(command))
    defaults = {
        "reoac_jax": "configs/gsm8k.py",
        "halting_jax": "configs/halting_parity.py",
        "qstar": "configs/qstar.py",
    }
    flags.define_flags(defaults[package], main.MODES, values)
    return command


@contextlib.contextmanager
def _caught() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Both streams go to files, also what libraries write to the descriptors."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        saved = [os.dup(number) for number in (1, 2)]
        streams = sys.stdout, sys.stderr
        for stream in streams:
            stream.flush()
        texts = [os.fdopen(os.dup(f.fileno()), "w", encoding="utf-8") for f in (out, err)]
        try:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = texts
            yield out, err
        finally:
            sys.stdout, sys.stderr = streams
            for number, old in zip((1, 2), saved, strict=True):
                os.dup2(old, number)
                os.close(old)
            for text in texts:
                text.close()


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
