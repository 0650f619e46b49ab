"""Learning of the halting models: every claim is a run of the ordinary command, seed by seed.

    python -m bench.halting_learning --json results/halting_learning.json --plot FILE --lengths FILE
    python -m bench.halting_learning --only parity8,logic --runs runs/halting_learning

A finished run is not repeated, so the command goes on where it was stopped; with --json, figures of
other claims and seeds that stand in the file already are kept. Each run is
`python -m halting_jax.main --config=CONFIG --config.seed=SEED` in a process of its own; the figures
are those of its final test, with the averaged weights where the config keeps them.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from bench import machine
from common.rundir import atomic_write_json
from common.statistics import wilson_interval
from halting_jax.active_keys import inactive_reason
from halting_jax.defaults import get_default_config

# Sections of the config that decide what is learnt.
RECIPE = ("task", "model", "act", "ut", "trm", "data", "optim", "train")
SEEDS = 3  # that a claim is judged by
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Claim:
    """One line of the table.

    Attributes:
      config: file and variant; overrides: further arguments.
      set_name, metric: what counts; difficulty accuracies come with every set.
      bar: what the metric should reach; None = for information.
    """

    config: str
    set_name: str
    metric: str
    bar: float | None = None
    overrides: tuple[str, ...] = ()


CLAIMS = {
    "parity8": Claim("configs/halting_parity.py:bits8", "id", "accuracy", 0.999),
    "parity16": Claim("configs/halting_parity.py:cpu", "id", "accuracy", 0.99),
    "parity8_random": Claim("configs/halting_parity.py:random8", "id", "accuracy", 0.999),
    **{
        f"parity8_tau{tau}": Claim(
            "configs/halting_parity.py:bits8",
            "id",
            "accuracy",
            overrides=(f"--config.act.time_penalty={tau}", "--config.train.max_steps=5000"),
        )
        for tau in ("0", "0.001", "0.01", "0.1", "1")
    },
    "parity8_pondernet": Claim("configs/halting_parity.py:ponder8", "id", "accuracy"),
    "addition": Claim("configs/halting_addition.py:cpu", "id", "accuracy_sequence", 0.95),
    **{
        f"addition_tau{tau}": Claim(
            "configs/halting_addition.py:cpu",
            "id",
            "accuracy_sequence",
            overrides=(f"--config.act.time_penalty={tau}",),
        )
        for tau in ("0", "0.1")
    },
    "logic": Claim("configs/halting_logic.py:cpu", "id", "accuracy", 0.99),
    "logic_short": Claim(
        "configs/halting_logic.py:cpu",
        "id",
        "accuracy",
        overrides=("--config.train.max_steps=80000",),
    ),
    "sort": Claim("configs/halting_sort.py:cpu", "id", "sequence_accuracy"),
    "string_addition": Claim("configs/halting_copy.py:add", "id", "sequence_accuracy"),
    # Trained on 1 to 8 symbols, tested on 1 to 16: first with every sequence at position 0, then at
    # random positions, so that those of longer sequences are known from training.
    **{
        f"{task}{name}": Claim(
            f"configs/halting_copy.py:{variant}", "ood", "sequence_accuracy", overrides=overrides
        )
        for task, variant in (("copy", "cpu"), ("reverse", "reverse"))
        for name, overrides in (
            ("", ()),
            ("_offset", ("--config.task.position_offset=-1",)),
        )
    },
    "maze6": Claim("configs/halting_maze_ut.py:cpu", "test", "acc", 0.5),
    "maze10_ut": Claim("configs/halting_maze_ut.py:perfect10", "test", "acc", 0.9),
    "maze10_trm": Claim("configs/halting_maze_ut.py:trm10", "test", "acc", 0.9),
}


def command(claim: Claim, seed: int, workdir: Path) -> list[str]:
    """The run of a claim."""
    return [
        sys.executable,
        "-m",
        "halting_jax.main",
        f"--config={claim.config}",
        f"--config.seed={seed}",
        f"--workdir={workdir}",
        *claim.overrides,
    ]


def run_all(jobs: list[tuple[list[str], Path]], at_once: int, threads: int) -> None:
    """Runs commands side by side; stops at the first that fails."""
    flags = os.environ.get("XLA_FLAGS", "")
    if threads == 1:
        # Small products gain nothing from a second thread, and two runs would fight over it.
        flags += " --xla_cpu_multi_thread_eigen=false"
    env = {**os.environ, "XLA_FLAGS": flags.strip()}
    waiting, running = list(jobs), dict[Path, Any]()
    while waiting or running:
        while waiting and len(running) < at_once:
            words, workdir = waiting.pop(0)
            workdir.mkdir(parents=True, exist_ok=True)
            with open(workdir / "log.txt", "a") as file:
                running[workdir] = subprocess.Popen(
                    words, cwd=REPOSITORY, env=env, stdout=file, stderr=subprocess.STDOUT
                )
            print(f"started {workdir.name}", flush=True)
        for workdir, process in list(running.items()):
            try:
                status = process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            del running[workdir]
            print(f"finished {workdir.name} with status {status}", flush=True)
            if status:
                for other in running.values():
                    other.terminate()
                raise SystemExit(f"{workdir / 'log.txt'}: the run failed (status {status})")


def read_run(claim: Claim, workdir: Path) -> dict[str, Any] | None:
    """Figures of a finished run, None for one that is not."""
    if not (workdir / "DONE").is_file():
        return None
    report = json.loads((workdir / "eval.json").read_text())
    row = report["sets"][claim.set_name]
    grid = claim.set_name == "test" and "test_acc" in row
    prefix = f"{claim.set_name}_" if grid else f"test/{claim.set_name}/"
    averaged = f"{prefix}{claim.metric}_ema"
    suffix = "_ema" if averaged in row else ""
    groups = report["by_difficulty"][claim.set_name]
    count = sum(group["n"] for group in groups)
    result = {
        "value": row[f"{prefix}{claim.metric}{suffix}"],
        "n": count,
        "training_seconds": round(report["seconds"], 1),
        "steps": report["step"],
        "by_difficulty": groups,
        "metrics": {k.removeprefix(prefix): v for k, v in row.items()},
    }
    result["recipe"] = recipe(workdir)
    result["interval"] = wilson_interval(round(result["value"] * count), count)
    steps = [name for name in ("steps", "ponder_steps") if f"{prefix}{name}{suffix}" in row]
    result["ponder"] = row[f"{prefix}{steps[0]}{suffix}"] if steps else None
    return result


def recipe(workdir: Path) -> str:
    """Short digest of what a run learns from; runs of one recipe differ in their seed alone.

    Keys that do nothing for the run's task and model are left out, and a run older than a key has
    its default, so new keys change no digest.
    """
    saved = json.loads((workdir / "config_resolved.json").read_text())["config"]
    config = get_default_config()
    config.update(ConfigDict(saved))
    flat = flatten_dict({name: config[name].to_dict() for name in RECIPE}, sep=".")
    chosen = {key: value for key, value in flat.items() if not inactive_reason(config, key)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Claims of a file with new ones put in, in the order of the table.

    Seeds of a claim are kept where they were trained by the recipe of its new ones.
    """
    claims = old | new
    for name in old.keys() & new.keys():
        found = new[name]["seeds"]
        recipes = {run["recipe"] for run in found.values()}
        kept = {s: r for s, r in old[name]["seeds"].items() if {r.get("recipe")} == recipes}
        seeds = dict(sorted((kept | found).items()))
        claims[name] = new[name] | {"seeds": seeds, "met": is_met(new[name]["bar"], seeds)}
    return {name: claims[name] for name in CLAIMS if name in claims}


