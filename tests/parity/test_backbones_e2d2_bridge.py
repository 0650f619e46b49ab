"""Importing, exporting and converting every recorded E2D2 checkpoint, and what must fail."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from common import torch_bridge
from common.errors import UserError
from reoac_jax import convert
from reoac_jax.backbone import e2d2_bridge, e2d2_config, store
from tests.parity import e2d2_cases
from tests.parity.e2d2_cases import folder_cases

each_folder = pytest.mark.parametrize("folder", folder_cases())


def assert_same_tree(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name


def copy_model(folder: Path, target: Path, tensors=None, config=None) -> Path:
    """The model in a new directory, with other tensors or with changed config keys."""
    target.mkdir(exist_ok=True)
    for name in ("config.json", "base_config.json"):
        shutil.copyfile(folder / name, target / name)
    tensors = torch_bridge.read_tensors(folder, strip=()) if tensors is None else tensors
    torch_bridge.write_safetensors(target / "model.safetensors", tensors)
    if config is not None:
        content = json.loads((target / "config.json").read_text())
        for key, value in config.items():
            part = content["backbone_config"] if key in content["backbone_config"] else content
            part[key] = value
        (target / "config.json").write_text(json.dumps(content))
    return target


def test_fixtures_are_found():
    assert folder_cases()


@each_folder
@pytest.mark.torch
def test_both_file_formats_give_the_same_parameters(folder):
    safe = e2d2_bridge.load_hf_directory(folder, weights=folder / "model.safetensors")
    pickled = e2d2_bridge.load_hf_directory(folder, weights=folder / "pytorch_model.bin")
    assert safe.config == pickled.config
    assert_same_tree(safe.params, pickled.params)


@each_folder
def test_number_of_parameters(folder):
    recorded = json.loads((folder / "aliases.json").read_text())["num_unique_parameters"]
    params = e2d2_bridge.load_hf_directory(folder).params
    assert sum(x.size for x in jax.tree.leaves(params)) == recorded


@each_folder
def test_every_config_value_has_a_source(folder):
    model = e2d2_bridge.load_hf_directory(folder)
    config = json.loads((folder / "config.json").read_text())
    assert model.config.block_size == config["block_size"]
    assert model.config.mask_id == config["mask_token_id"]
    assert model.provenance["hidden_size"].startswith("tensor ")
    assert model.provenance["rope_theta"] == "base_config.json"
    assert all(model.provenance.values())


@each_folder
def test_saving_gives_back_every_original_tensor(folder, tmp_path):
    model = e2d2_bridge.load_hf_directory(folder)
    e2d2_bridge.save_hf_directory(tmp_path / "out", model.config, model.params)
    assert_same_tensors(
        torch_bridge.read_tensors(tmp_path / "out", strip=()),
        torch_bridge.read_tensors(folder, strip=()),
    )
    again = e2d2_bridge.load_hf_directory(tmp_path / "out")
    assert again.config == model.config
    assert_same_tree(again.params, model.params)


@each_folder
def test_conversion_to_orbax_and_back(folder, tmp_path, capsys):
    orbax, hub = str(tmp_path / "orbax"), str(tmp_path / "hub")
    assert convert.main([str(folder), orbax]) == 0
    assert "hidden_size" in capsys.readouterr().out
    assert convert.main([orbax, hub]) == 0
    model, stored = e2d2_bridge.load_hf_directory(folder), store.load_backbone(orbax)
    assert stored.config == model.config
    assert_same_tree(stored.params, model.params)
    assert len(stored.source["sha256"]) == 64
    assert_same_tensors(
        torch_bridge.read_tensors(hub, strip=()), torch_bridge.read_tensors(folder, strip=())
    )
    ours = json.loads((tmp_path / "hub" / "config.json").read_text())
    theirs = json.loads((folder / "config.json").read_text())
    assert {key: ours[key] for key in theirs if key != "backbone_config"} == {
        key: value for key, value in theirs.items() if key != "backbone_config"
    }
    assert ours["score_mode"] == "blockwise"


@pytest.mark.parametrize("layout", ["orbax", "hf"])
def test_tokenizer_files_travel_along(tmp_path, layout):
    source = copy_model(e2d2_cases.model_folders()[0], tmp_path / "source")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "modeling.py").write_text("raise SystemExit")
    target = tmp_path / "target"
    assert convert.main([str(source), str(target), "--to", layout]) == 0
    assert (target / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (target / "modeling.py").exists()
    assert [p.name for p in store.load_backbone(target).tokenizer_files] == ["tokenizer.json"]


def test_damaged_checkpoints_fail_in_one_line(tmp_path, capsys):
    target = tmp_path / "orbax"
    assert convert.main([str(e2d2_cases.model_folders()[0]), str(target)]) == 0
    capsys.readouterr()
    shutil.rmtree(target / "params" / "d")
    assert "params" in failing(target, tmp_path, capsys)
    (target / store.DESCRIPTION).write_text('{"format": 1, "family": "e2d2"}')
    assert store.DESCRIPTION in failing(target, tmp_path, capsys)


@each_folder
@pytest.mark.parametrize("layout", ["orbax", "hf"])
def test_half_precision_storage(folder, tmp_path, layout):
    import ml_dtypes

    target = str(tmp_path / "half")
    assert convert.main([str(folder), target, "--dtype", "bfloat16", "--to", layout]) == 0
    exact, half = store.load_backbone(folder), store.load_backbone(target)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), exact.params)
    assert_same_tree(half.params, rounded)


@each_folder
def test_converters_may_drop_repeated_names(folder, tmp_path):
    """Any one name of a tied tensor is enough, whichever a converter kept."""
    groups = json.loads((folder / "aliases.json").read_text())["aliased_names"]
    full = e2d2_bridge.load_hf_directory(folder)
    for pick in (0, -1):
        tensors = torch_bridge.read_tensors(folder, strip=())
        for group in groups:
            for name in set(group) - {group[pick]}:
                del tensors[name]
        target = copy_model(folder, tmp_path / str(pick), tensors)
        model = e2d2_bridge.load_hf_directory(target)
        assert model.config == full.config
        assert_same_tree(model.params, full.params)


@each_folder
def test_extra_buffers_and_wrapper_prefixes(folder, tmp_path):
    tensors = torch_bridge.read_tensors(folder, strip=())
    tensors |= {
        "static_attention_mask": np.ones((4, 4), bool),
        "encoder_static_attention_mask": np.ones((4, 4), bool),
        "backbone.encoder.model.rotary_emb.inv_freq": np.ones(4, np.float32),
        "noise_schedule.empty": np.zeros(0, np.float32),
    }
    wrapped = {f"_orig_mod.module.{name}": value for name, value in tensors.items()}
    full = e2d2_bridge.load_hf_directory(folder)
    for case, content in (("buffers", tensors), ("wrapped", wrapped)):
        model = e2d2_bridge.load_hf_directory(copy_model(folder, tmp_path / case, content))
        assert_same_tree(model.params, full.params)


@each_folder
def test_sharded_checkpoints(folder, tmp_path):
    tensors = torch_bridge.read_tensors(folder, strip=())
    target = copy_model(folder, tmp_path / "sharded", {})
    (target / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate(np.array_split(sorted(tensors), 3)):
        shard = f"model-{number:05}.safetensors"
        torch_bridge.write_safetensors(target / shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(map(str, part), shard)
    index = target / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    params = e2d2_bridge.load_hf_directory(target).params
    assert_same_tree(params, e2d2_bridge.load_hf_directory(folder).params)


def failing(folder: Path, target: Path, capsys) -> str:
    """The single line a conversion of a broken model ends with."""
    assert convert.main([str(folder), str(target / "converted")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("error: ")
    assert not (target / "converted").exists()
    return printed


@each_folder
def test_renamed_tensor_fails_by_name(folder, tmp_path, capsys):
    name = "backbone.encoder.model.layers.0.mlp.up_proj.weight"
    for new in (name.replace("up_proj", "upp_proj"), None):
        tensors = torch_bridge.read_tensors(folder, strip=())
        value = tensors.pop(name)
        partner = name.replace("encoder", "decoder")
        if store.load_backbone(folder).config.tie_encoder_decoder:
            tensors.pop(partner)  # else the twin would stand in for it
        if new:
            tensors[new] = value
        target = copy_model(folder, tmp_path / str(bool(new)), tensors)
        assert (new or name) in failing(target, tmp_path, capsys)


@each_folder
def test_wrong_shape_fails_by_name(folder, tmp_path, capsys):
    name = "backbone.encoder.model.layers.0.self_attn.o_proj.weight"
    tensors = torch_bridge.read_tensors(folder, strip=())
    names = [name]
    if store.load_backbone(folder).config.tie_encoder_decoder:
        names.append(name.replace("encoder", "decoder"))
    tensors |= {alias: tensors[alias][:, :-1] for alias in names}
    message = failing(copy_model(folder, tmp_path / "bad", tensors), tmp_path, capsys)
    assert name in message and "encoder/layers/attn/o/kernel" in message


@each_folder
def test_differing_aliases_fail_with_both_names(folder, tmp_path, capsys):
    groups = json.loads((folder / "aliases.json").read_text())["aliased_names"]
    for number, group in enumerate(groups[:2]):
        tensors = torch_bridge.read_tensors(folder, strip=())
        tensors[group[-1]] = tensors[group[-1]] + 1
        target = copy_model(folder, tmp_path / str(number), tensors)
        message = failing(target, tmp_path, capsys)
        assert group[0] in message and group[-1] in message


@each_folder
def test_truncated_file_fails_by_name(folder, tmp_path, capsys):
    target = copy_model(folder, tmp_path / "short")
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in failing(target, tmp_path, capsys)


@each_folder
@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("num_encoder_layers", "encoder.model.layers"),
        ("vocab_size", "embed_tokens"),
        ("mask_token_id", "embed_tokens"),
    ],
)
def test_config_against_tensors(folder, tmp_path, capsys, key, tensor):
    target = copy_model(folder, tmp_path / "contradiction", config={key: 1000})
    message = failing(target, tmp_path, capsys)
    assert key in message and tensor in message and "1000" in message


@each_folder
def test_base_config_sizes_against_tensors(folder, tmp_path, capsys):
    target = copy_model(folder, tmp_path / "contradiction")
    base = json.loads((target / "base_config.json").read_text())
    (target / "base_config.json").write_text(json.dumps({**base, "num_attention_heads": 3}))
    message = failing(target, tmp_path, capsys)
    assert "base_config.json says num_attention_heads = 3" in message and "q_proj" in message


@each_folder
def test_unknown_base_model_asks_for_its_config(folder, tmp_path, capsys):
    target = copy_model(folder, tmp_path / "alone")
    (target / "base_config.json").unlink()
    assert "--base-config" in failing(target, tmp_path, capsys)
    out = str(tmp_path / "out")
    base = str(folder / "base_config.json")
    assert convert.main([str(target), out, "--base-config", base]) == 0
    assert store.load_backbone(out).config == store.load_backbone(folder).config


def test_known_base_models_need_no_file(tmp_path):
    config = {"backbone_config": {"pretrained_model_name_or_path": "Qwen/Qwen3-0.6B-Base"}}
    base, source = e2d2_config.find_base_config(config, tmp_path, None)
    assert base["hidden_size"] == 1024 and "built-in" in source


@each_folder
def test_targets_are_not_overwritten(folder, tmp_path, capsys):
    target = tmp_path / "out"
    assert convert.main([str(folder), str(target)]) == 0
    before = (target / store.DESCRIPTION).stat().st_mtime_ns
    assert convert.main([str(folder), str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (target / store.DESCRIPTION).stat().st_mtime_ns == before
    assert convert.main([str(folder), str(target), "--force"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    other = tmp_path / "documents"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    assert convert.main([str(folder), str(other), "--force"]) == 2
    assert (other / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./model", "single"])
def test_absent_paths(name):
    with pytest.raises(UserError, match=r"does not exist.*backbone\.model_name_or_path"):
        store.load_backbone(name)


def test_unreachable_hub_names_the_way_out(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"backbone\.model_name_or_path.*configs/gsm8k\.py"):
        store.load_backbone("some-organisation/some-model-that-is-not-cached")
