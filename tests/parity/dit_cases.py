"""The MDLM and SEDD fixtures that are there, loaded through the bridge."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone import dit, dit_bridge
from tests.parity.e2d2_cases import arrays
from tests.parity.fixtures import fixture_root


class Case(NamedTuple):
    """A recorded network: static description, parameters, its `config.json`."""

    cfg: dit.DiTConfig
    params: Any
    config: dict[str, Any]


def folders(family: str) -> list[Path]:
    """Every model folder of "mdlm" or "sedd"."""
    return sorted(p.parent for p in (fixture_root() / "backbones" / family).glob("*/config.json"))


def folder_cases(family: str) -> list[Any]:
    """One test case per model folder."""
    return [pytest.param(folder, id=folder.name) for folder in folders(family)]


@functools.cache
def load(folder: Path) -> Case:
    """The network of a folder."""
    model = dit_bridge.load_directory(folder)
    config = json.loads((folder / "config.json").read_text())
    return Case(model.config, model.params, config)


@functools.partial(jax.jit, static_argnums=1)
def _score(params: Any, cfg: dit.DiTConfig, tokens: jax.Array, t: jax.Array) -> Any:
    mask = jnp.ones_like(tokens, bool)
    return dit.score(params, cfg, tokens, attention_mask=mask, t=t, collect_states=True)


def scored(case: Case, tokens: np.ndarray, t: np.ndarray) -> Any:
    """BackboneOutput of a batch, with the states of every block."""
    with jax.default_matmul_precision("highest"):
        return _score(case.params, case.cfg, jnp.asarray(tokens), jnp.asarray(t, jnp.float32))


def recorded(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Arrays of `forward` or `sampler`."""
    return arrays(folder / f"{name}.npz")


def first_column(t: np.ndarray) -> np.ndarray:
    """Times recorded as [B, 1] or [B] -> [B]."""
    return np.asarray(t, np.float32).reshape(len(t), -1)[:, 0]
