"""Actor, critic and hidden pooling against recorded values."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.features import pool_hidden
from reoac_jax.networks import export_head, heads_apply, import_head
from tests.parity.reoac_vocabulary import reoac_files

FILES = reoac_files("heads*.npz")
NAMES = {
    "actor": ("net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"),
    "critic": ("q_head.0.weight", "q_head.0.bias", "q_head.3.weight", "q_head.3.bias"),
}


def head(arrays: dict[str, np.ndarray], kind: str, prefix: str = "") -> dict:
    leaves = [arrays[f"{prefix}{kind}_{leaf}"] for leaf in ("w1", "b1", "w2", "b2")]
    return import_head(dict(zip(NAMES[kind], leaves, strict=True)), kind)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_heads(path: Path) -> None:
    arrays = dict(np.load(path))
    mask = arrays["attention_mask"].astype(bool)
    hidden = np.where(mask[..., None], arrays["hidden"], np.nan)  # padding may hold anything
    pooled = pool_hidden(jnp.asarray(hidden), jnp.asarray(mask))
    np.testing.assert_allclose(pooled, arrays["pooled"], atol=2e-5)
    features = jnp.concatenate([jnp.asarray(arrays["base_features"]), pooled], axis=1)
    np.testing.assert_allclose(features, arrays["features"], atol=2e-5)
    logits = heads_apply(head(arrays, "actor"), features)
    np.testing.assert_allclose(logits, arrays["actor_logits"], atol=2e-5)
    np.testing.assert_allclose(jax.nn.softmax(logits), arrays["actor_probs"], atol=2e-5)
    np.testing.assert_array_equal(jnp.argmax(logits, 1), arrays["actor_argmax"])
    q = heads_apply(head(arrays, "critic"), features)
    np.testing.assert_allclose(q, arrays["critic_q"], atol=2e-5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", ["actor", "critic"])
def test_names_survive_the_round_trip(path: Path, kind: str) -> None:
    params = head(dict(np.load(path)), kind)
    exported = export_head(params, kind)
    assert tuple(exported) == NAMES[kind]
    for ours, again in zip(
        jax.tree.leaves(params), jax.tree.leaves(import_head(exported, kind)), strict=True
    ):
        np.testing.assert_array_equal(ours, again)
