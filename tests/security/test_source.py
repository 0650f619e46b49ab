"""What the source must not contain: code that runs what it reads.

Syntax trees are searched, not the text, so neither comments nor names like `model.eval()` count.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "configs", "esm", "halting_jax", "launch", "qstar", "reoac_jax")
FORBIDDEN_MODULES = {
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "pickle",
    "shelve",
    "yaml",
}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "compile"}


def sources() -> list[Path]:
    return [p for name in PACKAGES for p in sorted((REPOSITORY / name).rglob("*.py"))]


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def faults(source: str) -> list[str]:
    """Everything in a source text that would run what it reads."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        bad = FORBIDDEN_MODULES & {name.partition(".")[0] for name in names}
        found += [f"line {node.lineno}: import {name}" for name in sorted(bad)]
    for call, name in calls(tree):
        where = f"line {call.lineno}: {name}"
        if name in FORBIDDEN_CALLS or name in ("os.system", "os.popen"):
            found.append(where)
        if name in ("torch.load", "torch.jit.load"):
            value = keyword(call, "weights_only")
            if not (isinstance(value, ast.Constant) and value.value is True):
                found.append(f"{where} without weights_only=True")
        allow = keyword(call, "allow_pickle")
        if allow is not None and not (isinstance(allow, ast.Constant) and allow.value is False):
            found.append(f"{where} with allow_pickle")
        trust = keyword(call, "trust_remote_code")
        if isinstance(trust, ast.Constant) and trust.value is not False:
            found.append(f"{where} trusts remote code")
        shell = keyword(call, "shell")
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            found.append(f"{where} through a shell")
        if name.endswith((".extractall", "unpack_archive")):
            found.append(f"{where} unpacks names it was given")
        if name in ("sympify", "sympy.sympify", "parse_expr", "sympy.parse_expr"):
            argument = call.args[0] if call.args else None
            # A value that was built already, never a text.
            if not isinstance(argument, ast.Name) or argument.id not in ("value",):
                found.append(f"{where} of {ast.unparse(argument) if argument else 'nothing'}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_runs_what_it_reads(package: str) -> None:
    found = {
        str(path.relative_to(REPOSITORY)): bad
        for path in sources()
        if path.is_relative_to(REPOSITORY / package) and (bad := faults(path.read_text()))
    }
    assert not found, found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "eval(text)",
        "exec(code)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "archive.extractall(path)",
        "sympify(text)",
        "os.system(text)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert faults(source)


def test_the_search_passes_what_is_fine() -> None:
    fine = (
        "model.eval()\ntorch.load(p, weights_only=True)\nre.compile(x)\n"
        "numpy.load(p, allow_pickle=False)\nsympify(value)\nf(trust_remote_code=False)"
    )
    assert not faults(fine)


def test_remote_code_needs_the_users_key() -> None:
    # Where the argument is not a constant it must come from a config key of that name.
    for path in sources():
        for call, name in calls(ast.parse(path.read_text())):
            value = keyword(call, "trust_remote_code")
            if value is not None and not isinstance(value, ast.Constant):
                assert "trust_remote_code" in ast.unparse(value), f"{path}: {name}"


DOWNLOADS = ("load_dataset", "snapshot_download", "hf_hub_download", "urlopen", "urlretrieve")


def test_downloads_go_through_one_module() -> None:
    """`common.hub` settles the commit first; nothing else asks the hub for files."""
    found = []
    for path in sources():
        if path == REPOSITORY / "common" / "hub.py":
            continue
        for call, name in calls(ast.parse(path.read_text())):
            called = name.rpartition(".")[2]
            own = name == "load_dataset" and path.name == "prep.py"  # a function of that module
            if called in DOWNLOADS and not own:
                found.append(f"{path.relative_to(REPOSITORY)}:{call.lineno} {name}")
            # Tokenizers and models are loaded from directories, never by a name of the hub.
            local = keyword(call, "local_files_only") is not None or "str(" in ast.unparse(call)
            if called == "from_pretrained" and not local:
                found.append(f"{path.relative_to(REPOSITORY)}:{call.lineno} {name}")
    assert not found, found
