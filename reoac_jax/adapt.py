"""From a language model to a diffusion language model: an E2D2 that starts from its weights.

The encoder is the whole language model, the decoder its top layers under the same weights, and
decoder layer i reads the keys and values of the encoder layer it is tied to ("shared KV", the
recipe by which Arriola et al., 2025, fine-tune Qwen3). The only new parameter is the embedding of
the mask token (and its column of a free head).
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from common.errors import UserError
from common.lm import source
from common.lm.config import DecoderConfig
from common.lm.layers import Params
from common.lm.weights import Model, load_model
from reoac_jax.backbone.e2d2 import E2D2Config
from reoac_jax.tokenizer import Tokenizer, load_tokenizer


class Adapted(NamedTuple):
    """A network with the weights it starts from.

    Attributes:
        network: static description.
        params: float32 parameter tree (NumPy arrays).
        tokenizer: the language model's own.
        directory: where the language model lies, with its tokenizer files.
        origin: what it was, for the record.
    """

    network: E2D2Config
    params: Params
    tokenizer: Tokenizer
    directory: Path
    origin: dict[str, str]


def adapt(config: ConfigDict) -> Adapted:
    """The E2D2 that config.pretrain.init_from makes.

    Args:
        config: finalized tree; pretrain.{init_from, decoder_layers, block_size}, lengths and dtype.

    Raises:
        UserError: no such model, an unsupported one, or sizes that do not fit it.
    """
    p = config.pretrain
    found = source.resolve(p.init_from, key="pretrain.init_from")
    model = load_model(found.path)
    tokenizer = load_tokenizer(config.backbone.tokenizer_name_or_path or found.path)
    network, params = from_decoder(
        model,
        tokenizer,
        decoder_layers=p.decoder_layers or -(-model.cfg.num_layers // 2),
        block_size=p.block_size,
        length=config.backbone.max_length + config.rollout.gen_len,
        score_mode=config.backbone.score_mode or "left_to_right",
        dtype=config.backbone.dtype,
    )
    return Adapted(network, params, tokenizer, found.path, found.record())


def from_decoder(
    model: Model,
    tokenizer: Tokenizer,
    *,
    decoder_layers: int,
    block_size: int,
    length: int,
    score_mode: str = "left_to_right",
    dtype: str = "float32",
) -> tuple[E2D2Config, Params]:
    """Rearranges the weights of a decoder-only language model.

    Args:
        model: Llama, Qwen2 or Qwen3.
        tokenizer: its own; the mask becomes the id behind all of the model's rows.
        decoder_layers: how many top layers denoise.
        block_size: S, tokens per block.
        length: longest sequence of training.
        score_mode, dtype: of the network.

    Returns:
        The network and its parameters.

    Raises:
        UserError: the decoder would be deeper than the model, or the tokenizer larger.
    """
    cfg = model.cfg
    if not 0 < decoder_layers <= cfg.num_layers:
        raise UserError(
            f"config key pretrain.decoder_layers={decoder_layers}: the language model has "
            f"{cfg.num_layers} layers"
        )
    if len(tokenizer) > cfg.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} ids, the language model {cfg.vocab_size} rows: "
            "set backbone.tokenizer_name_or_path to the tokenizer it was trained with"
        )
    host = jax.tree.map(lambda x: np.asarray(x, np.float32), model.params)
    params: dict[str, Any] = {
        "embed": {"embedding": _with_mask_row(host["embed"]["embedding"])},
        "encoder": {
            "layers": jax.tree.map(lambda *x: np.stack(x), *host["layers"]),
            "norm_final": host["norm_final"],
        },
    }
    if not cfg.tie_embeddings:
        params["head"] = {"kernel": _with_mask_row(host["head"]["kernel"].T).T}
    first = cfg.num_layers - decoder_layers
    network = E2D2Config(
        vocab_size=cfg.vocab_size + 1,
        mask_id=cfg.vocab_size,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        num_encoder_layers=cfg.num_layers,
        num_decoder_layers=decoder_layers,
        block_size=block_size,
        length=length,
        tie_head=cfg.tie_embeddings,
        share_kv=True,
        tie_encoder_decoder=True,
        kv_layers=tuple(range(first, cfg.num_layers)),
        keep_clean_bos=False,
        score_mode=score_mode,
        dtype=dtype,
        **_layer_sizes(cfg),
    )
    return network, params


def _layer_sizes(cfg: DecoderConfig) -> dict[str, Any]:
    """The fields that both descriptions have under the same names."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "rms_eps",
        "qk_norm",
        "qkv_bias",
    )
    return {name: getattr(cfg, name) for name in names}


def _with_mask_row(table: np.ndarray) -> np.ndarray:
    """A table [V, D] with one more row, the mean of the others: like any token, like none."""
    return np.concatenate([table, table.mean(axis=0, keepdims=True)])
