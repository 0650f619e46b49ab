"""Checkpoints: round trips, differences in words, damage, kills in the middle of a save."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.checkpoint import Checkpointer
from common.errors import UserError


def make_state(width: int = 3, value: float = 1.0) -> dict[str, Any]:
    params = {"w": jnp.full((2, width), value), "b": jnp.arange(width, dtype=jnp.bfloat16)}
    return {
        "params": params,
        "opt": optax.adamw(1e-3).init(params),
        "key": jax.random.key(7),
        "step": jnp.int32(4),
    }


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip_keeps_structure_keys_and_host(tmp_path: Path) -> None:
    state = make_state()
    with Checkpointer(tmp_path / "c") as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(5, state, {"position": 12, "best": 0.5})
    with Checkpointer(tmp_path / "c") as checkpointer:
        assert checkpointer.latest_step() == 5
        target = jax.eval_shape(make_state)
        restored, host = checkpointer.restore(target)
    assert host == {"position": 12, "best": 0.5}
    assert_same(restored, state)
    # The restored key draws what the saved one would have drawn.
    assert jax.random.bits(restored["key"]) == jax.random.bits(state["key"])


def test_packed_checkpoints_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are written unpacked; those written before that are not."""
    import orbax.checkpoint as ocp

    def packing(use_compression: bool) -> Any:
        return handler()

    handler, zeros, sizes = ocp.PyTreeCheckpointHandler, {"x": jnp.zeros(100_000)}, []
    for name in ("packed", "plain"):
        with monkeypatch.context() as patch:
            if name == "packed":
                patch.setattr(ocp, "PyTreeCheckpointHandler", packing)
            with Checkpointer(tmp_path / name) as checkpointer:
                checkpointer.save(1, zeros, {})
        files = (file for file in (tmp_path / name).rglob("*") if file.is_file())
        sizes.append(sum(file.stat().st_size for file in files))
        with Checkpointer(tmp_path / name) as checkpointer:
            assert_same(checkpointer.restore(jax.eval_shape(lambda: zeros))[0], zeros)
    assert sizes[0] < 100_000 < 400_000 < sizes[1]


def test_relative_directory_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Checkpointer("here") as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(2)}, {})
    assert (tmp_path / "here" / "1").is_dir()


def test_same_step_is_replaced_by_a_later_run(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(3, make_state(value=value), {"value": value})
    with Checkpointer(tmp_path) as checkpointer:
        restored, host = checkpointer.restore(make_state())
    assert host == {"value": 2.0}
    np.testing.assert_array_equal(restored["params"]["w"], np.full((2, 3), 2.0))


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2, best="max") as checkpointer:
        for step, metric in enumerate([0.1, 0.9, 0.3, 0.2, 0.4]):
            checkpointer.save(step, {"x": jnp.ones(1)}, {}, metric=metric)
        assert checkpointer.all_steps() == [1, 3, 4]
        assert checkpointer.best_step() == 1
    with Checkpointer(tmp_path, keep=1, best="min") as checkpointer:
        assert checkpointer.best_step() == 3
        checkpointer.save(9, {"x": jnp.ones(1)}, {}, metric=0.8)
        assert checkpointer.all_steps() == [3, 9]


def test_differences_of_the_tree_are_named(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {})
        with pytest.raises(UserError, match=r"params/w: saved float32\[2,3\], wanted float32\[2,4"):
            checkpointer.restore(make_state(width=4))
        fewer = {k: v for k, v in make_state().items() if k != "step"}
        with pytest.raises(UserError, match=r"step: saved int32\[\], not wanted"):
            checkpointer.restore(fewer)
        more = {**make_state(), "extra": jnp.ones(2)}
        with pytest.raises(UserError, match=r"extra: not saved, wanted float32\[2\]"):
            checkpointer.restore(more)
        other_type = {**make_state(), "step": jnp.float32(0)}
        with pytest.raises(UserError, match=r"step: saved int32\[\], wanted float32\[\]"):
            checkpointer.restore(other_type)


def test_partial_restore_takes_only_what_is_wanted(tmp_path: Path) -> None:
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {"n": 1})
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        wanted = {"params": {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}, "key": state["key"]}
        restored, _ = checkpointer.restore(wanted, partial=True)
        assert set(restored) == {"params", "key"}
        assert restored["params"]["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            np.asarray(restored["params"]["w"], np.float32), np.ones((2, 3))
        )
        with pytest.raises(UserError, match="params/z: not saved"):
            checkpointer.restore({"params": {"z": jnp.ones(2)}}, partial=True)


def test_other_settings_are_refused_in_words(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, settings={"model.width": 3, "model.kind": "a"}) as checkpointer:
        checkpointer.save(1, make_state(), {})
    with (
        Checkpointer(tmp_path, settings={"model.width": 4, "model.kind": "a"}) as checkpointer,
        pytest.raises(UserError, match="model.width: saved 3, now 4") as error,
    ):
        checkpointer.restore(make_state())
    assert "model.kind" not in str(error.value)


def test_a_checkpoint_older_than_a_key_has_its_default(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, settings={"model.width": 3}) as checkpointer:
        checkpointer.save(1, make_state(), {})
    defaults = {"model.width": 8, "model.new": 0}
    same = {"model.width": 3, "model.new": 0}
    with Checkpointer(tmp_path, settings=same, defaults=defaults) as checkpointer:
        checkpointer.restore(make_state())
    for change in ({"model.new": 1}, {"model.width": 8}):
        with (
            Checkpointer(tmp_path, settings=same | change, defaults=defaults) as checkpointer,
            pytest.raises(UserError, match=next(iter(change))),
        ):
            checkpointer.restore(make_state())


