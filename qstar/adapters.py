"""Data set rows to samples: prompt, messages, reference response, metadata.

Which columns are used follows from the schema (all rows), never from the first row, and nothing is
guessed: a data set without a known column is refused before any model is loaded. A row that cannot
be used becomes an error record, and the run goes on.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError, require

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction", "input", "query", "text")
RESPONSE_COLUMNS = ("response", "answer", "output", "completion", "solution")
ADAPTERS = ("auto", "deepscaler", "generic")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

Message = dict[str, str]


class RowError(Exception):
    """A row that cannot be used: recorded for its index, the others go on."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One row, ready to be rendered.

    Attributes:
        sample_idx: row number.
        prompt: the last user turn.
        messages: the whole history up to it.
        response: the reference, never shown to a model; None = none.
        metadata: `sample_idx` and the scalar columns as `original_<name>`.
    """

    sample_idx: int
    prompt: str
    messages: tuple[Message, ...]
    response: str | None
    metadata: Mapping[str, Any]


class DatasetAdapter:
    """Access to one data set by row number; subclass and override `get_prompt` for a new form.

    Attributes:
        rows: the rows, each a mapping from column to value.
        columns: all columns, in the order in which they appear.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Reads the schema.

        Args:
            rows: the data set; a `column_names` attribute is taken as the schema where there is
                one, else the columns of all rows.
        """
        self.rows = rows
        names = getattr(rows, "column_names", None)
        if names is None:
            names = dict.fromkeys(name for row in rows for name in row)
        self.columns = list(names)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def get_prompt(self, idx: int) -> str:
        """The prompt's text.

        Raises:
            RowError: if the row has none.
        """
        raise TypeError(f"{type(self).__name__} must define get_prompt")

    def get_messages(self, idx: int) -> list[Message]:
        """The conversation that ends with the prompt; by default the prompt as a user turn."""
        return [{"role": "user", "content": self.get_prompt(idx)}]

    def get_response(self, idx: int) -> str | None:
        """The reference response, or None."""
        return None

    def get_metadata(self, idx: int) -> dict[str, Any]:
        """What is copied into the output; has to hold `sample_idx`."""
        return {"sample_idx": idx}

    def sample(self, idx: int) -> Sample:
        """Everything about one row.

        Raises:
            RowError: if the row cannot be used.
        """
        prompt = self.get_prompt(idx)
        if not isinstance(prompt, str) or not prompt.strip():
            raise RowError("the prompt is empty or no text")
        messages = tuple(self.get_messages(idx))
        return Sample(idx, prompt, messages, self.get_response(idx), self.get_metadata(idx))

    def scalars(self, idx: int, used: Sequence[str]) -> dict[str, Any]:
        """`sample_idx` and the text, number and truth columns other than `used`."""
        row = self.rows[idx]
        kept = {
            f"original_{name}": row[name]
            for name in self.columns
            if name not in used and isinstance(row.get(name), (str, int, float, bool))
        }
        return {"sample_idx": idx} | kept


class FieldAdapter(DatasetAdapter):
    """A column with the prompt's text, perhaps one with the response."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompt_field: str,
        response_field: str | None = None,
        addition_field: str | None = None,
    ) -> None:
        """Takes the columns by name.

        Args:
            rows: the data set.
            prompt_field: column of the prompt.
            response_field: column of the reference.
            addition_field: column that is appended to a prompt after a blank line, if not empty.
        """
        super().__init__(rows)
        self.prompt_field = prompt_field
        self.response_field = response_field
        self.addition_field = addition_field

    def get_prompt(self, idx: int) -> str:
        """Text of the prompt's column, with the addition."""
        row = self.rows[idx]
        prompt = row.get(self.prompt_field)
        if not isinstance(prompt, str) or not prompt.strip():
            raise RowError(f"column {self.prompt_field!r} holds no prompt: {_shown(prompt)}")
        addition = row.get(self.addition_field) if self.addition_field else None
        return f"{prompt}\n\n{addition}" if isinstance(addition, str) and addition else prompt

    def get_response(self, idx: int) -> str | None:
        """Text of the response's column."""
        return _text(self.rows[idx].get(self.response_field)) if self.response_field else None

    def get_metadata(self, idx: int) -> dict[str, Any]:
        """All scalar columns but the prompt's."""
        used = [self.prompt_field, *filter(None, [self.addition_field])]
        return self.scalars(idx, used)


