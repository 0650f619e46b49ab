"""The halting models in plain eager PyTorch, the way they are usually written there.

A Python loop over the inner steps that asks the host after each one whether anybody still runs,
PyTorch's own cells, data made by NumPy batch by batch. Names of the weights are those that
`halting_jax.act_torch_names` and `ut_torch_names` convert, so that both sides can be compared.
"""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional as F

from halting_jax.signals import make_signals
from halting_jax.types import TaskShape

PAPER_GATES = ("FFFT", "FFTF", "FTFF", "FTTF", "FTTT", "TFFF", "TFFT", "TFTT", "TTFT", "TTTF")
CELLS = {"gru": nn.GRUCell, "lstm": nn.LSTMCell, "tanh_rnn": nn.RNNCell}


class Examples(NamedTuple):
    """A batch: inputs [B, ...], which positions are there [B, C], answers and which are scored."""

    inputs: torch.Tensor
    valid: torch.Tensor
    targets: torch.Tensor
    scored: torch.Tensor


class Act(nn.Module):
    """A cell with a halting unit (Graves 2016)."""

    def __init__(self, config: ConfigDict, width: int) -> None:
        super().__init__()
        act, hidden = config.act, config.model.hidden_size
        self.rnn_cell = CELLS[act.cell](width + 1, hidden)
        self.halting_layer = nn.Linear(hidden, 1)
        nn.init.constant_(self.halting_layer.bias, act.halt_bias)
        self.limit, self.epsilon = act.time_limit, act.epsilon
        self.num_states = 2 if act.cell == "lstm" else 1

    def start(self, rows: int) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(rows, self.halting_layer.in_features),) * self.num_states

    def forward(
        self, x: torch.Tensor, state: tuple[torch.Tensor, ...], valid: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """One call: x [B, I], state entries [B, H], valid bool [B] -> (mixed state, N + R)."""
        inner, running = state, valid
        mass, cost = torch.zeros(len(x)), torch.zeros(len(x))
        mixed = tuple(torch.zeros_like(s) for s in state)
        for n in range(self.limit):
            flag = torch.full((len(x), 1), float(n == 0))
            entry = torch.cat([x, flag], dim=1)
            if self.num_states == 2:
                inner = self.rnn_cell(entry, inner)
            else:
                inner = (self.rnn_cell(entry, inner[0]),)
            p = torch.sigmoid(self.halting_layer(inner[0]))[:, 0]
            halt = running & ((mass + p >= 1 - self.epsilon) | (n == self.limit - 1))
            weight = torch.where(running, torch.where(halt, 1 - mass, p), torch.zeros_like(p))
            mixed = tuple(m + weight[:, None] * s for m, s in zip(mixed, inner, strict=True))
            cost = cost + running.float() + torch.where(halt, 1 - mass, torch.zeros_like(p))
            mass = mass + weight
            running = running & ~halt
            if not running.any():
                break
        kept = (torch.where(valid[:, None], m, s) for m, s in zip(mixed, state, strict=True))
        return tuple(kept), cost


class VectorNet(nn.Module):
    """One call reads the whole vector (parity)."""

    def __init__(self, config: ConfigDict, shape: TaskShape) -> None:
        super().__init__()
        self.cell = Act(config, shape.features)
        self.output_layer = nn.Linear(config.model.hidden_size, 1)

    def forward(self, batch: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [B], mean ponder cost)."""
        valid = batch.valid.any(dim=1)
        state, cost = self.cell(batch.inputs, self.cell.start(len(valid)), valid)
        return self.output_layer(state[0])[:, 0], cost.sum() / valid.sum()


class FramesNet(nn.Module):
    """One call per frame, an answer per frame (addition, logic)."""

    def __init__(self, config: ConfigDict, shape: TaskShape) -> None:
        super().__init__()
        self.rnn_cell = Act(config, shape.features)
        self.output_layer = nn.Linear(config.model.hidden_size, shape.places * shape.classes)
        self.classes = shape.classes

    def forward(self, batch: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [B, T] or [B, T, places, classes], mean ponder cost)."""
        state = self.rnn_cell.start(len(batch.inputs))
        logits, costs = [], []
        for t in range(batch.inputs.shape[1]):
            state, cost = self.rnn_cell(batch.inputs[:, t], state, batch.valid[:, t])
            logits.append(self.output_layer(state[0]))
            costs.append(cost)
        answers = torch.stack(logits, dim=1)
        if self.classes > 1:
            answers = answers.reshape(*answers.shape[:2], -1, self.classes)
        else:
            answers = answers[..., 0]
        return answers, torch.stack(costs).sum() / batch.valid.sum()


class GridNet(nn.Module):
    """The whole grid passes through one vector (mazes)."""

    def __init__(self, config: ConfigDict, shape: TaskShape) -> None:
        super().__init__()
        width, hidden = config.act.embedding_size, config.model.hidden_size
        self.embedding = nn.Embedding(shape.features, width)
        self.encoder = nn.Linear(shape.length * width, hidden)
        self.cell = Act(config, hidden)
        self.decoder = nn.Linear(hidden, shape.length * shape.classes)

    def forward(self, batch: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [B, S, V], mean ponder cost)."""
        context = F.relu(self.encoder(self.embedding(batch.inputs).flatten(1)))
        valid = torch.ones(len(context), dtype=torch.bool)
        state, cost = self.cell(context, self.cell.start(len(valid)), valid)
        return self.decoder(state[0]).reshape(*batch.inputs.shape, -1), cost.mean()


class LayerNorm(nn.Module):
    """With the population deviation and its epsilon outside the root."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, unbiased=False)
        return self.gamma * (x - mean) / (std + 1e-6) + self.beta


class Attention(nn.Module):
    def __init__(self, config: ConfigDict) -> None:
        super().__init__()
        ut, hidden = config.ut, config.model.hidden_size
        self.heads = ut.heads
        self.query_linear = nn.Linear(hidden, ut.key_depth, bias=False)
        self.key_linear = nn.Linear(hidden, ut.key_depth, bias=False)
        self.value_linear = nn.Linear(hidden, ut.value_depth, bias=False)
        self.output_linear = nn.Linear(ut.value_depth, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.query_linear(x), self.key_linear(x), self.value_linear(x))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.output_linear(heads.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: ConfigDict) -> None:
        super().__init__()
        hidden, width = config.model.hidden_size, config.ut.filter_size
        self.fc1, self.fc2 = nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: ConfigDict) -> None:
        super().__init__()
        self.multi_head_attention = Attention(config)
        self.positionwise_feed_forward = FeedForward(config)
        self.layer_norm_mha = LayerNorm(config.model.hidden_size)
        self.layer_norm_ffn = LayerNorm(config.model.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.multi_head_attention(self.layer_norm_mha(x))
        return x + self.positionwise_feed_forward(self.layer_norm_ffn(x))


class HaltingUnit(nn.Module):
    def __init__(self, hidden: int, bias: float) -> None:
        super().__init__()
        self.p = nn.Linear(hidden, 1)
        nn.init.constant_(self.p.bias, bias)


class Encoder(nn.Module):
    """The hops of the shared block, with halting per position where the config asks for it."""

    def __init__(self, config: ConfigDict, shape: TaskShape) -> None:
        super().__init__()
        self.settings, hidden = config.ut, config.model.hidden_size
        if config.ut.embedding_size != hidden:
            self.embedding_proj = nn.Linear(config.ut.embedding_size, hidden, bias=False)
        self.enc = Block(config)
        if config.ut.act:
            self.act_fn = HaltingUnit(hidden, config.ut.halt_bias)
        self.layer_norm = LayerNorm(hidden)
        tables = make_signals(shape.length, hidden, config.ut.max_hops, config.ut.pos)
        self.position, self.hop = (torch.tensor(np.asarray(table)) for table in tables)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, S, E] -> (normalised state [B, S, H], mean cost)."""
        settings = self.settings
        if hasattr(self, "embedding_proj"):
            x = self.embedding_proj(x)
        if not settings.act:
            for hop in self.hop:
                x = self.enc(x + self.position + hop)
            return self.layer_norm(x), torch.zeros(())
        mixed = torch.zeros_like(x)
        mass, cost = torch.zeros(x.shape[:2]), torch.zeros(x.shape[:2])
        running = torch.ones(x.shape[:2], dtype=torch.bool)
        accumulated = settings.act_mix == "accumulated"
        for number, hop in enumerate(self.hop):
            x = x + self.position + hop
            p = torch.sigmoid(self.act_fn.p(x))[..., 0]
            halt = running & (mass + p > 1 - settings.act_epsilon)
            left = 1 - mass
            nothing = torch.zeros_like(p)
            weight = torch.where(running, torch.where(halt, left, p), nothing)
            cost = cost + running.float() + torch.where(halt, left, nothing)
            mass = mass + weight
            if accumulated and number == len(self.hop) - 1:
                weight = torch.where(running, left, nothing)
            running = running & ~halt
            x = self.enc(x)
            share = weight[..., None]
            mixed = mixed + share * x if accumulated else share * x + (1 - share) * mixed
            if not running.any():
                break
        return self.layer_norm(mixed), cost.mean()


class UtNet(nn.Module):
    """The Universal Transformer on grids."""

    def __init__(self, config: ConfigDict, shape: TaskShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.features, config.ut.embedding_size)
        self.encoder = Encoder(config, shape)
        self.decoder = nn.Linear(config.model.hidden_size, shape.classes)

    def forward(self, batch: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [B, S, V], mean ponder cost)."""
        state, cost = self.encoder(self.embedding(batch.inputs))
        return self.decoder(state), cost


