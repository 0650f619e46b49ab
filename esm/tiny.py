"""A random model of a few thousand weights with a real tokenizer: every code path in seconds.

The vocabulary is bytes plus the blank line, so that random answers reach control points.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np

from common.lm.config import DecoderConfig

NAME = "tiny"
_SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=4096,
)
_VERSION = 1


def tiny_model(seed: int = 0) -> Path:
    """Directory of the model in hub layout, made on first use.

    Args:
        seed: of the weights.
    """
    from common.lm.source import cache_root

    target = cache_root() / f"esm-tiny-{seed}-{_VERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        _write(temporary, seed)
        temporary.rename(target)
    except OSError:
        # Another process was first; its model is the same.
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.is_dir():
            raise
    return target


def _write(directory: Path, seed: int) -> None:
    import jax.numpy as jnp

    from common.lm.decoder import build_params, param_shapes
    from common.lm.weights import Model, save_model

    size, blank_line, stop = _write_tokenizer(directory)
    cfg = dataclasses.replace(_CONFIG, vocab_size=size)
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in param_shapes(cfg).items():
        if path.endswith("/scale"):
            flat[path] = np.ones(shape, np.float32)
        else:
            flat[path] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
    # Answers of a uniform draw would reach a blank line once in vocabulary-size tokens.
    head = flat["head/kernel"]
    head[:, blank_line] = 3.0 * head[:, blank_line]
    params = build_params({path: jnp.asarray(value) for path, value in flat.items()})
    save_model(directory, Model(params, cfg, (stop,)))


def _write_tokenizer(directory: Path) -> tuple[int, int, int]:
    """Saves it; returns its size and the ids of the blank line and of the end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}"  # how byte-level BPE writes \n
    vocab = {name: i for i, name in enumerate((*_SPECIAL, *alphabet, newline * 2))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_SPECIAL[0], eos_token=_SPECIAL[2]
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(str(directory))
    return len(vocab), vocab[newline * 2], vocab[_SPECIAL[2]]
