"""Recorded AdamW runs: losses, gradient norms and final weights through the real training step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.dist import make_mesh
from halting_jax.act_rnn import ActRnnSettings, make_act_rnn
from halting_jax.act_torch_names import export_act_rnn, import_act_rnn
from halting_jax.learner import OptimSettings, compile_steps, init_state, make_step
from halting_jax.objective import act_objective
from halting_jax.schedules import time_penalty
from halting_jax.tasks.maze import make_maze
from halting_jax.types import Batch, Model
from halting_jax.universal_transformer import UtSettings, make_universal_transformer
from halting_jax.ut_torch_names import export_ut, import_ut
from tests.parity.fixtures import fixture_root


def _cases() -> list[Any]:
    found = []
    for path in sorted((fixture_root() / "halting").glob("*.npz")):
        with np.load(path) as file:
            if json.loads(str(file["meta_json"])).get("kind") == "train_trace":
                found.append(pytest.param(path, id=path.stem))
    return found


def _optimizer(text: str) -> tuple[float, float]:
    """Rate and decay from the recording's own description."""
    words = text.split()
    return float(words[words.index("lr") + 1]), float(words[words.index("wd") + 1])


def _model(
    meta: dict[str, Any], shape: Any, tensors: dict[str, np.ndarray]
) -> tuple[Model, Any, Callable[[Any], dict[str, np.ndarray]], Callable[[Any], jax.Array]]:
    embedding = tensors["embedding.weight"].shape[1]
    if meta["model"] == "act":
        settings = ActRnnSettings(
            hidden_size=meta["hidden_size"],
            embedding_size=embedding,
            cell=meta["cell_type"],
            time_limit=meta["time_limit"],
            halt_bias=meta["halt_bias_init"],
        )
        tau = time_penalty(
            meta["time_penalty"], meta["time_penalty_start"], meta["time_penalty_warmup_steps"]
        )
        params = import_act_rnn(tensors, shape, settings)
        return (
            make_act_rnn(shape, settings),
            params,
            lambda p: export_act_rnn(p, shape, settings),
            tau,
        )
    ut = UtSettings(
        hidden_size=meta["hidden_size"],
        embedding_size=embedding,
        heads=meta["num_heads"],
        key_depth=meta["key_depth"],
        value_depth=meta["value_depth"],
        filter_size=meta["filter_size"],
        max_hops=meta["max_hops"],
        act=True,
        halt_bias=meta["halt_bias_init"],
    )
    return (
        make_universal_transformer(shape, ut),
        import_ut(tensors, shape, ut),
        lambda p: export_ut(p, shape, ut),
        time_penalty(meta["act_loss_weight"], 0.0, 0),
    )


@pytest.mark.parametrize("path", _cases())
def test_trace(path: Path) -> None:
    file = np.load(path)
    meta = json.loads(str(file["meta_json"]))
    tensors = {k.removeprefix("init/"): file[k] for k in file.files if k.startswith("init/")}
    inputs, labels = file["in/x"], file["in/y"]
    steps, rows, length = inputs.shape
    close = TOLERANCE[meta["model"]]
    with jax.enable_x64(True):
        classes = tensors["embedding.weight"].shape[0]
        task = make_maze(length, classes)
        model, params, export, tau = _model(meta, task.shape, tensors)
        rate, decay = _optimizer(meta["optimizer"])
        settings = OptimSettings(
            rate=lambda step: jnp.asarray(rate, float), tau=tau, weight_decay=decay
        )

        def draw(key: jax.Array, row_ids: jax.Array, sent: Any) -> Batch:
            x, y = sent
            true = jnp.ones(x.shape, bool)
            nothing = jnp.zeros((len(x), 0), jnp.int32)
            return Batch(x, true, y, true, nothing, jnp.zeros(len(x), jnp.int32))

        step = make_step(task, model, act_objective(task, model), settings)
        run = compile_steps(step, draw, make_mesh(1))
        state = jax.jit(lambda: init_state(model, settings, 0))()
        state = state.replace(  # type: ignore[attr-defined]
            params=jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        )
        state = state.replace(  # type: ignore[attr-defined]
            opt_state=jax.tree.map(
                lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state.opt_state
            )
        )
        row_ids = jnp.arange(rows, dtype=jnp.int32)
        for i in range(steps):
            sent = tuple(jnp.asarray(a[i])[:, None].astype(jnp.int32) for a in (inputs, labels))
            penalty = float(tau(i))
            state, sums = run(state, row_ids, sent, 1)
            terms = {k: float(v.total / v.count) for k, v in sums.means.items() if k in TERMS}
            loss = terms["classification"] + penalty * terms["ponder"]
            assert loss == pytest.approx(float(file["out/loss"][i]), abs=close), i
            norm = float(file["out/grad_norm"][i])
            assert float(sums.grad_norm) == pytest.approx(norm, abs=close), i
        final = export(jax.device_get(state.params))
    for name, value in final.items():
        np.testing.assert_allclose(value, file[f"final/{name}"], atol=close, err_msg=name)


TERMS = ("classification", "ponder")
# The sinusoids of a Universal Transformer are float32 in the recordings.
TOLERANCE = {"act": 1e-9, "ut": 1e-6}


def test_there_are_recordings() -> None:
    assert _cases()
