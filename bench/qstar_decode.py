"""Speed of whole decode steps and of a generation, with two random models of SmolLM2's sizes.

Groups of `python -m qstar.bench`:
  decode  tokens with alpha, diagnostics and sampling beside the two bare forward passes of the same
          slots, and beside reading both models' weights once (the bound of a decode step).
  loop    a generation by the engine beside the plain transformers loop of `plain_torch_qstar`,
          same models, prompts and batch; tokens per second.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench import Row, TraceCounter, compare, rates, take_turns
from bench import plain_torch_qstar as plain
from bench.qstar_solvers import Clock
from common.lm.config import DecoderConfig
from common.lm.decoder import build_params, param_shapes, params_by_path
from common.lm.weights import hf_rules
from common.torch_bridge import export_state, unflatten
from qstar.backend import Request
from qstar.engine import JaxBackend, Plan, Prompts, State, decode_token, next_logits, programs
from qstar.law import LawSettings
from qstar.networks import DecoderNetwork
from qstar.slots import Columns, Decoding, empty_slots
from qstar.tilt import AlphaSettings

SMOLLM2 = DecoderConfig(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=1e5,
    tie_embeddings=True,
    max_positions=8192,
)
SMALL = DecoderConfig(
    model_type="llama",
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    tie_embeddings=True,
)
MODELS = {"smollm2": SMOLLM2, "small": SMALL}
PROMPT, TOKENS, TEMPERATURE = 32, 16, 0.8


def random_params(cfg: DecoderConfig, seed: int) -> Any:
    """Weights as large as trained ones, so that the models disagree as real ones do."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in param_shapes(cfg).items():
        size = 1.0 / np.sqrt(cfg.hidden_size)
        values = rng.standard_normal(shape, np.float32) * np.float32(size)
        flat[path] = jnp.asarray(np.ones(shape, np.float32) if path.endswith("scale") else values)
    return build_params(flat)


@functools.cache
def models_of(cfg: DecoderConfig) -> tuple[Any, Any]:
    """Two models of one size."""
    return random_params(cfg, 0), random_params(cfg, 1)


def decoding_of(cfg: DecoderConfig, new_tokens: int) -> Decoding:
    """KL-symmetric sampling without end tokens."""
    return Decoding(AlphaSettings(), LawSettings(), cfg.vocab_size, new_tokens, TEMPERATURE)


def columns_of(cfg: DecoderConfig) -> Columns:
    """One vocabulary in which nothing ends a text."""
    return Columns(None, None, None, None, jnp.zeros((cfg.vocab_size,), bool))


def prompts_of(cfg: DecoderConfig, slots: int) -> np.ndarray:
    """[S, P] token ids."""
    return np.random.default_rng(2).integers(0, cfg.vocab_size, (slots, PROMPT)).astype(np.int32)


def decode_rows(cfg: DecoderConfig, slots: int, repeats: int, clock: Clock) -> list[Row]:
    """Whole decode steps over bare forward passes."""
    params = models_of(cfg)
    network = DecoderNetwork(cfg)
    plan = Plan((network, network), decoding_of(cfg, TOKENS))
    columns, ids = columns_of(cfg), prompts_of(cfg, slots)
    empty = tuple(network.empty(slots, PROMPT + TOKENS) for _ in params)
    lengths = np.full(slots, PROMPT - 1, np.int32)
    order = np.arange(slots)
    prompts = Prompts(
        (ids, ids),
        (lengths, lengths),
        (ids[:, -1], ids[:, -1]),
        order.astype(np.int32),
        order.astype(np.uint32),
        np.zeros(slots, np.uint32),
    )
    state = State(empty_slots(slots, TOKENS), empty)
    state = programs(plan).prefill(params, state, prompts, np.uint32(0))

    def bare(params: Any, state: State) -> State:
        def body(_: int, now: State) -> State:
            x, y, caches = lax.optimization_barrier(next_logits(plan, params, now))
            # The logits are made in full, and change nothing.
            token = jnp.where(x[:, 0] + y[:, 0] > 1e30, 1, now.slots.token_theta)
            return State(now.slots.replace(token_theta=token), caches)  # type: ignore[attr-defined]

        return lax.fori_loop(0, TOKENS, body, state)

    def whole(params: Any, state: State) -> State:
        def body(_: int, now: State) -> State:
            return decode_token(plan, params, columns, now)

        return lax.fori_loop(0, TOKENS, body, state)

    def read(params: Any) -> Any:
        return [jnp.max(leaf) for leaf in jax.tree.leaves(params)]

    counter = TraceCounter()
    once, steps, reading = counter.jit(bare), counter.jit(whole), counter.jit(read)
    things = {
        "bare": lambda: once(params, state).slots.token_theta,
        "whole": lambda: steps(params, state).slots.columns,
        "read": lambda: [reading(params) for _ in range(TOKENS)],
    }
    timings = take_turns(things, repeats, counter, clock=clock)
    what = f"[{slots} slots, V={cfg.vocab_size}]"
    return [
        compare(
            f"decode {TOKENS} whole steps / bare forwards {what}", timings, "whole", "bare", 1.25
        ),
        compare(
            f"decode {TOKENS} whole steps / reading the weights {what}", timings, "whole", "read"
        ),
    ]


def torch_model(cfg: DecoderConfig, params: Any) -> Any:
    """The same model in transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        rms_norm_eps=cfg.rms_eps,
        rope_theta=cfg.rope_theta,
        tie_word_embeddings=cfg.tie_embeddings,
    )
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    model = LlamaForCausalLM(config)
    state = export_state(unflatten(params_by_path(params)), hf_rules(cfg))
    found = model.load_state_dict(
        {name: torch.from_numpy(np.array(value)) for name, value in state.items()}, strict=False
    )
    unset = set(found.missing_keys) - {"lm_head.weight"}
    if unset or found.unexpected_keys:
        raise ValueError(f"weights do not fit: {sorted(unset)} {found.unexpected_keys}")
    model.tie_weights()
    return model.eval()


def loop_rows(cfg: DecoderConfig, slots: int, repeats: int, clock: Clock) -> list[Row]:
    """The same generation by the engine and by the plain loop."""
    params, ids = models_of(cfg), prompts_of(cfg, slots)
    network = DecoderNetwork(cfg)
    plan = Plan((network, network), decoding_of(cfg, TOKENS))
    counter = TraceCounter()
    backend = JaxBackend(plan, params, columns_of(cfg), slots, 0, PROMPT, prefill_rows=slots)
    requests = [Request(i, 0, row.tolist(), row.tolist()) for i, row in enumerate(ids)]
    order = list(range(slots))

    def engine() -> Any:
        backend.prefill(order, requests)
        backend.step()
        backend.wait()
        outputs = backend.read(order)
        backend.release(order)
        return [output.columns for output in outputs]

    torch_models = [torch_model(cfg, own) for own in params]
    things = {
        "plain": lambda: plain.generate(torch_models, ids, TOKENS, TEMPERATURE)[0],
        "engine": engine,
    }
    timings = take_turns(things, max(repeats // 3, 1), counter, clock=clock)
    amount = slots * TOKENS
    name = f"loop tokens, engine / plain transformers loop [{slots} slots, V={cfg.vocab_size}]"
    return [rates(name, timings, ("plain", amount), ("engine", amount), 1.0)]
