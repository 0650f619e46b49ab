"""Laws of selection, retrieval and decision that hold whatever the numbers are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esm.core.contrast import contrast
from esm.core.dpp import NONE, dpp_greedy
from esm.core.policy import NO_TOOL, Candidates, candidates, decide, uniform_choice
from esm.core.retrieval import PADDING, Entries, Retrieved, retrieve, unit
from esm.core.sets import SetRules, rank_sets

N, H, B = 24, 6, 8
_dpp = jax.jit(dpp_greedy, static_argnames="size")
_retrieve = jax.jit(retrieve, static_argnames="k")
_candidates = jax.jit(candidates, static_argnames="count")
_decide = jax.jit(decide)


def _keys(seed: int, count: int = N) -> np.ndarray:
    keys = np.random.default_rng(seed).normal(size=(count, H)) + 0.8
    return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def _brute_force(
    keys: np.ndarray, quality: np.ndarray, size: int, diversity: float, epsilon: float
) -> list[int]:
    """Greedy by the determinants themselves."""
    kernel = keys @ keys.T
    np.fill_diagonal(kernel, 1.0)
    kernel += epsilon * np.eye(len(keys))
    picked: list[int] = []

    def value(chosen: list[int]) -> float:
        _, logdet = np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])
        return float(np.log1p(quality[chosen]).sum() + diversity * logdet)

    for _ in range(size):
        rest = [i for i in range(len(keys)) if i not in picked]
        picked.append(max(rest, key=lambda i: (value([*picked, i]), -i)))
    return picked


def test_dpp_equals_the_greedy_maximum_of_determinants() -> None:
    with jax.enable_x64(True):
        for seed in range(4):
            keys = _keys(seed)
            quality = np.random.default_rng(seed + 9).uniform(0, 2, N)
            picks = _dpp(keys, quality, np.ones(N, bool), B, 0.7, 1e-3)
            assert picks.entry.tolist() == _brute_force(keys, quality, B, 0.7, 1e-3)


def test_dpp_follows_a_permutation_and_ignores_padding() -> None:
    keys, quality = _keys(1), np.random.default_rng(2).uniform(0, 2, N)
    order = np.random.default_rng(3).permutation(N)
    valid = np.arange(N) < N - 6
    with jax.enable_x64(True):
        plain = _dpp(keys, quality, valid, B, 0.7, 1e-3)
        moved = _dpp(keys[order], quality[order], valid[order], B, 0.7, 1e-3)
    assert order[np.asarray(moved.entry)].tolist() == plain.entry.tolist()
    assert max(plain.entry.tolist()) < N - 6


def test_dpp_given_forced_picks_and_groups() -> None:
    keys, quality = _keys(4), np.zeros(N)
    keys[1] = keys[0]  # a copy of the forced pick is worth least
    forced = np.full(B, NONE, np.int32)
    forced[0] = 0
    with jax.enable_x64(True):
        args = (keys, quality, np.ones(N, bool), B, 1.0, 1e-3)
        given = _dpp(*args, forced, np.zeros(N, np.int32)).entry.tolist()
        apart = _dpp(*args, forced, np.arange(N, dtype=np.int32)).entry.tolist()
    assert given[0] == 0 and 1 not in given
    # Entries of different groups are orthogonal: nothing is lost by a copy, ties go by index.
    assert apart == list(range(B))


def _entries(count: int = N) -> Entries:
    rng = np.random.default_rng(5)
    return Entries(
        keys=jnp.asarray(_keys(6, count), jnp.float32),
        layer=jnp.asarray(rng.integers(0, 2, count), jnp.int32),
        point=jnp.asarray(rng.integers(1, 4, count), jnp.int32),
        quality=jnp.asarray(rng.uniform(0.5, 1.5, count), jnp.float32),
        is_null=jnp.asarray(rng.integers(0, 3, count) == 0),
    )


def _query(seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, 2, H)).astype(np.float32), np.asarray([1, 2, 3], np.int32)


def test_retrieval_does_not_depend_on_lengths() -> None:
    entries, (query, point) = _entries(), _query()
    plain = _retrieve(entries, query, point, k=5, min_sim=-1.0, min_entries=1)
    longer = entries._replace(keys=unit(entries.keys * 7.0))
    scaled = _retrieve(longer, query * 0.01, point, k=5, min_sim=-1.0, min_entries=1)
    np.testing.assert_array_equal(plain.entry, scaled.entry)
    np.testing.assert_allclose(plain.sim, scaled.sim, atol=1e-6)


def test_entries_elsewhere_change_nothing() -> None:
    entries, (query, point) = _entries(), _query()
    other = _entries()._replace(point=jnp.full((N,), 9, jnp.int32))
    both = Entries(*(jnp.concatenate([a, b]) for a, b in zip(entries, other, strict=True)))
    alone = _retrieve(entries, query, point, k=5, min_sim=0.1, min_entries=1)
    among = _retrieve(both, query, point, k=5, min_sim=0.1, min_entries=1)
    for field in ("entry", "sim", "valid", "reason", "num_entries"):
        np.testing.assert_allclose(getattr(alone, field), getattr(among, field), atol=1e-6)


def test_padding_is_never_found() -> None:
    entries, (query, point) = _entries(), _query()
    padded = entries._replace(point=jnp.where(jnp.arange(N) < 4, entries.point, PADDING))
    found = _retrieve(padded, query, point, k=5, min_sim=-1.0, min_entries=1)
    assert not (found.valid & (found.entry >= 4)).any()


def _plain_candidates(found: Retrieved, entries: Entries, row: int, count: int) -> list[int]:
    """The order of Python tuples."""
    rows = [
        (float(found.sim[row, i] * entries.quality[e]), float(found.sim[row, i]),
         float(entries.quality[e]), int(e))
        for i, e in enumerate(found.entry[row].tolist())
        if found.valid[row, i] and not entries.is_null[e]
    ]  # fmt: skip
    return [row[3] for row in sorted(rows, key=lambda r: r[:3], reverse=True)][:count]


def test_candidates_are_ordered_like_tuples() -> None:
    entries, (query, point) = _entries(), _query()
    found = _retrieve(entries, query, point, k=8, min_sim=-1.0, min_entries=1)
    for count in (3, 12):
        cand = _candidates(found, entries, count=count)
        for row in range(3):
            kept = [int(tool) for tool in cand.tool[row] if tool != NO_TOOL]
            assert kept == _plain_candidates(found, entries, row, count)


def _scan(
    cand: Candidates, row: int, conf: np.ndarray, probed: bool, tau: float, k_scale: float
) -> tuple[int, float]:
    """One row in plain Python: the first tool strictly above the running best."""
    beta, rho = 1.5, 0.4
    best, choice, null = beta * float(cand.null_ahat[row]), 0, beta * float(cand.null_ahat[row])
    for i, tool in enumerate(cand.tool[row].tolist()):
        if tool == NO_TOOL:
            continue
        gain = float(conf[i + 1] - conf[0]) if probed else 0.0
        score = beta * float(cand.ahat[row, i]) + rho * gain
        if score > best:
            best, choice = score, i + 1
    if choice and ((probed and abs(best - null) <= 1e-12) or best < tau):
        choice, best = 0, null
    return (choice, k_scale * best) if choice and k_scale * best > 0 else (0, 0.0)


def _random_candidates(rng: np.random.Generator, rows: int = 16, tools: int = 3) -> Candidates:
    tool = rng.integers(-1, 9, (rows, tools)).astype(np.int32)
    tool = -np.sort(-tool, axis=1)  # what exists stands first
    values: Any = [jnp.asarray(rng.normal(size=tool.shape), jnp.float32) for _ in range(2)]
    null = jnp.asarray(np.abs(rng.normal(size=rows)), jnp.float32)
    return Candidates(jnp.asarray(tool), *values, null)


def test_decisions_equal_a_scan() -> None:
    rng = np.random.default_rng(11)
    for tau, k_scale in ((0.0, 0.5), (0.8, 0.5), (-9.0, -1.0)):
        cand = _random_candidates(rng)
        conf = rng.normal(size=(16, 4)).astype(np.float32)
        probed = rng.integers(0, 2, 16).astype(bool)
        found = _decide(cand, conf, 1.5, 0.4, tau, k_scale, probed)
        for row in range(16):
            choice, alpha = _scan(cand, row, conf[row], bool(probed[row]), tau, k_scale)
            assert int(found.choice[row]) == choice
            assert abs(float(found.alpha[row]) - alpha) < 1e-5


def test_a_higher_threshold_never_adds_a_tool() -> None:
    cand = _random_candidates(np.random.default_rng(12))
    conf, probed = np.zeros((16, 4), np.float32), np.zeros(16, bool)
    choice = [
        np.asarray(_decide(cand, conf, 1.5, 0.4, tau, 0.5, probed).choice)
        for tau in (-1.0, 0.0, 0.5, 1.0, 9.0)
    ]
    for low, high in zip(choice, choice[1:], strict=False):
        assert not ((low == 0) & (high > 0)).any()
    assert not choice[-1].any()


def test_strength_is_capped_and_random_choices_are_among_the_tools() -> None:
    cand = _random_candidates(np.random.default_rng(13))
    conf, probed = np.zeros((16, 4), np.float32), np.zeros(16, bool)
    capped = _decide(cand, conf, 1.5, 0.4, 0.0, 5.0, probed, None, 0.25)
    assert float(capped.alpha.max()) == 0.25
    draws = np.linspace(0, 0.999, 16).astype(np.float32)
    choice = np.asarray(uniform_choice(cand.tool, draws))
    count = (np.asarray(cand.tool) != NO_TOOL).sum(axis=1)
    assert (choice <= count).all() and ((choice > 0) == (count > 0)).all()
    forced = _decide(cand, conf, 1.5, 0.4, -99.0, 1.0, probed, choice)
    scores = np.take_along_axis(np.asarray(forced.scores), choice[:, None], axis=1)[:, 0]
    np.testing.assert_array_equal(np.asarray(forced.choice), np.where(scores > 0, choice, 0))


def test_contrast_is_the_difference_of_means() -> None:
    rng = np.random.default_rng(14)
    states = rng.normal(size=(5, 2, 1, H)).astype(np.float32)
    pos = np.asarray([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], bool)
    neg = np.asarray([[0, 1, 0, 0, 0], [1, 1, 0, 1, 0]], bool)
    rewards = rng.normal(size=5).astype(np.float32)
    plain = contrast(states, pos, neg, rewards)
    for m in range(2):
        right, wrong = states[pos[m], m].mean(axis=0), states[neg[m], m].mean(axis=0)
        np.testing.assert_allclose(plain.vector[m], right - wrong, atol=1e-5)
        gap = rewards[pos[m]].mean() - rewards[neg[m]].mean()
        np.testing.assert_allclose(plain.quality[m], gap, atol=1e-6)
    # Points are fully separated, clouds less so.
    apart = contrast(states, pos, neg, rewards, "separation").quality
    ratio = np.asarray(apart / plain.quality)
    assert (ratio > 0).all() and (ratio < 1).all()
    single = contrast(states, pos[1:] & False | pos[1:], neg[:1], rewards, "separation")
    assert np.isfinite(np.asarray(single.quality)).all()


def test_too_few_wrong_answers_are_skipped() -> None:
    run = jax.jit(functools.partial(rank_sets, rules=SetRules(2, 2, min_incorrect=2)))
    reward = np.asarray([0.9, 0.8, -0.1, -0.2, 0.0])
    valid = np.asarray([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    sets = run(reward, np.asarray([1, 1, 0, 0, 0], bool), valid)
    assert sets.reason.tolist() == [0, 2, 3, 1]
    assert np.flatnonzero(sets.neg[0]).tolist() == [2, 3]
