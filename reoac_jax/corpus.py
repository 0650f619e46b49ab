"""From text records to fixed-shape integer arrays: prompts, key masks, targets, canvases."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from reoac_jax.tokenizer import Tokenizer

_ANNOTATION = re.compile(r"<<[^<>]*>>")  # the calculator calls in GSM8K answers


class Encoded(NamedTuple):
    """Supervised examples as arrays.

    Attributes:
      prompt: [N, P] int32, right-padded with pad_id.
      prompt_len: [N] int32.
      target: [N, G] int32: answer tokens (no annotations), eos, then eos to the canvas's end.
      target_len: [N] int32, answer tokens plus one eos, at most G.
      num_cut: rows whose prompt or target did not fit and were truncated.
    """

    prompt: np.ndarray
    prompt_len: np.ndarray
    target: np.ndarray
    target_len: np.ndarray
    num_cut: int


def plain_answer(text: str) -> str:
    """An answer without calculator annotations."""
    return _ANNOTATION.sub("", text)


def pad_rows(rows: Sequence[Sequence[int]], width: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows cut or right-padded to width: ([N, width] int32, lengths [N] int32)."""
    out = np.full((len(rows), width), fill, np.int32)
    lengths = np.array([min(len(row), width) for row in rows], np.int32)
    for i, row in enumerate(rows):
        out[i, : lengths[i]] = row[:width]
    return out, lengths


def encode_supervised(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    prompt_width: int,
    gen_len: int,
    prompt_field: str = "prompt",
    answer_field: str = "target_answer",
) -> Encoded:
    """Tokenize records for masked-diffusion training of the canvas behind its prompt.

    Raises:
      UserError: a record lacks a field.
    """
    for field in (prompt_field, answer_field):
        missing = next((i for i, r in enumerate(records) if field not in r), None)
        if missing is not None:
            raise UserError(
                f"record {missing} has no field {field!r}; it has {sorted(records[missing])}"
            )
    prompts, _ = tokenizer.encode_batch([r[prompt_field] for r in records])
    targets, _ = tokenizer.encode_batch([plain_answer(r[answer_field]) for r in records])
    cut = sum(
        len(p) > prompt_width or len(a) + 1 > gen_len for p, a in zip(prompts, targets, strict=True)
    )
    prompt, prompt_len = pad_rows(prompts, prompt_width, tokenizer.pad_id)
    closed = [[*a[: gen_len - 1], tokenizer.eos_id] for a in targets]
    target, target_len = pad_rows(closed, gen_len, tokenizer.eos_id)
    return Encoded(prompt, prompt_len, target, target_len, cut)


def lay_out(
    prompt: np.ndarray, prompt_len: np.ndarray, canvas: np.ndarray, pad_id: int
) -> np.ndarray:
    """[N, P + G] int32: each prompt, its canvas [N, G] directly behind it, then padding."""
    n, width = prompt.shape
    tokens = np.full((n, width + canvas.shape[1]), pad_id, np.int32)
    inside = np.arange(width) < prompt_len[:, None]
    tokens[:, :width] = np.where(inside, prompt, pad_id)
    columns = prompt_len[:, None] + np.arange(canvas.shape[1])
    np.put_along_axis(tokens, columns, canvas.astype(np.int32), axis=1)
    return tokens
