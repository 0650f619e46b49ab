"""Speed measurements: work beside its floor, in one process, as ratios.

Absolute times do not carry over between machines, and a busy machine drifts. So everything that is
compared takes turns: one call each per round, in alternating order, and a ratio is the median of
the rounds' ratios. Compile time is spent before and told apart.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

OK, MISSED, NO_BAR = "yes", "NO", ""


class TraceCounter:
    """Counts how often Python functions are traced: compiled calls leave the count alone."""

    def __init__(self) -> None:
        """Nothing traced so far."""
        self.count = 0

    def wrap(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """fn, counted whenever its Python body runs."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return fn(*args, **kwargs)

        return counted

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """fn, compiled and counted."""
        return jax.jit(self.wrap(fn))


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of things that took turns.

    Attributes:
      seconds: per name, one entry per round.
      compile_seconds: first calls of all of them together, compilation included.
      traces: (before the first round, added by the rounds); the latter should be 0.
    """

    seconds: Mapping[str, Sequence[float]]
    compile_seconds: float
    traces: tuple[int, int]

    def median(self, name: str) -> float:
        """Median seconds of one thing."""
        return statistics.median(self.seconds[name])

    def ratio(self, above: str, below: str) -> float:
        """Median over rounds of seconds[above] / seconds[below]."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return statistics.median(a / b for a, b in pairs)


def take_turns(
    things: Mapping[str, Callable[[], Any]],
    repeats: int,
    counter: TraceCounter | None = None,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time functions without arguments against each other.

    Args:
      things: by name; each returns arrays, which are waited for.
      repeats: rounds.
      counter: what to read the number of traces from.
      warm_up: calls of each before the first round.
      clock: what tells the seconds of the rounds.
    """
    counter = counter or TraceCounter()
    start = time.perf_counter()
    for thing in things.values():
        for _ in range(warm_up):
            jax.block_until_ready(thing())
    compile_seconds = time.perf_counter() - start
    warm = counter.count
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(repeats):
        names = list(things) if turn % 2 == 0 else list(things)[::-1]
        for name in names:
            begin = clock()
            jax.block_until_ready(things[name]())
            seconds[name].append(clock() - begin)
    return Timings(seconds, compile_seconds, (warm, counter.count - warm))


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True)
class Turns:
    """`take_turns` with the rounds and the clock of a command.

    Attributes:
      repeats: rounds.
      clock: of CLOCKS.
    """

    repeats: int
    clock: str = "wall"

    def __call__(
        self, things: Mapping[str, Callable[[], Any]], counter: TraceCounter | None = None
    ) -> Timings:
        """See `take_turns`."""
        return take_turns(things, self.repeats, counter, clock=CLOCKS[self.clock])

    def at_most(self, repeats: int) -> "Turns":
        """The same with no more rounds than this."""
        return dataclasses.replace(self, repeats=min(self.repeats, repeats))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      name: what was measured.
      work, floor: seconds, or rates when `unit` says so.
      ratio: the figure that the bar is for.
      bar: None = for information.
      at_least: the ratio has to reach the bar instead of staying below it.
      traces: see `Timings.traces`.
    """

    name: str
    work: float
    floor: float
    ratio: float
    bar: float | None = None
    at_least: bool = False
    unit: str = "s"
    compile_seconds: float = 0.0
    traces: tuple[int, int] = (0, 0)

    @property
    def met(self) -> str:
        """Whether the bar is met: "yes", "NO", or "" without a bar."""
        if self.bar is None:
            return NO_BAR
        good = self.ratio >= self.bar if self.at_least else self.ratio <= self.bar
        return OK if good else MISSED

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with `met`."""
        return dataclasses.asdict(self) | {"met": self.met}


def compare(
    name: str,
    timings: Timings,
    work: str,
    floor: str,
    bar: float | None = None,
) -> Row:
    """The row work / floor of two things that took turns; bar = the most it may be."""
    return Row(
        name,
        timings.median(work),
        timings.median(floor),
        timings.ratio(work, floor),
        bar,
        compile_seconds=timings.compile_seconds,
        traces=timings.traces,
    )


def rates(
    name: str,
    timings: Timings,
    base: tuple[str, int],
    other: tuple[str, int],
    bar: float | None = None,
) -> Row:
    """Items per second of `other` beside `base`; each is (name, items per call).

    bar = the least the ratio of the rates may be.
    """
    speed = {n: items / timings.median(n) for n, items in (base, other)}
    ratio = timings.ratio(base[0], other[0]) * other[1] / base[1]
    return Row(
        name,
        speed[other[0]],
        speed[base[0]],
        ratio,
        bar,
        at_least=True,
        unit="/s",
        compile_seconds=timings.compile_seconds,
        traces=timings.traces,
    )


def format_rows(rows: Sequence[Row]) -> str:
    """The table that is printed."""
    width = max(len(row.name) for row in rows)
    lines = [
        f"{'':{width}}  {'work':>10} {'floor':>10} {'ratio':>8} {'bar':>8} met"
        f" {'compile s':>9} {'traces':>7} {'later':>5}"
    ]
    for row in rows:
        bar = "" if row.bar is None else f"{'>=' if row.at_least else '<='} {row.bar:g}"
        lines.append(
            f"{row.name:{width}}  {row.work:8.3f} {row.unit:1.1} {row.floor:8.3f} {row.unit:1.1} "
            f"{row.ratio:8.2f} {bar:>8} {row.met:3} {row.compile_seconds:9.1f} "
            f"{row.traces[0]:7d} {row.traces[1]:5d}"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Versions and the machine's size and load, for the record."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
        **processor(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def processor(source: str = "/proc/cpuinfo") -> dict[str, Any]:
    """Model and bfloat16 instructions of the CPU, as far as the system tells.

    Ratios differ between processors, those in bfloat16 above all.
    """
    try:
        lines = Path(source).read_text().splitlines()
    except OSError:
        return {"cpu": platform.processor() or platform.machine(), "cpu_bfloat16": None}
    fields = dict(reversed([line.partition(":")[::2] for line in lines if ":" in line]))
    named = {name.strip(): value.strip() for name, value in fields.items()}
    flags = named.get("flags", named.get("Features", "")).split()
    bfloat16 = sorted({"amx_bf16", "avx512_bf16", "bf16"}.intersection(flags))
    return {"cpu": named.get("model name", platform.machine()), "cpu_bfloat16": bfloat16}
