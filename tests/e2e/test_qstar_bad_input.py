"""Bad input of the q* command: one line that names thing and cure, before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.rundir import read_jsonl
from qstar import generate
from qstar.writer import Journal
from tests.e2e.test_qstar_main import Main, main, rows
from tests.parity.fixtures import fixture_root

__all__ = ["main"]  # the fixture
TINY = fixture_root() / "qstar" / "tiny"
REFUSED = {
    "greedy below zero": (["--temperature=-0.5"], ["sampling.temperature", "-0.5"]),
    "no tokens": (["--max_new_tokens=0"], ["sampling.max_new_tokens"]),
    "nucleus": (["--top_p=1.5"], ["sampling.top_p", "(0, 1]"]),
    "alpha": (["--alpha_method=fixed", "--fixed_alpha=1.5"], ["alpha.fixed", "extrapolate"]),
    "method": (["--alpha_method=best"], ["alpha.method", "kl_symmetry"]),
    "backend": (["--backend=tensorrt"], ["backend", "jax", "transformers"]),
    "shard": (["--config.run.shard=3/3"], ["run.shard", "i/n"]),
    "slots": (["--batch_size=none"], ["run.slots", "auto"]),
    "dtype": (["--dtype=float8"], ["model.dtype", "bfloat16"]),
    "hint": (["--config.data.hint_field=clue"], ["data.hint_field=clue", "question"]),
    "template": (
        ["--config.data.hint_field=hint", "--config.data.hint_template={x}"],
        ["data.hint_template", "{prompt}"],
    ),
    "column": (
        ["--dataset_adapter=generic", "--prompt_field=quest"],
        ["data.prompt_field=quest", "question"],
    ),
    "field": (["--dataset_adapter=generic"], ["data.prompt_field", "question"]),
    "missing model": (["--model_theta=./nowhere"], ["./nowhere", "model.theta"]),
    "missing target": (["--model_t=./nowhere"], ["./nowhere", "model.t"]),
    "tiny": (["--model_theta=tiny:x"], ["tiny:x", "number"]),
    "missing data": (["--dataset=nowhere.jsonl"], ["nowhere.jsonl"]),
    "range": (["--start_idx=6"], ["run.start_idx=6", "6 rows"]),
    "long answers": (["--max_new_tokens=2000"], ["sampling.max_new_tokens=2000", "1024"]),
    "unknown key": (["--config.alpha.methd=fixed"], ["alpha.methd", "alpha.method"]),
    "no model": (["--model_theta="], ["model.theta", "smollm2"]),
    "no output": (["--output="], ["run.output"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_one_line(name: str, main: Main, tmp_path: Path) -> None:
    args, words = REFUSED[name]
    output = [] if any(a.startswith("--output") for a in args) else [f"--output={tmp_path}/o.jsonl"]
    with pytest.raises(UserError) as error:
        main(*output, *args)
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.glob("o*"))


@pytest.mark.skipif(not TINY.is_dir(), reason="no small checkpoints here")
def test_different_tokenizers_are_refused(main: Main, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizers differ \(\d+ and \d+ tokens.*vocab_align"):
        main(f"--output={tmp_path}/o.jsonl", f"--model_t={TINY}/theta_llama")


def test_rows_that_cannot_be_used(main: Main, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    lines: list[dict[str, Any]] = [{"question": q} for q in ("a?", "", "b" * 2000, "c?")]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):  # errors are tried again
        assert main(f"--output={tmp_path}/o.jsonl", f"--dataset={source}") == 3
        assert [row["sample_idx"] for row in rows(tmp_path / "o.jsonl")] == [0, 3]
        errors = read_jsonl(tmp_path / "o.errors.jsonl")
        assert [(e["sample_idx"], e["stage"]) for e in errors] == [(1, "prompt"), (2, "prompt")]
        assert "question" in errors[0]["message"] and "max_prompt_tokens" in errors[1]["message"]


def test_a_second_process_and_other_settings_are_refused(main: Main, tmp_path: Path) -> None:
    output = f"--output={tmp_path}/o.jsonl"
    with Journal(tmp_path / "o.jsonl"), pytest.raises(UserError, match="another process"):
        main(output)
    assert main(output, "--num_samples=1") == 0
    before = (tmp_path / "o.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"config.sampling.temperature \(0.8 -> 0.7\)"):
        main(output, "--temperature=0.7")
    assert (tmp_path / "o.jsonl").read_bytes() == before


def test_a_full_disk(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third sample finds no room: what is written stays whole, and the run can go on."""
    import qstar.writer

    real, lines = qstar.writer.os.write, []

    def write(descriptor: int, line: bytes) -> int:
        lines.append(line)
        return real(descriptor, line if len(lines) <= 4 else line[:20])

    monkeypatch.setattr(qstar.writer.os, "write", write)
    with pytest.raises(UserError, match=r"No space left on device; make room .* same command"):
        main(f"--output={tmp_path}/o.jsonl")
    monkeypatch.setattr(qstar.writer.os, "write", real)
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 2
    assert (tmp_path / "o.diagnostics.jsonl").read_bytes().endswith(b"\n")
    assert main(f"--output={tmp_path}/o.jsonl") == 0
    assert len(rows(tmp_path / "o.jsonl")) == 6


def test_a_dry_run_shows_prompts_and_loads_nothing(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "open_backend", None)
    assert main(f"--output={tmp_path}/o.jsonl", "--config.run.dry_run=True", "--num_samples=2") == 0
    shown = capsys.readouterr().out
    assert shown.count("pi_theta") == shown.count("pi_t,") == 2
    assert "<|start|>user\n" in shown and shown.rstrip().endswith("<|start|>assistant")
    assert not list(tmp_path.iterdir())
