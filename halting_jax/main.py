"""Adaptive computation time: train, evaluate and export halting models.

    python -m halting_jax.main --config=configs/halting_parity.py:cpu
    python -m halting_jax.main --config=configs/halting_maze_act.py:tiny --workdir=runs/x

Modes: train (default), eval (--checkpoint=RUN, its own config; overrides of `eval`, `data` and
`act.fixed_ponder_steps` count), export (--checkpoint=RUN --output=DIR, weights as safetensors).
The same command run again continues where it stopped.
Exit status: 0 done, 2 bad usage or config, 3 stopped but resumable.
"""

from ml_collections import config_flags

from common import dist, flags, log
from common.errors import UserError
from common.processes import is_main, on_main
from common.runs import discard_empty, find_or_create, sole_command

MODES = ("train", "eval", "export")


def main(argv: list[str]) -> int:
    """Check the config, find the run directory, and do what --mode says."""
    del argv
    from halting_jax.defaults import check_overrides, finalize

    given = flags.FLAGS
    log.quiet_libraries()
    overrides = config_flags.get_override_values(given["config"])
    if given.mode != "train":
        if not given.checkpoint:
            raise UserError(f"--mode={given.mode} needs --checkpoint=RUN, a run directory")
        if given.mode == "eval":
            dist.initialize()
            from halting_jax.loader import evaluate_run

            evaluate_run(given.checkpoint, overrides, given.output)
        elif is_main():  # work on files, for one process
            from halting_jax.loader import export_run

            print(export_run(given.checkpoint, given.output))
        return 0
    if given.checkpoint:
        raise UserError(
            "--checkpoint belongs to --mode=eval and export; to go on from another run set "
            "--config.train.resume=RUN"
        )
    config = given.config
    for warning in finalize(config):
        log.warning(warning)
    check_overrides(config, overrides)
    dist.initialize()
    where = config.logging
    resume = config.train.resume != "none"
    run = find_or_create(config, where.output_dir, where.exp_name, given.workdir, resume)

    def dump() -> None:
        flags.dump_config(config, run.config, given)

    with sole_command(run):
        log.info("run directory %s", run.path)
        try:
            from halting_jax.train import train

            # Written once the run is sure to start: a refused command leaves a run as it was.
            train(config, run, lambda: on_main(dump))
        except UserError:
            if not given.workdir:
                discard_empty(run)
            raise
    return 0


if __name__ == "__main__":
    flags.define_flags("configs/halting_parity.py", MODES)
    flags.run(main)
