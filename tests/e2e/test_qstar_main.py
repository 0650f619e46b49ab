"""The q* command from config to files: generating, analysing, going on, shards, signals."""

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags as absl_flags

from common import flags
from common.errors import UserError
from common.rundir import read_jsonl
from qstar import analyze
from qstar import main as qstar_main
from qstar.defaults import rename_guide_flags
from qstar.writer import Journal, all_data_files
from tests.e2e import commands

TINY = ("--config=configs/qstar.py:tiny", "--batch_size=2", "--config.run.burst=4")
EXACT = ("--config.run.deterministic=True", "--config.run.save_tokens=True")
Main = Callable[..., int]


def call_main(patch: pytest.MonkeyPatch, *args: str) -> int:
    """Parses arguments and calls the main function, as `python -m qstar.main` does."""
    values = absl_flags.FlagValues()
    flags.define_flags(qstar_main.DEFAULT_CONFIG, qstar_main.MODES, values)
    patch.setattr(flags, "FLAGS", values)
    patch.setattr(qstar_main, "keep_compiled", lambda: None)
    flags.parse(rename_guide_flags(["qstar.main", *TINY, *args]), values)
    return qstar_main.main([])


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """The command inside this process."""
    return functools.partial(call_main, monkeypatch)


def rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a file by sample."""
    return sorted(read_jsonl(path), key=lambda row: (row["sample_idx"], row.get("repeat", 0)))


def join_shards(folder: Path) -> None:
    """Appends the samples and diagnostics of other shards to the plain files."""
    for part in all_data_files(folder / "out.jsonl")[1:]:
        for kind in (".jsonl", ".diagnostics.jsonl"):
            with (folder / f"out{kind}").open("a") as file:
                file.write(part.with_name(part.name.replace(".jsonl", kind)).read_text())


def close(actual: Path, expected: Path) -> None:
    """Equal texts; diagnostics to 1e-4."""
    for name in ("out.jsonl", "out.diagnostics.jsonl"):
        left, right = rows(actual / name), rows(expected / name)
        assert [r.keys() for r in left] == [r.keys() for r in right]
        for a, b in zip(left, right, strict=True):
            for key, value in a.items():
                if isinstance(value, float):
                    np.testing.assert_allclose(value, b[key], rtol=1e-4, atol=1e-4)
                else:
                    assert value == b[key], key


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished deterministic run of the tiny models; do not change it."""
    folder = tmp_path_factory.mktemp("qstar")
    with pytest.MonkeyPatch.context() as patch:
        assert call_main(patch, f"--output={folder}/out.jsonl", *EXACT) == 0
    return folder


def test_files_analysis_and_resume(
    whole: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(whole / "out.jsonl")
    assert [row["sample_idx"] for row in data] == list(range(6))
    for row in data:
        assert row["messages"][-1]["role"] == "assistant"
        assert row["n_tokens"] <= 12 and row["finish_reason"] in ("stop", "length")
        assert row["reference"].endswith(row["original_answer"][-4:])
    tokens = rows(whole / "out.tokens.jsonl")
    diagnostics = rows(whole / "out.diagnostics.jsonl")
    for line, record, row in zip(tokens, diagnostics, data, strict=True):
        assert len(line["token_ids"]) == len(line["log_q"]) == row["n_tokens"]
        assert max(line["log_q"]) <= 0 and min(line["alpha"]) >= 0 and max(line["alpha"]) <= 1
        np.testing.assert_allclose(np.mean(line["alpha"]), record["alpha_mean"], rtol=1e-6)
        # q is closer to each model than they are to each other; both divergences agree.
        np.testing.assert_allclose(line["kl_theta"], line["kl_t"], atol=1e-3)
    manifest = json.loads((whole / "out.manifest.json").read_text())
    assert manifest["alpha_convention"] == "weight_of_theta"
    assert set(manifest["models"]) == {"theta", "t"}
    metrics = read_jsonl(whole / "out.metrics" / "metrics.jsonl")
    assert metrics[-1]["run/samples"] == 6 and metrics[-1]["speed/tokens_per_second"] > 0
    assert analyze.main([str(whole / "out.diagnostics.jsonl"), "--no_plots"]) == 0
    assert "alpha_mean" in capsys.readouterr().out

    before = commands.contents(whole)
    assert main(f"--output={whole}/out.jsonl", *EXACT) == 0
    assert commands.contents(whole) == before


def test_a_stop_signal_ends_resumably(
    whole: Path, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Journal.write

    def writing(self: Journal, *args: Any, **kwargs: Any) -> None:
        write(self, *args, **kwargs)
        if len(self.done) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Journal, "write", writing)
    output = tmp_path / "out.jsonl"
    assert main(f"--output={output}", *EXACT) == 0
    assert 1 <= len(rows(output)) < 6
    monkeypatch.setattr(Journal, "write", write)
    assert main(f"--output={output}", *EXACT, "--config.run.sort_output=True") == 0
    for name in ("out.jsonl", "out.diagnostics.jsonl", "out.tokens.jsonl"):
        assert [json.loads(line) for line in (tmp_path / name).open()] == rows(whole / name)


def test_other_slots_and_shards_give_the_same_samples(
    whole: Path, main: Main, tmp_path: Path
) -> None:
    output = f"--output={tmp_path}/out.jsonl"
    half = ("--config.run.shard=1/2", "--num_samples=4")
    assert main(output, *EXACT, *half) == 0
    assert [r["sample_idx"] for r in rows(tmp_path / "out.shard-1-of-2.jsonl")] == [1, 3]
    # The run is extended, now in one shard and with more slots.
    assert main(output, *EXACT, "--batch_size=3") == 0
    assert [r["sample_idx"] for r in rows(tmp_path / "out.jsonl")] == [0, 2, 4, 5]
    join_shards(tmp_path)
    close(tmp_path, whole)


def kill_at(count: int, output: Path, *args: str) -> None:
    """Starts the command and kills it, once so many samples are written, with SIGKILL."""
    process = commands.start(*TINY, f"--output={output}", *args, module="qstar.main")
    while process.poll() is None:
        if output.exists() and output.read_bytes().count(b"\n") >= count:
            process.kill()
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)


