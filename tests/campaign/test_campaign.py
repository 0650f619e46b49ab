"""The faults do what they say; a minute of the campaign loses nothing."""

import collections
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign import faults
from tests.campaign.mains import MAINS, mains
from tests.campaign.trials import Campaign


def test_a_torn_line_is_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"a": 1}\n{"a": 2}\n'
    for seed in range(20):
        path.write_text(whole)
        assert faults.tear(MAINS["halting"], tmp_path, random.Random(seed))
        torn = path.read_text()
        assert whole.startswith(torn) and torn.startswith('{"a": 1}\n') and len(torn) < len(whole)
    path.unlink()
    assert not faults.tear(MAINS["halting"], tmp_path, random.Random(0))


def test_damage_hits_the_newest_step(tmp_path: Path) -> None:
    contents = {}
    for step in (2, 10):
        folder = tmp_path / "checkpoints" / str(step) / "state"
        folder.mkdir(parents=True)
        (folder / "array").write_bytes(b"0123456789")
        contents[step] = folder / "array"
    for seed in range(10):
        contents[10].write_bytes(b"0123456789")
        assert faults.damage(MAINS["halting"], tmp_path, random.Random(seed))
        assert not contents[10].exists() or contents[10].read_bytes() != b"0123456789"
        assert contents[2].read_bytes() == b"0123456789"


def test_the_clock_jumps(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "start, true = time.time(), time.monotonic\n"
        "time.monotonic = lambda: true() + 40\n"
        "print(abs(time.time() - start))"
    )
    environ = faults.clock(tmp_path, seed=3)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60
    )
    assert float(done.stdout) > 60, done.stderr


def test_left_over_processes_are_found() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], env={"CAMPAIGN_ID": "here-1"}
    )
    try:
        assert faults.wait_for_no_leftovers("here-1", limit_s=1) == [process.pid]
        assert process.wait(20) != 0  # and ended
        assert faults.leftovers("here-1") == []
    finally:
        process.kill()
        process.wait()


def test_the_table_counts_orphans(tmp_path: Path) -> None:
    campaign = Campaign({}, seed=3, directory=tmp_path)
    campaign.counts["esm", "kill -9"] = collections.Counter(trials=2, survived=1, lost=1, orphans=4)
    head, _, row, total = (line.split() for line in campaign.table().splitlines())
    assert head[-1] == "orphans" and row[-1] == total[-1] == "4"
    wanted = {"trials": 2, "injected": 0, "survived": 1, "lost": 1, "orphans": 4}
    report = campaign.report()
    assert report["rows"] == [{"main": "esm", "fault": "kill -9", **wanted}]
    assert report["seed"] == 3 and campaign.lost == 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_minute_of_faults() -> None:
    campaign = Campaign(mains(), seed=0)
    campaign.run(60)
    print("\n" + campaign.table())
    assert campaign.lost == 0, campaign.table()
