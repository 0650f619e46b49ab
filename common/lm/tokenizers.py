"""Tokenizers of models: loading, what each token is in bytes, and the one inside a GGUF file.

transformers (4.57 or 5) is imported when a tokenizer is loaded, not with this module.
"""

import json
from pathlib import Path
from typing import Any

from common.errors import UserError, require

# Text is cut by these before BPE; GGUF names them by model family (`tokenizer.ggml.pre`).
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GGUF_PATTERNS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}


def load_tokenizer(path: str | Path) -> Any:
    """Loads a tokenizer as a transformers fast tokenizer.

    `tokenizer.json` is taken as it stands: transformers 5 would rebuild parts of it from
    config.json for some model types. Decoding never "cleans up" blanks, so it is exact.

    Args:
        path: Directory with tokenizer.json, or with what transformers builds a tokenizer from.

    Returns:
        The tokenizer.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    directory = Path(path)
    require(directory.is_dir(), f"no tokenizer at '{path}': expected a directory")
    packed = (directory / "tokenizer.json").is_file()
    names = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
    require(
        packed or any((directory / name).is_file() for name in names),
        f"'{path}' holds no tokenizer: tokenizer.json is missing; add it, or name another model",
    )
    for name in (*names, "tokenizer.json", "special_tokens_map.json", "chat_template.jinja"):
        # transformers would go on without it, and render other prompts.
        require(not (directory / name).is_dir(), f"{directory / name} is a directory; restore it")
    import transformers

    kind = transformers.PreTrainedTokenizerFast if packed else transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # a dozen types, by the part that is damaged
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read the tokenizer in '{path}': {reason[:200]}; restore tokenizer.json and "
            "tokenizer_config.json, or name another model"
        ) from error
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def token_bytes(tokenizer: Any, *, special: bool = False) -> list[bytes]:
    """What every token contributes to the text, in bytes.

    Exact for byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and for SentencePiece vocabularies with
    byte tokens `<0x0A>`: the text of ids is the UTF-8 of their concatenated bytes (SentencePiece
    decoders then drop one leading blank). A vocabulary of whole words without a decoder is joined
    by blanks; its words carry the blank in front, and the text lacks the first one.

    Args:
        tokenizer: A fast tokenizer.
        special: Whether special tokens contribute their names, as text decoded with them has.

    Returns:
        One entry per id up to the largest; empty for ids without a token.

    Raises:
        UserError: The vocabulary is of another kind.
    """
    kind = _decoder_kind(tokenizer)
    convert = {"byte_level": _from_byte_level(), "sentencepiece": _from_pieces, "words": _word}
    vocabulary = tokenizer.get_vocab()
    hidden = set() if special else set(tokenizer.all_special_ids) | _special_ids(tokenizer)
    result = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index not in hidden:
            result[index] = convert[kind](token)
    return result


def _special_ids(tokenizer: Any) -> set[int]:
    """Added tokens marked special; `all_special_ids` knows only those with a role."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _decoder_kind(tokenizer: Any) -> str:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    require(backend is not None, "the tokenizer has no tokenizer.json: only those are supported")
    whole = json.loads(backend.to_str())
    decoder = whole.get("decoder")
    if decoder is None and whole["model"]["type"] == "WordLevel":
        return "words"
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level"
    if kinds & {"ByteFallback", "Metaspace"} or any(
        step["type"] == "Replace" and step.get("content") == " " for step in steps
    ):
        return "sentencepiece"
    raise UserError(
        f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is neither byte-level nor "
        "SentencePiece: the bytes of its tokens are not known"
    )


def _from_byte_level() -> Any:
    """Tokens of byte-level BPE, in which every byte is written as one printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + n): byte for n, byte in enumerate(others)})

    def convert(token: str) -> bytes:
        # Added tokens may hold characters outside the table (a blank): they stand for themselves.
        known = [table.get(char) for char in token]
        return token.encode() if None in known else bytes(known)  # type: ignore[arg-type]

    return convert


def _from_pieces(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _word(token: str) -> bytes:
    return b" " + token.encode()


# ------------------------------------------------------------------------------------------- GGUF
def save_gguf_tokenizer(path: Path, directory: Path) -> None:
    """Writes the tokenizer inside a GGUF file as tokenizer.json and its companions.

    Raises:
        UserError: A package is absent, or there is no tokenizer that transformers can read.
    """
    try:
        import gguf
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"reading the tokenizer of '{path.name}' needs transformers and gguf: "
            "pip install transformers gguf"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        fields = gguf.GGUFReader(path).fields
    except Exception as error:  # missing fields, unknown models: types differ between versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the tokenizer in '{path}': {reason}") from error
    field = fields.get("tokenizer.ggml.pre")
    splitter = _pre_tokenizer("" if field is None else str(field.contents()))
    if splitter is not None:
        # transformers gives every byte-level vocabulary GPT-2's rule, whatever the file says.
        tokenizer.backend_tokenizer.pre_tokenizer = splitter
    # transformers 4 does not take every role from the file.
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        stated = fields.get(f"tokenizer.ggml.{key}_token_id")
        if stated is not None:
            token = tokenizer.convert_ids_to_tokens(int(stated.contents()))
            setattr(tokenizer, f"{role}_token", token)
    tokenizer.save_pretrained(str(directory))


def _pre_tokenizer(name: str) -> Any:
    """The rule a GGUF file names, None where transformers' own reading stands."""
    from tokenizers import Regex, pre_tokenizers

    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in _GGUF_PATTERNS:
        split = pre_tokenizers.Split(Regex(_GGUF_PATTERNS[name]), behavior="isolated")
        raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, raw])
    return None
