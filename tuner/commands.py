"""What the commands do that read and show: a table, its regret, this machine, a run's figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from nsa.device import device_identity, software_identity
from nsa.dispatch_table import load_dispatch_table, read_dispatch_table, user_table_path
from nsa.errors import DispatchTableError, FlagError
from nsa.paths import SelectionPath
from nsa.planning import DEPLOYED_CACHE
from nsa.problem import DType, Mode, Operation, SelectionProblem
from tuner import report
from tuner.console import choose_device, emit, plain_console, read_registry, results_console
from tuner.record import DEFAULT_REGISTRY, RecordError, RunFolder, run_folders, write_whole
from tuner.regret import mean_regrets, regrets
from tuner.sweep import SweepError
from tuner.table import entries_of, write_table
from tuner.table_page import NOT_HERE, page

PR31: dict[Operation, dict[str, Any]] = {
    "selection": {"block_size": 64, "topk": 16},
    "window": {"block_size": 0, "topk": 1, "form": "ranges", "operation": "window", "window": 512},
    "compression": {
        **{"block_size": 0, "topk": 1, "form": "ranges", "operation": "compression"},
        **{"kernel_size": 32, "kernel_stride": 16},
    },
}
"""Sizes of the three operations in the shape of pull request 31."""


def show(path: Path | None, *, markdown: Path | None, records: Path, json: bool) -> None:
    """Print a table with its evidence, or write it as a page."""
    table = read_dispatch_table(path) if path else load_dispatch_table()
    if markdown:
        text = page(table, records)
        write_whole(markdown, text.encode())
        print(markdown)
        if missing := text.count(NOT_HERE):
            where = f"records of {missing} runs are not below {records}: name their folder with --records"
            print(f"{where}; how many calls their graphs held is not known", file=sys.stderr)
        return
    if json:
        sys.stdout.buffer.write(table.encode())
        return
    out = results_console()
    out.print(f"{path or 'in force here: tier ' + table.__dict__['tier']}: {report.table_summary(table)}")
    if not table.entries:
        out.print("no entries: every call takes its default path; run 'nsa-tune sweep' to measure this machine")
        return
    out.print(report.evidence_tables(table.entries, table.device.kind, out.width))
    worst = max(table.entries, key=lambda entry: entry.oracle_error / entry.oracle_bound)
    out.print(
        "oracle: every pick within its derived bound, "
        f"the nearest at {worst.oracle_error:.2e} of {worst.oracle_bound:.2e}"
    )
    out.print(f"runs: {', '.join(sorted({entry.run_id for entry in table.entries}))}")


def export(runs: Sequence[Path], to: Path) -> None:
    """Write a table from records."""
    for run in runs:
        folder = run_in(run)
        if not entries_of(folder.records()[0]):
            raise RecordError(f"{run}: no problem of this run was timed to its end, so it has no entries to export")
        table, word = write_table(to, folder, keep=True)
        if word:
            print(word, file=sys.stderr)
        print(f"{run.name}: {len(table.entries)} entries in {to}")


def run_in(folder: Path) -> RunFolder:
    """The run in a folder. Raises SweepError where there is none."""
    found = RunFolder(folder)
    if not found.environment_file.exists():
        raise SweepError(f"no run in {folder}: expected a folder with environment.json, as 'nsa-tune sweep' leaves it")
    return found


def regret(run: Path, path: Path | None, *, hold_out: bool, json: bool) -> None:
    """Print the regret of a table's answers against a run."""
    folder = run_in(run)
    table = read_dispatch_table(path) if path else load_dispatch_table()
    measured_on = folder.environment().device.get("slug")
    if measured_on not in (None, table.device.slug):
        raise SweepError(f"the run is of {measured_on}, the table of {table.device.slug}; name one with --table")
    found = regrets(table, folder.records()[0], hold_out=hold_out)
    if not found:
        raise RecordError(f"{run}: no problem of this run was timed, so nothing can be said of it")
    if json:
        emit({"run": str(run), "means": mean_regrets(found), "problems": msgspec.to_builtins(found)})
        return
    out = results_console()
    out.print(report.regret_tables(found))
    means = [
        f"{mean:.2%} in the mean and {worst:.2%} at most over {count} {status}"
        for status, (mean, worst, count) in mean_regrets(found).items()
    ]
    unknown = sum(one.regret is None for one in found)
    means += [f"unknown for {unknown}"] if unknown else []
    out.print(f"regret: {'; '.join(means)}", soft_wrap=True)


def doctor(*, json: bool) -> None:
    """Print device, versions, path availability and the table in force."""
    kind = choose_device("auto")
    identity, software = device_identity(kind), software_identity()
    paths = read_registry(DEFAULT_REGISTRY)
    availability = {name: path_states(path, kind) for name, path in paths.items()}
    operations = {name: path.operations for name, path in paths.items()}
    try:
        table = load_dispatch_table()
        state = f"tier {table.__dict__['tier']}: {report.table_summary(table)}"
    except (DispatchTableError, FlagError) as error:
        state = f"unusable: {error}"
    found: dict[str, Any] = {
        "device": msgspec.to_builtins(identity),
        "software": msgspec.to_builtins(software),
        "paths": availability,
        "operations": operations,
        "table": state,
        "user_table": str(user_table_path(identity)),
    }
    if json:
        emit(found)
        return
    out = plain_console()
    out.print(f"device   {identity.name} ({identity.slug}), {identity.units} {'threads' if kind == 'cpu' else 'SMs'}")
    versions = {k: v for k, v in msgspec.to_builtins(software).items() if v}
    out.print("software " + ", ".join(f"{name} {value}" for name, value in versions.items()))
    for name, states in availability.items():
        whys = "; ".join(f"{reason} ({', '.join(modes)})" for reason, modes in states.items())
        out.print(f"path     {name:<21} {', '.join(operations[name])}: {whys}")
    out.print(f"table    {state}")
    out.print(f"         a sweep here writes {user_table_path(identity)}")


def path_states(path: SelectionPath, kind: str) -> dict[str, list[str]]:
    """'available' or the reason why not -> the modes and dtypes it holds for, on the PR31 shape."""
    states: dict[str, list[str]] = {}
    modes: tuple[Mode, ...] = ("decode", "prefill", "train")
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    for mode in modes:
        for dtype in dtypes:
            problem = SelectionProblem(
                mode=mode, dtype=dtype, B=1, S=1 if mode == "decode" else 1024, T=1024, G=2, h=4, Dk=32, Dv=32,
                cache=DEPLOYED_CACHE[kind], **PR31[path.operations[0]],
            )  # fmt: skip
            device = torch.device(kind)
            reason = path.unsupported_reason(problem, device, path.defaults(problem, device))
            states.setdefault(reason or "available", []).append(f"{mode} {dtype}")
    if len(states) == 1:
        return {next(iter(states)): ["every mode, float32 and bfloat16"]}
    return states


def plot(run: Path | None, out: Path, to: Path | None) -> None:
    """Draw a run's figures from its records."""
    from tuner.plot import draw_run  # matplotlib takes a second to import

    swept = [found for found in run_folders(out / "records") if found.trials_file.exists()]  # training runs have none
    folder = RunFolder(run) if run else next(reversed(swept), None)
    if folder is None or not folder.environment_file.exists():
        raise SweepError(f"no run below {run or out / 'records'}; run 'nsa-tune sweep' first")
    figures = draw_run(folder, entries_of(folder.records()[0]), to or folder.path / "figures")
    for figure in figures:
        print(figure)
