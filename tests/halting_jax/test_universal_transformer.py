"""Universal Transformers of every task form: padding, executions, decoding, settings."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from halting_jax.early_exit import with_early_exit
from halting_jax.objective import act_objective, stretches_objective
from halting_jax.tasks.maze import make_maze
from halting_jax.types import Batch, Model, Outputs, TaskShape
from halting_jax.universal_transformer import (
    UtSettings,
    make_greedy_decoder,
    make_universal_transformer,
)
from halting_jax.ut_layers import LayerNorm, attend

SMALL = UtSettings(
    hidden_size=8,
    embedding_size=6,
    heads=2,
    key_depth=8,
    value_depth=12,
    filter_size=10,
    max_hops=4,
    act=True,
    halt_bias=-0.3,
)
ROWS, LENGTH, TOKENS = 3, 6, 7
LENGTHS = np.array([6, 4, 1])
SHAPES = {
    "grid": TaskShape("grid", LENGTH, TOKENS, classes=TOKENS),
    "vector": TaskShape("vector", LENGTH, 1),
    "frames": TaskShape("frames", LENGTH, 5, places=3, classes=4, causal=True),
    "last": TaskShape("frames", LENGTH, 5, readout="last"),
    "seq2seq": TaskShape("seq2seq", LENGTH, TOKENS, classes=TOKENS),
}
LOGITS = {
    "grid": (ROWS, LENGTH, TOKENS),
    "vector": (ROWS,),
    "frames": (ROWS, LENGTH, 3, 4),
    "last": (ROWS,),
    "seq2seq": (ROWS, LENGTH - 1, TOKENS),
}


def make_batch(form: str, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < LENGTHS[:, None]
    if form in ("grid", "seq2seq"):
        inputs = rng.integers(1, TOKENS, (ROWS, LENGTH)).astype(np.int32)
    elif form == "vector":
        inputs = rng.choice([-1.0, 1.0], (ROWS, LENGTH)).astype(np.float32)
    else:
        inputs = rng.normal(size=(ROWS, LENGTH, 5)).astype(np.float32)
    decoded = form == "seq2seq"
    arrays: dict[str, Any] = {
        "inputs": inputs,
        "input_mask": mask,
        "targets": np.zeros((ROWS, LENGTH), np.int32),
        "target_mask": mask[:, 1:] | (np.arange(LENGTH - 1) < 1) if decoded else mask,
        "decoder_inputs": rng.integers(1, TOKENS, (ROWS, (LENGTH - 1) * decoded)).astype(np.int32),
        "difficulty": np.zeros(ROWS, np.int32),
    }
    return Batch(**arrays)


def changed(batch: Batch, **arrays: Any) -> Batch:
    """The batch with some of its arrays replaced."""
    return dataclasses.replace(batch, **arrays)


def spoiled(form: str) -> Batch:
    """The same batch with other content in its padding."""
    batch = make_batch(form)
    if form in ("grid", "seq2seq"):
        fill: Any = 10**6
    else:
        fill = np.nan
    mask = batch.input_mask.reshape(ROWS, LENGTH, *[1] * (batch.inputs.ndim - 2))
    batch = changed(batch, inputs=np.where(mask, batch.inputs, fill))
    if form == "seq2seq":
        decoder = np.where(batch.target_mask, batch.decoder_inputs, 10**6)
        batch = changed(batch, decoder_inputs=decoder)
    return batch


@functools.cache
def model_of(form: str, **changes: Any) -> tuple[Model, Any]:
    model = make_universal_transformer(SHAPES[form], dataclasses.replace(SMALL, **changes))
    return model, model.init(jax.random.key(1))


def counted(form: str, outputs: Outputs, batch: Batch) -> jax.Array:
    """A loss over everything that counts."""
    logits, ponder = outputs.logits, outputs.ponder
    keep = jnp.ones(ROWS, bool) if logits.ndim == 1 else batch.target_mask
    keep = keep.reshape(*keep.shape, *[1] * (logits.ndim - keep.ndim))
    return jnp.sum(jnp.where(keep, jnp.sin(logits), 0)) + jnp.sum(
        jnp.where(ponder.mask, ponder.cost, 0)
    )


@pytest.mark.parametrize("form", SHAPES)
def test_padding_never_matters(form: str) -> None:
    model, params = model_of(form)

    traces = []

    @jax.jit
    def run(params: Any, batch: Batch) -> Any:
        traces.append(form)

        def loss(params: Any) -> Any:
            outputs = model.apply(params, batch)
            return counted(form, outputs, batch), outputs

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, outputs), grads = run(params, make_batch(form))
    assert outputs.logits.shape == LOGITS[form] and outputs.logits.dtype == jnp.float32
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    # Every weight is used.
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    (again, _), grads_again = run(params, spoiled(form))
    assert float(value) == float(again)
    jax.tree.map(np.testing.assert_array_equal, grads, grads_again)
    assert len(traces) == 1


@pytest.mark.parametrize("form", ["last", "seq2seq"])
def test_a_padded_row_equals_the_row_alone(form: str) -> None:
    model, params = model_of(form)
    batch = make_batch(form)
    outputs = jax.jit(model.apply)(params, batch)
    row, length = 1, int(LENGTHS[1])
    cut = changed(
        batch,
        inputs=batch.inputs[row : row + 1, :length],
        input_mask=batch.input_mask[row : row + 1, :length],
        decoder_inputs=batch.decoder_inputs[row : row + 1, : length - 1],
        target_mask=batch.target_mask[row : row + 1, : length - 1],
    )
    alone = jax.jit(model.apply)(params, cut)
    ours, theirs = alone.logits[0], outputs.logits[row]
    if theirs.ndim:
        theirs = theirs[: len(ours)]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(alone.ponder.steps[0], outputs.ponder.steps[row, :length])


def test_while_and_pieces_equal_the_scan() -> None:
    batch = make_batch("grid")
    model, params = model_of("grid", halt_bias=-6.0)
    halting = params["encoder"]["halting"]
    spread = {"kernel": 2.0 * halting["kernel"], "bias": halting["bias"]}
    params = params | {"encoder": params["encoder"] | {"halting": spread}}
    wanted = jax.jit(model.apply)(params, batch)
    assert len(set(np.asarray(wanted.ponder.steps)[np.asarray(batch.input_mask)].tolist())) > 1
    stopping, _ = model_of("grid", execution="while")
    leaving = jax.jit(with_early_exit(model))(params, batch)[0]
    for outputs in (jax.jit(stopping.apply)(params, batch), leaving):
        np.testing.assert_allclose(outputs.logits, wanted.logits, atol=1e-6)
        np.testing.assert_array_equal(outputs.ponder.steps, wanted.ponder.steps)
        np.testing.assert_allclose(outputs.ponder.cost, wanted.ponder.cost, atol=1e-6)


def test_fixed_steps() -> None:
    form = "frames"
    model, params = model_of(form)
    free, _ = model_of(form, act=False)
    without = {k: v for k, v in params["encoder"].items() if k != "halting"}
    batch = make_batch(form)
    fixed = jax.jit(model.apply, static_argnums=2)(params, batch, SMALL.max_hops)
    plain = jax.jit(free.apply)(params | {"encoder": without}, batch)
    np.testing.assert_allclose(fixed.logits, plain.logits, atol=1e-6)
    steps = np.where(batch.input_mask, SMALL.max_hops, 0)
    np.testing.assert_array_equal(fixed.ponder.steps, steps)
    np.testing.assert_array_equal(fixed.ponder.cost, steps)
    np.testing.assert_array_equal(plain.ponder.cost, 0)
    assert free.start is None and free.halting_path == ""


def test_positions_of_an_example_may_halt_together() -> None:
    model, params = model_of("grid", act_level="example", halt_bias=-1.0)
    batch = make_batch("grid")
    ponder = jax.jit(model.apply)(params, batch).ponder
    for row in range(ROWS):
        assert len(set(np.asarray(ponder.steps[row])[batch.input_mask[row]])) == 1
    assert int(ponder.steps.max()) > 1


def count_equations(node: Any) -> int:
    """Operations of a traced function, inner functions included."""
    if isinstance(node, (list, tuple)):
        return sum(count_equations(part) for part in node)
    node = getattr(node, "jaxpr", node)
    if not hasattr(node, "eqns"):
        return 0
    return sum(1 + count_equations(list(e.params.values())) for e in node.eqns)


def test_compilation_does_not_grow_with_the_hops() -> None:
    def size(hops: int) -> int:
        model, params = model_of("grid", max_hops=hops)

        def loss(params: Any) -> jax.Array:
            return jnp.sum(model.apply(params, make_batch("grid")).logits)

        return count_equations(jax.make_jaxpr(jax.grad(loss))(params))

    assert size(3) == size(30) > 100


def test_reduced_precision_keeps_the_rest_in_float32() -> None:
    batch = make_batch("grid")
    exact, params = model_of("grid", act=False)
    rough, _ = model_of("grid", act=False, dtype="bfloat16")
    a, b = (jax.jit(m.apply)(params, batch) for m in (exact, rough))
    assert b.logits.dtype == jnp.float32
    assert 0 < float(jnp.abs(a.logits - b.logits).max()) < 0.1


def test_initial_weights() -> None:
    shape = TaskShape("seq2seq", 4, 50, classes=50)
    settings = dataclasses.replace(SMALL, hidden_size=64, halt_kernel="zero", halt_bias=0.7)
    params = make_universal_transformer(shape, settings).init(jax.random.key(0))
    kernel = params["encoder"]["block"]["feed_forward"]["fc1"]["kernel"]  # [64, 10]
    assert 0.9 / 8 < float(jnp.abs(kernel).max()) <= 1 / 8
    table = params["embedding"]["table"]
    assert 0.9 < float(jnp.std(table[1:])) < 1.1
    np.testing.assert_array_equal(table[0], 0)
    halting = params["encoder"]["halting"]
    np.testing.assert_array_equal(halting["kernel"], 0)
    np.testing.assert_array_equal(halting["bias"], np.float32(0.7))
    norm = params["encoder"]["norm"]
    np.testing.assert_array_equal(norm["scale"], 1)
    np.testing.assert_array_equal(norm["bias"], 0)


def test_greedy_decoding_equals_teacher_forcing() -> None:
    form, length = "seq2seq", 7
    settings = dataclasses.replace(SMALL, max_hops=3)
    model = make_universal_transformer(SHAPES[form], settings)
    params = jax.tree.map(lambda x: 2.0 * x, model.init(jax.random.key(4)))
    batch = make_batch(form)
    apply = jax.jit(model.apply)
    eos = TOKENS - 1
    decode = make_greedy_decoder(SHAPES[form], settings, eos=eos)
    inputs = np.tile(batch.decoder_inputs[:, :1], (1, length))
    tokens = np.zeros((ROWS, length), np.int32)
    for t in range(length):
        forced = changed(batch, decoder_inputs=inputs, target_mask=np.ones((ROWS, length), bool))
        tokens[:, t] = np.argmax(apply(params, forced).logits[:, t], -1)
        if t + 1 < length:
            inputs[:, t + 1] = tokens[:, t]
    for row in tokens:  # nothing counts behind the end
        ends = np.flatnonzero(row == eos)
        if len(ends):
            row[ends[0] + 1 :] = 0
    assert len({tuple(row) for row in tokens}) > 1
    np.testing.assert_array_equal(decode(params, batch, length), tokens)
    with pytest.raises(UserError, match="nothing to decode"):
        make_greedy_decoder(SHAPES["grid"], settings)


@pytest.mark.parametrize(
    "form", ["grid", "frames", pytest.param("seq2seq", marks=pytest.mark.slow)]
)
def test_answers_after_every_stretch(form: str) -> None:
    """Those of models with as many hops; the last stretch is trained through its own hops alone."""
    model, params = model_of(form, act=False, supervise_every=2)
    batch = make_batch(form)
    assert model.stretches is not None
    logits, outputs = jax.jit(model.stretches)(params, batch)
    apply = jax.jit(model.apply, static_argnums=2)
    for number, hops in enumerate((2, 4)):
        wanted = apply(params, batch, hops).logits
        np.testing.assert_allclose(logits[number], wanted, atol=1e-5)
    np.testing.assert_array_equal(outputs.logits, logits[-1])
    np.testing.assert_array_equal(outputs.ponder.steps, np.where(batch.input_mask, 4, 0))

    def loss(params: Any, stretch: int) -> jax.Array:
        return jnp.sum(jnp.sin(model.stretches(params, batch)[0][stretch]))

    first, second = (jax.jit(jax.grad(loss), static_argnums=1)(params, n) for n in range(2))
    entry = "embedding" if form != "frames" else "input_proj"
    assert np.abs(jax.tree.leaves(first[entry])[0]).max() > 0
    if form != "seq2seq":  # there the decoder reads embeddings at every stretch
        assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(second[entry]))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(second["encoder"]["block"]))


def test_one_stretch_is_the_plain_objective() -> None:
    task = make_maze(9, TOKENS)
    shape = dataclasses.replace(SMALL, act=False, max_hops=3)
    plain = make_universal_transformer(task.shape, shape)
    whole = make_universal_transformer(task.shape, dataclasses.replace(shape, supervise_every=3))
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, TOKENS, (2, ROWS, 9)), np.ones((ROWS, 9), bool)
    batch = Batch(
        *(jnp.asarray(x) for x in (tokens[0], mask, tokens[1], mask)),
        decoder_inputs=jnp.zeros((ROWS, 0), jnp.int32),
        difficulty=jnp.zeros(ROWS, jnp.int32),
    )
    params = plain.init(jax.random.key(0))

    def graded(objective: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            terms = objective(params, (), batch, jax.random.key(0), jnp.zeros(())).terms
            return sum(term.weight * term.ratio.value for term in terms.values())

        return jax.jit(jax.value_and_grad(loss))(params)

    ours, wanted = graded(stretches_objective(task, whole)), graded(act_objective(task, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_implementations_agree(causal: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (ROWS, LENGTH, 2, 4)) for k in keys)
    mask = jnp.arange(LENGTH) < LENGTHS[:, None]

    @functools.partial(jax.jit, static_argnums=3)
    def run(query: jax.Array, key: jax.Array, value: jax.Array, impl: str) -> Any:
        def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
            out = attend(query, key, value, mask, causal=causal, impl=impl)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)

    ours, theirs = (run(query, key, value, impl) for impl in ("plain", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    plain = ours[0][1]
    # Against the definition, for one position of one head.
    b, t, h = 1, 2, 1
    scores = np.asarray(key[b, :, h] @ query[b, t, h]) / 2.0
    seen = np.asarray(mask[b]) & (np.arange(LENGTH) <= t if causal else True)
    weights = np.where(seen, np.exp(scores), 0)
    wanted = weights @ np.asarray(value[b, :, h]) / weights.sum()
    np.testing.assert_allclose(plain[b, t, h], wanted, atol=1e-5)


def test_layer_norm() -> None:
    x = jax.random.normal(jax.random.key(0), (4, 6)) * 1e-3
    weights = {"params": {"scale": jnp.arange(1.0, 7.0), "bias": jnp.full(6, 0.5)}}

    def norm(x: jax.Array) -> Any:
        return LayerNorm().apply(weights, x)

    host = np.asarray(x, np.float64)
    wanted = (host - host.mean(1, keepdims=True)) / (host.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(x), wanted * np.arange(1.0, 7.0) + 0.5, rtol=1e-4, atol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(norm(x)))(jnp.zeros((1, 6)))
    assert np.isfinite(slope).all()  # a position that never got any output


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"heads": 3}, "key_depth"),
        ({"value_depth": 9}, "value_depth"),
        ({"act_mix": "sum"}, "act_mix"),
        ({"attn_impl": "xla"}, "attn_impl"),
        ({"attn_impl": "cudnn", "value_depth": 8}, "bfloat16"),
        ({"pos": "2d"}, "2d"),
        ({"max_hops": 0}, "max_hops"),
        ({"act": False, "supervise_every": 3}, "supervise_every"),
        ({"supervise_every": 2}, "supervise_every"),
        ({"act_epsilon": 1.0}, "act_epsilon"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names):
        make_universal_transformer(SHAPES["frames"], dataclasses.replace(SMALL, **changes))


def test_two_dimensional_positions_need_a_square() -> None:
    square = TaskShape("grid", 9, TOKENS, classes=TOKENS)
    model = make_universal_transformer(square, dataclasses.replace(SMALL, pos="2d"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = make_batch("grid")
    with pytest.raises(UserError, match="square"):
        jax.eval_shape(model.apply, params, batch)