def _largest_file(directory: Path) -> Path:
    files = [p for p in directory.rglob("*") if p.is_file() and p.name != "summary.json"]
    return max(files, key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_newest_step_is_skipped_aloud(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(value=1.0), {"n": 1})
        checkpointer.save(2, make_state(value=2.0), {"n": 2})
    victim = _largest_file(tmp_path / "2" / "state")
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    else:
        victim.unlink()
    capfd.readouterr()
    with Checkpointer(tmp_path) as checkpointer:
        restored, host = checkpointer.restore(make_state())
        assert host == {"n": 1}
        np.testing.assert_array_equal(restored["params"]["w"], np.ones((2, 3)))
        complaint = capfd.readouterr().err
        assert "warning: checkpoint 2" in complaint and victim.name in complaint
        assert "Traceback" not in complaint
        with pytest.raises(UserError, match="checkpoint 2 .* is damaged"):
            checkpointer.restore(make_state(), step=2)
        # The run goes on over the damaged step.
        checkpointer.save(2, make_state(value=3.0), {"n": 3})
        assert checkpointer.restore(make_state())[1] == {"n": 3}


def test_nothing_to_restore(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "new") as checkpointer:
        with pytest.raises(UserError, match="holds no finished checkpoint"):
            checkpointer.restore(make_state())
        with pytest.raises(UserError, match="no checkpoint of step 3; found: none"):
            checkpointer.restore(make_state(), step=3)
    with pytest.raises(UserError, match="no such checkpoint directory"):
        Checkpointer(tmp_path / "absent", read_only=True)
    assert not (tmp_path / "absent").exists()


def test_all_damaged(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {})
    _largest_file(tmp_path / "1" / "state").write_bytes(b"")
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(UserError, match="every checkpoint is damaged"),
    ):
        checkpointer.restore(make_state())


SAVER = """
import sys
import jax.numpy as jnp
from common.checkpoint import Checkpointer
with Checkpointer(sys.argv[1], keep=2) as checkpointer:
    step = 0
    while True:
        state = {"x": jnp.full((1 << 21,), float(step)), "step": jnp.int32(step)}
        checkpointer.save(step, state, {"step": step})
        print(step, flush=True)
        step += 1
"""


def _unfinished(directory: Path) -> bool:
    return any("tmp" in path.name for path in directory.iterdir())


def test_kill_during_save_leaves_the_previous_step(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVER), str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    try:
        done = -1
        while done < 2:
            done = int(process.stdout.readline())
        # A temporary name in the directory means that a save is under way right now.
        deadline = time.monotonic() + 60
        while not _unfinished(directory) and time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        rest = process.stdout.read().split()
        process.wait()
    done = int(rest[-1]) if rest else done
    target = {"x": jnp.zeros((1 << 21,)), "step": jnp.int32(0)}
    with Checkpointer(directory, keep=2) as checkpointer:
        state, host = checkpointer.restore(target)
        # The save in progress may just have been finished, but nothing reported may be lost.
        assert host["step"] >= done
        assert int(state["step"]) == host["step"]
        np.testing.assert_array_equal(np.asarray(state["x"]), float(host["step"]))
        assert not _unfinished(directory)
        checkpointer.save(host["step"] + 1, target, {"step": -1})
        assert checkpointer.latest_step() == host["step"] + 1


def test_empty_arrays_come_back_empty(tmp_path: Path) -> None:
    state = {"rows": jnp.ones((3, 2)), "nothing": jnp.zeros((3, 0), jnp.int32)}
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert restored["nothing"].shape == (3, 0) and restored["nothing"].dtype == jnp.int32
    np.testing.assert_array_equal(restored["rows"], state["rows"])


def test_a_full_disk_under_the_storage_librarys_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(3)}, {})

        def full(*args: Any, **kwargs: Any) -> None:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left")

        monkeypatch.setattr(checkpointer._manager, "save", full)
        with pytest.raises(UserError, match="checkpoint 2 .*No space left.*same command again"):
            checkpointer.save(2, {"x": jnp.ones(3)}, {})
        assert checkpointer.all_steps() == [1]


@pytest.mark.parametrize("where", ["summary", "host"])
def test_a_checkpoint_of_a_later_version_is_refused(tmp_path: Path, where: str) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": np.zeros(2)}, {})
    step = tmp_path / "2"
    path = step / ("summary.json" if where == "summary" else "host/metadata")
    content = json.loads(path.read_text())
    assert content["format"] == 1
    path.write_text(json.dumps({**content, "format": 2}))
    if where == "host":
        (step / "summary.json").unlink()
    with Checkpointer(tmp_path) as checkpoints:
        # Not the older step in its place: what is newest would be lost silently.
        with pytest.raises(UserError, match="format 2, this version reads up to 1"):
            checkpoints.restore({"w": np.zeros(2)})
        content.pop("format")  # as before there was a number
        path.write_text(json.dumps(content))
        checkpoints.restore({"w": np.zeros(2)})


@pytest.mark.parametrize(
    "content", ["[1]", "{}", '{"host": {}, "settings": {}, "leaves": {"w": 1}}']
)
def test_a_strange_json_item_is_damage(tmp_path: Path, content: str) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": np.zeros(2)}, {})
    (tmp_path / "1" / "host" / "metadata").write_text(content)
    (tmp_path / "1" / "summary.json").unlink()
    with (
        Checkpointer(tmp_path) as checkpoints,
        pytest.raises(UserError, match="every checkpoint is damaged"),
    ):
        checkpoints.restore({"w": np.zeros(2)})
