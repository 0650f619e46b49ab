"""Flags and configs; every bad input is one line on stderr and exit status 2."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from common import flags
from common.errors import UserError

CONFIG = """
from ml_collections import config_dict


def get_config(variant=""):
    print("loaded")
    config = config_dict.ConfigDict()
    config.seed = 0
    config.logging = config_dict.ConfigDict({"exp_name": "x"})
    config.optim = config_dict.ConfigDict({"actor_lr": 1e-4, "betas": (0.9, 0.99)})
    config.rollout = config_dict.ConfigDict({"steps": (1, 2), "max_steps": 8, "use_hidden": True})
    config.maybe = config_dict.placeholder(int)
    if variant == "tiny":
        config.rollout.max_steps = 2
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; use tiny")
    return config
"""

MAIN = '''
"""A tiny main.

    python main.py --config=FILE
"""
import json, os, signal, sys, time
from absl import flags as absl_flags
from common import flags
from common.errors import Interrupted, UserError

flags.define_flags(os.path.join(os.path.dirname(__file__), "config.py"), ("train", "evaluate"))
absl_flags.DEFINE_integer("extra", 1, "a flag of this main")


def main(argv):
    config = flags.FLAGS.config
    if flags.FLAGS.sample == "user":
        raise UserError("data.jsonl:\\nno such file")
    if flags.FLAGS.sample == "interrupted":
        raise Interrupted("stopped at step 3; run the same command to go on")
    if flags.FLAGS.sample == "bug":
        raise RuntimeError("a bug")
    if flags.FLAGS.sample == "sleep":
        print("ready", flush=True)
        time.sleep(60)
    flags.dump_config(config, flags.FLAGS.output, flags.FLAGS)
    print("done", flags.FLAGS.mode, flags.FLAGS.limit, flags.FLAGS.extra)
    return 0


if __name__ == "__main__":
    flags.run(main)
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("project")
    (directory / "config.py").write_text(CONFIG)
    (directory / "main.py").write_text(MAIN)
    (directory / "broken.py").write_text("def get_config(:\n")
    (directory / "raising.py").write_text("import nonexistent_package\n")
    (directory / "empty.py").write_text("")
    (directory / "plain.py").write_text("def get_config():\n    return {'a': 1}\n")
    (directory / "single.py").write_text(
        "from ml_collections import config_dict\n"
        "def get_config():\n    return config_dict.ConfigDict({'a': 1})\n"
    )
    return directory


def command(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(project / "main.py"), f"--output={project / 'out.json'}", *arguments],
        capture_output=True,
        text=True,
        cwd=project,
        timeout=60,
    )


def test_overrides_reach_main_and_the_file(project: Path) -> None:
    done = command(
        project,
        "--config.optim.actor_lr=3",  # before --config: the order does not matter
        f"--config={project / 'config.py'}:tiny",
        "--noconfig.rollout.use_hidden",
        "--config.rollout.steps=(4,5,6)",
        "--config.seed",
        "7",
        "--mode=evaluate",
        "--limit=5",
        "--extra=2",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["loaded", "done evaluate 5 2"]
    document = json.loads((project / "out.json").read_text())
    assert document["config"] == {
        "seed": 7,
        "logging": {"exp_name": "x"},
        "optim": {"actor_lr": 3.0, "betas": [0.9, 0.99]},
        "rollout": {"steps": [4, 5, 6], "max_steps": 2, "use_hidden": False},
        "maybe": None,
    }
    assert document["file"] == f"{project / 'config.py'}:tiny"
    assert document["overrides"] == {
        "optim.actor_lr": 3.0,
        "rollout.use_hidden": False,
        "rollout.steps": [4, 5, 6],
        "seed": 7,
    }


def test_default_config_is_used_and_loaded_once(project: Path) -> None:
    done = command(project)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loaded\ndone train 0 1\n"
    assert json.loads((project / "out.json").read_text())["config"]["rollout"]["max_steps"] == 8


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--lmit=3", "unknown flag --lmit; did you mean --limit?"),
        ("--config.actor_lr=3", "key --config.actor_lr; did you mean --config.optim.actor_lr?"),
        ("--config=nope.py", "config file 'nope.py' not found"),
        ("--sample=user", "data.jsonl: no such file"),
        ("train", "unexpected argument 'train'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(project: Path, argument: str, message: str) -> None:
    done = command(project, argument)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "done" not in done.stdout


def test_interrupted_is_status_3(project: Path) -> None:
    done = command(project, "--sample=interrupted")
    assert done.returncode == 3
    assert done.stderr == "interrupted: stopped at step 3; run the same command to go on\n"


def test_ctrl_c_is_status_3(project: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(project / "main.py"), "--sample=sleep"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started in the background ignores SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loaded\n"
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    assert errors.startswith("interrupted: ") and errors.count("\n") == 1


def test_a_bug_keeps_its_traceback(project: Path) -> None:
    done = command(project, "--sample=bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: a bug" in done.stderr


def test_help_shows_flags_and_config_keys(project: Path) -> None:
    done = command(project, "--config=config.py:tiny", "--help")
    assert done.returncode == 0
    for text in ("A tiny main.", "--extra=1", "--workdir", "--config.rollout.max_steps=2"):
        assert text in done.stdout


# The same in this process, for what a subprocess cannot show.


def parsed(project: Path, *arguments: str) -> absl_flags.FlagValues:
    values = absl_flags.FlagValues()
    flags.define_flags(str(project / "config.py"), ("train", "evaluate"), values)
    assert flags.parse(["main", *arguments], values) == ["main"]
    return values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lmit=3"], r"unknown flag --lmit; did you mean --limit\?"),
        (["--zzzzzz"], r"unknown flag --zzzzzz"),
        (
            ["--config.rollout.max_step=3"],
            r"unknown config key --config.rollout.max_step; did you mean "
            r"--config.rollout.max_steps",
        ),
        (["--config.actor_lr=3"], r"did you mean --config.optim.actor_lr\?"),
        (["--config.rollot.max_steps", "3"], r"did you mean --config.rollout.max_steps"),
        (["--config.rollout=3"], r"--config.rollout is a section"),
        (["--config.rollout.max_steps=2.5"], r"max_steps=2.5: not a whole number"),
        (["--config.rollout.max_steps=abc"], r"max_steps=abc: not a whole number"),
        (["--config.optim.actor_lr=abc"], r"actor_lr=abc: not a number"),
        (["--config.rollout.use_hidden=maybe"], r"use_hidden=maybe: not true or false"),
        (["--config.rollout.steps=abc"], r"--config.rollout.steps: every element must be int"),
        (["--config.optim.betas=(1,x)"], r"--config.optim.betas: every element must be float"),
        (["--config.maybe=abc"], r"maybe=abc: not a whole number"),
        (["--config.seed"], r"[Mm]issing value .*config.seed"),
        (["--config=nope.py"], r"config file 'nope.py' not found"),
        (["--config"], r"--config needs a value"),
        (["--config="], r"--config needs a value"),
        (["--config=config.py:huge"], r"config 'config.py:huge': unknown variant 'huge'; use tiny"),
        (["--config=single.py:tiny"], r"'single.py' has no variants"),
        (["--config=broken.py"], r"broken.py:1: "),
        (["--config=raising.py"], r"'raising.py': ModuleNotFoundError"),
        (["--config=empty.py"], r"no function get_config"),
        (["--config=plain.py"], r"must return a ConfigDict"),
        (["--mode=x"], r"--mode=x: value should be one of <train\|evaluate>"),
        (["--limit=-1"], r"--limit=-1: .*non-negative"),
        (["--limit=a"], r"--limit=a: not a whole number"),
        (["train"], r"unexpected argument 'train'"),
        (["--mode", "train", "--", "--limit=3"], r"unexpected argument '--limit=3'"),
        (["--flagfile=none.txt"], r"none.txt"),
    ],
)
def test_bad_input_is_a_user_error(
    project: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=message):
        parsed(project, *arguments)


def test_config_is_locked_and_known_to_the_library(project: Path) -> None:
    values = parsed(project, "--config.maybe=5")
    assert values.config.maybe == 5
    with pytest.raises(AttributeError):
        values.config.new_key = 1
    assert config_flags.get_config_filename(values["config"]) == str(project / "config.py")
    assert config_flags.get_override_values(values["config"]) == {"maybe": 5}


def test_flagfile(project: Path) -> None:
    (project / "flags.txt").write_text("--config.seed=4\n--limit=2\n")
    values = parsed(project, f"--flagfile={project / 'flags.txt'}")
    assert (values.config.seed, values.limit) == (4, 2)


def test_load_config(project: Path) -> None:
    assert flags.load_config(f"{project / 'config.py'}:tiny").rollout.max_steps == 2
    first, second = (flags.load_config(str(project / "config.py")) for _ in range(2))
    with first.unlocked():
        first.rollout.max_steps = 99
    assert second.rollout.max_steps == 8


def test_select_sees_its_sections_only(project: Path) -> None:
    def chosen(*arguments: str) -> dict[str, Any]:
        return flags.select(parsed(project, *arguments).config, ("rollout", "optim.betas"))

    base = chosen()
    assert chosen("--config.seed=3") == base
    assert chosen("--config.optim.actor_lr=3") == base
    assert chosen("--config.rollout.max_steps=3") != base
    assert chosen("--config.optim.betas=(0.9,0.98)") != base
    with pytest.raises(UserError, match="no key 'rolout'; did you mean rollout"):
        flags.select(parsed(project).config, ("rolout",))


def test_select_gives_json_values(project: Path) -> None:
    config = parsed(project).config
    expected = {"optim.betas": [0.9, 0.99], "rollout.steps": [1, 2]}
    assert flags.select(config, ["optim.betas", "rollout.steps"]) == expected


def test_dump_without_flags(project: Path, tmp_path: Path) -> None:
    flags.dump_config(flags.load_config(str(project / "config.py")), tmp_path / "c.json")
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["config"]["seed"] == 0
    assert (document["file"], document["overrides"]) == ("", {})


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fill() -> int:
        raise OSError(28, "No space left on device", "here/file")

    with pytest.raises(SystemExit) as left:
        flags.guard(fill)
    assert left.value.code == flags.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert (
        error.startswith("error: No space left on device at here/file") and error.count("\n") == 1
    )

    def denied() -> int:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError):
        flags.guard(denied)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_must_be_finite(value: str) -> None:
    values = absl_flags.FlagValues()
    flags.define_flags("configs/halting_parity.py:tiny", ("train",), values)
    with pytest.raises(UserError, match="optim.lr.*finite"):
        flags.parse(["main", f"--config.optim.lr={value}"], values)
