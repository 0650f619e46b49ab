"""The eight rotations and reflections of a square grid, as index maps.

0 identity; 1, 2, 3 counter-clockwise quarter turns; 4 left-right flip; 5 up-down flip; 6 transpose;
7 left-right flip of the first quarter turn.
"""

import functools
from collections.abc import Callable

import numpy as np

from halting_jax.datasets.maze_solver import canonical_labels, side_of

NUM_MAPS = 8
INVERSE_IDS = (0, 3, 2, 1, 4, 5, 6, 7)


@functools.lru_cache(maxsize=32)
def index_maps(side: int) -> np.ndarray:
    """Returns where each cell of a transformed grid comes from.

    Args:
        side: of the grid.

    Returns:
        int32 [8, S], not to be written to: transformed = grid[index_maps[id]], row by row.
    """
    cells = np.arange(side * side, dtype=np.int32).reshape(side, side)
    images = [np.rot90(cells, turns) for turns in range(4)]
    images += [cells[:, ::-1], cells[::-1], cells.T, images[1][:, ::-1]]
    maps = np.stack(images).reshape(NUM_MAPS, -1)
    maps.setflags(write=False)
    return maps


def transform(grids: np.ndarray, map_id: int) -> np.ndarray:
    """Applies one map to grids [..., S]."""
    return grids[..., index_maps(side_of(grids.shape[-1]))[map_id]]


def transform_all(grids: np.ndarray) -> np.ndarray:
    """Applies every map; [P, S] to [8, P, S]."""
    return np.stack([transform(grids, map_id) for map_id in range(NUM_MAPS)])


def relabel_all(
    inputs: np.ndarray, label_fn: Callable[[np.ndarray], np.ndarray] = canonical_labels
) -> np.ndarray:
    """Labels every transformed maze anew, as a tie-break does not survive a rotation.

    Args:
        inputs: uint8 [P, S].
        label_fn: the rule, uint8 [P, S] in and out.

    Returns:
        uint8 [8, P, S], the labels of `transform_all(inputs)`.
    """
    return np.stack([label_fn(images) for images in transform_all(inputs)])
