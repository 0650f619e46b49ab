"""Block decoding: caches, ragged batches, stopping, and the denoising strategies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from reoac_jax.backbone import e2d2, e2d2_decode
from reoac_jax.backbone.denoising import (
    DecodeSettings,
    posterior_step,
    predict_open_step,
    predict_step,
)
from reoac_jax.backbone.e2d2 import E2D2Config
from reoac_jax.backbone.e2d2_cache import decode_weights
from reoac_jax.backbone.e2d2_decode import generate
from reoac_jax.sampling import summarise_scores

BASE = E2D2Config(
    vocab_size=23,
    mask_id=22,
    hidden_size=16,
    intermediate_size=24,
    num_encoder_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    block_size=4,
    length=32,
    eos_id=99,  # no such token: nothing stops early unless a test says so
    pad_id=0,
)
VARIANTS = {
    "last_hidden": BASE,
    "block_causal": dataclasses.replace(BASE, prompt_attention="block_causal"),
    "causal": dataclasses.replace(BASE, encoder_causal=True),
    "shared_tied": dataclasses.replace(
        BASE, share_kv=True, tie_encoder_decoder=True, kv_layers=(1, 2)
    ),
    "shared_untied": dataclasses.replace(BASE, share_kv=True, kv_layers=(0, 1), tie_head=False),
}
PROMPTS = [[5], [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9], [7, 9, 3]]
NEW = 10


@functools.cache
def weights(name):
    cfg = VARIANTS[name]
    params = e2d2.init_params(jax.random.key(3), cfg)
    # Fresh weights give almost flat predictions; larger ones make every choice distinct.
    return jax.tree.map(lambda x: x * 8 if x.ndim > 1 and x.shape[-1] != 8 else x, params)


def padded(prompts, filler=0, width=9):
    rows = [list(p) + [filler] * (width - len(p)) for p in prompts]
    return jnp.asarray(rows, jnp.int32), jnp.asarray([len(p) for p in prompts])


def run(name, prompts, filler=0, cfg=None, key=None, row_id=None, **options):
    ids, lengths = padded(prompts, filler)
    return generate(
        weights(name),
        cfg or VARIANTS[name],
        ids,
        lengths,
        max_new_tokens=NEW,
        settings=DecodeSettings(**options),
        key=key,
        row_id=row_id,
        record=True,  # always, so that tests share compilations
    )


# ----------------------------------------------------------------- against the plain recomputation
@functools.partial(jax.jit, static_argnums=1)
def plain_logits(params, cfg, sequence, length, off, block, start):
    """Decoder logits of a block after a whole sequence is encoded anew, no cache anywhere."""
    width, size = sequence.shape[1], cfg.block_size
    i, j = jnp.arange(width)[:, None], jnp.arange(width)[None, :]
    in_prompt = (i < off) & (j < off)
    if cfg.prompt_attention == "block_causal":
        in_prompt &= i // size >= j // size
    mask = in_prompt | ((i >= off) & ((i - off) // size >= (j - off) // size))
    if cfg.encoder_causal:
        mask = i >= j
    mask &= j < length
    positions = jnp.arange(width)[None]
    hidden, encoder_kv = e2d2.encode(params, cfg, sequence, mask[None], positions)
    context = e2d2.decoder_context(params, cfg, hidden, encoder_kv, positions)
    seen = jnp.concatenate([jnp.arange(width) < length, jnp.ones(size, bool)])[None, None]
    hidden = e2d2.decode(params, cfg, block, seen, start + jnp.arange(size)[None], context)
    return e2d2.head(params, cfg, hidden)[0]


def plain_generate(name, prompt, align):
    """The algorithm for one prompt in plain Python."""
    cfg, params = VARIANTS[name], weights(name)
    size, mask_id = cfg.block_size, cfg.mask_id
    off = len(prompt) // size * size if align else len(prompt)
    done = list(prompt[:off])
    tail = list(prompt[off:])
    steps, width = [], 32
    while len(done) < len(prompt) + NEW:
        block = np.array((tail + [mask_id] * size)[:size])
        tail = []
        for step in range(size):
            masked = block == mask_id
            if not masked.any():
                break
            sequence = np.zeros((1, width), np.int32)
            sequence[0, : len(done)] = done
            logits = np.array(
                plain_logits(
                    params, cfg, sequence, len(done), off, block[None].astype(np.int32), len(done)
                ),
                np.float64,
            )
            steps.append((block.copy(), logits.copy()))
            logits[:, mask_id] = -np.inf
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            s = 1 - (1 - 1e-5) * (step + 1) / size
            keep = min(int(s * size), masked.sum() - 1)
            order = sorted(np.flatnonzero(masked), key=lambda i: p[i].max())
            for i in order[keep:]:
                block[i] = p[i].argmax()
        done += block.tolist()
    return done[len(prompt) : len(prompt) + NEW], steps


CACHE_CASES = [
    pytest.param(name, align, marks=[] if quick else pytest.mark.slow)
    for name, align, quick in [
        *((name, True, name in ("last_hidden", "shared_tied")) for name in VARIANTS),
        ("last_hidden", False, False),
        ("shared_tied", False, True),
    ]
]


@pytest.mark.parametrize(("name", "align"), CACHE_CASES)
def test_caches_and_ragged_batches_change_nothing(name, align):
    """A ragged batch with caches against one prompt at a time without any."""
    batch = run(name, PROMPTS, align=align)
    for row, prompt in enumerate(PROMPTS):
        tokens, steps = plain_generate(name, prompt, align)
        assert batch.tokens[row].tolist() == tokens
        recorded = [
            (batch.trace.tokens[n, row], batch.trace.logits[n, row])
            for n in range(int(batch.decoder_calls))
        ]
        # Other rows may need more steps: ours are those in which this row still had a mask.
        mask_id = VARIANTS[name].mask_id
        recorded = [(t, x) for t, x in recorded if np.any(np.asarray(t) == mask_id)][: len(steps)]
        assert len(recorded) == len(steps)
        for (block, logits), (our_block, our_logits) in zip(steps, recorded, strict=True):
            np.testing.assert_array_equal(our_block, block)
            np.testing.assert_allclose(our_logits, logits, atol=2e-4, rtol=2e-4)


def test_padding_does_not_matter():
    batch = run("last_hidden", PROMPTS)
    assert len({tuple(row) for row in batch.tokens.tolist()}) > 1
    for row, prompt in enumerate(PROMPTS):
        alone = run("last_hidden", [prompt], filler=17)
        np.testing.assert_array_equal(alone.tokens[0], batch.tokens[row])


def test_sampled_rows_depend_on_their_id_only():
    key, ids = jax.random.key(5), jnp.asarray([3, 1, 4, 0], jnp.uint32)
    batch = run("last_hidden", PROMPTS, key=key, row_id=ids, greedy=False)
    again = run("last_hidden", PROMPTS, key=jax.random.key(6), row_id=ids, greedy=False)
    assert np.any(batch.tokens != again.tokens)
    for row, prompt in enumerate(PROMPTS):
        alone = run("last_hidden", [prompt], key=key, row_id=ids[row : row + 1], greedy=False)
        np.testing.assert_array_equal(alone.tokens[0], batch.tokens[row])


def test_prepared_weights_give_the_same():
    cfg = VARIANTS["shared_tied"]
    ids, lengths = padded(PROMPTS)
    prepared = decode_weights(weights("shared_tied"), cfg)
    out = generate(prepared, cfg, ids, lengths, max_new_tokens=NEW, record=True)
    np.testing.assert_array_equal(out.tokens, run("shared_tied", PROMPTS).tokens)


def test_prompt_lengths_do_not_recompile():
    run("last_hidden", PROMPTS)
    before = e2d2_decode._generate._cache_size()
    run("last_hidden", [[1, 2, 3, 4], [5], [6, 7], [8] * 9])
    assert e2d2_decode._generate._cache_size() == before


@pytest.mark.parametrize("variant", ["last_hidden", "shared_tied"])
def test_bfloat16_stays_close_to_float32(variant):
    cfg = dataclasses.replace(VARIANTS[variant], dtype="bfloat16")
    exact, half = run(variant, PROMPTS), run(variant, PROMPTS, cfg=cfg)
    assert np.all(np.asarray(half.tokens) != cfg.mask_id)
    # The first step reads the same tokens; later ones may have written others.
    wanted, found = np.asarray(exact.trace.logits[0]), np.asarray(half.trace.logits[0])
    assert 1e-6 < np.mean(np.abs(found - wanted)) < 0.01 * np.max(np.abs(wanted))


@pytest.mark.parametrize(("dtype", "count"), [("float32", 1), ("float32", 9), ("bfloat16", 3)])
def test_the_head_on_masked_positions_decodes_the_same(dtype, count):
    """Up to 32 states take the head with the vocabulary in front, more the ordinary one."""
    cfg = dataclasses.replace(VARIANTS["shared_tied"], dtype=dtype)
    assert cfg.tie_head
    prompts = [PROMPTS[i % len(PROMPTS)][: 1 + i] for i in range(count)]
    ids, lengths = padded(prompts)
    params = weights("shared_tied")
    recorded = generate(params, cfg, ids, lengths, max_new_tokens=NEW, record=True)
    plain = generate(params, cfg, ids, lengths, max_new_tokens=NEW)
    np.testing.assert_array_equal(plain.tokens, recorded.tokens)


# ------------------------------------------------------------------------------------- stopping
def test_rows_end_with_the_end_token_and_calls_stop():
    row = 1
    free = run("last_hidden", [PROMPTS[row]])
    eos = int(free.tokens[0, 4])
    first = free.tokens[0].tolist().index(eos)
    cfg = dataclasses.replace(BASE, eos_id=eos)
    ended = run("last_hidden", [PROMPTS[row]], cfg=cfg)
    kept = free.tokens[0, : first + 1].tolist()
    assert ended.tokens[0].tolist() == kept + [BASE.pad_id] * (NEW - first - 1)
    assert int(ended.lengths[0]) == first + 1
    assert int(ended.decoder_calls) < int(free.decoder_calls)
    assert int(ended.encoder_calls) < int(free.encoder_calls)
    # In a batch the others go on.
    batch = run("last_hidden", PROMPTS, cfg=cfg)
    np.testing.assert_array_equal(batch.tokens[row], ended.tokens[0])
    for lengths, tokens in zip(batch.lengths.tolist(), batch.tokens.tolist(), strict=True):
        assert lengths == (tokens.index(eos) + 1 if eos in tokens else NEW)
    # The prompt's own end token, in the tail that starts the first block, ends nothing.
    out = run("last_hidden", [[2, 3, 4, 5, eos]], cfg=cfg)
    assert np.count_nonzero(out.steps) > 1 or eos in out.tokens[0, :3].tolist()


def test_fewer_steps_mean_fewer_calls():
    full, half = run("last_hidden", PROMPTS), run("last_hidden", PROMPTS, num_steps=2)
    assert int(half.decoder_calls) < int(full.decoder_calls)
    assert np.max(half.steps) == 2 and not np.any(half.tokens == BASE.mask_id)
    sure = run("last_hidden", PROMPTS, threshold=0.0)
    assert np.max(sure.steps) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "posterior", "greedy": False},
        {"confidence": "none", "num_steps": 7, "first_hitting": False},
    ],
)
def test_other_strategies_fill_every_position(options):
    tokens = np.asarray(run("last_hidden", PROMPTS, key=jax.random.key(0), **options).tokens)
    assert tokens.shape == (4, NEW) and np.all((tokens >= 0) & (tokens < BASE.mask_id))


# ------------------------------------------------------------------------------ denoising steps
def logits_of(probabilities):
    """[1, S, V=23] logits with the given best and second probabilities per position."""
    rows = np.full((len(probabilities), 23), 1e-6)
    for i, (best, second) in enumerate(probabilities):
        rows[i, i], rows[i, i + 5] = best, second
        rows[i, 21] += 1 - rows[i].sum()
    rows[:, 22] = 50.0  # the mask's own score must not matter
    return jnp.log(jnp.asarray(rows, jnp.float32))[None]


KEYS = jax.random.split(jax.random.key(0), 1)
STEP = logits_of([(0.5, 0.0), (0.7, 0.29), (0.6, 0.05), (0.9, 0.05)])


def written(masked=(True,) * 4, share=2, **options):
    _, write = predict_step(
        STEP, jnp.asarray([masked]), jnp.int32(share), KEYS, BASE, DecodeSettings(**options)
    )
    return np.asarray(write)[0].tolist()


def test_least_sure_positions_stay_masked():
    assert written() == [False, True, False, True]
    assert written(share=3) == [False, False, False, True]
    assert written(share=0) == [True] * 4


def test_margin_orders_differently():
    # Best and second best: by probability position 3 beats 1, by margin 1 beats 3.
    close = logits_of([(0.5, 0.25), (0.6, 0.2), (0.4, 0.3), (0.65, 0.34)])
    for confidence, want in (("probability", 3), ("margin", 1)):
        settings = DecodeSettings(confidence=confidence)
        _, write = predict_step(close, jnp.ones((1, 4), bool), jnp.int32(3), KEYS, BASE, settings)
        assert np.flatnonzero(write[0]).tolist() == [want]


def test_at_least_one_position_is_written():
    assert sum(written(masked=(True, False, True, False), share=4)[i] for i in (0, 2)) == 1


def test_threshold_writes_regardless_of_the_share():
    assert written(share=3, threshold=0.65) == [False, True, False, True]


def test_proposed_tokens_are_the_best_ones():
    token, _ = predict_step(
        STEP, jnp.ones((1, 4), bool), jnp.int32(0), KEYS, BASE, DecodeSettings()
    )
    np.testing.assert_array_equal(token[0], [0, 1, 2, 3])


def test_posterior_step_follows_its_law():
    n, alphas = 20000, (jnp.float32(0.3), jnp.float32(0.55))
    p = np.array([0.5, 0.3, 0.2])
    cfg = dataclasses.replace(BASE, vocab_size=4, mask_id=3)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray([*p, 1.0])), (n, 1, 4))
    keys = jax.random.split(jax.random.key(1), n)
    settings = DecodeSettings(strategy="posterior", greedy=False)
    for last in (False, True):
        token, write = posterior_step(logits, alphas, jnp.asarray(last), keys, cfg, settings)
        stay = 0.0 if last else (1 - 0.55) / (1 - 0.3)
        want = np.array([*(p * (1 - stay)), stay]) * n
        counts = np.bincount(np.asarray(token).ravel(), minlength=4)
        assert np.all(counts[want == 0] == 0)
        chi2 = np.sum((counts - want)[want > 0] ** 2 / want[want > 0])
        assert chi2 < 16.3  # 0.1 % of 3 degrees of freedom
        np.testing.assert_array_equal(write, token != 3)


def test_settings_are_checked():
    assert DecodeSettings(strategy="predict_then_noise").strategy == "predict_and_noise"
    with pytest.raises(UserError, match="'guess'"):
        DecodeSettings(strategy="guess")
    with pytest.raises(UserError, match="key"):
        run("last_hidden", PROMPTS, greedy=False)


@pytest.mark.parametrize("confidence", ["probability", "none"])
@pytest.mark.parametrize("share_open", [0.0, 0.1, 0.5, 1.0])
def test_head_on_masked_positions_alone_changes_nothing(confidence, share_open):
    rng = np.random.default_rng(3)
    batch, size, width = 5, 4, 6
    hidden = jnp.asarray(rng.normal(size=(batch, size, width)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(width, BASE.vocab_size)), jnp.float32)
    masked = jnp.asarray(rng.random((batch, size)) < share_open)
    settings = DecodeSettings(confidence=confidence, threshold=0.6)
    keys = jax.random.split(jax.random.key(1), batch)
    rest = jnp.int32(1), keys, BASE, settings
    token, write = predict_step(hidden @ kernel, masked, *rest)

    def best(states):
        summary = summarise_scores((states @ kernel)[None], suppress_id=BASE.mask_id)
        return summary.best[0], summary.confidence[0]

    found, chosen = predict_open_step(best, [8, 20], hidden, masked, *rest)
    np.testing.assert_array_equal(chosen & masked, write & masked)
    np.testing.assert_array_equal(jnp.where(masked, found, 0), jnp.where(masked, token, 0))
