"""Every wrong config ends with one line that names the key: never accepted, never a traceback."""

import collections
import random

import pytest

from tests.campaign.bad_config import COMMANDS, cases, misspelt, refused


def run(name: str, share: float) -> str:
    """Tries a share of all cases and returns the counts; fails with a list of what got through."""
    command = COMMANDS[name]
    rng = random.Random(name)
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for kind, _, argument in cases(command):
        if rng.random() > share:
            continue
        counts[kind] += 1
        if problem := refused(command.check, argument):
            wrong.append(problem)
    assert sum(counts.values()) > 5
    listed = "\n".join(wrong)
    assert not wrong, f"{len(wrong)} of {sum(counts.values())}:\n{listed}"
    return f"{name}: " + ", ".join(f"{counts[k]} {k}" for k in ("misspelt", "type", "range"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_part_of_all_wrong_configs(name: str) -> None:
    run(name, share=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_all_wrong_configs(name: str) -> None:
    print("\n" + run(name, share=1.0))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_right_config_is_accepted(name: str) -> None:
    COMMANDS[name].check()


def test_misspelling_changes_the_key() -> None:
    rng = random.Random(0)
    keys = ("seed", "optim.lr", "a.b.bb")
    assert all(misspelt(key, rng) != key for key in keys for _ in range(20))
