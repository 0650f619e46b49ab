"""Whether a set of grid cells can be walked from one cell to another, each exactly once.

Marks that turn back beside themselves have more neighbours than a path has, so counting neighbours
does not decide it. Between every two neighbouring cells of the set the path either makes a move or
does not; a search over these moves spreads what must follow (as a solver of loop puzzles does) and
guesses where nothing follows. All rows of a batch are searched side by side.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A row that needs more guesses at a time, or more rounds, counts as having no path. Paths with a
# few touching turns need no guess and as many rounds as the logarithm of their length.
MAX_GUESSES = 64
MAX_ROUNDS = 2000

_RUNNING, _FOUND, _NONE = 0, 1, 2


class _Moves(NamedTuple):
    """Moves between neighbours, bool [B, 2, H, W]: to the right and down from each cell.

    Attributes:
      undecided: may still be made or not.
      made: part of the path.
    """

    undecided: jax.Array
    made: jax.Array


class _Search(NamedTuple):
    """State of the search.

    Attributes:
      moves: as far as they are known.
      label: int32 [B, S], a cell that each cell is joined to by moves made; equal labels mean
        joined, different ones not yet anything.
      saved: alternatives to the guesses made, leaves [B, MAX_GUESSES, 2, H, W].
      depth: int32 [B], guesses made.
      status: int32 [B], one of _RUNNING, _FOUND, _NONE.
      rounds: int32 [].
    """

    moves: _Moves
    label: jax.Array
    saved: _Moves
    depth: jax.Array
    status: jax.Array
    rounds: jax.Array


def neighbours(values: jax.Array, outside: int | bool) -> list[jax.Array]:
    """Shifts grids so that each cell sees the one above, left, below and right of it.

    Args:
      values: [..., H, W].
      outside: what cells at the edge see beyond it.

    Returns:
      Four arrays like `values`.
    """

    def shifted(axis: int, back: bool) -> jax.Array:
        edge = jnp.full_like(jax.lax.slice_in_dim(values, 0, 1, axis=axis), outside)
        size = values.shape[axis]
        if back:
            rest = jax.lax.slice_in_dim(values, 0, size - 1, axis=axis)
            return jnp.concatenate([edge, rest], axis)
        rest = jax.lax.slice_in_dim(values, 1, size, axis=axis)
        return jnp.concatenate([rest, edge], axis)

    row, column = values.ndim - 2, values.ndim - 1
    return [shifted(row, True), shifted(column, True), shifted(row, False), shifted(column, False)]


def single_path_exists(
    members: jax.Array, start: jax.Array, goal: jax.Array, ask: jax.Array
) -> jax.Array:
    """Searches for a path of single moves from start to goal through every member once.

    Args:
      members: bool [B, H, W], start and goal among them.
      start: bool [B, H, W], one cell per row.
      goal: bool [B, H, W], another one.
      ask: bool [B], rows to look at.

    Returns:
      bool [B]; False where `ask` is False or the search reaches MAX_GUESSES or MAX_ROUNDS.
    """
    rows, height, width = members.shape
    needed = jnp.where(members, jnp.where(start | goal, 1, 2), 0)
    size = jnp.sum(members, axis=(1, 2), dtype=jnp.int32)
    # A path alternates between the two colours of a chessboard.
    colour = jnp.where((jnp.arange(height)[:, None] + jnp.arange(width)) % 2 == 0, 1, -1)
    balance = jnp.sum(jnp.where(members, colour, 0), axis=(1, 2))
    end_colours = jnp.sum(jnp.where(start | goal, colour, 0), axis=(1, 2))
    possible = ask & (2 * balance == end_colours)
    right, down = neighbours(members, False)[3], neighbours(members, False)[2]
    undecided = jnp.stack([members & right, members & down], axis=1)  # [B, 2, H, W]
    moves = _Moves(undecided, jnp.zeros_like(undecided))
    initial = _Search(
        moves=moves,
        label=_own_labels(rows, height * width),
        saved=jax.tree.map(lambda x: jnp.zeros((rows, MAX_GUESSES, *x.shape[1:]), bool), moves),
        depth=jnp.zeros(rows, jnp.int32),
        status=jnp.where(possible, _RUNNING, _NONE),
        rounds=jnp.zeros((), jnp.int32),
    )

    def goes_on(search: _Search) -> jax.Array:
        return jnp.any(search.status == _RUNNING) & (search.rounds < MAX_ROUNDS)

    def body(search: _Search) -> _Search:
        return _round(search, members, start, goal, needed, size)

    return jax.lax.while_loop(goes_on, body, initial).status == _FOUND


def _round(
    search: _Search,
    members: jax.Array,
    start: jax.Array,
    goal: jax.Array,
    needed: jax.Array,
    size: jax.Array,
) -> _Search:
    moves, label = search.moves, search.label
    made_here, undecided_here = _degree(moves.made), _degree(moves.undecided)
    contradiction = jnp.any(
        (made_here > needed) | (made_here + undecided_here < needed), axis=(1, 2)
    )
    full, short = made_here == needed, made_here + undecided_here == needed
    grid = label.reshape(members.shape)
    start_label = jnp.max(jnp.where(start, grid, 0), axis=(1, 2))[:, None, None, None]
    goal_label = jnp.max(jnp.where(goal, grid, 0), axis=(1, 2))[:, None, None, None]
    here, there = _both_ends(grid)
    is_last = jnp.sum(moves.made, axis=(1, 2, 3), dtype=jnp.int32) == size - 2
    joins_ends = ((here == start_label) & (there == goal_label)) | (
        (here == goal_label) & (there == start_label)
    )
    closes = (here == there) | (joins_ends & ~is_last[:, None, None, None])
    refused = closes | jnp.logical_or(*_both_ends(full))
    forced = jnp.logical_or(*_both_ends(short))
    made = moves.made | (moves.undecided & forced & ~refused)
    undecided = moves.undecided & ~refused & ~forced
    new_label = _join(made, label)
    still = (
        ~jnp.any((made != moves.made) | (undecided != moves.undecided), axis=(1, 2, 3))
        & ~jnp.any(new_label != label, axis=1)
        & ~contradiction
    )
    complete = still & ~jnp.any(undecided, axis=(1, 2, 3))
    # With all degrees right the moves are one path and perhaps cycles beside it.
    whole = jnp.all(~members | (grid == start_label[:, 0]), axis=(1, 2))
    running = search.status == _RUNNING
    found = running & complete & whole
    fails = running & (contradiction | (complete & ~whole))
    guesses = running & still & ~complete
    status = jnp.where(found, _FOUND, search.status)
    status = jnp.where(fails & (search.depth == 0), _NONE, status)
    status = jnp.where(guesses & (search.depth == MAX_GUESSES), _NONE, status)
    return _branch(
        search._replace(status=status, rounds=search.rounds + 1),
        _Moves(undecided, made),
        new_label,
        guesses,
        fails,
        (here == start_label) | (there == start_label),
    )


def _branch(
    search: _Search,
    moves: _Moves,
    label: jax.Array,
    guesses: jax.Array,
    fails: jax.Array,
    at_start: jax.Array,
) -> _Search:
    """Makes one undecided move where nothing follows, and takes the last one back at a dead end.

    Args:
      search: before the round, with its new status.
      moves, label: after the round.
      guesses, fails: bool [B].
      at_start: bool [B, 2, H, W], moves that touch the part of the path that begins at the start.
    """
    rows = len(guesses)
    each = jnp.arange(rows)
    shape = moves.undecided.shape
    # Going on from the known part keeps dead ends near the guess that caused them.
    wish = (moves.undecided & at_start).reshape(rows, -1)
    wish = jnp.where(wish.any(1, keepdims=True), wish, moves.undecided.reshape(rows, -1))
    guess = jax.nn.one_hot(jnp.argmax(wish, axis=1), wish.shape[1], dtype=bool).reshape(shape)
    without = moves.undecided & ~guess
    slot = jnp.clip(search.depth, 0, MAX_GUESSES - 1)
    last = jnp.clip(search.depth - 1, 0, MAX_GUESSES - 1)

    def save(saved: jax.Array, value: jax.Array) -> jax.Array:
        kept = jnp.where(_wide(guesses), value, saved[each, slot])
        return saved.at[each, slot].set(kept)

    saved = _Moves(save(search.saved.undecided, without), save(search.saved.made, moves.made))

    def choose(guessed: jax.Array, plain: jax.Array, stored: jax.Array) -> jax.Array:
        plain = jnp.where(_wide(guesses), guessed, plain)
        return jnp.where(_wide(fails), stored[each, last], plain)

    return search._replace(
        moves=_Moves(
            choose(without, moves.undecided, saved.undecided),
            choose(moves.made | guess, moves.made, saved.made),
        ),
        # What is taken back may have joined cells, so joining starts again.
        label=jnp.where(fails[:, None], _own_labels(rows, label.shape[1]), label),
        saved=saved,
        depth=search.depth + guesses - fails,
    )


def _wide(rows: jax.Array) -> jax.Array:
    return rows[:, None, None, None]


def _own_labels(rows: int, cells: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(cells, dtype=jnp.int32), (rows, cells))


def _both_ends(cells: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a value of both cells of every move; [B, H, W] to twice [B, 2, H, W]."""
    _, _, below, right = neighbours(cells, 0)
    return jnp.stack([cells, cells], axis=1), jnp.stack([right, below], axis=1)


def _degree(moves: jax.Array) -> jax.Array:
    """Counts the moves at every cell; bool [B, 2, H, W] to int32 [B, H, W]."""
    right, down = moves[:, 0], moves[:, 1]
    _, from_left, _, _ = neighbours(right, False)
    from_above, _, _, _ = neighbours(down, False)
    return jnp.sum(jnp.stack([right, down, from_left, from_above]), axis=0, dtype=jnp.int32)


def _join(made: jax.Array, label: jax.Array) -> jax.Array:
    """Lowers each label to the least among the cells joined to it, then to that cell's label."""
    rows, cells = label.shape
    grid = label.reshape(rows, *made.shape[2:])
    above, left, below, right = neighbours(grid, cells)
    to_right, down = made[:, 0], made[:, 1]
    from_above, _, _, _ = neighbours(down, False)
    _, from_left, _, _ = neighbours(to_right, False)
    for is_joined, other in (
        (from_above, above),
        (from_left, left),
        (down, below),
        (to_right, right),
    ):
        grid = jnp.where(is_joined, jnp.minimum(grid, other), grid)
    label = grid.reshape(rows, cells)
    return jnp.take_along_axis(label, label, axis=1)
