"""Sections of the config as the frozen settings the parts take."""

from ml_collections import ConfigDict

from common.errors import require
from qstar.law import LawSettings
from qstar.prompts import PromptSettings
from qstar.tilt import AlphaSettings


def parse_shard(text: str) -> tuple[int, int]:
    """ "i/n" as (i, n).

    Raises:
        UserError: if it is none.
    """
    index, slash, count = text.partition("/")
    good = slash and index.isdigit() and count.isdigit() and int(index) < int(count)
    require(bool(good), f"run.shard {text!r} is not i/n with 0 <= i < n, such as 0/4")
    return int(index), int(count)


def alpha_settings(config: ConfigDict) -> AlphaSettings:
    """Section `alpha`; raises UserError."""
    a = config.alpha
    return AlphaSettings(a.method, a.fixed, a.solver, a.tol, a.min, a.max, a.extrapolate)


def law_settings(config: ConfigDict) -> LawSettings:
    """Section `q` and the filters of `sampling`; raises UserError."""
    q = config.q
    return LawSettings(
        q.special_tokens,
        q.support,
        q.support_top_k,
        q.support_top_p,
        config.sampling.top_k,
        config.sampling.top_p,
    )


def prompt_settings(config: ConfigDict) -> tuple[PromptSettings, PromptSettings]:
    """How pi_theta and pi_t are asked; raises UserError."""
    d = config.data
    limits = (d.max_prompt_tokens, d.overlong)
    theta = PromptSettings(d.prompt_style, d.system, *limits, d.add_think_token)
    t = PromptSettings(
        d.prompt_style_t or d.prompt_style, d.system_t or d.system, *limits, d.add_think_token
    )
    return theta, t
