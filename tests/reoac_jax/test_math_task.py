"""MATH in REOAC: records, labels, grading workers, tables by subject and level."""

import json

import numpy as np
import pytest

from common import flags
from common.errors import UserError
from configs import math as math_config
from reoac_jax.data import load_records
from reoac_jax.defaults import finalize
from reoac_jax.evaluate import Evaluation, breakdown
from reoac_jax.prompts import encode_prompts
from reoac_jax.rewards import Grader
from reoac_jax.tokenizer import load_tokenizer

MASK = 3


@pytest.fixture(scope="module")
def config():
    chosen = math_config.get_config("tiny")
    finalize(chosen)
    return chosen


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded_e2d2")


def _evaluation(rewards):
    count = len(rewards)
    zeros = np.zeros(count)
    return Evaluation(
        rewards=np.array(rewards, np.float32),
        costs=zeros,
        steps=zeros,
        forwards=zeros,
        usage=np.zeros(5, int),
        texts=[""] * count,
        num_failed=0,
    )


def test_generated_records_are_math_with_subjects_and_levels(config, tokenizer):
    records = load_records(config, "test", limit=14)
    assert {r["task"] for r in records} == {"math"} and len(records) == 14
    prompts = encode_prompts(records, tokenizer, prompt_width=64, gen_len=40)
    assert prompts.num_cut == 0
    assert prompts.subjects[:2] == ("algebra", "counting_and_probability")
    assert all(level.startswith("level_") for level in prompts.levels)


def test_files_of_both_spellings_give_the_same_labels(config, tmp_path, tokenizer):
    rows = [
        {"problem": "1+1?", "solution": "\\boxed{2}", "level": "Level 3", "type": "Algebra"},
        {"problem": "2+1?", "answer": "3", "level": "Level 3", "subject": "Algebra"},
    ]
    path = tmp_path / "math.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with config.unlocked():
        config.dataset.eval_path = str(path)
    try:
        records = load_records(config, "test")
    finally:
        with config.unlocked():
            config.dataset.eval_path = "generated"
    prompts = encode_prompts(records, tokenizer, prompt_width=64, gen_len=40)
    assert prompts.subjects == ("algebra", "algebra") and prompts.levels == ("level_3",) * 2
    assert prompts.golds == ["\\boxed{2}", "3"]


def test_breakdown_counts_each_subject_and_level(config, tokenizer):
    records = load_records(config, "test", limit=14)
    prompts = encode_prompts(records, tokenizer, prompt_width=64, gen_len=40)
    tables = breakdown(_evaluation([1.0] * 7 + [0.0] * 7), prompts)
    assert set(tables) == {"by_subject", "by_level"}
    assert {row["accuracy"] for row in tables["by_subject"].values()} == {0.5}
    assert sum(row["n"] for row in tables["by_level"].values()) == 14
    plain = [{"prompt": "1+1?", "target_answer": "2"}]
    unlabelled = encode_prompts(plain, tokenizer, prompt_width=64, gen_len=40)
    assert breakdown(_evaluation([1.0]), unlabelled) == {}


def test_grader_scores_math_and_counts_what_has_no_verdict(tokenizer):
    texts = ["so \\boxed{\\frac12}", "\\boxed{3}", "9^{9^9}", "\\boxed{(1,2)}"]
    golds = ["\\boxed{0.5}", "\\boxed{4}", "\\boxed{8^{9^9}}", "(1,2)"]
    ids = [tokenizer.encode(text) for text in texts]
    width = max(map(len, ids))
    canvas = np.array([row + [tokenizer.eos_id] * (width - len(row)) for row in ids], np.int32)
    with Grader(tokenizer, MASK, cut_at_eos=True, task="math", time_limit=20.0) as grader:
        graded = grader.submit(canvas, golds).result()
    assert graded.texts == texts
    np.testing.assert_array_equal(graded.rewards, [1, 0, 0, 1])
    assert (graded.num_failed, graded.num_timeouts) == (1, 0)


def test_missing_parser_is_named_before_the_run(tokenizer):
    from common.answers.paper_parsers import missing_parsers

    if not missing_parsers("latex2sympy2"):
        pytest.skip("latex2sympy2 is installed")
    with pytest.raises(UserError, match="latex2sympy2 is not installed"):
        Grader(
            tokenizer,
            MASK,
            cut_at_eos=True,
            task="math",
            verifier="paper",
            parser="latex2sympy2",
        )


@pytest.mark.parametrize("variant", math_config.VARIANTS)
def test_variants_are_math(variant):
    chosen = flags.load_config(f"configs/math.py:{variant}" if variant else "configs/math.py")
    assert chosen.dataset.task == "math"
    with pytest.raises(UserError, match="maple"):
        with chosen.unlocked():
            chosen.eval.math_parser = "maple"
        finalize(chosen)