def make_net(config: ConfigDict, shape: TaskShape) -> nn.Module:
    """The model of a config."""
    if config.model.type == "universal_transformer":
        return UtNet(config, shape)
    return {"vector": VectorNet, "frames": FramesNet, "grid": GridNet}[shape.form](config, shape)


def loss_of(net: nn.Module, config: ConfigDict, batch: Examples) -> torch.Tensor:
    """Mean loss of the scored answers plus the weighted ponder cost."""
    logits, cost = net(batch)
    scored, targets = batch.scored, batch.targets
    if logits.ndim > targets.ndim:
        answers = F.cross_entropy(logits[scored], targets[scored])
    else:
        answers = F.binary_cross_entropy_with_logits(logits[scored], targets[scored].float())
    is_ut = config.model.type == "universal_transformer"
    tau = config.ut.act_loss_weight if is_ut else config.act.time_penalty
    return answers + tau * cost


def parity_batch(rng: np.random.Generator, rows: int, bits: int, width: int) -> Examples:
    """1..bits values of -1 and 1 in front; is the number of 1 odd?"""
    valid = np.arange(width) < rng.integers(1, bits + 1, (rows, 1))
    values = np.where(valid, rng.choice([-1.0, 1.0], (rows, width)), 0).astype(np.float32)
    return _examples(values, valid, (values > 0).sum(1) % 2, np.ones(rows, bool))


