"""Builds a task from its name and the sizes of the config section `task`."""

import inspect
from collections.abc import Callable
from typing import Any

from common.errors import UserError, require
from halting_jax.tasks import addition, logic, parity, sequences, sort
from halting_jax.types import Task

_GENERATED: dict[str, Callable[..., Task]] = {
    "parity": parity.make_parity,
    "addition": addition.make_addition,
    "logic": logic.make_logic,
    "sort": sort.make_sort,
    "copy": sequences.make_copy,
    "reverse": sequences.make_reverse,
    "string_addition": sequences.make_string_addition,
}


def _make_maze(seq_len: int, vocab_size: int) -> Task:
    from halting_jax.tasks import maze

    return maze.make_maze(seq_len, vocab_size, focus_token=5)


def _make_sudoku(seq_len: int, vocab_size: int) -> Task:
    from halting_jax.tasks import maze

    return maze.make_maze(seq_len, vocab_size, focus_token=None)


_GRIDS: dict[str, Callable[..., Task]] = {"maze": _make_maze, "sudoku": _make_sudoku}
GENERATED = tuple(_GENERATED)
GRIDS = tuple(_GRIDS)
NAMES = GRIDS + GENERATED


def _constructor(name: str) -> Callable[..., Task]:
    """The function that makes the task of this name."""
    return _GENERATED[name] if name in _GENERATED else _GRIDS[name]


def size_names(name: str) -> tuple[str, ...]:
    """Names of the sizes that act for a task.

    Raises:
      UserError: if no task has this name.
    """
    require(name in NAMES, f"unknown task.name {name!r}: choose from {', '.join(NAMES)}")
    return tuple(inspect.signature(_constructor(name)).parameters)


def make_task(name: str, **sizes: Any) -> Task:
    """Makes a task from the sizes that act for it.

    Args:
      name: one of NAMES.
      **sizes: arguments of the constructors. A config holds those of every task, so sizes of
        other tasks may be among them; grids need seq_len and vocab_size, the others have defaults.

    Raises:
      UserError: if the task is unknown, no task knows one of the sizes, or one is missing.
    """
    own = size_names(name)
    known = {size for task in NAMES for size in size_names(task)}
    unknown = sorted(set(sizes) - known)
    if unknown:
        raise UserError(f"no task takes {', '.join(unknown)}; {name} takes {', '.join(own)}")
    make = _constructor(name)
    parameters = inspect.signature(make).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in sizes]
    require(not missing, f"task {name} needs {', '.join(missing)}")
    return make(**{size: value for size, value in sizes.items() if size in own})
