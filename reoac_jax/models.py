"""Everything frozen at start-up: the backbone, its tokenizer, and the vocabulary's tables."""

import dataclasses
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from common.errors import UserError
from common.lm.layers import Params
from reoac_jax.backbone import toy
from reoac_jax.backbone.base import Backbone, e2d2_backbone
from reoac_jax.backbone.store import load_backbone
from reoac_jax.tables import Tables, build_tables
from reoac_jax.tokenizer import Tokenizer, load_tokenizer
from reoac_jax.types import SpecialIds


class Models(NamedTuple):
    """A loaded language model.

    Attributes:
      provenance: where every size and id of the backbone came from.
    """

    backbone: Backbone
    params: Params
    tokenizer: Tokenizer
    tables: Tables
    provenance: dict[str, str]


def load_models(config: ConfigDict) -> Models:
    """Load what config.backbone names.

    Raises:
      UserError: weights or tokenizer are missing or do not fit each other.
    """
    b = config.backbone
    if b.name == "simple":
        tokenizer = load_tokenizer(b.tokenizer_name_or_path or "embedded_e2d2")
        special = _special(tokenizer, _mask_id(tokenizer))
        backbone = toy.simple_backbone(len(tokenizer), b.hidden_size, special, b.max_length)
        params = jax.jit(backbone.init)(jax.random.key(config.seed))
        provenance = {"weights": "random"}
    else:
        hub = load_backbone(b.model_name_or_path)
        cfg = dataclasses.replace(
            hub.config, score_mode=b.score_mode or hub.config.score_mode, dtype=b.dtype
        )
        backbone, params, provenance = e2d2_backbone(cfg), hub.params, hub.provenance
        tokenizer = load_tokenizer(b.tokenizer_name_or_path or hub.directory)
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
    return Models(backbone, params, tokenizer, tables, provenance)


def _special(tokenizer: Tokenizer, mask_id: int) -> SpecialIds:
    return SpecialIds(tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, mask_id)


def _mask_id(tokenizer: Tokenizer) -> int:
    return tokenizer.mask_id if tokenizer.mask_id is not None else len(tokenizer) - 1
