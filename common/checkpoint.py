"""Checkpoints of a run: Orbax steps that are verified, compared with what is wanted, and pruned.

A step holds two items, `state` (a tree of arrays) and `host` (JSON), and `summary.json` with a
checksum of every file. A step appears under its final name only when it is whole, so a kill during
a save leaves the previous one; damage that happens later is found by the checksums.

With several processes each writes the parts of the arrays that lie on its own devices; the first
one adds the summary and verifies. All of them make the same calls. A step can be restored by any
number of processes and devices.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging

from common.checkpoint_files import (
    FORMAT,
    SUMMARY,
    Damaged,
    check_document,
    checksum,
    files_of,
    verify_together,
)
from common.errors import UserError, require
from common.processes import is_main, on_main
from common.rundir import atomic_write_json

_SHOWN_DIFFERENCES = 8


class Checkpointer:
    """Saves and restores the steps in one directory; use as a context manager."""

    def __init__(
        self,
        directory: str | Path,
        keep: int = 3,
        *,
        best: str = "",
        keep_every: int = 0,
        settings: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ) -> None:
        """Opens the directory; makes it unless `read_only`.

        Args:
            directory: usually `RunDir.checkpoints`.
            keep: how many of the newest steps to keep.
            best: `max` or `min` keeps the step with the best metric as well; empty: no such step.
            keep_every: also keep the steps that are a multiple of it; 0: none.
            settings: {key: JSON value} of the config keys the arrays depend on; a restore under
                other values is refused (see `common.flags.select`).
            defaults: what `settings` are by default; a checkpoint older than a key counts as made
                with the key's default, which is chosen such that it changes nothing.
            read_only: never changes the directory; for commands that only load.

        Raises:
            UserError: if `keep` or `best` is not valid, or a directory to read does not exist.
        """
        import orbax.checkpoint as ocp

        require(keep >= 1, f"the number of checkpoints to keep must be at least 1, got {keep}")
        require(best in ("", "max", "min"), f"best must be max, min or empty, got {best!r}")
        # Orbax refuses relative paths, and only after the save has begun.
        self.directory = Path(directory).expanduser().resolve()
        if read_only and not self.directory.is_dir():
            raise UserError(
                f"{directory}: no such checkpoint directory; train first, or name another one"
            )
        self._keep = keep
        self._keep_every = keep_every
        self._best = best
        self._settings = json.loads(json.dumps(dict(settings or {})))
        self._defaults = json.loads(json.dumps(dict(defaults or {})))
        self._read_only = read_only
        self._last_saved: int | None = None
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            # What it would set itself, with a warning.
            save_interval_steps=0 if read_only else 1,
            # What a killed save left behind; a reader must not touch a save in progress.
            cleanup_tmp_directories=not read_only,
            # The state is donated to the next update right after the save.
            enable_async_checkpointing=False,
        )
        try:
            with _quiet():
                handlers: dict[str, Any] = {
                    # Packing saves a few percent of the disk and is most of a save's computing.
                    "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                    "host": ocp.JsonCheckpointHandler(),
                }
                self._manager = ocp.CheckpointManager(
                    self.directory, item_handlers=handlers, options=options
                )
        except OSError as error:
            raise UserError(
                f"cannot open the checkpoint directory {directory} ({error.strerror}); mend it, or "
                "choose another --workdir"
            ) from error

    def save(
        self, step: int, state: Any, host: Mapping[str, Any], metric: float | None = None
    ) -> None:
        """Writes one step; it is whole on disk when this returns.

        Args:
            step: its number; an older step of the same number is replaced.
            state: tree of arrays, typed RNG keys included.
            host: JSON values (positions, counters).
            metric: what `best` compares.

        Raises:
            UserError: if the directory cannot be written (full disk, permissions).
        """
        import orbax.checkpoint as ocp

        if self._read_only:
            raise ValueError(f"{self.directory} was opened read-only")
        if step == self._last_saved:
            return
        document = {
            "format": FORMAT,
            "host": dict(host),
            "settings": self._settings,
            "leaves": _describe(state),
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(jax.tree.map(_storable, state)),
            host=ocp.args.JsonSave(document),
        )
        try:
            with _quiet():
                if step in self.all_steps():
                    self._manager.delete(step)
                self._manager.save(step, args=items, force=True)
                self._manager.wait_until_finished()
            on_main(lambda: self._summarise(step, metric))
        except OSError as error:
            raise self._unwritable(step, error.strerror or str(error)) from error
        except Exception as error:
            if not is_full_disk(error):
                raise
            raise self._unwritable(step, "No space left on device") from error
        self._last_saved = step
        self._prune()

    def _unwritable(self, step: int, reason: str) -> UserError:
        return UserError(
            f"cannot write checkpoint {step} to {self.directory} ({reason}); earlier steps are "
            "intact: make room and run the same command again"
        )

    def _summarise(self, step: int, metric: float | None) -> None:
        directory = self.directory / str(step)
        checksums = {name: checksum(directory / name) for name in files_of(directory)}
        atomic_write_json(
            directory / SUMMARY, {"format": FORMAT, "metric": metric, "files": checksums}
        )

    def restore(
        self, target_state: Any, step: int | None = None, partial: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Loads a step into the structure, shapes and shardings of a target.

        Args:
            target_state: tree of arrays or `jax.ShapeDtypeStruct`; those without a sharding go to
                the first device.
            step: which step; None takes the newest that is readable and says on stderr if it had
                to skip a damaged one.
            partial: the target may lack leaves that were saved and may ask for other dtypes;
                settings that were saved but not given here are not compared.

        Returns:
            (state, host): the tree as jax arrays, and what was given to `save`.

        Raises:
            UserError: if there is no readable step, or if shapes, names or settings differ; lists
                the differences.
        """
        steps = self.all_steps()
        if step is not None:
            if step not in steps:
                found = ", ".join(map(str, steps)) or "none"
                raise UserError(f"{self.directory}: no checkpoint of step {step}; found: {found}")
            steps = [step]
        if not steps:
            raise UserError(f"{self.directory}: holds no finished checkpoint; train first")
        for number in reversed(steps):
            try:
                return self._restore_step(number, target_state, partial)
            except Damaged as error:
                if step is not None:
                    raise UserError(
                        f"checkpoint {number} in {self.directory} is damaged ({error}); name "
                        "another step, or restore a copy"
                    ) from error
                if is_main():
                    print(
                        f"warning: checkpoint {number} in {self.directory} is damaged ({error}); "
                        "trying the one before",
                        file=sys.stderr,
                    )
        raise UserError(
            f"{self.directory}: every checkpoint is damaged (steps {', '.join(map(str, steps))}); "
            "restore a copy or start in another --workdir"
        )

    def latest_step(self) -> int | None:
        """Returns the newest finished step, None without one."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step with the best metric, None if no step has one."""
        return on_main(self._best_step)

    def _best_step(self) -> int | None:
        rated = [(self._metric(step), step) for step in self.all_steps()]
        known = [(metric, step) for metric, step in rated if metric is not None]
        if not known or not self._best:
            return None
        # Of equal ones the newest.
        sign = 1 if self._best == "max" else -1
        return max(known, key=lambda pair: (sign * pair[0], pair[1]))[1]

    def all_steps(self) -> list[int]:
        """Returns the finished steps, oldest first."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Releases the threads of the manager."""
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _restore_step(
        self, step: int, target_state: Any, partial: bool
    ) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint as ocp

        directory = self.directory / str(step)
        verified = verify_together(directory)
        document = _attempt(
            lambda: self._manager.restore(
                step, args=ocp.args.Composite(host=ocp.args.JsonRestore())
            )["host"],
            verified,
        )
        check_document(directory, document)
        self._compare_settings(step, document["settings"], partial)
        _compare_leaves(directory, document["leaves"], _describe(target_state), partial)
        target = jax.tree.map(lambda leaf: _abstract(_storable(leaf)), target_state)
        arguments = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=partial,
        )
        state = _attempt(
            lambda: self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"],
            verified,
        )
        return jax.tree.map(_as_wanted, state, target_state), document["host"]

    def _compare_settings(self, step: int, saved: Mapping[str, Any], partial: bool) -> None:
        if not self._settings:
            return
        keys = sorted(set(self._settings) if partial else set(saved) | set(self._settings))
        missing = object()
        saved = {key: self._defaults[key] for key in keys if key in self._defaults} | dict(saved)
        changes = [
            f"{key}: saved {json.dumps(saved.get(key))}, now {json.dumps(self._settings.get(key))}"
            for key in keys
            if saved.get(key, missing) != self._settings.get(key, missing)
        ]
        if changes:
            raise UserError(
                f"checkpoint {step} in {self.directory} was made with other settings: "
                f"{_shortened(changes)}; set them back or choose another --workdir"
            )

    def _metric(self, step: int) -> float | None:
        try:
            summary = json.loads((self.directory / str(step) / SUMMARY).read_text())
            metric = summary["metric"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None if metric is None else float(metric)

    def _prune(self) -> None:
        kept = {*self.all_steps()[-self._keep :], self.best_step()}
        for step in self.all_steps():
            spared = self._keep_every and step % self._keep_every == 0
            if step not in kept and not spared:
                self._manager.delete(step)


def is_full_disk(error: Exception) -> bool:
    """Whether Orbax's storage library says, under a type of its own, that the disk is full."""
    return "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's own log to itself: what goes wrong is raised, not printed with a traceback."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


def _attempt(read: Callable[[], Any], verified: bool) -> Any:
    try:
        with _quiet():
            return read()
    except Exception as error:
        # With good checksums the files are not to blame: let the real error be seen.
        if verified:
            raise
        raise Damaged(str(error).splitlines()[0][:200] if str(error) else repr(error)) from error


def _describe(tree: Any) -> dict[str, list[Any]]:
    """Returns {leaf name: [shape, dtype name]}."""
    described: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        described[name] = [list(np.shape(leaf)), str(dtype)]
    return described


def _storable(leaf: Any) -> Any:
    """The leaf, or one zero in the place of an empty array, which Orbax refuses to save."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf if leaf.size else jax.ShapeDtypeStruct((1,), leaf.dtype)
    if not np.size(leaf):
        return np.zeros((1,), leaf.dtype)
    if jax.process_count() > 1 and isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
        return np.asarray(leaf)  # what every process holds is stored once
    return leaf


def _as_wanted(restored: Any, leaf: Any) -> Any:
    """Undoes `_storable`."""
    if np.size(leaf):
        return restored
    return jnp.zeros(np.shape(leaf), leaf.dtype, device=getattr(leaf, "sharding", None))


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not isinstance(sharding, jax.sharding.Sharding):
        # Otherwise Orbax looks for the devices of the run that saved.
        sharding = _for_the_host()
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)


def _for_the_host() -> jax.sharding.Sharding:
    """Where an array goes that the target holds on the host: readable by every process."""
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _compare_leaves(
    directory: Path,
    saved: Mapping[str, list[Any]],
    wanted: Mapping[str, list[Any]],
    partial: bool,
) -> None:
    changes = []
    for name in sorted(set(saved) | set(wanted)):
        if name not in wanted:
            if not partial:
                changes.append(f"{name}: saved {_shown(saved[name])}, not wanted")
        elif name not in saved:
            changes.append(f"{name}: not saved, wanted {_shown(wanted[name])}")
        elif saved[name][0] != wanted[name][0] or (not partial and saved[name] != wanted[name]):
            changes.append(f"{name}: saved {_shown(saved[name])}, wanted {_shown(wanted[name])}")
    if changes:
        raise UserError(
            f"checkpoint {directory} does not fit the model: {_shortened(changes)}; give the "
            "settings of its run, or name another one"
        )


def _shown(leaf: list[Any]) -> str:
    shape, dtype = leaf
    return f"{dtype}[{','.join(map(str, shape))}]"


def _shortened(changes: list[str]) -> str:
    rest = len(changes) - _SHOWN_DIFFERENCES
    text = "; ".join(changes[:_SHOWN_DIFFERENCES])
    return f"{text}; and {rest} more" if rest > 0 else text
