"""Rates, time penalties and the running average against the recordings."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halting_jax.schedules import learning_rate, time_penalty
from tests.parity.fixtures import fixture_root


def _files() -> list[np.lib.npyio.NpzFile]:
    return [np.load(path) for path in sorted((fixture_root() / "halting").glob("schedules*.npz"))]


def _cases(prefix: str) -> Iterator[tuple[np.lib.npyio.NpzFile, str]]:
    for file in _files():
        for name in file.files:
            if name.startswith(prefix):
                yield file, name


def test_there_are_recordings() -> None:
    assert _files()


@pytest.mark.parametrize("file, name", [pytest.param(f, n, id=n) for f, n in _cases("lr/")])
def test_rate_per_epoch(file: np.lib.npyio.NpzFile, name: str) -> None:
    import json

    base = json.loads(str(file["meta_json"]))["lr_base"]
    match = re.fullmatch(r"lr/total(\d+)_warmup(\d+)", name)
    assert match
    total, warmup = int(match[1]), int(match[2])
    per_epoch = 7
    with jax.enable_x64(True):
        rate = learning_rate(base, "cosine", warmup, total, per_epoch)
        steps = jnp.arange(len(file[name]) * per_epoch)
        found = np.asarray(jax.vmap(rate)(steps)).reshape(-1, per_epoch)
    # The rate holds for a whole epoch.
    np.testing.assert_allclose(found, np.repeat(file[name][:, None], per_epoch, 1), rtol=1e-9)


@pytest.mark.parametrize(
    "file, name", [pytest.param(f, n, id=n) for f, n in _cases("time_penalty/target")]
)
def test_time_penalty(file: np.lib.npyio.NpzFile, name: str) -> None:
    match = re.fullmatch(r"time_penalty/target([\d.e-]+)_start([\d.e-]+)_warmup(-?\d+)", name)
    assert match
    with jax.enable_x64(True):
        tau = time_penalty(float(match[1]), float(match[2]), int(match[3]))
        found = jax.vmap(tau)(jnp.asarray(file["time_penalty/steps"]))
    np.testing.assert_allclose(found, file[name], rtol=1e-9)


@pytest.mark.parametrize("file, name", [pytest.param(f, n, id=n) for f, n in _cases("ema/decay")])
def test_running_average(file: np.lib.npyio.NpzFile, name: str) -> None:
    decay = float(name.removeprefix("ema/decay"))
    params, expected = file["ema/params"], file[name]
    with jax.enable_x64(True):
        average = jnp.asarray(params[0])
        np.testing.assert_allclose(average, expected[0], rtol=1e-9)
        for new, wanted in zip(params[1:], expected[1:], strict=True):
            average = optax.incremental_update(jnp.asarray(new), average, 1.0 - decay)
            np.testing.assert_allclose(average, wanted, rtol=1e-9, atol=1e-12)
