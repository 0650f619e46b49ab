"""Where trained backbones lie: hub directories, converted (Orbax) directories, hub names."""

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import hub, torch_bridge
from common.errors import UserError
from common.lm.config import Llama3Scaling
from common.lm.layers import Params
from common.rundir import atomic_write_json
from reoac_jax.backbone import dit, dit_bridge, dit_config, e2d2
from reoac_jax.backbone.dit import DiTConfig
from reoac_jax.backbone.e2d2 import E2D2Config
from reoac_jax.backbone.e2d2_bridge import load_hf_directory, save_hf_directory
from reoac_jax.backbone.hub_files import Json, read_json, stored_dtype

EMBEDDED_NAME = "embedded"
EMBEDDED_DIR = Path(__file__).resolve().parent.parent / "assets" / "embedded_e2d2"
DESCRIPTION = "backbone.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
FAMILIES = ("e2d2", *dit_config.FAMILIES)
# Named by configs of the original, but never published under this name.
_UNPUBLISHED = {
    "kuleshov-group/sedd-owt": "a local directory with the SEDD baseline of the MDLM authors, or "
    "louaaron/sedd-small"
}
_PARAMS = "params"
_FORMAT = 1
_CONFIG_KEY = "backbone.model_name_or_path"


class StoredBackbone(NamedTuple):
    """A backbone read from disk.

    Attributes:
        config: Its static description.
        params: Float32 parameter tree (NumPy arrays).
        provenance: Source of every field of `config`.
        directory: Where it was read, with the tokenizer files if it has any.
        source: Hub files it came from: `config`, `base_config` (JSON objects), `sha256`, `name`.
    """

    config: E2D2Config | DiTConfig
    params: Params
    provenance: dict[str, str]
    directory: Path
    source: Json

    @property
    def family(self) -> str:
        """One of `FAMILIES`."""
        if isinstance(self.config, E2D2Config):
            return "e2d2"
        return "sedd" if self.config.parameterization == "sedd" else "mdlm"

    @property
    def tokenizer_files(self) -> list[Path]:
        """Tokenizer files beside the weights."""
        return [p for name in TOKENIZER_FILES if (p := self.directory / name).is_file()]


# --------------------------------------------------------------------------------------- loading
def load_backbone(
    name: str | Path,
    base_config: str | Path | None = None,
    family: str | None = None,
    overrides: Json | None = None,
) -> StoredBackbone:
    """Loads a backbone.

    Args:
        name: "embedded" (ships with this package), a directory in hub layout, a converted
            directory, a weight file beside its `config.json`, or a hub name, perhaps with
            "@revision"; the commit that was read stands in `provenance` and `source`.
        base_config: Config of the base model, when the directory does not have it (E2D2).
        family: What it must be, one of `FAMILIES`; None = what its files say. A training
            checkpoint of MDLM or SEDD without `config.json` needs it.
        overrides: MDLM and SEDD: values that no file states, see `dit_config.parse_overrides`.

    Returns:
        The backbone.

    Raises:
        UserError: Nothing usable there, broken or contradictory files, or an unreachable hub.
    """
    path = EMBEDDED_DIR if str(name) == EMBEDDED_NAME else Path(name).expanduser()
    weights, commit = None, ""
    if path.is_file():
        path, weights = path.parent, path
    if not path.is_dir():
        text = str(name)
        if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
            raise UserError(
                f"backbone '{name}' does not exist: set {_CONFIG_KEY} to a model directory, "
                f"a hub name or '{EMBEDDED_NAME}'"
            )
        path = _download(text)
        commit = path.name
    try:
        found = _load_directory(str(name), path, weights, base_config, family, overrides)
        if not commit:
            return found
        # What the run keeps: a branch moves, a commit does not.
        place = f"{hub.split_revision(str(name))[0]}@{commit}"
        return found._replace(
            provenance={**found.provenance, "weights": place},
            source={**found.source, "revision": commit},
        )
    except UserError as error:
        raise UserError(
            f"backbone '{path}': {error}; restore its files, or set {_CONFIG_KEY} to another model"
        ) from error


def _load_directory(
    name: str,
    path: Path,
    weights: Path | None,
    base_config: str | Path | None,
    family: str | None,
    overrides: Json | None,
) -> StoredBackbone:
    """`load_backbone` of a directory that is there."""
    if weights is None and (path / DESCRIPTION).is_file():
        stored = _load_converted(path)
        if family not in (None, stored.family):
            raise UserError(
                f"'{path}' holds a backbone of the family {stored.family}, not {family}"
            )
        return stored
    stated = family
    if (path / "config.json").is_file():
        content = read_json(path / "config.json")
        stated = "e2d2" if content.get("model_type") == "e2d2" else dit_config.family_of(content)
        if stated is not None and family not in (None, stated):
            raise UserError(f"'{path / 'config.json'}' describes {stated}, not {family}")
    model: Any
    if stated in dit_config.FAMILIES:
        model = dit_bridge.load_directory(path, weights, family, overrides)
    else:
        if overrides:
            raise UserError(f"values given by hand ({', '.join(overrides)}) are for MDLM and SEDD")
        model = load_hf_directory(path, base_config, weights)
    files = {"config": "config.json", "base_config": "base_config.json"}
    source: Json = {key: read_json(p) for key, f in files.items() if (p := path / f).is_file()}
    if base_config is not None:
        source["base_config"] = read_json(Path(base_config))
    weight_file = torch_bridge.find_weights(weights or path)
    source |= {"name": name, "file": weight_file.name, "sha256": _sha256(weight_file)}
    return StoredBackbone(model.config, model.params, model.provenance, path, source)


