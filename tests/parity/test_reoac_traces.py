"""Whole recorded rollouts, replayed by one compiled scan of the paper step."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.backbone.toy import table_backbone
from reoac_jax.key_tokens import key_mask
from reoac_jax.losses import actor_loss, backbone_loss, critic_loss, total_loss
from reoac_jax.networks import heads_apply
from reoac_jax.operators import OperatorParams, operator_params, ranked_operators
from reoac_jax.paper_step import PaperOptions, PaperRecord, paper_step
from reoac_jax.relation import kept_columns, prompt_facts
from reoac_jax.sampling import row_keys
from reoac_jax.schedule import sigma
from reoac_jax.types import SpecialIds
from tests.parity.reoac_vocabulary import load_tables, reoac_files
from tests.parity.test_reoac_heads import head

TOLERANCE = 2e-5


def load_traces() -> list[Any]:
    found = []
    for path in reoac_files("rollout_traces*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        weights = path.with_name(path.name.replace("traces", "weights")).with_suffix(".npz")
        found += [
            pytest.param(trace, record, weights, id=trace["name"]) for trace in record["traces"]
        ]
    return found


class Replay(NamedTuple):
    """One replayed trace; records are [T, B, ...]."""

    backbone: Backbone
    params: dict[str, jax.Array]
    actor: dict
    critic: dict
    operators: OperatorParams
    canvas: Canvas
    times: jax.Array
    records: PaperRecord
    final_ids: jax.Array


def spell_offsets(text: str, strings: list[str]) -> list[tuple[int, int]]:
    """Offsets of pieces that spell the text, "Ġ" standing for a blank."""
    offsets, start = [], 0
    for piece in strings:
        assert text[start : start + len(piece)] == piece.replace("Ġ", " ")
        offsets.append((start, start + len(piece)))
        start += len(piece)
    return offsets


@functools.cache
def token_strings() -> list[str]:
    [path] = reoac_files("vocab_tables.json")
    return json.loads(path.read_text(encoding="utf-8"))["tokens"]


def make_canvas(trace: dict[str, Any], mask_id: int, pad_id: int) -> Canvas:
    episodes = trace["episodes"]
    gen_len = trace["rollout_config"]["gen_len"]
    width = max(len(e["prompt_ids"]) for e in episodes) + 1
    tokens = np.full((len(episodes), width + gen_len), pad_id, np.int32)
    keys = np.zeros((len(episodes), width), bool)
    for row, episode in enumerate(episodes):
        prompt = episode["prompt_ids"]
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : len(prompt) + gen_len] = mask_id
        offsets = spell_offsets(episode["prompt"], [token_strings()[i] for i in prompt])
        keys[row] = key_mask(episode["prompt"], offsets, length=width)
    lengths = np.asarray([len(e["prompt_ids"]) for e in episodes], np.int32)
    rows = np.arange(len(episodes), dtype=np.uint32)
    return Canvas(*map(jnp.asarray, (tokens, lengths, keys, rows)))


def replay(trace: dict[str, Any], record: dict[str, Any], weights: Path) -> Replay:
    config = trace["rollout_config"]
    arrays = dict(np.load(weights))
    special = SpecialIds(**record["special"])
    vocab, hidden = arrays["E"].shape
    backbone = table_backbone(vocab, hidden, special, arrays["P"].shape[0])
    names = {"embed": "E", "position": "P", "time": "u", "kernel": "W", "bias": "b"}
    params = {name: jnp.asarray(arrays[letter]) for name, letter in names.items()}
    actor, critic = head(arrays, "actor"), head(arrays, "critic")
    operators = operator_params(trace["operator_specs"])
    options = PaperOptions(
        path="tensor" if config.get("gpu_critic", True) else "host",
        fast_critic=config.get("fast_critic", False),
        fast_operator=config.get("fast_operator", False),
        use_hidden=config.get("use_hidden", True),
        ensure_update=config.get("ensure_update", True),
        fallback=operators.fallback_index(config.get("fallback_operator", "O_SCOPE")),
        save_relation=config.get("save_relation", True),
    )
    canvas = make_canvas(trace, special.mask_id, special.pad_id)
    levels = record["sigma"]
    times = sigma(
        jnp.arange(config["max_steps"]),
        num_steps=levels["num_steps"],
        sigma_min=levels["sigma_min"],
        sigma_max=levels["sigma_max"],
        schedule=levels["sigma_schedule"],
    )
    tables = load_tables()

    @jax.jit
    def run(canvas: Canvas) -> tuple[jax.Array, PaperRecord]:
        facts = prompt_facts(tables, canvas.prompt_ids, canvas.prompt_len, path=options.path)
        context = backbone.begin(params, canvas)

        def body(gen_ids: jax.Array, step: jax.Array) -> tuple[jax.Array, PaperRecord]:
            level = jnp.broadcast_to(times[step], gen_ids.shape[:1])
            keys = row_keys(jax.random.key(config["seed"]), step, canvas.row_id)
            return paper_step(
                *(backbone, options, operators, tables, params, context, actor, critic),
                *(canvas, gen_ids, level, keys),
                prompt=facts,
            )

        return jax.lax.scan(body, canvas.gen_ids(), jnp.arange(config["max_steps"]))

    final_ids, records = run(canvas)
    return Replay(
        backbone, params, actor, critic, operators, canvas, times, records, np.asarray(final_ids)
    )


@pytest.mark.parametrize(("trace", "record", "weights"), load_traces())
def test_trace(trace: dict[str, Any], record: dict[str, Any], weights: Path) -> None:
    found = replay(trace, record, weights)
    steps, config, names = found.records, trace["rollout_config"], found.operators.ids
    assert names == tuple(record["operators"])
    assert jnp.asarray(steps.features).shape[-1] == len(
        trace["episodes"][0]["steps"][0]["features"]
    )
    for row, episode in enumerate(trace["episodes"]):
        length = len(episode["prompt_ids"])
        assert len(episode["steps"]) == steps.cost.shape[0]
        for t, wanted in enumerate(episode["steps"]):
            where = f"{trace['name']}, episode {row}, step {t}"
            assert steps.gen_before[t, row].tolist() == wanted["gen_ids_before"], where
            np.testing.assert_allclose(
                steps.features[t, row], wanted["features"], atol=TOLERANCE, err_msg=where
            )
            # Values of this size carry more absolute rounding than the features they come from.
            np.testing.assert_allclose(
                steps.q[t, row], wanted["q"], atol=TOLERANCE, rtol=1e-5, err_msg=where
            )
            assert names[int(steps.chosen[t, row])] == wanted["actor_choice"], where
            executed = names[int(steps.operator[t, row])]
            assert executed == wanted["executed_operator"], where
            positions = np.flatnonzero(steps.update_mask[t, row]) + length
            assert positions.tolist() == wanted["update_positions"], where
            assert float(steps.cost[t, row]) == pytest.approx(wanted["cost"]), where
            after = steps.gen_before[t + 1, row] if t + 1 < len(steps.cost) else None
            after = found.final_ids[row] if after is None else np.asarray(after)
            assert after.tolist() == wanted["gen_ids_after"], where
            recorded = t in config["branch_steps"] or executed == "O_BRANCH"
            assert recorded == (wanted["branch_candidates"] is not None), where
            if recorded:
                ranked = ranked_operators(steps.q[t, row][None], config["branch_k"])[0]
                assert [names[int(i)] for i in ranked] == wanted["branch_candidates"], where
        assert episode["prompt_ids"] + found.final_ids[row].tolist() == episode["final_ids"]
        cost = float(steps.cost[:, row].sum())
        assert cost == pytest.approx(episode["cost"])
        value = episode["reward"] - config["cost_lambda"] * cost
        assert value == pytest.approx(episode["return"], abs=1e-6)
        assert (steps.relation is None) == config.get("fast_critic", False)
        if episode["last_relation"] is None:  # not recorded for every trace
            continue
        # Recorded relations hold the kept columns only, in no rows at all where none is kept.
        kept = np.ones(config["gen_len"], bool)
        if config.get("gpu_critic", True):
            kept = np.asarray(kept_columns(load_tables(), steps.gen_before[-1, row][None]))[0]
        relation = np.asarray(steps.relation)[-1, row, :length][:, kept]
        wanted_relation = np.asarray(episode["last_relation"], np.float32)
        assert relation.size == wanted_relation.size
        if wanted_relation.size:
            np.testing.assert_allclose(relation, wanted_relation, atol=1e-6)


@pytest.mark.parametrize(("trace", "record", "weights"), load_traces())
def test_losses(trace: dict[str, Any], record: dict[str, Any], weights: Path) -> None:
    found = replay(trace, record, weights)
    horizon, batch = found.records.cost.shape
    returns = jnp.tile(jnp.asarray([e["return"] for e in trace["episodes"]]), (horizon, 1))
    features = found.records.features.reshape(horizon * batch, -1)
    losses = trace["loss_config"]
    q = heads_apply(found.critic, features)
    critic_value, _ = critic_loss(
        found.critic, features, found.records.operator.reshape(-1), returns.reshape(-1)
    )
    actor_value, _ = actor_loss(found.actor, q, features, losses["actor_temperature"])

    def logits_of(gen_ids: jax.Array, level: jax.Array) -> jax.Array:
        times = jnp.broadcast_to(level, gen_ids.shape[:1])
        scores = found.backbone.score(found.params, (), found.canvas, gen_ids, times)
        return found.backbone.head(found.params, scores.hidden)

    logits = jax.jit(jax.vmap(logits_of))(found.records.gen_before, found.times)
    longest = max(len(e["target_ids"] or []) for e in trace["episodes"])
    targets = np.zeros((batch, longest), np.int32)
    for row, episode in enumerate(trace["episodes"]):
        targets[row, : len(episode["target_ids"])] = episode["target_ids"]
    lengths = np.asarray([len(e["target_ids"]) for e in trace["episodes"]], np.int32)
    steps = horizon * batch
    arguments = (
        logits.reshape(steps, *logits.shape[2:]),
        jnp.tile(found.canvas.gen_index, (horizon, 1)),
        found.records.update_mask.reshape(steps, -1),
        jnp.tile(jnp.asarray(targets), (horizon, 1)),
        jnp.tile(jnp.asarray(lengths), horizon),
        returns.reshape(-1),
    )
    settings = (
        ("losses", losses["advantage_positive"], losses["advantage_clip"]),
        ("losses_signed_unclipped", False, 0.0),
    )
    for name, positive, clip in settings:
        wanted = trace[name]
        value, _ = backbone_loss(*arguments, advantage_positive=positive, advantage_clip=clip)
        parts = {
            "critic_loss": float(critic_value),
            "actor_loss": float(actor_value),
            "backbone_loss": float(value),
        }
        parts["total_loss"] = float(total_loss(parts, losses))
        for part, number in parts.items():
            assert number == pytest.approx(wanted[part], rel=2e-5, abs=2e-6), (name, part)
