"""Leaf. Which commit the tool's own code is of."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path


def current_commit() -> str:
    """The commit of the checkout that this tool runs from; where its code differs, with a digest of the difference.

    'unknown' where it runs from no checkout. The folder it is called in does not matter.
    """
    here = Path(__file__).parent.parent
    if not (here / ".git").exists():
        return "unknown"

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        changed = git("status", "--porcelain", "--", "nsa", "tuner", "sweeps")
        difference = git("diff", "HEAD", "--", "nsa", "tuner", "sweeps")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    if not changed:
        return head
    return f"{head}-dirty-{hashlib.sha256((changed + difference).encode()).hexdigest()[:8]}"
