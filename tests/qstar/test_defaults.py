"""Flags of the guide as config keys, and which rows a start of the command makes."""

import pytest

from common.errors import UserError
from common.flags import flatten
from qstar.defaults import GUIDE_NAMES, finalize, get_default_config, rename_guide_flags
from qstar.requests import wanted
from qstar.settings import parse_shard


def test_every_guide_name_stands_for_a_key() -> None:
    assert set(GUIDE_NAMES.values()) <= set(flatten(get_default_config()))


@pytest.mark.parametrize(
    ("given", "wanted_words"),
    [
        (["--alpha_method=entropy"], ["--config.alpha.method=entropy"]),
        (["--config.alpha_method=entropy"], ["--config.alpha.method=entropy"]),
        (["--config.alpha.method=fixed"], ["--config.alpha.method=fixed"]),
        (["--dataset", "a.jsonl"], ["--config.data.name", "a.jsonl"]),
        (["--save_diagnostics"], ["--config.run.save_diagnostics"]),
        (["--nosave_diagnostics"], ["--config.run.save_diagnostics=False"]),
        (["--config=configs/qstar.py:tiny"], ["--config=configs/qstar.py:tiny"]),
        (["--batch_size=4", "output"], ["--config.run.slots=4", "output"]),
    ],
)
def test_guide_flags(given: list[str], wanted_words: list[str]) -> None:
    assert rename_guide_flags(["main", *given]) == ["main", *wanted_words]


def test_rows_of_a_shard_that_are_left() -> None:
    config = get_default_config()
    config.run.start_idx, config.run.num_samples, config.run.repeats = 2, 5, 2
    config.run.shard = "1/2"
    assert wanted(config, 100, {(3, 0)}) == [(3, 1), (5, 0), (5, 1)]
    assert wanted(config, 4, set()) == [(3, 0), (3, 1)]
    with pytest.raises(UserError, match="run.start_idx=2: the data set has 2 rows"):
        wanted(config, 2, set())
    for bad in ("1", "2/2", "-1/2", "a/b", "/3"):
        with pytest.raises(UserError, match="run.shard"):
            parse_shard(bad)


def test_settings_without_effect_are_told() -> None:
    config = get_default_config()
    config.model.theta, config.data.name, config.run.output = "smollm2", "problems", "o"
    assert finalize(config) == []
    config.run.deterministic = True
    config.alpha.method, config.alpha.fixed, config.data.hint_field = "fixed", 1.0, "hint"
    assert [line.split()[0] for line in finalize(config)] == ["alpha.fixed=1", "run.deterministic"]
