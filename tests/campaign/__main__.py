"""A campaign of random faults: every main, every fault, the same command again, equal outputs.

    python -m tests.campaign --minutes 10 --seed 0
    python -m tests.campaign --minutes 10 --mains reoac,halting --json table.json

Each trial takes a fresh directory, disturbs a run one to three times, runs the same command until
it is done, and compares everything the run leaves with an undisturbed run: records (none twice,
none missing), arrays bit for bit, reports. Whatever a main started must end when it ends: the
column `orphans` counts processes that carried on. Ends with a table and status 0 if nothing was
lost.
"""

import argparse
import sys
from pathlib import Path

from common.rundir import atomic_write_json
from tests.campaign.faults import FAULTS
from tests.campaign.mains import mains
from tests.campaign.trials import Campaign


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mains", default="", help="names separated by commas; default: all")
    parser.add_argument(
        "--keep", type=Path, help="directory for the runs; default: a temporary one"
    )
    parser.add_argument("--json", type=Path, help="write the table into this file")
    parser.add_argument("--faults", default=",".join(FAULTS), help="separated by commas")
    given = parser.parse_args()
    chosen = mains()
    for name in filter(None, given.mains.split(",")):
        if name not in chosen:
            parser.error(f"no main {name}; there are {', '.join(chosen)}")
    if given.mains:
        chosen = {name: chosen[name] for name in given.mains.split(",")}
    wanted = given.faults.split(",")
    if unknown := [fault for fault in wanted if fault not in FAULTS]:
        parser.error(f"no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    campaign = Campaign(chosen, given.seed, given.keep, wanted)

    def save() -> None:
        if given.json:
            atomic_write_json(given.json, campaign.report())

    try:
        campaign.run(given.minutes * 60, after=save)
    finally:
        # An interrupted campaign says what it saw.
        print(campaign.table())
        save()
    return 0 if campaign.lost == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
