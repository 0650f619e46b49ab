"""Every variant of every config file loads and is valid, and every key does something."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ml_collections import ConfigDict

from common import flags
from tests.configs.config_reads import keys_read

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted((REPOSITORY / "configs").glob("[!_]*.py"))
# Keys that the code reaches through a name it puts together: their prefix, where, and how.
INDIRECT = {
    "dataset.raw_": ("reoac_jax/prep.py", 'config.dataset.get(f"raw_{name}_path"'),
    "operators.": ("reoac_jax/settings.py", "given = section[name]"),
    "optim.": ("reoac_jax/learner_state.py", "config.optim.items()"),
    "task.": ("halting_jax/build.py", "config.task.items()"),
}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _variants() -> Iterator[tuple[Path, str]]:
    for path in FILES:
        for variant in _module(path).VARIANTS:
            yield path, variant


def _spec(path: Path, variant: str) -> str:
    return f"{path}:{variant}" if variant else str(path)


def _package(config: ConfigDict) -> str:
    """The package whose keys a config holds."""
    packages = [p.parent.name for p in REPOSITORY.glob("*/defaults.py")]
    fitting = [p for p in packages if set(_defaults(p)) == set(config)]
    assert len(fitting) == 1, f"{len(fitting)} packages have these sections"
    return fitting[0]


def _defaults(package: str) -> ConfigDict:
    module: Any = importlib.import_module(f"{package}.defaults")
    config: ConfigDict = module.get_default_config()
    return config


def test_there_are_configs() -> None:
    assert FILES


@pytest.mark.parametrize(
    "path, variant", [pytest.param(p, v, id=f"{p.stem}:{v}") for p, v in _variants()]
)
def test_variant_is_complete_and_valid(path: Path, variant: str) -> None:
    config = flags.load_config(_spec(path, variant))
    package = _package(config)
    assert config.is_locked
    with pytest.raises((AttributeError, KeyError)):
        config.no_such_key = 1
    # A variant changes values; keys and types are those of the defaults.
    flat, default = flags.flatten(config), flags.flatten(_defaults(package))
    assert flat.keys() == default.keys()
    for key, value in flat.items():
        if default[key] is not None and value is not None:
            assert type(value) is type(default[key]), key
    assert json.loads(config.to_json()) == json.loads(json.dumps(config.to_dict()))
    warnings = importlib.import_module(f"{package}.defaults").finalize(config)
    assert all(isinstance(line, str) and line for line in warnings)


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in FILES])
def test_docstring_says_how_to_run_it(path: Path) -> None:
    module = _module(path)
    text = module.__doc__ or ""
    assert "python -m " in text and f"--config=configs/{path.name}" in text
    for variant in filter(None, module.VARIANTS):
        assert variant in text, f"the docstring does not mention the variant {variant}"


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in FILES])
def test_unknown_variant_names_the_known_ones(path: Path) -> None:
    with pytest.raises(flags.UserError) as error:
        flags.load_config(f"{path}:no_such_variant")
    for variant in filter(None, _module(path).VARIANTS):
        assert variant in str(error.value)


@pytest.mark.parametrize("key", ["rollout.branching", "optim.anneal"])
def test_the_original_refuses_rules_of_plus(key: str) -> None:
    config = flags.load_config(str(REPOSITORY / "configs/gsm8k.py:paper"))
    config.update_from_flattened_dict({key: True})
    with pytest.raises(flags.UserError, match=f"{key}=True is not the original's rule"):
        importlib.import_module("reoac_jax.defaults").finalize(config)


def test_every_key_is_read() -> None:
    for package in sorted({_package(flags.load_config(str(path))) for path in FILES}):
        default = _defaults(package)
        files = (REPOSITORY / package).rglob("*.py")
        sources = [file for file in files if file.name not in ("defaults.py", "active_keys.py")]
        read = keys_read(sources, default.keys())
        for prefix, (file, snippet) in INDIRECT.items():
            assert snippet in (REPOSITORY / file).read_text(), f"{prefix} is read differently now"
        dead = [
            key
            for key in flags.flatten(default)
            if key not in read and not key.startswith(tuple(INDIRECT))
        ]
        assert not dead, f"no code of {package} reads {', '.join(dead)}"


def test_a_dead_key_would_be_found(tmp_path: Path) -> None:
    source = tmp_path / "code.py"
    source.write_text(
        "def f(config):\n"
        "    s, n = config.one, config.two.size\n"
        "    return s.a, s.get('b'), s['c'], config.two.rate\n"
        "def g(other):\n"
        "    return other.one.d, s.e\n"
    )
    read = keys_read([source], ["one", "two"])
    assert {"one.a", "one.b", "one.c", "two.size", "two.rate"} <= read
    assert not {"one.d", "one.e"} & read
