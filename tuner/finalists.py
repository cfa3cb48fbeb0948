"""Finalists: what screening says of a problem's candidates, and what they are compared with. It runs nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from nsa.paths import Candidate, SelectionPath
from tuner.record import Record
from tuner.rounds import rounds_of

FINALISTS = 4
NEAR = math.log(1.1)
"""Screened within 10 % of the baseline or faster: worth a place in the shoot-out."""


def screened(records: Sequence[Record], base: Candidate) -> dict[str, float]:
    """Candidate name -> median log-ratio to the baseline in shared screening rounds of one problem."""
    taken = rounds_of(records)
    against = taken.get(base.name, {})
    return {
        name: statistics.median(math.log(us / against[number]) for number, us in found.items() if number in against)
        for name, found in taken.items()
        if against.keys() & found.keys()
    }


def finalists(records: Sequence[Record], base: Candidate) -> list[Candidate]:
    """The fastest by screening that are near the baseline, and the best of each of the two fastest paths."""
    ratios = screened(records, base)
    made = {record.candidate: Candidate(path=record.path, parameters=record.parameters) for record in records}
    ranked = sorted(ratios, key=ratios.__getitem__)
    near = [name for name in ranked if ratios[name] < NEAR][:FINALISTS]
    by_path: dict[str, str] = {}
    for name in ranked:
        by_path.setdefault(made[name].path, name)
    return [made[name] for name in dict.fromkeys((*near, *list(by_path.values())[:2]))]


def fastest_first(candidates: Sequence[Candidate], elsewhere: Sequence[Mapping[str, float]]) -> list[Candidate]:
    """Candidates by what they took at the nearest problem that knows them, those of a nearer one first, and those that
    nobody knows last. ``elsewhere``: what ``screened`` says of other problems, the nearest first."""

    def place(candidate: Candidate) -> tuple[int, float]:
        known = ((far, ratios[candidate.name]) for far, ratios in enumerate(elsewhere) if candidate.name in ratios)
        return next(known, (len(elsewhere), 0.0))

    return sorted(candidates, key=place)


def stood_in(records: Sequence[Record], default: Candidate) -> Candidate:
    """The baseline that screening has settled on: the default, or where that failed what was timed in its place."""
    if any(record.candidate == default.name and record.outcome != "ok" for record in records):
        for record in records:
            if record.baseline and record.outcome == "ok":
                return Candidate(path=record.path, parameters=record.parameters)
    return default


def stand_in(base: Candidate, right: Sequence[Candidate], paths: Mapping[str, SelectionPath]) -> Candidate:
    """The baseline where it is among the right candidates, else the first of them; one that all calls can take."""
    if base in right or not right:
        return base
    return next((c for c in right if c.path not in paths or not paths[c.path].needs_complete), right[0])
