"""The Python API of the guide: mixing models, adapters, generation of data sets.

model = create_optimal_sampling_model("smollm2", alpha_method="kl_symmetry")
out = model.generate(["2 + 2 ="], max_new_tokens=16, temperature=0.8)
out.generated_texts, out.alpha_values, out.diagnostics["kl_theta"]
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from common.errors import UserError, require
from qstar.adapters import DatasetAdapter, RowError
from qstar.backend import Backend, Request
from qstar.defaults import GUIDE_NAMES, finalize, get_default_config
from qstar.generate import run_generation
from qstar.outcome import per_token
from qstar.prompts import PromptSettings, encode
from qstar.scheduler import Finished, schedule
from qstar.score import Scores, score_tokens
from qstar.settings import prompt_settings
from qstar.slots import FIELDS
from qstar.system import System, check_backend, describe_system, max_prompt_tokens, open_backend

__all__ = [
    "DataGenerator",
    "DatasetAdapter",
    "Generation",
    "OptimalSamplingModel",
    "RowError",
    "create_optimal_sampling_model",
]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns for B prompts; arrays are padded to the longest of N steps.

    Attributes:
        generated_texts: [B] answers without special tokens.
        generated_ids: [B] token ids of each, the end token included.
        finish_reasons: [B] "stop" or "length".
        mask: [B, N] bool, real tokens.
        alpha_values: [B, N] weight of pi_theta; 0 outside `mask`.
        ess_ratios: [B, N].
        diagnostics: [B, N] each: `qstar.slots.FIELDS`, ess_theta, ess_t, ess_ratio, kl_diff; empty
            without return_diagnostics. NaN = not defined.
    """

    generated_texts: list[str]
    generated_ids: list[list[int]]
    finish_reasons: list[str]
    mask: np.ndarray
    alpha_values: np.ndarray
    ess_ratios: np.ndarray
    diagnostics: dict[str, np.ndarray]


class OptimalSamplingModel:
    """Two models that decode one continuation; made by `create_optimal_sampling_model`.

    Weights are loaded at the first use. Settings of `generate` that change what is compiled
    (lengths, temperature, filters) make a new engine around the same weights.

    Attributes:
        config: the resolved settings.
    """

    def __init__(self, config: ConfigDict) -> None:
        """Takes finalized settings; see `create_optimal_sampling_model`."""
        self.config = config
        self._models: dict[Any, Any] = {}

    def system(self, one_prompt: bool) -> System:
        """The pair of models under the present config; raises UserError."""
        return describe_system(self.config, one_prompt)

    def generate(
        self,
        prompts: Sequence[str],
        prompts_t: Sequence[str] | None = None,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        return_diagnostics: bool = True,
        seed: int = 0,
    ) -> Generation:
        """Continues prompts.

        Args:
            prompts: B texts, read as they are (`data.prompt_style="raw"`).
            prompts_t: what pi_t reads instead; None = the same.
            max_new_tokens, temperature, top_p, top_k: as in the config.
            return_diagnostics: whether `Generation.diagnostics` is filled.
            seed: row b's randomness is that of (seed, b).

        Raises:
            UserError: unusable settings or prompts, or a row whose logits were not numbers.
        """
        require(len(prompts) > 0, "generate: there are no prompts")
        require(
            prompts_t is None or len(prompts_t) == len(prompts),
            f"generate: {len(prompts)} prompts, but {len(prompts_t or ())} prompts_t",
        )
        with self.config.unlocked():
            self.config.seed = seed
            self.config.sampling.max_new_tokens = max_new_tokens
            self.config.sampling.temperature = float(temperature)
            self.config.sampling.top_p = float(top_p)
            self.config.sampling.top_k = top_k
        finalize(self.config, needs_data=False)
        system = self.system(prompts_t is None)
        requests = _requests(system, prompts, prompts_t)
        longest = max(max(len(r.prompt_theta), len(r.prompt_t)) for r in requests)
        slots = self.config.run.slots
        count = len(prompts) if str(slots) == "auto" else min(int(slots), len(prompts))
        backend: Backend = open_backend(system, count, longest, self._models)
        found: list[Finished | None] = [None] * len(prompts)
        for finished in schedule(backend, iter(requests), system.texts):
            found[finished.request.sample_idx] = finished
        done = [item for item in found if item is not None]
        failed = [item.request.sample_idx for item in done if item.output.failed]
        require(not failed, f"generate: prompts {failed[:5]} gave logits that are no numbers")
        return _collect(system, done, return_diagnostics)

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        prompts_t: Sequence[str] | None = None,
        temperature: float = 1.0,
    ) -> Scores:
        """alpha, log q*, divergences and ESS at every token of existing texts.

        Each model reads a row's prompt and response once; the vocabulary is treated a few positions
        at a time, so nothing of size [B, T, V] is stored.

        Args:
            prompts: B texts.
            responses: B texts that follow them, tokenised by themselves.
            prompts_t: what pi_t reads instead of the prompts.
            temperature: of the laws.

        Raises:
            UserError: unusable settings or texts, or a backend without weights in JAX.
        """
        require(self.config.backend == "jax", "score works with backend=jax only")
        require(len(prompts) == len(responses), "score: as many responses as prompts are needed")
        with self.config.unlocked():
            self.config.sampling.temperature = float(temperature)
        finalize(self.config, needs_data=False)
        system = self.system(prompts_t is None)
        tokenizer = system.tokenizers[system.roles[0]]
        token_ids = [tokenizer.encode(text, add_special_tokens=False) for text in responses]
        requests = _requests(system, prompts, prompts_t)
        return score_tokens(system, requests, token_ids, self._models)


