"""Speed of the greedy determinantal selection against a plain NumPy greedy.

    python -m bench.esm_dpp [--sizes 512x1024x64,2048x1024x256] [--stride 1] [--json FILE]

The plain greedy keeps the Cholesky factor of the chosen set and, at every pick, works out every
candidate's determinant ratio with one triangular solve: what is written down first. With a stride
only every n-th pick is measured and the time of the others is interpolated between them; its picks
are compared with ours wherever it is measured.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.linalg import solve_triangular

from bench import Row, TraceCounter, format_rows, machine, take_turns
from common.rundir import atomic_write_json
from esm.core.dpp import dpp_greedy

BAR = 50.0
DIVERSITY, EPSILON = 0.5, 1e-4


def make_pool(count: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys like hidden states (a large common part) and nearly constant qualities, float64."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(count, width)) + 4.0 * rng.normal(size=width)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return keys, rng.uniform(0.99, 1.01, count)


def plain_pick(
    keys: np.ndarray, quality: np.ndarray, chosen: Sequence[int], factor: np.ndarray
) -> int:
    """The next pick, candidate by candidate.

    Args:
        keys: [N, H] unit.
        quality: [N].
        chosen: t picks so far.
        factor: [t, t] Cholesky factor of their kernel.
    """
    best, best_gain = -1, float("-inf")
    own = keys[chosen]
    taken = set(chosen)
    for i in range(len(keys)):
        if i in taken:
            continue
        residual = 1.0 + EPSILON
        if len(chosen):
            y = solve_triangular(factor, own @ keys[i], lower=True, check_finite=False)
            residual -= float(y @ y)
        if residual <= 1e-12:
            continue
        gain = float(np.log1p(max(quality[i], 0.0)) + DIVERSITY * np.log(residual))
        if gain > best_gain:
            best, best_gain = i, gain
    return best


def time_plain(
    keys: np.ndarray, quality: np.ndarray, picks: Sequence[int], stride: int
) -> tuple[float, int]:
    """Seconds of the plain greedy, and at how many measured picks it chose otherwise."""
    steps = sorted({*range(0, len(picks), stride), len(picks) - 1})
    seconds, wrong = [], 0
    for step in steps:
        chosen = list(picks[:step])
        kernel = keys[chosen] @ keys[chosen].T
        np.fill_diagonal(kernel, 1.0 + EPSILON)
        factor = np.linalg.cholesky(kernel) if step else kernel
        start = time.perf_counter()
        found = plain_pick(keys, quality, chosen, factor)
        seconds.append(time.perf_counter() - start)
        wrong += found != picks[step]
    every = np.interp(np.arange(len(picks)), steps, seconds)
    return float(every.sum()), wrong


def measure(
    count: int, width: int, size: int, stride: int, repeats: int
) -> tuple[Row, dict[str, Any]]:
    """One size: ours in double precision (as the stage select runs it) and in single."""
    keys, quality = make_pool(count, width)
    counter = TraceCounter()
    pick = counter.jit(lambda k, q, valid: dpp_greedy(k, q, valid, size, DIVERSITY, EPSILON))

    def run(dtype: type) -> Any:
        with jax.enable_x64(dtype is np.float64):
            return pick(keys.astype(dtype), quality.astype(dtype), np.ones(count, bool))

    things = {"double": lambda: run(np.float64), "single": lambda: run(np.float32)}
    timings = take_turns(things, repeats, counter)
    double = np.asarray(run(np.float64).entry).tolist()
    single = np.asarray(run(np.float32).entry).tolist()
    plain, wrong = time_plain(keys, quality, double, stride)
    ours = timings.median("double")
    row = Row(
        f"greedy selection N={count} d={width} B={size}",
        ours,
        plain,
        plain / ours,
        BAR if count >= 2048 else None,
        at_least=True,
        compile_seconds=timings.compile_seconds,
        traces=timings.traces,
    )
    note = {
        "single_precision_s": timings.median("single"),
        "single_equals_double": single == double,
        "plain_other_picks": wrong,
        "plain_measured_every": stride,
    }
    return row, note


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; status 1 if the bar is missed or picks differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default="512x1024x64,2048x1024x256")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="", help="file to write")
    options = parser.parse_args(arguments)
    rows, notes = [], {}
    for text in options.sizes.split(","):
        count, width, size = (int(part) for part in text.split("x"))
        row, note = measure(count, width, size, options.stride, options.repeats)
        rows.append(row)
        notes[row.name] = note
    print("work = ours, floor = plain NumPy, ratio = plain / ours")
    print(format_rows(rows))
    for name, note in notes.items():
        print(name, note)
    if options.json:
        table = [row.as_dict() | notes[row.name] for row in rows]
        atomic_write_json(Path(options.json), {"machine": machine(), "rows": table})
    bad = any(row.met == "NO" for row in rows) or any(
        n["plain_other_picks"] for n in notes.values()
    )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
