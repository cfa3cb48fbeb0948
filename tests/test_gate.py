"""What ``benchmarks/gate.py`` slows down is there: it patches a line of the varlen path in a copy of the tree."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("gate", ROOT / "benchmarks" / "gate.py")
assert SPEC
assert SPEC.loader
gate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gate)


def test_the_line_that_is_slowed_stands_once_in_the_varlen_path() -> None:
    assert (ROOT / "nsa" / "paths" / "varlen.py").read_text().count(gate.MARK) == 1
