"""The halting command from end to end: what a run leaves, resuming, evaluation, bad input."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from absl import flags as absl_flags

from common import flags
from common.errors import Interrupted, UserError
from halting_jax import main as halting_main
from tests.e2e.commands import PATIENCE, arrays, contents, kill_after, run, stop_at_step
from tests.parity.fixtures import fixture_root

MODULE = "halting_jax.main"
MEASURED = ("time/", "speed/", "memory/", "examples_per_s")
PARITY = "configs/halting_parity.py:tiny"
KINDS = {
    "parity": (PARITY,),
    "addition": ("configs/halting_addition.py:tiny",),
    "maze_act": ("configs/halting_maze_act.py:tiny",),
    "maze_ut": ("configs/halting_maze_ut.py:tiny",),
    "maze_trm": ("configs/halting_maze_ut.py:tiny_trm",),
    "pondernet": (PARITY, "--config.act.kind=pondernet"),
}
# Their compiled programs take long; make test-all runs them.
SLOW = {"addition", "maze_act", "maze_trm", "pondernet"}
Main = Callable[..., int | None]


@pytest.fixture
def halting(monkeypatch: pytest.MonkeyPatch) -> Main:
    """Parses arguments and calls the main function, as `python -m halting_jax.main` does."""

    def call(*args: str) -> int | None:
        values = absl_flags.FlagValues()
        flags.define_flags("configs/halting_parity.py", halting_main.MODES, values)
        monkeypatch.setattr(flags, "FLAGS", values)
        flags.parse(["halting_jax.main", *args], values)
        return halting_main.main([])

    return call


def _kinds() -> list:
    slow = pytest.mark.slow
    return [pytest.param(k, marks=slow if k in SLOW else ()) for k in KINDS]


def _args(kind: str) -> tuple[str, ...]:
    config, *rest = KINDS[kind]
    return (f"--config={config}", *rest)


def _metrics(workdir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


def _assert_same_run(actual: Path, expected: Path) -> None:
    assert _metrics(actual) == _metrics(expected)
    left, right = arrays(actual), arrays(expected)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)
    reports = [json.loads((p / "eval.json").read_text()) for p in (actual, expected)]
    for report in reports:
        report.pop("seconds")
    assert reports[0] == reports[1]


@pytest.mark.parametrize("kind", _kinds())
def test_stopped_run_goes_on_as_if_nothing_had_happened(
    kind: str,
    halting: Main,
    terminate_before_save: Callable[[int], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert not halting(*_args(kind), f"--workdir={whole}")
    printed = capsys.readouterr().out
    assert "steps of training" in printed or "s of training" in printed
    assert (whole / "DONE").exists() and (whole / "model.json").exists()
    rows = _metrics(whole)
    assert [row["iteration"] for row in rows] == sorted({row["iteration"] for row in rows})
    assert all(np.isfinite(v) for row in rows for v in row.values() if v is not None)
    report = json.loads((whole / "eval.json").read_text())
    assert set(report["sets"]) >= {"val"} and report["by_difficulty"]
    # Mazes say what their input alone is worth: never a path, most cells.
    assert ("copy_input" in report) == kind.startswith("maze")
    for name, scores in report.get("copy_input", {}).items():
        assert scores["puz_acc"] == 0.0 and 0.5 < scores["cell_acc"] < 1.0
        assert f"copying the input, {name}: " in printed

    terminate_before_save(int(rows[len(rows) // 2]["iteration"]))
    with pytest.raises(Interrupted):
        halting(*_args(kind), f"--workdir={stopped}")
    assert not (stopped / "DONE").exists()
    assert not halting(*_args(kind), f"--workdir={stopped}")
    _assert_same_run(stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parity", "maze_act", "maze_ut", "maze_trm"])
def test_killed_run_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Killed as soon as a checkpoint is there, and then at random moments between and in saves."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    args = (*_args(kind), "--config.train.save_every_steps=2", "--config.train.log_every=3")
    if kind == "maze_act":
        args = (*args, "--config.train.save_every_epochs=0")
    done = run(*args, f"--workdir={whole}", module=MODULE, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    stop_at_step(killed, 2, signal.SIGKILL, *args, module=MODULE)
    moments = np.random.default_rng().uniform(0.0, 1.0, 3)
    for moment in moments:
        kill_after(killed, float(moment), *args, module=MODULE)
    done = run(*args, f"--workdir={killed}", module=MODULE, timeout=PATIENCE)
    assert done.returncode == 0, (moments, done.stderr[-2000:])
    _assert_same_run(killed, whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished parity run; do not change it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    done = run(f"--config={PARITY}", f"--workdir={workdir}", module=MODULE)
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir


def test_evaluation_of_a_run_repeats_its_last_test(
    trained: Path, halting: Main, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    step = json.loads((trained / "eval.json").read_text())["step"]
    checkpoint = trained / "checkpoints" / str(step)
    halting("--mode=eval", f"--checkpoint={checkpoint}", f"--output={out}")
    report, final = json.loads(out.read_text()), json.loads((trained / "eval.json").read_text())
    assert report["step"] == final["step"]
    for name, row in report["sets"].items():
        prefix = "val" if name == "val" else f"test/{name}"
        assert row["accuracy"] == pytest.approx(final["sets"][name][f"{prefix}/accuracy"])


def test_evaluation_with_fixed_steps_and_its_own_sizes(
    trained: Path, halting: Main, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    halting(
        "--mode=eval",
        f"--checkpoint={trained}",
        f"--output={out}",
        "--config.act.fixed_ponder_steps=3",
        "--config.eval.test_size=10",
    )
    report = json.loads(out.read_text())
    assert report["sets"]["id"]["steps"] == 3.0
    assert sum(row["n"] for row in report["by_difficulty"]["id"]) == 10


def test_export_writes_readable_weights(trained: Path, halting: Main, tmp_path: Path) -> None:
    from common.torch_bridge import read_tensors

    halting("--mode=export", f"--checkpoint={trained}", f"--output={tmp_path / 'export'}")
    tensors = read_tensors(tmp_path / "export")
    assert tensors and all(np.all(np.isfinite(x)) for x in tensors.values())
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["config"]["task"]["name"] == "parity"


REFUSED = {
    "unknown key": (["--config.act.time_limt=3"], ["--config.act.time_limit"]),
    "key of another task": (["--config.task.max_n=3"], ["task.max_n", "parity"]),
    "key of another model": (["--config.ut.heads=2"], ["ut.heads", "act_rnn"]),
    "key of another halting": (["--config.act.prior=0.5"], ["act.prior", "pondernet"]),
    "warm-up of a constant rate": (
        ["--config.optim.schedule=constant", "--config.optim.warmup_steps=3"],
        ["warmup_steps", "constant"],
    ),
    "unknown task": (["--config.task.name=partiy"], ["task.name", "parity"]),
    "out of range": (["--config.act.time_limit=0"], ["act.time_limit=0"]),
    "trm without a grid": (["--config.model.type=trm"], ["trm", "parity"]),
    "eval without a checkpoint": (["--mode=eval"], ["--checkpoint"]),
    "eval of nothing": (["--mode=eval", "--checkpoint=nowhere"], ["nowhere"]),
    "training from --checkpoint": (["--checkpoint=x"], ["--checkpoint", "train.resume"]),
    "missing data": (
        ["--config=configs/halting_maze_act.py:tiny", "--config.data.dir=nowhere"],
        ["nowhere", "build_maze"],
    ),
    "model that cannot be, before its data are generated": (
        ["--config=configs/halting_maze_ut.py:tiny", "--config.ut.heads=3"],
        ["heads", "key_depth"],
    ),
    "data of no generator": (
        ["--config=configs/halting_maze_act.py:tiny", "--config.task.name=sudoku"],
        ["sudoku", "data.dir"],
    ),
    "batch over devices": (
        ["--config.data.batch_size=16", "--config.parallel.num_devices=999"],
        ["999"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(
    case: str, halting: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, named = REFUSED[case]
    if not any(a.startswith("--config=") for a in arguments):
        arguments = [f"--config={PARITY}", *arguments]
    with pytest.raises(UserError) as error:
        halting(*arguments)
    assert all(word in str(error.value) for word in named), str(error.value)
    assert "\n" not in str(error.value)
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in left if p.name not in (".lock",)]


def _without_labels(split: Path) -> None:
    (split / "all__labels.npy").unlink()


def _cut_inputs(split: Path) -> None:
    path = split / "all__inputs.npy"
    path.write_bytes(path.read_bytes()[:-5])


def _describe(split: Path, **changes: int) -> None:
    path = split / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGED = {
    "missing file": (_without_labels, "all__labels.npy"),
    "cut file": (_cut_inputs, "all__inputs.npy"),
    "other length": (lambda split: _describe(split, seq_len=25), "seq_len"),
    "other vocabulary": (lambda split: _describe(split, vocab_size=3), "vocab_size"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_data_is_refused_before_anything_is_written(
    case: str, halting: Main, tmp_path: Path
) -> None:
    damage, named = DAMAGED[case]
    data, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(fixture_root() / "halting" / "maze_mini" / "built", data)
    damage(data / "train")
    with pytest.raises(UserError) as error:
        halting(
            "--config=configs/halting_maze_act.py:tiny",
            f"--config.data.dir={data}",
            f"--workdir={workdir}",
        )
    assert named in str(error.value) and "\n" not in str(error.value)
    assert set(contents(workdir)) == set()


def test_other_structure_is_refused_with_the_differences(
    trained: Path, halting: Main, tmp_path: Path
) -> None:
    before = contents(trained)
    with pytest.raises(UserError) as error:
        halting(
            f"--config={PARITY}",
            f"--workdir={trained}",
            "--config.model.hidden_size=24",
            "--config.act.cell=gru",
        )
    assert "model.hidden_size" in str(error.value) and "act.cell" in str(error.value)
    assert contents(trained) == before


def test_evaluation_cannot_change_the_model(trained: Path, halting: Main) -> None:
    with pytest.raises(UserError, match="belongs to the trained model"):
        halting("--mode=eval", f"--checkpoint={trained}", "--config.model.hidden_size=4")


def test_walltime_stops_resumably(halting: Main, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    with pytest.raises(Interrupted, match="max_walltime_s"):
        halting(
            f"--config={PARITY}", f"--workdir={workdir}", "--config.train.max_walltime_s=1",
            "--config.train.max_steps=100000",
        )  # fmt: skip
    assert any((workdir / "checkpoints").iterdir()) and not (workdir / "DONE").exists()


def test_command_line_gives_one_line_and_status_2() -> None:
    done = run(f"--config={PARITY}", "--config.act.cel=gru", module=MODULE)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "act.cell" in done.stderr and os.linesep not in done.stderr.strip()
