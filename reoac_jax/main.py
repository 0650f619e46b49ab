"""REOAC: reinforcement learning of edit operators on a discrete-diffusion language model.

    python -m reoac_jax.main --config=configs/gsm8k.py
    python -m reoac_jax.main --config=configs/gsm8k.py:tiny --workdir=runs/x --config.seed=1

Modes: train (default), eval (--checkpoint=RUN), prep (write processed data), pretrain (train the
backbone from scratch), viz (--run_dir=RUN). The same command run again continues where it stopped.
Exit status: 0 done, 2 bad usage or config, 3 stopped but resumable.
"""

import sys
from collections.abc import Callable

from ml_collections import ConfigDict

from common import dist, flags, log
from common.errors import UserError
from common.processes import is_main, on_main
from common.rundir import RunDir
from common.runs import discard_empty, find_or_create, sole_command

MODES = ("train", "eval", "prep", "pretrain", "viz")


def main(argv: list[str]) -> int:
    """Check the config, find the run directory, and do what --mode says."""
    del argv
    from reoac_jax.defaults import finalize

    given = flags.FLAGS
    log.quiet_libraries()
    if given.mode in ("viz", "prep") and not is_main():
        return 0  # work on files, for one process
    if given.mode == "viz":
        from reoac_jax.viz import run_viz

        if not given.run_dir:
            raise UserError("--mode=viz needs --run_dir=RUN, the directory of a finished run")
        for path in run_viz(given.run_dir, given.sample, given.output):
            print(path)
        return 0
    config = given.config
    for warning in finalize(config):
        log.warning(warning)
    if given.limit:
        config.eval.limit = given.limit
    if given.mode == "prep":
        from reoac_jax.prep import run_prep

        for report in run_prep(config):
            print(
                f"{report.split}: {report.records} records, {report.dropped} rows dropped, from "
                f"{report.source} -> {report.path}"
            )
        return 0
    dist.initialize()
    if given.mode == "eval":
        from reoac_jax.evaluation_mode import evaluate_checkpoint

        evaluate_checkpoint(config, given.checkpoint, given.output)
        return 0
    if given.checkpoint:
        raise UserError("--checkpoint belongs to --mode=eval; to continue a run give its --workdir")
    name = config.logging.exp_name
    if given.mode == "pretrain" and not name.endswith("pretrain"):
        name = f"{name}_pretrain"
    run = find_or_create(
        config, config.logging.output_dir, name, given.workdir, config.checkpoint.resume
    )

    def dump() -> None:
        flags.dump_config(config, run.config, given)

    with sole_command(run):
        log.info("run directory %s", run.path)
        try:
            # Written once the run is sure to start: a refused command leaves a run as it was.
            _start(given.mode, config, run, lambda: on_main(dump))
        except UserError:
            if not given.workdir:
                discard_empty(run)
            raise
    return 0


def _start(mode: str, config: ConfigDict, run: RunDir, on_start: Callable[[], None]) -> None:
    import jax

    log.info("jax %s on %s", jax.__version__, ", ".join(str(d) for d in jax.devices()))
    if mode == "pretrain":
        from reoac_jax.pretrain import pretrain

        pretrain(config, run, on_start)
    else:
        from reoac_jax.train import train

        train(config, run, on_start)


if __name__ == "__main__":
    flags.define_flags("configs/gsm8k.py", MODES)
    # ConfigDict.update is a method, so the section of the original's name is `updates` here.
    sys.argv = [a.replace("--config.update.", "--config.updates.", 1) for a in sys.argv]
    flags.run(main)
