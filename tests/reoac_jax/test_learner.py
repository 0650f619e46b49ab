"""Updates of both methods on made-up episodes: gradients, their placement, what must not matter."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.dist import make_mesh, replicate
from reoac_jax import learner_state, losses
from reoac_jax.engine import compile_update
from reoac_jax.episodes import Episodes
from reoac_jax.learner import LearnerSettings, LearnerState, init_state, step_rewards
from reoac_jax.learner_paper import PaperEpisode
from reoac_jax.networks import heads_apply, normalise
from reoac_jax.rollout_paper import noise_level
from tests.reoac_jax.toy_setting import (
    SPECIAL,
    VOCAB,
    learner_settings,
    made_up_buffer,
    made_up_episodes,
    made_up_targets,
    toy_backbone,
    toy_params,
    toy_settings,
)

BACKBONE = toy_backbone()
PARAMS = toy_params(BACKBONE)
FEATURES, HORIZON = 7, 5
ROWS = [0, 0, 3, 3, 4, 4]
ROLLOUT = toy_settings(max_steps=3, num_sigma_steps=4, use_hidden=False)


def fresh(settings: LearnerSettings, seed: int = 3) -> LearnerState:
    state = init_state(jax.random.key(seed), settings, PARAMS, FEATURES, 8, 8)
    # A state is donated to the update, the shared parameters must survive that.
    return replicate(make_mesh(1), jax.tree.map(jnp.copy, state))


def compiled(settings: LearnerSettings) -> Any:
    return compile_update(BACKBONE, settings, ROLLOUT, make_mesh(1))


@pytest.fixture
def plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """p <- p - rate * gradient: the change of the parameters shows the gradient itself."""
    monkeypatch.setattr(learner_state, "make_optimizer", lambda rate, **_: optax.sgd(rate))


def same(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def close(left: Any, right: Any, atol: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, atol), left, right)


def test_step_rewards() -> None:
    settings = learner_settings(cost_lambda=0.6, max_cost=3.0, max_steps=4)
    active = jnp.asarray([[True, True, True, True], [True, True, False, False], [False] * 4])
    cost = jnp.asarray([[1.0, 2.0, 3.0, 1.0], [2.0, 1.0, 9.0, 9.0], [9.0] * 4])
    found = step_rewards(settings, cost, active, jnp.asarray([1.0, -2.0, 5.0]))
    price = 0.6 / (4 * 3.0)
    expected = [
        [-price, -2 * price, -3 * price, 1.0 - price],
        [-2 * price, -2.0 - price, 0.0, 0.0],
        [0.0] * 4,
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# ------------------------------------------------------------------------------------ plus
@pytest.fixture(scope="module")
def plus() -> dict[str, Any]:
    """One compiled update with everything switched on."""
    settings = learner_settings(backbone_rows=12)
    episodes = made_up_episodes(ROWS, HORIZON, FEATURES)
    inputs = (jnp.asarray([1.0, 0, 1, 1, 0, 0.5]), made_up_targets(ROWS), jax.random.key(5))
    update = compiled(settings)
    state, metrics = update(fresh(settings), episodes, *inputs)
    return {
        "settings": settings,
        "episodes": episodes,
        "inputs": inputs,
        "update": update,
        "state": state,
        "metrics": jax.device_get(metrics),
    }


def test_plus_changes_everything_once(plus: dict[str, Any]) -> None:
    before, after = fresh(plus["settings"]), plus["state"]
    for part in ("actor", "critic", "target_critic", "stats", "backbone"):
        assert not same(getattr(before, part), getattr(after, part)), part
    assert int(after.iteration) == 1
    assert all(np.isfinite(value) for value in plus["metrics"].values())
    decay = plus["settings"].target_decay
    slow = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, before.critic, after.critic)
    close(after.target_critic, slow)


def test_annealed_rates_fall_to_zero(plain_descent: None) -> None:
    settings = learner_settings(anneal_over=4, epochs=1, minibatch=len(ROWS) * HORIZON)
    update = compiled(settings)
    episodes = made_up_episodes(ROWS, HORIZON, FEATURES)
    inputs = (jnp.asarray([1.0, 0, 1, 1, 0, 0.5]), made_up_targets(ROWS), jax.random.key(5))
    names = ("actor", "critic", "backbone")
    before, moves = fresh(settings), {}
    for iteration in (0, 3, 4, 5):
        state = replace(fresh(settings), iteration=replicate(make_mesh(1), jnp.int32(iteration)))
        after, _ = update(state, episodes, *inputs)
        moves[iteration] = {
            name: jax.tree.map(jnp.subtract, getattr(after, name), getattr(before, name))
            for name in names
        }
    for name in names:
        assert not same(moves[0][name], moves[4][name]), name
    close(moves[3], jax.tree.map(lambda x: x / 4, moves[0]))
    for iteration in (4, 5):
        assert not any(np.any(x) for x in jax.tree.leaves(moves[iteration]))
    assert learner_settings().rate(jnp.int32(3)) == 1.0


def test_plus_statistics_and_metrics(plus: dict[str, Any]) -> None:
    episodes, metrics = plus["episodes"], plus["metrics"]
    active = np.asarray(episodes.steps.active)
    seen = np.asarray(episodes.steps.features)[active]
    np.testing.assert_allclose(plus["state"].stats.mean, seen.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(plus["state"].stats.square / len(seen), seen.var(axis=0), atol=1e-5)
    assert metrics["steps"] == pytest.approx(active.sum(axis=1).mean())
    assert metrics["cost"] == pytest.approx(np.asarray(episodes.cost).mean(), rel=1e-5)
    settings, reward = plus["settings"], np.asarray(plus["inputs"][0])
    price = settings.cost_lambda / (settings.max_steps * settings.max_cost)
    whole = (reward - price * np.asarray(episodes.cost)).mean()
    assert metrics["return"] == pytest.approx(whole, rel=1e-5)
    shares = [value for name, value in metrics.items() if name.startswith("operator/")]
    assert len(shares) == 5 and sum(shares) == pytest.approx(1.0, rel=1e-5)


def with_junk(episodes: Episodes) -> Episodes:
    """The same episodes with finite nonsense in every record of a finished step."""
    rng = np.random.default_rng(1)
    active = np.asarray(episodes.steps.active)

    def junk(value: jax.Array) -> jax.Array:
        array = np.asarray(value)
        if array.dtype == bool:
            noise = rng.random(array.shape) < 0.5
        elif array.dtype.kind == "i":
            most = 5 if array.ndim == 2 else VOCAB
            noise = rng.integers(0, most, array.shape).astype(array.dtype)
        else:
            noise = (50 * rng.normal(size=array.shape)).astype(array.dtype)
        return jnp.asarray(
            np.where(active.reshape(*active.shape, *[1] * (array.ndim - 2)), array, noise)
        )

    steps = jax.tree.map(junk, episodes.steps)
    return replace(episodes, steps=replace(steps, active=episodes.steps.active))


def test_finished_steps_have_no_influence(plus: dict[str, Any]) -> None:
    episodes = with_junk(plus["episodes"])
    assert not same(episodes.steps, plus["episodes"].steps)
    state, metrics = plus["update"](fresh(plus["settings"]), episodes, *plus["inputs"])
    close(state, plus["state"])
    close(metrics, plus["metrics"])


def test_no_second_compilation(plus: dict[str, Any]) -> None:
    episodes = made_up_episodes([1, 1, 2, 2, 5, 5], HORIZON, FEATURES, seed=9)
    before = plus["update"]._cache_size()
    state, _ = plus["update"](fresh(plus["settings"]), episodes, *plus["inputs"])
    state, _ = plus["update"](state, episodes, *plus["inputs"])  # its own result as the input
    assert plus["update"]._cache_size() == before == 1


def test_actor_alone() -> None:
    settings = learner_settings(train_backbone=False, weights=(0.0, 1.0, 1.0))
    before, update = fresh(settings), compiled(settings)
    episodes, targets = made_up_episodes(ROWS, HORIZON, FEATURES), made_up_targets(ROWS)
    state = fresh(settings)
    for number in range(2):
        state, metrics = update(state, episodes, jnp.arange(6.0), targets, jax.random.key(number))
    assert same(state.backbone, before.backbone) and state.backbone_opt == ()
    assert same(state.critic, before.critic)
    close(state.target_critic, before.target_critic)
    assert not same(state.actor, before.actor)
    assert metrics["backbone/loss"] == 0.0


def test_critic_and_supervision_leave_the_actor_alone(plus: dict[str, Any]) -> None:
    settings = learner_settings(
        weights=(1.0, 0.0, 1.0), pg_weight=0.0, backbone_rows=12, optim={"backbone_lr": 1e-2}
    )
    before, update = fresh(settings), compiled(settings)
    state, metrics = update(fresh(settings), plus["episodes"], *plus["inputs"])
    assert same(state.actor, before.actor)
    # The critic learns the same whatever else is learnt.
    close(state.critic, plus["state"].critic)
    assert not same(state.backbone, before.backbone)
    first = float(metrics["backbone/sft"])
    assert metrics["backbone/pg"] == 0.0
    assert float(metrics["backbone/loss"]) == pytest.approx(settings.sft_weight * first)
    for _ in range(30):
        state, metrics = update(state, plus["episodes"], *plus["inputs"])
    assert float(metrics["backbone/sft"]) < 0.5 * first


def test_policy_prefers_the_better_operator() -> None:
    """A two-armed bandit: O_SCOPE pays 1, O_OP nothing, the rest is void."""
    settings = learner_settings(
        train_backbone=False, group_size=1, max_steps=1, cost_lambda=0.0, minibatch=32, epochs=3
    )
    update, state = compiled(settings), fresh(settings)
    rng = np.random.default_rng(0)
    rows = [0] * 32
    episodes = made_up_episodes(rows, 1, FEATURES)
    valid = np.zeros((32, 1, 5), bool)
    valid[..., 1:3] = True
    share = []
    for number in range(25):
        features = rng.normal(size=(32, 1, FEATURES)).astype(np.float32)
        logits = heads_apply(state.actor, normalise(state.stats, jnp.asarray(features)))
        policy = np.asarray(jax.nn.softmax(losses.mask_logits(logits, jnp.asarray(valid)), axis=-1))
        share.append(policy[..., 2].mean())
        operator = np.where(rng.random((32, 1)) < policy[..., 2], 2, 1)
        log_prob = np.log(np.take_along_axis(policy, operator[..., None], axis=2)[..., 0])
        steps = replace(
            episodes.steps,
            features=jnp.asarray(features),
            operator=jnp.asarray(operator, jnp.int32),
            valid=jnp.asarray(valid),
            log_prob=jnp.asarray(log_prob),
        )
        state, metrics = update(
            state,
            replace(episodes, steps=steps),
            jnp.asarray(operator[:, 0] == 2, jnp.float32),
            made_up_targets(rows),
            jax.random.key(number),
        )
    assert share[0] < 0.8 and share[-1] > 0.9, share
    q = heads_apply(state.critic, normalise(state.stats, jnp.asarray(features)))
    assert float((q[..., 2] - q[..., 1]).mean()) > 0.3


def written_log_probs(params: Any, episodes: Episodes) -> jax.Array:
    """[B, T, G] log-probability of the tokens each step wrote, 0 elsewhere; one step at a time."""
    columns = []
    for t in range(episodes.steps.active.shape[1]):
        gen_ids, canvas = episodes.steps.gen_before[:, t], episodes.canvas
        level = jnp.mean(gen_ids == SPECIAL.mask_id, axis=1)
        hidden = BACKBONE.score(params, (), canvas, gen_ids, level).hidden
        logits = BACKBONE.logits(params, hidden)
        # Every position is written once, so the final canvas holds every written token.
        log_prob = jnp.take_along_axis(
            jax.nn.log_softmax(logits, axis=-1), episodes.final_ids[..., None], axis=-1
        )[..., 0]
        columns.append(jnp.where(episodes.steps.written[:, t], log_prob, 0.0))
    return jnp.stack(columns, axis=1)


def plus_gradient(
    plain_descent: None, batch: int, **overrides: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """Parameters before minus after one step of rate 1, from a critic that says 0."""
    settings = learner_settings(
        backbone_batch=batch, gae_lambda=1.0, epochs=1, optim={"backbone_lr": 1.0}, **overrides
    )
    state = fresh(settings)
    zeros = jax.tree.map(jnp.zeros_like, state.critic)
    state = replace(state, critic=zeros, target_critic=jax.tree.map(jnp.copy, zeros))
    episodes = made_up_episodes(ROWS, HORIZON, FEATURES)
    reward = jnp.asarray([1.0, 0.0, 0.2, 0.7, 0.0, 1.0])
    state, metrics = compiled(settings)(
        state, episodes, reward, made_up_targets(ROWS), jax.random.key(5)
    )
    return jax.tree.map(lambda a, b: a - b, PARAMS, state.backbone), metrics


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_policy_gradient_of_the_backbone(plain_descent: None, scale: str) -> None:
    """The gradient equals that of -mean A log p over all written tokens, done naively."""
    found, metrics = plus_gradient(
        plain_descent, 4, sft_weight=0.0, cost_lambda=0.0, advantage_scale=scale
    )
    episodes = made_up_episodes(ROWS, HORIZON, FEATURES)
    active = np.asarray(episodes.steps.active)
    reward = np.asarray([1.0, 0.0, 0.2, 0.7, 0.0, 1.0])
    advantage = np.zeros(active.shape)
    for first in range(0, len(ROWS), 2):
        group = slice(first, first + 2)
        every = np.broadcast_to(reward[group, None], active[group].shape)
        counted = every[active[group]]
        advantage[group] = every - counted.mean()
        if scale == "group":
            advantage[group] /= counted.std() + 1e-6
    if scale == "batch":
        advantage /= advantage[active].std() + 1e-6
    weight = jnp.asarray(np.where(active, advantage, 0.0), jnp.float32)[..., None]
    count = episodes.steps.written.sum()

    def naive(params: Any) -> jax.Array:
        return -jnp.sum(weight * written_log_probs(params, episodes)) / count

    value, expected = jax.jit(jax.value_and_grad(naive))(PARAMS)
    assert float(metrics["backbone/pg"]) == pytest.approx(float(value), rel=1e-4)
    close(found, expected, 2e-6)
    stepped = jax.tree.map(lambda p, g: p - 0.05 * g, PARAMS, found)
    change = written_log_probs(stepped, episodes) - written_log_probs(PARAMS, episodes)
    good = np.asarray(episodes.steps.written) & (np.asarray(weight) > 0)
    bad = np.asarray(episodes.steps.written) & (np.asarray(weight) < 0)
    assert np.asarray(change)[good].mean() > max(0.0, np.asarray(change)[bad].mean())


def test_micro_batches_do_not_change_the_gradient(plain_descent: None) -> None:
    one, few = plus_gradient(plain_descent, 4), plus_gradient(plain_descent, 7)
    close(one, few)
    assert float(one[1]["backbone/sft"]) > 0


# ----------------------------------------------------------------------------------- paper
def paper_settings(**overrides: Any) -> LearnerSettings:
    return learner_settings(algo="paper", backbone_batch=5, **overrides)


def naive_paper(
    settings: LearnerSettings, state: LearnerState, buffer: PaperEpisode, count: int
) -> tuple[LearnerState, dict[str, Any]]:
    """The update with the plain losses over all rows at once, the head at all positions."""
    rates = dict(settings.optim)
    used = jax.tree.map(lambda x: x[:count], buffer)
    features = used.features.reshape(-1, FEATURES)
    operator, horizon = used.operator.reshape(-1), used.operator.shape[1]
    returns = jnp.repeat(used.returns, horizon)
    critic, actor = state.critic, state.actor
    for _ in range(settings.critic_steps):
        grads = jax.grad(lambda p: losses.critic_loss(p, features, operator, returns)[0])(critic)
        critic = jax.tree.map(lambda p, g: p - rates["critic_lr"] * g, critic, grads)
    q = heads_apply(critic, features)
    temperature = settings.actor_temperature
    grads = jax.grad(lambda p: losses.actor_loss(p, q, features, temperature)[0])(actor)
    actor = jax.tree.map(lambda p, g: p - rates["actor_lr"] * g, actor, grads)

    def backbone_loss(params: Any) -> losses.Loss:
        canvas = jax.tree.map(lambda x: jnp.repeat(x, horizon, axis=0), used.canvas)
        gen_ids = used.gen_before.reshape(count * horizon, -1)
        level = noise_level(ROLLOUT, jnp.tile(jnp.arange(horizon), count))
        hidden = BACKBONE.score(params, (), canvas, gen_ids, level).hidden
        return losses.backbone_loss(
            BACKBONE.logits(params, hidden),
            canvas.gen_index,
            used.written.reshape(count * horizon, -1),
            jnp.repeat(used.target, horizon, axis=0),
            jnp.repeat(used.target_len, horizon),
            returns,
            advantage_positive=settings.advantage_positive,
            advantage_clip=settings.advantage_clip,
        )

    (_, metrics), grads = jax.jit(jax.value_and_grad(backbone_loss, has_aux=True))(state.backbone)
    rate = rates["backbone_lr"]
    backbone = jax.tree.map(lambda p, g: p - rate * g, state.backbone, grads)
    metrics = dict(metrics)
    metrics |= losses.critic_loss(critic, features, operator, returns)[1]
    metrics |= losses.actor_loss(actor, q, features, temperature)[1]
    return replace(state, actor=actor, critic=critic, backbone=backbone), metrics


@pytest.mark.parametrize("clip", [0.0, 0.6])
def test_paper_update_equals_the_plain_losses(plain_descent: None, clip: float) -> None:
    settings = paper_settings(
        advantage_positive=clip == 0.0, advantage_clip=clip, optim={"backbone_lr": 1.0}
    )
    buffer = made_up_buffer(4, 3, FEATURES)
    wanted, metrics = naive_paper(settings, fresh(settings), buffer, 3)
    update = compiled(settings)
    found, measured = update(fresh(settings), buffer, jnp.int32(3))
    for part in ("actor", "critic", "backbone"):
        close(getattr(found, part), getattr(wanted, part), 2e-6)
    for name in ("critic/loss", "actor/loss", "backbone/loss", "backbone/zero_weight_share"):
        assert float(measured[name]) == pytest.approx(float(metrics[name]), rel=1e-4), name
    total = sum(float(metrics[f"{part}/loss"]) for part in ("critic", "actor", "backbone"))
    assert float(measured["total_loss"]) == pytest.approx(total, rel=1e-4)
    assert not same(found.backbone, PARAMS) and float(metrics["backbone/pairs"]) > 0

    # Empty rows: whatever they hold, the result is the same, and nothing is compiled again.
    other = made_up_buffer(4, 3, FEATURES, seed=4)
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:3], b[3:]]), buffer, other)
    again, _ = update(fresh(settings), mixed, jnp.int32(3))
    close(again, found, 1e-7)
    assert update._cache_size() == 1
    full, _ = update(fresh(settings), mixed, jnp.int32(4))
    assert not same(full.critic, found.critic) and update._cache_size() == 1


def test_paper_frozen_backbone() -> None:
    settings = paper_settings(train_backbone=False)
    state, metrics = compiled(settings)(
        fresh(settings), made_up_buffer(2, 3, FEATURES), jnp.int32(2)
    )
    assert same(state.backbone, PARAMS) and state.backbone_opt == ()
    assert float(metrics["backbone/loss"]) == 0.0 and int(state.iteration) == 1
