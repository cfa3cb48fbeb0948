"""Regret: how much slower a table's answer is than the best candidate that a run measured, problem by problem.

Against an exhaustive run it says what a short search gave away; on contexts that the table was not measured at, or with
each problem's own entry held out, what its answers between measurements give away. It measures nothing: both times come
from shared rounds of one run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec

from nsa.device import software_identity
from nsa.dispatch_entry import Status
from nsa.dispatch_table import DispatchTable
from nsa.paths import Candidate
from nsa.problem import SelectionProblem
from tuner.layer import LAYER
from tuner.record import Record, Stage, by_problem
from tuner.rounds import rounds_of


class Regret(msgspec.Struct, frozen=True, kw_only=True):
    """One problem. ``regret``: time of the table's answer over time of the best, less 1; 0 where it is the best.

    The median over ``rounds`` shared rounds of ``stage``. None, with ``reason``, where the run has no such rounds.
    """

    problem: SelectionProblem
    pattern: str
    status: Status
    answer: str
    best: str
    candidates: int
    regret: float | None
    stage: Stage | None = None
    rounds: int = 0
    reason: str = ""


def regrets(table: DispatchTable, records: Iterable[Record], *, hold_out: bool = False) -> list[Regret]:
    """What the table's answer to each problem of a run gives away, problems in order of measurement.

    hold_out: each problem is asked of the table without its own entry. The answers are those that it gives where it
    was measured: another torch or Triton here makes none stale.
    """
    table = DispatchTable(device=table.device, software=software_identity(), entries=table.entries)
    found = []
    for group in by_problem(record for record in records if record.path != LAYER).values():
        problem = msgspec.convert(group[0].problem, SelectionProblem)
        asked = without(table, problem) if hold_out else table
        choice = asked.lookup(problem)
        answer = Candidate(path=choice.path, parameters=choice.parameters).name
        found.append(regret_of(problem, group, answer, choice.status))
    return found


def regret_of(problem: SelectionProblem, records: Sequence[Record], answer: str, status: Status) -> Regret:
    """Regret of one answer, in the shoot-out where it stood there, else in the screening."""
    screened = rounds_of(record for record in records if record.stage == "screen")
    known = Regret(
        problem=problem,
        pattern=records[0].pattern,
        status=status,
        answer=answer,
        best="",
        candidates=len(screened),
        regret=None,
        reason="the run has no times of this answer",
    )
    stages: tuple[Stage, ...] = ("shootout", "screen")
    for stage in stages:
        taken = rounds_of(record for record in records if record.stage == stage)
        if answer not in taken:
            continue
        mine = taken[answer]
        shared = {
            name: [math.log(mine[number] / us) for number, us in rounds.items() if number in mine]
            for name, rounds in taken.items()
        }
        slower = {name: statistics.median(ratios) for name, ratios in shared.items() if ratios}
        best = max(slower, key=lambda name: (slower[name], name == answer))
        return msgspec.structs.replace(
            known, best=best, regret=math.expm1(slower[best]), stage=stage, rounds=len(shared[best]), reason=""
        )
    return known


def without(table: DispatchTable, problem: SelectionProblem) -> DispatchTable:
    """The table without its entries for a problem, whether its selections say that they are complete or not."""
    alike = [msgspec.structs.replace(problem, complete=complete) for complete in (False, True)]
    entries = tuple(entry for entry in table.entries if entry.problem() not in alike)
    return DispatchTable(device=table.device, software=table.software, entries=entries)


def mean_regrets(found: Sequence[Regret]) -> dict[Status, tuple[float, float, int]]:
    """Status of the answer -> mean and largest regret over the problems that have one, and their number."""
    known: dict[Status, list[float]] = {}
    for one in found:
        if one.regret is not None:
            known.setdefault(one.status, []).append(one.regret)
    return {status: (statistics.fmean(values), max(values), len(values)) for status, values in known.items()}
