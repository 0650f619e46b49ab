"""The stages select and memory: from candidates to the library, from the library to the memory."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from common import flags
from common.errors import require
from common.json_files import Fields
from common.rundir import atomic_write, atomic_write_json, json_text, read_jsonl
from esm.files import (
    ENTRY,
    FORMAT_VERSION,
    LIBRARY_MANIFEST,
    MANIFEST,
    MINED_MANIFEST,
    read_array,
    read_object,
    save_array,
)
from esm.layers import resolve_layers
from esm.memory import Memory, make_memory, normalize, save_memory
from esm.monitor import Monitor
from esm.runs import Run
from esm.select import Rules, select_entries

_COPIED = (
    "tool_id",
    "tool_name",
    "entry_type",
    "has_vector",
    "layer",
    "control_point_m",
    "quality",
    "reward_gap",
    "r_pos_mean",
    "r_neg_mean",
    "n_pos",
    "n_neg",
    "pair_id",
)


def select_rules(config: ConfigDict) -> Rules:
    """The rules of a config."""
    select = config.offline_select
    return Rules(
        size=select.B,
        method=select.method,
        diversity=select.lambda_diversity,
        epsilon=select.epsilon,
        min_per_point=select.min_per_control_point,
        seed=select.random_seed,
        condition_on_forced=select.condition_on_forced,
        kernel_scope=select.kernel_scope,
    )


class Candidates:
    """What mining left behind.

    Attributes:
        rows: of `candidates.jsonl`.
        keys: [2 P, H] float32.
        vectors: [P, H] float32.
        manifest: of the mined run.
    """

    def __init__(self, run: Run) -> None:
        """Reads them.

        Raises:
            UserError: mining is unfinished, or a file is damaged.
        """
        self.manifest = read_mine_manifest(run)
        self.rows = read_jsonl(run.mine / "candidates.jsonl", ENTRY)
        self.keys = read_array(run.mine / "keys.npy")
        self.vectors = read_array(run.mine / "vectors.npy")
        pairs, width = self.manifest["pairs"], self.manifest["hidden_size"]
        require(
            (len(self.rows), self.keys.shape, self.vectors.shape)
            == (2 * pairs, (2 * pairs, width), (pairs, width))
            and all(0 <= row["pair_id"] < pairs for row in self.rows),
            f"{run.mine}: {len(self.rows)} candidates, keys {self.keys.shape} and vectors "
            f"{self.vectors.shape} where the manifest says {pairs} pairs of width {width}; delete "
            f"{run.mine / MANIFEST} and run --stage=mine.states again",
        )

    def select(
        self, rules: Rules, layers: Sequence[int]
    ) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
        """Library rows, keys [N, H] and vectors [N, H] (zeros for null rows).

        Args:
            rules: of the selection.
            layers: only entries of these; () = all.
        """
        kept = [i for i, row in enumerate(self.rows) if not layers or row["layer"] in layers]
        rows = [self.rows[i] for i in kept]
        chosen = select_entries(
            self.keys[kept],
            [row["quality"] for row in rows],
            [row["control_point_m"] for row in rows],
            [row["layer"] for row in rows],
            rules,
        )
        hidden = self.keys.shape[1]
        library: list[dict[str, Any]] = []
        vectors = np.zeros((len(chosen), hidden), np.float32)
        for lib_id, place in enumerate(chosen):
            row = rows[place]
            library.append({"lib_id": lib_id, "row": lib_id, **{k: row[k] for k in _COPIED}})
            if row["has_vector"]:
                vectors[lib_id] = self.vectors[row["pair_id"]]
        keys = self.keys[[kept[place] for place in chosen]].reshape(len(chosen), hidden)
        return library, keys, vectors

    def memory(self, rules: Rules, layers: Sequence[int]) -> Memory:
        """The memory that select and memory would make, without writing it."""
        rows, keys, vectors = self.select(rules, layers)
        return make_memory(normalize(keys), vectors, rows)


def select_library(config: ConfigDict, run: Run, monitor: Monitor) -> None:
    """Chooses the library among the candidates."""
    candidates = Candidates(run)
    rules = select_rules(config)
    layers = selected_layers(config, run, candidates.manifest)
    rows, keys, vectors = candidates.select(rules, layers)
    available = sum(not layers or row["layer"] in layers for row in candidates.rows)
    if rules.size >= available:
        monitor.warning(
            f"offline_select.B={rules.size} keeps all {available} candidates: the selection only "
            "orders them"
        )
    (run.library / "manifest.json").unlink(missing_ok=True)
    text = "".join(json_text(row) + "\n" for row in rows)
    atomic_write(run.library / "library.jsonl", text)
    save_array(run.library / "keys.npy", keys)
    save_array(run.library / "vectors.npy", vectors)
    digest = hashlib.sha256(text.encode() + keys.tobytes() + vectors.tobytes()).hexdigest()[:16]
    mined = {key: candidates.manifest.get(key) for key in _CARRIED}
    atomic_write_json(
        run.library / "manifest.json",
        {
            "format_version": FORMAT_VERSION,
            **mined,
            "entries": len(rows),
            "layers": sorted({row["layer"] for row in rows}),
            "digest": digest,
            "source_run": f"{run.path.parent.name}/{run.path.name}",
            "config": flags.select(config, ("offline_mine", "offline_select")),
        },
    )
    _drop_stale_memory(run, digest)
    tools = sum(row["has_vector"] for row in rows)
    monitor.info(f"library: {len(rows)} of {available} candidates, {tools} with a correction")


# What library and memory keep of the mined run.
_CARRIED = (
    "model",
    "prompt",
    "chat_template",
    "hidden_size",
    "num_layers",
    "delimiter",
    "M",
    "dataset",
    "split",
    "mined",
)


def build_memory(config: ConfigDict, run: Run, monitor: Monitor) -> None:
    """Turns the library into what is looked up."""
    manifest = read_library_manifest(run)
    rows = read_jsonl(run.library / "library.jsonl", ENTRY)
    keys = read_array(run.library / "keys.npy")
    vectors = read_array(run.library / "vectors.npy")
    require(
        len(rows) == manifest["entries"]
        and keys.shape == vectors.shape == (len(rows), manifest["hidden_size"]),
        f"{run.library}: {len(rows)} rows, keys {keys.shape} and vectors {vectors.shape} where the "
        f"manifest says {manifest['entries']} of width {manifest['hidden_size']}; run "
        "--stage=select again",
    )
    normalize_keys = bool(config.offline_memory.normalize_keys)
    save_memory(run.memory, keys, vectors, rows, manifest, normalize_keys)
    monitor.info(f"memory: {len(rows)} entries of width {keys.shape[1]}")


def read_mine_manifest(run: Run) -> dict[str, Any]:
    """The manifest of a mined run.

    Raises:
        UserError: it was not mined to the end.
    """
    return _read_manifest(run.mine, "run --stage=mine", MINED_MANIFEST)


def read_library_manifest(run: Run) -> dict[str, Any]:
    """The manifest of a library.

    Raises:
        UserError: nothing was selected.
    """
    return _read_manifest(run.library, "run --stage=select", LIBRARY_MANIFEST)


def selected_layers(config: ConfigDict, run: Run, manifest: dict[str, Any]) -> tuple[int, ...]:
    """The layers a library is restricted to; () = all."""
    named = config.offline_select.layers
    if named:
        layers = resolve_layers(named, manifest["num_layers"])
        missing = [layer for layer in layers if layer not in manifest["layers"]]
        require(
            not missing,
            f"offline_select.layers: {missing} were not mined (mined: {manifest['layers']})",
        )
        return layers
    chosen = tuned(config, run)
    return (int(chosen["layer"]),) if chosen else ()


def tuned(config: ConfigDict, run: Run) -> dict[str, Any] | None:
    """What the stage tune chose, None where it was not run or is not to be used."""
    path = run.tune / "chosen.json"
    if not config.tune.use or not path.exists():
        return None
    fields: Fields = {"layer": int, "k_scale": float, "dev": list}
    return read_object(path, "delete it and run --stage=tune again", fields)


def _read_manifest(directory: Path, cure: str, fields: Fields) -> dict[str, Any]:
    path = directory / MANIFEST
    require(path.exists(), f"{directory} is not finished; {cure} first")
    return read_object(path, f"delete it and {cure} again", fields)


def _drop_stale_memory(run: Run, digest: str) -> None:
    """A memory made of another library must not be taken for this one's."""
    path = run.memory / MANIFEST
    if path.is_file():
        cure = "delete it and run --stage=select again"
        if read_object(path, cure).get("digest") != digest:
            path.unlink()
