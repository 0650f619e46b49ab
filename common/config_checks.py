"""Rules for the values of a config, in the same words everywhere; keys are dotted names."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from common.errors import UserError


def value_at(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    value = config
    for name in key.split("."):
        value = value[name]
    return value


def require_choices(config: ConfigDict, choices: Mapping[str, Iterable[str]]) -> None:
    """Raises UserError where a value is none of those its key allows."""
    for key, allowed in choices.items():
        value, names = value_at(config, key), tuple(allowed)
        if value not in names:
            shown = ", ".join(name or repr(name) for name in names)
            raise UserError(f"config key {key}={value!r} is none of {shown}")


def require_each(
    config: ConfigDict, keys: Iterable[str], fits: Callable[[Any], bool], rule: str
) -> None:
    """Raises UserError where a value does not fit: "config key {key}={value} {rule}"."""
    for key in keys:
        value = value_at(config, key)
        if not fits(value):
            raise UserError(f"config key {key}={value} {rule}")


def require_at_least(config: ConfigDict, keys: Iterable[str], low: int) -> None:
    """Raises UserError where a number is below `low`."""
    rule = "must not be negative" if low == 0 else f"must be at least {low}"
    require_each(config, keys, lambda value: value >= low, rule)
