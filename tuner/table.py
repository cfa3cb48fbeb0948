"""Table: from shoot-out records to dispatch entries with their evidence, and to the file that the runtime reads.

Only samples of the shoot-out stage count. It measures nothing and needs no GPU; run again on the same records it gives
the same table.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from nsa.device import DeviceIdentity, SoftwareIdentity
from nsa.dispatch_entry import DispatchEntry
from nsa.dispatch_table import DispatchTable, read_dispatch_table
from nsa.errors import DispatchTableError
from nsa.paths import PATHS, Candidate
from nsa.problem import SelectionProblem
from tuner import stats, verdict
from tuner.layer import LAYER, LayerSizes, choices_of
from tuner.record import DEFAULT_REGISTRY, Record, RecordError, RunFolder, by_problem, write_whole
from tuner.rounds import aligned_records

PATTERN_RANK = ("fixed", "scored", "smooth", "random")
"""Where two patterns pose the same dispatch problem, the one nearest to real use gives the entry."""


def entries_of(records: Iterable[Record]) -> list[DispatchEntry]:
    """One entry per measured problem, in order of measurement. Problems without a finished shoot-out have none."""
    found: dict[SelectionProblem, DispatchEntry] = {}
    shootouts = [record for record in records if record.stage == "shootout"]
    for group in by_problem(shootouts).values():
        timed = [record for record in group if record.outcome == "ok"]
        if any(record.path == LAYER for record in group):
            found.update({entry.problem(): entry for entry in layer_entries(timed)})
            continue
        picked = entry_of(timed)
        for entry in filter(None, (picked, incomplete_entry(timed, picked))):
            before = found.get(entry.problem())
            if before is None or PATTERN_RANK.index(entry.pattern) <= PATTERN_RANK.index(before.pattern):
                found[entry.problem()] = entry
    return list(found.values())


def incomplete_entry(records: list[Record], entry: DispatchEntry | None) -> DispatchEntry | None:
    """From a shoot-out whose pick runs complete selections only, the pick for those that do not say that they are.

    The same rounds decide, without such paths. To say so changes the work of the others at most in a dense prompt; an
    entry of a path that it changes says that it is ``hinted``. A pick that needs no hint serves all calls as it is.
    """
    if entry is None or not PATHS[entry.path].needs_complete:
        return None
    rest = [record for record in records if not PATHS[record.path].needs_complete]
    found = entry_of(
        [msgspec.structs.replace(record, problem={**record.problem, "complete": False}) for record in rest]
    )
    if found is None:
        return None
    return msgspec.structs.replace(found, hinted=found.problem().dense and PATHS[found.path].reads_complete)


def entry_of(records: list[Record]) -> DispatchEntry | None:
    """The pick of one problem's shoot-out, by ``verdict.pick``.

    None where the default was not measured, or where so few pairs were that no difference could have been certified:
    a default that stays for want of looking is no evidence.
    """
    picked = pick_of(records)
    if picked is None:
        return None
    by_name, default, chosen = picked
    winner = by_name[chosen.winner]

    def candidate(name: str) -> Candidate:
        return Candidate(path=by_name[name].path, parameters=by_name[name].parameters)

    problem = msgspec.convert(winner.problem, SelectionProblem)
    return DispatchEntry(
        **{name: getattr(problem, name) for name in SelectionProblem.__struct_fields__},
        path=winner.path,
        parameters=winner.parameters,
        default=candidate(default),
        tied=tuple(candidate(name) for name in chosen.tied),
        runner_up=candidate(chosen.runner_up) if chosen.runner_up else None,
        **evidence_of(winner, chosen),
    )


def pick_of(records: list[Record]) -> tuple[dict[str, Record], str, verdict.Pick] | None:
    """Records by candidate, the default's name and the pick; None without the default or without enough pairs."""
    by_name = {record.candidate: record for record in records if record.samples}
    default = next((name for name, record in by_name.items() if record.baseline), None)
    if default is None:
        return None
    samples = aligned_records(list(by_name.values()))
    peaks = {name: record.peak_bytes for name, record in by_name.items() if record.peak_bytes is not None}
    chosen = verdict.pick(default, samples, peaks, verdict.PICK_ALPHA)
    if chosen.pairs < stats.pairs_needed(alpha=verdict.PICK_ALPHA, scenarios=max(1, len(samples) - 1)):
        return None
    return by_name, default, chosen


def evidence_of(winner: Record, chosen: verdict.Pick) -> dict[str, Any]:
    """The fields of an entry that say how sure the pick is and where it comes from."""
    if winner.oracle_error is None or winner.oracle_bound is None:
        raise RecordError(f"run {winner.run_id}: {winner.candidate} has times but no oracle error; it was not checked")
    if not winner.oracle_error <= winner.oracle_bound:
        said = f"an error of {winner.oracle_error:.3g} where {winner.oracle_bound:.3g} is allowed"
        raise RecordError(f"run {winner.run_id}: {winner.candidate} has times and {said}")
    if not winner.kernels:
        raise RecordError(f"run {winner.run_id}: {winner.candidate} has times and was not seen to execute")
    return {
        "pattern": winner.pattern,
        "pairs": chosen.pairs,
        "ratio": chosen.ratio,
        "ratio_low": chosen.ratio_low if chosen.pairs else None,
        "ratio_high": chosen.ratio_high,
        "e_value": chosen.e_value if chosen.pairs else None,
        "median_us": statistics.median(sample.us for sample in winner.samples),
        "peak_bytes": winner.peak_bytes,
        "oracle_error": winner.oracle_error,
        "oracle_bound": winner.oracle_bound,
        "kernels": tuple(sorted(winner.kernels)),
        "run_id": winner.run_id,
        "date": winner.date,
    }


