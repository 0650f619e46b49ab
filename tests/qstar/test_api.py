"""The Python API: generating, scoring what was generated, data sets of the caller's own."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qstar
from common.errors import UserError
from common.rundir import read_jsonl
from qstar.score import score_tokens

PROMPTS = ["2 + 2 =", "a much longer prompt than the first one"]


@pytest.fixture(scope="module")
def model() -> Any:
    return qstar.create_optimal_sampling_model("tiny:1", "tiny:2", dtype="float32")


@pytest.fixture(scope="module")
def generation(model: Any) -> Any:
    return model.generate(PROMPTS, max_new_tokens=8, temperature=0.9, seed=3)


def test_shapes_and_seeds(model: Any, generation: Any) -> None:
    width = max(map(len, generation.generated_ids))
    assert generation.mask.shape == generation.alpha_values.shape == (2, width)
    assert generation.mask.sum(1).tolist() == [len(ids) for ids in generation.generated_ids]
    assert set(generation.diagnostics) >= {"alpha", "kl_theta", "ess_ratio", "log_q", "kl_diff"}
    np.testing.assert_array_equal(generation.ess_ratios, generation.diagnostics["ess_ratio"])
    inside = generation.mask
    ratio = generation.diagnostics["ess_theta"][inside] / generation.diagnostics["ess_t"][inside]
    np.testing.assert_allclose(generation.ess_ratios[inside], ratio, rtol=1e-4)
    assert len(generation.generated_texts) == 2
    again = model.generate(PROMPTS, max_new_tokens=8, temperature=0.9, seed=3)
    assert again.generated_ids == generation.generated_ids
    other = model.generate(PROMPTS, max_new_tokens=8, temperature=0.9, seed=4)
    assert other.generated_ids != generation.generated_ids


def test_scores_of_what_was_generated(model: Any, generation: Any) -> None:
    """Reading a text at once gives every value that writing it token by token gave."""
    from qstar.api import _requests

    system = model.system(True)
    requests = _requests(system, PROMPTS, None)
    scores = score_tokens(system, requests, generation.generated_ids, model._models)
    np.testing.assert_array_equal(scores.mask, generation.mask)
    for name, value in scores.values.items():
        np.testing.assert_allclose(
            value, generation.diagnostics[name], rtol=1e-3, atol=2e-4, err_msg=name
        )
    texts = model.score(PROMPTS, ["four", "5"], temperature=0.9)
    assert [len(ids) for ids in texts.token_ids] == [4, 1]
    assert texts.values["log_q"][texts.mask].max() < 0


def test_unusable_calls_say_why(model: Any) -> None:
    with pytest.raises(UserError, match="unknown setting 'alpha.methd'"):
        qstar.create_optimal_sampling_model("tiny:1", alpha__methd="fixed")
    with pytest.raises(UserError, match="alpha.method"):
        qstar.create_optimal_sampling_model("tiny:1", alpha_method="best")
    with pytest.raises(UserError, match="prompt 1: the prompt has no tokens"):
        model.generate(["a", ""], max_new_tokens=8, temperature=0.9)
    with pytest.raises(UserError, match="2 prompts, but 1 prompts_t"):
        model.generate(PROMPTS, ["a"])
    with pytest.raises(UserError, match="response \\[0\\] has no tokens"):
        model.score(["a"], [""])
    assert qstar.DatasetAdapter is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = qstar.nothing


class Reversed(qstar.DatasetAdapter):
    """A form of its own: the prompt is a column read backwards."""

    def get_prompt(self, idx: int) -> str:
        """The text backwards; an empty one is a row error."""
        text = self.rows[idx]["words"][::-1]
        if not text:
            raise qstar.RowError("no words")
        return text

    def get_metadata(self, idx: int) -> dict[str, Any]:
        """Which row, and how long."""
        return {"sample_idx": idx, "original_length": len(self.rows[idx]["words"])}


def test_an_adapter_of_ones_own(model: Any, tmp_path: Path) -> None:
    adapter = Reversed([{"words": "abc"}, {"words": ""}, {"words": "de"}])
    settings = {"max_new_tokens": 8, "temperature": 0.9, "batch_size": 2}
    generator = qstar.DataGenerator(model, adapter, str(tmp_path / "o.jsonl"), **settings)
    held = len(jax.live_arrays())
    assert generator.generate(num_samples=1) == 0
    assert generator.generate() == 3
    assert len(jax.live_arrays()) <= held  # weights and caches of a run end with it
    found = sorted(read_jsonl(tmp_path / "o.jsonl"), key=lambda row: row["sample_idx"])
    assert [row["messages"][0]["content"] for row in found] == ["cba", "ed"]
    assert [row["original_length"] for row in found] == [3, 2]
    assert read_jsonl(tmp_path / "o.errors.jsonl")[0]["message"] == "no words"
