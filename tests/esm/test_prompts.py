"""Prompts: wording by template, hashes, chat templates and plain text."""

import pytest

from common.errors import UserError
from esm.datasets import TaskExample, load_examples
from esm.prompts import (
    SYSTEM,
    TEMPLATES,
    build_messages,
    check_template,
    delimiter_share,
    labelled_text,
    prompt_ids,
    prompt_record,
    template_hash,
)

CHOICE = TaskExample(
    "arc-c", "1", "Which one?", "B", {"split": "test", "options": (("A", "water"), ("B", "air"))}
)
PLAIN = TaskExample("gsm8k", "0", "How many {braces}?", "#### 1", {"split": "test"})


class _ByteTokenizer:
    """Characters as ids; with or without a chat template, in the shape of transformers."""

    def __init__(self, chat_template):
        self.chat_template = chat_template
        self.options = {}

    def encode(self, text):
        return [ord(char) for char in text]

    def apply_chat_template(self, messages, **options):
        self.options = options
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_asks_the_question_last(template):
    messages = build_messages(CHOICE, template)
    assert messages[0] == {"role": "system", "content": SYSTEM}
    assert messages[-1]["role"] == "user"
    assert "Which one?" in "".join(messages[-1]["content"].splitlines()[-3:])
    assert "blank line" in messages[-1]["content"]


def test_templates_ask_for_the_form_the_grader_reads():
    assert "\\boxed{}" in build_messages(PLAIN, "math_0shot")[-1]["content"]
    for template in ("gsm8k_0shot", "svamp_0shot", "arc_0shot", "strategyqa_0shot"):
        assert "####" in build_messages(CHOICE, template)[-1]["content"]
    assert "{braces}" in build_messages(PLAIN, "gsm8k_0shot")[-1]["content"]


def test_options_are_listed_one_a_line():
    content = build_messages(CHOICE, "arc-c_0shot")[-1]["content"]
    assert content.endswith("Which one?\n(A) water\n(B) air")
    with pytest.raises(UserError, match="options"):
        build_messages(PLAIN, "arc_0shot")


def test_ids_aliases_and_hashes():
    assert check_template("svamp_0shot") == "gsm8k_0shot"
    assert template_hash("svamp_0shot") == template_hash("gsm8k_0shot")
    assert len({template_hash(name) for name in TEMPLATES}) == len(TEMPLATES)
    assert prompt_record("svamp_0shot")["template"] == "gsm8k_0shot"
    with pytest.raises(UserError, match="gsm8k_1shot"):
        check_template("gsm8k_1shot")


def test_few_shot_template_shows_worked_examples():
    example = load_examples("problems", "test", limit=1)[0]
    roles = [m["role"] for m in build_messages(example, "problems_3shot")]
    assert roles == ["system", *["user", "assistant"] * 3, "user"]


def test_ids_from_the_chat_template_or_from_labelled_text():
    messages = build_messages(PLAIN, "gsm8k_0shot")
    chat = _ByteTokenizer("yes")
    assert prompt_ids(messages, chat)[:8] == [ord(char) for char in "<system>"]
    assert chat.options == {
        "tokenize": True,
        "add_generation_prompt": True,
        "return_dict": False,
    }
    plain = _ByteTokenizer(None)
    text = "".join(map(chr, prompt_ids(messages, plain)))
    assert text == labelled_text(messages)
    assert text.startswith(f"System: {SYSTEM}\n\nUser: ") and text.endswith("\n\nAssistant:")


def test_share_of_answers_with_a_delimiter():
    low = delimiter_share("gsm8k_0shot", ["a\n\nb", "a", "b"], "\n\n")
    assert low.share == pytest.approx(1 / 3) and "1 of 3" in low.warning()
    assert delimiter_share("gsm8k_0shot", ["a\n\nb", "a"], "\n\n").warning() == ""
    assert delimiter_share("gsm8k_0shot", [], "\n\n").share == 1.0
