"""The three passes against each other: cached and whole, ragged and alone, steered and not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.lm import decoder
from common.lm.cache import (
    bytes_per_token,
    clear_slots,
    empty_cache,
    refit,
    resize,
    rewind,
    take_slots,
)
from common.lm.decoder import Capture, Steering
from tests.common.lm_models import CONFIGS, random_model

LENGTH = 11
CAPACITY = 16
ATOL = 2e-5

static = functools.partial(jax.jit, static_argnames="cfg")
step = static(decoder.decode_step)
extend = static(decoder.extend)
prefill = static(decoder.prefill)


@static
def whole(params, cfg, ids, steering=None, capture=None):
    """Logits of every position and captured states."""
    out = decoder.forward(params, cfg, ids, steering=steering, capture=capture)
    return decoder.head_logits(params, cfg, out.hidden), out.captured


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """Every switch of the decoder."""
    return random_model(request.param)


@pytest.fixture(scope="module")
def plain():
    """One model where the switches do not matter."""
    return random_model("qwen2")


@pytest.fixture(scope="module")
def ids():
    """Three sequences."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 37, (3, LENGTH)), jnp.int32)


def test_parameters_follow_the_declared_shapes(model):
    flat = decoder.params_by_path(model.params)
    assert {path: value.shape for path, value in flat.items()} == decoder.param_shapes(model.cfg)
    again = decoder.build_params(flat)
    assert jax.tree.structure(again) == jax.tree.structure(model.params)
    fresh = jax.eval_shape(lambda key: decoder.init_params(key, model.cfg), jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, model.params)


def test_ragged_slots_equal_whole_sequences(model, ids):
    """Rows of different lengths, in slots of their own order, one of them idle."""
    want, _ = whole(model.params, model.cfg, ids)
    sizes = jnp.asarray([4, 7, 1], jnp.int32)
    slots = jnp.asarray([3, 0, 2], jnp.int32)
    read = prefill(model.params, model.cfg, empty_cache(model.cfg, 4, CAPACITY), ids, sizes, slots)
    cache = read.cache
    assert cache.lengths.tolist() == [7, 0, 1, 4]
    np.testing.assert_allclose(read.logits, want[jnp.arange(3), sizes - 1], atol=ATOL)
    for offset in range(4):
        column = sizes + offset
        tokens = jnp.zeros((4,), jnp.int32).at[slots].set(ids[jnp.arange(3), column])
        active = jnp.asarray([True, False, True, True])
        logits, cache = step(model.params, model.cfg, cache, tokens, active)
        np.testing.assert_allclose(logits[slots], want[jnp.arange(3), column], atol=ATOL)
    assert cache.lengths.tolist() == [11, 0, 5, 8]
    assert not any(jnp.abs(key[1]).any() for key in cache.keys)  # nobody wrote to the idle slot


def test_a_row_alone_equals_the_row_in_a_batch(plain, ids):
    want, _ = whole(plain.params, plain.cfg, ids)
    alone, _ = whole(plain.params, plain.cfg, ids[1:2])
    np.testing.assert_allclose(alone[0], want[1], atol=ATOL)
    other = ids.at[0].set(0).at[1, 7:].set(5)  # other neighbours, other padding
    changed, _ = whole(plain.params, plain.cfg, other)
    np.testing.assert_allclose(changed[1, :7], want[1, :7], atol=ATOL)


def test_rows_without_a_slot_are_dropped(plain, ids):
    sizes = jnp.full((3,), 5, jnp.int32)
    slots = jnp.asarray([1, -1, 2], jnp.int32)  # 2 is outside too
    before = empty_cache(plain.cfg, 2, CAPACITY)
    cache = prefill(plain.params, plain.cfg, before, ids, sizes, slots).cache
    assert cache.lengths.tolist() == [0, 5]
    assert all(not key[0].any() for key in cache.keys)


