"""The speed measurement of the halting models: it runs, and both sides compute the same."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bench.halting import GROUPS, main
from bench.halting_blocks import plain_logits
from bench.halting_evaluation import cases, spread_halting, steps_of_rows
from bench.halting_scenes import MAZE_TOKENS, TINY, get_config, random_grids
from halting_jax.act_networks import ActRnnSettings
from halting_jax.act_torch_names import export_act_rnn
from halting_jax.build import build, time_penalty_target
from halting_jax.defaults import finalize
from halting_jax.objective import act_objective
from halting_jax.signals import make_signals
from halting_jax.types import Batch, TaskShape
from halting_jax.ut_settings import UtSettings
from halting_jax.ut_torch_names import export_ut

SIDE = 4


def check(groups: tuple[str, ...], target: Path, table: str) -> None:
    result = json.loads(target.read_text())
    assert {"command", "machine", "sizes", "torch_threads", "rows"} <= set(result)
    for row in result["rows"]:
        assert row["name"] in table
        assert row["ratio"] > 0 and row["work"] > 0 and row["floor"] > 0
        assert row["traces"][0] > 0 and row["traces"][1] == 0, f"{row['name']} compiled again"
    assert {row["name"].split()[0] for row in result["rows"]} == set(groups)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_a_group_prints_its_rows(
    group: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "speed.json"
    main(["--repeats", "2", "--only", group, "--json", str(target)], TINY)
    check((group,), target, capsys.readouterr().out)


def test_an_unknown_group_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--only", "loop,nothing"])
    assert refused.value.code == 2
    assert "evaluation" in capsys.readouterr().err


def test_plain_blocks_are_the_model_without_halting() -> None:
    config = get_config("maze_ut", "tiny")
    config.ut.act = False
    model = build(config, SIDE * SIDE, MAZE_TOKENS).model
    params = jax.jit(model.init)(jax.random.key(0))
    batch = random_grids(2, SIDE)
    expected = jax.jit(model.apply)(params, batch).logits
    signals = make_signals(SIDE * SIDE, config.model.hidden_size, config.ut.max_hops)
    for fused in (False, True):
        found = plain_logits(params, batch.inputs, signals, config.ut.heads, fused)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_are_made_to_differ_in_their_steps() -> None:
    """Otherwise there would be nothing that leaving rows could save."""
    case = cases(TINY)[0]
    params = spread_halting(case, TINY.eval_mean)
    steps = np.asarray(steps_of_rows(case.built.model, params, case.examples))
    assert abs(steps.mean() - TINY.eval_mean) < 1.0
    assert steps.max() == TINY.eval_limit and steps.min() <= 2


# ------------------------------------------------------------------------ the PyTorch models


def torch_case(name: str, variant: str, **changes: Any) -> tuple[ConfigDict, TaskShape, Batch, Any]:
    """A config, its task's shape, a batch and weights that halt after different steps."""
    config = get_config(name, variant)
    for key, value in changes.items():
        section, _, field = key.partition("__")
        config[section][field] = value
    finalize(config)
    if config.task.name == "maze":
        built = build(config, SIDE * SIDE, MAZE_TOKENS)
        batch = random_grids(5, SIDE)
    else:
        built = build(config)
        assert built.task.sample is not None
        batch = built.task.sample(jax.random.key(1), jnp.arange(5), "train")
    params = jax.tree.map(lambda x: 3 * x, jax.jit(built.model.init)(jax.random.key(0)))
    objective = act_objective(built.task, built.model)
    tau = jnp.float32(time_penalty_target(config))

    def loss(params: Any, batch: Batch) -> jax.Array:
        terms = objective(params, (), batch, jax.random.key(0), tau).terms
        return sum((t.weight * t.ratio.value for t in terms.values()), jnp.zeros(()))

    wanted = float(jax.jit(loss)(params, batch))
    return config, built.task.shape, batch, (params, wanted)


