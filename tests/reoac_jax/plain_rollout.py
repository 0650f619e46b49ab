"""The plus rollout as a loop in plain Python, one row and one token at a time."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import plain_python_reoac as plain
from reoac_jax.backbone.base import Canvas
from reoac_jax.losses import mask_logits
from reoac_jax.settings import RolloutSettings
from reoac_jax.types import OPERATORS
from tests.reoac_jax.toy_setting import SPECIAL, STRINGS

VOCABULARY = plain.PlainVocabulary(STRINGS, SPECIAL.eos_id, frozenset(SPECIAL))
KEY = 7


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def plain_head(params: Any, x: np.ndarray) -> np.ndarray:
    hidden = np.maximum(x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"], 0.0)
    return hidden @ params["dense_1"]["kernel"] + params["dense_1"]["bias"]


def plain_scores(params: Any, prompt: list[int], gen: list[int], t: float) -> tuple:
    """Probabilities [G, V] and the mean states of prompt and canvas."""
    tokens = prompt + gen
    embedded = params["embed"][tokens]
    place = params["position"][: len(tokens)]
    states = np.tanh(embedded + place + embedded.mean(axis=0) + t * params["time"])
    logits = states[len(prompt) :] @ params["kernel"] + params["bias"]
    logits[:, SPECIAL.mask_id] = -np.inf
    return softmax(logits), states[: len(prompt)].mean(axis=0), states[len(prompt) :].mean(axis=0)


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def first_part(gen: list[int]) -> int:
    """Number of positions up to and including the first eos."""
    return gen.index(SPECIAL.eos_id) + 1 if SPECIAL.eos_id in gen else len(gen)


def plain_sets(
    settings: RolloutSettings, gen: list[int], needed: int, probs: np.ndarray, step: int
) -> tuple[list[list[int]], bool]:
    """Positions that each operator would touch, and whether it would write them."""
    masked = [j for j in range(needed) if gen[j] == SPECIAL.mask_id]
    sure = {j: float(probs[j].max()) for j in range(len(gen))}
    candidates = masked or list(range(needed))
    predicted = [
        int(p.argmax()) if g == SPECIAL.mask_id else g for g, p in zip(gen, probs, strict=True)
    ]
    by_class = {}
    for name, rule in (
        ("O_NUM", lambda s: any(c.isdigit() for c in s)),
        ("O_OP", plain.has_operator),
    ):
        member = [rule(s) and i != SPECIAL.mask_id for i, s in enumerate(STRINGS)]
        mass = probs[:, [i for i, s in enumerate(STRINGS) if rule(s)]].sum(axis=1)
        by_class[name] = [j for j in candidates if member[predicted[j]] or mass[j] >= 0.5]
    due = math.ceil(len(masked) / (settings.max_steps - step))
    found = []
    for spec in settings.operators.specs:
        best_first = sorted(candidates, key=lambda j: (-sure[j], j))
        if spec.name in by_class:
            chosen = by_class[spec.name]
        elif spec.name == "O_SCOPE":
            chosen = candidates[: spec.scope_len]
        elif spec.name == "O_FAST":
            chosen = best_first[: spec.scope_len]
        else:
            chosen = []
        inside = [j for j in best_first if j in chosen]
        if masked:
            found.append(inside[: math.ceil(due * spec.step_scale - 1e-4)])
        else:
            again = math.ceil(len(inside) * settings.remask_ratio - 1e-4)
            found.append(inside[len(inside) - again :])
    return found, bool(masked)


def plain_choice(
    mode: str, logits: np.ndarray, sets: list[list[int]], key: jax.Array
) -> tuple[int, float]:
    """The operator and the logarithm of its probability among the valid ones."""
    valid = [bool(s) for s in sets]
    if mode == "random":
        logits = np.zeros(5)
    shares = softmax(np.where(valid, logits, -np.inf) if any(valid) else logits)
    choice = int(shares.argmax())
    if mode == "random":
        flat = mask_logits(jnp.zeros((1, 5)), jnp.asarray([valid]))
        choice = int(jax.random.categorical(key, flat[0]))
    elif mode != "argmax":
        wanted = OPERATORS.index(mode.removeprefix("fixed:"))
        ordered = [wanted, OPERATORS.index("O_SCOPE"), *range(5)]
        choice = next((c for c in ordered if valid[c]), 0)
    return choice, math.log(shares[choice])


def plain_policy(logits: np.ndarray, sets: list[list[int]]) -> np.ndarray:
    """Probabilities of the operators among those that touch anything."""
    valid = [bool(s) for s in sets]
    return softmax(np.where(valid, logits, -np.inf) if any(valid) else logits)


def plain_episode(
    settings: RolloutSettings,
    params: Any,
    agent: Any,
    canvas: Canvas,
    index: int,
    forced: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Every decision of one row; `forced` names the operator of some steps."""
    length = int(canvas.prompt_len[index])
    prompt = [int(i) for i in canvas.tokens[index, :length]]
    key_mask = [bool(k) for k in canvas.key_mask[index, :length]]
    gen = [SPECIAL.mask_id] * settings.gen_len
    shown: list[int] | None = None
    changed, stable, reference = 0, -1, list(gen)
    decisions = []
    for step in range(settings.max_steps):
        needed = first_part(gen) if settings.stop_at_eos else len(gen)
        masked = [j for j in range(needed) if gen[j] == SPECIAL.mask_id]
        key = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(KEY), step), canvas.row_id[index]
        )
        probs, prompt_state, canvas_state = plain_scores(
            params, prompt, gen, len(masked) / len(gen)
        )
        entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in probs.tolist()]
        features = plain.features(
            prompt,
            key_mask,
            gen,
            VOCABULARY,
            [e / math.log(len(STRINGS)) for e in entropy],
            shown,
            temperature=settings.relation_temperature,
        )
        for place in (3, 4):
            features[place] /= math.log(max(length, 2))
        sure = float(np.mean([probs[j].max() for j in masked])) if masked else 0.0
        features += [step / settings.max_steps, len(masked) / len(gen), sure, changed / len(gen)]
        x = np.asarray(features)
        if settings.use_hidden:
            x = np.concatenate([x, layer_norm(canvas_state), layer_norm(prompt_state)])
        sets, writing = plain_sets(settings, gen, needed, probs, step)
        operator, log_prob = plain_choice(
            settings.selection_mode, plain_head(agent.actor, x), sets, jax.random.split(key, 2)[1]
        )
        operator = (forced or {}).get(step, operator)
        last = step == settings.max_steps - 1
        touched = masked if last else sets[operator]
        after = list(gen)
        for j in touched:
            after[j] = int(probs[j].argmax()) if writing else SPECIAL.mask_id
        decisions.append(
            {
                "features": x,
                "operator": operator,
                "log_prob": log_prob,
                "valid": [bool(s) for s in sets],
                "written": [writing and j in touched for j in range(len(gen))],
                "gen_before": gen,
                "after": after,
                "cost": settings.operators.specs[operator].cost,
                "q": plain_head(agent.critic, x),
                "policy": plain_policy(plain_head(agent.actor, x), sets),
            }
        )
        changed = sum(a != b for a, b in zip(gen, after, strict=True))
        shown, gen = gen, after
        open_part = gen[: first_part(gen)] if settings.stop_at_eos else gen
        if SPECIAL.mask_id not in open_part:
            stable = stable + 1 if gen == reference else 0
            reference = list(gen)
            if settings.early_exit and stable >= settings.patience:
                break
    return decisions


def double(tree: Any) -> Any:
    """Arrays as float64 on the host."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
