"""Tokens per second of block decoding, with and without caches and parallel writing.

    python -m bench.block_decode --json results/block_decode.json

The table has the form of Fast-dLLM (Wu et al., 2025): speed of every way beside the plain one,
which writes one token per pass over the whole sequence. Networks have the sizes of the released
models and random weights, so there is no accuracy, and no threshold would ever fire: "parallel"
writes a fixed number of tokens per step, as a threshold does on average.

Groups
  mdlm    169.6 M parameters: no cache, prefix cache, dual cache; one and several tokens per step.
  e2d2    180.2 M parameters: recomputing everything beside the exact caches; "block cache" is what
          rollouts and samplers do with backbone.block_cache (the copy of the weights counts).
  batch   e2d2 with caches, rows per batch: tokens/s beside batch 1.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import TraceCounter, machine, take_turns
from common.rundir import atomic_write_json
from reoac_jax.backbone import dit, e2d2
from reoac_jax.backbone.base import Canvas, e2d2_backbone
from reoac_jax.backbone.denoising import DecodeSettings
from reoac_jax.backbone.dit_decode import BlockSettings, decode_blocks
from reoac_jax.backbone.e2d2_blocks import block_scoring
from reoac_jax.backbone.e2d2_cache import decode_weights
from reoac_jax.backbone.e2d2_decode import generate
from reoac_jax.samplers import confidence_decode

GROUPS = ("mdlm", "e2d2", "batch")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are the released sizes.

    Attributes:
      width, layers, heads, vocab: of MDLM; the encoder of E2D2 has two layers less, its decoder 2.
      prompt, gen_len: tokens.
      mdlm_block, e2d2_block: tokens per block.
      together: tokens that "parallel" writes per step.
      batch: rows of the larger batch.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    vocab: int = 50258
    head_dim: int = 128
    prompt: int = 64
    gen_len: int = 32
    mdlm_block: int = 8
    e2d2_block: int = 4
    together: int = 4
    batch: int = 8


@dataclasses.dataclass(frozen=True)
class Speed:
    """One line: tokens per second and the gain over the group's first line."""

    group: str
    name: str
    tokens_per_second: float
    speed_up: float
    passes: str
    traces_later: int


def mdlm_network(sizes: Sizes) -> dit.DiTConfig:
    """kuleshov-group/mdlm-owt."""
    return dit.DiTConfig(
        vocab_size=sizes.vocab,
        mask_id=sizes.vocab - 1,
        pad_id=sizes.vocab - 2,
        eos_id=sizes.vocab - 2,
        bos_id=sizes.vocab - 2,
        hidden_size=sizes.width,
        cond_dim=128,
        num_blocks=sizes.layers,
        num_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        length=1024,
    )


def e2d2_network(sizes: Sizes) -> e2d2.E2D2Config:
    """kuleshov-group/e2d2-owt."""
    return e2d2.E2D2Config(
        vocab_size=sizes.vocab,
        mask_id=sizes.vocab - 1,
        pad_id=sizes.vocab - 2,
        eos_id=sizes.vocab - 2,
        bos_id=sizes.vocab - 2,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_encoder_layers=sizes.layers - 2,
        num_decoder_layers=2,
        num_heads=16,
        num_kv_heads=8,
        head_dim=sizes.head_dim,
        block_size=sizes.e2d2_block,
        length=1024,
        score_mode="left_to_right",
        prompt_attention="block_causal",
    )


def prompts(sizes: Sizes, rows: int) -> np.ndarray:
    """Random prompts [rows, P] int32 without special tokens."""
    rng = np.random.default_rng(0)
    return rng.integers(0, sizes.vocab - 2, (rows, sizes.prompt)).astype(np.int32)


def canvas_of(sizes: Sizes, ids: np.ndarray) -> Canvas:
    """The prompts, each with a masked canvas."""
    rows = len(ids)
    blank = np.full((rows, sizes.gen_len), sizes.vocab - 1, np.int32)
    return Canvas(
        tokens=jnp.asarray(np.concatenate([ids, blank], axis=1)),
        prompt_len=jnp.full(rows, sizes.prompt, jnp.int32),
        key_mask=jnp.zeros(ids.shape, bool),
        row_id=jnp.arange(rows, dtype=jnp.uint32),
    )


