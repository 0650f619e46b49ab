"""The compiled loop against a plain one that reads the whole sequence for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.lm import decoder
from common.lm import generate as generation
from common.lm.decoder import Steering
from common.lm.generate import bucket_length, generate, pad_prompts, plan_prefill
from common.lm.sampling import fold_rows, make_sampling, sample
from tests.common.lm_models import random_model

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
NEW = 6


@pytest.fixture(scope="module")
def model():
    """A model whose greedy choices vary."""
    return random_model("qwen3")


def plain_generate(model, prompt, count, stops, choose):
    """One row, no cache: `choose(logits [1, V], n) -> token`."""

    @jax.jit
    def read(ids):
        hidden = decoder.forward(model.params, model.cfg, ids).hidden
        return decoder.head_logits(model.params, model.cfg, hidden)[0]

    width = len(prompt) + count
    tokens = []
    while len(tokens) < count and not (tokens and tokens[-1] in stops):
        known = len(prompt) + len(tokens)
        ids = jnp.asarray([[*prompt, *tokens] + [0] * (width - known)], jnp.int32)
        tokens.append(int(choose(read(ids)[known - 1][None], len(tokens))))
    return tokens


def test_greedy_rows_equal_the_plain_loop(model):
    free = generate(model.params, model.cfg, PROMPTS, max_new_tokens=NEW, prefill_rows=2)
    assert not free.stopped.any() and free.lengths.tolist() == [NEW] * 3
    stops = [free.rows()[0][2]]  # a token that some row does produce
    result = generate(model.params, model.cfg, PROMPTS, max_new_tokens=NEW, stop_ids=stops)
    for b, prompt in enumerate(PROMPTS):
        want = plain_generate(model, prompt, NEW, stops, lambda logits, _: logits[0].argmax())
        assert result.rows()[b] == want
        assert result.stopped[b] == (want[-1] in stops)
        assert not result.tokens[b, len(want) :].any()
        assert not result.log_probs[b, len(want) :].any()
    assert result.stopped[0] and len(result.rows()[0]) == 3


def test_sampled_rows_equal_the_plain_loop_and_keep_their_randomness(model):
    key = jax.random.key(7)
    every = make_sampling(3, 1.5, top_k=20, top_p=0.9)
    result = generate(model.params, model.cfg, PROMPTS, max_new_tokens=NEW, sampling=every, key=key)
    one = make_sampling(1, 1.5, top_k=20, top_p=0.9)
    row_key = jax.random.fold_in(key, 1)

    def choose(logits, n):
        return sample(logits, fold_rows(row_key[None], jnp.asarray([n])), one)[0][0]

    assert result.rows()[1] == plain_generate(model, PROMPTS[1], NEW, [], choose)
    alone = generate(
        model.params,
        model.cfg,
        PROMPTS[1:2],
        max_new_tokens=NEW,
        sampling=one,
        key=key,
        row_ids=[1],
    )
    assert alone.rows()[0] == result.rows()[1]
    np.testing.assert_allclose(alone.log_probs[0], result.log_probs[1], atol=1e-4)
    other = generate(
        model.params,
        model.cfg,
        PROMPTS,
        max_new_tokens=NEW,
        sampling=every,
        key=jax.random.key(8),
    )
    assert other.rows() != result.rows()


def test_steering_reaches_the_right_rows_of_several_calls(model):
    """Prompts of two buckets in calls of two rows: rows and slots differ."""
    prompts = [[1] * 40, [5, 9, 2], [7], [1] * 35]
    steering = Steering(
        layer=jnp.asarray([-1, 1, -1, 0], jnp.int32),
        position=jnp.asarray([len(prompt) - 1 for prompt in prompts], jnp.int32),
        vector=jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)), jnp.float32),
        strength=jnp.full((4,), 30.0),
    )
    clean, steered = (
        generate(model.params, model.cfg, prompts, max_new_tokens=2, prefill_rows=2, steering=given)
        for given in (None, steering)
    )
    changed = [a != b for a, b in zip(clean.log_probs[:, 0], steered.log_probs[:, 0], strict=True)]
    assert changed == [False, True, False, True]


def test_a_second_generation_of_other_lengths_compiles_nothing(model):
    before = generation.decode._cache_size(), generation._prefill._cache_size()
    generate(model.params, model.cfg, [[3] * 8, [4], [9, 9]], max_new_tokens=NEW, stop_ids=[1])
    after = generation.decode._cache_size(), generation._prefill._cache_size()
    generate(model.params, model.cfg, [[5] * 3, [2, 2], [8]], max_new_tokens=NEW, stop_ids=[3])
    assert after == (generation.decode._cache_size(), generation._prefill._cache_size())
    assert after[0] <= before[0] + 1


def test_rows_with_limits_of_their_own(model):
    from common.lm.cache import empty_cache

    cache = empty_cache(model.cfg, 3, 16)
    ids, lengths, slots = pad_prompts(PROMPTS, [0, 1, 2], 9, 3)
    read = decoder.prefill(model.params, model.cfg, cache, ids, lengths, slots)
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, counts, _, stopped, cache = generation.decode(
        model.params,
        read.cache,
        read.logits,
        keys,
        make_sampling(3, 0.0),
        jnp.asarray([-1]),
        jnp.asarray([2, 0, 4], jnp.int32),
        cfg=model.cfg,
        num_tokens=NEW,
    )
    assert counts.tolist() == [2, 0, 4] and not stopped.any()
    assert not tokens[1].any()
    assert cache.lengths.tolist() == [3 + 1, 1, 9 + 3]  # the last token is not read


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 100), (100, 100)]
)
def test_buckets_are_powers_of_two(length, bucket):
    assert bucket_length(length, 100) == bucket


def test_plans_cover_every_prompt_once():
    lengths = [3, 40, 5, 70, 33, 1, 2]
    plan = plan_prefill(lengths, rows=2, maximum=128)
    assert sorted(i for call in plan for i in call.indices) == list(range(7))
    for call in plan:
        assert len(call.indices) <= 2
        assert all(bucket_length(lengths[i], 128) == call.bucket for i in call.indices)
    ids, sizes, slots = pad_prompts([[4, 5]], [9], 4, 3)
    assert ids.tolist() == [[4, 5, 0, 0], [0] * 4, [0] * 4]
    assert (sizes.tolist(), slots.tolist()) == ([2, 1, 1], [9, -1, -1])


@pytest.mark.parametrize(
    ("prompts", "options", "mentions"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 37]], {}, "token id .37"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"max_new_tokens": 128}, "128 positions"),
        ([[1]], {"sampling": make_sampling(1, 1.0)}, "random key"),
    ],
)
def test_bad_requests_are_refused(model, prompts, options, mentions):
    with pytest.raises(UserError, match=mentions):
        generate(model.params, model.cfg, prompts, **{"max_new_tokens": 2, **options})
