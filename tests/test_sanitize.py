"""What ``benchmarks/sanitize.py`` calls clean."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("sanitize", Path(__file__).parents[1] / "benchmarks" / "sanitize.py")
assert SPEC
assert SPEC.loader
sanitize = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sanitize)


@pytest.mark.parametrize(
    ("output", "code", "clean"),
    [
        ("9 passed in 5.90s\n========= ERROR SUMMARY: 0 errors", 0, True),
        ("9 passed, 3 deselected in 1s\n========= RACECHECK SUMMARY: 0 hazards displayed", 0, True),
        ("9 passed in 5.90s\n========= ERROR SUMMARY: 1,204 errors", 0, False),
        ("9 passed in 5.90s\n========= ERROR SUMMARY: 0 errors\n========= ERROR SUMMARY: 2 errors", 0, False),
        ("1 failed, 8 passed in 5.90s\n========= ERROR SUMMARY: 0 errors", 1, False),
        ("14 deselected in 0.2s\n========= ERROR SUMMARY: 0 errors", 0, False),
        ("9 passed in 5.90s", 0, False),
        ("...\n========= ERROR SUMMARY: 0 errors", 124, False),
    ],
)
def test_clean_is_tests_that_passed_and_a_summary_without_errors(output: str, code: int, clean: bool) -> None:
    assert sanitize.verdict(output, code)[0] is clean


def test_every_file_of_the_run_exists() -> None:
    assert all((sanitize.ROOT / "tests" / "nsa" / f"{file}.py").exists() for file in sanitize.FILES)


def test_a_files_tests_are_spread_over_workers_where_asked() -> None:
    assert sanitize.command("s", "memcheck", "test_decode", 4)[-5:-3] == ["-n", "4"]
    assert "-n" not in sanitize.command("s", "memcheck", "test_decode")
