"""Losses, gradients and optimiser steps against recorded values."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from reoac_jax.losses import actor_loss, backbone_loss, critic_loss, total_loss
from reoac_jax.networks import export_head, heads_apply
from tests.parity.reoac_vocabulary import reoac_files
from tests.parity.test_reoac_heads import NAMES, head


def load(kind: str) -> list[Any]:
    found = []
    for path in reoac_files("losses*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        arrays = path.with_suffix(".npz")
        found += [pytest.param(case, arrays, id=case["id"]) for case in record[kind]]
    return found


def tensors(tree: Any, kind: str) -> dict[str, np.ndarray]:
    exported = export_head(tree, kind)
    return {
        leaf: exported[n] for leaf, n in zip(("w1", "b1", "w2", "b2"), NAMES[kind], strict=True)
    }


@pytest.mark.parametrize(("case", "path"), load("cases"))
def test_heads_learn_alike(case: dict[str, Any], path: Path) -> None:
    name = case["id"]
    arrays = {k.removeprefix(f"{name}_"): v for k, v in np.load(path).items() if k.startswith(name)}
    features = jnp.asarray(arrays["features"])
    operators = jnp.asarray(arrays["operator_index"], jnp.int32)
    returns = jnp.asarray(arrays["returns"])
    actor, critic = head(arrays, "actor"), head(arrays, "critic")
    temperature = case["temperature"]

    critic_grad = jax.jit(jax.value_and_grad(critic_loss, has_aux=True))
    actor_grad = jax.jit(
        jax.value_and_grad(actor_loss, has_aux=True), static_argnames="temperature"
    )
    (value, _), grads = critic_grad(critic, features, operators, returns)
    assert float(value) == pytest.approx(case["critic_loss"], rel=1e-5)
    for leaf, found in tensors(grads, "critic").items():
        np.testing.assert_allclose(found, arrays[f"critic_grad_{leaf}"], atol=1e-5, rtol=1e-5)
    q = heads_apply(critic, features)
    (value, _), grads = actor_grad(actor, q, features, temperature=temperature)
    assert float(value) == pytest.approx(case["actor_loss"], rel=1e-5)
    for leaf, found in tensors(grads, "actor").items():
        np.testing.assert_allclose(found, arrays[f"actor_grad_{leaf}"], atol=1e-5, rtol=1e-5)

    update = case["update"]
    tx = optax.adamw(update["lr"], weight_decay=update["weight_decay"])
    state = tx.init(critic)
    for _ in range(update["critic_steps"]):
        _, grads = critic_grad(critic, features, operators, returns)
        changes, state = tx.update(grads, state, critic)
        critic = optax.apply_updates(critic, changes)
    q = heads_apply(critic, features)
    state = tx.init(actor)
    for _ in range(update["actor_steps"]):
        _, grads = actor_grad(actor, q, features, temperature=temperature)
        changes, state = tx.update(grads, state, actor)
        actor = optax.apply_updates(actor, changes)
    for kind, tree in (("actor", actor), ("critic", critic)):
        for leaf, found in tensors(tree, kind).items():
            np.testing.assert_allclose(found, arrays[f"after_{kind}_{leaf}"], atol=1e-6)
    (value, _), _ = critic_grad(critic, features, operators, returns)
    assert float(value) == pytest.approx(update["critic_loss_after"], rel=2e-5)
    (value, _), _ = actor_grad(actor, q, features, temperature=temperature)
    assert float(value) == pytest.approx(update["actor_loss_after"], rel=2e-5)


def backbone_arrays(case: dict[str, Any], path: Path) -> dict[str, jax.Array]:
    """Recorded steps in the layout of the loss: all positions, padded targets."""
    stored = np.load(path)
    steps = case["steps"]
    logits = np.stack([stored[f"{case['id']}_s{t}_logits"] for t in range(len(steps))])
    length = logits.shape[1]
    longest = max(len(step["target_tokens"] or []) for step in steps) + 2
    mask = np.zeros((len(steps), length), bool)
    targets = np.full((len(steps), longest), 1, np.int32)
    for row, step in enumerate(steps):
        mask[row, step["update_positions"]] = True
        gold = step["target_tokens"] or []
        targets[row, : len(gold)] = gold
    return {
        "logits": jnp.asarray(logits),
        "positions": jnp.broadcast_to(jnp.arange(length), mask.shape),
        "update_mask": jnp.asarray(mask),
        "target_ids": jnp.asarray(targets),
        "target_len": jnp.asarray([len(step["target_tokens"] or []) for step in steps]),
        "returns": jnp.asarray([step["return"] for step in steps], jnp.float32),
    }


@pytest.mark.parametrize(("case", "path"), load("backbone_cases"))
def test_backbone_loss(case: dict[str, Any], path: Path) -> None:
    arrays = backbone_arrays(case, path)
    for setting in case["losses"]:
        value, _ = backbone_loss(
            **arrays,
            advantage_positive=setting["advantage_positive"],
            advantage_clip=setting["advantage_clip"],
        )
        assert float(value) == pytest.approx(setting["loss"], rel=1e-5, abs=1e-6)


def test_total_rule() -> None:
    for path in reoac_files("losses*.json"):
        example = json.loads(path.read_text(encoding="utf-8"))["total_rule_example"]
        assert total_loss(example, example) == pytest.approx(example["total_loss"])
