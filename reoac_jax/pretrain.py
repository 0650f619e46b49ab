"""--mode=pretrain: train a backbone by denoising answers, and export it.

This is the command that made the bundled weights, from scratch on generated problems: a network of
the tokenizer's size (a single-block E2D2 or an MDLM by masked diffusion, a SEDD by score entropy,
see `masked_diffusion`). With pretrain.init_from it starts from a language model instead
(`reoac_jax.adapt`), whose tokenizer it keeps. It keeps an exponential moving average, evaluates the
plain confidence sampler at several numbers of forward passes, and writes the average in the hub
layout, from which every other mode loads it through the bridge.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from common import dist, flags, log
from common.checkpoint import Checkpointer
from common.errors import UserError
from common.lm.layers import Params
from common.metrics import MetricWriter, StepTimer, peak_memory
from common.optim import ema_update, make_optimizer
from common.rundir import RunDir, atomic_write_json
from common.signals import StopRequest
from common.statistics import wilson_interval
from reoac_jax.adapt import adapt
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.backbone.dit import DiTConfig
from reoac_jax.backbone.dit_bridge import save_directory
from reoac_jax.backbone.e2d2_bridge import save_hf_directory
from reoac_jax.corpus import Encoded, encode_supervised, lay_out
from reoac_jax.data import load_records
from reoac_jax.masked_diffusion import loss_of
from reoac_jax.rewards import Grader
from reoac_jax.samplers import confidence_decode
from reoac_jax.scratch import NetworkConfig, make_backbone, network_config
from reoac_jax.tokenizer import EMBEDDED_DIR, Tokenizer, load_tokenizer
from reoac_jax.types import BatchArray

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHAPE_SECTIONS = (
    "model",
    "backbone.max_length",
    "rollout.gen_len",
    "seed",
    "pretrain.batch_size",
    "pretrain.stage_steps",
    "pretrain.stage_max_ops",
    "pretrain.lr",
    "pretrain.corpus_size",
    "pretrain.init_from",
    "pretrain.decoder_layers",
    "pretrain.block_size",
    "pretrain.final_lr",
    "dataset",
)


@flax.struct.dataclass
class PretrainState:
    """Parameters, their moving average, optimizer state and the number of updates done."""

    params: Params
    average: Params
    opt_state: Any
    step: jax.Array


class Stage(NamedTuple):
    """A part of the curriculum: updates first..last-1 on problems of up to max_ops operations."""

    first: int
    last: int
    max_ops: int


class Corpus(NamedTuple):
    """Training examples on the device: tokens [N, L], prompt_len [N], target [N, G], int32."""

    tokens: BatchArray
    prompt_len: BatchArray
    target: BatchArray


def stages_of(config: ConfigDict) -> list[Stage]:
    """The curriculum of config.pretrain: short problems first, the whole range last.

    Raises:
      UserError: the two tuples do not fit each other.
    """
    steps, ops = config.pretrain.stage_steps, config.pretrain.stage_max_ops
    if len(steps) != len(ops) or not steps or min(steps) < 1:
        raise UserError(
            f"config keys pretrain.stage_steps={steps} and pretrain.stage_max_ops={ops} must be "
            "tuples of one length with positive steps"
        )
    ends = np.cumsum(steps).tolist()
    return [Stage(end - n, end, m) for n, end, m in zip(steps, ends, ops, strict=True)]


def stage_corpus(
    config: ConfigDict, stage: Stage, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[Corpus, int]:
    """Training arrays of a stage, on the devices, and the number of examples cut.

    Prompt and canvas are only as wide as the stage's problems need, so early updates are cheap.
    """
    sized = config.copy_and_resolve_references()
    sized.unlock()
    sized.dataset.train_size = config.pretrain.corpus_size
    sized.dataset.max_ops = min(stage.max_ops, config.dataset.max_ops)
    records = load_records(sized, "train")
    limits = config.backbone.max_length, config.rollout.gen_len
    full = encode_supervised(records, tokenizer, *limits)
    whole = stage.max_ops >= config.dataset.max_ops
    width = limits[0] if whole else min(limits[0], -(-int(full.prompt_len.max()) // 4) * 4)
    gen_len = limits[1] if whole else min(limits[1], -(-int(full.target_len.max()) // 2) * 2)
    prompt, target = full.prompt[:, :width], full.target[:, :gen_len]
    tokens = lay_out(prompt, full.prompt_len, target, tokenizer.pad_id)
    return dist.replicate(mesh, Corpus(tokens, full.prompt_len, target)), full.num_cut


def canvas_of(tokens: BatchArray, prompt_len: BatchArray, prompt_width: int) -> Canvas:
    """A Canvas without key tokens, for training and plain sampling."""
    batch = tokens.shape[0]
    return Canvas(
        tokens=tokens,
        prompt_len=prompt_len,
        key_mask=jnp.zeros((batch, prompt_width), bool),
        row_id=jnp.arange(batch, dtype=jnp.uint32),
    )


def train_steps(
    backbone: Backbone,
    network: NetworkConfig,
    optimizer: optax.GradientTransformation,
    corpus: Corpus,
    mesh: Mesh,
    settings: "_StepSettings",
    key: jax.Array,
    state: PretrainState,
    num_steps: int,
) -> tuple[PretrainState, dict[str, jax.Array]]:
    """Several updates in one compiled call; metrics are means over them."""
    rows = NamedSharding(mesh, PartitionSpec(dist.DATA_AXIS))
    batch = settings.batch_size
    prompt_width = corpus.tokens.shape[1] - corpus.target.shape[1]
    canvas_loss = loss_of(network)

    def one(state: PretrainState, _: None) -> tuple[PretrainState, dict[str, jax.Array]]:
        index_key, noise_key = jax.random.split(jax.random.fold_in(key, state.step))
        index = jax.random.randint(index_key, (batch,), 0, corpus.tokens.shape[0])
        part = jax.tree.map(lambda x: x[index], corpus)
        part = jax.lax.with_sharding_constraint(part, rows)
        canvas = canvas_of(part.tokens, part.prompt_len, prompt_width)

        def loss_fn(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            return canvas_loss(params, backbone, canvas, part.target, noise_key, batch)

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = ema_update(state.average, params, state.step, settings.ema_decay)
        metrics |= {"pretrain/loss": loss, "pretrain/grad_norm": optax.global_norm(grads)}
        return PretrainState(params, average, opt_state, state.step + 1), metrics

    state, history = jax.lax.scan(one, state, None, length=num_steps)
    return state, {name: value.mean() for name, value in history.items()}


def make_sampler(backbone: Backbone, name: str, value: float, gen_len: int) -> Callable[..., Any]:
    """Compiled confidence sampler: name "steps" (value passes) or "threshold" (value = tau)."""
    steps = int(value) if name == "steps" else gen_len
    tau = None if name == "steps" else float(value)
    return jax.jit(functools.partial(confidence_decode, backbone, num_steps=steps, threshold=tau))


def sampler_row(
    sampler: Callable[..., Any],
    params: Params,
    encoded: Encoded,
    golds: list[str],
    grader: Grader,
    mask_id: int,
    pad_id: int,
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """(correct bool [N], forward passes [N] int32) of a plain sampler on N problems."""
    size = min(batch_size, len(golds))
    blank = np.full((size, encoded.target.shape[1]), mask_id, np.int32)
    pending, forwards = [], []
    for start in range(0, len(golds), size):
        index = np.minimum(np.arange(start, start + size), len(golds) - 1)
        keep = min(size, len(golds) - start)
        tokens = lay_out(encoded.prompt[index], encoded.prompt_len[index], blank, pad_id)
        canvas = canvas_of(tokens, encoded.prompt_len[index], encoded.prompt.shape[1])
        done = jax.device_get(sampler(params, canvas))
        pending.append(grader.submit(done.gen_ids[:keep], golds[start : start + keep]))
        forwards.append(done.forwards[:keep])
    correct = np.concatenate([p.result().rewards for p in pending]) > 0
    return correct, np.concatenate(forwards)


def pretrain(
    config: ConfigDict, run: RunDir, on_start: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train, evaluate, export; resumes from the run's last checkpoint.

    Args:
      config: finalized tree.
      run: run directory.
      on_start: called when data and checkpoint are accepted, before anything is written.

    Returns:
      {"model": exported directory, "curve": accuracy of the plain samplers on held-out problems}.

    Raises:
      UserError: bad settings or data. Interrupted: stopped on request after a save.
    """
    p = config.pretrain
    mesh = dist.make_mesh(config.parallel.num_devices)
    source = Path(config.backbone.tokenizer_name_or_path or EMBEDDED_DIR)
    initial: Params | None = None
    if p.init_from:
        adapted = adapt(config)
        network: NetworkConfig = adapted.network
        initial, tokenizer, source = adapted.params, adapted.tokenizer, adapted.directory
    else:
        tokenizer = load_tokenizer(source)
        network = network_config(config, tokenizer)
    backbone = make_backbone(network, config.backbone.block_cache)
    width, gen_len = config.backbone.max_length, config.rollout.gen_len
    stages = stages_of(config)
    total = stages[-1].last
    held_out = list(load_records(config, "test", config.eval.limit))
    held = encode_supervised(held_out, tokenizer, width, gen_len)
    golds = [str(r["target_answer"]) for r in held_out]

    optimizer = make_optimizer(
        p.lr,
        betas=(0.9, 0.98),
        weight_decay=p.weight_decay,
        grad_clip=p.grad_clip,
        warmup=p.warmup,
        schedule="cosine",
        total_steps=total,
        final=p.final_lr,
    )
    init_key, step_key = jax.random.split(jax.random.key(config.seed))

    def fresh(key: jax.Array, initial: Params | None) -> PretrainState:
        params = backbone.init(key) if initial is None else initial
        average = jax.tree.map(jnp.copy, params)
        return PretrainState(params, average, optimizer.init(params), jnp.int32(0))

    state = dist.replicate(mesh, jax.jit(fresh)(init_key, initial))
    step_fn = jax.jit(
        functools.partial(train_steps, backbone, network, optimizer),
        static_argnames=("mesh", "settings", "num_steps"),
        donate_argnames=("state",),
    )
    frozen = _StepSettings(batch_size=p.batch_size, ema_decay=p.ema_decay)
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    log.info("network of %d parameters, %d updates", num_params, total)
    samplers = {
        (name, value): make_sampler(backbone, name, value, gen_len)
        for name, values in (("steps", p.eval_steps), ("threshold", p.eval_thresholds))
        for value in values
    }
    with (
        StopRequest() as stop,
        Checkpointer(
            run.checkpoints,
            keep=config.checkpoint.keep,
            settings=flags.select(config, SHAPE_SECTIONS),
        ) as checkpoints,
        MetricWriter(run.path, dist.is_main(), config.logging.tensorboard) as writer,
        Grader(
            tokenizer,
            network.mask_id,
            cut_at_eos=True,
            task=config.dataset.task,
            workers=config.reward.workers,
            time_limit=config.reward.time_limit,
        ) as grader,
    ):
        step = 0
        if config.checkpoint.resume and checkpoints.latest_step() is not None:
            state, _ = checkpoints.restore(state)
            step = int(state.step)
            log.info("resuming at update %d", step)
        on_start()
        writer.truncate_after(step)
        timer = StepTimer()

        def curve_now(kinds: tuple[str, ...]) -> list[dict[str, Any]]:
            rows = []
            for (name, value), sampler in samplers.items():
                if name not in kinds:
                    continue
                correct, forwards = sampler_row(
                    sampler, state.average, held, golds, grader, network.mask_id, tokenizer.pad_id
                )
                rows.append(
                    {
                        "sampler": name,
                        "setting": value,
                        "forwards": float(forwards.mean()),
                        "accuracy": float(correct.mean()),
                        "accuracy_interval": list(wilson_interval(int(correct.sum()), len(golds))),
                        "n": len(golds),
                    }
                )
            return rows

        with tqdm(total=total, initial=step, unit="update", disable=not dist.is_main()) as bar:
            for stage in stages:
                if step >= stage.last:
                    continue
                corpus, num_cut = stage_corpus(config, stage, tokenizer, mesh)
                log.info(
                    "updates %d to %d: up to %d operations, canvas %d, %d examples cut",
                    stage.first,
                    stage.last,
                    stage.max_ops,
                    corpus.target.shape[1],
                    num_cut,
                )
                while step < stage.last:
                    count = min(p.steps_per_dispatch, stage.last - step)
                    state, metrics = step_fn(
                        corpus=corpus,
                        mesh=mesh,
                        settings=frozen,
                        key=step_key,
                        state=state,
                        num_steps=count,
                    )
                    step += count
                    values = {k: float(v) for k, v in metrics.items()}
                    if not np.isfinite(values["pretrain/loss"]):
                        raise UserError(
                            f"the loss is not finite at update {step}: lower pretrain.lr"
                        )
                    bar.update(count)
                    bar.set_postfix(
                        loss=f"{values['pretrain/loss']:.3f}",
                        token_acc=f"{values['pretrain/accuracy']:.3f}",
                    )
                    if step % p.eval_interval < count and step < total:
                        rows = curve_now(("steps",))
                        values |= {f"eval/accuracy_{r['setting']}": r["accuracy"] for r in rows}
                        shown = " ".join(f"{r['setting']}:{r['accuracy']:.3f}" for r in rows)
                        tqdm.write(f"update {step}: exact match by forward passes {shown}")
                    timing = timer.finish({"examples": count * p.batch_size})
                    writer.write(step, values | timing | peak_memory())
                    if step % p.checkpoint_interval < count or step == total or stop.requested:
                        checkpoints.save(step, state, {"step": step})
                        stop.check(f"update {step}")
        rows = curve_now(("steps", "threshold"))
    output = Path(p.output or run.path / "model")
    average = jax.device_get(state.average)
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    same = source.resolve() == output.resolve()
    if isinstance(network, DiTConfig):
        save_directory(output, network, average, tokenizer_files=[] if same else files)
    else:
        save_hf_directory(output, network, average, tokenizer_files=[] if same else files)
    report = {"model": str(output), "parameters": num_params, "updates": step, "curve": rows}
    atomic_write_json(run.path / "pretrain.json", report)
    print(f"\nplain confidence sampler on {len(golds)} held-out problems")
    print(f"{'sampler':12} {'setting':>8} {'forwards':>9} {'exact match':>12}")
    for row in rows:
        print(
            f"{row['sampler']:12} {row['setting']:>8} {row['forwards']:9.2f} "
            f"{row['accuracy']:11.1%}"
        )
    print(f"model written to {output}")
    run.finish()
    return report


class _StepSettings(NamedTuple):
    """The settings that `train_steps` reads; a static jit argument."""

    batch_size: int
    ema_decay: float
