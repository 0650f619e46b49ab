"""Two and four processes on this machine against one: the same parameters, metrics, checkpoints.

Sums over devices are added in another order, so equal means: within 2e-5 relative and 1e-6
absolute for parameters, moments and metrics after a few steps.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.common import group_work
from tests.common.groups import run_group

# Compiling is most of the time: the other halves of these are among the slow tests below.
TASKS = {2: ("reoac_fsdp", "halting_fsdp", "save", "primitives"), 4: ("restore",)}
MORE = {2: ("halting",), 4: ("reoac", "reoac_fsdp", "halting_fsdp", "primitives")}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of both groups; the second restores what the first saved."""
    path = tmp_path_factory.mktemp("groups")
    run_group(2, ["-m", "tests.common.group_work", str(path), *TASKS[2]])
    run_group(4, ["-m", "tests.common.group_work", str(path), *TASKS[4]])
    return path


def same(directory: Path, task: str, reference: group_work.Arrays) -> None:
    flat = {f"{part}/{k}": v for part, values in reference.items() for k, v in values.items()}
    with np.load(directory / f"{task}.npz") as found:
        assert set(found.files) == set(flat)
        for name, value in flat.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def check(directory: Path, name: str, groups: dict[int, tuple[str, ...]]) -> None:
    reference = group_work.work(name, directory)
    assert reference is not None
    found = [task for tasks in groups.values() for task in tasks if task.startswith(name)]
    assert found
    for task in found:
        same(directory, task, reference)


@pytest.mark.parametrize("name", ["reoac", "halting"])
def test_training_steps(directory: Path, name: str) -> None:
    check(directory, name, TASKS)


@pytest.mark.slow
def test_training_steps_of_other_groups(tmp_path: Path) -> None:
    for count, tasks in MORE.items():
        run_group(count, ["-m", "tests.common.group_work", str(tmp_path), *tasks])
        for name in ("reoac", "halting"):
            if any(task.startswith(name) for task in tasks):
                check(tmp_path, name, {count: tasks})


@pytest.mark.slow
def test_two_devices_in_each_of_two_processes(tmp_path: Path) -> None:
    tasks = ("halting", "reoac_fsdp", "primitives")
    run_group(2, ["-m", "tests.common.group_work", str(tmp_path), *tasks], devices=2)
    for name in ("reoac", "halting"):
        check(tmp_path, name, {2: tasks})


def test_a_checkpoint_of_two_is_restored_by_four_and_by_one(directory: Path) -> None:
    alone = group_work.work("restore", directory)
    assert alone is not None
    same(directory, "restore", alone)
    cut = alone["state"]["cut"]
    np.testing.assert_array_equal(cut, np.arange(cut.size).reshape(cut.shape))
    assert alone["state"]["position"] == 2


def test_primitives_ran_in_a_group(directory: Path) -> None:
    with np.load(directory / "primitives.npz") as found:
        assert found["state/processes"] == 2
