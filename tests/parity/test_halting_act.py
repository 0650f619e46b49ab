"""Halting recurrence and ACT-RNN models against recorded values of the original.

Loss values come from the few lines below, not from the tasks, so that a failure points at the
models.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.torch_bridge import export_state, import_state
from halting_jax.act import ActResult, act, unroll
from halting_jax.act_calls import act_calls
from halting_jax.act_rnn import ActRnnSettings, make_act_rnn
from halting_jax.act_step import ActSettings, init_act
from halting_jax.act_torch_names import act_rules, export_act_rnn, import_act_rnn, unit_rules
from halting_jax.cells import input_product
from halting_jax.types import Batch, Outputs, Ponder, TaskShape
from tests.parity.halting_cases import Case, case_name, cases

PRECISIONS = ("float64", "float32")
IGNORED = -100  # features and targets of padding in the original


@contextmanager
def precision(name: str) -> Iterator[Any]:
    """Runs the block in a float type; yields that type."""
    with jax.enable_x64(name == "float64"):
        yield jnp.dtype(name)


def close(actual: Any, wanted: Any, name: str, message: str = "") -> None:
    """Within 1e-9 in float64, within rtol 1e-4 and atol 1e-5 in float32."""
    rtol, atol = (0, 1e-9) if name == "float64" else (1e-4, 1e-5)
    np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=atol, err_msg=message)


def convert(tree: Any, dtype: Any) -> Any:
    """Floating leaves in another type."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else None), tree
    )


def check_gradients(
    case: Case, actual: dict[str, np.ndarray], name: str, prefix: str = "grad"
) -> None:
    """Every recorded gradient of a weight is met, and there are no others."""
    wanted = case.part(prefix)
    inputs = [key for key in wanted if key.startswith("in_")]
    assert set(actual) == set(wanted) - set(inputs)
    for key, value in actual.items():
        close(value, wanted[key], name, key)


# ------------------------------------------------------------------------------- single calls
def unit_params(case: Case) -> Any:
    """Weights of a bare ACT module."""
    tensors = case.part("param")
    hidden, width = case.arrays["in/w_state"].shape[-1], case.arrays["in/x"].shape[-1]
    shapes = jax.eval_shape(
        lambda: init_act(jax.random.key(0), case.meta["cell_type"], width, hidden, 0.0)
    )
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
    }
    return import_state(tensors, unit_rules(path=""), flat)


def loop_settings(case: Case, execution: str) -> ActSettings:
    meta = case.meta
    return ActSettings(
        meta["cell_type"], meta["time_limit"], meta["epsilon"], execution=execution, chunk=4
    )


def run_call(case: Case, execution: str, dtype: Any) -> tuple[Any, Any]:
    """(objective, (result, cost)), and gradients by weights, input and initial state."""
    meta, arrays = case.meta, case.arrays
    params = convert(unit_params(case), dtype)
    x, w_state = (jnp.asarray(arrays[f"in/{k}"], dtype) for k in ("x", "w_state"))
    initial = jnp.asarray(arrays.get("in/h0", np.zeros_like(arrays["in/w_state"])), dtype)
    settings = loop_settings(case, execution)

    def objective(params: Any, x: jax.Array, initial: jax.Array) -> Any:
        result = act(
            params,
            input_product(params["cell"], x),
            (initial,),
            settings,
            fixed_steps=meta["fixed_ponder_steps"] or 0,
        )
        cost = meta["time_penalty"] * jnp.mean(result.cost)
        return jnp.sum(result.state[0] * w_state) + cost, (result, cost)

    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))
    return jax.device_get(run(params, x, initial))


@pytest.mark.parametrize(
    "kind", ["act_cell", "seq_lstm_paper", "act_puzzle", "parity", "addition", "copy_reverse"]
)
def test_there_are_cases(kind: str) -> None:
    assert any(case.meta.get("model_type", "act_rnn") == "act_rnn" for case in cases(kind))


# Every case by the loop that trains, and by one of the others in turn.
RUNS = [
    (case, execution)
    for i, case in enumerate(cases("act_cell"))
    for execution in ("while", ("scan", "chunked")[i % 2])
]


@pytest.mark.parametrize(("case", "execution"), RUNS, ids=case_name)
def test_call(case: Case, execution: str) -> None:
    name = "float64"
    with precision(name) as dtype:
        (value, (result, cost)), (to_params, to_x, to_initial) = run_call(case, execution, dtype)
    check_call(case, result, name)
    out = case.part("out")
    close(value, out["objective"], name)
    close(cost, out["ponder_cost"].sum(), name)
    check_gradients(case, export_state(to_params, unit_rules(path="")), name)
    close(to_x, case.arrays["grad/in_x"], name)
    if "grad/in_h0" in case.arrays:
        close(to_initial, case.arrays["grad/in_h0"], name)


