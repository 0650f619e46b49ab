"""Episodic Steering Memory on a real small model: does steering help, and what does it cost?

    python -m bench.esm_real [--data problems|svamp] [--data_root DIR] [--work DIR] [--json FILE]

SmolLM2-135M-Instruct, mined on at least 96 questions with 8 rollouts each; layer and strength are
chosen on a dev part; every method then answers the same questions, none of them mined or tuned on.
The questions grow in steps, and the file is written after each, so a stopped run reports what it
reached; the same command continues.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from common import flags
from common.rundir import atomic_write_json
from esm.compare import bootstrap_interval, common_rows, mcnemar, paired_interval
from esm.defaults import finalize
from esm.evaluate import directory_name
from esm.library import read_mine_manifest
from esm.results import read_rows, summarize
from esm.runs import Run
from esm.stages import run_stage

CONFIG = "configs/esm_gsm8k_small.py"
METHODS = ("greedy", "esm", "static")
ABLATIONS = ("no_memory", "no_probing", "random_use_memory")
STEPS = (60, 120, 200, 300, 400)


class Setting(NamedTuple):
    """What differs between the data sets.

    Attributes:
        dataset: its name.
        template: of the prompt.
        max_tokens: of an answer.
        train, dev, evaluate: numbers of questions.
    """

    dataset: str
    template: str
    max_tokens: int
    train: int
    dev: int
    evaluate: int


SETTINGS = {
    "problems": Setting("problems", "problems_1shot", 64, 96, 48, 300),
    "svamp": Setting("svamp", "problems_1shot", 80, 96, 48, 300),
}


class Given(NamedTuple):
    """What the stages read of the command line."""

    workdir: str


def make_config(setting: Setting, data_root: str, count: int) -> ConfigDict:
    """The config of a data set with `count` evaluated questions."""
    c = flags.load_config(CONFIG)
    c.outputs.run_name = f"esm_real_{setting.dataset}"
    c.model.dtype = "float32"
    c.outputs.tensorboard = False
    c.task.dataset = setting.dataset
    c.task.data_root = data_root
    c.task.max_train_examples = setting.train
    c.task.max_dev_examples = setting.dev
    c.task.max_eval_examples = count
    c.prompt.template = setting.template
    c.decode.max_new_tokens = setting.max_tokens
    c.offline_mine.max_new_tokens = setting.max_tokens
    c.offline_mine.candidate_layers = (0.4, 0.7)
    c.tune.k_scales = (0.1, 0.4)
    c.eval.methods = METHODS
    c.eval.ablations = ABLATIONS
    finalize(c)
    return c


def measure(setting: Setting, data_root: str, work: Path, json_file: str) -> None:
    """Runs everything, writing the file whenever more questions are done."""
    for count in (*(n for n in STEPS if n < setting.evaluate), setting.evaluate):
        config = make_config(setting, data_root, count)
        run = run_stage(config, "all", Given(str(work / setting.dataset)))
        report = summarize_run(config, run, setting)
        if json_file:
            write_report(Path(json_file), setting.dataset, report)
        for row in report["methods"]:
            print({key: row[key] for key in ("method", "n", "acc", "acc_diff", "acc_diff_95")})


def summarize_run(config: ConfigDict, run: Run, setting: Setting) -> dict[str, Any]:
    """Every method beside greedy decoding, on the questions all of them answered."""
    names = [name for name in (*METHODS, *ABLATIONS)]
    rows = {name: read_rows(run.eval / directory_name(config, name)) for name in names}
    shared = set.intersection(*({row["example_id"] for row in found} for found in rows.values()))
    rows = {
        name: [row for row in found if row["example_id"] in shared] for name, found in rows.items()
    }
    manifest = read_mine_manifest(run)
    return {
        "model": manifest["model"]["name"],
        "template": setting.template,
        "max_new_tokens": setting.max_tokens,
        "mined_questions": len(manifest["mined"]),
        "rollouts_per_question": config.offline_mine.K,
        "mining": _read(run.mine / "rollouts.json"),
        "pairs": manifest["pairs"],
        "chosen_on_dev": {
            key: value for key, value in _read(run.tune / "chosen.json").items() if key != "dev"
        },
        "evaluated_questions": len(shared),
        "methods": [_method(name, rows, run, config) for name in names],
    }


def _method(
    name: str, rows: dict[str, list[dict[str, Any]]], run: Run, config: ConfigDict
) -> dict[str, Any]:
    found, pairs = rows[name], common_rows(rows["greedy"], rows[name])
    before = [bool(a["correct"]) for a, _ in pairs]
    after = [bool(b["correct"]) for _, b in pairs]
    summary = summarize(found, config.decode.max_new_tokens)
    timing = _read(run.eval / directory_name(config, name) / "timing.json")
    diff = [b["tokens_used"] - a["tokens_used"] for a, b in pairs]
    win = sum(b and not a for a, b in zip(before, after, strict=True))
    lose = sum(a and not b for a, b in zip(before, after, strict=True))
    steps = [step for row in found for step in row.get("steps", ()) if step.get("mem_m", 0) > 0]
    return {
        "method": name,
        "n": summary["n"],
        "acc": summary["acc"],
        "acc_95": [summary["acc_low"], summary["acc_high"]],
        "acc_diff": sum(after) / len(after) - sum(before) / len(before),
        "acc_diff_95": list(paired_interval(before, after, 2000)),
        "win": win,
        "lose": lose,
        "mcnemar_p": mcnemar(win, lose),
        "committed_tokens": summary["tokens_mean"],
        "committed_diff_95": list(bootstrap_interval(_floats(diff), 2000)),
        "probe_tokens": summary["probe_tokens_mean"],
        "prefill_tokens": summary["prefill_tokens_mean"],
        "reread_tokens": summary["reread_tokens_mean"],
        "forward_positions": summary["forward_positions_mean"],
        "steered_share": sum(s["chosen"] != "null" for s in steps) / len(steps) if steps else 0.0,
        "wall_s": timing["wall_s"],
    }


def write_report(path: Path, dataset: str, report: dict[str, Any]) -> None:
    """Adds a data set's report to the file."""
    content = _read(path) if path.is_file() else {}
    atomic_write_json(path, {**content, dataset: report})


def _floats(values: list[int]) -> Any:
    import numpy as np

    return np.asarray(values, np.float64)


def _read(path: Path) -> dict[str, Any]:
    import json

    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=sorted(SETTINGS), default="problems")
    parser.add_argument("--data_root", default="datasets")
    parser.add_argument("--work", default="outputs/esm_real")
    parser.add_argument("--json", default="")
    given = parser.parse_args()
    measure(SETTINGS[given.data], given.data_root, Path(given.work), given.json)


if __name__ == "__main__":
    main()
