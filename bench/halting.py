"""Speed of the halting models as ratios to the bare model work, in one process.

    python -m bench.halting --json results/halting_speed.json
    python -m bench.halting --only loop,torch
    python -m bench.halting --clock cpu      # processor time: steadier on a machine with other work

Groups (`--only`) and what stands in the column `floor`:
  loop        loss, gradient and optimiser on one fixed batch, as many steps in one compiled loop.
              The work is an interval of the trainer's log (drawing data, metrics, metrics.jsonl,
              TensorBoard) and its share of a checkpoint at the configured cadence. "floor with
              average": the running average of the weights, which the config asks for, counts as
              part of the bare step.
  torch       optimiser steps per second of `plain_torch_halting`, as many threads as XLA takes; the
              work is the trainer's interval as above. ratio = ours / theirs.
  ut          the same blocks written plainly, all hops unrolled, without halting; with the faster
              of two attentions. The halting bias is such that every position takes all hops.
  evaluation  the same evaluation with every row taking the mean number of steps, by
              `fixed_steps` (interpolated between two whole numbers). A row's steps are those until
              its last position has halted. "whole batches" pay for the slowest row.
  compile     trace, lower and compile a training step, without any cache: the shortest, beside the
              longest. `traces` counts all of them.

Rates are so small that weights stay where they are, so all sides make equally many inner steps.
`compile s` counts the first calls of both sides; `traces` how often their Python was traced by
then, and `later` what the rounds added: 0 = nothing was compiled again.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from bench import CLOCKS, Row, Turns, format_rows, machine
from bench.halting_blocks import block_rows
from bench.halting_compile import compile_rows
from bench.halting_evaluation import evaluation_rows
from bench.halting_loops import loop_rows, torch_rows
from bench.halting_scenes import Sizes
from common import log
from common.rundir import atomic_write_json

MEASURES: dict[str, Callable[[Sizes, Turns], list[Row]]] = {
    "loop": loop_rows,
    "torch": torch_rows,
    "ut": block_rows,
    "evaluation": evaluation_rows,
    "compile": compile_rows,
}
GROUPS = tuple(MEASURES)


def run(groups: list[str], sizes: Sizes, repeats: int, clock: str) -> dict[str, Any]:
    """Measure, print the table and return everything for the JSON file.

    Args:
      groups: of GROUPS.
      sizes: of everything measured.
      repeats: rounds per comparison.
      clock: of CLOCKS.
    """
    from bench.plain_torch_halting import threads

    turns = Turns(repeats, clock)
    rows, measured = [], {}
    for group in groups:
        before, start = machine(), time.perf_counter()
        for row in MEASURES[group](sizes, turns):
            rows.append(row)
            print(f"{row.name}: {row.ratio:.2f} {row.met}", file=sys.stderr, flush=True)
        measured[group] = {
            "load_average": [before["load_average"], machine()["load_average"]],
            "seconds": round(time.perf_counter() - start, 1),
            "repeats": repeats,
            "clock": clock,
        }
    print(format_rows(rows))
    return {
        "command": "python -m bench.halting",
        "machine": machine(),
        "torch_threads": threads(),
        "groups": measured,
        "sizes": dataclasses.asdict(sizes),
        "rows": [row.as_dict() for row in rows],
    }


def kept(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new result with the groups of an older one of the same sizes that it lacks."""
    if old.get("sizes") != json.loads(json.dumps(new["sizes"])):
        return new
    groups = old["groups"] | new["groups"]
    rows = [row for row in old["rows"] if row["name"].split()[0] not in new["groups"]]
    rows = sorted([*rows, *new["rows"]], key=lambda row: GROUPS.index(row["name"].split()[0]))
    return new | {"groups": groups, "rows": rows}


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", default="", help="also write to this file; groups not measured stay"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds per comparison")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="what is counted")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, separated by commas")
    given = parser.parse_args(arguments)
    groups = given.only.split(",")
    unknown = [g for g in groups if g not in GROUPS]
    if unknown or given.repeats < 1:
        parser.error(f"--only takes {', '.join(GROUPS)}; --repeats at least 1")
    log.quiet_libraries()
    result = run(groups, sizes or Sizes(), given.repeats, given.clock)
    if given.json:
        if os.path.exists(given.json):
            with open(given.json) as file:
                result = kept(json.load(file), result)
        atomic_write_json(given.json, result)


if __name__ == "__main__":
    main()