class ConversationAdapter(DatasetAdapter):
    """A column with a list of turns; a trailing assistant turn is the reference response."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], field: str) -> None:
        """Takes the column of the turns, in either spelling (role/content or from/value)."""
        super().__init__(rows)
        self.field = field
        found = [name for name in RESPONSE_COLUMNS if name in self.columns]
        self.response_field = found[0] if found else None

    def _split(self, idx: int) -> tuple[list[Message], str | None]:
        """The turns up to the last user turn, and the reference behind it."""
        turns = self.rows[idx].get(self.field)
        if not isinstance(turns, (list, tuple)) or not turns:
            raise RowError(f"column {self.field!r} holds no conversation: {_shown(turns)}")
        messages = [_message(turn, self.field) for turn in turns]
        response = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        if not messages or messages[-1]["role"] != "user":
            raise RowError(f"the conversation in column {self.field!r} does not end with a user")
        return messages, response

    def get_prompt(self, idx: int) -> str:
        """The last user turn."""
        return self._split(idx)[0][-1]["content"]

    def get_messages(self, idx: int) -> list[Message]:
        """The history up to the last user turn."""
        return self._split(idx)[0]

    def get_response(self, idx: int) -> str | None:
        """The trailing assistant turn, else a response column."""
        response = self._split(idx)[1]
        if response is None and self.response_field:
            return _text(self.rows[idx].get(self.response_field))
        return response

    def get_metadata(self, idx: int) -> dict[str, Any]:
        """All scalar columns."""
        return self.scalars(idx, [self.field])


def make_adapter(
    rows: Sequence[Mapping[str, Any]],
    name: str = "auto",
    prompt_field: str | None = None,
    response_field: str | None = None,
) -> DatasetAdapter:
    """The adapter for a data set.

    "auto" (alias "deepscaler") takes a conversation column if there is one (`messages`,
    `conversations`, a `prompt` that holds turns), else the first of `PROMPT_COLUMNS`; "generic"
    takes the fields that are named.

    Args:
        rows: the data set.
        name: one of `ADAPTERS`.
        prompt_field, response_field: columns; naming a prompt field means "generic".

    Raises:
        UserError: if no column fits; names the columns there are.
    """
    require(name in ADAPTERS, f"data.adapter {name!r} is none of {', '.join(ADAPTERS)}")
    columns = DatasetAdapter(rows).columns
    there = ", ".join(columns) or "none"
    if name == "generic" or prompt_field:
        if not prompt_field:
            raise UserError(f"data.adapter=generic needs data.prompt_field (columns: {there})")
        for key, field in (("prompt_field", prompt_field), ("response_field", response_field)):
            require(
                not field or field in columns,
                f"data.{key}={field}: no such column (columns: {there})",
            )
        return FieldAdapter(rows, prompt_field, response_field)
    conversation = _conversation_column(rows, columns)
    if conversation:
        return ConversationAdapter(rows, conversation)
    prompts = [column for column in PROMPT_COLUMNS if column in columns]
    if not prompts:
        raise UserError(
            f"no prompt column found (columns: {there}); name one with data.prompt_field"
        )
    responses = [column for column in RESPONSE_COLUMNS if column in columns]
    addition = "input" if prompts[0] == "instruction" and "input" in columns else None
    return FieldAdapter(rows, prompts[0], responses[0] if responses else None, addition)


def _conversation_column(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str | None:
    """The column that holds turns: `messages`, `conversations`, or a `prompt` of that type."""
    for column in ("messages", "conversations"):
        if column in columns:
            return column
    if "prompt" not in columns:
        return None
    first = next((row["prompt"] for row in rows if row.get("prompt") is not None), None)
    return "prompt" if isinstance(first, (list, tuple)) else None


def _message(turn: Any, field: str) -> Message:
    """One turn as role and content.

    Raises:
        RowError: if it is not one.
    """
    if isinstance(turn, Mapping):
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if role in _ROLES and isinstance(content, str):
            return {"role": _ROLES[role], "content": content}
    raise RowError(f"column {field!r} holds a turn that is none: {_shown(turn)}")


def _text(value: Any) -> str | None:
    """A reference as text: numbers count, everything else is no reference."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _shown(value: Any) -> str:
    """A short form of a value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
