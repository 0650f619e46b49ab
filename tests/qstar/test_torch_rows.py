"""Rows of a transformers model against the same model reading each whole text by itself."""

import numpy as np
import pytest

from common.errors import UserError
from qstar.torch_rows import TorchRows, load_torch_model

pytestmark = pytest.mark.torch


def tiny(kind):
    """A random model of two layers; GPT-2 has learned positions, Mistral a sliding window."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        cfg = transformers.GPT2Config(
            vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
        )
        return transformers.GPT2LMHeadModel(cfg).eval()
    cfg = transformers.MistralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=6,
        initializer_range=0.5,
    )
    return transformers.MistralForCausalLM(cfg).eval()


def alone(model, text):
    import torch

    with torch.no_grad():
        return model(torch.tensor([text])).logits[0, -1].numpy()


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_rows_of_any_length_come_and_go(kind):
    model = tiny(kind)
    rows = TorchRows(model, 3)
    rng = np.random.default_rng(0)
    texts: list[list[int]] = [[], [], []]

    def put(at, lengths):
        prompts = [rng.integers(0, 50, n).tolist() for n in lengths]
        rows.put(at, prompts)
        for row, prompt in zip(at, prompts, strict=True):
            texts[row] = prompt

    def read(active):
        tokens = rng.integers(0, 50, 3)
        logits = rows.read(tokens, np.array(active)).numpy()
        for row in range(3):
            if active[row]:
                texts[row].append(int(tokens[row]))
                np.testing.assert_allclose(
                    logits[row], alone(model, texts[row]), atol=2e-5, err_msg=str(texts)
                )

    put([0, 1], [4, 0])  # an empty prefix beside another, row 2 idle
    for active in ([1, 1, 0], [1, 1, 0], [0, 1, 0]):
        read(np.array(active, bool))
    put([2, 0], [9, 1])  # longer than everything so far; row 1 goes on
    for _ in range(3):
        read(np.array([True, True, True]))
    put([1], [0])  # nothing to read before the first token
    read(np.array([True, True, False]))
    put([0, 1, 2], [2, 3, 1])
    assert rows._columns == 3  # nobody owns the columns in front any more
    read(np.array([True, True, True]))
    assert rows.lengths.tolist() == [3, 4, 2] and rows.token_bytes > 0


def test_a_spoilt_row_does_not_outlive_its_prompt():
    model = tiny("gpt2")
    rows = TorchRows(model, 2)
    rows.put([0, 1], [[1, 2, 3], [4]])
    for own in (*rows._keys, *rows._values):
        own[0] = float("nan")
    rows.put([0], [[5]])
    logits = rows.read(np.array([6, 7]), np.array([True, True])).numpy()
    np.testing.assert_allclose(logits[0], alone(model, [5, 6]), atol=2e-5)


def test_models_that_cannot_be_loaded_are_named(tmp_path):
    with pytest.raises(UserError, match="transformers cannot load"):
        load_torch_model(tmp_path, "float32", "cpu")
