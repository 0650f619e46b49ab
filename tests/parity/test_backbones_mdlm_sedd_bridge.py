"""Importing, exporting and converting MDLM and SEDD checkpoints of every layout, and what fails."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from common import torch_bridge
from common.errors import UserError
from reoac_jax import convert
from reoac_jax.backbone import dit_bridge, dit_config, store
from tests.parity import dit_cases

CASES = [*dit_cases.folder_cases("mdlm"), *dit_cases.folder_cases("sedd")]
each_folder = pytest.mark.parametrize("folder", CASES)
one_per_family = pytest.mark.parametrize("folder", CASES[:: max(1, len(CASES) - 1)])


def assert_same_tree(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def raw_tensors(folder):
    return torch_bridge.read_tensors(folder, strip=())


def copy_model(folder: Path, target: Path, tensors=None, config=None) -> Path:
    """The model in a new directory, with other tensors or with changed config keys."""
    target.mkdir(exist_ok=True)
    content = json.loads((folder / "config.json").read_text())
    for key, value in (config or {}).items():
        inner = content.get("model")
        part = inner if isinstance(inner, dict) and key in inner else content
        part[key] = value
    (target / "config.json").write_text(json.dumps(content))
    tensors = raw_tensors(folder) if tensors is None else tensors
    torch_bridge.write_safetensors(target / "model.safetensors", tensors)
    return target


def rename(tensors, old_part, new_part):
    return {name.replace(old_part, new_part): value for name, value in tensors.items()}


@each_folder
def test_config_values_and_their_sources(folder):
    case = dit_cases.load(folder)
    model = dit_bridge.load_directory(folder)
    assert model.provenance["hidden_size"].startswith("tensor ")
    assert model.provenance["num_heads"] == f"tensor {dit_config.INV_FREQ}"
    assert model.provenance["length"] == "config.json"
    assert all(model.provenance.values())
    absorbing = case.cfg.graph == "absorb"
    assert case.cfg.mask_id == (case.cfg.vocab_size - 1 if absorbing else -1)
    assert store.load_backbone(folder).family == dit_config.family_of(case.config)


@each_folder
@pytest.mark.torch
def test_both_file_formats_give_the_same_parameters(folder):
    safe = dit_bridge.load_directory(folder, weights=folder / "model.safetensors")
    pickled = dit_bridge.load_directory(folder, weights=folder / "pytorch_model.bin")
    assert safe.config == pickled.config
    assert_same_tree(safe.params, pickled.params)


@each_folder
def test_saving_gives_back_every_original_tensor(folder, tmp_path):
    model = store.load_backbone(folder)
    store.save_hub(tmp_path, model)
    ours, theirs = raw_tensors(tmp_path), raw_tensors(folder)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith(dit_config.INV_FREQ):
            assert ours[name].tobytes() == theirs[name].tobytes(), name
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
    assert store.load_backbone(tmp_path).config == model.config
    stated, written = (json.loads((d / "config.json").read_text()) for d in (folder, tmp_path))
    assert {key: written[key] for key in stated} == stated


@one_per_family
def test_converting_there_and_back(folder, tmp_path, capsys):
    orbax, hub = tmp_path / "orbax", tmp_path / "hub"
    assert convert.main([str(folder), str(orbax)]) == 0
    assert "tensor vocab_embed.embedding" in capsys.readouterr().out
    stored, model = store.load_backbone(orbax), store.load_backbone(folder)
    assert stored.config == model.config
    assert_same_tree(stored.params, model.params)
    assert convert.main([str(orbax), str(hub)]) == 0
    assert_same_tree(store.load_backbone(hub).params, model.params)
    assert convert.main([str(folder), str(tmp_path / "x"), "--family", "e2d2"]) == 2
    assert "not e2d2" in capsys.readouterr().err


@one_per_family
def test_half_precision_sources_are_widened(folder, tmp_path):
    model = store.load_backbone(folder)
    store.save_hub(tmp_path, model, "bfloat16")
    half = store.load_backbone(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {np.dtype(np.float32)}
    scale = float(np.abs(model.params["embed"]["embedding"]).max())
    np.testing.assert_allclose(
        half.params["embed"]["embedding"], model.params["embed"]["embedding"], atol=scale / 100
    )


# --------------------------------------------------------------------------- training checkpoints
def averages_of(folder, factor=2.0):
    """Averages in the order of the module's parameters: here the weights times a factor."""
    prefix = "backbone." if any(n.startswith("backbone.") for n in raw_tensors(folder)) else ""
    tensors = raw_tensors(folder)
    order = dit_bridge.parameter_order(dit_cases.load(folder).cfg.num_blocks)
    return [tensors[prefix + name] * factor for name in order]


def write_training_checkpoint(folder, path, averages, style):
    """A checkpoint as MDLM's ("lightning") or SEDD's ("sedd") training code writes it."""
    import torch

    tensors = {name: torch.from_numpy(v.copy()) for name, v in raw_tensors(folder).items()}
    shadow = [torch.from_numpy(value.copy()) for value in averages]
    ema = {"decay": 0.9999, "num_updates": 7, "shadow_params": shadow}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    if style == "lightning":
        names = {f"backbone.{n.removeprefix('backbone.')}": v for n, v in tensors.items()}
        content = {"state_dict": names, "ema": ema, "optimizer_states": [optimizer], "epoch": 1}
    else:
        names = {f"module.{n}": v for n, v in tensors.items()}
        content = {"model": names, "ema": ema, "optimizer": optimizer, "step": 3}
    torch.save(content, path)
    return path


