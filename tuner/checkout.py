"""Leaf. Which commit the tool's own code is of."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
from pathlib import Path

COUNTED = ("nsa", "tuner", "sweeps")
"""Folders whose contents decide what is measured."""


def current_commit(module: str = "", here: Path = Path(__file__).parent.parent) -> str:
    """The commit of the checkout that this tool runs from; where its code differs, with a digest of the difference.

    Files that git does not know yet count with their contents: a new path is one. So does ``module``, whose paths are
    measured in place of the tool's own. 'unknown' where it runs from no checkout. The folder it is called in does not
    matter.
    """
    if not (here / ".git").exists():
        return "unknown"

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        changed = git("status", "--porcelain", "--", *COUNTED)
        difference = git("diff", "HEAD", "--", *COUNTED)
        fresh = git("ls-files", "-z", "--others", "--exclude-standard", "--", *COUNTED).split("\0")[:-1]
        theirs = [file for file in sources_of(module) if not any(file.is_relative_to(here / name) for name in COUNTED)]
        state = hashlib.sha256((changed + difference).encode())
        for file in [*(here / name for name in fresh), *theirs]:
            state.update(hashlib.sha256(file.read_bytes()).digest())
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty-{state.hexdigest()[:8]}" if changed or theirs else head


def sources_of(module: str) -> list[Path]:
    """The Python files of a module or package by name; none where there is none."""
    try:
        found = importlib.util.find_spec(module) if module else None
    except ImportError:
        found = None
    if found is None or not found.has_location or found.origin is None:
        return []
    file = Path(found.origin)
    return sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