def test_chunks_equal_whole_sequences(plain, ids):
    """Chunks of ragged lengths; a slot with nothing new stays."""
    want, _ = whole(plain.params, plain.cfg, ids)
    cache = empty_cache(plain.cfg, 3, CAPACITY)
    for new in ([3, 5, 0], [4, 2, 5]):
        start = cache.lengths
        index = jnp.minimum(start[:, None] + jnp.arange(5), LENGTH - 1)
        tokens = jnp.take_along_axis(ids, index, axis=1)
        hidden, cache, _ = extend(plain.params, plain.cfg, cache, tokens, jnp.asarray(new))
        logits = decoder.head_logits(plain.params, plain.cfg, hidden)
        for b, count in enumerate(new):
            begin = int(start[b])
            np.testing.assert_allclose(logits[b, :count], want[b, begin : begin + count], atol=ATOL)
    assert cache.lengths.tolist() == [7, 7, 5]


def test_a_refitted_cache_is_a_resized_one_and_gives_up_the_old(plain, ids):
    sizes, slots = jnp.full((3,), 9, jnp.int32), jnp.arange(3, dtype=jnp.int32)
    before = empty_cache(plain.cfg, 3, CAPACITY)
    cache = prefill(plain.params, plain.cfg, before, ids, sizes, slots).cache
    for capacity in (CAPACITY + 3, 10):
        want = resize(cache, capacity)
        found = refit(cache, capacity)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, want))
        assert all(x.is_deleted() for x in (*cache.keys, *cache.values))
        cache = found
    assert refit(cache, 10) is cache


def test_rewound_forked_and_resized_caches_continue_alike(plain, ids):
    sizes, slots = jnp.full((3,), 9, jnp.int32), jnp.arange(3, dtype=jnp.int32)
    before = empty_cache(plain.cfg, 3, CAPACITY)
    cache = prefill(plain.params, plain.cfg, before, ids, sizes, slots).cache
    want, _ = whole(plain.params, plain.cfg, ids)
    cut = resize(rewind(cache, jnp.asarray([6, 6, 9], jnp.int32)), 12)
    grown = resize(cut, 20)
    assert (cut.capacity, grown.capacity, grown.slots) == (12, 20, 3)
    forked = take_slots(grown, jnp.asarray([1, 1, 0], jnp.int32))
    tokens = jnp.stack([ids[1, 6], ids[0, 6], ids[0, 6]])
    logits, _ = step(plain.params, plain.cfg, forked, tokens, jnp.ones((3,), bool))
    np.testing.assert_allclose(logits[0], want[1, 6], atol=ATOL)
    np.testing.assert_allclose(logits[2], want[0, 6], atol=ATOL)
    assert not np.allclose(logits[1], want[1, 6], atol=1e-3)


def test_cleared_slots_hold_nothing(plain):
    cache = empty_cache(plain.cfg, 2, CAPACITY)
    spoiled = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache.keys)
    cache = clear_slots(
        cache.__class__(spoiled, cache.values, jnp.asarray([3, 4])), jnp.asarray([True, False])
    )
    assert cache.lengths.tolist() == [0, 4]
    assert all(not key[0].any() and jnp.isnan(key[1]).all() for key in cache.keys)


def test_cache_sizes(plain):
    cache = empty_cache(plain.cfg, 2, CAPACITY)
    stored = sum(x.nbytes for x in (*cache.keys, *cache.values))
    assert stored == bytes_per_token(plain.cfg) * 2 * CAPACITY
    with pytest.raises(UserError, match="128 positions"):
        empty_cache(plain.cfg, 1, 129)
    with pytest.raises(UserError, match="0 slots"):
        empty_cache(plain.cfg, 0, 8)


