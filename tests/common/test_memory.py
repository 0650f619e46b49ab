"""Freed memory goes back to the operating system."""

import ctypes
import os
import sys

import pytest

from common.memory import give_back_freed

PIECE, COUNT = 32 * 1024, 4000  # below malloc's threshold for mappings of their own


def resident() -> int:
    """Bytes of memory the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="needs glibc",
)
def test_pieces_between_others_are_given_back() -> None:
    pieces = [bytearray(PIECE) for _ in range(COUNT)]
    kept = pieces[::100]  # free() alone returns nothing from below these
    full = resident()
    del pieces
    give_back_freed()
    assert full - resident() > 0.8 * PIECE * COUNT
    assert len(kept) == COUNT // 100
