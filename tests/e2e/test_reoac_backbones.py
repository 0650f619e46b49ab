"""MDLM, SEDD and adapters from the command line: train, resume, evaluate, export, pretrain."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common import torch_bridge
from common.errors import Interrupted, UserError
from tests.e2e.commands import SMALL, arrays, assert_same_run, metrics
from tests.e2e.conftest import Main

pytestmark = pytest.mark.slow

# The sizes of the smallest runs, but a transformer with random weights.
TINY = (
    *(flag for flag in SMALL if "backbone.name" not in flag and "hidden_size=8" not in flag),
    "--config.actor.hidden_size=8",
    "--config.critic.hidden_size=8",
    "--config.model.hidden_size=16",
    "--config.model.num_blocks=1",
    "--config.num_iterations=3",
    "--config.updates.backbone_rows=4",
    "--config.updates.backbone_batch=4",
)
ADAPTED = (
    "--config=configs/gsm8k.py:tiny",
    *TINY,
    # Not MDLM: with its gates at zero a fresh one gives adapters no gradient.
    "--config.backbone.model_name_or_path=scratch",
    "--config.model.intermediate_size=16",
    "--config.model.num_encoder_layers=1",
    "--config.model.num_decoder_layers=1",
    "--config.model.num_heads=2",
    "--config.model.num_kv_heads=1",
    "--config.model.head_dim=8",
    "--config.finetune_mode=lora",
    "--config.lora.dropout=0.1",
    "--config.optim.backbone_lr=0.01",
)


def test_adapters_train_resume_evaluate_and_are_exported(
    main: Main, tmp_path: Path, terminate_before_save: Callable[[int], None]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(f"--workdir={whole}", *ADAPTED) == 0
    saved = {name: x for name, x in arrays(whole).items() if "'backbone'" in name}
    # The checkpoint holds the adapter, not the frozen weights, and moments for nothing else.
    assert saved and all(name.endswith(("['a']", "['b']")) for name in saved)
    assert all(np.abs(x).max() > 0 for name, x in saved.items())
    exported = torch_bridge.read_tensors(whole / "adapter" / "adapter_model.safetensors", strip=())
    assert (
        "base_model.model.backbone.encoder.model.layers.0.self_attn.q_proj.lora_B.weight"
        in exported
    )
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 8
    terminate_before_save(2)
    with pytest.raises(Interrupted):
        main(f"--workdir={stopped}", *ADAPTED)
    assert main(f"--workdir={stopped}", *ADAPTED) == 0
    assert_same_run(stopped, whole)
    output = tmp_path / "eval.json"
    evaluate = (*ADAPTED, "--mode=eval", f"--output={output}")
    assert main(*evaluate, f"--checkpoint={whole}") == 0
    own = json.loads((whole / "eval_gsm8k.json").read_text())
    report = json.loads(output.read_text())
    assert {k: report[k] for k in own} == own
    # An adapter goes on training in another run.
    again = f"--config.lora.adapter={whole / 'adapter'}"
    assert main(f"--workdir={tmp_path / 'again'}", *ADAPTED, again) == 0


def test_sedd_is_trained_from_scratch_and_used(main: Main, tmp_path: Path) -> None:
    model = tmp_path / "model"
    sizes = (*TINY, "--config.model.cond_dim=8")
    assert (
        main(
            "--config=configs/sedd_math.py:pretrain",
            "--mode=pretrain",
            f"--workdir={tmp_path / 'pretrain'}",
            f"--config.pretrain.output={model}",
            *sizes,
            "--config.model.num_heads=2",
            "--config.pretrain.stage_steps=(2,)",
            "--config.pretrain.stage_max_ops=(1,)",
            "--config.pretrain.batch_size=4",
            "--config.pretrain.corpus_size=8",
            "--config.pretrain.warmup=1",
            "--config.pretrain.steps_per_dispatch=1",
            "--config.pretrain.eval_steps=(2,)",
            "--config.pretrain.eval_thresholds=()",
        )
        == 0
    )
    config = json.loads((model / "config.json").read_text())
    assert config["graph"]["type"] == "absorb" and config["model"]["hidden_size"] == 16
    run = tmp_path / "run"
    generated = (
        "--config=configs/sedd_math.py:generated",
        *sizes,
        f"--config.backbone.model_name_or_path={model}",
    )
    assert main(f"--workdir={run}", *generated, "--config.num_iterations=1") == 0
    assert json.loads((run / "backbone.json").read_text())["family"] == "sedd"
    assert len(metrics(run)) == 1
    with pytest.raises(UserError, match="describes sedd, not mdlm"):
        main(f"--workdir={tmp_path / 'x'}", *generated, "--config.backbone.name=mdlm")
    with pytest.raises(UserError, match="sedd has bidirectional"):
        main(f"--workdir={tmp_path / 'x'}", *generated, "--config.backbone.score_mode=blockwise")
