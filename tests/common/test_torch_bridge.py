"""Reading PyTorch checkpoints and applying name tables."""

import json

import numpy as np
import pytest

from common import torch_bridge as tb
from common.errors import UserError

RULES = (
    tb.Rule("embed.weight", "embed/embedding"),
    tb.Rule("layers.{i}.q.weight", "layers/q/kernel", tb.linear()),
    tb.Rule("layers.{i}.o.weight", "layers/o/kernel", tb.linear(input_axes=2)),
    tb.Rule("layers.{i}.norm.weight", "layers/norm/scale"),
)
SHAPES = {
    "embed/embedding": (7, 6),
    "layers/q/kernel": (3, 6, 4, 2),
    "layers/o/kernel": (3, 4, 2, 6),
    "layers/norm/scale": (3, 6),
}


def make_tensors(seed: int = 0) -> tb.Tensors:
    rng = np.random.default_rng(seed)
    tensors = {"embed.weight": rng.standard_normal((7, 6))}
    for i in range(3):
        tensors[f"layers.{i}.q.weight"] = rng.standard_normal((8, 6))
        tensors[f"layers.{i}.o.weight"] = rng.standard_normal((6, 8))
        tensors[f"layers.{i}.norm.weight"] = rng.standard_normal(6)
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def test_import_places_layers_and_transposes_linear_maps():
    tensors = make_tensors()
    params = tb.import_state(tensors, RULES, SHAPES)
    assert {p: v.shape for p, v in tb.flatten(params).items()} == SHAPES
    x = np.random.default_rng(1).standard_normal(6).astype(np.float32)
    heads = np.einsum("d,dhk->hk", x, params["layers"]["q"]["kernel"][1])
    np.testing.assert_allclose(
        heads.reshape(-1), tensors["layers.1.q.weight"] @ x, rtol=1e-5, atol=1e-6
    )
    out = np.einsum("hk,hkd->d", heads, params["layers"]["o"]["kernel"][2])
    np.testing.assert_allclose(
        out, tensors["layers.2.o.weight"] @ heads.reshape(-1), rtol=1e-5, atol=1e-6
    )


def test_export_is_the_exact_inverse():
    tensors = make_tensors()
    back = tb.export_state(tb.import_state(tensors, RULES, SHAPES), RULES)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].tobytes() == value.tobytes()


def test_unknown_tensor_is_named_and_can_be_allowed():
    tensors = make_tensors() | {"extra.inv_freq": np.zeros(2)}
    with pytest.raises(UserError, match=r"unknown tensor 'extra\.inv_freq'"):
        tb.import_state(tensors, RULES, SHAPES)
    tb.import_state(tensors, RULES, SHAPES, allow=["*inv_freq"])


def test_missing_tensor_is_named_with_its_parameter():
    tensors = make_tensors()
    del tensors["layers.2.q.weight"]
    with pytest.raises(UserError, match=r"missing tensor 'layers\.2\.q\.weight'.*layers/q/kernel"):
        tb.import_state(tensors, RULES, SHAPES)


def test_misshaped_tensor_is_named_with_both_shapes():
    # Transposed, same number of values: a silent reshape would scramble it.
    tensors = make_tensors()
    tensors["layers.0.o.weight"] = tensors["layers.0.o.weight"].T
    with pytest.raises(UserError, match=r"'layers\.0\.o\.weight'.*\(8, 6\).*o/kernel.*\(6, 8\)"):
        tb.import_state(tensors, RULES, SHAPES)


@pytest.mark.parametrize(
    "rule", [tb.Rule("embed.weight", "other"), tb.Rule("other.weight", "embed/embedding")]
)
def test_tables_that_set_something_twice_are_refused(rule):
    with pytest.raises(UserError, match="twice"):
        tb.import_state(make_tensors(), (*RULES, rule), {**SHAPES, "other": (7, 6)})


def test_parameters_without_a_rule_are_refused():
    params = tb.import_state(make_tensors(), RULES, SHAPES)
    params["stray"] = np.zeros(2)
    with pytest.raises(UserError, match="'stray' has no tensor name"):
        tb.export_state(params, RULES)


