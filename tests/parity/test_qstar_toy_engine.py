"""Sampled outputs of the engine against exact probabilities: a pair of bigram tables."""

import json
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from qstar.backend import Request
from qstar.engine import JaxBackend, Plan
from qstar.law import LawSettings
from qstar.networks import TableNetwork
from qstar.scheduler import schedule
from qstar.slots import Columns, Decoding
from qstar.tilt import AlphaSettings
from tests.parity.fixtures import fixture_root

FILE = fixture_root() / "qstar" / "toy_decode.json"
TOY = json.loads(FILE.read_text()) if FILE.is_file() else {"laws": []}
SAMPLES, SLOTS = 20000, 1000
Z_LIMIT = 3.1  # one-sided p of about 1e-3


def name_of(law: dict) -> str:
    """Test id of a law."""
    return f"{law['method']}-T{law['temperature']}" + "-forced" * law["force_first_token"]


def chi_square_score(counts: Counter, probability: dict[str, float]) -> float:
    """Normal score of the chi-square statistic (Wilson-Hilferty); rare outputs are pooled."""
    total = sum(counts.values())
    observed, expected, rest = [], [], [0.0, 0.0]
    for output, p in probability.items():
        if total * p >= 5:
            observed.append(counts[output])
            expected.append(total * p)
        else:
            rest[0] += counts[output]
            rest[1] += total * p
    if rest[1] > 0:
        observed.append(rest[0])
        expected.append(rest[1])
    o, e = np.array(observed), np.array(expected)
    statistic, degrees = float(np.sum((o - e) ** 2 / e)), len(o) - 1
    third = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - third)) / third**0.5


@pytest.mark.parametrize("law", TOY["laws"], ids=name_of)
def test_outputs_follow_the_exact_law(law):
    """20,000 samples through slots, refill and the compiled step; alpha of every token too."""
    size = TOY["V"]
    fixed = law["fixed_alpha"]
    decoding = Decoding(
        AlphaSettings(law["method"], 0.5 if fixed is None else fixed),
        LawSettings(),
        size,
        TOY["max_new_tokens"],
        law["temperature"],
        force_first=law["force_first_token"],
    )
    stops = jnp.arange(size) == TOY["eos"]
    tables = [jnp.asarray(TOY[f"table_{role}"], jnp.float32) for role in ("theta", "t")]
    backend = JaxBackend(
        Plan((TableNetwork(size), TableNetwork(size)), decoding),
        tables,
        Columns(None, None, None, None, stops),
        SLOTS,
        seed=1,
        max_prompt_tokens=1,
        prefill_rows=SLOTS,
    )
    start = [TOY["start"]]
    requests = (Request(i, 0, start, start) for i in range(SAMPLES))
    counts: Counter = Counter()
    alphas = np.asarray(law["alpha_by_previous_token"])
    for finished in schedule(backend, requests):
        tokens = finished.output.columns.tolist()
        counts[" ".join(map(str, tokens))] += 1
        if counts.total() <= 200:
            wanted = alphas[[TOY["start"], *tokens[:-1]]]
            if law["force_first_token"]:
                wanted[0] = 0.0
            np.testing.assert_allclose(finished.output.values["alpha"], wanted, atol=1e-5)
            ended = tokens[-1] == TOY["eos"]
            assert finished.finish_reason == ("stop" if ended else "length")
    assert counts.total() == SAMPLES
    assert set(counts) <= set(law["probability"])
    assert chi_square_score(counts, law["probability"]) < Z_LIMIT
