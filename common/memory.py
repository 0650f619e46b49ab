"""Memory of the process that nobody uses any more."""

import ctypes
import gc
import sys


def give_back_freed() -> None:
    """Returns freed memory to the operating system, for processes that go on to another model.

    Tracing leaves cycles behind that hold what the compiler made, and glibc keeps what its many
    threads have freed: after a 30-layer model was compiled and run, more than half a GiB, which
    the next compilation, on other threads, does not use again. Elsewhere than on glibc only the
    cycles are collected.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Returns what the C library holds free to the operating system: milliseconds."""
    if not sys.platform.startswith("linux"):
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
    if malloc_trim is not None:
        malloc_trim(0)
