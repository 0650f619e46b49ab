"""A vocabulary of 30 tokens, closed-form backbones and small batches that several tests share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.lm.layers import Params
from reoac_jax.backbone.base import Backbone, Canvas, e2d2_backbone
from reoac_jax.backbone.e2d2 import E2D2Config
from reoac_jax.backbone.toy import table_backbone
from reoac_jax.defaults import get_default_config
from reoac_jax.episodes import Episodes, Steps
from reoac_jax.learner import LearnerSettings
from reoac_jax.learner_paper import PaperEpisode
from reoac_jax.networks import init_heads, init_stats
from reoac_jax.operators import OperatorParams, operator_params
from reoac_jax.settings import Agent, RolloutSettings, feature_size
from reoac_jax.tables import Tables, build_tables
from reoac_jax.types import SpecialIds

WORDS = ["dog", "Dog", "cat", "a_b", ".", ",", "sum", "each"]
STRINGS = [
    *map(str, range(13)),
    "+",
    "-",
    "=",
    "*",
    "1/2",
    "3.5",
    *WORDS,
    "<eos>",
    "<pad>",
    "<|m|>",
]
SPECIAL = SpecialIds(eos_id=27, pad_id=28, bos_id=27, mask_id=29)
VOCAB = len(STRINGS)
PROMPT, GEN = 6, 6
OPERATORS: OperatorParams = operator_params(
    [
        {"id": "O_NUM", "params": {"max_tokens": 4}},
        {"id": "O_OP", "params": {"max_tokens": 4}},
        {"id": "O_SCOPE", "params": {"scope_len": 3}},
        {"id": "O_BRANCH", "params": {"scope_len": 4}},
        {"id": "O_FAST", "params": {"scope_len": 5, "step_scale": 1.5}},
    ]
)


def toy_tables() -> Tables:
    """Tables of the vocabulary."""
    return build_tables([*STRINGS, None][:VOCAB], SPECIAL)


def toy_backbone(hidden_size: int = 8) -> Backbone:
    """The closed-form backbone, which sees time, places and context, never writing a mask."""
    plain = table_backbone(VOCAB, hidden_size, SPECIAL, PROMPT + GEN)
    return dataclasses.replace(plain, suppress_mask=True)


def toy_params(backbone: Backbone, seed: int = 0, eos_bias: float = 0.0) -> Params:
    """Parameters that make varied, fairly sure predictions; eos_bias makes eos more frequent."""
    params = dict(jax.jit(backbone.init)(jax.random.key(seed)))
    params["kernel"] = params["kernel"] * 2.0
    params["bias"] = params["bias"].at[SPECIAL.eos_id].add(eos_bias)
    return params


def tiny_network(score_mode: str = "single_block") -> E2D2Config:
    """One encoder and one decoder layer of width 16."""
    return E2D2Config(
        vocab_size=VOCAB,
        mask_id=SPECIAL.mask_id,
        pad_id=SPECIAL.pad_id,
        bos_id=SPECIAL.bos_id,
        eos_id=SPECIAL.eos_id,
        hidden_size=16,
        intermediate_size=24,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        block_size=4,
        length=PROMPT + GEN,
        rope_theta=100.0,
        kv_layers=(0,),
        score_mode=score_mode,
    )


def tiny_e2d2(score_mode: str = "single_block") -> Backbone:
    """`tiny_network` behind the forward contract."""
    return e2d2_backbone(tiny_network(score_mode))


def toy_canvas(rows: list[int], padding: int = SPECIAL.pad_id, gen_len: int = GEN) -> Canvas:
    """One prompt per row number; a row number always stands for the same prompt and row id.

    Args:
        rows: row numbers; row r has a prompt of 1 + r % PROMPT tokens.
        padding: id that fills everything behind the canvas.
        gen_len: G.
    """
    tokens = np.full((len(rows), PROMPT + gen_len), padding, np.int32)
    lengths = np.asarray([1 + row % PROMPT for row in rows], np.int32)
    # Marks behind a prompt must not count, so they are set wherever the padding is unusual.
    keys = np.full((len(rows), PROMPT), padding != SPECIAL.pad_id)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        rng = np.random.default_rng(row)
        tokens[index, :length] = rng.integers(0, SPECIAL.eos_id, length)
        tokens[index, length : length + gen_len] = SPECIAL.mask_id
        keys[index, :length] = rng.random(length) < 0.5
    arrays = (tokens, lengths, keys, np.asarray(rows, np.uint32))
    return Canvas(*map(jnp.asarray, arrays))


def toy_settings(**overrides: Any) -> RolloutSettings:
    """Rollout settings of a small horizon."""
    values: dict[str, Any] = {"max_steps": 5, "gen_len": GEN, "operators": OPERATORS}
    return RolloutSettings(**(values | overrides))


def toy_agent(settings: RolloutSettings, backbone: Backbone, algo: str, seed: int = 1) -> Agent:
    """Random heads with clear preferences, before any feature statistics."""
    size = feature_size(settings, backbone.hidden_size, algo)
    actor, critic = init_heads(jax.random.key(seed), size, actor_hidden=16, critic_hidden=16)
    return Agent(jax.tree.map(lambda x: 3.0 * x, actor), critic, init_stats(size))


def learner_settings(**overrides: Any) -> LearnerSettings:
    """Learner settings without decay, clipping or warm-up; optim overrides merge."""
    optim = {"actor_lr": 1e-2, "critic_lr": 1e-2, "backbone_lr": 1e-2}
    optim |= {"weight_decay": 0.0, "grad_clip": 0.0, "warmup": 0, **overrides.pop("optim", {})}
    values: dict[str, Any] = {
        "algo": "plus",
        "group_size": 2,
        "cost_lambda": 0.1,
        "max_cost": 3.0,
        "max_steps": 5,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "clip": 0.2,
        "entropy_weight": 0.01,
        "epochs": 2,
        "minibatch": 8,
        "target_decay": 0.9,
        "train_backbone": True,
        "pg_weight": 1.0,
        "sft_weight": 0.5,
        "backbone_batch": 4,
        "backbone_rows": 0,
        "actor_temperature": 1.1,
        "actor_dropout": 0.0,
        "critic_dropout": 0.0,
        "advantage_positive": True,
        "advantage_clip": 0.0,
        "critic_steps": 2,
        "actor_steps": 1,
        "backbone_steps": 1,
        "weights": (1.0, 1.0, 1.0),
        "optim": tuple(sorted(optim.items())),
    }
    defaults = LearnerSettings.from_config(get_default_config(), max_cost=3.0)
    return dataclasses.replace(defaults, **(values | overrides))


def made_up_episodes(
    rows: list[int], horizon: int, num_features: int, seed: int = 0, full: bool = False
) -> Episodes:
    """Episodes with consistent records: canvases fill up, then the rest of the steps is blank.

    Args:
        rows: row numbers of the prompts.
        horizon: T.
        num_features: F.
        seed: of all draws.
        full: every row takes all T decisions.
    """
    rng = np.random.default_rng(seed)
    batch = len(rows)
    taken = np.full(batch, horizon) if full else rng.integers(1, horizon + 1, batch)
    active = np.arange(horizon) < taken[:, None]
    before = np.full((batch, horizon, GEN), SPECIAL.mask_id, np.int32)
    written = np.zeros((batch, horizon, GEN), bool)
    final = np.full((batch, GEN), SPECIAL.mask_id, np.int32)
    for row in range(batch):
        turn = np.sort(rng.integers(0, taken[row], GEN))  # step at which each position is written
        for t in range(taken[row]):
            before[row, t] = final[row]
            written[row, t] = turn == t
            final[row, turn == t] = rng.integers(0, SPECIAL.eos_id, int((turn == t).sum()))
    operator = rng.integers(0, len(OPERATORS.ids), (batch, horizon))
    valid = rng.random((batch, horizon, 5)) < 0.6
    np.put_along_axis(valid, operator[..., None], True, axis=2)
    costs = np.asarray([spec.cost for spec in OPERATORS.specs])
    cost = np.where(active, costs[operator], 0.0)
    records: dict[str, Any] = {
        "features": np.where(
            active[..., None], rng.normal(size=(batch, horizon, num_features)), 0.0
        ),
        "operator": np.where(active, operator, 0).astype(np.int32),
        "chosen": np.where(active, operator, 0).astype(np.int32),
        "valid": valid | ~active[..., None],
        "log_prob": np.where(active, np.log(0.3), 0.0),
        "q": np.zeros((batch, horizon, 5)),
        "cost": cost,
        "gen_before": before,
        "written": written,
        "confidence": np.where(written, 0.5, 0.0),
        "active": active,
    }
    episodes = Episodes(
        canvas=toy_canvas(rows),
        final_ids=_single(final),
        steps=Steps(**records),
        num_steps=_single(taken.astype(np.int32)),
        num_forwards=_single(taken.astype(np.int32)),
        cost=_single(cost.sum(axis=1)),
        relation=None,
    )
    return jax.tree.map(_single, episodes)


def made_up_targets(rows: list[int], seed: int = 0) -> jax.Array:
    """[B, G] gold answers, eos-filled."""
    rng = np.random.default_rng(seed + 100)
    ids = rng.integers(0, SPECIAL.eos_id, (len(rows), GEN))
    end = rng.integers(1, GEN, len(rows))
    return jnp.asarray(np.where(np.arange(GEN) < end[:, None], ids, SPECIAL.eos_id), jnp.int32)


def made_up_buffer(capacity: int, horizon: int, num_features: int, seed: int = 0) -> PaperEpisode:
    """A buffer of the paper method with every row filled; returns of both signs."""
    rng = np.random.default_rng(seed)
    episodes = made_up_episodes(list(range(capacity)), horizon, num_features, seed, full=True)
    most = max(spec.limit for spec in OPERATORS.specs)
    order = rng.random((capacity, horizon, GEN)).argsort(axis=2)
    return PaperEpisode(
        features=episodes.steps.features,
        operator=episodes.steps.operator,
        gen_before=episodes.steps.gen_before,
        written=jnp.asarray(order < rng.integers(0, most + 1, (capacity, horizon, 1))),
        canvas=episodes.canvas,
        returns=jnp.asarray(rng.normal(0.5, 1.0, capacity), jnp.float32),
        target=jnp.asarray(rng.integers(0, SPECIAL.eos_id, (capacity, PROMPT)), jnp.int32),
        target_len=jnp.asarray(rng.integers(0, PROMPT + 1, capacity), jnp.int32),
    )


def _single(x: Any) -> jax.Array:
    """Device array without 64-bit types."""
    array = np.asarray(x)
    return jnp.asarray(array.astype(np.float32) if array.dtype == np.float64 else array)
