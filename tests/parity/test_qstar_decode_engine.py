"""Recorded greedy decodes of small checkpoints through the engine, with slots and refill."""

import functools
import json
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest

from common.lm import weights
from qstar.backend import Request
from qstar.engine import JaxBackend, Plan
from qstar.law import LawSettings
from qstar.networks import DecoderNetwork
from qstar.scheduler import schedule
from qstar.slots import Columns, Decoding
from qstar.tilt import AlphaSettings
from tests.parity.fixtures import fixture_root

ROOT = fixture_root() / "qstar" / "tiny"
EXPECTED = json.loads((ROOT / "expected.json").read_text()) if ROOT.is_dir() else {}
RUNS = EXPECTED.get("runs", [])
TOLERANCES = {
    "alpha": 1e-4,
    "kl_theta": 1e-4,
    "kl_t": 1e-4,
    "log_ess_theta": 1e-3,
    "log_ess_t": 1e-3,
}


@functools.cache
def load(name: str) -> weights.Model:
    """One checkpoint, read once."""
    return weights.load_model(ROOT / name)


def name_of(run: dict) -> str:
    """Test id of a run."""
    forced = "-forced" * run["force_first_token"]
    return f"{run['theta']}-{run['t']}-{run['alpha_method']}-{run['prompting']}{forced}"


def tokenizer_size(name: str) -> int:
    """Real size of a checkpoint's vocabulary, without padded rows."""
    folder = ROOT / name
    folder = folder if (folder / "tokenizer.json").is_file() else ROOT / "tok_t"
    stored = json.loads((folder / "tokenizer.json").read_text())
    ids = [*stored["model"]["vocab"].values(), *(t["id"] for t in stored["added_tokens"])]
    return max(ids) + 1


def make_backend(run: dict, slots: int, deterministic: bool = False) -> JaxBackend:
    """The engine of a run: equal checkpoints are one parameter set with two prompts."""
    models = [load(run["theta"]), load(run["t"])]
    size = tokenizer_size(run["theta"])
    decoding = Decoding(
        AlphaSettings(run["alpha_method"], run["fixed_alpha"]),
        LawSettings(),
        size,
        run["max_new_tokens"],
        float(run["temperature"]),
        force_first=run["force_first_token"],
    )
    stops = {i for model in models for i in model.stop_ids}
    if run["theta"] == run["t"]:
        models = models[:1]
    columns = Columns(None, None, None, None, jnp.asarray(np.isin(np.arange(size), list(stops))))
    longest = max(len(row[f"prompt_ids_{role}"]) for row in run["rows"] for role in ("theta", "t"))
    return JaxBackend(
        Plan(tuple(DecoderNetwork(model.cfg) for model in models), decoding),
        [model.params for model in models],
        columns,
        slots,
        seed=0,
        max_prompt_tokens=longest,
        deterministic=deterministic,
        burst=7,
    )


def check(run: dict, slots: int, rows: Sequence[int], deterministic: bool = False) -> None:
    """Decodes rows, in this order, and compares each with its recording."""
    backend = make_backend(run, slots, deterministic)
    prompts = [(run["rows"][i]["prompt_ids_theta"], run["rows"][i]["prompt_ids_t"]) for i in rows]
    requests = [Request(i, n, *prompts[n]) for n, i in enumerate(rows)]
    seen = 0
    for finished in schedule(backend, iter(requests)):
        wanted = run["rows"][finished.request.sample_idx]
        assert finished.output.columns.tolist() == wanted["tokens"]
        assert finished.finish_reason == wanted["finish_reason"]
        for name, tolerance in TOLERANCES.items():
            if name in wanted:
                got = finished.output.values[name]
                # A forced token is pi_t's; the recording starts behind it.
                skip = int(run["force_first_token"])
                np.testing.assert_allclose(
                    got[skip:], np.array(wanted[name], float)[skip:], atol=tolerance, err_msg=name
                )
        seen += 1
    assert seen == len(rows)


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_recorded_runs_with_refill(run):
    """More rows than slots, of mixed lengths: slots are filled again while others go on."""
    order = [*range(len(run["rows"])), 0]
    check(run, 2, order)


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("run", RUNS[:1], ids=name_of)
def test_other_numbers_of_slots(run, slots):
    """One row at a time, and all at once without refill."""
    check(run, slots, range(len(run["rows"])))


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_every_run_with_every_number_of_slots(run, slots, deterministic):
    """All combinations, each row twice."""
    check(run, slots, [*range(len(run["rows"]))] * 2, deterministic)
