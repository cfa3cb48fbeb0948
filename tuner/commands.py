"""What the commands do, once the command line has been read: walk a sweep, show a table, examine this machine, draw."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console

from nsa.device import device_identity, software_identity
from nsa.dispatch_table import DispatchTable, load_dispatch_table, read_dispatch_table, user_table_path
from nsa.errors import DispatchTableError, FlagError
from nsa.paths import SelectionPath
from nsa.planning import DEPLOYED_CACHE
from nsa.problem import DType, Mode, Operation, SelectionProblem
from tuner import report
from tuner.layer_search import LayerSearch
from tuner.ledger import size_of
from tuner.record import RunFolder, run_folders, write_whole
from tuner.regret import mean_regret, regrets
from tuner.search import Search
from tuner.space import EFFORTS, space_of
from tuner.sweep import SweepDefinition, SweepError, families, read_sweep
from tuner.table import write_table
from tuner.table_page import page

DEFAULT_REGISTRY = "nsa.paths:PATHS"
PR31: dict[Operation, dict[str, Any]] = {
    "selection": {"block_size": 64, "topk": 16},
    "window": {"block_size": 0, "topk": 1, "form": "ranges", "operation": "window", "window": 512},
    "compression": {
        **{"block_size": 0, "topk": 1, "form": "ranges", "operation": "compression"},
        **{"kernel_size": 32, "kernel_stride": 16},
    },
}
"""Sizes of the three operations in the shape of pull request 31."""


class SweepOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line said."""

    name: str
    budget: str | None
    effort: str
    overrides: tuple[str, ...]
    out: Path
    export: bool
    storage: str | None
    device: str
    commit: str
    registry: str
    json: bool


def sweep(options: SweepOptions) -> None:
    """Run a sweep, write the table, draw the figures, and say what the runtime will now do."""
    definition, device, paths = resolve(options)
    errors, out = Console(stderr=True, soft_wrap=True), results_console()
    with report.LiveProgress(errors) as listener:
        kind_of_search = LayerSearch if definition.level == "layer" else Search
        search = kind_of_search(
            definition, out=options.out, device=device, commit=options.commit,
            effort=EFFORTS[options.effort], storage=options.storage, registry=options.registry, paths=paths,
            listener=listener,
        )  # fmt: skip
        folder = search.run()
    from tuner.plot import draw_run  # matplotlib takes a second to import

    kind = torch.device(device).type
    tables = write_tables(options, folder, kind, errors)
    records, _ = folder.records()
    entries = [entry for entry in tables[0][1].entries if entry.run_id == folder.path.name] if tables else []
    figures = draw_run(folder, entries, folder.path / "figures")
    if options.json:
        emit(
            {
                "run": str(folder.path),
                "tables": [str(path) for path, _ in tables],
                "figures": [str(path) for path in figures],
                "entries": msgspec.to_builtins(entries),
            }
        )
    else:
        out.print(report.outcome_table(records))
        if options.registry != DEFAULT_REGISTRY:
            out.print(report.leaderboards(records))
        if entries:
            out.print()
            out.print("What the runtime will now take, by how much, how sure:")
            out.print(report.evidence_tables(entries, kind, out.width))
    errors.print(f"records  {folder.path}\nfigures  {folder.path / 'figures'}")
    for path, table in tables:
        errors.print(f"table    {path} ({report.table_summary(table)})")
    errors.print("next     nsa-tune show    nsa-tune doctor    nsa-tune plot    (in Python: nsa.selection_attention)")


def results_console() -> Console:
    """Stdout; not narrower than the tables where it is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=130)


def write_tables(
    options: SweepOptions, folder: RunFolder, kind: str, errors: Console
) -> list[tuple[Path, DispatchTable]]:
    """Write the user's table, and the one to commit if asked. A sweep of reserves has no entries and writes none."""
    from tuner.table import entries_of

    if options.registry != DEFAULT_REGISTRY:
        errors.print(f"no table: the runtime does not know the paths of {options.registry}")
        return []
    if not entries_of(folder.records()[0]):
        return []
    slug = device_identity(kind).slug
    targets = [user_table_path(device_identity(kind))]
    if options.export:
        targets.append(options.out / "dispatch_tables" / f"{slug}.json")
    written = []
    for path in targets:
        set_aside(path, errors)
        table, word = write_table(path, folder, keep=True)
        if word:
            errors.print(word)
        written.append((path, table))
    return written


def set_aside(path: Path, errors: Console) -> None:
    """Move a table file that cannot be read out of the way, so that a finished sweep is not lost behind it."""
    if not path.exists():
        return
    try:
        read_dispatch_table(path)
    except DispatchTableError as error:
        aside = path.with_suffix(".unreadable.json")
        path.replace(aside)
        errors.print(f"moved {path} to {aside}: {error}")


def plan(options: SweepOptions) -> None:
    """Print what a sweep would measure."""
    definition, device, paths = resolve(options)
    effort, target = EFFORTS[options.effort], torch.device(device)
    rows: list[dict[str, Any]] = []
    for family in families(definition, target.type):
        contexts = [problem.T for problem in family.problems]
        if definition.level == "layer":
            search = LayerSearch(
                definition, out=options.out, device=device, commit=options.commit, effort=effort, paths=paths
            )
            candidates, left_out = len(search.combinations(family.problems[-1])), dict[str, str]()
        else:
            space, left_out = space_of(definition, effort, paths, family, device)
            candidates = size_of(space)
        rows.append({"family": family.name, "contexts": contexts, "candidates": candidates, "left_out": left_out})
    if options.json:
        emit({"sweep": definition.name, "device": device, "budget_s": definition.budget_s, "families": rows})
        return
    out = Console(soft_wrap=True)
    out.print(
        f"{definition.name}: {definition.description}; {definition.budget_s:.0f} s on {device}, {effort.pairs} pairs"
    )
    for row in rows:
        out.print(f"  {row['family']}: contexts {row['contexts']}, {row['candidates']} candidates each")
        for name, reason in row["left_out"].items():
            out.print(f"    without {name}: {reason}")