MANY = ("--config.data.size=40", *EXACT)


def test_a_killed_run_goes_on_byte_for_byte(main: Main, tmp_path: Path) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    kill_at(3, tmp_path / "killed" / "out.jsonl", *MANY)
    assert 3 <= len(rows(tmp_path / "killed" / "out.jsonl")) < 40
    for folder in ("whole", "killed"):
        output = tmp_path / folder / "out.jsonl"
        assert main(f"--output={output}", *MANY, "--config.run.sort_output=True") == 0
    for name in ("out.jsonl", "out.diagnostics.jsonl", "out.tokens.jsonl"):
        left, right = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert left.read_bytes() == right.read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(seed: int, main: Main, tmp_path: Path) -> None:
    """Twice with the same slots, byte for byte; then with others and in shards, equal texts."""
    rng = np.random.default_rng(seed)
    for folder in ("whole", "same", "other"):
        (tmp_path / folder).mkdir()
    expected = tmp_path / "whole" / "out.jsonl"
    assert main(f"--output={expected}", *MANY, "--config.run.sort_output=True") == 0
    for folder, extra in (("same", ()), ("other", ("--batch_size=5",))):
        output = tmp_path / folder / "out.jsonl"
        for _ in range(2):
            done = len(rows(output)) if output.exists() else 0
            kill_at(min(39, done + int(rng.integers(1, 12))), output, *MANY)
        if folder == "other":
            for shard in ("0/3", "2/3"):
                assert main(f"--output={output}", *MANY, *extra, f"--config.run.shard={shard}") == 0
        assert main(f"--output={output}", *MANY, *extra, "--config.run.sort_output=True") == 0
    for name in ("out.jsonl", "out.diagnostics.jsonl", "out.tokens.jsonl"):
        left, right = (tmp_path / folder / name for folder in ("whole", "same"))
        assert left.read_bytes() == right.read_bytes(), name
    other = tmp_path / "other"
    join_shards(other)
    close(other, tmp_path / "whole")


def test_processes_of_one_command_make_parts(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two ranks makes every second row, whoever comes first or at all."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    for name, value in commands.SECOND_OF_TWO.items():
        monkeypatch.setenv(name, value)
    output = f"--output={tmp_path}/out.jsonl"
    assert main(output, "--num_samples=4") == 0
    assert [r["sample_idx"] for r in rows(tmp_path / "out.shard-1-of-2.jsonl")] == [1, 3]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    with pytest.raises(UserError, match="run.shard=0/3 names one part, but 2 processes"):
        main(output, "--config.run.shard=0/3")
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(UserError, match="SLURM_PROCID"):
        main(output)
