"""The measurement of block decoding runs at toy sizes and its record is complete."""

import json
from pathlib import Path

import pytest

from bench.block_decode import GROUPS, Sizes, main

TOY = Sizes(
    width=16,
    layers=3,
    heads=2,
    vocab=40,
    head_dim=8,
    prompt=4,
    gen_len=8,
    mdlm_block=4,
    together=2,
    batch=2,
)


@pytest.mark.slow
def test_every_group_at_toy_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    main(["--repeats", "1", "--json", str(file)], sizes=TOY)
    record = json.loads(file.read_text())
    assert set(record["groups"]) == set(GROUPS)
    rows = {
        (row["group"], row["name"]): row
        for group in record["groups"].values()
        for row in group["rows"]
    }
    assert all(row["tokens_per_second"] > 0 and row["traces_later"] == 0 for row in rows.values())
    assert rows["mdlm", "one token per pass"]["passes"] == "8 full + 0 cached"
    assert rows["mdlm", "dual cache"]["passes"] == "2 full + 6 cached"
    assert rows["mdlm", "parallel + dual cache"]["passes"] == "2 full + 2 cached"
    assert rows["batch", "exact caches, batch 1"]["speed_up"] == 1.0
    assert "tok/s" in capsys.readouterr().out
    file.write_text(json.dumps(record | {"groups": {"kept": {"rows": []}}}))
    main(["--repeats", "1", "--only", "batch", "--json", str(file)], sizes=TOY)
    assert set(json.loads(file.read_text())["groups"]) == {"kept", "batch"}


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "sedd"])
    assert "--only takes" in capsys.readouterr().err
