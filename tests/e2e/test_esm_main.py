"""The ESM command from end to end on the tiny model: files, resume, refusals."""

import csv
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags as absl_flags

from common import flags
from common.errors import Interrupted, UserError
from common.rundir import read_jsonl
from esm import main as esm_main
from esm.monitor import Monitor
from tests.e2e import commands

TINY = (
    "--config=configs/esm_gsm8k_small.py:tiny",
    "--config.tune.k_scales=()",
    "--config.eval.ablations=()",
    "--config.task.max_train_examples=4",
    "--config.task.max_eval_examples=3",
    "--config.decode.max_new_tokens=16",
    "--config.offline_mine.max_new_tokens=24",
    "--config.outputs.tensorboard=False",
    # The same shapes whatever is left to do, so that everything is compiled once.
    "--config.jax.slots=2",
    "--config.jax.sample_slots=2",
)
# What differs between two runs of the same command: times and identities.
VOLATILE = ("run.json", "logs", "tb", "timing.json", "summary.jsonl", "checkpoint")
Main = Callable[..., int | None]


@pytest.fixture(scope="module")
def call() -> Iterator[Main]:
    """Parses arguments and calls the main function, as `python -m esm.main` does."""
    patch = pytest.MonkeyPatch()

    def run(*args: str) -> int | None:
        values = absl_flags.FlagValues()
        esm_main.define_own_flags(values)
        patch.setattr(flags, "FLAGS", values)
        flags.parse(esm_main.translate(["esm.main", *args]), values)
        return esm_main.main([])

    yield run
    patch.undo()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, call: Main) -> Path:
    """Outputs with one finished run `one`; do not change it."""
    path = tmp_path_factory.mktemp("esm") / "outputs"
    assert call(*TINY, f"--config.outputs.root_dir={path}", "--run_id=one", "--stage=all") == 0
    return path


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    """A copy of the outputs."""
    shutil.copytree(root, tmp_path / "outputs")
    return tmp_path / "outputs"


def _run(root: Path, name: str = "one") -> Path:
    return root / "esm_tiny" / name


def _columns(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file).fieldnames or [])


def _contents(directory: Path) -> dict[str, bytes]:
    found = commands.contents(directory)
    own = str(directory).encode()
    return {
        name: data.replace(own, b"ROOT")
        for name, data in found.items()
        if not any(part in VOLATILE for part in Path(name).parts)
    }


def test_files_and_columns(root: Path) -> None:
    run = _run(root)
    assert (root / "esm_tiny" / "LATEST").read_text().strip() == "one"
    for name in ("mine", "select", "memory", "eval"):
        assert (run / f"config_resolved.{name}.json").is_file()
    for name in ("config_resolved.json", "logs/run.log", "figures/tokens_hist_T16.pdf"):
        assert (run / name).stat().st_size
    assert _columns(run / "tables" / "main_results_single.csv") == [
        "dataset", "split", "T_max", "Greedy-CoT", "ESM",
    ]  # fmt: skip
    assert "overhead_p90" in _columns(run / "tables" / "diagnostics_T16.csv")
    assert "mcnemar_p" in _columns(run / "tables" / "compare_T16.csv")
    assert (run / "cases" / "cases_T16.md").read_text().startswith("# Cases")
    rollouts = read_jsonl(run / "mine" / "rollouts.jsonl")
    assert {"token_ids", "finish_reason", "logprob_sum", "reward"} <= set(rollouts[0])
    candidates = read_jsonl(run / "mine" / "candidates.jsonl")
    keys, vectors = np.load(run / "mine" / "keys.npy"), np.load(run / "mine" / "vectors.npy")
    assert len(candidates) == len(keys) == 2 * len(vectors) > 0
    for row in candidates:
        pair = row["pair_id"]
        expected = keys[2 * pair + 1] - keys[2 * pair]
        np.testing.assert_allclose(vectors[pair], expected, atol=1e-5)
    memory = np.load(run / "memory" / "keys.npy")
    np.testing.assert_allclose(np.linalg.norm(memory, axis=1), 1, atol=1e-5)
    assert (run / "memory" / "meta.txt").read_text() == f"N={len(memory)} H={memory.shape[1]}\n"


def test_rows_add_up(root: Path) -> None:
    run = _run(root)
    manifest = json.loads((run / "memory" / "manifest.json").read_text())
    rows = read_jsonl(run / "eval" / "ESM_T16" / "per_example.jsonl")
    assert [row["example_id"] for row in rows] == sorted(row["example_id"] for row in rows)
    for row in rows:
        assert f"{row['task']}/{manifest['split']}/{row['example_id']}" not in manifest["mined"]
        steps = row["steps"]
        assert sum(step["spent_commit"] for step in steps) == row["tokens_used"] <= 16
        assert sum(step["spent_probe"] for step in steps) == row["probe_tokens_used"]
        assert row["budget_used"] == row["tokens_used"] + row["probe_tokens_used"]
        assert len(row["token_ids"]) == row["tokens_used"]
        assert row["forward_positions"] >= row["prefill_tokens"] + row["tokens_used"] - 1


