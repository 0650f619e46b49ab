"""The generator: what a maze must be, and that only the recipe decides it."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from halting_jax.datasets import aug8, maze_generator, maze_layouts, maze_solver
from halting_jax.datasets.maze_generator import Mazes, Recipe, generate, make_mazes
from halting_jax.datasets.maze_tokens import GOAL, OPEN, PATH, START, WALL

SMALL = Recipe(side=6, min_path_moves=6, train_size=40, val_size=7, test_size=15)
recipes = st.builds(
    Recipe,
    style=st.sampled_from(["random_walls", "perfect"]),
    side=st.integers(6, 12),
    min_path_moves=st.integers(1, 6),
    train_size=st.integers(1, 6),
    test_size=st.integers(0, 3),
    val_size=st.integers(0, 3),
    seed=st.integers(0, 2**40),
    labels=st.sampled_from(["canonical", "all_optimal"]),
    tree=st.sampled_from(["depth_first", "wilson"]),
)


def assert_equal(left: dict[str, Mazes], right: dict[str, Mazes]) -> None:
    assert left.keys() == right.keys()
    for split, mazes in left.items():
        for field in dataclasses.fields(mazes):
            np.testing.assert_array_equal(
                getattr(mazes, field.name), getattr(right[split], field.name)
            )


@settings(max_examples=25, deadline=None)
@given(recipes)
def test_mazes_are_what_the_recipe_says(recipe: Recipe) -> None:
    made = generate(recipe)
    assert set(made) == {s for s in ("train", "val", "test") if getattr(recipe, f"{s}_size")}
    rows: list[bytes] = []
    for split, mazes in made.items():
        assert mazes.inputs.shape == (getattr(recipe, f"{split}_size"), recipe.side**2)
        assert np.isin(mazes.inputs, (WALL, OPEN, START, GOAL)).all()
        assert (mazes.moves > recipe.min_path_moves).all()
        np.testing.assert_array_equal(mazes.moves, maze_solver.path_moves(mazes.inputs))
        np.testing.assert_array_equal(
            mazes.labels, maze_solver.labels_of(mazes.inputs, recipe.labels)
        )
        if recipe.style == "random_walls":
            walls = (mazes.inputs == WALL).sum(1)
            assert (walls >= round(0.3 * recipe.side**2)).all()
            assert (walls <= round(0.5 * recipe.side**2)).all()
        else:
            assert maze_solver.has_unique_path(mazes.inputs).all()
        rows += [row.tobytes() for row in mazes.inputs]
    assert len(set(rows)) == len(rows)


def test_no_training_maze_is_an_image_of_a_held_out_one() -> None:
    # Few different mazes exist at this size, so the generator has to avoid repetitions.
    recipe = Recipe(side=4, min_path_moves=5, train_size=150, val_size=10, test_size=30)
    made = generate(recipe)
    train = {row.tobytes() for row in made["train"].inputs}
    assert len(train) == 150
    held_out = np.concatenate([made["val"].inputs, made["test"].inputs])
    images = {row.tobytes() for row in aug8.transform_all(held_out).reshape(-1, 16)}
    assert not train & images
    assert len({row.tobytes() for row in held_out}) == 40


def test_only_the_recipe_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(SMALL)
    assert_equal(whole, generate(SMALL))
    monkeypatch.setattr(maze_generator, "_BLOCK", 5)
    monkeypatch.setattr(maze_generator, "_LAYOUTS_AT_ONCE", 300)
    monkeypatch.setattr(maze_generator, "_SOURCES_AT_ONCE", 11)
    assert_equal(whole, generate(SMALL))
    monkeypatch.undo()
    assert_equal(whole, generate(SMALL, processes=2, progress=True))
    single = make_mazes(SMALL, "train", [11, 3])
    np.testing.assert_array_equal(single, whole["train"].inputs[[11, 3]])
    for changed in (
        dataclasses.replace(SMALL, seed=1),
        dataclasses.replace(SMALL, min_path_moves=7),
        dataclasses.replace(SMALL, side=7),
    ):
        other = generate(changed)["train"].inputs
        assert other.shape != whole["train"].inputs.shape or (
            (other != whole["train"].inputs).any(1).sum() > 20
        )


@pytest.mark.parametrize("tree", ["depth_first", "wilson"])
def test_processes_do_not_matter(tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("perfect", 7, 5, train_size=40, test_size=0, tree=tree, loops=1)
    whole = generate(recipe)
    monkeypatch.setattr(maze_generator, "_BLOCK", 16)
    assert_equal(whole, generate(recipe, processes=2))


def test_more_training_mazes_leave_the_test_set_alone() -> None:
    more = generate(dataclasses.replace(SMALL, train_size=60))
    np.testing.assert_array_equal(more["test"].inputs, generate(SMALL)["test"].inputs)


@pytest.mark.parametrize("tree", ["depth_first", "wilson"])
@pytest.mark.parametrize("side", [5, 8, 11])
def test_spanning_trees_span_without_a_cycle(tree: str, side: int) -> None:
    generators = [np.random.default_rng(k) for k in range(20)]
    is_open, cell = maze_layouts.spanning_trees(generators, side, tree, 0)
    size = side // 2
    assert (is_open.sum((1, 2)) == 2 * size * size - 1).all()
    distance = maze_solver.distances(is_open, cell)
    np.testing.assert_array_equal(distance >= 0, is_open)
    assert is_open[:, 1 : 2 * size : 2, 1 : 2 * size : 2].all()
    generators = [np.random.default_rng(k) for k in range(20)]
    loops = maze_layouts.num_lattice_walls(side)
    opened, _ = maze_layouts.spanning_trees(generators, side, tree, loops)
    assert (opened.sum((1, 2)) == 2 * size * size - 1 + loops).all()


def test_wilson_draws_all_trees_equally_often() -> None:
    # The 3 x 3 lattice has 192 spanning trees.
    draws = 9600
    generators = [np.random.default_rng([1, k]) for k in range(draws)]
    is_open, _ = maze_layouts.spanning_trees(generators, 6, "wilson", 0)
    counts = Counter(row.tobytes() for row in is_open.reshape(draws, -1))
    assert len(counts) == 192
    expected = draws / 192
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    # 191 degrees of freedom: mean 191, standard deviation 19.5.
    assert chi_square < 191 + 5 * 19.5


def test_ends_are_uniform_among_the_far_pairs() -> None:
    layout = np.ones((1, 3, 3), bool)
    layout[0, 1, 1] = False
    recipe_draws = 4000
    is_open = np.repeat(layout, recipe_draws, axis=0)
    from halting_jax.datasets import maze_bits

    tokens = maze_generator._place_ends(
        is_open,
        maze_bits.pack(is_open),
        np.zeros(recipe_draws, np.intp),
        [np.random.default_rng(k) for k in range(recipe_draws)],
        2,
    )
    pairs = Counter(zip(*(x.tolist() for x in maze_solver.ends(tokens)), strict=True))
    # On a ring of eight cells each has three that are at least three moves away.
    assert len(pairs) == 24
    expected = recipe_draws / 24
    assert sum((n - expected) ** 2 / expected for n in pairs.values()) < 23 + 5 * 6.8


def test_wall_counts_are_uniform() -> None:
    generators = [np.random.default_rng(k) for k in range(40)]
    which, is_open, cell = maze_layouts.random_walls(generators, 8, (0.3, 0.5), 400)
    walls = 64 - is_open.sum((1, 2))
    counts = np.bincount(walls, minlength=65)[19:33]
    assert counts.sum() == len(walls) == len(which)
    chi_square = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert chi_square < 13 + 5 * 5.1
    # Neither the place of a wall nor that of the first cell has a preference.
    per_cell = is_open.reshape(len(walls), -1).mean(0)
    assert np.abs(per_cell - per_cell.mean()).max() < 0.05
    assert is_open.reshape(len(walls), -1)[np.arange(len(walls)), cell].all()
    starts = np.bincount(cell, minlength=64) / len(cell)
    assert np.abs(starts - 1 / 64).max() < 0.01


def test_unique_paths_in_mazes_with_loops() -> None:
    recipe = Recipe("perfect", 9, 8, train_size=30, test_size=0, loops=3, labels="unique")
    mazes = generate(recipe)["train"]
    assert maze_solver.has_unique_path(mazes.inputs).all()
    assert (maze_solver.num_shortest_paths(mazes.inputs) == 1).all()
    loose = generate(dataclasses.replace(recipe, labels="canonical"))["train"]
    assert not maze_solver.has_unique_path(loose.inputs).all()


def test_hard_mazes_of_full_size() -> None:
    mazes = generate(Recipe(train_size=4, test_size=0, seed=5))["train"]
    assert (mazes.moves > 110).all() and (mazes.moves < 140).all()
    copied = (mazes.inputs == mazes.labels).mean()
    assert 0.86 < copied < 0.89
    walls = (mazes.inputs == WALL).mean(1)
    assert (walls > 0.32).all() and (walls < 0.44).all()
    assert ((mazes.labels == PATH).sum(1) == mazes.moves - 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": "caves"}, "style must be one of random_walls, perfect"),
        ({"labels": "any"}, "labels must be one of"),
        ({"tree": "oak"}, "tree must be one of"),
        ({"side": 65}, "side must be 2 to 64"),
        ({"side": 3, "style": "perfect"}, "side must be 4 to 64"),
        ({"train_size": -1}, "train_size must not be negative"),
        ({"loops": 1}, "loops are openings of style perfect"),
        ({"style": "perfect", "loops": 99}, "room for 4 loops"),
        ({"min_path_moves": 24}, "no maze of side 6 .* more than 24"),
        ({"wall_share": (0.6, 0.5)}, "wall_share must rise"),
    ],
)
def test_bad_recipes(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(dataclasses.replace(SMALL, **change))


def test_mazes_that_are_too_rare_or_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"random_walls": 2000, "perfect": 50}
    monkeypatch.setattr(maze_generator, "_MAX_LAYOUTS", limits)
    with pytest.raises(UserError, match="none of 2000 layouts .* more than 21 moves; lower"):
        generate(dataclasses.replace(SMALL, min_path_moves=21))
    # The lattice of a side of 4 is a ring of four cells with one gap.
    recipe = Recipe("perfect", 4, 4, train_size=100, test_size=0)
    with pytest.raises(UserError, match="cannot find 100 different train mazes"):
        generate(recipe)


def test_turning_a_maze() -> None:
    grid = np.arange(9)
    turned = aug8.transform(grid, 1).reshape(3, 3)
    np.testing.assert_array_equal(turned, [[2, 5, 8], [1, 4, 7], [0, 3, 6]])
    images = aug8.transform_all(grid[None])
    assert len({tuple(row) for row in images[:, 0]}) == 8
    for map_id, inverse in enumerate(aug8.INVERSE_IDS):
        np.testing.assert_array_equal(aug8.transform(images[map_id], inverse), grid[None])


def test_relabelled_images_are_canonical_and_turned_labels_are_not() -> None:
    mazes = generate(SMALL)["train"]
    relabelled = aug8.relabel_all(mazes.inputs)
    images = aug8.transform_all(mazes.inputs)
    for map_id, (inputs, labels) in enumerate(zip(images, relabelled, strict=True)):
        np.testing.assert_array_equal(labels, maze_solver.canonical_labels(inputs))
        np.testing.assert_array_equal(maze_solver.path_moves(inputs), mazes.moves)
        turned = aug8.transform(mazes.labels, map_id)
        assert map_id == 0 or (turned != labels).any()
    for policy in (maze_solver.all_optimal_labels,):
        np.testing.assert_array_equal(
            aug8.relabel_all(mazes.inputs, policy), aug8.transform_all(policy(mazes.inputs))
        )
    assert len(set(itertools.chain.from_iterable(aug8.index_maps(6).tolist()))) == 36