def lively(params: Any) -> Any:
    """The parameters with random modulations and output: fresh ones are zero there."""
    ada = params["blocks"]["ada"]["kernel"]
    linear = params["final"]["linear"]["kernel"]
    first, second = jax.random.split(jax.random.key(1))
    blocks = {**params["blocks"], "ada": {**params["blocks"]["ada"]}}
    blocks["ada"]["kernel"] = 0.02 * jax.random.normal(first, ada.shape)
    final = {**params["final"], "linear": {**params["final"]["linear"]}}
    final["linear"]["kernel"] = 0.02 * jax.random.normal(second, linear.shape)
    return {**params, "blocks": blocks, "final": final}


def measure(
    group: str,
    things: Mapping[str, Callable[[], Any]],
    tokens: dict[str, int],
    passes: dict[str, str],
    repeats: int,
    counter: TraceCounter,
) -> list[Speed]:
    """Lines of a group; the first thing is what the others are compared with."""
    timings = take_turns(things, repeats, counter)
    base = next(iter(things))
    lines = []
    for name in things:
        gain = timings.ratio(base, name) * tokens[name] / tokens[base]
        speed = tokens[name] / timings.median(name)
        lines.append(Speed(group, name, speed, gain, passes[name], timings.traces[1]))
    return lines