TORCH_CASES = {
    "parity": ("parity", "tiny", {}),
    "parity_gru": ("parity", "tiny", {"act__cell": "gru"}),
    "addition": ("addition", "tiny", {}),
    "logic": ("logic", "tiny", {}),
    "maze": ("maze_act", "tiny", {}),
    "maze_ut": ("maze_ut", "tiny", {"ut__act_loss_weight": 0.1}),
    "maze_ut_mix": ("maze_ut", "tiny", {"ut__act_mix": "accumulated", "ut__max_hops": 2}),
    "maze_ut_plain": ("maze_ut", "tiny", {"ut__act": False}),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", TORCH_CASES)
def test_torch_models_have_the_same_loss(name: str) -> None:
    import torch

    from bench.plain_torch_halting import Examples, loss_of, make_net

    config_name, variant, changes = TORCH_CASES[name]
    config, shape, batch, (params, wanted) = torch_case(config_name, variant, **changes)
    if config.model.type == "universal_transformer":
        fields = {f.name for f in dataclasses.fields(UtSettings)}
        given = {k: v for k, v in config.ut.items() if k in fields}
        ut = UtSettings(hidden_size=config.model.hidden_size, **given)
        tensors = export_ut(params, shape, ut)
    else:
        fields = {f.name for f in dataclasses.fields(ActRnnSettings)}
        given = {k: v for k, v in config.act.items() if k in fields}
        act = ActRnnSettings(hidden_size=config.model.hidden_size, **given)
        tensors = export_act_rnn(params, shape, act)
    net = make_net(config, shape)
    net.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in tensors.items()})
    arrays = (batch.inputs, batch.input_mask, batch.targets, batch.target_mask)
    inputs, valid, targets, scored = (torch.tensor(np.asarray(x)) for x in arrays)
    examples = Examples(inputs, valid, targets.long(), scored)
    found = float(loss_of(net, config, examples).detach())
    assert found == pytest.approx(wanted, rel=1e-4)


def torch_batch(name: str) -> Any:
    from bench import plain_torch_halting as plain

    rng = np.random.default_rng(0)
    return {
        "parity": lambda: plain.parity_batch(rng, 64, 6, 9),
        "addition": lambda: plain.addition_batch(rng, 64, 3, 2),
        "logic": lambda: plain.logic_batch(rng, 64, 4),
    }[name]()


@pytest.mark.torch
def test_torch_batches_have_right_answers() -> None:
    """The tasks' own encoders give the same answers to the same inputs."""
    from halting_jax.tasks.addition import encode_numbers
    from halting_jax.tasks.logic import encode_paper
    from halting_jax.tasks.parity import parity_targets

    batch = torch_batch("parity")
    np.testing.assert_array_equal(parity_targets(jnp.asarray(batch.inputs)), batch.targets)

    batch = torch_batch("addition")
    blocks = batch.inputs.numpy().reshape(64, 3, 2, 10)
    counts = np.maximum(blocks.sum((2, 3)).astype(np.int32), 1)
    ours = encode_numbers(
        jnp.asarray(blocks.argmax(-1), jnp.int32),
        jnp.asarray(counts),
        jnp.asarray(batch.valid.sum(1).numpy(), jnp.int32),
    )
    np.testing.assert_array_equal(ours.inputs, batch.inputs)
    np.testing.assert_array_equal(ours.target_mask, batch.scored)
    scored = batch.scored.numpy()
    np.testing.assert_array_equal(np.asarray(ours.targets)[scored], batch.targets.numpy()[scored])

    batch = torch_batch("logic")
    inputs = batch.inputs.numpy()
    gates = inputs[..., 2:].reshape(64, 4, 10, 10)
    ours = encode_paper(
        jnp.asarray(inputs[:, 0, 0] > 0),
        jnp.asarray(inputs[..., 1] > 0),
        jnp.asarray(gates.argmax(-1), jnp.int32),
        jnp.asarray(np.maximum(gates.sum((2, 3)), 1), jnp.int32),
        jnp.asarray(batch.valid.sum(1).numpy(), jnp.int32),
    )
    np.testing.assert_array_equal(ours.inputs, inputs)
    scored = batch.scored.numpy()
    np.testing.assert_array_equal(np.asarray(ours.targets)[scored], batch.targets.numpy()[scored])