@pytest.mark.parametrize("case", cases("act_cell"), ids=case_name)
def test_call_in_float32(case: Case) -> None:
    name = "float32"
    with precision(name) as dtype:
        (value, (result, _)), (to_params, to_x, _) = run_call(case, "while", dtype)
    check_call(case, result, name)
    close(value, case.arrays["out/objective"], name)
    check_gradients(case, export_state(to_params, unit_rules(path="")), name)
    close(to_x, case.arrays["grad/in_x"], name)


def check_call(case: Case, result: ActResult, name: str) -> None:
    """State, steps and statistics of one call."""
    out, rows = case.part("out"), len(result.steps)
    close(result.state[0], out["state"], name)
    np.testing.assert_array_equal(result.steps, out["steps"])
    if "n_plus_r" in out:
        close(result.cost, out["n_plus_r"], name)
        natural, forced = 1 - np.mean(result.forced), np.mean(result.forced)
    else:  # steps were fixed: nobody halted
        natural, forced = 0.0, 0.0
        assert not np.any(result.forced)
    check_statistics(case, result.remainder, result.steps, result.mass / rows, name)
    assert case.arrays["stat/natural_halt_ratio"] == pytest.approx(natural)
    assert case.arrays["stat/forced_halt_ratio"] == pytest.approx(forced)


def check_statistics(
    case: Case, remainder: Any, steps: Any, curve: Any, name: str = "float64"
) -> None:
    """Moments of the remainder, quantiles of the steps, curve of the mass."""
    stat = case.part("stat")
    close(np.mean(remainder), stat["remainder_mean"], name)
    close(np.std(np.asarray(remainder, np.float64)), stat["remainder_std"], "float32")
    for q in (50, 90):
        np.testing.assert_allclose(np.percentile(steps, q), stat[f"steps_p{q}"], atol=1e-6)
    close(curve, stat["accumulated_p_curve"], name)


@pytest.mark.parametrize(
    "case", [c for c in cases("act_cell") if "out/halt_logits" in c.arrays], ids=case_name
)
def test_halting_logits(case: Case) -> None:
    with precision("float64") as dtype:
        params = convert(unit_params(case), dtype)
        initial = jnp.asarray(
            case.arrays.get("in/h0", np.zeros_like(case.arrays["in/w_state"])), dtype
        )
        product = input_product(params["cell"], jnp.asarray(case.arrays["in/x"], dtype))
        logits = np.asarray(unroll(params, product, (initial,), loop_settings(case, "scan"))[1])
    wanted = case.arrays["out/halt_logits"]
    close(logits[: len(wanted)], wanted, "float64")


@pytest.mark.parametrize("execution", ["while", "scan"])
@pytest.mark.parametrize("case", cases("seq_lstm_paper"), ids=case_name)
def test_sequence_with_carried_memory(case: Case, execution: str) -> None:
    arrays, penalty = case.arrays, case.meta["time_penalty"]
    with precision("float64") as dtype:
        params = convert(unit_params(case), dtype)
        x = jnp.swapaxes(jnp.asarray(arrays["in/x"], dtype), 0, 1)  # [B, T, I]
        zeros = jnp.zeros((x.shape[0], arrays["in/w_state"].shape[-1]), dtype)
        settings = loop_settings(case, execution)

        def objective(params: Any) -> Any:
            products = input_product(params["cell"], x)
            valid = jnp.ones(x.shape[:2], bool)
            calls = act_calls(params, products, (zeros, zeros), settings, valid=valid)
            states = jnp.swapaxes(calls.hidden, 0, 1)
            cost = penalty * jnp.mean(calls.cost)
            return jnp.sum(states * arrays["in/w_state"]) + cost, (calls, states, cost)

        run = jax.jit(jax.value_and_grad(objective, has_aux=True))
        (value, (calls, states, cost)), grads = jax.device_get(run(params))
    out = case.part("out")
    close(states, out["states"], "float64")
    close(calls.state[1], out["final_c"], "float64")
    np.testing.assert_array_equal(calls.steps.T, out["n"])
    close(calls.remainder.T, out["remainder"], "float64")
    close(cost, out["ponder_cost"], "float64")
    close(value, out["objective"], "float64")
    check_gradients(case, export_state(grads, unit_rules(path="")), "float64")


