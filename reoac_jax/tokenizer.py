"""Tokenizer of the backbone: the embedded byte-level BPE, local files, or a hub name.

The embedded tokenizer gives every digit and every arithmetic sign its own token, so that the
numbers of a problem never depend on how their neighbours were merged.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from common import hub
from common.errors import UserError
from common.json_files import read_json_object
from common.rundir import atomic_write, atomic_write_json

EOS_TOKEN = "<|endoftext|>"
MASK_TOKEN = "<|mask|>"
EMBEDDED_NAME = "embedded_e2d2"
EMBEDDED_DIR = Path(__file__).parent / "assets" / EMBEDDED_NAME
_CONFIG_KEY = "backbone.tokenizer_name_or_path"
_GPT2_CHECK = (50257, "Hello world", [15496, 995])

# A word keeps its leading blank and also takes the one blank before a digit, so that a number in a
# sentence costs no token for its blank. Only words do: were a question mark to take that blank, the
# ids of a prompt would change once an answer follows it.
_PIECES = (
    r"\n#### "
    r"|\n"
    r"|[0-9]"
    r"|[-+*/=]"
    r"| ?\p{L}+(?: (?=[0-9]))?"
    r"| ?[^\s\p{L}0-9\-+*/=]+"
    r"|\s"
)


class Tokenizer:
    """Text <-> ids with the special ids the sampler needs; specials in a text are plain text.

    Attributes:
        source: "owner/name@commit" of one from the hub, else "".
    """

    source = ""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        eos: str | None = EOS_TOKEN,
        pad: str | None = None,
        bos: str | None = None,
        mask: str | None = None,
    ) -> None:
        """Wrap a tokenizer of the `tokenizers` library.

        Args:
            core: the tokenizer.
            eos: end-of-text token.
            pad: padding token; None takes `eos`.
            bos: beginning-of-text token; None takes `eos`.
            mask: mask token; None if there is none.

        Raises:
            UserError: one of the tokens is not in the vocabulary.
        """
        self.core = core
        # A prompt that spells a special token must not be able to end or mask the text.
        core.encode_special_tokens = True
        core.no_padding()
        core.no_truncation()
        self.eos_id = self._special_id(eos, "eos_token")
        self.pad_id = self.eos_id if pad is None else self._special_id(pad, "pad_token")
        self.bos_id = self.eos_id if bos is None else self._special_id(bos, "bos_token")
        self.mask_id = None if mask is None else self._special_id(mask, "mask_token")

    def _special_id(self, token: str | None, name: str) -> int:
        found = None if token is None else self.core.token_to_id(token)
        if found is None:
            raise UserError(
                f"tokenizer: {name} {token!r} is not in the vocabulary: "
                f"name an existing token as {name} in tokenizer_config.json"
            )
        return found

    def __len__(self) -> int:
        """Largest id + 1, added tokens included."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def vocab_strings(self) -> list[str]:
        """Raw token strings by id, in byte-level notation (a blank reads `Ġ`); "" for a gap."""
        strings = [""] * len(self)
        for string, token_id in self.core.get_vocab(with_added_tokens=True).items():
            strings[token_id] = string
        return strings

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added before or after."""
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text and, per id, the (start, end) character range it covers."""
        encoding = self.core.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_batch(
        self, texts: Sequence[str]
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Ids and character ranges of several texts, one list per text."""
        encodings = self.core.encode_batch(list(texts), add_special_tokens=False)
        return [item.ids for item in encodings], [item.offsets for item in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids.

        Args:
            ids: token ids; ids the tokenizer does not know (a backbone's own mask id) are dropped.
            skip_special: drop special tokens.

        Returns:
            The text; incomplete UTF-8 sequences read as the replacement character.
        """
        return self.core.decode([int(i) for i in ids], skip_special_tokens=skip_special)


def _piece_splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train the embedded kind of byte-level BPE.

    Plain BPE would spend two thirds of a small vocabulary on fragments that only serve to build
    longer tokens. Here the frequent whole pieces come first and are taken without merging
    (`ignore_merges`); the rest of the room goes to the first merges, which shorten other words.

    Args:
        texts: training texts.
        vocab_size: upper bound of the vocabulary with its 2 specials; the result is smaller when
            the texts hold fewer pieces.

    Returns:
        The tokenizer: 256 bytes, whole pieces, merge results, `<|endoftext|>`, and `<|mask|>` as
        the last id.

    Raises:
        UserError: `vocab_size` leaves no room for the bytes and the specials.
    """
    if vocab_size < 258:
        raise UserError(f"tokenizer: vocab_size={vocab_size} is too small: use 258 or more")
    splitter = _piece_splitter()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    room = vocab_size - 258
    whole = [piece for piece, count in counts.items() if count > 1 and len(piece) > 1]
    whole.sort(key=lambda piece: (-counts[piece], piece))
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary += whole[: room - room // 8]
    merges = []
    seen = set(vocabulary)
    for left, right in _merges(counts, vocab_size):
        if left + right not in seen:
            if len(vocabulary) == vocab_size - 2:
                break
            vocabulary.append(left + right)
            seen.add(left + right)
        merges.append((left, right))
    ids = {piece: position for position, piece in enumerate(vocabulary)}
    core = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=True))
    core.pre_tokenizer = splitter
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([EOS_TOKEN, MASK_TOKEN])
    return core


def _merges(counts: Counter[str], vocab_size: int) -> list[tuple[str, str]]:
    """Merges of plain BPE over counted pieces (already in byte-level notation), best first."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Split("\n", behavior="removed")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    # Every piece is its own line; the byte-level notation holds no newline.
    repeated = (piece + "\n" for piece in sorted(counts) for _ in range(counts[piece]))
    core.train_from_iterator(repeated, trainer)
    return [(left, right) for left, right in json.loads(core.to_str())["model"]["merges"]]


def save_tokenizer(core: tokenizers.Tokenizer, directory: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
        core: a tokenizer made by `train_tokenizer`.
        directory: target directory, made if missing.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    specials = {
        "bos_token": EOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "mask_token": MASK_TOKEN,
        "pad_token": EOS_TOKEN,
    }
    config = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **specials,
    }
    atomic_write(target / "tokenizer.json", core.to_str(pretty=True) + "\n")
    atomic_write_json(target / "tokenizer_config.json", config)
    atomic_write_json(target / "special_tokens_map.json", specials)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, "restore it, or name another tokenizer")


