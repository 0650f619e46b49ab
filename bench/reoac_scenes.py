"""What is measured: sizes, the bundled backbone, and random E2D2 networks of any size."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bench import TraceCounter
from common.lm.layers import Params
from configs.gsm8k import get_config
from reoac_jax.backbone import e2d2
from reoac_jax.backbone.base import Backbone, Canvas, e2d2_backbone
from reoac_jax.data import load_prompts
from reoac_jax.learner import LearnerSettings, LearnerState, init_state
from reoac_jax.models import load_models
from reoac_jax.prompts import make_canvas
from reoac_jax.settings import RolloutSettings, feature_size
from reoac_jax.tables import Tables, build_tables
from reoac_jax.types import SpecialIds


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of everything measured.

    Attributes:
      batch, horizon: rows and steps of the embedded rollout; batch 0 = the config's.
      episodes: of one plus update, a multiple of the config's group; episodes * horizon = the
        decisions of the config's update. buffer: of one paper update.
      embedded: algorithms measured on the bundled backbone.
      random: (algorithm, score mode) measured on a random E2D2.
      vocab: of the random E2D2; width, layers: its D and (encoder, decoder) depths.
      small_vocab, small_width: of a network of the bundled model's size.
      large, large_update: (B, P, G, T) of its rollouts, and of its update and micro-batches.
      features: (B, P, G).
      batches: of the episodes per second.
      score: (B, P, G, bucketed length, training length).
      decode: (batch, P, G, block size); decoded: which networks, names of
        `reoac_decode.decoding_network`.
    """

    batch: int = 0
    horizon: int = 8
    episodes: int = 640
    buffer: int = 24
    embedded: tuple[str, ...] = ("plus", "paper")
    random: tuple[tuple[str, str], ...] = (
        ("plus", "blockwise"),
        ("plus", "single_block"),
        ("paper", "blockwise"),
        ("paper", "single_block"),
    )
    vocab: int = 50258
    width: int = 256
    layers: tuple[int, int] = (4, 2)
    small_vocab: int = 768
    small_width: int = 128
    large: tuple[int, int, int, int] = (4, 64, 64, 4)
    large_update: tuple[int, int, int, int] = (16, 32, 64, 2)
    features: tuple[int, int, int] = (16, 256, 128)
    batches: tuple[int, ...] = (1, 16, 64)
    score: tuple[int, int, int, int, int] = (1, 100, 128, 256, 1024)
    decode: tuple[int, int, int, int] = (8, 48, 32, 4)
    decoded: tuple[str, ...] = (
        "bundled sizes",
        "V=50258",
        "V=50258, bfloat16",
        "e2d2-owt sizes",
        "e2d2-owt sizes, bfloat16",
    )


