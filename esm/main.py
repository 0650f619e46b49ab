"""Episodic Steering Memory: mine corrections, select a library, build the memory, steer answers.

    python -m esm.main --config=configs/esm_gsm8k_small.py --stage=all
    python -m esm.main --config=configs/esm_gsm8k_small.py:tiny --stage=all      # seconds
    python -m esm.main --config=configs/esm_gsm8k_small.py --stage=eval --run_id=latest

Stages: all (mine, tune where a grid is given, select, memory, eval), mine (or mine.rollouts and
mine.states), tune (choose layer and strength on the dev part), select, memory, eval, case (a few
questions: --example_ids=0,6), suite (many data sets), rescore (grade saved answers again),
postprocess (report.md). Every stage continues where it stopped when the command is run again.
The stage may also stand without a flag: `python -m esm.main mine --config=...`.
One process does it all: several (srun -n N) are refused; the suite starts one per GPU itself.
Exit status: 0 done, 1 a job of the suite failed, 2 bad usage or config, 3 stopped but resumable.
"""

import sys
from collections.abc import Sequence

from absl import flags as absl_flags
from ml_collections import ConfigDict

from common import flags, log, startup
from common.errors import UserError

STAGES = (
    "all",
    "mine",
    "mine.rollouts",
    "mine.states",
    "tune",
    "select",
    "memory",
    "eval",
    "case",
    "suite",
    "rescore",
    "postprocess",
)
DEFAULT_CONFIG = "configs/esm_gsm8k_small.py"
OTHER_FLAGS = ("checkpoint", "output", "run_dir", "sample")  # of the other mains


def define_own_flags(flag_values: absl_flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of this main, beside those all mains share."""
    flags.define_flags(DEFAULT_CONFIG, STAGES, flag_values, mode_flag="stage")
    text = {
        "run_id": "run directory under outputs/<run_name>; `latest` = the newest that fits",
        "example_ids": "case: ids of questions, separated by commas",
        "methods": "case: methods, separated by commas",
        "tag": "case: name of the output",
        "gpus": "suite: GPUs, separated by commas, one process each",
        "stages": "suite: stages, separated by commas",
    }
    for name, meaning in text.items():
        absl_flags.DEFINE_string(name, "", meaning, flag_values=flag_values)
    absl_flags.DEFINE_integer(
        "max_new_tokens", 0, "case: budget of an answer, 0 = the config's", flag_values=flag_values
    )


def translate(argv: Sequence[str]) -> list[str]:
    """Accepts the original's spelling: a bare stage, hyphens in flags, old config keys."""
    from esm.defaults import LEGACY_KEYS

    words = list(argv[:1])
    for position, word in enumerate(argv[1:], start=1):
        if word in STAGES and not argv[position - 1].startswith("--stage"):
            word = f"--stage={word}"
        elif word.startswith("--") and not word.startswith("--config"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        for old, new in LEGACY_KEYS.items():
            if word == f"--config.{old}" or word.startswith(f"--config.{old}="):
                word = word.replace(old, new, 1)
        words.append(word)
    return words


def main(argv: list[str]) -> int:
    """Checks the config, finds the run directory, and runs --stage."""
    del argv
    from esm.defaults import finalize

    given = flags.FLAGS
    log.quiet_libraries()
    startup.require_single(
        "esm.main", "spread data sets with --stage=suite --gpus=0,1,..., or configs as a job array"
    )
    config: ConfigDict = given.config
    for name in OTHER_FLAGS:
        if getattr(given, name):
            raise UserError(f"--{name} has no meaning here; --run_id or --workdir names a run")
    if given.limit:
        config.task.max_eval_examples = given.limit
    if given.run_id:
        config.outputs.run_id = given.run_id
    if given.max_new_tokens:
        config.decode.max_new_tokens = given.max_new_tokens
    if given.stage == "case":
        from esm.case import case_config

        config = case_config(config, given)
    for warning in finalize(config):
        log.warning(warning)
    if given.stage == "suite":
        from esm.suite import run_suite

        return run_suite(config, given)
    from esm.stages import run_stage

    run_stage(config, given.stage, given)
    return 0


if __name__ == "__main__":
    define_own_flags()
    sys.argv = translate(sys.argv)
    flags.run(main)
