"""Claims about ``benchmarks/evidence.py``: its steps name what exists, and one that did not end well is run again."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tuner.sweep import families, read_sweep

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def loaded(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which puts its folder on the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return loaded("evidence")


def option(words: tuple[str, ...], name: str) -> list[str]:
    """Every value of an option."""
    return [value for word, value in itertools.pairwise(words) if word == name]


def test_every_step_names_files_sweeps_and_shapes_that_exist(evidence: ModuleType) -> None:
    shapes = loaded("selection").SHAPES
    assert len({step.name for step in evidence.STEPS}) == len(evidence.STEPS)
    for step in evidence.STEPS:
        for word in step.words:
            if word.endswith(".py"):
                assert (evidence.ROOT / word).is_file()
        for file in option(step.words, "--files"):
            assert (evidence.ROOT / "tests" / "nsa" / f"{file}.py").is_file()
        for names in option(step.words, "--shapes"):
            assert set(names.split(",")) <= set(shapes)
        if "sweep" in step.words:
            assert families(read_sweep(step.words[3], option(step.words, "--set")), "cuda")


def test_a_step_that_did_not_end_well_is_run_again_and_no_other(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = tmp_path / "flag"
    steps = (
        evidence.Step("good", 20, ("-c", "print('{commit} with {limit} s')")),
        evidence.Step("bad", 20, ("-c", f"import pathlib, sys; sys.exit(not pathlib.Path({str(flag)!r}).exists())")),
    )
    monkeypatch.setattr(evidence, "STEPS", steps)
    told = ["--out", str(tmp_path / "out"), "--commit", "abc", "--lanes", "1"]
    assert evidence.main(told) == 1
    assert "abc with 8 s" in (tmp_path / "out" / "good.txt").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == "not seen to end well: bad"
    flag.touch()
    assert evidence.main(told) == 0
    ledger = [json.loads(text) for text in (tmp_path / "out" / "evidence.jsonl").read_text().splitlines()]
    assert [(line["step"], line["exit"]) for line in ledger] == [("good", 0), ("bad", 1), ("bad", 0)]
    assert evidence.main([*told, "--commit", "def", "--steps", "good"]) == 0
    assert len((tmp_path / "out" / "evidence.jsonl").read_text().splitlines()) == 4


def test_a_step_is_ended_at_its_limit_and_none_begun_without_time(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "STEPS", (evidence.Step("long", 1, ("-c", "import time; time.sleep(600)")),))
    told = ["--out", str(tmp_path), "--lanes", "1"]
    assert evidence.main(told) == 1
    assert json.loads((tmp_path / "evidence.jsonl").read_text())["exit"] == 124
    assert evidence.main([*told, "--time-limit", "10"]) == 1
    assert len((tmp_path / "evidence.jsonl").read_text().splitlines()) == 1


def test_an_unknown_step_is_named(evidence: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evidence.main(["--steps", "backwards"])
    assert "backwards" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_run(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        evidence.main(["--out", str(tmp_path / "out")])
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
