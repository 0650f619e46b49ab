"""What is done at a control point: nothing, one fixed correction, or what the memory advises.

A policy looks at all slots of a stream at once and answers with one tool and strength per slot.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from common.engines.base import NO_TOOL, Stream, Toolbox
from esm.core.policy import Candidates, candidates, decide, uniform_choice
from esm.core.retrieval import REASONS, Entries, Retrieved, retrieve, unit
from esm.memory import Memory

VARIANTS = ("esm", "no_memory", "no_probing", "random_use_memory", "use_random_memory")
PROBE_SCALES = ("unit", "commit")
ALPHA_NORMS = ("raw", "rel")
KEY_CENTERS = ("none", "layer", "layer_m")
NULL = "null"


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """How the memory is used; static for a stream.

    Attributes:
        variant: one of VARIANTS.
        k_retrieve: entries looked up.
        num_tools: L, tools tried.
        probe_tokens: most tokens of a probe; 0 = none.
        beta: weight of the estimated advantage.
        rho: weight of the confidence gain.
        k_scale: strength per score.
        tau_null: least score of a tool.
        min_sim: best similarity below which nothing is done.
        min_entries: fewest entries of a control point.
        min_tool_m: first control point at which tools may act; None = 1.
        max_tool_m: last one; None = no limit.
        probe_scale: strength of probes: 1 ("unit"), or k_scale * beta * advantage ("commit").
        alpha_max: largest strength; inf = no limit.
        alpha_norm: "raw", or "rel": strengths count in units of |h| / |v|.
        key_center: what is subtracted from unit keys and queries before the cosine.
        seed: of the draws of random_use_memory and use_random_memory.
    """

    variant: str = "esm"
    k_retrieve: int = 16
    num_tools: int = 2
    probe_tokens: int = 8
    beta: float = 1.0
    rho: float = 0.1
    k_scale: float = 1.0
    tau_null: float = 0.0
    min_sim: float = 0.0
    min_entries: int = 1
    min_tool_m: int | None = None
    max_tool_m: int | None = None
    probe_scale: str = "unit"
    alpha_max: float = float("inf")
    alpha_norm: str = "raw"
    key_center: str = "none"
    seed: int = 0


class Plan(NamedTuple):
    """What S slots do next.

    Attributes:
        tools: [S] int32, NO_TOOL = nothing.
        strengths: [S] float32.
        spent: [S] int32, probe tokens.
        logs: per slot the policy's part of the step log; {} where it was not consulted.
    """

    tools: np.ndarray
    strengths: np.ndarray
    spent: np.ndarray
    logs: list[dict[str, Any]]


class Policy(Protocol):
    """Chooses tools for all slots at once."""

    toolbox: Toolbox
    layers: tuple[int, ...]
    probe_tokens: int
    probe_branches: int

    def acts_at(self, point: int) -> bool:
        """Whether it is consulted at a control point (0 = the prompt's end)."""
        ...

    def plan(
        self, stream: Stream, consulted: np.ndarray, points: np.ndarray, rows: np.ndarray
    ) -> Plan:
        """Decides for the consulted slots.

        Args:
            stream: at the control points.
            consulted: [S] bool.
            points: [S] int32 control points.
            rows: [S] int32 identities of the rows, for random choices.
        """
        ...


def empty_toolbox(hidden_size: int) -> Toolbox:
    """No tools."""
    return Toolbox((), np.zeros((0,), np.int32), np.zeros((0, hidden_size), np.float32))


def _nothing(slots: int) -> Plan:
    return Plan(
        np.full((slots,), NO_TOOL, np.int32),
        np.zeros((slots,), np.float32),
        np.zeros((slots,), np.int32),
        [{} for _ in range(slots)],
    )


class NullPolicy:
    """Never steers: the answer in segments, and nothing else."""

    layers: tuple[int, ...] = ()
    probe_tokens = 0
    probe_branches = 0

    def __init__(self, hidden_size: int) -> None:
        """Args: hidden_size: H of the model."""
        self.toolbox = empty_toolbox(hidden_size)

    def acts_at(self, point: int) -> bool:
        """Nowhere."""
        del point
        return False

    def plan(
        self, stream: Stream, consulted: np.ndarray, points: np.ndarray, rows: np.ndarray
    ) -> Plan:
        """Nothing for every slot."""
        del stream, points, rows
        return _nothing(len(consulted))


class StaticPolicy:
    """One mean correction at one strength, at every control point."""

    layers: tuple[int, ...] = ()
    probe_tokens = 0
    probe_branches = 0

    def __init__(
        self, memory: Memory, layer: int, strength: float, settings: PolicySettings
    ) -> None:
        """Args: memory: whose corrections of `layer` are averaged; strength: of the mean."""
        of_layer = (memory.layer == layer) & ~memory.is_null
        mean = memory.vectors[of_layer].mean(axis=0, dtype=np.float64).astype(np.float32)
        self.toolbox = Toolbox((f"mean_L{layer}",), np.asarray([layer], np.int32), mean[None])
        self._strength = strength
        self._settings = settings

    def acts_at(self, point: int) -> bool:
        """At the same control points as the memory."""
        return point_allowed(self._settings, point) and self._strength > 0

    def plan(
        self, stream: Stream, consulted: np.ndarray, points: np.ndarray, rows: np.ndarray
    ) -> Plan:
        """The mean correction for every consulted slot."""
        del stream, points, rows
        plan = _nothing(len(consulted))
        log = {"chosen": self.toolbox.names[0], "chosen_scale": self._strength, "note": "static"}
        return plan._replace(
            tools=np.where(consulted, 0, NO_TOOL).astype(np.int32),
            strengths=np.where(consulted, self._strength, 0).astype(np.float32),
            logs=[dict(log) if used else {} for used in consulted],
        )


class MemoryPolicy:
    """Looks similar states up, tries their corrections and takes the best one."""

    def __init__(self, memory: Memory, settings: PolicySettings) -> None:
        """Args: memory: entries; settings: see there."""
        self.settings = settings
        self.layers = memory.layers
        self.probe_branches = settings.num_tools
        probing = settings.variant != "no_probing" and settings.num_tools > 0
        self.probe_tokens = settings.probe_tokens if probing else 0
        random_seed = settings.seed if settings.variant == "use_random_memory" else None
        self.toolbox = memory.toolbox(random_seed)
        self._noise_from = len(memory.names) if random_seed is not None else 0
        self._names = memory.names
        keys, self._center = center_keys(memory, settings.key_center)
        self._entries = jax.device_put(memory.entries(keys))
        self._weights = _Weights(
            settings.beta,
            settings.rho,
            settings.tau_null,
            settings.k_scale,
            settings.alpha_max,
            settings.seed,
        )
        self._norms = jnp.asarray(np.linalg.norm(memory.vectors, axis=1), jnp.float32)

    def acts_at(self, point: int) -> bool:
        """From min_tool_m to max_tool_m."""
        return point_allowed(self.settings, point)

    def plan(
        self, stream: Stream, consulted: np.ndarray, points: np.ndarray, rows: np.ndarray
    ) -> Plan:
        """Looks up, probes where there are tools, decides."""
        if not consulted.any():
            return _nothing(len(consulted))
        settings = self.settings
        query = (
            stream.query(consulted)
            if self.layers
            else np.zeros((len(consulted), 0, self.toolbox.vectors.shape[1]), np.float32)
        )
        found, cand, factor = _look_up(
            self._entries,
            self._center,
            self._norms,
            query,
            points,
            settings.min_sim,
            settings.min_entries,
            k=settings.k_retrieve,
            num_tools=settings.num_tools,
            relative=settings.alpha_norm == "rel",
        )
        tool = np.asarray(cand.tool)
        has_tools = consulted & (tool != NO_TOOL).any(axis=1)
        probed = has_tools & (self.probe_tokens > 0)
        conf = np.zeros((len(consulted), settings.num_tools + 1), np.float32)
        spent = np.zeros((len(consulted),), np.int32)
        if probed.any():
            tried = np.where(probed[:, None], tool, NO_TOOL).astype(np.int32)
            probe = stream.probe(tried, _probe_strengths(cand, factor, settings), probed)
            conf, spent = probe.mean_log_probs, probe.lengths.sum(axis=1).astype(np.int32)
        choice, score, alpha, scores = jax.device_get(
            _decide(
                cand,
                factor,
                conf,
                probed,
                rows,
                points,
                self._weights,
                at_random=settings.variant == "random_use_memory",
            )
        )
        picked = np.take_along_axis(
            np.pad(tool, ((0, 0), (1, 0)), constant_values=NO_TOOL),
            choice[:, None],
            axis=1,
        )[:, 0]
        picked = np.where(consulted, picked, NO_TOOL)
        host = jax.device_get((found, cand))
        view = _View(host[0], host[1], conf, probed, choice, score, alpha, scores)
        return Plan(
            tools=np.where(picked == NO_TOOL, NO_TOOL, picked + self._noise_from).astype(np.int32),
            strengths=np.where(picked == NO_TOOL, 0, alpha).astype(np.float32),
            spent=np.where(probed, spent, 0).astype(np.int32),
            logs=[self._log(view, s) if consulted[s] else {} for s in range(len(consulted))],
        )

    def _log(self, view: "_View", slot: int) -> dict[str, Any]:
        """The policy's part of a step log row."""
        found, cand = view.found, view.cand
        probed, choice = bool(view.probed[slot]), int(view.choice[slot])
        null_ahat = float(cand.null_ahat[slot])
        rows: list[dict[str, Any]] = [
            {"name": NULL, "score": float(view.scores[slot, 0]), "ahat": null_ahat, "sim": None}
        ]
        if probed:
            rows[0]["conf_gain"] = 0.0
        for place, tool in enumerate(cand.tool[slot]):
            if tool == NO_TOOL:
                continue
            row = {
                "name": self._names[tool],
                "score": float(view.scores[slot, place + 1]),
                "ahat": float(cand.ahat[slot, place]),
                "sim": float(cand.sim[slot, place]),
            }
            if probed:
                row["conf_gain"] = float(view.conf[slot, place + 1] - view.conf[slot, 0])
            rows.append(row)
        top_sim = float(found.top_sim[slot])
        return {
            "probe_tokens_per_cand": self.probe_tokens if probed else 0,
            "chosen": NULL if choice == 0 else self._names[cand.tool[slot, choice - 1]],
            "chosen_score": float(view.score[slot]),
            "chosen_scale": float(view.alpha[slot]),
            "null_ahat": null_ahat,
            "candidates": rows,
            "mem_reason": REASONS[int(found.reason[slot])],
            "mem_n_entries": int(found.num_entries[slot]),
            "mem_top_sim": None if np.isnan(top_sim) else top_sim,
            "note": f"variant={self.settings.variant}",
        }


class _View(NamedTuple):
    """What a plan was made from, on the host."""

    found: Retrieved
    cand: Candidates
    conf: np.ndarray
    probed: np.ndarray
    choice: np.ndarray
    score: np.ndarray
    alpha: np.ndarray
    scores: np.ndarray


def point_allowed(settings: PolicySettings, point: int) -> bool:
    """Whether tools may act at a control point."""
    low = 1 if settings.min_tool_m is None else max(1, settings.min_tool_m)
    return point >= low and (settings.max_tool_m is None or point <= settings.max_tool_m)


def center_keys(memory: Memory, kind: str) -> tuple[np.ndarray | None, jax.Array | None]:
    """Keys minus the mean of their layer ("layer") or layer and control point ("layer_m").

    States of one layer share a large common part, so that raw cosines are all close to 1.

    Returns:
        Unit keys [N, H] and the means [LQ, P, H] for queries; (None, None) for "none".
    """
    if kind == "none" or not len(memory.keys):
        return None, None
    points = int(memory.point.max()) + 1
    means = np.zeros((len(memory.layers), points, memory.keys.shape[1]), np.float32)
    for slot, layer in enumerate(memory.layers):
        of_layer = memory.layer == layer
        means[slot] = memory.keys[of_layer].mean(axis=0)
        for point in np.unique(memory.point[of_layer]) if kind == "layer_m" else ():
            means[slot, point] = memory.keys[of_layer & (memory.point == point)].mean(axis=0)
    slots = np.searchsorted(memory.layers, memory.layer)
    return np.asarray(unit(memory.keys - means[slots, memory.point])), jnp.asarray(means)


@functools.partial(jax.jit, static_argnames=("k", "num_tools", "relative"))
def _look_up(
    entries: Entries,
    center: jax.Array | None,
    norms: jax.Array,
    query: jax.Array,
    points: jax.Array,
    min_sim: float,
    min_entries: int,
    *,
    k: int,
    num_tools: int,
    relative: bool,
) -> tuple[Retrieved, Candidates, jax.Array]:
    """Retrieval, candidates, and the unit [S, L] in which strengths count."""
    found = retrieve(entries, query, points, k, min_sim, min_entries, center)
    cand = candidates(found, entries, num_tools)
    factor = jnp.ones(cand.tool.shape, jnp.float32)
    if relative and query.shape[1]:
        at = jnp.maximum(cand.tool, 0)
        length = jnp.take_along_axis(
            jnp.linalg.norm(query, axis=-1), jnp.maximum(entries.layer[at], 0), axis=1
        )
        factor = length / jnp.maximum(norms[at], 1e-12)
    return found, cand, factor


@functools.partial(jax.jit, static_argnames="at_random")
def _decide(
    cand: Candidates,
    factor: jax.Array,
    conf: jax.Array,
    probed: jax.Array,
    rows: jax.Array,
    points: jax.Array,
    weights: "_Weights",
    *,
    at_random: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Choice, score, strength in the model's units, scores."""
    forced = None
    if at_random:

        def draw(row: jax.Array, point: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(weights.seed), row)
            return jax.random.uniform(jax.random.fold_in(key, point))

        forced = uniform_choice(cand.tool, jax.vmap(draw)(rows, points))
    done = decide(
        cand,
        conf,
        weights.beta,
        weights.rho,
        weights.tau,
        weights.k_scale,
        probed,
        forced,
        weights.alpha_max,
    )
    padded = jnp.pad(factor, ((0, 0), (1, 0)), constant_values=1)
    used = jnp.take_along_axis(padded, done.choice[:, None], axis=1)[:, 0]
    return done.choice, done.score, done.alpha * used, done.scores


class _Weights(NamedTuple):
    """Numbers of a decision; arguments, so that a sweep over them compiles once."""

    beta: float
    rho: float
    tau: float
    k_scale: float
    alpha_max: float
    seed: int


def _probe_strengths(cand: Candidates, factor: jax.Array, settings: PolicySettings) -> np.ndarray:
    """[S, L] float32."""
    if settings.probe_scale == "unit":
        return np.asarray(factor, np.float32)
    planned = settings.k_scale * settings.beta * np.asarray(cand.ahat)
    planned = np.minimum(np.maximum(planned, 0), settings.alpha_max)
    return (planned * np.asarray(factor)).astype(np.float32)