def _named_specials(directory: Path) -> dict[str, str]:
    """Special tokens named beside a tokenizer; tokenizer_config.json wins."""
    named: dict[str, str] = {}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / file_name
        if not path.exists():
            continue
        for name, value in _read_json(path).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name in ("eos_token", "pad_token", "bos_token", "mask_token") and text:
                named[name] = str(text)
    return named


def _wrap(core: tokenizers.Tokenizer, named: dict[str, str]) -> Tokenizer:
    mask = named.get("mask_token")
    if mask is None and core.token_to_id(MASK_TOKEN) is not None:
        mask = MASK_TOKEN
    return Tokenizer(
        core,
        eos=named.get("eos_token", EOS_TOKEN),
        pad=named.get("pad_token"),
        bos=named.get("bos_token"),
        mask=mask,
    )


def _load_file(path: Path) -> Tokenizer:
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every broken file
        raise UserError(f"tokenizer: cannot read {path} ({error}): restore the file") from error
    return _wrap(core, _named_specials(path.parent))


def _load_gpt2_files(directory: Path) -> Tokenizer:
    try:
        model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    except Exception as error:  # as above
        raise UserError(
            f"tokenizer: cannot read vocab.json and merges.txt in {directory} ({error}): "
            "restore the files"
        ) from error
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = _named_specials(directory)
    present = [s for s in {EOS_TOKEN, *named.values()} if core.token_to_id(s) is not None]
    core.add_special_tokens(sorted(present))
    wrapped = _wrap(core, named)
    size, text, expected = _GPT2_CHECK
    if len(wrapped) == size and wrapped.encode(text) != expected:
        raise UserError(
            f"tokenizer: {directory} has the size of the GPT-2 vocabulary but encodes {text!r} as "
            f"{wrapped.encode(text)} instead of {expected}: restore vocab.json and merges.txt"
        )
    return wrapped


def _load_hub(name: str) -> Tokenizer:
    cure = (
        f"set {_CONFIG_KEY} to '{EMBEDDED_NAME}' (the embedded default variant) "
        "or to a local directory with tokenizer.json or vocab.json and merges.txt"
    )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"tokenizer '{name}' needs the package transformers: install it or {cure}"
        ) from error
    try:
        plain, revision = hub.split_revision(name)
        directory = hub.download_model(plain, revision, ("*.json", "*.txt", "*.model"))
        loaded = AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:  # offline, unknown name and gated name raise unrelated types
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"tokenizer '{name}' cannot be loaded ({reason}): {cure}") from error
    core = getattr(loaded, "backend_tokenizer", None)
    if core is None:
        raise UserError(f"tokenizer '{name}' has no fast version: {cure}")
    names = ("eos_token", "pad_token", "bos_token", "mask_token")
    named = {key: str(value) for key in names if (value := getattr(loaded, key, None)) is not None}
    tokenizer = _wrap(core, named)
    tokenizer.source = f"{plain}@{directory.name}"
    return tokenizer


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path_or_name: "embedded_e2d2" (ships with this package), a directory with tokenizer.json
            (special tokens from tokenizer_config.json if present), a tokenizer.json file, a
            directory with vocab.json and merges.txt, or a hub name, perhaps with "@revision".

    Returns:
        The tokenizer. Only a hub name imports transformers.

    Raises:
        UserError: nothing usable at the path, broken files, or an unreachable hub name.
    """
    path = Path(path_or_name)
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _load_file(path / "tokenizer.json")
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return _load_gpt2_files(path)
        raise UserError(
            f"tokenizer: {path} holds neither tokenizer.json nor vocab.json and merges.txt: "
            f"set {_CONFIG_KEY} to a directory that does, or to '{EMBEDDED_NAME}'"
        )
    name = str(path_or_name)
    if name == EMBEDDED_NAME:
        return _load_file(EMBEDDED_DIR / "tokenizer.json")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
        raise UserError(
            f"tokenizer: path {name!r} does not exist: "
            f"set {_CONFIG_KEY} to an existing path or to '{EMBEDDED_NAME}'"
        )
    return _load_hub(name)


def problem_texts(size: int, seed: int = 0) -> Iterable[str]:
    """Training texts: prompt, blank and target of generated problems of the train split.

    Args:
        size: number of problems.
        seed: seed of the problem set.

    Returns:
        Iterator of texts.
    """
    from common.problems import ProblemSet

    return (f"{p['prompt']} {p['target_answer']}" for p in ProblemSet("train", size, seed))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the embedded tokenizer on generated problems and write its files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--vocab_size", type=int, default=768, help="upper bound with specials")
    parser.add_argument("--problems", type=int, default=20000, help="generated training problems")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problem set")
    options = parser.parse_args(arguments)
    try:
        core = train_tokenizer(problem_texts(options.problems, options.seed), options.vocab_size)
    except UserError as error:
        parser.error(str(error))
    save_tokenizer(core, options.out)
    print(f"{core.get_vocab_size()} tokens written to {options.out}")


if __name__ == "__main__":
    main()