def _download(name: str) -> Path:
    """Fetches a hub model (weights, configs, tokenizer; never code)."""
    cure = (
        f"set {_CONFIG_KEY} to a local directory with its config.json and weights, "
        f"or use the variant with the embedded backbone, configs/gsm8k.py"
    )
    if name in _UNPUBLISHED:
        raise UserError(
            f"backbone '{name}' was never published: set {_CONFIG_KEY} to {_UNPUBLISHED[name]}"
        )
    try:
        plain, revision = hub.split_revision(name)
        return hub.download_model(plain, revision, ("*.json", "*.safetensors", "*.bin", "*.txt"))
    except ImportError as error:
        raise UserError(f"backbone '{name}' needs the package huggingface_hub: {cure}") from error
    except Exception as error:  # offline, unknown and gated names raise unrelated types
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"backbone '{name}' cannot be downloaded ({reason}): {cure}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _load_converted(path: Path) -> StoredBackbone:
    import jax
    import orbax.checkpoint as ocp

    text = read_json(path / DESCRIPTION)
    family = text.get("family")
    if text.get("format") != _FORMAT or family not in FAMILIES:
        raise UserError(
            f"'{path / DESCRIPTION}' has format {text.get('format')!r}, family {family!r}; this "
            f"version reads format {_FORMAT}, families {', '.join(FAMILIES)}"
        )
    cfg: E2D2Config | DiTConfig
    try:
        fields = dict(text["config"])
        if family == "e2d2":
            scaling = fields.get("rope_scaling")
            fields["rope_scaling"] = None if scaling is None else Llama3Scaling(**scaling)
            cfg = E2D2Config(**{**fields, "kv_layers": tuple(fields["kv_layers"])})
            tree = e2d2.parameter_shapes(cfg)
        else:
            cfg = DiTConfig(**fields)
            tree = dit.parameter_shapes(cfg)
        dtype = stored_dtype(text["stored_dtype"])
    except (KeyError, TypeError) as error:
        raise UserError(f"'{path / DESCRIPTION}' is incomplete: {error}") from error
    device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    shapes = torch_bridge.flatten(tree)
    target = {p: jax.ShapeDtypeStruct(s, dtype, sharding=device) for p, s in shapes.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            loaded = checkpointer.restore(
                (path / _PARAMS).resolve(), torch_bridge.unflatten(target)
            )
    except Exception as error:  # orbax and tensorstore raise a dozen types for damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot restore '{path / _PARAMS}': {reason}") from error
    params = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), loaded)
    return StoredBackbone(cfg, params, text["provenance"], path, text["source"])


# ---------------------------------------------------------------------------------------- saving
def save_converted(directory: str | Path, backbone: StoredBackbone, dtype: str = "float32") -> None:
    """Writes an Orbax checkpoint of the parameters, `backbone.json` and the tokenizer files.

    Args:
        directory: Empty or new directory.
        backbone: What to write.
        dtype: Stored dtype: float32, bfloat16 or float16.
    """
    import jax
    import orbax.checkpoint as ocp

    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    stored = stored_dtype(dtype)
    params = jax.tree.map(lambda x: np.asarray(x).astype(stored), dict(backbone.params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _PARAMS, params)
    for file in backbone.tokenizer_files:
        shutil.copyfile(file, directory / file.name)
    description = {
        "format": _FORMAT,
        "family": backbone.family,
        "stored_dtype": dtype,
        "config": dataclasses.asdict(backbone.config),
        "provenance": backbone.provenance,
        "source": backbone.source,
    }
    atomic_write_json(directory / DESCRIPTION, description)


def save_hub(directory: str | Path, backbone: StoredBackbone, dtype: str = "float32") -> None:
    """Writes a hub directory (config.json, base_config.json of E2D2, weights, tokenizer).

    Args:
        directory: Target; made when missing.
        backbone: What to write.
        dtype: Stored dtype: float32, bfloat16 or float16.
    """
    if isinstance(backbone.config, DiTConfig):
        dit_bridge.save_directory(
            directory,
            backbone.config,
            backbone.params,
            dtype=dtype,
            tokenizer_files=backbone.tokenizer_files,
            source_config=backbone.source.get("config"),
        )
        return
    save_hf_directory(
        directory,
        backbone.config,
        backbone.params,
        dtype=dtype,
        tokenizer_files=backbone.tokenizer_files,
        source_config=backbone.source.get("config"),
        source_base_config=backbone.source.get("base_config"),
    )


def write_directory(target: str | Path, write: Callable[[Path], Any], force: bool = False) -> None:
    """Fills a directory that appears at once when complete.

    Args:
        target: The directory; its parent is made when missing.
        write: Called with an empty directory to fill.
        force: Replace a backbone that is already there.

    Raises:
        UserError: The target exists and `force` is off, or it is not a backbone.
    """
    target = Path(target).expanduser().resolve()
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not force:
        raise UserError(f"'{target}' exists: choose another target or give --force")
    names = (DESCRIPTION, "config.json")
    if occupied and not any((target / name).is_file() for name in names):
        raise UserError(f"'{target}' is not a backbone directory, so --force will not replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        write(partial)
        partial.chmod(0o755)
        if target.exists():
            doomed = partial.with_suffix(".old")
            os.rename(target, doomed)
            os.rename(partial, target)
            shutil.rmtree(doomed)
        else:
            os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
