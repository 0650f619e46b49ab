"""Which config keys a package reads, found in its source without running it."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path


def keys_read(files: Iterable[Path], sections: Iterable[str]) -> set[str]:
    """Dotted keys that the code names.

    Followed are `config.a.b` inside functions, the same behind a local name (`a = config.a`, also
    in tuples), `.get("b")` and `["b"]`.

    Args:
        files: Python sources.
        sections: names of the top-level sections and keys.
    """
    sections = set(sections)
    found: set[str] = set()
    for file in files:
        tree = ast.parse(file.read_text())
        for scope in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            aliases = dict(_aliases(scope, sections))
            for node in ast.walk(scope):
                key = _key(node, aliases, sections)
                if key:
                    found.add(key)
    return found


def _aliases(scope: ast.AST, sections: set[str]) -> Iterator[tuple[str, str]]:
    for node in ast.walk(scope):
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=False))
        else:
            pairs = [(target, value)]
        for name, source in pairs:
            if isinstance(name, ast.Name):
                key = _key(source, {}, sections)
                if key:
                    yield name.id, key


def _key(node: ast.AST, aliases: dict[str, str], sections: set[str]) -> str:
    """The dotted key that an expression names, "" if none."""
    if isinstance(node, ast.Attribute):
        return _below(node.value, node.attr, aliases, sections)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return _below(node.value, str(node.slice.value), aliases, sections)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ):
        return _below(node.func.value, str(node.args[0].value), aliases, sections)
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    return ""


def _below(base: ast.AST, name: str, aliases: dict[str, str], sections: set[str]) -> str:
    if isinstance(base, ast.Name) and base.id in ("config", "sized"):
        return name if name in sections else ""
    key = _key(base, aliases, sections)
    return f"{key}.{name}" if key else ""
