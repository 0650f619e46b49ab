"""Bad input of the REOAC command: one line that names thing and cure, and nothing overwritten."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from common.rundir import RunDir
from tests.e2e.commands import PLUS, contents, run
from tests.e2e.conftest import Main
from tests.parity.fixtures import fixture_root

E2D2 = "--config.backbone.name=e2d2"
MODEL = "--config.backbone.model_name_or_path"
REFUSED = {
    "unknown key": (["--config.rollout.max_step=3"], ["--config.rollout.max_steps"]),
    "section": (["--config.rollout=3"], ["section", "--config.rollout."]),
    "unknown flag": (["--wrokdir=here"], ["--wrokdir", "--workdir"]),
    "wrong type": (["--config.rollout.max_steps=many"], ["rollout.max_steps", "whole number"]),
    "unknown variant": (["--config=configs/gsm8k.py:tinny"], ["tinny", "tiny"]),
    "unknown config": (["--config=configs/gsm9k.py"], ["gsm9k.py", "configs/gsm8k.py"]),
    "unknown mode": (["--mode=trian"], ["mode", "train"]),
    "out of range": (["--config.rollout.max_steps=0"], ["rollout.max_steps=0"]),
    "unknown choice": (["--config.algo=best"], ["algo", "paper, plus"]),
    "group of the batch": (["--config.rollout.batch_size=3"], ["rollout.batch_size", "multiple"]),
    "batch of the iteration": (
        ["--config.rollout.batch_size=6"],
        ["episodes_per_iter=8", "rollout.batch_size=6"],
    ),
    "missing data": (
        ["--config.dataset.train_path=nowhere.jsonl"],
        ["nowhere.jsonl", "dataset.train_path", "generated"],
    ),
    "missing held-out data": (
        ["--config.dataset.eval_path=nowhere.jsonl"],
        ["nowhere.jsonl", "dataset.eval_path"],
    ),
    "missing model directory": (
        [E2D2, f"{MODEL}=./nowhere"],
        ["./nowhere", "backbone.model_name_or_path", "embedded"],
    ),
    "unreachable model": (
        [E2D2, f"{MODEL}=nobody/nothing"],
        ["nobody/nothing", "backbone.model_name_or_path", "configs/gsm8k.py"],
    ),
    "unreachable released model": (
        ["--config=configs/gsm8k.py:e2d2", E2D2],
        ["kuleshov-group/e2d2-owt", "backbone.model_name_or_path", "configs/gsm8k.py"],
    ),
    "unreachable tokenizer": (
        ["--config.backbone.tokenizer_name_or_path=nobody/nothing"],
        ["nobody/nothing", "backbone.tokenizer_name_or_path"],
    ),
    "too many devices": (["--config.parallel.num_devices=999"], ["999 devices"]),
    "checkpoint for training": (["--checkpoint=here"], ["--checkpoint", "--workdir"]),
    "viz without a run": (["--mode=viz"], ["--run_dir"]),
    "viz of nothing": (["--mode=viz", "--run_dir=nowhere"], ["nowhere"]),
    "eval without a checkpoint": (["--mode=eval"], ["--checkpoint"]),
    "eval of nothing": (["--mode=eval", "--checkpoint=nowhere"], ["nowhere"]),
    "prep of nothing": (
        ["--mode=prep", "--config.dataset.raw_train_path=nowhere.jsonl"],
        ["dataset.raw_train_path", "nowhere.jsonl"],
    ),
}


def _refused(main: Main, *args: str) -> str:
    with pytest.raises(UserError) as error:
        main(*args)
    return str(error.value)


@pytest.mark.parametrize("args, named", [pytest.param(*v, id=k) for k, v in REFUSED.items()])
def test_refused_before_anything_is_made(
    main: Main,
    args: list[str],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REOAC_DATA_ROOT", str(tmp_path))
    message = _refused(main, *PLUS, f"--config.logging.output_dir={tmp_path / 'runs'}", *args)
    for word in named:
        assert word in message, message
    made = [p for p in (tmp_path / "runs").rglob("*") if p.parent != tmp_path / "runs"]
    assert not made


def test_truncated_data_names_the_line(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "cut.jsonl"
    row = json.dumps({"question": "One and one?", "answer": "#### 2"})
    file.write_text(f"{row}\n{row}\n{row[:20]}")
    message = _refused(
        main, *PLUS, f"--workdir={tmp_path}/run", f"--config.dataset.train_path={file}"
    )
    assert f"{file}:3" in message and "truncated" in message


def test_a_larger_tokenizer_than_the_model(main: Main, tmp_path: Path) -> None:
    model = sorted((fixture_root() / "backbones" / "e2d2").glob("*/config.json"))[0].parent
    message = _refused(
        main,
        *PLUS,
        f"--workdir={tmp_path}/run",
        E2D2,
        f"{MODEL}={model}",
        "--config.backbone.tokenizer_name_or_path=embedded_e2d2",
    )
    assert "ids" in message and "backbone.tokenizer_name_or_path" in message


def test_a_run_in_use(main: Main, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with RunDir.create("unused", "unused", directory).lock():
        message = _refused(main, *PLUS, f"--workdir={directory}")
    assert str(directory) in message and "process" in message


def test_another_architecture_leaves_the_run_as_it_was(main: Main, copied: Path) -> None:
    before = contents(copied)
    other = "--config.actor.hidden_size=9"
    message = _refused(main, *PLUS, f"--workdir={copied}", other)
    assert "actor.hidden_size: saved 8, now 9" in message
    assert contents(copied) == before
    message = _refused(main, *PLUS, "--mode=eval", f"--checkpoint={copied}", other)
    assert "actor.hidden_size: saved 8, now 9" in message
    message = _refused(main, *PLUS, "--mode=eval", f"--checkpoint={copied}/checkpoints/77")
    assert "77" in message and "found: " in message
    assert contents(copied) == before


def test_a_run_without_checkpoints(main: Main, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    message = _refused(main, *PLUS, "--mode=eval", f"--checkpoint={tmp_path}/run")
    assert "no finished checkpoint" in message


@pytest.mark.parametrize("args", [["--config.rollout.max_step=3"], [E2D2, f"{MODEL}=a/b"]])
def test_the_process_ends_with_status_2_and_one_line(args: list[str], tmp_path: Path) -> None:
    done = run(*PLUS, f"--workdir={tmp_path}/run", *args)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: ") and len(lines[-1]) > 40
    assert sum(line.startswith("error:") for line in lines) == 1
    assert "Traceback" not in done.stderr
