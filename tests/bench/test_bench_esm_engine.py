"""The measurement of steering runs and prints its table; counts are judged, timings are not."""

import json

import pytest

from bench.esm_engine import main


@pytest.mark.slow
def test_positions(tmp_path, capsys):
    """Counts at small sizes: never steered costs less than always."""
    target = tmp_path / "speed.json"
    sizes = ["--segments", "2", "--segment", "5"]
    main(["--only", "positions", "--json", str(target), *sizes])
    rows, table = json.loads(target.read_text())["rows"], capsys.readouterr().out
    ratios = [row["ratio"] for row in rows]
    assert all(row["name"] in table for row in rows)
    assert ratios[0] < ratios[2] < ratios[4]
    assert all(blocks < whole for whole, blocks in zip(ratios[::2], ratios[1::2], strict=True))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_rates(tmp_path, clock):
    target = tmp_path / "speed.json"
    sizes = ["--model", "small", "--slots", "2", "--segments", "2", "--segment", "4"]
    main(
        ["--only", "greedy,policy", "--repeats", "1", "--clock", clock, "--json", str(target)]
        + sizes
    )
    assert [row["ratio"] > 0 for row in json.loads(target.read_text())["rows"]] == [True, True]


@pytest.mark.parametrize("bad", [["--only", "none"], ["--repeats", "0"], ["--model", "m"]])
def test_bad_arguments_are_refused(bad):
    with pytest.raises(SystemExit):
        main(bad)