def mdlm_speeds(sizes: Sizes, repeats: int) -> list[Speed]:
    """Block decoding of MDLM, batch 1."""
    cfg = mdlm_network(sizes)
    params = jax.jit(lambda key: lively(dit.init_params(key, cfg)))(jax.random.key(0))
    canvas = canvas_of(sizes, prompts(sizes, 1))
    counter = TraceCounter()
    steps = -(-sizes.mdlm_block // sizes.together)
    ways = {
        "one token per pass": BlockSettings(sizes.mdlm_block),
        "prefix cache": BlockSettings(sizes.mdlm_block, "prefix"),
        "dual cache": BlockSettings(sizes.mdlm_block, "dual"),
        f"parallel ({sizes.together} tokens)": BlockSettings(sizes.mdlm_block, num_steps=steps),
        "parallel + prefix cache": BlockSettings(sizes.mdlm_block, "prefix", steps),
        "parallel + dual cache": BlockSettings(sizes.mdlm_block, "dual", steps),
    }
    things, passes = {}, {}
    for name, settings in ways.items():
        run = counter.jit(functools.partial(_decode_mdlm, cfg=cfg, settings=settings))
        done = run(params, canvas)
        passes[name] = f"{int(done.full_passes)} full + {int(done.cached_passes)} cached"
        things[name] = functools.partial(run, params, canvas)
    tokens = dict.fromkeys(things, sizes.gen_len)
    return measure("mdlm", things, tokens, passes, repeats, counter)


def _decode_mdlm(params: Any, canvas: Canvas, cfg: dit.DiTConfig, settings: BlockSettings) -> Any:
    return decode_blocks(params, cfg, canvas, settings)


def _e2d2_cached(
    counter: TraceCounter, cfg: e2d2.E2D2Config, sizes: Sizes, num_steps: int
) -> Callable[..., Any]:
    settings = DecodeSettings(num_steps=num_steps, stop_at_eos=False)

    def decode(weights: Any, ids: jax.Array) -> Any:
        lengths = jnp.full(ids.shape[0], sizes.prompt)
        return generate(weights, cfg, ids, lengths, max_new_tokens=sizes.gen_len, settings=settings)

    return counter.jit(decode)


def e2d2_speeds(sizes: Sizes, repeats: int) -> list[Speed]:
    """E2D2 with nothing kept beside its exact caches, batch 1."""
    cfg = e2d2_network(sizes)
    params = e2d2.init_params(jax.random.key(0), cfg)
    weights = jax.jit(decode_weights, static_argnums=1)(params, cfg)
    counter = TraceCounter()
    ids = prompts(sizes, 1)
    canvas, backbone = canvas_of(sizes, ids), e2d2_backbone(cfg)
    plain = counter.jit(functools.partial(confidence_decode, backbone, num_steps=sizes.gen_len))
    name, passes = "one token per pass", {"one token per pass": f"{sizes.gen_len} full"}
    things: dict[str, Callable[[], Any]] = {name: lambda: plain(params, canvas)}
    cached = dataclasses.replace(backbone, blocks=block_scoring(cfg))
    sampler = counter.jit(functools.partial(confidence_decode, cached, num_steps=sizes.gen_len))
    title = "one token per pass, block cache"
    passes[title], things[title] = f"{sizes.gen_len} of a block", lambda: sampler(params, canvas)
    steps = -(-sizes.e2d2_block // 2)
    for title, num_steps in (("exact caches", 0), ("exact caches, 2 tokens per step", steps)):
        run = _e2d2_cached(counter, cfg, sizes, num_steps)
        done = run(weights, jnp.asarray(ids))
        passes[title] = f"{int(done.encoder_calls)} encoder + {int(done.decoder_calls)} decoder"
        things[title] = functools.partial(run, weights, jnp.asarray(ids))
    tokens = dict.fromkeys(things, sizes.gen_len)
    return measure("e2d2", things, tokens, passes, repeats, counter)


def batch_speeds(sizes: Sizes, repeats: int) -> list[Speed]:
    """E2D2 with caches at batch 1 and at a larger one."""
    cfg = e2d2_network(sizes)
    params = e2d2.init_params(jax.random.key(0), cfg)
    weights = jax.jit(decode_weights, static_argnums=1)(params, cfg)
    counter = TraceCounter()
    run = _e2d2_cached(counter, cfg, sizes, 0)
    things, passes, tokens = {}, {}, {}
    for rows in (1, sizes.batch):
        ids = jnp.asarray(prompts(sizes, rows))
        name = f"exact caches, batch {rows}"
        done = run(weights, ids)
        passes[name] = f"{int(done.encoder_calls)} encoder + {int(done.decoder_calls)} decoder"
        things[name] = functools.partial(run, weights, ids)
        tokens[name] = rows * sizes.gen_len
    return measure("batch", things, tokens, passes, repeats, counter)


MEASURES: dict[str, Callable[[Sizes, int], list[Speed]]] = {
    "mdlm": mdlm_speeds,
    "e2d2": e2d2_speeds,
    "batch": batch_speeds,
}


def format_table(lines: list[Speed]) -> str:
    """The table that is printed; accuracy does not exist with random weights."""
    width = max(len(line.name) for line in lines)
    rows = [f"{'':6} {'':{width}}  {'accuracy':>8} {'tok/s':>8} {'speed-up':>8}  passes"]
    for line in lines:
        rows.append(
            f"{line.group:6} {line.name:{width}}  {'-':>8} {line.tokens_per_second:8.2f} "
            f"{line.speed_up:7.2f}x  {line.passes}"
        )
    return "\n".join(rows)


def run(groups: list[str], sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure, print the table and return a record per group for the JSON file."""
    records: dict[str, Any] = {}
    lines: list[Speed] = []
    for group in groups:
        before, start = machine(), time.perf_counter()
        measured = MEASURES[group](sizes, repeats)
        records[group] = {
            "machine": before | {"load_average_after": machine()["load_average"]},
            "seconds": round(time.perf_counter() - start, 1),
            "repeats": repeats,
            "sizes": dataclasses.asdict(sizes),
            "rows": [dataclasses.asdict(line) for line in measured],
        }
        lines += measured
        print(f"{group} done", file=sys.stderr, flush=True)
    print(format_table(lines))
    return records


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", default="", help="file for the record; groups in it that are not measured stay"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds per comparison")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, separated by commas")
    parser.add_argument("--prompt", type=int, default=Sizes.prompt, help="tokens of the prompt")
    parser.add_argument("--gen_len", type=int, default=Sizes.gen_len, help="tokens to write")
    given = parser.parse_args(arguments)
    groups = given.only.split(",")
    if any(g not in GROUPS for g in groups) or given.repeats < 1:
        parser.error(f"--only takes {', '.join(GROUPS)}; --repeats at least 1")
    sizes = sizes or Sizes(prompt=given.prompt, gen_len=given.gen_len)
    records = run(groups, sizes, given.repeats)
    if given.json:
        # Groups measured before and not now stay.
        file = Path(given.json)
        earlier = json.loads(file.read_text())["groups"] if file.is_file() else {}
        record = {"command": "python -m bench.block_decode", "groups": earlier | records}
        atomic_write_json(file, record)


if __name__ == "__main__":
    main()
