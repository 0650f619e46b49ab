"""Reading what runs leave behind, whatever the number of processes that wrote it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
MEASURED = ("time/", "speed/", "memory/", "examples_per_s")


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what is measured."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


def last_step(workdir: Path) -> Path:
    """Directory of the newest finished checkpoint."""
    steps = [p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    return max(steps, key=lambda p: int(p.name))


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Arrays of the last checkpoint, by name; saved on any number of devices."""
    import jax
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    path = last_step(workdir) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved
        )
        how = ocp.checkpoint_utils.construct_restore_args(target)
        tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(target, restore_args=how))
    found = {}
    for name, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found[jax.tree_util.keystr(name)] = np.asarray(leaf)
    return found


def assert_close_runs(actual: Path, expected: Path, rtol: float, atol: float) -> None:
    """Parameters, moments and metrics of two runs agree."""
    left, right = arrays(actual), arrays(expected)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=rtol, atol=atol, err_msg=name)
    rows, wanted = metrics(actual), metrics(expected)
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        assert row.keys() == want.keys()
        for name, value in row.items():
            np.testing.assert_allclose(value, want[name], rtol=rtol, atol=atol, err_msg=name)
