"""What decides a run's results, as the manifest keeps and compares it."""

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax

from qstar.adapters import DatasetAdapter
from qstar.system import System
from qstar.writer import VERSION, semantic_config

ALPHA_CONVENTION = "weight_of_theta"


def manifest_of(system: System, styles: Mapping[str, str], fingerprint: str) -> dict[str, Any]:
    """Everything that must agree when a run is continued.

    Args:
        system: the pair of models.
        styles: prompt style by role, as settled.
        fingerprint: of the data set.
    """
    config = json.loads(system.config.to_json_best_effort())
    decoding = dataclasses.asdict(system.decoding)
    return {
        "version": VERSION,
        "alpha_convention": ALPHA_CONVENTION,
        "seed": system.config.seed,
        "config": semantic_config(config),
        "models": {role: source.record() for role, source in system.sources.items()},
        "dtype": system.dtype(),
        "tokenizers": dict(system.tokenizer_digests),
        "vocabulary": decoding["size"],
        "end_tokens": {"columns": list(system.stop_columns), "merged": list(decoding["merge"])},
        "prompt_styles": dict(styles),
        "dataset": fingerprint,
    }


def run_info(system: System, adapter: DatasetAdapter) -> dict[str, Any]:
    """What is worth knowing and may change between two starts."""
    run = system.config.run
    versions = {"python": sys.version.split()[0], "jax": jax.__version__}
    for name in ("transformers", "tokenizers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return {
        "versions": versions,
        "rows": len(adapter),
        "range": {"start_idx": run.start_idx, "num_samples": run.num_samples},
        "shard": run.shard,
        "slots": str(run.slots),
        "device": str(jax.devices()[0]),
    }
