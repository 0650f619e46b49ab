"""Speed of q* as ratios within one run.

    python -m qstar.bench                                       # minutes on two cores
    python -m qstar.bench --json results/qstar_speed.json
    python -m qstar.bench --only solve,step --sizes 8x32000,64x151936
    python -m qstar.bench --only decode,loop --model small --slots 4
    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python -m qstar.bench --clock cpu   # busy machine

Groups (`--only`):
  solve     alpha by every method over one logsumexp pass of both models' logits [B, V].
  original  20 halvings on clamped probabilities, compiled, over our solver.
  step      diagnostics, filters, draws, and all a decode step does with logits, over that pass.
  decode    whole decode steps over the bare forward passes of both models, same slots.
  loop      a generation by the engine over a plain transformers loop with eager bisection.

Rows of `solve` and `step` also tell microseconds per call and bytes per second (both arrays once),
as a share of what the logsumexp pass reaches. `alpha error` is the largest distance from a float64
solution where the models differ by at least 0.1 nats. `--clock cpu` counts processor time and gives
PyTorch one thread: with the flag above for JAX, ratios on a busy machine are those of one free
core. `later` = traces that the rounds added:
0 = nothing was compiled again.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from bench import Row, format_rows, machine
from bench.qstar_decode import MODELS, decode_rows, loop_rows
from bench.qstar_solvers import Clock, original_rows, solve_rows, step_rows
from common.rundir import atomic_write_json

Found = tuple[list[Row], dict[str, float]]
BY_SIZE: dict[str, Callable[[int, int, int, Clock], Found]] = {
    "solve": solve_rows,
    "original": original_rows,
    "step": step_rows,
}
BY_MODEL = {"decode": decode_rows, "loop": loop_rows}
GROUPS = (*BY_SIZE, *BY_MODEL)
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
SIZES = ((8, 50257), (8, 151936), (64, 50257))


def run(
    groups: list[str],
    sizes: list[tuple[int, int]],
    model: str,
    slots: int,
    repeats: int,
    clock: str,
) -> dict[str, Any]:
    """Measures, prints the table and returns everything for the JSON file."""
    before, start = machine(), time.perf_counter()
    rows: list[Row] = []
    errors: dict[str, float] = {}
    traffic: dict[str, dict[str, float]] = {}
    for group in groups:
        for table, found, size in measure(group, sizes, model, slots, repeats, CLOCKS[clock]):
            rows += table
            errors |= found
            for row in table:
                if group in ("solve", "step") and size is not None:
                    traffic[row.name] = throughput(row, *size)
                print(f"{row.name}: {row.ratio:.2f} {row.met}", file=sys.stderr, flush=True)
    print(format_rows(rows))
    for name, error in errors.items():
        print(f"alpha error, {name}: {error:.1e}")
    return {
        "command": "python -m qstar.bench",
        "machine": before | {"load_average_after": machine()["load_average"]},
        "seconds": round(time.perf_counter() - start, 1),
        "repeats": repeats,
        "sizes": sizes,
        "model": model,
        "slots": slots,
        "clock": clock,
        "alpha_error": errors,
        "throughput": traffic,
        "rows": [row.as_dict() for row in rows],
    }


def measure(
    group: str, sizes: list[tuple[int, int]], model: str, slots: int, repeats: int, clock: Clock
) -> list[tuple[list[Row], dict[str, float], tuple[int, int] | None]]:
    """Rows and alpha errors of a group, and the size they belong to."""
    if group in BY_MODEL:
        return [(BY_MODEL[group](MODELS[model], slots, repeats, clock), {}, None)]
    return [(*BY_SIZE[group](*size, repeats, clock), size) for size in sizes]


def throughput(row: Row, rows: int, width: int) -> dict[str, float]:
    """Time per call, and how fast both arrays [B, V] are read in it."""
    size = 2 * 4 * rows * width
    return {
        "microseconds": 1e6 * row.work,
        "bytes_per_second": size / row.work,
        "share_of_pass": row.floor / row.work,
    }


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "8x50257,64x50257" -> [(8, 50257), (64, 50257)].

    Raises:
        ValueError: if a part is not two positive numbers.
    """
    sizes = []
    for part in text.split(","):
        rows, width = (int(n) for n in part.split("x"))
        if rows < 1 or width < 2:
            raise ValueError(f"{part} is no size")
        sizes.append((rows, width))
    return sizes


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="", help="also write everything to this file")
    parser.add_argument("--repeats", type=int, default=21, help="rounds per comparison")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, separated by commas")
    default = ",".join(f"{rows}x{width}" for rows, width in SIZES)
    parser.add_argument("--sizes", default=default, help="rows x columns, separated by commas")
    parser.add_argument("--model", default="smollm2", help=f"sizes: {', '.join(MODELS)}")
    parser.add_argument("--slots", type=int, default=8, help="of the groups decode and loop")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="what is counted")
    given = parser.parse_args(arguments)
    groups = given.only.split(",")
    if set(groups) - set(GROUPS) or given.repeats < 1 or given.slots < 1:
        parser.error(f"--only takes {', '.join(GROUPS)}; --repeats and --slots at least 1")
    if given.model not in MODELS:
        parser.error(f"--model takes {', '.join(MODELS)}")
    try:
        sizes = parse_sizes(given.sizes)
    except ValueError:
        parser.error("--sizes takes pairs such as 8x50257,64x50257")
    if given.clock == "cpu" and set(groups) & set(BY_MODEL):
        import torch

        torch.set_num_threads(1)
    result = run(groups, sizes, given.model, given.slots, given.repeats, given.clock)
    if given.json:
        atomic_write_json(given.json, result)


if __name__ == "__main__":
    main()
