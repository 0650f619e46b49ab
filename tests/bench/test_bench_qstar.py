"""The measurement of the q* solvers runs and prints its table; no timing is judged."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench.qstar_solvers import GROUPS, alpha_error, main, make_rows
from qstar.tilt import AlphaSettings, solve


def test_groups_print_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "speed.json"
    main(["--repeats", "1", "--sizes", "3x300", "--json", str(target)])
    result, table = json.loads(target.read_text()), capsys.readouterr().out
    assert {row["name"].split()[0] for row in result["rows"]} == set(GROUPS)
    for row in result["rows"]:
        assert row["name"] in table and row["ratio"] > 0
        assert row["traces"][0] > 0 and row["traces"][1] == 0, f"{row['name']} compiled again"


@pytest.mark.parametrize("bad", [["--only", "none"], ["--sizes", "8"], ["--sizes", "0x10"]])
def test_bad_arguments_are_refused(bad: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(bad)
    assert refused.value.code == 2


def test_the_reported_error_is_one() -> None:
    theta, t = make_rows(4, 500)
    alpha = np.asarray(solve(theta, t, AlphaSettings())[0])
    assert alpha_error(alpha, theta, t) <= 1e-5
    assert alpha_error(alpha + 0.01, theta, t) >= 0.009
