"""What every engine has to do, written once: a stream that reads whole sequences at every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from common.engines.base import NO_TOOL, Decoding, Rollout, StreamSettings, Toolbox
from common.lm.decoder import Capture, Steering, forward, head_logits
from common.lm.sampling import fold_rows, make_sampling, sample

WIDTH = 96
TEXTS = {3: b"\n", 4: b"\n\n", 5: b".\n", 6: b"\nx", 7: b"ab", 8: b"", 9: b"\n\n\n", 10: b"x\n"}
STOP = 2


def token_bytes(vocab_size):
    """A vocabulary with line ends in all places, so that random models meet the delimiter."""
    return [TEXTS.get(i, b"" if i == STOP else b"w") for i in range(vocab_size)]


def random_tools(model, layers, seed=1, scale=3.0):
    """Tools at these layers with random vectors."""
    rng = np.random.default_rng(seed)
    vectors = scale * rng.normal(size=(len(layers), model.cfg.hidden_size)).astype(np.float32)
    names = tuple(f"tool_{i}" for i in range(len(layers)))
    return Toolbox(names, np.asarray(layers, np.int32), vectors)


def settings(slots=3, **changes):
    """Small settings."""
    values = dict(
        slots=slots,
        capacity=WIDTH,
        layers=(1, 0),
        delimiter="\n\n",
        probe_tokens=4,
        probe_branches=2,
        decoding=Decoding(stop_ids=(STOP,)),
    )
    return StreamSettings(**{**values, **changes})


@functools.partial(jax.jit, static_argnums=1)
def _read(params, cfg, ids, steering, layers, position):
    capture = Capture(layers, position[None, None])
    out = forward(params, cfg, ids[None], steering=steering, capture=capture)
    return head_logits(params, cfg, out.hidden[0, position]), out.captured[:, 0, 0]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _draw(logits, key, index, temperature, top_p):
    sampling = make_sampling(1, temperature, top_p=top_p)
    token, log_prob = sample(logits[None], fold_rows(key[None], index[None]), sampling)
    return token[0], log_prob[0]


class PlainRow:
    """One row by definition: every token from a pass over everything before it."""

    def __init__(self, model, options, tools, prompt, row):
        self.model, self.options, self.tools = model, options, tools
        self.ids = list(prompt)
        self.start = len(prompt)
        self.key = jax.random.fold_in(jax.random.key(options.decoding.seed), row)
        self.trace = []  # steered positions that stay: (position, tool, strength)
        self.text = b""

    def _pass(self, ids, trace):
        """Logits and states at the last token; one steering at a time is all the scopes need."""
        assert len(trace) < 2
        padded = np.zeros(WIDTH, np.int32)
        padded[: len(ids)] = ids
        position, tool, strength = trace[0] if trace else (0, NO_TOOL, 0.0)
        vector = np.zeros(self.model.cfg.hidden_size, np.float32)
        layer = -1
        if tool != NO_TOOL:
            vector, layer = self.tools.vectors[tool], int(self.tools.layers[tool])
        steering = Steering(
            jnp.asarray([layer], jnp.int32),
            jnp.asarray([position], jnp.int32),
            jnp.asarray(vector)[None],
            jnp.asarray([strength], jnp.float32),
        )
        layers = jnp.asarray(self.options.layers, jnp.int32)
        last = jnp.asarray(len(ids) - 1, jnp.int32)
        return _read(self.model.params, self.model.cfg, jnp.asarray(padded), steering, layers, last)

    def query(self):
        return np.asarray(self._pass(self.ids, self.trace)[1])

    def generate(self, tool, strength, budget, until, keep):
        """One continuation; `keep` makes it part of the row."""
        trace = list(self.trace)
        if tool != NO_TOOL:
            trace = [(len(self.ids) - 1, tool, strength)]
        ids, text = list(self.ids), self.text
        texts = token_bytes(self.model.cfg.vocab_size)
        decoding = self.options.decoding
        log_probs, finish = [], "length"
        while len(log_probs) < budget:
            logits, _ = self._pass(ids, trace)
            index = jnp.asarray(len(ids) - self.start)
            token, log_prob = _draw(logits, self.key, index, decoding.temperature, decoding.top_p)
            before = text.count(b"\n\n")
            ids.append(int(token))
            log_probs.append(float(log_prob))
            text += texts[ids[-1]]
            if ids[-1] in decoding.stop_ids:
                finish = "eos"
                break
            if until and text.count(b"\n\n") > before:
                finish = "delimiter"
                break
        new = ids[len(self.ids) :]
        if keep:
            self.ids, self.text = ids, text
            self.trace = trace if self.options.scope == "persistent" else []
        return Rollout(new, log_probs, finish)


def assert_same(got, want, atol=2e-5):
    """Equal rollouts."""
    assert (got.token_ids, got.finish) == (want.token_ids, want.finish)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=atol)


def play(engine, model, options, tools, prompts, plan, atol=2e-5):
    """Runs a plan through a stream and through plain rows, and compares everything on the way.

    Args:
        plan: Per step (tools [S], strengths [S], budgets [S], until [S], probes [S, L] or None).
    """
    stream = engine.open(options, tools)
    slots = options.slots
    stream.refill(range(slots), prompts, range(10, 10 + slots))
    rows = [
        PlainRow(model, options, tools, prompt, 10 + slot) for slot, prompt in enumerate(prompts)
    ]
    alive = np.ones(slots, bool)
    for chosen, strengths, budgets, until, probes in plan:
        budgets = np.where(alive, budgets, 0)
        if probes is not None:
            check_query(stream, rows, alive, atol)
            check_probe(stream, rows, alive, np.asarray(probes), atol)
            check_query(stream, rows, alive, 0.0 if engine.name == "jax" else atol)
        results = stream.commit(
            np.asarray(chosen), np.asarray(strengths, np.float32), budgets, np.asarray(until)
        )
        for slot, result in enumerate(results):
            if not budgets[slot]:
                assert result is None
                continue
            want = rows[slot].generate(
                chosen[slot], strengths[slot], int(budgets[slot]), until[slot], keep=True
            )
            assert_same(result, want, atol)
            alive[slot] = result.finish != "eos"
    check_query(stream, rows, alive, atol)
    return stream, rows


def check_query(stream, rows, alive, atol):
    """States of the active rows, zeros elsewhere."""
    states = stream.query(alive)
    for slot, row in enumerate(rows):
        want = row.query() if alive[slot] else np.zeros_like(states[slot])
        np.testing.assert_allclose(states[slot], want, atol=max(atol, 2e-5))


def check_probe(stream, rows, alive, probes, atol):
    """Tokens and confidences of every branch."""
    probe = stream.probe(probes, np.ones(probes.shape, np.float32), alive)
    for slot, row in enumerate(rows):
        for branch, tool in enumerate([NO_TOOL, *probes[slot]]):
            if not alive[slot] or (branch and tool == NO_TOOL):
                assert probe.lengths[slot, branch] == 0
                assert probe.mean_log_probs[slot, branch] == 0.0
                continue
            want = row.generate(tool, 1.0, row.options.probe_tokens, True, keep=False)
            length = probe.lengths[slot, branch]
            assert probe.token_ids[slot, branch, :length].tolist() == want.token_ids
            np.testing.assert_allclose(
                probe.mean_log_probs[slot, branch], np.mean(want.log_probs), atol=atol
            )
