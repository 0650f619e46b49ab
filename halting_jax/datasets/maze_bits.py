"""Breadth-first search on thousands of grids at once, one machine word per row of a grid.

A grid is `side` words and a word of zeros behind them, so that a batch is one flat vector in which
rows of neighbouring grids never touch. One step of all searches is eight passes over it.
"""

import numpy as np

from common.errors import UserError

MAX_SIDE = 64

# Finished grids are taken out of the batch at this interval.
_COMPACT_EVERY = 8


def word_type(side: int) -> np.dtype:
    """Returns the smallest word with a bit per column.

    Raises:
        UserError: for sides beyond the largest word.
    """
    for bits in (16, 32, 64):
        if side <= bits:
            return np.dtype(f"<u{bits // 8}")
    raise UserError(f"mazes can be generated up to side {MAX_SIDE}, got {side}")


def pack(cells: np.ndarray) -> np.ndarray:
    """Packs bool [n, side, side] into words [n, side + 1]; column c is bit c."""
    count, side = cells.shape[:2]
    dtype = word_type(side)
    padded = np.zeros((count, side + 1, dtype.itemsize * 8), bool)
    padded[:, :side, :side] = cells
    return np.packbits(padded, axis=-1, bitorder="little").view(dtype)[:, :, 0]


def unpack(words: np.ndarray) -> np.ndarray:
    """Unpacks words [n, side + 1] into bool [n, side, side]."""
    count, side = len(words), words.shape[1] - 1
    as_bytes = np.ascontiguousarray(words)[:, :side, None].view(np.uint8)
    return (
        np.unpackbits(as_bytes, axis=-1, count=side, bitorder="little")
        .view(bool)
        .reshape(count, side, side)
    )


def single_cells(cells: np.ndarray, side: int) -> np.ndarray:
    """Returns words [n, side + 1] with the one bit of each cell number [n]."""
    dtype = word_type(side)
    row, column = np.divmod(np.asarray(cells), side)
    words = np.zeros((len(row), side + 1), dtype)
    words[np.arange(len(row)), row] = np.left_shift(dtype.type(1), column.astype(dtype))
    return words


def first_cell(words: np.ndarray) -> np.ndarray:
    """Keeps the first cell of each set; words [n, side + 1] in and out, no set may be empty."""
    each = np.arange(len(words))
    row = (words != 0).argmax(1)
    word = words[each, row]
    first = np.zeros_like(words)
    first[each, row] = word & (~word + words.dtype.type(1))
    return first


def flood(rooms: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Searches from one cell per grid until nothing new is reached.

    Args:
        rooms: words [n, side + 1], the open cells.
        start: words [n, side + 1], one open cell each.

    Returns:
        The cells reached and the farthest of them (words [n, side + 1]), and their distance
        (int32 [n]).
    """
    count, rows = rooms.shape
    reached, farthest = np.empty_like(rooms), np.empty_like(rooms)
    depth = np.zeros(count, np.int32)
    alive = np.arange(count)
    free, front = (rooms & ~start).reshape(-1), start.reshape(-1).copy()
    steps = 0
    while alive.size:
        history: np.ndarray = np.empty((_COMPACT_EVERY + 1, free.size), rooms.dtype)
        history[0] = front
        spare = np.empty_like(front)
        for step in range(_COMPACT_EVERY):
            _grow(history[step], free, history[step + 1], spare)
        shaped = history.reshape(_COMPACT_EVERY + 1, -1, rows)
        goes_on: np.ndarray = shaped[-1].any(axis=1)
        done = np.flatnonzero(np.logical_not(goes_on))
        if done.size:
            ended = shaped[:, done]  # [steps, done, rows]
            was_alive = np.not_equal(ended, 0).any(axis=2)
            last = _COMPACT_EVERY - was_alive[::-1].argmax(0)
            farthest[alive[done]] = ended[last, np.arange(done.size)]
            depth[alive[done]] = steps + last
            reached[alive[done]] = rooms[alive[done]] & ~free.reshape(-1, rows)[done]
            free = free.reshape(-1, rows)[goes_on].reshape(-1)
            alive = alive[goes_on]
        front = shaped[-1, goes_on].reshape(-1)
        steps += _COMPACT_EVERY
    return reached, farthest, depth


def beyond(area: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """Finds the cells of a connected area that are more than `steps` moves from its start.

    Args:
        area: words [n, side + 1], connected.
        start: words [n, side + 1], one cell of the area.
        steps: the distance.

    Returns:
        words [n, side + 1].
    """
    rows = area.shape[1]
    far = np.zeros_like(area)
    alive = np.arange(len(area))
    free, front = (area & ~start).reshape(-1), start.reshape(-1).copy()
    grown, spare = np.empty_like(front), np.empty_like(front)
    for step in range(1, steps + 1):
        _grow(front, free, grown, spare)
        front, grown = grown, front
        if step % _COMPACT_EVERY == 0:
            goes_on = free.reshape(-1, rows).any(1)
            if not goes_on.all():
                alive = alive[goes_on]
                free = free.reshape(-1, rows)[goes_on].reshape(-1)
                front = front.reshape(-1, rows)[goes_on].reshape(-1)
                grown, spare = np.empty_like(front), np.empty_like(front)
            if not alive.size:
                break
    far[alive] = free.reshape(-1, rows)
    return far


def _grow(front: np.ndarray, free: np.ndarray, out: np.ndarray, spare: np.ndarray) -> None:
    """Writes the free neighbours of the frontier to `out` and takes them out of `free`."""
    np.left_shift(front, 1, out=out)
    np.right_shift(front, 1, out=spare)
    out |= spare
    out[1:] |= front[:-1]
    out[:-1] |= front[1:]
    out &= free
    free ^= out
