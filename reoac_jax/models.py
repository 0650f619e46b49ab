"""Everything frozen at start-up: the backbone, its tokenizer, and the vocabulary's tables."""

import dataclasses
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from common.errors import UserError
from common.lm.layers import Params
from common.lm.lora import LoraSettings
from reoac_jax.backbone import toy
from reoac_jax.backbone.base import Backbone
from reoac_jax.backbone.dit import SCORE_MODES as DIT_SCORE_MODES
from reoac_jax.backbone.dit import DiTConfig
from reoac_jax.backbone.dit_backbone import with_tokenizer_ids
from reoac_jax.backbone.e2d2 import SCORE_MODES as E2D2_SCORE_MODES
from reoac_jax.backbone.store import EMBEDDED_NAME, StoredBackbone, load_backbone
from reoac_jax.lora import lora_finetuning, make_adapter
from reoac_jax.scratch import NetworkConfig, make_backbone, network_config
from reoac_jax.tables import Tables, build_tables
from reoac_jax.tokenizer import EMBEDDED_DIR, Tokenizer, load_tokenizer
from reoac_jax.types import SpecialIds

SCRATCH = "scratch"
"""backbone.model_name_or_path of a network with random weights and the sizes of config.model."""


class Models(NamedTuple):
    """A loaded language model.

    Attributes:
      provenance: where every size and id of the backbone came from.
      lora: the adapter's settings with finetune_mode="lora"; `params` is then {"base", "lora"}.
    """

    backbone: Backbone
    params: Params
    tokenizer: Tokenizer
    tables: Tables
    provenance: dict[str, str]
    lora: LoraSettings | None = None


def load_models(config: ConfigDict) -> Models:
    """Load what config.backbone names.

    Raises:
      UserError: weights or tokenizer are missing or do not fit each other.
    """
    b = config.backbone
    network: NetworkConfig | None = None
    if b.name == "simple":
        if b.block_cache:
            raise UserError(
                "config key backbone.block_cache=True: backbone.name=simple has no blocks"
            )
        tokenizer = load_tokenizer(b.tokenizer_name_or_path or EMBEDDED_DIR)
        special = _special(tokenizer, _mask_id(tokenizer))
        backbone = toy.simple_backbone(len(tokenizer), b.hidden_size, special, b.max_length)
        params = jax.jit(backbone.init)(jax.random.key(config.seed))
        provenance = {"weights": "random"}
    elif b.model_name_or_path == SCRATCH:
        tokenizer = load_tokenizer(b.tokenizer_name_or_path or EMBEDDED_DIR)
        network = network_config(config, tokenizer)
        backbone = make_backbone(network, b.block_cache)
        params = jax.jit(backbone.init)(jax.random.key(config.seed))
        provenance = {"weights": "random"}
    else:
        hub = load_backbone(b.model_name_or_path, family=_family(b.name, b.model_name_or_path))
        tokenizer = load_tokenizer(b.tokenizer_name_or_path or hub.directory)
        network = _stored_network(config, hub, tokenizer)
        backbone, params, provenance = (
            make_backbone(network, b.block_cache),
            hub.params,
            hub.provenance,
        )
    if tokenizer.source:
        provenance = {**provenance, "tokenizer": tokenizer.source}
    if len(tokenizer) > backbone.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} ids, the backbone {backbone.vocab_size}: set "
            "backbone.tokenizer_name_or_path to the tokenizer it was trained with"
        )
    tables = build_tables(
        tokenizer.vocab_strings,
        _special(tokenizer, backbone.mask_id),
        config.relation.strings,
        vocab_size=backbone.vocab_size,
    )
    settings = None
    if config.finetune_mode == "lora":
        if network is None:
            raise UserError(
                "config key finetune_mode=lora: backbone.name=simple has no projections"
            )
        adapter, settings = make_adapter(config, network)
        params = {"base": params, "lora": adapter}
        backbone = dataclasses.replace(backbone, finetuning=lora_finetuning(settings))
    return Models(backbone, params, tokenizer, tables, provenance, settings)


def _family(name: str, path: str) -> str | None:
    """What the files must be: a mistaken name is found before any other mismatch.

    Raises:
      UserError: the bundled weights are of another family.
    """
    if path == EMBEDDED_NAME and name != "e2d2":
        raise UserError(
            f"config key backbone.name={name}: no bundled weights; set backbone.model_name_or_path "
            f"to a model directory, or train one with --mode=pretrain"
        )
    return name


def _stored_network(config: ConfigDict, hub: StoredBackbone, tokenizer: Tokenizer) -> NetworkConfig:
    """A stored network in the score mode and dtype of the config.

    Raises:
      UserError: the network has no such score mode.
    """
    b = config.backbone
    allowed = E2D2_SCORE_MODES if hub.family == "e2d2" else DIT_SCORE_MODES
    if b.score_mode and b.score_mode not in allowed:
        raise UserError(
            f"config key backbone.score_mode={b.score_mode!r}: {hub.family} has "
            + ", ".join(allowed)
        )
    network = hub.config
    mode = b.score_mode or network.score_mode
    if isinstance(network, DiTConfig):
        network = with_tokenizer_ids(network, tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
    return dataclasses.replace(network, score_mode=mode, dtype=b.dtype)


def _special(tokenizer: Tokenizer, mask_id: int) -> SpecialIds:
    return SpecialIds(tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, mask_id)


def _mask_id(tokenizer: Tokenizer) -> int:
    return tokenizer.mask_id if tokenizer.mask_id is not None else len(tokenizer) - 1
