"""Universal Transformers of all tasks against recordings: outputs, losses, gradients."""

import contextlib
import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halting_jax import ut_act
from halting_jax.ponder_sums import ponder_report, ponder_sums
from halting_jax.signals import Signals, make_signals, sinusoids
from halting_jax.types import Batch, Outputs, Ponder, TaskShape
from halting_jax.universal_transformer import (
    encode,
    halting_rule,
    hop_functions,
    make_universal_transformer,
)
from halting_jax.ut_decoder import decode_states
from halting_jax.ut_network import UniversalTransformer
from halting_jax.ut_settings import UtSettings
from halting_jax.ut_torch_names import export_ut, import_ut
from tests.parity.fixtures import fixture_root

IGNORED = -100  # target of positions that are not scored, in the recordings
PAD = 0
STATISTICS = {  # recorded name: ours
    "mean_steps": "steps",
    "steps_p50": "steps_p50",
    "steps_p90": "steps_p90",
    "forced_halt_ratio": "halt_forced_ratio",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One recording as our model sees it, and what it says."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    shape: TaskShape
    settings: UtSettings
    batch: Batch
    fixed_steps: int


def load(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(path) as content:
        arrays = {name: content[name] for name in content.files if name != "meta_json"}
        return json.loads(str(content["meta_json"])), arrays


def files(accepts: Callable[[dict[str, Any]], bool]) -> list[Any]:
    """One test case per recording whose description is accepted."""
    found = sorted((fixture_root() / "halting").glob("*.npz"))
    return [pytest.param(path, id=path.stem) for path in found if accepts(load(path)[0])]


def is_ut(meta: dict[str, Any]) -> bool:
    return meta["kind"] == "ut_puzzle" or meta.get("model_type") == "universal_transformer"


def is_recorded_per_position(meta: dict[str, Any]) -> bool:
    return meta["kind"] == "ut_puzzle" and meta["act"] and not meta["fixed_ponder_steps"]


UT_FILES = files(is_ut)


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    cut = len(prefix) + 1
    return {name[cut:]: value for name, value in arrays.items() if name.startswith(f"{prefix}/")}


def rows(**fields: Any) -> Batch:
    """A batch with the masks all true unless given."""
    inputs, targets = fields["inputs"], fields["targets"]
    length = inputs.shape[:2]
    defaults = {
        "input_mask": np.ones(length, bool),
        "target_mask": np.ones(targets.shape, bool),
        "decoder_inputs": np.zeros((length[0], 0), np.int32),
        "difficulty": np.zeros(length[0], np.int32),
    }
    return Batch(**{**defaults, **fields})


def case(path: Path) -> Case:
    meta, arrays = load(path)
    common = {
        "hidden_size": meta["hidden_size"],
        "heads": meta["num_heads"],
        "key_depth": meta["key_depth"],
        "value_depth": meta["value_depth"],
        "filter_size": meta["filter_size"],
        "max_hops": meta["max_hops"],
        "act": meta["act"],
        "act_epsilon": meta.get("epsilon", 0.01),
        "halt_bias": meta["halt_bias_init"],
        "attention_mode": meta.get("attention_mode", "auto"),
        "embedding_size": meta.get("embedding_size", meta["hidden_size"]),
    }
    given = under(arrays, "in")
    if meta["kind"] == "ut_puzzle":
        vocab = meta["vocab_size"]
        shape = TaskShape("grid", meta["seq_len"], vocab, classes=vocab)
        batch = rows(inputs=given["x"], targets=given["y"])
    elif meta["kind"] == "parity":
        shape = TaskShape("vector", given["x"].shape[1], 1)
        batch = rows(inputs=given["x"][..., 0], targets=given["target"].astype(np.int32))
    elif meta["kind"] == "addition":
        x, y = (np.swapaxes(given[name], 0, 1) for name in ("x", "y"))  # [B, T, .]
        valid = np.arange(x.shape[1]) < given["lengths"][:, None]
        _, length, features = x.shape
        shape = TaskShape("frames", length, features, y.shape[-1], meta["num_classes"], causal=True)
        batch = rows(inputs=x, input_mask=valid, targets=y, target_mask=y != meta["mask_value"])
    else:
        vocab = arrays["param/embedding.weight"].shape[0]
        shape = TaskShape("seq2seq", given["src"].shape[1], vocab, classes=vocab)
        batch = rows(
            inputs=given["src"],
            input_mask=given["src"] != PAD,
            targets=given["target"],
            target_mask=given["target"] != PAD,
            decoder_inputs=given["dec_in"],
        )
    fixed = meta.get("fixed_ponder_steps") or 0
    return Case(meta, arrays, shape, UtSettings(**common), batch, fixed)


def recorded_signals(c: Case) -> tuple[Signals, float]:
    """The tables of the recording, and how exact results with them are."""
    stored = under(c.arrays, "const")
    if stored:
        tables = (jnp.asarray(stored[name][0]) for name in ("seq_signal", "hop_signal"))
        return Signals(*tables), 1e-9
    length = max(c.batch.inputs.shape[1], c.batch.decoder_inputs.shape[1])
    sizes = (length, c.settings.hidden_size), (c.settings.max_hops, c.settings.hidden_size)
    with_torch = importlib.util.find_spec("torch") is not None
    position, hop = (torch_sinusoids(*s) if with_torch else sinusoids(*s) for s in sizes)
    return Signals(jnp.asarray(position), jnp.asarray(hop)), 1e-9 if with_torch else 1e-6


def torch_sinusoids(length: int, channels: int) -> np.ndarray:
    """The table as PyTorch's float32 functions round it."""
    import torch

    half = channels // 2
    scale = -math.log(1e4) / max(half - 1, 1)
    inverse = torch.exp(torch.arange(half, dtype=torch.float32) * scale)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse
    table = torch.zeros(length, channels)
    table[:, : 2 * half] = torch.cat([torch.sin(angles), torch.cos(angles)], 1)
    return table.numpy()


def loss(c: Case, outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Classification and ponder loss of a recording."""
    logits, scored = outputs.logits, batch.target_mask
    if c.shape.classes == 1:
        errors = jax.nn.softplus(logits) - logits * batch.targets
    else:
        targets = jnp.where(scored, batch.targets, 0)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        errors = jax.nn.logsumexp(logits, -1) - chosen
    ponder = outputs.ponder
    cost = jnp.sum(jnp.where(ponder.mask, ponder.cost, 0)) / jnp.sum(ponder.mask)
    classification = jnp.sum(jnp.where(scored, errors, 0)) / jnp.sum(scored)
    return classification, c.meta["act_loss_weight"] * cost


def forward(c: Case, params: Any, batch: Batch, signals: Signals | None) -> Outputs:
    """What our model makes of a recording's inputs."""
    if c.shape.form != "seq2seq":
        model = make_universal_transformer(c.shape, c.settings)
        return model.apply(params, batch, c.fixed_steps, signals=signals)
    # The recorded encoder masks no padding (its decoder does): to it every position is there.
    net = UniversalTransformer(c.shape, c.settings).bind({"params": params})
    if signals is None:
        length = max(batch.inputs.shape[1], batch.decoder_inputs.shape[1])
        signals = make_signals(length, c.settings.hidden_size, c.settings.max_hops)
    unmasked = dataclasses.replace(batch, input_mask=jnp.ones_like(batch.input_mask))
    encoded, ponder = encode(net, unmasked, signals)
    return Outputs(net.logits(decode_states(net, batch, encoded, signals)), ponder)


@contextlib.contextmanager
def precision(bits: int) -> Any:
    with jax.enable_x64(bits == 64):
        yield


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("path", UT_FILES)
def test_outputs_and_gradients(path: Path, bits: int) -> None:
    c = case(path)
    signals, exact = recorded_signals(c)
    dtype = np.float64 if bits == 64 else np.float32
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    if bits == 64:
        tolerance = {"rtol": 0, "atol": exact}

    def objective(params: Any, batch: Batch, signals: Signals | None) -> Any:
        outputs = forward(c, params, batch, signals)
        classification, ponder = loss(c, outputs, batch)
        most = max(c.settings.max_hops, c.fixed_steps)
        sums = ponder_sums(outputs.ponder, most)
        return classification + ponder, (outputs, classification, ponder, sums)

    with precision(bits):
        params = import_ut(under(c.arrays, "param"), c.shape, c.settings)
        params, batch = jax.tree.map(lambda x: _cast(x, dtype), (params, c.batch))
        run = jax.jit(jax.value_and_grad(objective, has_aux=True))
        results, grads = run(params, batch, signals if bits == 64 else None)
        total, (outputs, classification, ponder, sums) = jax.device_get(results)
        grads = export_ut(jax.device_get(grads), c.shape, c.settings)

    assert outputs.logits.dtype == dtype
    _compare(c, outputs, float(classification), float(ponder), float(total), grads, tolerance)
    recorded = under(c.arrays, "stat")
    if not np.all(outputs.ponder.mask):
        return  # the recorded statistics count padding
    report = ponder_report(sums, c.settings.max_hops)
    for name, ours in STATISTICS.items():
        if name in recorded:
            np.testing.assert_allclose(report[ours], recorded[name], rtol=0, atol=1e-6)
    for name in ("remainder_mean", "remainder_std"):
        if name in recorded:
            np.testing.assert_allclose(report[name], recorded[name], **tolerance)
    # Without halting the toy tasks recorded an empty histogram.
    if "n_updates_histogram" in recorded and np.any(recorded["n_updates_histogram"]):
        np.testing.assert_array_equal(report["n_updates_hist"], recorded["n_updates_histogram"])


def _cast(x: Any, dtype: Any) -> Any:
    x = np.asarray(x)
    return x.astype(dtype) if x.dtype.kind == "f" else x


def _compare(
    c: Case,
    outputs: Outputs,
    classification: float,
    ponder: float,
    total: float,
    grads: dict[str, np.ndarray],
    tolerance: dict[str, Any],
) -> None:
    """Outputs, losses and gradients against the recording."""
    recorded, arrays = under(c.arrays, "out"), c.arrays
    logits, mask = outputs.logits, outputs.ponder.mask
    wanted = recorded["logits"]
    wanted_grads = under(arrays, "grad")
    if c.meta["kind"] == "addition":
        wanted = np.swapaxes(wanted, 0, 1)
        if not mask.all():  # the rebuild's own losses are recorded apart from the original's
            logits, wanted = logits[mask], wanted[mask]
            recorded, wanted_grads = under(arrays, "masked"), under(arrays, "masked_grad")
    np.testing.assert_allclose(logits, wanted, **tolerance)
    steps = np.where(mask, outputs.ponder.steps, 0)
    if "n_updates" in recorded:
        np.testing.assert_array_equal(steps, recorded["n_updates"])
        np.testing.assert_allclose(outputs.ponder.remainder, recorded["remainders"], **tolerance)
    if "steps" in recorded:  # per example; recorded means are rounded
        np.testing.assert_allclose(steps.sum(1) / mask.sum(1), recorded["steps"], atol=1e-6)
    if "mean_steps" in recorded:
        np.testing.assert_allclose(steps.sum() / mask.sum(), recorded["mean_steps"], atol=1e-6)
    losses = {
        ("loss_cls", "loss_classification"): classification,
        ("act_loss", "ponder_cost"): ponder,
        ("loss", "loss_total"): total,
    }
    for names, value in losses.items():
        (name,) = (name for name in names if name in recorded)
        np.testing.assert_allclose(value, recorded[name], **tolerance, err_msg=name)
    assert set(grads) == set(wanted_grads)
    for name, gradient in grads.items():
        np.testing.assert_allclose(gradient, wanted_grads[name], **tolerance, err_msg=name)


@pytest.mark.parametrize("path", files(is_recorded_per_position))
def test_every_hop(path: Path) -> None:
    """Halting logits of every hop, and the mixed state before the norm."""
    c = case(path)
    with precision(64):
        params = import_ut(under(c.arrays, "param"), c.shape, c.settings)
        params, batch = jax.tree.map(lambda x: _cast(x, np.float64), (params, c.batch))
        signals, _ = recorded_signals(c)

        @jax.jit
        def run(params: Any, batch: Batch, signals: Signals) -> Any:
            net = UniversalTransformer(c.shape, c.settings).bind({"params": params})
            functions = hop_functions(net, batch.input_mask, signals)
            hop = ut_act.make_hop(functions, halting_rule(c.settings))

            def step(carry: Any, _: None) -> Any:
                state = ut_act.add_signals(carry.state, signals, carry.hop)
                return hop(carry), net.halting_logits(state, batch.input_mask)

            carry = ut_act.start(net.embed(batch.inputs, batch.input_mask), batch.input_mask)
            return jax.lax.scan(step, carry, None, length=c.settings.max_hops)

        carry, logits = run(params, batch, signals)
        recorded = under(c.arrays, "out")
        count = recorded["halt_logits"].shape[0]  # hops until nobody ran
        np.testing.assert_allclose(logits[:count], recorded["halt_logits"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(
            carry.mixed, recorded["encoder_state_before_norm"], rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("path", UT_FILES)
def test_names_survive_the_round_trip(path: Path) -> None:
    c = case(path)
    tensors = under(c.arrays, "param")
    again = export_ut(import_ut(tensors, c.shape, c.settings), c.shape, c.settings)
    assert set(again) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("path", files(lambda meta: meta["kind"] == "sinusoid"))
def test_signals(path: Path) -> None:
    _, arrays = load(path)
    for name, value in arrays.items():
        table = sinusoids(*value.shape[1:])
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, value[0], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("path", files(lambda meta: meta["kind"] == "stats"))
def test_step_statistics(path: Path) -> None:
    meta, arrays = load(path)
    steps = jnp.asarray(arrays["in/n_updates"], jnp.float32)
    # Calls that do not count must not show.
    padded = jnp.concatenate([steps, jnp.full_like(steps, 3)])
    mask = jnp.arange(len(padded))[:, None] < len(steps)
    ponder = Ponder(
        cost=padded,
        steps=padded,
        remainder=padded,
        forced=padded > 0,
        mask=jnp.broadcast_to(mask, padded.shape),
        mass=jnp.zeros(0),
        executed=jnp.int32(0),
    )
    sums = jax.device_get(ponder_sums(ponder, int(steps.max())))
    report = ponder_report(sums, meta["max_hops"])
    np.testing.assert_array_equal(report["n_updates_hist"], arrays["out/histogram"])
    for name in ("mean_steps", "steps_p50", "steps_p90"):
        value, wanted = report[STATISTICS[name]], arrays[f"out/{name}"]
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6)
