"""What steering costs: token positions of the online policy, and tokens per second of two engines.

    python -m bench.esm_engine                                  # minutes on two cores
    python -m bench.esm_engine --json results/esm_engine_speed.json
    python -m bench.esm_engine --model small --only positions
    XLA_FLAGS='--xla_cpu_multi_thread_eigen=false' python -m bench.esm_engine --clock cpu

Every row of the policy has a prompt of 300 tokens and 8 segments of 60; before each but the first,
4 tools and the unsteered continuation are tried for 8 tokens. What is chosen is fixed: never, in
half of the cases, or always a tool.

Groups (`--only`):
  positions  positions sent through the model, over those of greedy decoding of the same tokens.
             "whole" counts a position as one whatever part of the model it runs through. "blocks"
             counts the blocks that are run: a tool's pass over the last token runs those above the
             tool's layer; the pass that overwrites a steered segment runs them too, but of the last
             one only what makes its keys and values, as nothing is read from its output.
  greedy     tokens per second of plain decoding, JAX engine over transformers engine.
  policy     tokens per second of the online policy, half of the segments steered, likewise.

`--clock cpu` counts seconds of processor time and gives transformers one thread: on a busy machine
waiting threads would distort everything else.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bench import Row, format_rows, machine, rates, take_turns
from common.engines.base import NO_TOOL, Decoding, StreamSettings, Toolbox, Work
from common.engines.jax_engine import JaxEngine
from common.lm.config import DecoderConfig
from common.lm.decoder import init_params
from common.lm.weights import Model, save_model
from common.rundir import atomic_write_json

SMALL = DecoderConfig("llama", 64, 32, 48, 5, 2, 1, 16, max_positions=1024)
MIDDLE = DecoderConfig(
    "llama", 16384, 384, 1024, 8, 6, 2, 64, tie_embeddings=True, max_positions=1024
)
MODELS = {"middle": MIDDLE, "small": SMALL}
TOOL_SHARES = (0.0, 0.5, 1.0)
POSITIONS_BAR, RATE_BAR = 1.5, 1.5


@dataclasses.dataclass(frozen=True)
class Scene:
    """Sizes of the online policy.

    Attributes:
        prompt: Tokens of a prompt.
        segment: Tokens of a segment.
        segments: M.
        tools: L, tried at every control point but the first.
        probe: Most tokens of a probe.
        depth: Layer of the tools, as a share of the layers.
    """

    prompt: int = 300
    segment: int = 60
    segments: int = 8
    tools: int = 4
    probe: int = 8
    depth: float = 0.6

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return self.segment * self.segments

    def layer(self, cfg: DecoderConfig) -> int:
        """Layer of the tools."""
        return round(self.depth * (cfg.num_layers - 1))


class Passes(NamedTuple):
    """Positions of all rows.

    Attributes:
        work: As the engine counts them.
        tools: Those of them at which a tool's pass runs again the blocks above its layer.
    """

    work: Work
    tools: int

    @property
    def whole(self) -> int:
        """All positions."""
        return self.work.prefill + self.work.commit + self.work.probe + self.work.reread

    def blocks(self, cfg: DecoderConfig, layer: int) -> float:
        """Positions in units of a pass through all blocks, with tools at `layer`."""
        above = cfg.num_layers - 1 - layer
        tool = above / cfg.num_layers
        reread = (max(above - 1, 0) + key_value_share(cfg) * min(above, 1)) / cfg.num_layers
        return self.whole - (1.0 - tool) * self.tools - (1.0 - reread) * self.work.reread


def key_value_share(cfg: DecoderConfig) -> float:
    """Weights of a block that its keys and values take, as a share of all its matrices'."""
    heads = cfg.num_heads + cfg.num_kv_heads
    attention = 2 * cfg.hidden_size * cfg.head_dim * heads
    every = attention + 3 * cfg.hidden_size * cfg.intermediate_size
    return 2 * cfg.hidden_size * cfg.head_dim * cfg.num_kv_heads / every


