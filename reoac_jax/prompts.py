"""Prompts of a data set as arrays, and batches of canvases made from them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from reoac_jax.backbone.base import Canvas
from reoac_jax.corpus import lay_out, pad_rows, plain_answer
from reoac_jax.key_tokens import key_mask
from reoac_jax.records import slug
from reoac_jax.tokenizer import Tokenizer


class PromptSet(NamedTuple):
    """A data set ready for rollouts; N rows.

    Attributes:
      texts, golds: raw prompt and gold answer of each row.
      prompt: [N, P] int32, right-padded; prompt_len: [N] int32.
      key_mask: bool [N, P], key tokens.
      absolute_target, absolute_len: [N, P] int32 and [N] int32, tokens of "prompt answer", cut to
        P: the paper's backbone target, compared position by position with the sequence.
      canvas_target: [N, G] int32, the answer without annotations, eos, then eos: what plus and
        pre-training teach the canvas.
      num_cut: prompts longer than P.
      subjects, levels: of each row, "" where unknown; empty where no row has one.
    """

    texts: list[str]
    golds: list[str]
    prompt: np.ndarray
    prompt_len: np.ndarray
    key_mask: np.ndarray
    absolute_target: np.ndarray
    absolute_len: np.ndarray
    canvas_target: np.ndarray
    num_cut: int
    subjects: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)


def encode_prompts(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    prompt_width: int,
    gen_len: int,
    prompt_field: str = "prompt",
    answer_field: str = "target_answer",
    sentence_final_numbers: bool = False,
) -> PromptSet:
    """Tokenize a data set once, on the host.

    Args:
      records: rows with a prompt and a gold answer.
      prompt_width: P; longer prompts are cut.
      gen_len: G.
      sentence_final_numbers: numbers before a full stop are key tokens too.

    Raises:
      UserError: no rows, or a row lacks a field.
    """
    if not records:
        raise UserError("the data set has no usable rows")
    for i, record in enumerate(records):
        for field in (prompt_field, answer_field):
            if field not in record:
                raise UserError(
                    f"row {i} has no field {field!r}; it has {', '.join(sorted(record))} "
                    "(set dataset.prompt_field and dataset.answer_field)"
                )
    texts = [str(r[prompt_field]) for r in records]
    golds = [str(r[answer_field]) for r in records]
    ids, offsets = tokenizer.encode_batch(texts)
    prompt, prompt_len = pad_rows(ids, prompt_width, tokenizer.pad_id)
    keys = np.zeros(prompt.shape, bool)
    for i, (text, spans) in enumerate(zip(texts, offsets, strict=True)):
        flags = key_mask(text, spans, sentence_final_numbers=sentence_final_numbers)
        width = min(len(flags), prompt_width)
        keys[i, :width] = flags[:width]
    joined, _ = tokenizer.encode_batch(
        [f"{t} {g}" if g else "" for t, g in zip(texts, golds, strict=True)]
    )
    absolute, absolute_len = pad_rows(joined, prompt_width, tokenizer.pad_id)
    plain, _ = tokenizer.encode_batch([plain_answer(g) for g in golds])
    closed = [[*row[: gen_len - 1], tokenizer.eos_id] for row in plain]
    canvas_target, _ = pad_rows(closed, gen_len, tokenizer.eos_id)
    return PromptSet(
        texts=texts,
        golds=golds,
        prompt=prompt,
        prompt_len=prompt_len,
        key_mask=keys,
        absolute_target=absolute,
        absolute_len=absolute_len,
        canvas_target=canvas_target,
        num_cut=sum(len(row) > prompt_width for row in ids),
        subjects=_labels(records, "subject", "type"),
        levels=_labels(records, "level"),
    )


def _labels(records: Sequence[Mapping[str, Any]], *fields: str) -> tuple[str, ...]:
    """A field of the metadata of every row in one spelling; empty where no row has it."""
    found = []
    for record in records:
        metadata = record.get("metadata") or {}
        value = next((metadata[name] for name in fields if metadata.get(name)), "")
        found.append(slug(value))
    return tuple(found) if any(found) else ()


def make_canvas(
    prompts: PromptSet, rows: np.ndarray, row_ids: np.ndarray, mask_id: int, pad_id: int
) -> Canvas:
    """Host arrays of a batch: the chosen prompts with all-mask canvases.

    Args:
      rows: [B] indices into `prompts`.
      row_ids: [B] numbers that name each episode in the random streams.
    """
    gen_len = prompts.canvas_target.shape[1]
    blank = np.full((len(rows), gen_len), mask_id, np.int32)
    tokens = lay_out(prompts.prompt[rows], prompts.prompt_len[rows], blank, pad_id)
    return Canvas(
        tokens=tokens,
        prompt_len=prompts.prompt_len[rows],
        key_mask=prompts.key_mask[rows],
        row_id=np.asarray(row_ids, np.uint32),
    )
