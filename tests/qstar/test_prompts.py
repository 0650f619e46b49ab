"""Prompt styles, special tokens and length limits with a word tokenizer."""

from typing import Any

import pytest

from common.errors import UserError
from qstar.adapters import DatasetAdapter, RowError
from qstar.prompts import PromptSettings, encode, render, resolve_style


class Words:
    """One id per word; 0 in front where special tokens are asked for."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [len(word) for word in text.split()]

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        turns = [f"<{turn['role']}> {turn['content']}" for turn in conversation]
        return " ".join([*turns, "<assistant>"])


class Bare(Words):
    """A tokenizer without special tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text, False)


TURNS = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
)


def test_styles() -> None:
    plain, chat = Words(), Words("template")
    assert resolve_style("auto", plain) == "qa" and resolve_style("auto", chat) == "chat"
    assert render(TURNS, PromptSettings("raw"), chat) == "c"
    wanted = "be brief\n\nQuestion: a\n\nAnswer: b\n\nQuestion: c\n\nAnswer: "
    assert render(TURNS, PromptSettings(), plain) == wanted
    assert render(TURNS[1:2], PromptSettings("qa"), chat) == "Question: a\n\nAnswer: "
    assert render(TURNS[1:2], PromptSettings(), chat) == "<user> a <assistant>"
    with pytest.raises(UserError, match="chat template"):
        render(TURNS, PromptSettings("chat"), plain)


def test_system_message_only_where_there_is_none() -> None:
    settings = PromptSettings(system="be long")
    assert render(TURNS, settings, Words("t")).startswith("<system> be brief")
    assert render(TURNS[1:2], settings, Words("t")) == "<system> be long <user> a <assistant>"


def test_templates_bring_their_own_special_tokens() -> None:
    assert encode(TURNS[1:2], PromptSettings(), Words("t")) == [6, 1, 11]
    assert encode(TURNS[1:2], PromptSettings("raw"), Words("t")) == [0, 1]


def test_long_prompts_are_errors_unless_their_tail_is_wanted() -> None:
    turns = ({"role": "user", "content": "one three fives ni"},)
    with pytest.raises(RowError, match="5 tokens.*max_prompt_tokens is 3"):
        encode(turns, PromptSettings("raw", max_tokens=3), Words())
    kept = encode(turns, PromptSettings("raw", max_tokens=3, overlong="left"), Words())
    assert kept == [5, 5, 2]
    empty = ({"role": "user", "content": ""},)
    with pytest.raises(RowError, match="no tokens"):
        encode(empty, PromptSettings("raw"), Bare())


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"style": "x"}, "prompt_style"),
        ({"overlong": "x"}, "overlong"),
        ({"max_tokens": 0}, "max_prompt"),
    ],
)
def test_bad_settings_name_the_key(bad: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        PromptSettings(**bad)


class Upper(DatasetAdapter):
    """An adapter of a user's own."""

    def get_prompt(self, idx: int) -> str:
        return str(self.rows[idx]["q"]).upper()


def test_an_adapter_of_ones_own_needs_one_method() -> None:
    adapter = Upper([{"q": "hi"}, {"q": " "}])
    sample = adapter.sample(0)
    assert sample.prompt == "HI" and sample.messages == ({"role": "user", "content": "HI"},)
    assert sample.metadata == {"sample_idx": 0} and sample.response is None
    with pytest.raises(RowError, match="empty"):
        adapter.sample(1)
    with pytest.raises(TypeError, match="get_prompt"):
        DatasetAdapter([{"q": "hi"}]).sample(0)
