"""Which questions are mined, tuned on and evaluated.

The dev part stands behind the mined one, and the evaluated part behind both, wherever their splits
coincide; the original took the first rows for everything.
"""

import zlib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from esm.datasets import Part, Parts, TaskExample, load_examples, plan_parts


def planned_parts(config: ConfigDict) -> Parts:
    """Splits, offsets and sizes of the three parts.

    Raises:
        UserError: a part would have no rows left.
    """
    task = config.task
    return plan_parts(
        task.dataset,
        Part(task.train_split, task.train_offset, task.max_train_examples),
        Part(task.dev_split, task.dev_offset, task.max_dev_examples),
        Part(task.eval_split, task.eval_offset, task.max_eval_examples),
        use_dev=bool(config.tune.k_scales),
    )


def train_examples(config: ConfigDict) -> list[TaskExample]:
    """The questions to mine."""
    return _load(config, planned_parts(config).train)


def dev_examples(config: ConfigDict) -> list[TaskExample]:
    """The questions on which settings are chosen."""
    return _load(config, planned_parts(config).dev)


def eval_examples(config: ConfigDict) -> list[TaskExample]:
    """The questions to report on."""
    return _load(config, planned_parts(config).eval)


def row_of(example: TaskExample, sample: int = 0) -> int:
    """Identity of the random draws of a question's sample: stable, whatever else is asked."""
    return zlib.crc32(f"{example.key}/{sample}".encode()) & 0x7FFFFFFF


def identities(examples: Iterable[TaskExample]) -> list[str]:
    """What a manifest keeps of the questions that were used."""
    return [example.key for example in examples]


def _load(config: ConfigDict, part: Any) -> list[TaskExample]:
    return load_examples(
        config.task.dataset,
        part.split,
        config.task.data_root,
        offset=part.offset,
        limit=part.limit,
        split_seed=config.task.split_seed,
        seed=config.seed,
    )
