"""Layer specs: which residual streams are read, as numbers, ratios or texts."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from common.errors import UserError


def resolve_layers(specs: Sequence[Any], num_layers: int) -> tuple[int, ...]:
    """Turns specs into distinct layers, in their order.

    An int is absolute (negative: from the end). A float in [0, 1], a text with a point in that
    range, or a text "a/b" is a ratio r: layer round(r * (num_layers - 1)), halves to even. Other
    floats count if integral. None and blank texts are left out. Beware: 1 is layer 1, 1.0 the last.

    Args:
        specs: layer specs.
        num_layers: layers of the model.

    Raises:
        UserError: a spec is no layer of the model, or none is left.
    """
    if num_layers < 1:
        raise UserError(f"a model of {num_layers} layers has none to choose")
    layers: list[int] = []
    for spec in specs:
        if spec is None or (isinstance(spec, str) and not spec.strip()):
            continue
        layer = _resolve(spec, num_layers)
        if layer not in layers:
            layers.append(layer)
    if not layers:
        raise UserError("candidate_layers names no layer; leave it empty, (), for the top third")
    return tuple(layers)


def top_third(num_layers: int) -> tuple[int, ...]:
    """Layers floor(2/3 num_layers) and above: what an empty list of specs means."""
    return tuple(range(2 * num_layers // 3, num_layers))


def _resolve(spec: Any, num_layers: int) -> int:
    problem = f"layer {spec!r} is no layer of a model with {num_layers} layers"
    if isinstance(spec, bool):
        raise UserError(f"{problem}: give a number, a ratio such as 0.6, or '3/5'")
    value: Any = spec
    if isinstance(spec, str):
        value = _read(spec.strip(), problem)
    if isinstance(value, Fraction):
        return _ratio(value, num_layers, problem)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(problem)
        if 0.0 <= value <= 1.0:
            return round(value * (num_layers - 1))
        if value != int(value):
            raise UserError(f"{problem}: a ratio lies in [0, 1]")
        value = int(value)
    if not isinstance(value, int):
        raise UserError(problem)
    layer = value + num_layers if value < 0 else value
    if not 0 <= layer < num_layers:
        raise UserError(problem)
    return layer


def _read(text: str, problem: str) -> int | float | Fraction:
    try:
        if "/" in text:
            numerator, denominator = text.split("/")
            return Fraction(float(numerator)) / Fraction(float(denominator))
        return float(text) if "." in text or text.lower() in ("nan", "inf") else int(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(problem) from None


def _ratio(ratio: Fraction, num_layers: int, problem: str) -> int:
    if not 0 <= ratio <= 1:
        raise UserError(f"{problem}: a ratio lies in [0, 1]")
    return round(float(ratio) * (num_layers - 1))
