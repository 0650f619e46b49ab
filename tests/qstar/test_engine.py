"""The engine on bigram tables: aborted rows, end tokens, aligned vocabularies, one model alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from qstar.backend import Request
from qstar.engine import KEPT_PLANS, JaxBackend, Plan, programs
from qstar.jax_backend import fitting_slots, slot_bytes
from qstar.law import LawSettings
from qstar.networks import DecoderNetwork, TableNetwork
from qstar.outcome import problem
from qstar.scheduler import Finished, schedule
from qstar.slots import Columns, Decoding
from qstar.texts import Detokenizer
from qstar.tilt import AlphaSettings
from qstar.vocabulary import align

V, END, N = 7, 6, 6
GREEDY = Decoding(AlphaSettings("fixed"), LawSettings(), V, N, temperature=0.0)


def chain(*after: int) -> np.ndarray:
    """A table whose most probable successor of token i is after[i]."""
    table = np.random.default_rng(0).normal(size=(V, V)).astype(np.float32)
    table[np.arange(V), list(after)] += 20.0
    return table


COUNT_UP = chain(1, 2, 3, 4, 5, 6, 0)
STOPS = Columns(None, None, None, None, jnp.arange(V) == END)


def run(
    decoding: Decoding,
    tables: Sequence[np.ndarray],
    starts: Sequence[int],
    columns: Columns = STOPS,
    texts: Detokenizer | None = None,
) -> dict[int, Finished]:
    """Every start token's continuation, on two slots."""
    networks = tuple(TableNetwork(table.shape[1]) for table in tables)
    params = [jnp.asarray(table) for table in tables]
    backend = JaxBackend(Plan(networks, decoding), params, columns, 2, 0, 1, burst=2)
    requests = (Request(i, 0, [start], [start]) for i, start in enumerate(starts))
    return {f.request.sample_idx: f for f in schedule(backend, requests, texts)}


def tokens(found: dict[int, Finished]) -> list[list[int]]:
    """Columns of every output, in order."""
    return [found[i].output.columns.tolist() for i in sorted(found)]


def test_a_row_without_numbers_is_aborted_alone() -> None:
    broken = COUNT_UP.copy()
    broken[3] = np.nan
    found = run(GREEDY, [COUNT_UP, broken], [0, 4, 2, 4])
    assert tokens(found) == [[1, 2, 3], [5, 6], [3], [5, 6]]
    assert [found[i].output.failed for i in range(4)] == [True, False, True, False]
    reason = problem(found[0], aligned=False)
    assert reason is not None and "token 3" in reason
    assert problem(found[1], aligned=False) is None
    burst = programs(Plan((TableNetwork(V),) * 2, GREEDY)).burst
    compiled = burst._cache_size()
    run(GREEDY, [broken, COUNT_UP], [4, 0])
    assert burst._cache_size() == compiled > 0


def test_programs_live_as_long_as_they_are_held() -> None:
    """Engines hold theirs; of the others, those of the last plans stay."""
    networks, tables = (TableNetwork(V),) * 2, [jnp.asarray(COUNT_UP)] * 2
    plans = [
        Plan(networks, dataclasses.replace(GREEDY, max_new_tokens=N + 1 + i))
        for i in range(KEPT_PLANS + 1)
    ]
    backend = JaxBackend(plans[0], tables, STOPS, 2, 0, 1)
    assert len(list(schedule(backend, iter([Request(0, 0, [0], [0])])))) == 1
    for plan in plans[1:]:
        programs(plan)
    assert programs(plans[0]) is backend.programs
    for plan in plans[1:]:
        programs(plan)
    client = jax.devices()[0].client
    before = len(client.live_executables())
    del backend
    assert len(client.live_executables()) <= before - 2  # a burst and a prefill at least


class Letters:
    """Token i is the i-th letter."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The letters."""
        assert skip_special_tokens
        return "".join("abcdefg"[i] for i in ids)


def test_stop_strings_cut_text_and_tokens() -> None:
    texts = Detokenizer(Letters(), stop_strings=("cd", "xy"))
    found = run(GREEDY, [COUNT_UP, COUNT_UP], [0, 3], texts=texts)
    assert tokens(found) == [[1, 2, 3], [4, 5, 6]]
    assert [f.finish_reason for f in found.values()] == ["stop", "stop"]
    assert [texts.answer(found[i].output) for i in (0, 1)] == ["b", "ef"]
    assert len(found[0].output.values["alpha"]) == 3


