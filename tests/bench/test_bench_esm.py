"""The measurements of ESM run and write their files; no timing is judged."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench.esm_dpp import main, make_pool, plain_pick, time_plain
from bench.esm_real import SETTINGS, make_config
from esm.select import Rules, select_entries


def test_selection_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "dpp.json"
    assert main(["--sizes", "40x8x6", "--repeats", "1", "--json", str(target)]) == 0
    [row] = json.loads(target.read_text())["rows"]
    assert row["name"] in capsys.readouterr().out
    assert row["plain_other_picks"] == 0 and row["single_equals_double"]
    assert row["traces"][1] == 0


def test_the_plain_greedy_is_another_way_to_the_same_picks() -> None:
    keys, quality = make_pool(30, 6)
    rules = Rules(size=5, diversity=0.5, epsilon=1e-4)
    picks = select_entries(keys, quality.tolist(), [1] * 30, [0] * 30, rules)
    assert plain_pick(keys, quality, [], np.zeros((0, 0))) == picks[0]
    assert time_plain(keys, quality, picks, 1)[1] == 0
    assert time_plain(keys, quality, picks[::-1], 1)[1] > 0


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_real_runs_keep_their_parts_apart(name: str) -> None:
    setting = SETTINGS[name]
    config = make_config(setting, "datasets", setting.evaluate)
    assert setting.train >= 96 and setting.evaluate >= 300 and config.offline_mine.K == 8
    assert config.task.train_split != config.task.eval_split