def run_policy(
    engine: Any, scene: Scene, tools: Toolbox, prompts: list[list[int]], share: float
) -> Passes:
    """All segments of all rows; `share` of the segments that may have a tool have one."""
    slots = len(prompts)
    layer = int(tools.layers[0])
    settings = StreamSettings(
        slots,
        scene.prompt + scene.answer,
        (layer,),
        "\n\n",
        scene.probe,
        scene.tools,
        Decoding(),
    )
    stream = engine.open(settings, tools)
    stream.refill(range(slots), prompts, range(slots))
    active, until = np.ones(slots, bool), np.zeros(slots, bool)
    budgets = np.full(slots, scene.segment)
    tried = np.broadcast_to(np.arange(scene.tools, dtype=np.int32), (slots, scene.tools))
    steered = 0
    for m in range(scene.segments):
        chosen = np.full(slots, NO_TOOL, np.int32)
        if m:
            stream.query(active)
            stream.probe(tried, np.ones(tried.shape, np.float32), active)
            # Spread over rows and segments alike.
            turn = (np.arange(slots) + m) % 4
            chosen = np.where(turn < 4 * share, turn % scene.tools, NO_TOOL).astype(np.int32)
            steered += int((chosen != NO_TOOL).sum())
        stream.commit(chosen, np.full(slots, 0.5, np.float32), budgets, until)
    work = Work(*(sum(counts) for counts in zip(*stream.work(), strict=True)))
    probes = slots * scene.tools * (scene.segments - 1)
    return Passes(work, probes + steered)


