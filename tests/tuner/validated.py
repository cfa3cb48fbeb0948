"""Scripted records of everything that a validation report reads: a good set, to be spoilt one claim at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from nsa.problem import SelectionProblem
from tuner.compare_record import (
    Checked,
    CompareFolder,
    Facts,
    Launched,
    Line,
    LineFile,
    Measured,
    Pair,
    Question,
    Scenario,
)
from tuner.marks import CommitLine, CommitScenario
from tuner.record import Environment, Record, RunFolder, Sample
from tuner.training_record import KernelTime, Route, TrainingFolder, TrainingRecord, TrainingSetup
from tuner.trees import Tree

COMMIT, SLUG, DATE = "0123456789abcdef", "test-gpu", "2026-11-22T12:00:00+00:00"
NOISE = 0.002


def environment(run_id: str, sweep: Any, **changes: Any) -> Environment:
    """Of a GPU that nobody has."""
    fields = {
        "run_id": run_id, "commit": COMMIT, "date": DATE, "tool": "test",
        "device": {"slug": SLUG, "name": "Test GPU", "kind": "cuda", "units": 8},
        "software": {"torch": "2.11.0", "driver": "580.1", "flash_attn": ""},
        "clocks": {"sm_mhz": 1500, "power_limit_w": 700.0}, "timer": {}, "sweep": sweep,
    }  # fmt: skip
    return Environment(**{**fields, **changes})


def problem(mode: str, T: int = 512) -> SelectionProblem:
    """The PR31 shape."""
    sizes = {"B": 1, "G": 2, "h": 4, "Dk": 32, "Dv": 32, "block_size": 64, "topk": 16, "dtype": "float32"}
    return SelectionProblem(**{"mode": mode, "S": 1 if mode == "decode" else T, "T": T, **sizes})


def record(path: str, mode: str = "decode", us: float = 100.0, **changes: Any) -> Record:
    """A finalist of a shoot-out with 30 rounds about ``us``; changes of outcome take its times away."""
    bad = changes.get("outcome", "ok") != "ok"
    samples = [] if bad else [Sample(turn, 0, us * math.exp(NOISE * (-1) ** turn)) for turn in range(30)]
    fields = {
        "run_id": "sweep-run", "commit": COMMIT, "date": DATE, "stage": "screen" if bad else "shootout",
        "problem": msgspec.to_builtins(problem(mode)), "pattern": "scored", "path": path, "parameters": {},
        "outcome": "ok", "oracle_error": None if bad else 1e-7, "oracle_bound": None if bad else 1e-6,
        "kernels": {} if bad else {f"{path}_kernel<int, 4>(float*)": 1}, "samples": samples, "peak_bytes": 4096,
        "growths": 0,
    }  # fmt: skip
    return Record(**{**fields, **changes})


GOOD = [
    record(path, mode, us, baseline=path == "varlen")
    for mode in ("decode", "prefill")
    for path, us in (("varlen", 100.0), ("dense", 50.0))
]


def write_sweep(
    root: Path, records: list[Record], run_id: str = "sweep-run", *, complete: bool = True, **changes: Any
) -> None:
    folder = RunFolder(root / "records" / SLUG / "quick" / run_id)
    folder.start(environment(run_id, {"name": "quick"}, **changes))
    folder.append([msgspec.structs.replace(record, run_id=run_id) for record in records])
    if complete:
        folder.finish()


def route(**changes: Any) -> Route:
    fields: dict[str, Any] = {
        "operation": "selection", "path": "varlen", "parameters": {}, "status": "forced", "reason": "named",
        "calls": 20, "requested": "varlen", "met": True,
    }  # fmt: skip
    return Route(**{**fields, **changes})


def reading(first_step: int, losses: list[float], **changes: Any) -> TrainingRecord:
    fields: dict[str, Any] = {
        "run_id": "train-run", "commit": COMMIT, "date": DATE, "first_step": first_step, "losses": losses,
        "tokens": 1024 * len(losses), "seconds": 0.01 * len(losses), "executed": [route()], "peak_bytes": 2**30,
        "activation_bytes": 2**29, "growths": 1, "workspace_bytes": 2**20,
    }  # fmt: skip
    return TrainingRecord(**{**fields, **changes})


STEPS = [
    reading(0, [5.5]), reading(1, [5.0 - 0.1 * step for step in range(9)]),
    reading(10, [], tokens=0, profiled=True, kernels=[KernelTime("gemm", 3, 900.0)], synchronisations=0),
]  # fmt: skip


def write_training(root: Path, records: list[TrainingRecord], *, complete: bool = True, **changes: Any) -> None:
    folder = TrainingFolder(root / "records" / SLUG / "pr31" / "train-run")
    setup = TrainingSetup(
        name="pr31", layer={"dim": 256, "value_head_dim": None}, layers=2, parameters=2_000_000, batch=1, sequence=1024,
        steps=10, dtype="float32", text="synthetic", requested={"selection": "varlen"},
        flags={"NSA_USE_SEL_VARLEN": "1", "NSA_USE_SEL_PACK": "1"}, overridden=("NSA_USE_SEL_PACK",),
    )  # fmt: skip
    folder.start(environment("train-run", msgspec.to_builtins(setup), **changes))
    folder.lines.append(*records)
    if complete:
        folder.finish()


BASE, HEAD = (
    Tree(asked="a", folder="a", commit="f" * 40, digest="0"),
    Tree(asked="b", folder="b", commit=COMMIT, digest="1"),
)
SCENARIOS = tuple(
    Scenario(name=f"{mode} T=512 auto", problem=problem(mode), pattern="scored") for mode in ("decode", "prefill")
)


def facts(**changes: Any) -> Facts:
    fields: dict[str, Any] = {
        "outcome": "ok", "path": "dense", "parameters": {"query_chunk": 0}, "status": "exact", "oracle_error": 1e-7,
        "oracle_bound": 1e-6, "peak_bytes": 2**22, "growths": 0,
    }  # fmt: skip
    return Facts(**{**fields, **changes})


def compare_lines(ratios: tuple[float, float] = (1.0, 1.0), rounds: int = 40, **head: Any) -> list[Line]:
    """A comparison whose audit passes, with these ratios of decode and prefill; ``head``: changes of its facts."""
    lines: list[Line] = [
        Checked(scenario=each.name, side=side, facts=facts(**(head if side == "head" else {})))
        for each in SCENARIOS
        for side in ("base", "head")
    ]
    for launch in range(3):
        lines.append(Launched(number=launch, order=("base", "twin", "head"), device=SLUG))
        pairs = [
            Pair(each.name, lane, launch * rounds + turn, True, 100.0, 100.0 * share * math.exp(NOISE * (-1) ** turn))
            for turn in range(rounds)
            for each, ratio in zip(SCENARIOS, ratios, strict=True)
            for lane, share in (("head", ratio), ("aa", 1.0), ("slow_1", 1.01), ("slow_4", 1.04))
        ]
        lines.append(Measured(launch=launch, pairs=pairs, seconds=1.0))
    return lines


def write_compare(
    root: Path, lines: list[Line], *, base: Tree = BASE, head: Tree = HEAD, run_id: str = "compare-run", **changes: Any
) -> None:
    folder = CompareFolder(root / "compares" / SLUG / run_id)
    question = Question(base=base, head=head, scenarios=SCENARIOS, device="cuda")
    folder.start(environment(run_id, msgspec.to_builtins(question), **changes))
    folder.lines.append(*lines)
    folder.finish()


def commit_line(order: int, verdict: str, ratio: float, scenario_verdict: str) -> CommitLine:
    found = CommitScenario(
        scenario="decode T=512 auto", verdict=scenario_verdict, ratio=ratio, ratio_low=ratio - 0.004,
        ratio_high=ratio + 0.004, pairs=40,
    )  # fmt: skip
    return CommitLine(
        commit=f"{order:x}" * 40, date=f"2026-11-2{order}", subject=f"commit <{order}> & more", order=order,
        anchor="f" * 40, device=SLUG, settings="s", verdict=verdict, scenarios=(found,),
    )  # fmt: skip


def write_history(root: Path, last: str = "passed") -> None:
    good = [commit_line(order, "passed", 1.0, "same") for order in range(3)]
    end = commit_line(3, last, 1.05 if last == "regressed" else 1.0, "slower" if last == "regressed" else "same")
    LineFile[CommitLine](root / "history" / "ffffffffff-s.jsonl", CommitLine).append(*good, end)


def write_good(root: Path) -> Path:
    """Records from which follows: merge."""
    write_sweep(root, GOOD)
    write_training(root, STEPS)
    write_compare(root, compare_lines())
    write_history(root)
    return root