def test_again_changes_nothing(copied: Path, call: Main) -> None:
    before = _contents(copied)
    where = f"--config.outputs.root_dir={copied}"
    assert call(*TINY, where, "--run_id=latest", "--stage=eval") == 0
    after = _contents(copied)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert all("config_resolved" in name for name in changed), changed


def test_no_memory_and_no_strength_are_greedy(copied: Path, call: Main) -> None:
    where = (f"--config.outputs.root_dir={copied}", "--run_id=one", "--stage=eval")
    still = "--config.online.k_scale=0.0"
    call(*TINY, *where, "--config.eval.ablations=('no_memory',)")
    call(*TINY, *where, still, "--config.eval.tag=still", "--config.eval.methods=('esm',)")
    results = _run(copied) / "eval"
    greedy = read_jsonl(results / "greedy_T16" / "per_example.jsonl")
    for name in ("no_memory_T16", "ESM_T16_still"):
        rows = read_jsonl(results / name / "per_example.jsonl")
        assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in greedy]


def test_case_page(copied: Path, call: Main) -> None:
    where = (f"--config.outputs.root_dir={copied}", "--run-id=one", "case", "--tag=dbg")
    ids = [row["example_id"] for row in read_jsonl(_run(copied) / "eval/ESM_T16/per_example.jsonl")]
    call(*TINY, *where, f"--example-ids={ids[1]},{ids[0]}")
    [page] = (_run(copied) / "cases").glob("dbg_*.md")
    text = page.read_text()
    assert ids[1] in text and ids[0] in text and "| m | chosen |" in text
    with pytest.raises(UserError, match="--example_ids: nobody"):
        call(*TINY, *where, "--example_ids=nobody")


def test_rescore_and_report(copied: Path, call: Main) -> None:
    where = (f"--config.outputs.root_dir={copied}", "--run_id=one")
    results = _run(copied) / "eval" / "greedy_T16" / "per_example.jsonl"
    rows = read_jsonl(results)
    rows[0]["text"] = f"#### {rows[0]['gold']}"
    rows[0]["correct"] = False
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(*TINY, *where, "--stage=rescore")
    assert read_jsonl(results)[0]["correct"] is True
    call(*TINY, *where, "--stage=postprocess")
    assert "main_results_single" in (_run(copied) / "report.md").read_text()