TINY = Sizes(
    batch=4,
    horizon=2,
    episodes=8,
    buffer=4,
    embedded=("plus",),
    random=(("paper", "single_block"),),
    vocab=96,
    width=16,
    layers=(1, 1),
    small_vocab=64,
    small_width=16,
    large=(2, 8, 8, 2),
    large_update=(2, 8, 8, 2),
    features=(2, 12, 8),
    batches=(4,),
    score=(1, 8, 8, 16, 32),
    decode=(2, 8, 8, 4),
    decoded=("bundled sizes", "V=50258, bfloat16"),
)


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything a rollout or an update needs, for one backbone.

    Attributes:
      counter: counts the traces of the backbone's functions.
      target: [B, G] int32 gold canvas; absolute, absolute_len: the paper's target.
    """

    config: ConfigDict
    backbone: Backbone
    params: Params
    tables: Tables
    canvas: Canvas
    target: np.ndarray
    absolute: np.ndarray
    absolute_len: np.ndarray
    counter: TraceCounter

    def state(self, settings: RolloutSettings) -> LearnerState:
        """A fresh learner with its own copy of the backbone (updates consume their state)."""
        config = self.config
        learner = LearnerSettings.from_config(config, settings.operators.max_cost)
        size = feature_size(settings, self.backbone.hidden_size, config.algo)
        params = jax.tree.map(jnp.copy, self.params)
        hidden = config.actor.hidden_size, config.critic.hidden_size
        return init_state(jax.random.key(1), learner, params, size, *hidden)


def counted(backbone: Backbone, counter: TraceCounter) -> Backbone:
    """The backbone with its traces counted."""
    return dataclasses.replace(
        backbone, score=counter.wrap(backbone.score), begin=counter.wrap(backbone.begin)
    )


def embedded_scene(sizes: Sizes, algo: str) -> Scene:
    """The bundled backbone with the values of configs/gsm8k.py on generated problems."""
    config = get_config("paper" if algo == "paper" else "")
    config.finetune_mode = "full"
    config.rollout.early_exit = False
    config.rollout.max_steps = sizes.horizon
    smallest = min(sizes.buffer, sizes.episodes) * config.rollout.max_steps
    config.updates.backbone_batch = min(config.updates.backbone_batch, smallest)
    batch = sizes.batch or get_config().rollout.batch_size
    config.dataset.train_size = max(batch, *sizes.batches)
    models = load_models(config)
    prompts = load_prompts(config, "train", models.tokenizer)
    rows = np.arange(len(prompts))
    backbone = models.backbone
    counter = TraceCounter()
    return Scene(
        config,
        counted(backbone, counter),
        models.params,
        models.tables,
        make_canvas(prompts, rows, rows, backbone.mask_id, backbone.pad_id),
        prompts.canvas_target,
        prompts.absolute_target,
        prompts.absolute_len,
        counter,
    )


def vocabulary(size: int) -> list[str]:
    """Made-up token strings: words, numbers and operator characters, an eos and a mask."""
    kinds = ("Ġword{}", "{}", "part{}", "Ġ{}", "x{}y", "Ġ={}", "Name{}", "+{}")
    return [kinds[i % len(kinds)].format(i) for i in range(size - 2)] + ["<eos>", "<|mask|>"]


def network(sizes: Sizes, block_size: int, length: int, mode: str) -> e2d2.E2D2Config:
    """A random E2D2 of the measured width."""
    encoder, decoder = sizes.layers
    return e2d2.E2D2Config(
        vocab_size=sizes.vocab,
        mask_id=sizes.vocab - 1,
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
        num_heads=4,
        num_kv_heads=4,
        head_dim=sizes.width // 4,
        block_size=block_size,
        length=length,
        pad_id=sizes.vocab - 2,
        bos_id=sizes.vocab - 2,
        eos_id=sizes.vocab - 2,
        score_mode=mode,
    )


def random_canvas(
    cfg: e2d2.E2D2Config, batch: int, prompt_width: int, gen_len: int, columns: int | None = None
) -> Canvas:
    """Random prompts of full width with all-mask canvases, padded to `columns` if given."""
    rng = np.random.default_rng(0)
    tokens = np.full((batch, columns or prompt_width + gen_len), cfg.pad_id, np.int32)
    tokens[:, :prompt_width] = rng.integers(0, cfg.pad_id, (batch, prompt_width))
    tokens[:, prompt_width : prompt_width + gen_len] = cfg.mask_id
    return Canvas(
        tokens=tokens,
        prompt_len=np.full(batch, prompt_width, np.int32),
        key_mask=rng.random((batch, tokens.shape[1] - gen_len)) < 0.3,
        row_id=np.arange(batch, dtype=np.uint32),
    )


def large_scene(sizes: Sizes, algo: str, mode: str, shape: tuple[int, int, int, int]) -> Scene:
    """A random E2D2 with a large vocabulary; tokens are sampled. shape = (B, P, G, T)."""
    batch, prompt_width, gen_len, horizon = shape
    config = get_config("paper" if algo == "paper" else "")
    config.finetune_mode = "full"
    config.backbone.sample_strategy = "sample"
    config.rollout.early_exit = False
    config.rollout.use_hidden = True
    config.rollout.gen_len, config.rollout.max_steps = gen_len, horizon
    config.updates.backbone_batch = batch
    config.updates.backbone_rows = 0
    config.rollout.group_size = 2
    cfg = network(sizes, 4, prompt_width + gen_len, mode)
    backbone = e2d2_backbone(cfg)
    special = SpecialIds(cfg.eos_id, cfg.pad_id, cfg.bos_id, cfg.mask_id)
    rng = np.random.default_rng(1)
    counter = TraceCounter()
    return Scene(
        config,
        counted(backbone, counter),
        backbone.init(jax.random.key(0)),
        build_tables(vocabulary(sizes.vocab), special, config.relation.strings),
        random_canvas(cfg, batch, prompt_width, gen_len),
        rng.integers(0, cfg.pad_id, (batch, gen_len)).astype(np.int32),
        rng.integers(0, cfg.pad_id, (batch, prompt_width + gen_len)).astype(np.int32),
        np.full(batch, prompt_width + gen_len, np.int32),
        counter,
    )


def first_rows(tree: Any, count: int) -> Any:
    """The first `count` rows of every array."""
    return jax.tree.map(lambda x: x[:count], tree)
