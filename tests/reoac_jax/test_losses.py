"""Losses: values by hand, gradients exactly where they belong, nothing from void entries."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax import losses
from reoac_jax.networks import heads_apply, init_heads

KEY = jax.random.key(0)
ACTOR, CRITIC = init_heads(KEY, 6, actor_hidden=4, critic_hidden=4)
X = jax.random.normal(jax.random.key(1), (7, 6))
OPERATORS = jnp.asarray([0, 1, 2, 3, 4, 0, 1])
RETURNS = jnp.linspace(-1.0, 1.0, 7)


def size(tree: object) -> float:
    return float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)))


def gradient(function: Callable[..., Any], *arguments: Any) -> tuple:
    """Gradients of the loss part in all arguments."""
    numbers = tuple(range(len(arguments)))
    return jax.grad(lambda *a: function(*a)[0], argnums=numbers)(*arguments)


def test_critic_loss_moves_the_critic_only() -> None:
    grads = gradient(
        lambda critic, x, returns: losses.critic_loss(critic, x, OPERATORS, returns),
        *(CRITIC, X, RETURNS),
    )
    assert size(grads[0]) > 0 and size(grads[1:]) == 0


def test_critic_loss_moves_the_taken_outputs_only() -> None:
    taken = jnp.zeros(7, jnp.int32) + 3
    grad = jax.grad(lambda c: losses.critic_loss(c, X, taken, RETURNS)[0])(CRITIC)
    bias = np.asarray(grad["dense_1"]["bias"])
    assert bias[3] != 0 and not bias[[0, 1, 2, 4]].any()


def test_actor_loss_moves_the_actor_only() -> None:
    q = heads_apply(CRITIC, X)
    grads = gradient(lambda actor, q, x: losses.actor_loss(actor, q, x, 1.0), ACTOR, q, X)
    assert size(grads[0]) > 0 and size(grads[1:]) == 0


def test_step_mask_equals_leaving_steps_out() -> None:
    mask = jnp.arange(7) < 4
    q = heads_apply(CRITIC, X)
    wild = jnp.where(mask, RETURNS, 1e6)
    whole, _ = losses.critic_loss(CRITIC, X, OPERATORS, wild, mask)
    part, _ = losses.critic_loss(CRITIC, X[:4], OPERATORS[:4], RETURNS[:4])
    np.testing.assert_allclose(whole, part, rtol=1e-6)
    whole, _ = losses.actor_loss(ACTOR, q, X, 1.3, mask)
    part, _ = losses.actor_loss(ACTOR, q[:4], X[:4], 1.3)
    np.testing.assert_allclose(whole, part, rtol=1e-6)


def backbone_case() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "logits": jnp.asarray(rng.normal(size=(4, 5, 9)), jnp.float32),
        "positions": jnp.tile(jnp.arange(3, 8), (4, 1)),
        "update_mask": jnp.asarray(rng.random((4, 5)) < 0.6).at[1::2].set(True),
        "target_ids": jnp.asarray(rng.integers(0, 9, (4, 7)), jnp.int32),
        "target_len": jnp.asarray([7, 6, 0, 5]),
        "returns": jnp.asarray([0.7, 1.0, 0.4, -0.5]),
    }


def test_backbone_gradient_sits_on_weighted_pairs() -> None:
    case = backbone_case()
    others = {name: value for name, value in case.items() if name not in ("logits", "returns")}

    def loss(logits: jax.Array, returns: jax.Array) -> jax.Array:
        return losses.backbone_loss(logits, returns=returns, **others)[0]

    by_logits, by_returns = jax.grad(loss, argnums=(0, 1))(case["logits"], case["returns"])
    counted = case["update_mask"] & (case["positions"] < case["target_len"][:, None])
    expected = counted & (case["returns"] > 0)[:, None]
    np.testing.assert_array_equal(jnp.abs(by_logits).sum(-1) > 0, expected)
    assert size(by_returns) == 0


def test_carry_over_positions_leave_sum_and_count() -> None:
    case = backbone_case()
    carried = case["update_mask"] & (jnp.arange(5) % 2 == 0)
    one_hot = jnp.where(carried[..., None], -1e12, case["logits"])
    one_hot = one_hot.at[..., 8].set(jnp.where(carried, 0.0, one_hot[..., 8]))
    found, metrics = losses.backbone_loss(**(case | {"logits": one_hot}), carry_over_mask=carried)
    smaller = case | {"update_mask": case["update_mask"] & ~carried}
    wanted, _ = losses.backbone_loss(**smaller)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    counted = smaller["update_mask"] & (case["positions"] < case["target_len"][:, None])
    assert float(metrics["backbone/pairs"]) == int(counted.sum())
    assert 0 < float(metrics["backbone/zero_weight_share"]) < 1


def test_backbone_sums_add_up_over_micro_batches() -> None:
    case = backbone_case()
    halves = [
        losses.backbone_sums(**{name: value[part] for name, value in case.items()})
        for part in (slice(0, 1), slice(1, 4))
    ]
    weighted, pairs = sum(h.weighted for h in halves), sum(h.pairs for h in halves)
    whole, _ = losses.backbone_loss(**case)
    np.testing.assert_allclose(weighted / pairs, whole, rtol=1e-6)


def test_backbone_loss_without_pairs_is_zero() -> None:
    case = backbone_case() | {"target_len": jnp.zeros(4, jnp.int32)}
    value, grad = jax.value_and_grad(
        lambda logits: losses.backbone_loss(**(case | {"logits": logits}))[0]
    )(case["logits"] * jnp.inf)
    assert float(value) == 0.0
    case = backbone_case() | {"target_ids": jnp.zeros((4, 0), jnp.int32)}
    assert float(losses.backbone_loss(**(case | {"target_len": jnp.zeros(4, int)}))[0]) == 0.0


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_gae_against_its_sums(gamma: float, lam: float) -> None:
    rng = np.random.default_rng(2)
    rewards, values = rng.normal(size=(2, 3, 6)).astype(np.float32)
    lengths = [6, 3, 0]
    valid = np.arange(6) < np.asarray(lengths)[:, None]
    found = losses.gae(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(valid), gamma, lam)
    for row, length in enumerate(lengths):
        following = np.append(values[row, :length], 0.0)
        delta = rewards[row, :length] + gamma * following[1:] - following[:-1]
        for t in range(6):
            wanted = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
            np.testing.assert_allclose(found.advantages[row, t], wanted, atol=1e-5)
            target = wanted + values[row, t] if t < length else 0.0
            np.testing.assert_allclose(found.returns[row, t], target, atol=1e-5)


def test_gae_has_no_gradient() -> None:
    ones = jnp.ones((2, 3))
    grads = jax.grad(lambda r, v: sum(x.sum() for x in losses.gae(r, v, ones > 0)), argnums=(0, 1))(
        ones, ones * 0.3
    )
    assert size(grads) == 0


def test_advantages_per_group() -> None:
    rng = np.random.default_rng(1)
    raw = rng.normal(size=(6, 4)).astype(np.float32) * 3 + np.repeat([5.0, -9.0], 3)[:, None]
    raw = raw.astype(np.float32)
    valid = rng.random((6, 4)) < 0.8
    found = np.asarray(losses.normalise_advantages(jnp.asarray(raw), jnp.asarray(valid), 3))
    for rows in (slice(0, 3), slice(3, 6)):
        inside = found[rows][valid[rows]]
        np.testing.assert_allclose([inside.mean(), inside.std()], [0.0, 1.0], atol=1e-4)
    assert not found[~valid].any()
    whole = np.asarray(losses.normalise_advantages(jnp.asarray(raw), jnp.asarray(valid), 1))
    np.testing.assert_allclose(whole[valid].mean(), 0.0, atol=1e-5)
    equal = losses.normalise_advantages(jnp.full((4, 2), 0.3), jnp.ones((4, 2), bool), 2)
    assert not np.asarray(equal).any()


def ppo_case() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    logits = heads_apply(ACTOR, X)
    valid = jnp.ones((7, 5), bool).at[:, 4].set(False)
    operators = OPERATORS % 4
    log_pi = jax.nn.log_softmax(losses.mask_logits(logits, valid))
    return logits, valid, operators, jnp.take_along_axis(log_pi, operators[:, None], 1)[:, 0]


def test_ppo_at_the_old_policy_is_the_policy_gradient() -> None:
    logits, valid, operators, old = ppo_case()
    gain = RETURNS

    def ppo(x: jax.Array) -> jax.Array:
        return losses.ppo_loss(x, valid, operators, old, gain, entropy_weight=0.0)[0]

    def plain(x: jax.Array) -> jax.Array:
        log_pi = jax.nn.log_softmax(x[:, :4])
        return -(jnp.take_along_axis(log_pi, operators[:, None], 1)[:, 0] * gain).mean()

    found, wanted = jax.grad(ppo)(logits), jax.grad(plain)(logits)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert not np.asarray(found[:, 4]).any()


def test_ppo_gradient_placement() -> None:
    logits, valid, operators, old = ppo_case()
    mask = jnp.arange(7) != 2
    grads = gradient(
        lambda x, o, g: losses.ppo_loss(x, valid, operators, o, g, mask), logits, old, RETURNS
    )
    assert size(grads[0]) > 0 and size(grads[1:]) == 0
    assert not np.asarray(grads[0][2]).any()
    # Void steps may hold anything.
    wild = old.at[2].set(-1e30)
    with_wild = jax.grad(
        lambda x: losses.ppo_loss(x, valid, operators, wild, RETURNS, mask)[0]
    )(logits)  # fmt: skip
    np.testing.assert_array_equal(with_wild, grads[0])


def test_ppo_clips() -> None:
    logits, valid, operators, old = ppo_case()
    gain = jnp.ones(7)

    def loss(x: jax.Array) -> jax.Array:
        # The old policy was far less likely to act so: the ratio is beyond the clip everywhere.
        return losses.ppo_loss(x, valid, operators, old - 1.0, gain, entropy_weight=0.0)[0]

    assert not np.asarray(jax.grad(loss)(logits)).any()
    np.testing.assert_allclose(loss(logits), -1.2, rtol=1e-6)


def test_entropy_bonus_pulls_towards_uniform() -> None:
    logits = jnp.asarray([[2.0, 0.0, 0.0, 0.0, 0.0]])
    grad = jax.grad(
        lambda x: losses.ppo_loss(
            x,
            None,
            jnp.zeros(1, int),
            jax.nn.log_softmax(x)[:, 0],
            jnp.zeros(1),
            entropy_weight=1.0,
        )[0]
    )(logits)
    assert float(grad[0, 0]) > 0 and float(grad[0, 1]) < 0


def test_huber_critic() -> None:
    q = jnp.zeros((3, 5))
    target = jnp.asarray([0.5, 3.0, 100.0])
    mask = jnp.asarray([True, True, False])
    value, _ = losses.huber_critic_loss(q, jnp.asarray([1, 2, 0]), target, mask)
    np.testing.assert_allclose(value, (0.125 + 2.5) / 2)
    grads = gradient(
        lambda q, t: losses.huber_critic_loss(q, jnp.asarray([1, 2, 0]), t, mask), q, target
    )
    moved = np.argwhere(np.asarray(grads[0])).tolist()
    assert moved == [[0, 1], [1, 2]] and size(grads[1]) == 0
    assert float(jnp.abs(grads[0]).max()) <= 0.5 + 1e-6
