"""Random models of a few thousand weights with a byte tokenizer, for trying the whole path out.

The name "tiny:N" stands for the model of seed N; all have the same tokenizer. They are written once
into the cache in hub layout, so every backend loads them like any other model.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from common.errors import UserError

PREFIX = "tiny:"
_VERSION = 1
_SPECIAL = ("<|start|>", "<|end|>", "<|pad|>")
_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def is_tiny(name: str) -> bool:
    """Whether a model name is one of these."""
    return name.startswith(PREFIX)


def tiny_directory(name: str, root: Path) -> Path:
    """The directory of a tiny model, made where it is missing.

    Args:
        name: "tiny:N".
        root: where converted models are kept.

    Raises:
        UserError: N is no number, or the directory cannot be written.
    """
    seed = name.removeprefix(PREFIX)
    if not seed.isdigit():
        raise UserError(f"model {name!r}: a tiny model is written {PREFIX}N with a number N")
    target = root / f"qstar-tiny-{int(seed)}-{_VERSION}"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=".tiny.", suffix=".tmp"))
        try:
            _write(temporary, int(seed))
            os.chmod(temporary, 0o755)
            if not target.is_dir():
                os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        # Another process may have made it between the test and the rename.
        if not target.is_dir():
            raise UserError(f"cannot write '{target}' ({error.strerror or error})") from error
    return target


def _write(directory: Path, seed: int) -> None:
    """config.json, weights and tokenizer of one model."""
    import jax

    from common.lm.config import DecoderConfig
    from common.lm.decoder import init_params
    from common.lm.weights import Model, save_model

    tokenizer = _tokenizer()
    end = tokenizer.token_to_id(_SPECIAL[1])
    cfg = DecoderConfig(
        model_type="llama",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=1024,
    )
    # Wide weights make the distributions peaked, so that the two models differ.
    params = init_params(jax.random.key(seed), cfg, stddev=0.4)
    save_model(directory, Model(params, cfg, (end,)))
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1], "pad_token": _SPECIAL[2]}
    rest = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(names | rest, indent=2))


def _tokenizer():  # type: ignore[no-untyped-def]  # a Rust object without type information
    """One token per byte, and three special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    return tokenizer