def is_met(bar: float | None, seeds: dict[str, Any]) -> bool | None:
    """Whether every seed reaches the bar; None while too few have run, or without a bar."""
    if bar is None:
        return None
    reached = all(run["value"] >= bar for run in seeds.values())
    return None if reached and len(seeds) < SEEDS else reached


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default=",".join(CLAIMS), help="claims, by comma")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "halting_learning")
    parser.add_argument("--at_once", type=int, default=2, help="runs side by side")
    parser.add_argument("--report", action="store_true", help="start nothing, use finished runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG or PDF: ponder steps by difficulty and tau")
    parser.add_argument("--lengths", type=Path, help="PNG or PDF: accuracy beyond trained lengths")
    given = parser.parse_args(argv)
    chosen = given.only.split(",")
    unknown = [name for name in chosen if name not in CLAIMS]
    if unknown:
        parser.error(f"unknown claim {unknown[0]}; choose from {', '.join(CLAIMS)}")
    places = {
        (name, seed): given.runs / f"{name}_seed{seed}"
        for name in chosen
        for seed in range(given.seeds)
    }
    if not given.report:
        jobs = [
            (command(CLAIMS[name], seed, place), place)
            for (name, seed), place in places.items()
            if not (place / "DONE").exists()
        ]
        run_all(jobs, given.at_once, threads=1 if given.at_once > 1 else 0)
    claims: dict[str, Any] = {}
    for name in chosen:
        claim = CLAIMS[name]
        runs = {s: read_run(claim, places[name, s]) for s in range(given.seeds)}
        found = {str(seed): run for seed, run in runs.items() if run is not None}
        if found:
            words = ["python", *command(claim, 0, Path("RUN"))[1:]]
            claims[name] = {
                **dataclasses.asdict(claim),
                "command": " ".join(words).replace("--config.seed=0", "--config.seed=SEED"),
                "seeds": found,
                "met": is_met(claim.bar, found),
            }
    if given.json and given.json.is_file():
        claims = merged(json.loads(given.json.read_text())["claims"], claims)
    print(format_claims(claims))
    if given.plot:
        plot_ponder(claims, given.plot)
    if given.lengths:
        plot_lengths(claims, given.lengths)
    if given.json:
        atomic_write_json(given.json, {"machine": machine(), "claims": claims})
    return 0


