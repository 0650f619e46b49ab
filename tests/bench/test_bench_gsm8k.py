"""The bench of an adapted model, on a tiny one: train a policy, measure, stop and go on."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reoac_jax.adapt import from_decoder
from reoac_jax.backbone.e2d2_bridge import save_hf_directory
from reoac_jax.pretrain import TOKENIZER_FILES
from reoac_jax.tokenizer import EMBEDDED_DIR, load_tokenizer
from tests.common.lm_models import BASE, random_model

CONFIG = """
from configs.adapt import get_config as adapted

def get_config(variant=""):
    c = adapted("cpu_policy")
    c.backbone.model_name_or_path = {model!r}
    c.dataset.train_path = c.dataset.eval_path = {data!r}
    c.backbone.max_length, c.rollout.gen_len, c.rollout.max_steps = 24, 12, 6
    c.rollout.batch_size = c.episodes_per_iter = 8
    c.num_iterations, c.eval.limit, c.eval.batch_size = 2, 4, 4
    c.actor.hidden_size = c.critic.hidden_size = 8
    return c
"""


def tiny_model(directory: Path) -> Path:
    """A random Llama behind the bundled tokenizer, made an E2D2 and saved."""
    tokenizer = load_tokenizer(EMBEDDED_DIR)
    model = random_model(dataclasses.replace(BASE, vocab_size=len(tokenizer)))
    network, params = from_decoder(model, tokenizer, decoder_layers=1, block_size=4, length=36)
    files = [EMBEDDED_DIR / name for name in TOKENIZER_FILES]
    save_hf_directory(
        directory, network, params, tokenizer_files=[file for file in files if file.is_file()]
    )
    return directory


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_row_is_measured_and_a_finished_batch_is_kept(tmp_path: Path) -> None:
    data = tmp_path / "test.jsonl"
    rows = [
        {"question": f"Ann has {i} pens and buys {i + 1}. How many?", "answer": f"#### {2 * i + 1}"}
        for i in range(7)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "tiny.py"
    model = tiny_model(tmp_path / "model")
    config.write_text(CONFIG.format(model=str(model), data=str(data)))
    root = Path(__file__).resolve().parents[2]

    def run(*arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=root,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stderr

    policy = tmp_path / "policy"
    run("reoac_jax.main", f"--config={config}", f"--workdir={policy}")
    assert len((policy / "metrics.jsonl").read_text().splitlines()) == 2
    command = (
        "bench.reoac_gsm8k",
        *("--model", str(model), "--policy", str(policy), "--data", str(data)),
        *("--config", str(config), "--steps", "6", "--batch", "4"),
        *("--root", str(tmp_path / "root"), "--json", str(tmp_path / "out.json")),
    )
    run(*command)
    first = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["row"] for row in first] == ["plain, 6 passes", "threshold 0.9", "policy"]
    for row in first:
        assert row["n"] == 7 and row["accuracy"] == row["correct"] / 7 and row["seconds"] > 0
        assert 1 <= row["passes"] <= 12
    kept = tmp_path / "root" / "policy.json"
    found = json.loads(kept.read_text())
    assert len(found["ids"]) == 7 and len(found["seconds"]) == 2
    # As if it had been stopped after one batch: the rest comes out the same.
    cut = found | {
        "ids": found["ids"][:4],
        "forwards": found["forwards"][:4],
        "seconds": [1.0],
    }
    kept.write_text(json.dumps(cut))
    run(*command)
    again = json.loads(kept.read_text())
    assert again["ids"] == found["ids"] and again["seconds"][0] == 1.0
    # What another model or batch size left there is no result of this one.
    refused = run(*command, "--batch", "2", status=2)
    assert "another batch (4, not 2): set another --root" in refused
    assert json.loads(kept.read_text()) == again
