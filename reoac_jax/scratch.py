"""Networks that config.model describes, and any network behind the forward contract."""

import dataclasses

from ml_collections import ConfigDict

from common.errors import UserError
from reoac_jax.backbone.base import Backbone, e2d2_backbone
from reoac_jax.backbone.dit import DiTConfig
from reoac_jax.backbone.dit_backbone import dit_backbone
from reoac_jax.backbone.e2d2 import E2D2Config
from reoac_jax.backbone.e2d2_blocks import block_scoring
from reoac_jax.tokenizer import Tokenizer

NetworkConfig = E2D2Config | DiTConfig


def make_backbone(network: NetworkConfig, block_cache: bool = False) -> Backbone:
    """The network behind the forward contract.

    Args:
      block_cache: rollouts and samplers score the active block alone (`e2d2_blocks`).

    Raises:
      UserError: block_cache needs an E2D2 that writes block after block.
    """
    if block_cache and (isinstance(network, DiTConfig) or network.score_mode != "left_to_right"):
        raise UserError(
            "config key backbone.block_cache=True needs an E2D2 with "
            f"backbone.score_mode=left_to_right, not {network.score_mode}"
        )
    if isinstance(network, DiTConfig):
        return dit_backbone(network)
    backbone = e2d2_backbone(network)
    if block_cache:
        backbone = dataclasses.replace(backbone, blocks=block_scoring(network))
    return backbone


def network_config(config: ConfigDict, tokenizer: Tokenizer) -> NetworkConfig:
    """The network of config.backbone.name with the sizes of config.model.

    Raises:
      UserError: the family or the sizes do not allow training from scratch.
    """
    if config.backbone.name == "simple":
        raise UserError("config key backbone.name=simple has no network to train: choose another")
    make = _e2d2 if config.backbone.name == "e2d2" else _dit
    return make(config, tokenizer)


def _mask_id(tokenizer: Tokenizer) -> int:
    return tokenizer.mask_id if tokenizer.mask_id is not None else len(tokenizer) - 1


def _e2d2(config: ConfigDict, tokenizer: Tokenizer) -> E2D2Config:
    """A single-block E2D2: block size = canvas length."""
    m, gen_len = config.model, config.rollout.gen_len
    if m.share_kv:
        raise UserError("config key model.share_kv=True is for adapted models; train last-hidden")
    return E2D2Config(
        vocab_size=len(tokenizer),
        mask_id=_mask_id(tokenizer),
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_encoder_layers=m.num_encoder_layers,
        num_decoder_layers=m.num_decoder_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.head_dim,
        rope_theta=m.rope_theta,
        block_size=gen_len,
        length=config.backbone.max_length + gen_len,
        score_mode="single_block",
        keep_clean_bos=False,
        dtype=config.backbone.dtype,
    )


def _dit(config: ConfigDict, tokenizer: Tokenizer) -> DiTConfig:
    """MDLM without, SEDD with time conditioning, as the released ones; the mask is the last id."""
    m, sedd = config.model, config.backbone.name == "sedd"
    if m.hidden_size % (2 * m.num_heads):
        raise UserError(
            f"config key model.hidden_size={m.hidden_size} must be a multiple of twice "
            f"model.num_heads={m.num_heads}"
        )
    mask_id = _mask_id(tokenizer)
    if mask_id != len(tokenizer) - 1:
        raise UserError(
            f"MDLM and SEDD use the last id as mask, but the tokenizer has it at {mask_id} of "
            f"{len(tokenizer)}: give backbone.tokenizer_name_or_path another tokenizer"
        )
    return DiTConfig(
        vocab_size=len(tokenizer),
        mask_id=mask_id,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        hidden_size=m.hidden_size,
        cond_dim=m.cond_dim,
        num_blocks=m.num_blocks,
        num_heads=m.num_heads,
        intermediate_size=4 * m.hidden_size,
        length=config.backbone.max_length + config.rollout.gen_len,
        dropout=0.0,
        time_conditioning=sedd,
        parameterization="sedd" if sedd else "subs",
        scale_by_sigma=sedd,
        score_mode=config.backbone.score_mode or "bidirectional",
        dtype=config.backbone.dtype,
    )
