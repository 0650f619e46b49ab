"""Messages to the token ids a model reads: prompt styles, special tokens, length limits."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from common.errors import require
from qstar.adapters import Message, RowError

STYLES = ("raw", "chat", "qa", "auto")
OVERLONG = ("error", "left")
THINK = "<think>\n"


class Tokenizer(Protocol):
    """What is needed of a tokenizer; every `transformers` tokenizer fits."""

    chat_template: Any

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to ids."""
        ...

    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any:
        """Messages to text by the tokenizer's own template."""
        ...


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """How one model is asked; static.

    Attributes:
        style: "raw" = the prompt as it is; "chat" = the tokenizer's chat template; "qa" = question
            and answer lines; "auto" = chat if there is a template, else qa.
        system: a system message put in front if the conversation has none; "" = none.
        max_tokens: longest prompt.
        overlong: "error" = a longer one is a row error; "left" = its tail is kept.
        think: the rendered prompt ends with `THINK`.
    """

    style: str = "auto"
    system: str = ""
    max_tokens: int = 2048
    overlong: str = "error"
    think: bool = False

    def __post_init__(self) -> None:
        """Refuses settings that make no sense, naming the key."""
        require(
            self.style in STYLES, f"data.prompt_style {self.style!r} is none of {', '.join(STYLES)}"
        )
        require(
            self.overlong in OVERLONG,
            f"data.overlong {self.overlong!r} is none of {', '.join(OVERLONG)}",
        )
        require(
            self.max_tokens >= 1, f"data.max_prompt_tokens must be 1 or more, not {self.max_tokens}"
        )


def resolve_style(style: str, tokenizer: Tokenizer) -> str:
    """The style that is used: "auto" is settled by whether the tokenizer has a chat template.

    Raises:
        UserError: for "chat" without a template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if style == "auto":
        return "chat" if has_template else "qa"
    require(
        style != "chat" or has_template,
        "data.prompt_style=chat: the tokenizer has no chat template; use qa, raw or auto",
    )
    return style


def render(messages: Sequence[Message], settings: PromptSettings, tokenizer: Tokenizer) -> str:
    """The text a model continues.

    Args:
        messages: the history, ending with a user turn.
        settings: style and system message.
        tokenizer: for its chat template.
    """
    end = THINK if settings.think else ""
    style = resolve_style(settings.style, tokenizer)
    turns = list(messages)
    if style == "raw":
        return turns[-1]["content"] + end
    if settings.system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": settings.system}, *turns]
    if style == "chat":
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return str(text) + end
    forms = {"system": "{}\n\n", "user": "Question: {}\n\nAnswer: ", "assistant": "{}\n\n"}
    return "".join(forms[turn["role"]].format(turn["content"]) for turn in turns) + end


def encode(
    messages: Sequence[Message], settings: PromptSettings, tokenizer: Tokenizer
) -> list[int]:
    """Token ids of a rendered prompt.

    A chat template writes its special tokens itself; the other styles get the tokenizer's.

    Raises:
        RowError: if nothing is left of the prompt, or it is longer than allowed.
    """
    text = render(messages, settings, tokenizer)
    from_template = resolve_style(settings.style, tokenizer) == "chat"
    ids = list(tokenizer.encode(text, add_special_tokens=not from_template))
    if not ids:
        raise RowError("the prompt has no tokens")
    if len(ids) > settings.max_tokens:
        if settings.overlong == "error":
            raise RowError(
                f"the prompt has {len(ids)} tokens, data.max_prompt_tokens is {settings.max_tokens}"
            )
        ids = ids[-settings.max_tokens :]
    return ids