# ------------------------------------------------------------------------------------- models
def model_settings(case: Case, **changes: Any) -> ActRnnSettings:
    meta = case.meta
    return ActRnnSettings(
        hidden_size=meta["hidden_size"],
        embedding_size=meta.get("embedding_size", 1),
        cell=meta["cell_type"],
        time_limit=meta["time_limit"],
        epsilon=meta.get("epsilon", 0.01),
        halt_bias=meta["halt_bias_init"],
        lstm_reset_cell=True,  # as in the original
        **changes,
    )


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the scored answers."""
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, jnp.where(mask, targets, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(mask, picked, 0)) / jnp.sum(mask)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean with logits."""
    return jnp.mean(jax.nn.softplus(logits) - logits * targets[..., 0]) + 0 * jnp.sum(mask)


def make_batch(inputs: Any, targets: Any, target_mask: Any, **changes: Any) -> Batch:
    fields = {
        "inputs": jnp.asarray(inputs),
        "input_mask": jnp.ones(inputs.shape[:2], bool),
        "targets": jnp.asarray(targets),
        "target_mask": jnp.asarray(target_mask),
        "decoder_inputs": jnp.zeros((len(inputs), 0), jnp.int32),
        "difficulty": jnp.ones(len(inputs), jnp.int32),
    }
    return Batch(**(fields | changes))


Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def run_model(
    case: Case,
    shape: TaskShape,
    settings: ActRnnSettings,
    batch: Batch,
    loss: Loss,
    dtype: Any,
) -> tuple[tuple[Any, Any, Any], dict[str, np.ndarray], Outputs]:
    """((total, classification, ponder), gradients by PyTorch name, outputs)."""
    tensors = case.part("param")
    params = import_act_rnn(tensors, shape, settings)
    again = export_act_rnn(params, shape, settings)
    assert set(again) == set(tensors)
    for key, value in again.items():
        np.testing.assert_array_equal(value, tensors[key])
    model = make_act_rnn(shape, settings)
    batch = convert(batch, dtype)

    def objective(params: Any) -> Any:
        outputs = model.apply(params, batch)
        ponder = outputs.ponder
        costs = jnp.where(ponder.mask, ponder.cost, 0)
        cost = case.meta["time_penalty"] * jnp.sum(costs) / jnp.sum(ponder.mask)
        classification = loss(outputs.logits, batch.targets, batch.target_mask)
        return classification + cost, (classification, cost, outputs)

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (total, (classification, cost, outputs)), grads = jax.device_get(run(convert(params, dtype)))
    return (total, classification, cost), export_state(grads, act_rules(shape, settings)), outputs


def mean_steps(ponder: Ponder) -> float:
    return float(np.sum(np.where(ponder.mask, ponder.steps, 0)) / np.sum(ponder.mask))


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("case", cases("act_puzzle"), ids=case_name)
def test_puzzle(case: Case, name: str) -> None:
    meta, arrays = case.meta, case.arrays
    vocab = meta["vocab_size"]
    shape = TaskShape("grid", meta["seq_len"], vocab, classes=vocab)
    with precision(name) as dtype:
        batch = make_batch(arrays["in/x"], arrays["in/y"], np.ones(arrays["in/y"].shape, bool))
        settings = model_settings(case)
        losses, grads, outputs = run_model(case, shape, settings, batch, cross_entropy, dtype)
    out, ponder = case.part("out"), outputs.ponder
    close(outputs.logits, out["logits"], name)
    for value, key in zip(losses, ("loss", "loss_cls", "ponder_cost"), strict=True):
        close(value, out[key], name, key)
    np.testing.assert_array_equal(ponder.steps[:, 0], out["steps"])
    check_gradients(case, grads, name)
    curve = ponder.mass / len(batch.inputs)
    check_statistics(case, ponder.remainder, ponder.steps, curve, name)
    assert case.arrays["stat/forced_halt_ratio"] == pytest.approx(np.mean(ponder.forced))


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("case", cases("parity", model_type="act_rnn"), ids=case_name)
def test_parity(case: Case, name: str) -> None:
    meta, arrays = case.meta, case.arrays
    bits = arrays["in/x"][..., 0]  # [B, bits]
    width = meta["input_width"]
    missing = width - bits.shape[1]
    mask = np.pad(np.ones(bits.shape, bool), ((0, 0), (0, missing)))
    padded = np.pad(bits, ((0, 0), (0, missing)), constant_values=np.nan)
    shape = TaskShape("vector", width, width)
    targets = arrays["in/target"].astype(np.int32)[:, None]
    with precision(name) as dtype:
        batch = make_batch(
            padded, targets, np.ones(targets.shape, bool), input_mask=jnp.asarray(mask)
        )
        settings = model_settings(case, input_proj=not meta["cell_on_raw_bits"])
        losses, grads, outputs = run_model(
            case, shape, settings, batch, binary_cross_entropy, dtype
        )
    out = case.part("out")
    close(outputs.logits, out["logits"], name)
    for value, key in zip(
        losses, ("loss_total", "loss_classification", "ponder_cost"), strict=True
    ):
        close(value, out[key], name, key)
    np.testing.assert_array_equal(outputs.ponder.steps[:, 0], out["steps"])
    check_gradients(case, grads, name)


