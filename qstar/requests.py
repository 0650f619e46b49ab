"""Data set rows to requests: which rows, what either model reads, what goes into the output."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from common.errors import require
from qstar.adapters import DatasetAdapter, Message, RowError, Sample, make_adapter
from qstar.backend import Request
from qstar.prompts import PromptSettings, encode, render, resolve_style
from qstar.settings import parse_shard, prompt_settings
from qstar.writer import Done


@dataclasses.dataclass(frozen=True)
class Hint:
    """What only pi_t sees.

    Attributes:
        field: column of the data set; "" = nothing.
        template: pi_t's last user turn, with {prompt} and {hint}.
    """

    field: str = ""
    template: str = "{prompt}\n\nHint: {hint}"

    def apply(self, adapter: DatasetAdapter, sample: Sample) -> tuple[Message, ...]:
        """The messages pi_t reads.

        Raises:
            RowError: if the row has no hint.
        """
        if not self.field:
            return sample.messages
        hint = adapter.rows[sample.sample_idx].get(self.field)
        if isinstance(hint, bool) or not isinstance(hint, (str, int, float)) or hint == "":
            raise RowError(f"column {self.field!r} holds no hint")
        *earlier, last = sample.messages
        text = self.template.format(prompt=last["content"], hint=hint)
        return (*earlier, {**last, "content": text})


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Renders and encodes rows for both models.

    Attributes:
        adapter: the data set.
        theta, t: how each model is asked.
        hint: what only pi_t sees.
        tokenizers: by role, for the roles that are run.
        longest: tokens for which the models have positions, the answer's left out.
    """

    adapter: DatasetAdapter
    theta: PromptSettings
    t: PromptSettings
    hint: Hint
    tokenizers: Mapping[str, Any]
    longest: int

    def messages(self, sample: Sample) -> dict[str, tuple[Message, ...]]:
        """What each role that is run reads; raises RowError."""
        both = {"theta": sample.messages}
        if "t" in self.tokenizers:
            both["t"] = self.hint.apply(self.adapter, sample)
        return {role: both[role] for role in self.tokenizers}

    def settings(self, role: str) -> PromptSettings:
        """How a role is asked; prompts that are cut are cut to the models' positions too."""
        settings = self.theta if role == "theta" else self.t
        if settings.overlong == "error":
            return settings
        limit = min(settings.max_tokens, self.longest)
        return dataclasses.replace(settings, max_tokens=limit)

    def request(self, sample: Sample, repeat: int) -> Request:
        """A sample's token ids; raises RowError. A role that is not run reads the other's."""
        ids = {
            role: encode(messages, self.settings(role), self.tokenizers[role])
            for role, messages in self.messages(sample).items()
        }
        for read in ids.values():
            if len(read) > self.longest:
                raise RowError(
                    f"the prompt has {len(read)} tokens; behind sampling.max_new_tokens the "
                    f"models' positions leave {self.longest}"
                )
        first, last = next(iter(ids.values())), next(reversed(ids.values()))
        return Request(sample.sample_idx, repeat, ids.get("theta", first), ids.get("t", last))

    def shown(self, sample: Sample) -> dict[str, str]:
        """Rendered prompts by role, for a dry run."""
        return {
            role: render(messages, self.settings(role), self.tokenizers[role])
            for role, messages in self.messages(sample).items()
        }

    def styles(self) -> dict[str, str]:
        """The prompt styles that are used, by role."""
        return {
            role: resolve_style(self.settings(role).style, tokenizer)
            for role, tokenizer in self.tokenizers.items()
        }


def one_prompt(config: ConfigDict) -> bool:
    """Whether both models are asked alike."""
    theta, t = prompt_settings(config)
    return theta == t and not config.data.hint_field


def adapt(config: ConfigDict, rows: Sequence[Any]) -> DatasetAdapter:
    """The adapter of a config, its hint column checked; raises UserError."""
    data = config.data
    adapter = make_adapter(
        rows, data.adapter, data.prompt_field or None, data.response_field or None
    )
    require(
        not data.hint_field or data.hint_field in adapter.columns,
        f"data.hint_field={data.hint_field}: no such column (columns: "
        f"{', '.join(adapter.columns)})",
    )
    return adapter


def wanted(config: ConfigDict, size: int, done: set[Done]) -> list[Done]:
    """(sample_idx, repeat) of this shard that are not done yet, in order.

    Args:
        config: section `run` counts.
        size: rows of the data set.
        done: what any shard has written.

    Raises:
        UserError: if the range lies outside the data set.
    """
    run = config.run
    require(run.start_idx < size, f"run.start_idx={run.start_idx}: the data set has {size} rows")
    end = min(size, run.start_idx + run.num_samples) if run.num_samples else size
    index, count = parse_shard(run.shard)
    return [
        (row, repeat)
        for row in range(run.start_idx, end)
        if row % count == index
        for repeat in range(run.repeats)
        if (row, repeat) not in done
    ]


def requests(
    prompter: Prompter,
    todo: Sequence[Done],
    on_error: Callable[[Done, str], None],
    samples: dict[Done, Sample],
) -> Iterator[Request]:
    """Requests in order; rows that cannot be used are reported and skipped.

    Args:
        prompter: renders and encodes.
        todo: what is wanted.
        on_error: called with the row and repeat, and the reason.
        samples: gets the sample of every request; the caller takes them out again.
    """
    for key in todo:
        try:
            sample = prompter.adapter.sample(key[0])
            request = prompter.request(sample, key[1])
        except RowError as error:
            on_error(key, str(error))
            continue
        samples[key] = sample
        yield request
