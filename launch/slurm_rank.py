"""One rank of a SLURM step: runs the command, passes signals on, and reports how it ended.

    python -m launch.slurm_rank COMMAND [ARGUMENTS]            (called by launch.slurm)

A run that was stopped ends with status 3 on every rank. Under `--kill-on-bad-exit` the first of
them would kill the others, so the main rank writes the 3 down and all of them end with 0.
"""

import os
import sys
from pathlib import Path

from launch.ranks import INTERRUPTED, Rank, run_all

STATUS_FILE = "LAUNCH_STATUS_FILE"  # set by launch.slurm


def main(command: list[str]) -> int:
    """Runs the command and returns the status that srun sees."""
    number = int(os.environ.get("SLURM_PROCID") or 0)
    status = run_all([Rank(number, "", {}, tuple(command))])
    told = os.environ.get(STATUS_FILE)
    if told and number == 0 and status in (0, INTERRUPTED):
        Path(told).write_text(str(status))
    return 0 if status == INTERRUPTED and told else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