def test_end_tokens_that_differ_are_merged() -> None:
    """Each model ends with its own symbol; apart they hardly ever end together."""
    theta, t = np.zeros((2, V, V), np.float32)
    theta[:, 5], t[:, 4] = 3.0, 3.0  # 77 % each
    theta[:, 4], t[:, 5] = -9.0, -9.0
    stops = dataclasses.replace(STOPS, stops=(jnp.arange(V) == 4) | (jnp.arange(V) == 5))
    merged = dataclasses.replace(GREEDY, merge=(4, 5))
    found = run(merged, [theta, t], [0], stops)
    assert tokens(found) == [[4]] and found[0].finish_reason == "stop"
    share = np.exp(3) + np.exp(-9)
    np.testing.assert_allclose(
        np.exp(found[0].output.values["log_theta"]), share / (share + 5), rtol=1e-5
    )
    apart = run(GREEDY, [theta, t], [0], stops)
    assert apart[0].finish_reason == "length" and len(apart[0].output.columns) == N


def test_aligned_vocabularies_feed_each_model_its_own_ids() -> None:
    """pi_t has the same words in another order, and one more."""
    words = [f"w{i}" for i in range(V)]
    order = [3, 0, 6, 1, 5, 2, 4]
    theta_ids = {word: i for i, word in enumerate(words)}
    t_ids = {word: order[i] for i, word in enumerate(words)} | {"more": V}
    aligned = align(theta_ids, t_ids)
    t = np.full((V + 1, V + 1), -2.0, np.float32)
    for i in range(V):
        for j in range(V):
            t[order[i], order[j]] = COUNT_UP[i, j]
    t[:, V] = 16.0  # some probability of t's is on a word that theta lacks
    columns = Columns(
        jnp.asarray(aligned.columns_theta),
        jnp.asarray(aligned.columns_t),
        None,
        jnp.asarray(aligned.allowed),
        jnp.arange(V + 1) == END,
    )
    networks = (TableNetwork(V), TableNetwork(V + 1))
    decoding = dataclasses.replace(GREEDY, size=V + 1)
    tables = [jnp.asarray(COUNT_UP), jnp.asarray(t)]
    backend = JaxBackend(Plan(networks, decoding), tables, columns, 2, 0, 1)
    requests = iter([Request(0, 0, [0], [order[0]]), Request(1, 0, [4], [order[4]])])
    found = {f.request.sample_idx: f for f in schedule(backend, requests)}
    assert tokens(found) == [[1, 2, 3, 4, 5, 6], [5, 6]]
    assert found[0].output.values["overlap_t"].max() < 0.9999
    assert problem(found[0], aligned=True) is None
    strange = {**found[0].output.values, "overlap_t": np.full(6, 0.5)}
    output = dataclasses.replace(found[0].output, values=strange)
    reason = problem(found[0]._replace(output=output), aligned=True)
    assert reason is not None and "50.0%" in reason


@pytest.mark.parametrize(("source", "alpha"), [("theta", 1.0), ("same", 0.5)])
def test_one_model_alone(source: str, alpha: float) -> None:
    method = AlphaSettings("fixed", 1.0) if source == "theta" else AlphaSettings()
    decoding = dataclasses.replace(GREEDY, alpha=method, source=source)
    found = run(decoding, [COUNT_UP], [3])
    values = found[0].output.values
    assert tokens(found) == [[4, 5, 6]] and np.all(values["alpha"] == alpha)
    assert np.all(values["kl_theta"] == 0) and np.all(values["log_ess_theta"] == 0)
    assert np.isnan(values["kl_t"]).all() == (source == "theta")
    np.testing.assert_allclose(values["log_q"], values["log_theta"], atol=1e-6)


def test_the_cache_grows_and_slots_fit_the_memory() -> None:
    from common.lm.config import DecoderConfig

    cfg = DecoderConfig("llama", V, 8, 8, 1, 2, 1, 4, max_positions=4096)
    plan = Plan((DecoderNetwork(cfg),), dataclasses.replace(GREEDY, source="both"))
    assert plan.shared and plan.rows_per_slot == 2
    each = slot_bytes(plan, 100)
    assert each >= 2 * 100 * DecoderNetwork(cfg).token_bytes
    assert fitting_slots(plan, 100, free=3 * each / 0.8 + 1) == 3
    with pytest.raises(UserError, match=r"100 tokens fits.*data.max_prompt_tokens"):
        fitting_slots(plan, 100, free=each / 2)
    params: Any = {}
    backend = JaxBackend(plan, [params], STOPS, 1, 0, max_prompt_tokens=1000)
    assert backend.capacity == 128 and backend.longest == 1005
    backend._reserve(129)
    assert backend.capacity == 256 and backend._state.caches[0].capacity == 256
    backend._reserve(1005)
    assert backend._state.caches[0].capacity == 1005