def test_safetensors_round_trip_and_upcast(tmp_path):
    import ml_dtypes

    value = np.linspace(-3, 3, 12).reshape(3, 4)
    source = {
        "half": value.astype(np.float16),
        "brain": value.astype(ml_dtypes.bfloat16),
        "double": value,
        "ids": np.arange(3),
    }
    tb.write_safetensors(tmp_path / "model.safetensors", source)
    read = tb.read_tensors(tmp_path)
    assert read["ids"].dtype == np.int64
    for name in ("half", "brain", "double"):
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], source[name].astype(np.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_safetensors_needs_no_torch(tmp_path):
    import subprocess
    import sys

    tb.write_safetensors(tmp_path / "model.safetensors", make_tensors())
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from common.torch_bridge import read_tensors\n"
        f"assert len(read_tensors({str(tmp_path)!r})) == 10"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_truncated_file_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    tb.write_safetensors(file, make_tensors())
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="model.safetensors") as caught:
        tb.read_tensors(file)
    assert "\n" not in str(caught.value)


def test_sharded_files(tmp_path):
    tensors = make_tensors()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:4], "model-2.safetensors": names[4:]}
    for shard, part in shards.items():
        tb.write_safetensors(tmp_path / shard, {n: tensors[n] for n in part})
    weight_map = {n: shard for shard, part in shards.items() for n in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    read = tb.read_tensors(tmp_path)
    assert all(np.array_equal(read[n], tensors[n]) for n in names) and len(read) == len(names)

    index.write_text(json.dumps({"weight_map": weight_map | {"gone": "model-1.safetensors"}}))
    with pytest.raises(UserError, match="'gone' is not in its shard"):
        tb.read_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="model-2.safetensors"):
        tb.read_tensors(tmp_path)


def test_shards_outside_the_directory_are_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(UserError, match="outside"):
        tb.read_tensors(tmp_path)


def test_wrapper_prefixes_are_stripped_and_collisions_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    tb.write_safetensors(file, {"module._orig_mod.a.b": np.ones(2), "state.model.c": np.ones(1)})
    assert sorted(tb.read_tensors(file)) == ["a.b", "c"]
    assert sorted(tb.read_tensors(file, strip=())) == ["module._orig_mod.a.b", "state.model.c"]
    tb.write_safetensors(file, {"module.a": np.ones(2), "a": np.ones(2)})
    with pytest.raises(UserError, match="'a' occurs twice"):
        tb.read_tensors(file)


def test_directories_without_one_clear_weight_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="no weights in"):
        tb.read_tensors(tmp_path)
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="several weight files.*a.ckpt, b.ckpt"):
        tb.read_tensors(tmp_path)
    with pytest.raises(UserError, match="neither a file nor a directory"):
        tb.read_tensors(tmp_path / "absent")


@pytest.mark.torch
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"m": state["a"] * 0}},
        lambda state: {"state": {"model": {f"model.{k}": v for k, v in state.items()}}},
        lambda state: {"model": state, "ema": {"shadow_params": list(state.values())}},
        lambda state: {
            "state": {
                "model": {k: v * 0 for k, v in state.items()},
                "algorithms": [["EMA", {"ema_model": {"named_parameters_dict": state}}]],
            }
        },
    ],
    ids=["flat", "lightning", "composer", "model-ema", "composer-ema"],
)
def test_training_checkpoints(tmp_path, wrap):
    import torch

    state = {"a": torch.arange(4.0).reshape(2, 2).t(), "b.c": torch.ones(3, dtype=torch.bfloat16)}
    torch.save(wrap(state), tmp_path / "last.ckpt")
    read = tb.read_tensors(tmp_path)
    assert sorted(read) == ["a", "b.c"]
    np.testing.assert_array_equal(read["a"], [[0, 2], [1, 3]])
    assert read["b.c"].dtype == np.float32


class Malice:
    """Would create a file when unpickled carelessly."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.torch
def test_pickles_with_code_are_refused(tmp_path):
    import torch

    torch.save({"a": Malice(tmp_path / "created")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin") as caught:
        tb.read_tensors(tmp_path)
    assert not (tmp_path / "created").exists() and "\n" not in str(caught.value)