def layer_entries(records: list[Record]) -> list[DispatchEntry]:
    """Entries of level layer, of one layer's shoot-out: for each operation where the winner differs from the branches'
    choices. Their figures are the layer's; ``default`` is the branch's choice."""
    picked = pick_of(records)
    if picked is None or picked[2].winner == picked[1]:
        return []
    by_name, default, chosen = picked
    winner = by_name[chosen.winner]
    before, now = (choices_of(by_name[name].parameters) for name in (default, chosen.winner))
    problems = LayerSizes.of_pattern(winner.pattern).problems(msgspec.convert(winner.problem, SelectionProblem))
    return [
        DispatchEntry(
            **msgspec.structs.asdict(problems[operation]),
            path=now[operation].path,
            parameters=now[operation].parameters,
            default=before[operation],
            level="layer",
            **evidence_of(winner, chosen),
        )
        for operation in now
        if now[operation] != before[operation]
    ]


def write_table(path: Path, folder: RunFolder, *, keep: bool) -> tuple[DispatchTable, str]:
    """Write a run's entries to a table file; with ``keep``, next to the file's entries for other problems.

    Returns the table and a word on what was left out. Entries made by other software are not kept: their evidence does
    not hold here. Raises DispatchTableError for an unreadable file, which is left as it was, and RecordError, also for
    a run over paths of another registry, whose names may be those of the runtime's.
    """
    environment, (records, _) = folder.environment(), folder.records()
    registry = environment.sweep.get("registry", DEFAULT_REGISTRY)
    if registry != DEFAULT_REGISTRY:
        raise RecordError(f"run {folder.path.name} is of {registry}, whose paths the runtime does not know")
    try:
        device = msgspec.convert(environment.device, DeviceIdentity)
        software = msgspec.convert(environment.software, SoftwareIdentity)
    except msgspec.ValidationError as error:
        raise RecordError(f"{folder.environment_file}: not an environment of a sweep: {error}") from error
    fresh = entries_of(records)
    kept, word = kept_entries(path, device, software, fresh, records) if keep and path.exists() else ([], "")
    table = DispatchTable(device=device, software=software, entries=(*kept, *fresh))
    write_whole(path, table.encode())
    return table, word


def kept_entries(
    path: Path,
    device: DeviceIdentity,
    software: SoftwareIdentity,
    fresh: list[DispatchEntry],
    records: Iterable[Record],
) -> tuple[list[DispatchEntry], str]:
    """Entries of an existing table for problems that were not measured now at their level, and a word on what was left
    out."""
    old = read_dispatch_table(path)
    if old.device.slug != device.slug:
        raise DispatchTableError(f"{path} is for {old.device.slug}, this run was made on {device.slug}")
    if stale := old.software.stale_against(software):
        return [], f"left out {len(old.entries)} entries of {path}: {stale}; sweep them again"
    measured = {(entry.problem(), entry.level) for entry in fresh}
    twins = {(entry.problem(), entry.run_id) for entry in old.entries if (entry.problem(), entry.level) in measured}

    def replaced(entry: DispatchEntry) -> bool:
        """Measured again, or written beside one for the same calls with the hint, which was."""
        again = (entry.problem(), entry.level) in measured
        return again or (declared(entry.problem()), entry.run_id) in twins

    kept = [entry for entry in old.entries if not replaced(entry)]
    words = weaker(old.entries, fresh), untried(filter(replaced, old.entries), records)
    return kept, "; ".join(filter(None, words))


def declared(problem: SelectionProblem) -> SelectionProblem:
    """The same problem of selections that say that they are complete."""
    return msgspec.structs.replace(problem, complete=True)


def weaker(old: Iterable[DispatchEntry], fresh: Iterable[DispatchEntry]) -> str:
    """A word on certified picks in whose place a newer run, for want of time or quiet, puts a tie; '' without any."""
    ties = {(entry.problem(), entry.level) for entry in fresh if not entry.certified}
    lost = [entry for entry in old if entry.certified and (entry.problem(), entry.level) in ties]
    return lost_picks("certified before and a tie by this run", lost)


def untried(dropped: Iterable[DispatchEntry], records: Iterable[Record]) -> str:
    """A word on branches' picks in whose place a newer run puts others without having tried them; '' without any."""
    tried: dict[SelectionProblem, list[Record]] = {}
    for group in by_problem(record for record in records if record.stage in ("screen", "shootout")).values():
        tried.setdefault(declared(msgspec.convert(group[0].problem, SelectionProblem)), []).extend(group)

    def met(entry: DispatchEntry) -> bool:
        """By its path and parameters, of which an older entry may know fewer."""
        beside = tried.get(declared(entry.problem()), [])
        return any(one.path == entry.path and entry.parameters.items() <= one.parameters.items() for one in beside)

    lost = [entry for entry in dropped if entry.level == "branch" and not met(entry)]
    return lost_picks("replaced without having been tried by this run", lost)


def lost_picks(how: str, lost: list[DispatchEntry]) -> str:
    """A word on entries that a newer run replaces, and where they stand."""
    if not lost:
        return ""
    picks = ", ".join(f"{entry.mode} B{entry.B} T={entry.T} {entry.path}" for entry in lost)
    runs = ", ".join(dict.fromkeys(entry.run_id for entry in lost))
    return f"{how}: {picks}; sweep longer, or export {runs} again to have them back"