def create_optimal_sampling_model(
    model_theta: str,
    model_t: str | None = None,
    alpha_method: str = "kl_symmetry",
    fixed_alpha: float = 0.5,
    **settings: Any,
) -> OptimalSamplingModel:
    """The pair of a current and a target policy.

    Args:
        model_theta: name or path of pi_theta.
        model_t: of pi_t; None = the same weights (give `generate` prompts_t, or alpha is 0.5).
        alpha_method: see `alpha.method`.
        fixed_alpha: weight of pi_theta of the method "fixed".
        **settings: further settings by their guide name (`alpha_tol`, `dtype`, `backend`) or by
            their config key with "__" for the dot (`q__special_tokens`).

    Raises:
        UserError: an unknown setting or a bad value.
    """
    config = get_default_config()
    config.data.prompt_style = "raw"
    given = {
        "model.theta": model_theta,
        "model.t": model_t or "",
        "alpha.method": alpha_method,
        "alpha.fixed": float(fixed_alpha),
    }
    given |= {GUIDE_NAMES.get(k, k.replace("__", ".")): v for k, v in settings.items()}
    _set(config, given)
    finalize(config, needs_data=False)
    check_backend(config)
    return OptimalSamplingModel(config.lock())


class DataGenerator:
    """Writes a data set of samples; the same call again goes on where it stopped."""

    def __init__(
        self, model: OptimalSamplingModel, adapter: DatasetAdapter, output: str, **settings: Any
    ) -> None:
        """Takes what is needed.

        Args:
            model: the pair.
            adapter: the data set; subclass `DatasetAdapter` for a new form.
            output: OUTPUT.jsonl.
            **settings: as in `create_optimal_sampling_model`; prompts are rendered in the style
                "auto" unless `data__prompt_style` says otherwise.

        Raises:
            UserError: an unknown setting.
        """
        self._config = ConfigDict(model.config.to_dict())
        self._adapter = adapter
        given = {"run.output": str(output), "run.save_diagnostics": True}
        given |= {"data.prompt_style": "auto"}
        given |= {GUIDE_NAMES.get(k, k.replace("__", ".")): v for k, v in settings.items()}
        _set(self._config, given)

    def generate(self, num_samples: int | None = None, start_idx: int = 0) -> int:
        """Generates rows start_idx to start_idx + num_samples (None = all).

        Returns:
            0 = done or stopped on request, 3 = done with failed rows.

        Raises:
            UserError: see `qstar.generate.run_generation`.
        """
        _set(self._config, {"run.num_samples": num_samples or 0, "run.start_idx": start_idx})
        return run_generation(self._config, self._adapter)


def _set(config: ConfigDict, given: Mapping[str, Any]) -> None:
    """Sets dotted keys; raises UserError for one that is unknown or of the wrong type."""
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        part = config
        if section:
            require(section in config, f"unknown setting {key!r}")
            part = config[section]
        require(name in part, f"unknown setting {key!r}")
        if name == "slots":
            value = str(value)
        try:
            part[name] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"{key}: {error}") from None


def _requests(
    system: System, prompts: Sequence[str], prompts_t: Sequence[str] | None
) -> list[Request]:
    """Token ids of texts for both models; raises UserError."""
    limit = max_prompt_tokens(system)
    settings = prompt_settings(system.config)
    found = []
    for row, prompt in enumerate(prompts):
        texts = {"theta": prompt, "t": prompt if prompts_t is None else prompts_t[row]}
        ids = {
            role: _encode(texts[role], how, system.tokenizers[role], row, limit)
            for role, how in zip(("theta", "t"), settings, strict=True)
            if role in system.tokenizers
        }
        first, last = next(iter(ids.values())), next(reversed(ids.values()))
        found.append(Request(row, 0, ids.get("theta", first), ids.get("t", last)))
    return found


def _encode(text: str, how: PromptSettings, tokenizer: Any, row: int, limit: int) -> list[int]:
    try:
        ids = encode([{"role": "user", "content": text}], how, tokenizer)
    except RowError as error:
        raise UserError(f"prompt {row}: {error}") from None
    require(len(ids) <= limit, f"prompt {row} has {len(ids)} tokens, the models' limit is {limit}")
    return ids


def _collect(system: System, done: Sequence[Finished], return_diagnostics: bool) -> Generation:
    """Padded arrays of finished rows."""
    texts = system.texts
    width = max(len(item.output.columns) for item in done)
    mask = np.arange(width) < np.array([[len(item.output.columns)] for item in done])

    def padded(name: str) -> np.ndarray:
        result = np.zeros(mask.shape)
        for row, item in enumerate(done):
            values = per_token(item)
            values["kl_diff"] = np.abs(values["kl_theta"] - values["kl_t"])
            result[row, : len(values[name])] = values[name]
        return result

    names = (*FIELDS, "ess_theta", "ess_t", "ess_ratio", "kl_diff")
    return Generation(
        generated_texts=[texts.answer(item.output) for item in done],
        generated_ids=[texts.token_ids(item.output.columns) for item in done],
        finish_reasons=[item.finish_reason for item in done],
        mask=mask,
        alpha_values=padded("alpha"),
        ess_ratios=padded("ess_ratio"),
        diagnostics={name: padded(name) for name in names} if return_diagnostics else {},
    )