def layouts():
    for param in CASES:
        (folder,) = param.values
        style = "sedd" if "tokens" in dit_cases.load(folder).config else "lightning"
        yield pytest.param(folder, style, id=f"{folder.name}-{style}")


@pytest.mark.torch
@pytest.mark.parametrize(("folder", "style"), layouts())
def test_averages_of_a_training_checkpoint_are_preferred(folder, style, tmp_path):
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    name = "last.ckpt" if style == "lightning" else "checkpoint.pth"
    file = write_training_checkpoint(folder, tmp_path / name, averages_of(folder), style)
    model = store.load_backbone(file)
    assert "average" in model.provenance["weights"]
    wanted = jax.tree.map(lambda x: x * 2.0, dit_cases.load(folder).params)
    assert_same_tree(model.params, wanted)


@pytest.mark.torch
@pytest.mark.parametrize(("folder", "style"), list(layouts())[:1])
def test_averages_that_do_not_fit(folder, style, tmp_path):
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    path, averages = tmp_path / "last.ckpt", averages_of(folder)
    # Trailing scalars belong to the noise schedule.
    write_training_checkpoint(folder, path, [*averages, np.zeros((), np.float32)], style)
    assert store.load_backbone(path).provenance["weights"] != "the model's own"
    write_training_checkpoint(folder, path, averages[:-1], style)
    with pytest.raises(UserError, match="shadow_params"):
        store.load_backbone(path)
    averages[2], averages[3] = averages[3], averages[2]
    write_training_checkpoint(folder, path, averages, style)
    with pytest.raises(UserError, match=r"average [23].*sigma_map|sigma_map"):
        store.load_backbone(path)


@pytest.mark.torch
@pytest.mark.parametrize(("folder", "style"), list(layouts())[:1])
def test_checkpoint_without_a_config(folder, style, tmp_path, capsys):
    cfg = dit_cases.load(folder).cfg
    file = write_training_checkpoint(folder, tmp_path / "last.ckpt", averages_of(folder), style)
    arguments = [str(file), str(tmp_path / "out"), "--family", "mdlm"]
    assert convert.main(arguments) == 2
    assert "--set length=N" in capsys.readouterr().err
    timed = f"time_conditioning={str(cfg.time_conditioning).lower()}"
    assert convert.main([*arguments, "--set", f"length={cfg.length}", "--set", timed]) == 0
    converted = store.load_backbone(tmp_path / "out").config
    assert converted == cfg
    assert convert.main([*arguments, "--set", "num_heads=1", "--set", "length=8", "--force"]) == 2
    assert dit_config.INV_FREQ in capsys.readouterr().err
    assert convert.main([*arguments, "--set", "length=x"]) == 2
    assert convert.main([*arguments, "--set", "width=3"]) == 2


class _Executed:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.torch
def test_code_in_a_checkpoint_is_refused(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "code": _Executed()}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="cannot read"):
        store.load_backbone(tmp_path / "bad.ckpt", family="mdlm")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------- what must fail
@each_folder
def test_disagreement_between_file_and_tensor_names_both(folder, tmp_path):
    for key in ("cond_dim", "n_blocks", "n_heads"):
        with pytest.raises(UserError, match=r"config\.json says .* tensor '.*' shows"):
            dit_bridge.load_directory(copy_model(folder, tmp_path, config={key: 5}))


@one_per_family
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: rename(t, "attn_out", "attn_oot"), "attn_oot"),
        (lambda t: {n: v for n, v in t.items() if "blocks.1.norm2" not in n}, "blocks.1.norm2"),
        (lambda t: {n: v[:-1] if "mlp.2.weight" in n else v for n, v in t.items()}, r"mlp\.2"),
        (lambda t: {**t, "extra.weight": np.zeros(2, np.float32)}, "extra.weight"),
    ],
)
def test_broken_tensors_are_named(folder, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        dit_bridge.load_directory(copy_model(folder, tmp_path, change(raw_tensors(folder))))


@one_per_family
def test_buffers_and_wrapper_prefixes_are_accepted(folder, tmp_path):
    tensors = {f"module._orig_mod.{name}": v for name, v in raw_tensors(folder).items()}
    tensors["module.noise.empty"] = np.zeros((), np.float32)
    model = dit_bridge.load_directory(copy_model(folder, tmp_path, tensors))
    assert_same_tree(model.params, dit_cases.load(folder).params)


def test_sharded_weights(tmp_path):
    (folder,) = CASES[0].values
    copy_model(folder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(raw_tensors(folder))
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        shard = f"model-{number}.safetensors"
        torch_bridge.write_safetensors(
            tmp_path / shard, {name: raw_tensors(folder)[name] for name in part}
        )
        index |= dict.fromkeys(part, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same_tree(dit_bridge.load_directory(tmp_path).params, dit_cases.load(folder).params)


def test_unpublished_name_says_what_to_do():
    with pytest.raises(UserError, match="never published.*local directory"):
        store.load_backbone("kuleshov-group/sedd-owt")