def resolve(options: SweepOptions) -> tuple[SweepDefinition, str, dict[str, SelectionPath]]:
    """The sweep with its overrides, the device, and the paths. Raises SweepError for what cannot be."""
    if options.effort not in EFFORTS:
        raise SweepError(f"--effort {options.effort!r}: expected one of {list(EFFORTS)}")
    definition = read_sweep(options.name, options.overrides)
    if options.budget is not None:
        definition = msgspec.structs.replace(definition, budget_s=seconds(options.budget))
    paths = read_registry(options.registry)
    unknown = sorted(set(definition.paths) - set(paths))
    if unknown:
        raise SweepError(f"sweep {definition.name!r} names unknown paths {unknown}; expected some of {sorted(paths)}")
    device = choose_device(options.device)
    check_ladders(definition, paths, device)
    return definition, device, paths


def check_ladders(definition: SweepDefinition, paths: dict[str, SelectionPath], device: str) -> None:
    """Raise SweepError for a ladder of an unknown path or parameter, or of values that no problem's ladder has."""
    problems = [problem for family in families(definition, device) for problem in family.problems]
    for name, ladders in definition.ladders.items():
        if name not in paths:
            raise SweepError(f"sweep {definition.name!r} has ladders for {name!r}, expected some of {sorted(paths)}")
        own = [problem for problem in problems if problem.operation in paths[name].operations]
        if not own:
            continue  # a ladder for an operation that --set left out
        items = [item for problem in own for item in paths[name].tunables(problem, torch.device("cpu"))]
        for parameter, values in ladders.items():
            known = [item for item in items if item.name == parameter]
            if not known:
                names = sorted({item.name for item in items})
                raise SweepError(f"sweep {definition.name!r}: {name} has no parameter {parameter!r}, it has {names}")
            for fault in filter(None, (known[-1].fault(value) for value in values)):
                if not isinstance(known[-1].default, str):
                    raise SweepError(f"sweep {definition.name!r}: ladder of {name}: {fault}")


def read_registry(registry: str) -> dict[str, SelectionPath]:
    """The PATHS at ``module:NAME``. Raises SweepError."""
    module, _, name = registry.partition(":")
    try:
        found: dict[str, SelectionPath] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SweepError(f"--registry {registry!r}: {error}; expected module:NAME of a dict of paths") from error
    if not isinstance(found, dict):
        raise SweepError(f"--registry {registry!r} is a {type(found).__name__}, expected a dict of paths")
    return found


def choose_device(asked: str) -> str:
    """``auto`` is the GPU where there is one. Raises SweepError for a GPU that is not there."""
    if asked not in ("auto", "cpu", "cuda"):
        raise SweepError(f"--device {asked!r}: expected auto, cpu or cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise SweepError("--device cuda: torch sees no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def seconds(text: str) -> float:
    """``90s``, ``10m``, ``1h`` or plain seconds. Raises SweepError."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    number = text[:-1] if unit else text
    try:
        value = float(number) * (unit or 1.0)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise SweepError(f"--budget {text!r}: expected a time such as 90s, 10m or 1h")
    return value


def show(path: Path | None, *, markdown: Path | None, records: Path, json: bool) -> None:
    """Print a table with its evidence, or write it as a page."""
    table = read_dispatch_table(path) if path else load_dispatch_table()
    if markdown:
        write_whole(markdown, page(table, records).encode())
        print(markdown)
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


def regret(run: Path, path: Path | None, *, hold_out: bool, json: bool) -> None:
    """Print the regret of a table's answers against a run."""
    folder = RunFolder(run)
    if not folder.environment_file.exists():
        raise SweepError(f"no run in {run}: expected a folder with environment.json, as 'nsa-tune sweep' leaves it")
    table = read_dispatch_table(path) if path else load_dispatch_table()
    found = regrets(table, folder.records()[0], hold_out=hold_out)
    if json:
        emit({"run": str(run), "mean_regret": mean_regret(found), "problems": msgspec.to_builtins(found)})
        return
    out = results_console()
    out.print(report.regret_tables(found))
    mean = mean_regret(found)
    unknown = sum(one.regret is None for one in found)
    text = (
        "no problem has one"
        if mean is None
        else f"{mean:.2%} in the mean, {max(o.regret or 0 for o in found):.2%} at most"
    )
    out.print(f"regret: {text}" + (f"; {unknown} of {len(found)} unknown" if unknown else ""))


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
    out = Console(highlight=False, soft_wrap=True)
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
    from tuner.table import entries_of

    swept = [found for found in run_folders(out / "records") if found.trials_file.exists()]  # training runs have none
    folder = RunFolder(run) if run else next(reversed(swept), None)
    if folder is None or not folder.environment_file.exists():
        raise SweepError(f"no run below {run or out / 'records'}; run 'nsa-tune sweep' first")
    figures = draw_run(folder, entries_of(folder.records()[0]), to or folder.path / "figures")
    for figure in figures:
        print(figure)


def emit(value: Any) -> None:
    """JSON on stdout."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
