"""Top-k and top-p against recorded kept sets, exact hits, ties and crossing tokens included."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from common.lm.sampling import keep_mask
from tests.parity.fixtures import fixture_root

FILE = fixture_root() / "qstar" / "filters.json"
CASES = json.loads(FILE.read_text())["cases"] if FILE.is_file() else []


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"k{case['top_k']}-p{case['top_p']}")
def test_kept_tokens(case):
    p = np.asarray(case["p"])
    with np.errstate(divide="ignore"):
        log_p = jnp.asarray(np.log(p)[None], jnp.float32)
    keep = keep_mask(log_p, jnp.asarray([case["top_k"]]), jnp.asarray([case["top_p"]], jnp.float32))
    assert np.flatnonzero(keep[0]).tolist() == sorted(case["keep"])
    q = np.where(keep[0], p, 0.0)
    np.testing.assert_allclose(q / q.sum(), case["q"], atol=1e-6)
