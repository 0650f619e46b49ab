"""How a command must end on wrong input, and whether it did."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from tests.campaign.in_process import Ended
from tests.launch.runs import REPOSITORY

LONGEST = 1200  # characters of an error line: a message, not a copy of the file
# Words of a cure: what can be done, in the imperative.
_CURES = re.compile(
    r"\b(add|build|check|choose|continue|convert|copy|delete|did you mean|download|fix|free|give|"
    r"install|lower|make|mend|mine|move|name|point|put|raise|remove|rename|replace|restore|run|"
    r"save|set|start|switch|take|train|update|use|wait|write)\b"
)
# What a refused command may add: it says that it was there, and holds no result.
_HARMLESS = ("logs", "tb", "tensorboard", ".lock")


def contents(root: Path) -> dict[str, str]:
    """Digest of every file below a directory, but for logs and locks."""
    found = {}
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        harmless = any(part in _HARMLESS or part.endswith(".lock") for part in parts)
        if path.is_file() and not path.is_symlink() and not harmless:
            found["/".join(parts)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Files that were overwritten, removed or made."""
    words = []
    for name in sorted({*before, *after}):
        if name not in after:
            words.append(f"removed {name}")
        elif name not in before:
            words.append(f"made {name}")
        elif before[name] != after[name]:
            words.append(f"changed {name}")
    return words


def refused_properly(
    ended: Ended, named: str, before: Mapping[str, str], after: Mapping[str, str]
) -> str:
    """What is wrong with how a command refused; "" if nothing is.

    Args:
        ended: how it ended.
        named: a regular expression for what its line must name.
        before, after: `contents` of everything it could write to.
    """
    if "Traceback (most recent call last)" in ended.stderr:
        last = [line for line in ended.stderr.splitlines() if line.strip()][-1]
        return f"a traceback: {last[:200]} ({_innermost(ended.stderr)})"
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    if ended.status == 0:
        return "accepted"
    if ended.status != 2:
        return f"ended with {ended.status}: {ended.stderr[-200:]!r}"
    if len(lines) != 1:
        return f"{len(lines)} error lines"
    line = lines[0]
    if not re.search(named, line):
        return f"the line does not name {named}: {line[:300]}"
    if not _CURES.search(line):
        return f"no cure: {line[:300]}"
    if len(line) > LONGEST:
        return f"a line of {len(line)} characters: {line[:100]}"
    if changed := changes(before, after):
        return f"refused, but {', '.join(changed[:4])} ({line[:120]})"
    return ""


def _innermost(text: str) -> str:
    """The last place of this repository in a traceback."""
    places = re.findall(r'File "([^"]+)", line (\d+)', text)
    own = [(Path(file), line) for file, line in places if str(REPOSITORY) in file]
    return "" if not own else f"{own[-1][0].relative_to(REPOSITORY)}:{own[-1][1]}"
