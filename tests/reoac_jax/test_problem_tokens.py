"""Generated word problems as REOAC reads them: key tokens and token lengths."""

import re

import pytest

from common.problems import ProblemSet
from reoac_jax.key_tokens import key_spans
from reoac_jax.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def train_records():
    return ProblemSet("train", 2000, seed=5)[:]


@pytest.fixture(scope="module")
def test_records():
    return ProblemSet("test", 2000, seed=5)[:]


def test_every_number_of_a_prompt_is_a_key_token(train_records):
    for record in train_records[:300]:
        spans = {record["prompt"][start:end] for start, end, _ in key_spans(record["prompt"])}
        assert set(re.findall(r"\d+", record["prompt"])) <= spans


def test_token_lengths_fit_the_canvas(train_records, test_records):
    tokenizer = load_tokenizer("embedded_e2d2")
    for record in train_records + test_records:
        prompt = tokenizer.encode(record["prompt"])
        joined = tokenizer.encode(f"{record['prompt']} {record['target_answer']}")
        assert len(prompt) <= 64
        assert joined[: len(prompt)] == prompt  # an answer never changes the ids of its prompt
        assert len(joined) - len(prompt) + 1 <= 40  # with the blank before it and eos