def addition_shape(case: Case) -> TaskShape:
    meta = case.meta
    return TaskShape(
        form="frames",
        length=meta["sequence_length"],
        features=meta["feature_size"],
        places=meta["target_size"],
        classes=meta["num_classes"],
    )


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("case", cases("addition", model_type="act_rnn"), ids=case_name)
def test_addition_as_the_original_pads(case: Case, name: str) -> None:
    """Every step counts, and padding of -100 enters the network."""
    arrays = case.arrays
    features, targets = (np.swapaxes(arrays[f"in/{k}"], 0, 1) for k in ("x", "y"))
    with precision(name) as dtype:
        batch = make_batch(features, targets, targets != IGNORED)
        losses, grads, outputs = run_model(
            case, addition_shape(case), model_settings(case), batch, cross_entropy, dtype
        )
    out = case.part("out")
    close(np.swapaxes(outputs.logits, 0, 1), out["logits"], name)
    for value, key in zip(
        losses, ("loss_total", "loss_classification", "ponder_cost"), strict=True
    ):
        close(value, out[key], name, key)
    np.testing.assert_allclose(mean_steps(outputs.ponder), out["mean_steps"], atol=1e-6)
    check_gradients(case, grads, name)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize(
    "case",
    [c for c in cases("addition", model_type="act_rnn") if c.part("masked")],
    ids=case_name,
)
def test_addition_with_masks(case: Case, name: str) -> None:
    """What must come out when padding is masked; its content is not even a number."""
    arrays = case.arrays
    features, targets = (np.swapaxes(arrays[f"in/{k}"], 0, 1) for k in ("x", "y"))
    steps = np.arange(features.shape[1])
    valid = steps < arrays["in/lengths"][:, None]  # [B, T]
    features = np.where(valid[..., None], features, np.nan)
    with precision(name) as dtype:
        batch = make_batch(features, targets, targets != IGNORED, input_mask=jnp.asarray(valid))
        losses, grads, outputs = run_model(
            case, addition_shape(case), model_settings(case), batch, cross_entropy, dtype
        )
    masked = case.part("masked")
    for value, key in zip(
        losses, ("loss_total", "loss_classification", "ponder_cost"), strict=True
    ):
        close(value, masked[key], name, key)
    np.testing.assert_allclose(mean_steps(outputs.ponder), masked["mean_steps"], rtol=1e-6)
    assert not np.any(outputs.ponder.steps[~valid])
    check_gradients(case, grads, name, "masked_grad")


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("case", cases("copy_reverse", model_type="act_rnn"), ids=case_name)
def test_translation(case: Case, name: str) -> None:
    """The original ponders over padding too; only its loss leaves padding out."""
    meta, arrays = case.meta, case.arrays
    vocab = meta["vocab"]["symbols"][1] + 1
    source, given, targets = (arrays[f"in/{k}"] for k in ("src", "dec_in", "target"))
    shape = TaskShape("seq2seq", source.shape[1], vocab, classes=vocab)
    scored = jnp.asarray(targets != meta["vocab"]["pad"])

    def loss(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return cross_entropy(logits, targets, scored & mask)

    with precision(name) as dtype:
        batch = make_batch(
            source, targets, np.ones(targets.shape, bool), decoder_inputs=jnp.asarray(given)
        )
        losses, grads, outputs = run_model(case, shape, model_settings(case), batch, loss, dtype)
    out = case.part("out")
    close(outputs.logits, out["logits"], name)
    for value, key in zip(
        losses, ("loss_total", "loss_classification", "ponder_cost"), strict=True
    ):
        close(value, out[key], name, key)
    np.testing.assert_allclose(mean_steps(outputs.ponder), out["mean_steps"], atol=1e-6)
    check_gradients(case, grads, name)
    assert not np.any(grads["embedding.weight"][meta["vocab"]["pad"]])
