"""Tokenizer: exact round trip, pieces, special ids, loading routes, training, command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.problems import ProblemSet
from reoac_jax.tokenizer import (
    EMBEDDED_DIR,
    Tokenizer,
    load_tokenizer,
    main,
    problem_texts,
    save_tokenizer,
    train_tokenizer,
)

EMBEDDED = load_tokenizer("embedded_e2d2")
_PIECES = st.sampled_from(
    ["<|endoftext|>", "<|mask|>", "\n#### ", "Ġ", " ", "  ", "\n", "has 12", "\r\n", "'s", "½", "٣"]
)


def _strings(text: str) -> list[str]:
    return [EMBEDDED.vocab_strings[i] for i in EMBEDDED.encode(text)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=12), _PIECES), max_size=6).map("".join))
def test_round_trip_is_exact_for_any_text(text):
    ids = EMBEDDED.encode(text)
    assert EMBEDDED.decode(ids) == text
    assert EMBEDDED.decode(ids, skip_special=False) == text
    assert not {EMBEDDED.eos_id, EMBEDDED.mask_id} & set(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_offsets_cover_the_text_in_order(text):
    ids, offsets = EMBEDDED.encode_with_offsets(text)
    assert len(ids) == len(offsets) and ids == EMBEDDED.encode(text)
    covered = {c for start, end in offsets for c in range(start, end)}
    assert covered == set(range(len(text)))
    assert offsets == sorted(offsets)


def test_pieces():
    assert _strings("12+7=19\n19*2=38\n#### 38") == [
        *"12+7=19",
        "Ċ",
        *"19*2=38",
        "Ċ####Ġ",
        *"38",
    ]
    assert _strings("Nina has 12 pens. She") == ["Nina", "ĠhasĠ", "1", "2", "Ġpens", ".", "ĠShe"]
    assert _strings("Nina now? 12/3-1") == ["Nina", "Ġnow", "?", "Ġ", *"12/3-1"]
    assert _strings("3 + 4") == ["3", "Ġ", "+", "Ġ", "4"]


def test_no_token_mixes_digits_or_signs_with_anything():
    for string in EMBEDDED.vocab_strings[:-2]:
        if any(c in "0123456789+-*/=" for c in string):
            assert len(string) == 1


def test_special_ids_and_vocabulary():
    strings = EMBEDDED.vocab_strings
    assert len(EMBEDDED) == len(strings) == len(set(strings)) <= 768
    assert EMBEDDED.mask_id == len(EMBEDDED) - 1 and strings[-1] == "<|mask|>"
    assert EMBEDDED.eos_id == EMBEDDED.pad_id == EMBEDDED.bos_id
    assert strings[EMBEDDED.eos_id] == "<|endoftext|>"


def test_decode_skips_specials_and_unknown_ids():
    ids = [*EMBEDDED.encode("#### 7"), EMBEDDED.eos_id, EMBEDDED.mask_id, len(EMBEDDED) + 5]
    assert EMBEDDED.decode(ids) == "#### 7"
    assert EMBEDDED.decode(ids, skip_special=False) == "#### 7<|endoftext|><|mask|>"


def test_batch_equals_single():
    texts = ["Leo has 3 pens.", "", "é 日本 12"]
    ids, offsets = EMBEDDED.encode_batch(texts)
    assert list(zip(ids, offsets, strict=True)) == [
        EMBEDDED.encode_with_offsets(text) for text in texts
    ]


def test_training_is_deterministic_and_equals_the_embedded_files(tmp_path):
    main(["--out", str(tmp_path)])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (EMBEDDED_DIR / name).read_bytes()


def test_problem_words_before_numbers_are_single_tokens():
    fragments = 0
    for record in ProblemSet("test", 300, seed=11):
        ids, offsets = EMBEDDED.encode_with_offsets(record["prompt"])
        words = sum(not word.strip("$").isdigit() for word in record["prompt"].split())
        digits = sum(character.isdigit() for character in record["prompt"])
        marks = sum(character in ".?,$" for character in record["prompt"])
        fragments += len(ids) - words - digits - marks
    assert fragments == 0


def test_train_tokenizer_respects_the_bound():
    texts = list(problem_texts(200))
    for size in (258, 300, 400, 5000):
        core = train_tokenizer(texts, size)
        assert core.get_vocab_size() <= size
        assert core.token_to_id("<|mask|>") == core.get_vocab_size() - 1
        wrapped = Tokenizer(core, mask="<|mask|>")
        assert wrapped.decode(wrapped.encode(texts[0])) == texts[0]
    assert core.get_vocab_size() < 2000
    with pytest.raises(UserError, match="vocab_size=100"):
        train_tokenizer(texts, 100)


def test_merges_shorten_words_the_corpus_lacks():
    assert len(EMBEDDED.encode("another teacher remained")) < len("another teacher remained") // 2


def test_directory_and_file_load_alike(tmp_path):
    save_tokenizer(EMBEDDED.core, tmp_path)
    text = "Mia has 12 pens. <|mask|>"
    for route in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        assert load_tokenizer(route).encode(text) == EMBEDDED.encode(text)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    assert load_tokenizer(tmp_path).mask_id == EMBEDDED.mask_id


def test_specials_are_read_from_the_config(tmp_path):
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<p>": 2, "a": 3}, unk_token="<p>")
    )
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="eos_token"):
        load_tokenizer(tmp_path)
    config = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "pad_token": "<p>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.mask_id) == (0, 1, 2, None)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json"):
        load_tokenizer(tmp_path)


def _write_gpt2_style(directory: Path, extra: dict[str, int]) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    for string in ("He", "Ġw", *extra):
        vocabulary[string] = len(vocabulary)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\nH e\nĠ w\n")


def test_vocab_and_merges_load_as_gpt2(tmp_path):
    _write_gpt2_style(tmp_path, {"<|endoftext|>": 0})
    loaded = load_tokenizer(tmp_path)
    assert [loaded.vocab_strings[i] for i in loaded.encode("Hello w<|endoftext|>")][:5] == [
        "He",
        *"llo",
        "Ġw",
    ]
    assert loaded.decode(loaded.encode("Hé  <|endoftext|>\n")) == "Hé  <|endoftext|>\n"
    assert loaded.eos_id == len(loaded) - 1 and loaded.mask_id is None


def test_wrong_files_of_gpt2_size_are_refused(tmp_path):
    _write_gpt2_style(tmp_path, {f"<{i}>": 0 for i in range(50257 - 259)} | {"<|endoftext|>": 0})
    with pytest.raises(UserError, match="15496"):
        load_tokenizer(tmp_path)


def test_bad_paths_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="backbone.tokenizer_name_or_path"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="embedded_e2d2"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_unreachable_hub_name_names_the_cure(monkeypatch):
    pytest.importorskip("transformers")

    def offline(name: str, *rest: object) -> None:
        raise OSError(f"no connection\nwhile loading {name}")

    monkeypatch.setattr("common.hub.download_model", offline)
    with pytest.raises(UserError) as caught:
        load_tokenizer("some-owner/some-model")
    message = str(caught.value)
    assert "embedded_e2d2" in message and "backbone.tokenizer_name_or_path" in message
    assert "\n" not in message


def test_hub_tokenizer_is_wrapped(monkeypatch):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(EMBEDDED_DIR / "tokenizer.json"),
        eos_token="<|endoftext|>",
        mask_token="<|mask|>",
    )
    asked = []

    def download(name, revision, patterns):
        asked.append((name, revision))
        return Path("somewhere") / ("a" * 40)

    monkeypatch.setattr("common.hub.download_model", download)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: fast)
    loaded = load_tokenizer("some-owner/some-model@v2")
    assert asked == [("some-owner/some-model", "v2")]
    assert loaded.source == "some-owner/some-model@" + "a" * 40
    text = "Mia has 12 pens. <|mask|>"
    assert loaded.encode(text) == EMBEDDED.encode(text)
    assert (loaded.eos_id, loaded.pad_id, loaded.mask_id) == (
        EMBEDDED.eos_id,
        EMBEDDED.eos_id,
        EMBEDDED.mask_id,
    )


def test_local_path_imports_nothing_heavy():
    code = (
        "import sys; from reoac_jax.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'jax') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(EMBEDDED_DIR)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_command_line(tmp_path):
    target = tmp_path / "made"
    command = [sys.executable, "-m", "reoac_jax.tokenizer", "--out", str(target)]
    subprocess.run([*command, "--vocab_size", "300", "--problems", "50"], check=True)
    assert len(load_tokenizer(target)) == 300
    failed = subprocess.run(
        [*command, "--vocab_size", "10"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2 and "vocab_size=10" in failed.stderr
    assert "Traceback" not in failed.stderr