# -------------------------------------------------------------------------- steering and capture
def test_steering_adds_to_the_residual_stream(plain, ids):
    """h[l, t] moves by strength * vector; lower layers, earlier tokens, other rows do not."""
    rng = np.random.default_rng(1)
    vector = jnp.asarray(rng.normal(size=(3, 16)), jnp.float32).at[1].set(jnp.nan)
    steering = Steering(
        layer=jnp.asarray([0, -1, 1], jnp.int32),
        position=jnp.asarray([4, 4, LENGTH - 1], jnp.int32),
        vector=vector,
        strength=jnp.asarray([0.5, 3.0, -2.0]),
    )
    everywhere = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), ids.shape)
    capture = Capture(jnp.asarray([1, 0], jnp.int32), everywhere)
    clean, before = whole(plain.params, plain.cfg, ids, None, capture)
    steered, after = whole(plain.params, plain.cfg, ids, steering, capture)
    assert before.shape == (2, 3, LENGTH, 16)
    moved = after - before
    np.testing.assert_allclose(moved[1, 0, 4], 0.5 * vector[0], atol=1e-5)
    np.testing.assert_allclose(moved[0, 2, -1], -2.0 * vector[2], atol=1e-5)
    np.testing.assert_array_equal(moved[:, 1], 0.0)  # row 1: no layer, and its NaN is not read
    np.testing.assert_array_equal(moved[:, 0, :4], 0.0)
    np.testing.assert_array_equal(moved[1, 0, 5:], 0.0)  # layer 0 of later tokens
    np.testing.assert_array_equal(moved[1, 2], 0.0)
    assert jnp.abs(moved[0, 0, 5:]).min(axis=-1).max() > 0  # through keys and values
    assert jnp.abs(steered[0, 5:] - clean[0, 5:]).max() > 1e-4


def test_steering_and_capture_in_cached_passes(plain, ids):
    """The same additions whether the token is read with the prompt, in a chunk or alone."""
    steering = Steering(
        layer=jnp.asarray([0, 1, 0], jnp.int32),
        position=jnp.asarray([5, 5, 5], jnp.int32),
        vector=jnp.ones((3, 16)),
        strength=jnp.asarray([0.5, 1.0, 2.0]),
    )
    layers = jnp.asarray([0, 1, 7], jnp.int32)  # there is no layer 7
    capture = Capture(layers, jnp.asarray([[5, 6], [5, 6], [6, 99]], jnp.int32))
    want, states = whole(plain.params, plain.cfg, ids, steering, capture)
    assert not states[2].any() and not states[:, 2, 1].any()
    sizes, slots = jnp.full((3,), 5, jnp.int32), jnp.arange(3, dtype=jnp.int32)
    before = empty_cache(plain.cfg, 3, CAPACITY)
    cache = prefill(plain.params, plain.cfg, before, ids, sizes, slots, steering=steering).cache
    chunk = extend(
        plain.params,
        plain.cfg,
        cache,
        ids[:, 5:7],
        jnp.full((3,), 2),
        steering=steering,
        capture=capture,
    )
    np.testing.assert_allclose(chunk.captured, states, atol=ATOL)
    alone, cache = step(
        plain.params, plain.cfg, cache, ids[:, 5], jnp.ones((3,), bool), steering=steering
    )
    np.testing.assert_allclose(alone, want[:, 5], atol=ATOL)
    # A pass that does not read position 5 is not steered, but sees the steered token.
    later, _ = step(
        plain.params, plain.cfg, cache, ids[:, 6], jnp.ones((3,), bool), steering=steering
    )
    np.testing.assert_allclose(later, want[:, 6], atol=ATOL)


# ------------------------------------------------------------------------------------- precision
def test_half_precision_keeps_float32_logits(ids):
    import dataclasses

    model = random_model("llama3")
    cfg = dataclasses.replace(model.cfg, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    full, _ = whole(params, model.cfg, ids)
    half, _ = whole(params, cfg, ids)
    assert half.dtype == jnp.float32
    assert empty_cache(cfg, 1, 4).keys[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(half, full, atol=0.05 * float(jnp.abs(full).max()))
    # Accumulated in float32, not rounded to 8 bits afterwards.
    assert len(np.unique(np.asarray(half).astype(jnp.bfloat16))) < len(np.unique(half))


def test_shapes_decide_about_compilation(plain, ids):
    """Steering, lengths, slots and tokens are data: one program each."""
    traces = []

    @jax.jit
    def counted(cache, tokens, active, steering):
        traces.append(1)
        return decoder.decode_step(
            plain.params, plain.cfg, cache, tokens, active, steering=steering
        )

    cache = empty_cache(plain.cfg, 3, CAPACITY)
    for i in range(3):
        steering = Steering(
            jnp.full((3,), i, jnp.int32),
            jnp.full((3,), i, jnp.int32),
            jnp.ones((3, 16)),
            jnp.ones((3,)),
        )
        _, cache = counted(cache, ids[:, i], jnp.arange(3) > i, steering)
    assert len(traces) == 1