def test_interrupted_run_equals_uninterrupted(
    root: Path, tmp_path: Path, call: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at every place where that is possible, again and again, until it is done."""
    where = (f"--config.outputs.root_dir={tmp_path}", "--run_id=one", "--stage=all")
    visits: dict[str, int] = {}

    def check(self: Monitor, what: str) -> None:
        del self
        visits[what] = visits.get(what, 0) + 1
        if visits[what] in (2, 5):
            raise Interrupted(what)

    monkeypatch.setattr(Monitor, "check", check)
    stops = 0
    while True:
        try:
            call(*TINY, *where)
            break
        except Interrupted:
            stops += 1
    assert stops >= 3
    assert _contents(tmp_path) == _contents(root)


REFUSED = {
    "memory before select": (["--stage=memory", "--run_id=new"], ["library", "--stage=select"]),
    "select before mine": (["--stage=select", "--run_id=new"], ["mine", "--stage=mine"]),
    "eval without memory": (["--stage=eval", "--run_id=new"], ["memory", "--stage=memory"]),
    "no such artifacts": (
        ["--stage=eval", "--config.eval.artifact_run_dir=esm_tiny/none"],
        ["artifact_run_dir", "none"],
    ),
    "unknown template": (["--config.prompt.template=poem"], ["prompt.template", "gsm8k_0shot"]),
    "unknown data set": (["--config.task.dataset=gsm9k"], ["task.dataset", "gsm8k"]),
    "unknown key": (["--config.online.k_scal=1.0"], ["online.k_scale"]),
    "a flag of another command": (["--checkpoint=here"], ["--checkpoint", "--run_id"]),
    "unknown variant": (["--config.online.variant=best"], ["online.variant", "no_probing"]),
    "unknown ablation": (["--config.eval.ablations=('none',)"], ["eval.ablations", "no_dpp"]),
    "unknown model": (
        ["--stage=mine", "--run_id=new", "--config.model.name_or_path=./nowhere"],
        ["./nowhere", "model.name_or_path"],
    ),
    "other mining settings": (
        ["--stage=mine", "--run_id=one", "--config.offline_mine.K=5"],
        ["offline_mine.K", "saved 4", "now 5"],
    ),
    "other eval settings": (
        ["--stage=eval", "--run_id=one", "--config.online.k_scale=0.3"],
        ["online.k_scale", "eval.tag"],
    ),
    "overlap": (
        [
            "--stage=eval",
            "--run_id=one",
            "--config.task.eval_split=train",
            "--config.task.eval_offset=0",
        ],
        ["mined", "task.allow_overlap"],
    ),
    "tune without a grid": (["--stage=tune", "--run_id=one"], ["tune.k_scales"]),
    "suite without jobs": (["--stage=suite"], ["suite.datasets"]),
    "other delimiter": (
        ["--stage=eval", "--run_id=one", "--config.control_points.segment_delimiter=;"],
        ["delimiter"],
    ),
}


@pytest.mark.parametrize("args, named", [pytest.param(*v, id=k) for k, v in REFUSED.items()])
def test_refused_and_nothing_changed(
    args: list[str], named: list[str], copied: Path, call: Main
) -> None:
    before = _contents(copied)
    with pytest.raises(UserError) as error:
        call(*TINY, f"--config.outputs.root_dir={copied}", *args)
    for word in named:
        assert word in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
    assert _contents(copied) == before


def test_memory_of_another_model(copied: Path, call: Main) -> None:
    path = _run(copied) / "memory" / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text())
    manifest["model"] |= {"name": "other", "digest": "0" * 64}
    path.write_text(json.dumps(manifest))
    before = _contents(copied)
    with pytest.raises(UserError, match="made with the model other"):
        call(*TINY, f"--config.outputs.root_dir={copied}", "--run_id=one", "--stage=eval")
    assert _contents(copied) == before


def test_damaged_files_are_named(copied: Path, call: Main) -> None:
    where = f"--config.outputs.root_dir={copied}"
    journal = _run(copied) / "eval" / "ESM_T16" / "per_example.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0][:40], *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=r"per_example.jsonl:1"):
        call(*TINY, where, "--run_id=one", "--stage=eval")
    with pytest.raises(UserError, match="layer 99"):
        mine = _run(copied) / "mine"
        (mine / "manifest.json").unlink()
        (_run(copied) / "config_resolved.mine.json").unlink()
        call(*TINY, where, "--run_id=one", "--config.offline_mine.candidate_layers=(99,)",
             "--stage=mine.states")  # fmt: skip
    keys = _run(copied) / "library" / "keys.npy"
    keys.write_bytes(keys.read_bytes()[:-8])
    with pytest.raises(UserError, match="keys.npy"):
        call(*TINY, where, "--run_id=one", "--stage=memory")


def test_the_process_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    done = commands.run(
        *TINY,
        f"--config.outputs.root_dir={tmp_path}",
        "select",
        "--run-id=x",
        module="esm.main",
    )
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_killed_process_goes_on(root: Path, tmp_path: Path) -> None:
    """SIGKILL while rollouts, states and answers are being written; the result is the same."""
    args = (*TINY, f"--config.outputs.root_dir={tmp_path}", "--run_id=one", "--stage=all")
    run = _run(tmp_path)
    for marker in (
        run / "mine" / "rollouts.jsonl",
        run / "mine" / "states" / "00000.npz",
        run / "eval" / "greedy_T16" / "per_example.jsonl",
        run / "eval" / "ESM_T16" / "per_example.jsonl",
    ):
        process = commands.start(*args, module="esm.main")
        limit = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < limit:
            if marker.exists() or (marker.parent.parent / "mine" / "manifest.json").exists():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.communicate(timeout=120)
    done = commands.run(*args, module="esm.main")
    assert done.returncode == 0, done.stderr[-2000:]
    left, right = _contents(tmp_path), _contents(root)
    assert left.keys() == right.keys()
    for name in left:
        if name.endswith("per_example.jsonl"):
            # Prompts read in other groups differ in the last bits of what is logged, no more.
            pairs = zip(left[name].splitlines(), right[name].splitlines(), strict=True)
            for one, other in pairs:
                _assert_close(json.loads(one), json.loads(other), name)
        else:
            assert left[name] == right[name], name


def _assert_close(one: Any, other: Any, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_close(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_close(a, b, f"{where}[{place}]")
    elif isinstance(one, float):
        assert abs(one - other) < 1e-5, where
    else:
        assert one == other, where


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_the_last_line_of_finished_rollouts_comes_back(copied: Path, call: Main, cut: int) -> None:
    """A crash of the machine can tear a journal that was complete; nothing later was lost."""
    run = _run(copied)
    path, whole = run / "mine" / "rollouts.jsonl", (run / "mine" / "rollouts.jsonl").read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[: start + cut])
    assert call(*TINY, f"--config.outputs.root_dir={copied}", "--run_id=one", "--stage=all") == 0
    assert path.read_bytes() == whole


def test_a_refused_new_run_leaves_no_directory(tmp_path: Path, call: Main) -> None:
    data = tmp_path / "gsm8k"
    data.mkdir()
    (data / "train.jsonl").write_text("nonsense\n")
    options = ("--config.task.dataset=gsm8k", f"--config.task.data_root={tmp_path}")
    with pytest.raises(UserError, match=r"train\.jsonl:1"):
        call(*TINY, *options, f"--config.outputs.root_dir={tmp_path}/out", "--run_id=new")
    assert not (tmp_path / "out" / "esm_tiny" / "new").exists()


def test_several_processes_are_refused(
    tmp_path: Path, call: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in commands.SECOND_OF_TWO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="one process, but 2 were started.*--stage=suite"):
        call(*TINY, f"--config.outputs.root_dir={tmp_path}")
    assert not list(tmp_path.iterdir())
