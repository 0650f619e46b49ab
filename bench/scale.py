"""On paper: memory, time and traffic of the E2D2-GSM8K 2B loop on 1 to 1024 GPUs.

    python -m bench.scale [--config=configs/gsm8k.py:e2d2_gsm8k] [--rows=8]

Every number follows from the config, the network's shapes and the constants below; nothing is
measured. One iteration = roll out `rows` episodes per device (T passes each), then `backbone_steps`
full-buffer passes of the paper's update, weights and moments cut by `parallel.fsdp`.
"""

import argparse
import dataclasses
from typing import Any

import numpy as np

from common.flags import load_config
from common.fsdp import shard_axis
from reoac_jax.backbone.e2d2 import E2D2Config, parameter_shapes
from reoac_jax.backbone.e2d2_config import BASE_CONFIGS

GB = 1e9
PEAK = 990e12  # bf16 FLOP/s of an H100 SXM, dense
UTILISATION = 0.4  # of the peak, what well-batched transformers reach
MEMORY_RATE = 3.35e12  # bytes/s of its memory
LINK_NODE = 450e9  # bytes/s per direction between the 8 GPUs of a node
LINK_FABRIC = 50e9  # bytes/s per direction and GPU between nodes (400 Gbit/s)
PER_NODE = 8
HOP = 10e-6  # seconds per hop of a ring
ACTIVATION_VALUES = 34  # per token, layer and unit of width kept for the backward pass


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a number of devices gives; bytes and seconds per device."""

    devices: int
    stored: float
    transient: float
    activations: float
    rollout_s: float
    update_s: float
    exchange_s: float
    traffic: float
    tokens_per_s: float

    @property
    def memory(self) -> float:
        """Highest use at any moment."""
        return self.stored + self.transient + self.activations


def network() -> E2D2Config:
    """The released 2B network: Qwen3-1.7B, decoder = its top 14 layers, weights shared."""
    base = BASE_CONFIGS["Qwen3-1.7B"]
    return E2D2Config(
        vocab_size=base["vocab_size"],
        mask_id=base["vocab_size"] - 1,
        hidden_size=base["hidden_size"],
        intermediate_size=base["intermediate_size"],
        num_encoder_layers=28,
        num_decoder_layers=14,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        block_size=4,
        length=768,
        share_kv=True,
        tie_encoder_decoder=True,
        kv_layers=tuple(range(14, 28)),
        dtype="bfloat16",
    )


def shapes_of(tree: Any) -> list[tuple[int, ...]]:
    """All shapes of a nested dictionary."""
    if isinstance(tree, dict):
        return [shape for value in tree.values() for shape in shapes_of(value)]
    return [tree]


def plan(config: Any, devices: int, rows: int) -> Plan:
    """The numbers for a number of devices.

    Args:
        config: tree of the run.
        devices: N.
        rows: episodes per device and iteration.
    """
    net = network()
    shapes = shapes_of(parameter_shapes(net))
    sizes = [float(np.prod(shape)) for shape in shapes]
    params = sum(sizes)
    share = sum(
        n / devices if shard_axis(s, devices) >= 0 else n
        for n, s in zip(sizes, shapes, strict=True)
    )
    layer = sum(
        float(np.prod(s)) / net.num_encoder_layers
        for s in shapes_of(parameter_shapes(net)["encoder"]["layers"])
    )
    prompt, canvas, horizon = (
        config.backbone.max_length,
        config.rollout.gen_len,
        (config.rollout.max_steps),
    )
    length = prompt + canvas
    head = float(net.vocab_size * net.hidden_size)
    encode = 2 * layer * net.num_encoder_layers * length
    decode = 2 * layer * net.num_decoder_layers * length
    forward = encode + decode + 2 * head * canvas  # FLOP of one pass over one row

    weights = 4 * params  # float32
    # Parameters and both moments stay; whole parameters, their bf16 cast, the gradient that is
    # added up and the one that is being added come and go.
    stored, transient = 3 * 4 * share, weights + weights / 2 + 2 * weights
    micro = config.updates.backbone_batch
    layers = net.num_encoder_layers + net.num_decoder_layers
    activations = 2 * ACTIVATION_VALUES * net.hidden_size * layers * micro * length
    activations += 3 * 4 * micro * canvas * net.vocab_size
    if devices == 1:
        transient -= weights  # nothing is gathered

    rate = PEAK * UTILISATION
    step = max(rows * forward / rate, weights / MEMORY_RATE)
    rollout_s = horizon * step
    episodes = rows * devices
    buffered = max(config.buffer_size, episodes)
    # A pass writes at least one of G positions or is skipped by the update.
    useful = buffered * min(canvas, horizon)
    update_s = config.updates.backbone_steps * useful / devices * 3 * forward / rate
    per_pass = 2 * weights * (devices - 1) / devices  # gather parameters, reduce-scatter gradients
    traffic = (config.updates.backbone_steps + 0.5) * per_pass  # the rollout gathers once
    link = LINK_NODE if devices <= PER_NODE else LINK_FABRIC
    hops = 2 * len(shapes) * devices * HOP if devices > 1 else 0.0
    exchange_s = traffic / link + hops
    seconds = rollout_s + update_s + exchange_s
    return Plan(
        devices,
        stored,
        transient,
        activations,
        rollout_s,
        update_s,
        exchange_s,
        traffic,
        episodes * canvas / seconds,
    )


def table(plans: list[Plan]) -> str:
    """One line per number of devices."""
    lines = [
        "| GPUs | stored | + gathered | + activations | rollout | update | exchange "
        "| sent per GPU and iteration | canvas tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        lines.append(
            f"| {p.devices} | {p.stored / GB:.1f} GB | {p.transient / GB:.1f} GB "
            f"| {p.activations / GB:.1f} GB = {p.memory / GB:.0f} GB | {p.rollout_s:.0f} s "
            f"| {p.update_s:.0f} s | {p.exchange_s:.2f} s | {p.traffic / GB:.1f} GB "
            f"| {p.tokens_per_s:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/gsm8k.py:e2d2_gsm8k")
    parser.add_argument("--rows", type=int, default=8, help="episodes per device and iteration")
    parser.add_argument("--devices", default="1,8,64,1024")
    given = parser.parse_args()
    config = load_config(given.config)
    params = sum(float(np.prod(s)) for s in shapes_of(parameter_shapes(network())))
    print(f"{params / 1e9:.3f}e9 parameters, {given.rows} episodes per device and iteration\n")
    counts = [int(n) for n in given.devices.split(",")]
    print(table([plan(config, n, given.rows) for n in counts]))


if __name__ == "__main__":
    main()