def addition_batch(rng: np.random.Generator, rows: int, steps: int, digits: int) -> Examples:
    """1..steps numbers of 1..digits digits; the digits of the sum so far, class 10 behind them."""
    valid = np.arange(steps) < rng.integers(1, steps + 1, (rows, 1))
    counts = rng.integers(1, digits + 1, (rows, steps))
    shown = rng.integers(0, 10, (rows, steps, digits))
    used = (np.arange(digits) < counts[..., None]) & valid[..., None]
    inputs = ((shown[..., None] == np.arange(10)) & used[..., None]).astype(np.float32)
    places = digits + math.ceil(math.log10(steps))
    power = 10 ** np.maximum(counts[..., None] - 1 - np.arange(digits), 0)
    sums = np.cumsum((shown * power * used).sum(-1), axis=1)
    lengths = np.maximum(1, np.floor(np.log10(np.maximum(sums, 1))).astype(int) + 1)
    exponent = lengths[..., None] - 1 - np.arange(places)
    answers = np.where(exponent >= 0, sums[..., None] // 10 ** np.maximum(exponent, 0) % 10, 10)
    scored = np.broadcast_to((valid & (np.arange(steps) > 0))[..., None], answers.shape)
    return _examples(inputs.reshape(rows, steps, -1), valid, answers, scored)


def logic_batch(rng: np.random.Generator, rows: int, steps: int, chunks: int = 10) -> Examples:
    """1..steps rows of two bits and 1..chunks gates in a chain; only the first row shows b_0."""
    valid = np.arange(steps) < rng.integers(1, steps + 1, (rows, 1))
    counts = rng.integers(1, chunks + 1, (rows, steps))
    gates = rng.integers(0, 10, (rows, steps, chunks))
    first, second = rng.integers(0, 2, rows), rng.integers(0, 2, (rows, steps))
    # Entry [gate, 2 P + Q]; the tables name TT first.
    tables = np.array([[row[3 - i] == "T" for i in range(4)] for row in PAPER_GATES], int)
    used = np.arange(chunks) < counts[..., None]
    one_hot = (gates[..., None] == np.arange(10)) & used[..., None]
    inputs = np.concatenate([np.zeros((rows, steps, 2)), one_hot.reshape(rows, steps, -1)], 2)
    inputs[:, 0, 0], inputs[:, :, 1] = first, second
    answers, before = np.zeros((rows, steps), int), first
    for t in range(steps):
        older, newer = before, second[:, t]
        for i in range(chunks):
            value = tables[gates[:, t, i], 2 * newer + older]
            older = np.where(used[:, t, i], newer, older)
            newer = np.where(used[:, t, i], value, newer)
        answers[:, t] = before = newer
    inputs = np.where(valid[..., None], inputs, 0).astype(np.float32)
    return _examples(inputs, valid, answers, valid)


def _examples(*arrays: np.ndarray) -> Examples:
    inputs, valid, targets, scored = (torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
    return Examples(inputs, valid, targets.long(), scored)


class PlainTraining:
    """The training loop of a config: data, loss, gradient, clipping, optimiser, average."""

    def __init__(self, config: ConfigDict, shape: TaskShape, mazes: Any = None) -> None:
        """Uses as many threads as there are cores for this process.

        Args:
          config: finalized tree.
          shape: of its task.
          mazes: `MazeData` for mazes.
        """
        torch.set_num_threads(threads())
        torch.manual_seed(0)
        self.config, self.net = config, make_net(config, shape)
        optim, parameters = config.optim, list(self.net.parameters())
        decay: dict[str, float] = {"weight_decay": optim.weight_decay}
        make = torch.optim.AdamW if optim.weight_decay else torch.optim.Adam
        self._optimizer = make(parameters, lr=optim.lr, **decay)
        self._average = [p.detach().clone() for p in parameters] if optim.ema.enabled else []
        self._draw = self._drawing(shape, mazes)

    def _drawing(self, shape: TaskShape, mazes: Any) -> Callable[[], Examples]:
        rng, rows, task = np.random.default_rng(0), self.config.data.batch_size, self.config.task
        if task.name == "parity":
            return lambda: parity_batch(rng, rows, task.bits, shape.length)
        if task.name == "addition":
            return lambda: addition_batch(rng, rows, task.sequence_length, task.max_digits)
        if task.name == "logic":
            return lambda: logic_batch(rng, rows, task.train_max_steps)

        def draw() -> Examples:
            chosen = rng.permutation(len(mazes.inputs))[:rows]
            inputs, labels = (x[chosen].astype(np.int64) for x in (mazes.inputs, mazes.labels))
            present = np.ones(inputs.shape, bool)
            return _examples(inputs, present, labels, present)

        return draw

    def run(self, steps: int) -> None:
        """So many optimiser steps."""
        clip, parameters = self.config.optim.clip_norm, list(self.net.parameters())
        decay = self.config.optim.ema.decay
        for _ in range(steps):
            self._optimizer.zero_grad(set_to_none=True)
            loss_of(self.net, self.config, self._draw()).backward()
            if clip:
                nn.utils.clip_grad_norm_(parameters, clip)
            self._optimizer.step()
            with torch.no_grad():
                for average, p in zip(self._average, parameters, strict=False):
                    average.lerp_(p, 1 - decay)


def threads() -> int:
    """Cores of this process: what XLA takes as well."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
