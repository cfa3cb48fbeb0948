"""What ``nsa-tune sweep`` does, once the command line has been read: plan, walk, write the table, draw, say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console

from nsa.device import device_identity
from nsa.dispatch_entry import DispatchEntry
from nsa.dispatch_table import DispatchTable, read_dispatch_table, user_table_path
from nsa.errors import DispatchTableError
from nsa.paths import SelectionPath
from tuner import report
from tuner.console import choose_device, emit, plain_console, read_registry, results_console, seconds
from tuner.layer_search import LayerSearch
from tuner.ledger import size_of
from tuner.record import DEFAULT_REGISTRY, RecordError, RunFolder
from tuner.search import Search
from tuner.space import EFFORTS, space_of
from tuner.sweep import ALL_PATHS, SweepDefinition, SweepError, families, read_sweep
from tuner.table import entries_of, write_table


class SweepOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line said."""

    name: str
    budget: str | None
    effort: str
    overrides: tuple[str, ...]
    out: Path
    export: bool
    figures: bool
    storage: str | None
    device: str
    commit: str
    registry: str
    json: bool


def sweep(options: SweepOptions) -> int:
    """Run a sweep, write the table, draw the figures, and say what the runtime will now do. 1 if nothing was timed."""
    definition, device, paths = resolve(options)
    errors, out = plain_console(stderr=True), results_console()
    with report.LiveProgress(errors) as listener:
        kind_of_search = LayerSearch if definition.level == "layer" else Search
        search = kind_of_search(
            definition, out=options.out, device=device, commit=options.commit,
            effort=EFFORTS[options.effort], storage=options.storage, registry=options.registry, paths=paths,
            listener=listener,
        )  # fmt: skip
        folder = search.run()
    kind = torch.device(device).type
    records, _ = folder.records()
    if not options.json:
        out.print(report.outcome_table(records))
    tables = write_tables(options, folder, kind, errors)
    entries = [entry for entry in tables[0][1].entries if entry.run_id == folder.path.name] if tables else []
    figures = drawn(folder, entries) if options.figures else []
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
        if options.registry != DEFAULT_REGISTRY:
            out.print(report.leaderboards(records))
        if entries:
            out.print()
            out.print("What the runtime will now take, by how much, how sure:")
            out.print(report.evidence_tables(entries, kind, out.width))
    errors.print(f"records  {folder.path}")
    if figures:
        errors.print(f"figures  {folder.path / 'figures'}")
    for path, table in tables:
        errors.print(f"table    {path} ({report.table_summary(table)})")
    if not any(record.outcome == "ok" for record in records):
        errors.print("failed   no candidate was proven and timed; 'What ran' says why not")
        return 1
    errors.print("next     nsa-tune show    nsa-tune doctor    nsa-tune plot    (in Python: nsa.selection_attention)")
    return 0


def drawn(folder: RunFolder, entries: list[DispatchEntry]) -> list[Path]:
    """A run's figures, beside its records."""
    from tuner.plot import draw_run  # matplotlib takes a second to import

    return draw_run(folder, entries, folder.path / "figures")


def write_tables(
    options: SweepOptions, folder: RunFolder, kind: str, errors: Console
) -> list[tuple[Path, DispatchTable]]:
    """Write the user's table, and the one to commit if asked. A sweep of reserves has no entries and writes none."""
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
        try:
            set_aside(path, errors)
            table, word = write_table(path, folder, keep=True)
        except OSError as error:
            how = f"the run is whole: 'nsa-tune export {folder.path} --to FILE' writes its table elsewhere"
            raise RecordError(f"cannot write the table {path}: {error.strerror}; {how}") from error
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


def plan(options: SweepOptions) -> int:
    """Print what a sweep would measure. 0."""
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
        return 0
    out = plain_console()
    out.print(
        f"{definition.name}: {definition.description}; {definition.budget_s:.0f} s on {device}, {effort.pairs} pairs"
    )
    for row in rows:
        out.print(f"  {row['family']}: contexts {row['contexts']}, {row['candidates']} candidates each")
        for name, reason in row["left_out"].items():
            out.print(f"    without {name}: {reason}")
    return 0


def resolve(options: SweepOptions) -> tuple[SweepDefinition, str, dict[str, SelectionPath]]:
    """The sweep with its overrides, the device, and the paths. Raises SweepError for what cannot be."""
    if options.effort not in EFFORTS:
        raise SweepError(f"--effort {options.effort!r}: expected one of {list(EFFORTS)}")
    definition = read_sweep(options.name, options.overrides)
    if options.budget is not None:
        definition = msgspec.structs.replace(definition, budget_s=seconds(options.budget))
    paths = read_registry(options.registry)
    if options.registry != DEFAULT_REGISTRY and definition.paths == ALL_PATHS:  # the sweep names none
        ladders = {name: ladder for name, ladder in definition.ladders.items() if name in paths}
        definition = msgspec.structs.replace(definition, paths=tuple(paths), ladders=ladders)
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
