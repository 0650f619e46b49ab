"""ACT-RNN models of every task form: shapes, masks, pieces, decoding, names."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from halting_jax.act_decode import BOS, EOS, PAD, make_decode
from halting_jax.act_rnn import ActRnnSettings, make_act_rnn
from halting_jax.act_torch_names import export_act_rnn, import_act_rnn
from halting_jax.cells import input_product
from halting_jax.early_exit import with_early_exit
from halting_jax.types import Batch, Model, Outputs, TaskShape

ROWS, HIDDEN, LIMIT = 5, 6, 5
SHAPES = {
    "grid": TaskShape("grid", 4, 5, classes=5),
    "vector": TaskShape("vector", 7, 7),
    "frames": TaskShape("frames", 4, 3, places=2, classes=3),
    "answer": TaskShape("frames", 4, 3, readout="last"),
    "seq2seq": TaskShape("seq2seq", 4, 6, classes=6),
}
SIZES = {
    "grid": (ROWS, 4, 5),
    "vector": (ROWS,),
    "frames": (ROWS, 4, 2, 3),
    "answer": (ROWS,),
    "seq2seq": (ROWS, 3, 6),
}
LENGTHS = np.array([4, 2, 3, 1, 0])  # the last row is a filling


def settings(form: str, **changes: Any) -> ActRnnSettings:
    base = ActRnnSettings(
        hidden_size=HIDDEN,
        embedding_size=3,
        time_limit=LIMIT,
        halt_bias=-0.5,
        cell="lstm" if form in ("frames", "seq2seq") else "gru",
    )
    return dataclasses.replace(base, **changes)


def batch_of(form: str, padding: float = 0.0) -> Batch:
    """Rows of different lengths; `padding` stands wherever a mask is False."""
    shape, rng = SHAPES[form], np.random.default_rng(3)
    mask = np.arange(shape.length) < LENGTHS[:, None]
    scored = np.arange(3) < LENGTHS[:, None]
    given = np.where(scored, rng.integers(3, 6, scored.shape), padding)
    values: Any
    if shape.form in ("grid", "seq2seq"):
        values = np.where(mask, rng.integers(1, 5, mask.shape), padding).astype(np.int32)
    elif shape.form == "vector":
        values = np.where(mask, rng.normal(size=mask.shape), padding).astype(np.float32)
    else:
        values = rng.normal(size=(*mask.shape, shape.features))
        values = np.where(mask[..., None], values, padding).astype(np.float32)
    return Batch(
        inputs=jnp.asarray(values),
        input_mask=jnp.asarray(mask),
        targets=jnp.zeros(scored.shape, jnp.int32),
        target_mask=jnp.asarray(scored),
        decoder_inputs=jnp.asarray(np.nan_to_num(given), jnp.int32),
        difficulty=jnp.ones(ROWS, jnp.int32),
    )


def made(form: str, **changes: Any) -> tuple[Model, Any]:
    model = make_act_rnn(SHAPES[form], settings(form, **changes))
    params = jax.jit(model.init)(jax.random.key(0))
    if "halting" in params["act"]:
        params["act"]["halting"]["kernel"] *= 6  # rows differ in their steps
    return model, params


def assert_close(actual: Any, wanted: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 2e-6), actual, wanted)


def steps_alone(outputs: Outputs) -> Outputs:
    """Without what depends on how the rows were run."""
    ponder = dataclasses.replace(outputs.ponder, executed=0)
    return dataclasses.replace(outputs, ponder=ponder)


@pytest.mark.parametrize("form", SHAPES)
def test_shapes_masks_and_padding(form: str) -> None:
    model, params = made(form)
    garbage = 1e9 if form in ("grid", "seq2seq") else np.nan

    @jax.jit
    def run(params: Any, batch: Batch) -> Any:
        def loss(params: Any) -> Any:
            outputs = model.apply(params, batch)
            shown = outputs.logits
            if form in ("frames", "seq2seq"):  # what stands behind a row's end is not scored
                mask = batch.input_mask if form == "frames" else batch.target_mask
                shown = jnp.where(mask.reshape(*mask.shape, *(1,) * (shown.ndim - 2)), shown, 0)
            ponder = outputs.ponder
            return jnp.sum(jnp.sin(shown)) + jnp.sum(ponder.cost), (shown, outputs)

        return jax.grad(loss, has_aux=True)(params)

    grads, (shown, outputs) = run(params, batch_of(form))
    assert outputs.logits.shape == SIZES[form]
    calls = {"grid": 1, "vector": 1, "frames": 4, "answer": 4, "seq2seq": 7}[form]
    ponder = outputs.ponder
    for name in ("cost", "steps", "remainder", "forced", "mask"):
        assert getattr(ponder, name).shape == (ROWS, calls)
    assert ponder.mass.shape == (LIMIT,) and ponder.mass[-1] == pytest.approx(ponder.mask.sum())
    np.testing.assert_array_equal(ponder.steps > 0, ponder.mask)
    np.testing.assert_array_equal(ponder.cost > 1, ponder.mask)
    assert ponder.mask[0].all() and not ponder.mask[-1].any()
    assert len(set(np.asarray(ponder.steps[ponder.mask]))) > 1
    assert_close(run(params, batch_of(form, garbage))[0], grads)
    assert_close(run(params, batch_of(form, garbage))[1], (shown, outputs))
    assert run._cache_size() == 1
    zero = {
        "/".join(str(k.key) for k in path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]
        if not np.any(leaf)
    }
    assert not zero
    if form == "seq2seq":
        assert not np.any(params["embedding"][PAD]) and not np.any(grads["embedding"][PAD])


@pytest.mark.parametrize("form", ["frames", "seq2seq"])
def test_a_row_does_not_depend_on_the_others(form: str) -> None:
    model, params = made(form)
    run, batch = jax.jit(model.apply), batch_of(form)
    together = run(params, batch)
    for row in range(2):
        # The row itself beside copies of another, so that one program serves both.
        rows = jnp.asarray([3, row, 3, 3, 3])
        apart = run(params, jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch))
        np.testing.assert_allclose(apart.logits[1], together.logits[row], atol=2e-6)
        np.testing.assert_array_equal(apart.ponder.steps[1], together.ponder.steps[row])


@pytest.mark.parametrize("form", ["grid", "frames"])
def test_rows_that_leave_early_change_nothing(form: str) -> None:
    model, params = made(form)
    batch = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 4), batch_of(form))
    outputs, row_steps = jax.jit(with_early_exit(model))(params, batch)
    wanted = jax.jit(model.apply)(params, batch)
    assert_close(steps_alone(outputs), steps_alone(wanted))
    slowest = int(wanted.ponder.steps.sum(axis=1).max())
    assert row_steps < 4 * ROWS * slowest


@pytest.mark.parametrize("form", ["vector", "answer", "seq2seq"])
def test_without_halting(form: str) -> None:
    model, params = made(form, kind="none")
    assert model.max_steps == 1 and not model.halting_path and model.start is None
    assert "halting" not in params["act"]
    one = jax.jit(model.apply)(params, batch_of(form))
    assert not np.any(one.ponder.cost)
    np.testing.assert_array_equal(one.ponder.steps, one.ponder.mask)
    # The same weights in a model that could halt, made to run one step.
    halting, more = made(form)
    halting_params = params | {"act": params["act"] | {"halting": more["act"]["halting"]}}
    run = jax.jit(halting.apply, static_argnums=2)
    assert_close(run(halting_params, batch_of(form), 1).logits, one.logits)
    longer = run(halting_params, batch_of(form), LIMIT + 2)
    assert np.max(longer.ponder.steps) == LIMIT + 2
    assert np.any(np.abs(longer.logits - one.logits) > 1e-3)


def test_maze_rows_are_ordered_by_cell_then_class() -> None:
    model, params = made("grid", kind="none")
    batch = batch_of("grid")
    first = {name: np.asarray(params["context"][name]) for name in ("kernel", "bias")}
    tokens = np.asarray(params["embedding"])[np.where(batch.input_mask, batch.inputs, 0)]
    context = np.maximum(tokens.reshape(ROWS, -1) @ first["kernel"] + first["bias"], 0)
    cell = params["act"]["cell"]
    a = np.asarray(input_product(cell, jnp.asarray(context)) + cell["input"]["kernel"][-1])
    u = np.asarray(cell["state"]["bias"])  # the state is zero
    r, z = (1 / (1 + np.exp(-(a + u)[:, k * HIDDEN : (k + 1) * HIDDEN])) for k in (0, 1))
    n = np.tanh(a[:, 2 * HIDDEN :] + r * u[2 * HIDDEN :])
    hidden = np.where(LENGTHS[:, None] > 0, (1 - z) * n, 0)
    kernel, bias = (np.asarray(params["readout"][k]) for k in ("kernel", "bias"))
    logits = np.asarray(jax.jit(model.apply)(params, batch).logits)
    for cell_index in range(4):
        for token in range(5):
            column = cell_index * 5 + token
            wanted = hidden @ kernel[:, column] + bias[column]
            np.testing.assert_allclose(logits[:, cell_index, token], wanted, atol=2e-6)


def test_greedy_decoding_repeats_what_teacher_forcing_says() -> None:
    model, params = made("seq2seq")
    params["readout"]["bias"] = params["readout"]["bias"].at[PAD].set(-9.0).at[EOS].add(0.05)
    batch, max_len = batch_of("seq2seq"), 6
    decode = make_decode(SHAPES["seq2seq"], settings("seq2seq"))
    decoded = decode(params, batch, max_len)
    tokens = np.asarray(decoded.tokens)
    wrote = tokens != PAD
    np.testing.assert_array_equal(wrote.any(axis=1), LENGTHS > 0)
    given = np.concatenate([np.full((ROWS, 1), BOS), tokens[:, :-1]], axis=1)
    forced = dataclasses.replace(
        batch, decoder_inputs=jnp.asarray(given), target_mask=jnp.asarray(wrote)
    )
    outputs = jax.jit(model.apply)(params, forced)
    best = np.asarray(jnp.argmax(outputs.logits, axis=-1))
    np.testing.assert_array_equal(best[wrote], tokens[wrote])
    np.testing.assert_array_equal(outputs.ponder.steps[:, 4:][wrote], decoded.steps[wrote])
    for row in tokens[:-1]:
        ends = np.flatnonzero(row == EOS)
        assert not len(ends) or (len(ends) == 1 and not np.any(row[ends[0] + 1 :]))
    assert decode(params, batch, max_len).executed == decoded.executed
    assert decode._cache_size() == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("kind", ["act", "none"])
def test_names_go_out_and_come_back(form: str, kind: str) -> None:
    how = settings(form, kind=kind, input_proj=form == "vector")
    params = jax.jit(make_act_rnn(SHAPES[form], how).init)(jax.random.key(1))
    tensors = export_act_rnn(params, SHAPES[form], how)
    prefix = "cell." if form == "grid" else "rnn_cell."
    assert tensors[f"{prefix}rnn_cell.weight_ih"].shape[1] in (HIDDEN + 1, 4)
    assert (f"{prefix}halting_layer.weight" in tensors) == (kind == "act")
    jax.tree.map(np.testing.assert_array_equal, import_act_rnn(tensors, SHAPES[form], how), params)
    tensors.pop(f"{prefix}rnn_cell.bias_hh")
    with pytest.raises(UserError, match="bias_hh"):
        import_act_rnn(tensors, SHAPES[form], how)


def test_bfloat16_products_keep_float32_results() -> None:
    model, params = made("frames", dtype="bfloat16")
    batch = batch_of("frames")
    outputs = jax.jit(model.apply)(params, batch)
    exact = jax.jit(made("frames")[0].apply)(params, batch)
    assert outputs.logits.dtype == outputs.ponder.cost.dtype == jnp.float32
    assert 0 < np.max(np.abs(outputs.logits - exact.logits)) < 0.1


def test_initial_values() -> None:
    shape = TaskShape("grid", 9, 300, classes=300)
    how = ActRnnSettings(hidden_size=64, embedding_size=8, halt_bias=0.25)
    params = jax.jit(make_act_rnn(shape, how).init)(jax.random.key(0))
    assert params["act"]["halting"]["bias"] == 0.25
    fans = {"context": 72, "readout": 64}
    for name, fan in fans.items():
        for leaf in params[name].values():
            assert 0.9 < float(jnp.max(jnp.abs(leaf))) * fan**0.5 <= 1
    for part in params["act"]["cell"].values():
        for leaf in part.values():
            assert 0.9 < float(jnp.max(jnp.abs(leaf))) * 64**0.5 <= 1
    assert float(jnp.std(params["embedding"])) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("frames", {"kind": "pondernet"}, "maze, sudoku, parity"),
        ("seq2seq", {"kind": "pondernet"}, "maze, sudoku, parity"),
        ("grid", {"input_proj": True}, "input_proj"),
        ("grid", {"kind": "always"}, "always"),
        ("grid", {"hidden_size": 0}, "hidden_size"),
        ("grid", {"cell": "elman"}, "elman"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(form: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_act_rnn(SHAPES[form], settings(form, **changes))


def test_only_token_sequences_are_decoded() -> None:
    with pytest.raises(UserError, match="grid"):
        make_decode(SHAPES["grid"], settings("grid"))
