"""q*: a data set sampled from the geometric mixture of a current and a target language model.

    python -m qstar.main --config=configs/qstar.py
    python -m qstar.main --config=configs/qstar.py:tiny --config.run.output=runs/x.jsonl

The guide's flags (--model_theta, --model_t, --alpha_method, --dataset, --output, ...) are accepted
in place of the config keys they stand for. The same command run again continues where it stopped.
Started as several processes (srun -n N, or --coordinator, --num_processes, --process_id), each
makes its own part of the rows on its own accelerator, as with --config.run.shard=i/N.
Exit status: 0 done or stopped resumably, 2 bad usage or config, 3 done with failed rows.
"""

import os
import sys
from typing import NoReturn

from ml_collections import ConfigDict

from common import flags, log, startup
from common.errors import require

WHOLE = "0/1"  # of run.shard: all rows
MODES = ("generate",)
DEFAULT_CONFIG = "configs/qstar.py"


def main(argv: list[str]) -> int:
    """Checks the config and generates."""
    del argv
    config = flags.FLAGS.config
    log.quiet_libraries()
    share(config)
    if config.run.platform:
        os.environ["JAX_PLATFORMS"] = config.run.platform
    if config.backend != "jax":
        # PyTorch needs the GPU's memory too; JAX reads this when it first looks for devices.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from common import dist
    from qstar.defaults import finalize
    from qstar.generate import run_generation

    for warning in finalize(config):
        log.warning(warning)
    keep_compiled()
    # Processes of one command make parts of their own and need not know of each other.
    dist.initialize(startup.Start("single"))
    return run_generation(config)


def share(config: ConfigDict) -> None:
    """Gives this process its part of the rows, where it is one of several.

    Raises:
        UserError: the config names a part already, or the environment names no whole group.
    """
    how = startup.decide(address_of=lambda name: name)
    if how.num_processes == 1:
        return
    require(
        config.run.shard == WHOLE,
        f"run.shard={config.run.shard} names one part, but {how.num_processes} processes were "
        "started, which would all make it: leave run.shard out, or start one process",
    )
    config.run.shard = f"{how.process_id}/{how.num_processes}"
    startup.take_devices(how)


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache, unless JAX's own variable says where."""
    import jax

    from common.lm.source import cache_root

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_root().parent / "compiled"))


def start() -> NoReturn:
    """The command line."""
    from qstar.defaults import rename_guide_flags

    flags.define_flags(DEFAULT_CONFIG, MODES)
    sys.argv = rename_guide_flags(sys.argv)
    flags.run(main)


if __name__ == "__main__":
    start()