def make_tools(cfg: DecoderConfig, scene: Scene) -> Toolbox:
    """Random directions of a state's usual size at one layer."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((scene.tools, cfg.hidden_size)).astype(np.float32)
    layers = np.full(scene.tools, scene.layer(cfg), np.int32)
    return Toolbox(tuple(f"tool_{i}" for i in range(scene.tools)), layers, vectors)


def make_prompts(cfg: DecoderConfig, scene: Scene, slots: int) -> list[list[int]]:
    """Random prompts, all different."""
    rng = np.random.default_rng(2)
    return rng.integers(0, cfg.vocab_size, (slots, scene.prompt)).tolist()


def position_rows(cfg: DecoderConfig, scene: Scene, slots: int, repeats: int) -> list[Row]:
    """Counted positions over those of greedy decoding."""
    del repeats  # counts do not scatter
    engine = JaxEngine(Model(init_params(jax.random.key(0), cfg), cfg, ()), [])
    tools, prompts = make_tools(cfg, scene), make_prompts(cfg, scene, slots)
    greedy = slots * (scene.prompt + scene.answer - 1)
    rows = []
    for share in TOOL_SHARES:
        passes = run_policy(engine, scene, tools, prompts, share)
        what = f"positions of the policy / greedy, {share:.0%} steered"
        whole, blocks = passes.whole, passes.blocks(cfg, scene.layer(cfg))
        rows.append(Row(f"{what}, whole", whole, greedy, whole / greedy, unit="p"))
        rows.append(
            Row(f"{what}, blocks", blocks, greedy, blocks / greedy, POSITIONS_BAR, unit="p")
        )
    return rows


class Pair(NamedTuple):
    """Both engines over the same weights."""

    jax: Any
    hf: Any


def open_pair(cfg: DecoderConfig, slots: int, directory: str) -> Pair:
    """The engines, with as many sampling slots as rows."""
    from common.engines.hf_engine import HfEngine

    model = Model(init_params(jax.random.key(0), cfg, 0.05), cfg, ())
    save_model(directory, model)
    return Pair(
        JaxEngine(model, [], sample_slots=slots), HfEngine(directory, [], sample_slots=slots)
    )


def rate_rows(
    cfg: DecoderConfig, scene: Scene, slots: int, repeats: int, groups: list[str], clock: str
) -> list[Row]:
    """Tokens per second of both engines, taking turns."""
    if clock == "cpu":
        import torch

        torch.set_num_threads(1)
    tools, prompts = make_tools(cfg, scene), make_prompts(cfg, scene, slots)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        pair = open_pair(cfg, slots, str(Path(place) / "model"))

        def greedy(engine: Any) -> int:
            engine.sample(prompts, [[0]] * slots, Decoding(), scene.answer)
            return 0

        def policy(engine: Any) -> int:
            return run_policy(engine, scene, tools, prompts, 0.5).tools

        works: dict[str, Callable[[Any], int]] = {"greedy": greedy, "policy": policy}
        for group in groups:
            work = works[group]
            things: dict[str, Callable[[], Any]] = {
                "jax": lambda work=work: work(pair.jax),  # type: ignore[misc]
                "hf": lambda work=work: work(pair.hf),  # type: ignore[misc]
            }
            timings = take_turns(things, repeats, clock=CLOCKS[clock])
            tokens = slots * scene.answer
            per = "second" if clock == "wall" else "second of one processor"
            name = f"{group}, tokens per {per}, jax / hf [{slots} rows, {cfg.num_layers} layers]"
            rows.append(rates(name, timings, ("hf", tokens), ("jax", tokens), RATE_BAR))
    return rows


GROUPS = ("positions", "greedy", "policy")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def run(
    groups: list[str],
    model: str,
    scene: Scene,
    timed_scene: Scene,
    slots: int,
    repeats: int,
    clock: str,
) -> dict[str, Any]:
    """Measures, prints the table and returns everything for the JSON file."""
    before, start = machine(), time.perf_counter()
    rows: list[Row] = []
    if "positions" in groups:
        rows += position_rows(MODELS[model], scene, 4, repeats)
    timed = [group for group in groups if group != "positions"]
    if timed:
        rows += rate_rows(MODELS[model], timed_scene, slots, repeats, timed, clock)
    print(format_rows(rows))
    return {
        "machine": before | {"load_average_after": machine()["load_average"]},
        "seconds": round(time.perf_counter() - start, 1),
        "repeats": repeats,
        "clock": clock,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "model": dataclasses.asdict(MODELS[model]),
        "scene": dataclasses.asdict(scene),
        "timed_scene": dataclasses.asdict(timed_scene),
        "slots": slots,
        "rows": [row.as_dict() for row in rows],
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="", help="also write everything to this file")
    parser.add_argument("--repeats", type=int, default=3, help="rounds per comparison")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, separated by commas")
    parser.add_argument("--model", default="middle", choices=MODELS, help="whose sizes are used")
    parser.add_argument("--slots", type=int, default=8, help="rows of the timed groups")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="of the timed groups")
    parser.add_argument("--segment", type=int, default=60, help="tokens of a segment")
    parser.add_argument("--segments", type=int, default=8, help="segments of an answer")
    parser.add_argument("--timed_segments", type=int, help="of the timed groups; the same if unset")
    given = parser.parse_args(arguments)
    groups = given.only.split(",")
    if set(groups) - set(GROUPS) or min(given.repeats, given.slots, given.segments) < 1:
        parser.error(f"--only takes {', '.join(GROUPS)}; the numbers at least 1")
    scene = Scene(segment=given.segment, segments=given.segments)
    print(f"{given.slots} rows, {scene}", file=sys.stderr, flush=True)
    timed = dataclasses.replace(scene, segments=given.timed_segments or given.segments)
    result = run(groups, given.model, scene, timed, given.slots, given.repeats, given.clock)
    if given.json:
        flags = {name: getattr(given, name) for name in ("only", "timed_segments", "slots")}
        atomic_write_json(given.json, {"command": "python -m bench.esm_engine"} | flags | result)


if __name__ == "__main__":
    main()