def plot_ponder(claims: dict[str, Any], path: Path) -> None:
    """Draws ponder steps over difficulty per claim, and over the time penalty for parity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    swept = any("_tau" in name for name in claims)
    figure, axes = plt.subplots(
        1, 2 if swept else 1, figsize=(11 if swept else 6, 4), layout="constrained", squeeze=False
    )
    left = axes[0, 0]
    penalties: dict[str, dict[float, list[float]]] = {}
    # Runs about lengths have a figure of their own.
    shown = {name: claim for name, claim in claims.items() if claim["set_name"] != "ood"}
    drawn = [name for name in shown if "_tau" not in name]
    for name, claim in shown.items():
        runs = claim["seeds"].values()
        if "_tau" in name:
            task, _, tau = name.partition("_tau")
            penalties.setdefault(task, {})[float(tau)] = [run["ponder"] for run in runs]
            continue
        for number, run in enumerate(runs):
            groups = run["by_difficulty"]
            middle = [(g["low"] + g["high"]) / 2 for g in groups]
            steps = [g["steps"] for g in groups]
            place = drawn.index(name)
            left.plot(
                middle,
                steps,
                marker="o",
                markersize=3,
                color=f"C{place % 10}",
                linestyle="-" if place < 10 else "--",
                label=name if number == 0 else None,
            )
    left.set(xlabel="difficulty (bits, digits, gates, items, moves)", ylabel="mean ponder steps")
    if drawn:
        left.legend(fontsize=8)
    if swept:
        right = axes[0, 1]
        usual = get_default_config().act.time_penalty
        for task in penalties.keys() & claims.keys():  # the claim itself has the usual penalty
            own = [run["ponder"] for run in claims[task]["seeds"].values()]
            penalties[task].setdefault(usual, own)
        order = sorted({tau for taus in penalties.values() for tau in taus})
        for number, (task, taus) in enumerate(penalties.items()):
            for value, seeds in taus.items():
                right.plot([order.index(value)] * len(seeds), seeds, "o", color=f"C{number}")
            middle = [(order.index(t), sum(taus[t]) / len(taus[t])) for t in sorted(taus)]
            right.plot(*zip(*middle, strict=True), color=f"C{number}", label=task)
        right.set_xticks(range(len(order)), [f"{tau:g}" for tau in order])
        right.set(xlabel="time penalty tau", ylabel="mean ponder steps")
        right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_lengths(claims: dict[str, Any], path: Path) -> None:
    """Draws accuracy over length for the claims whose test goes beyond the trained lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    shown = [name for name, claim in claims.items() if claim["set_name"] == "ood"]
    for place, name in enumerate(shown):
        for number, run in enumerate(claims[name]["seeds"].values()):
            groups = run["by_difficulty"]
            axes.plot(
                [(g["low"] + g["high"]) / 2 for g in groups],
                [100 * g["accuracy"] for g in groups],
                marker="o",
                markersize=3,
                color=f"C{place}",
                label=name if number == 0 else None,
            )
    axes.set(xlabel="symbols", ylabel="sequences that are right, %")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def format_claims(claims: dict[str, Any]) -> str:
    """One line per run."""
    lines = [
        f"{'claim':<18}{'seed':>5} {'metric':>20} {'value':>8} {'95 % interval':>18} "
        f"{'ponder':>7} {'minutes':>8} {'bar':>6}"
    ]
    lines.append("-" * len(lines[0]))
    for name, claim in claims.items():
        for seed, run in claim["seeds"].items():
            low, high = run["interval"]
            bar = "" if claim["bar"] is None else f"{claim['bar']:.3f}"
            lines.append(
                f"{name:<18}{seed:>5} {claim['metric']:>20} {run['value']:>8.4f} "
                f"{f'{low:.4f} to {high:.4f}':>18} {run['ponder']:>7.2f} "
                f"{run['training_seconds'] / 60:>8.1f} {bar:>6}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
