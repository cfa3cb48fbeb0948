"""Reserves: what each one costs in bytes and buys in latency and growths, from the records of call sequences.

Pure functions from records to frozen values; ``tuner.report`` tells them and ``tuner.plot`` draws them. It recommends
nothing: the Pareto set and the smallest reserve with no growth are facts of one measured sequence.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import msgspec

from nsa.problem import SelectionProblem
from tuner.plot_info import Family, family_of, quantile
from tuner.record import Outcome, Record


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """One reserve along a call sequence. ``growths`` counts those after the first call, which allocates by design.

    ``reserves``: the reserve parameters, in elements. ``reserved_bytes``: what the workspace held at the end.
    """

    candidate: str
    reserves: dict[str, int | float | str | bool]
    reserved_bytes: int
    peak_bytes: int | None
    median_us: float
    p99_us: float
    growths: int
    calls: int


class ReservePanel(msgspec.Struct, frozen=True, kw_only=True):
    """The rungs of one path at one problem, by ascending bytes.

    ``pareto``: indices of the rungs that no other one beats in bytes and p99 at once. ``enough``: index of the smallest
    reserve with no growth, None where every one grew. ``failed``: outcomes of the rungs without a time.
    """

    family: Family
    T: int
    path: str
    rungs: tuple[Rung, ...]
    pareto: tuple[int, ...]
    enough: int | None
    failed: tuple[Outcome, ...]


def reserve_panels(records: Iterable[Record]) -> tuple[ReservePanel, ...]:
    """A panel per problem and path of the reserve records, in order of first appearance."""
    groups: dict[tuple[Family, int, str], list[Record]] = {}
    for record in records:
        if record.stage == "reserve":
            problem = msgspec.convert(record.problem, SelectionProblem)
            groups.setdefault((family_of(problem, record.pattern), problem.T, record.path), []).append(record)
    return tuple(_reserve_panel(*key, group) for key, group in groups.items())


def _reserve_panel(family: Family, T: int, path: str, records: list[Record]) -> ReservePanel:
    found = [rung for rung in map(rung_of, records) if rung is not None]
    rungs = tuple(sorted(found, key=lambda rung: (rung.reserved_bytes, list(map(str, rung.reserves.values())))))
    return ReservePanel(
        family=family, T=T, path=path, rungs=rungs, pareto=pareto_set(rungs), enough=smallest_without_growth(rungs),
        failed=tuple(record.outcome for record in records if record.outcome != "ok"),
    )  # fmt: skip


def rung_of(record: Record) -> Rung | None:
    """A reserve record as a rung; None without samples or bytes."""
    if record.outcome != "ok" or not record.sequence or record.workspace_bytes is None:
        return None
    us = [sample.us for sample in record.sequence]
    return Rung(
        candidate=record.candidate,
        reserves={name: value for name, value in record.parameters.items() if name.startswith("reserve")},
        reserved_bytes=record.workspace_bytes, peak_bytes=record.peak_bytes, median_us=statistics.median(us),
        p99_us=quantile(us, 0.99), growths=record.sequence[-1].growths - record.sequence[0].growths, calls=len(us),
    )  # fmt: skip


def pareto_set(rungs: Sequence[Rung]) -> tuple[int, ...]:
    """Indices, by bytes, of the rungs than which no other has fewer bytes and a lower p99, one of them strictly."""
    costs = [(rung.reserved_bytes, rung.p99_us) for rung in rungs]
    kept = [
        index
        for index, mine in enumerate(costs)
        if not any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in costs)
    ]
    return tuple(sorted(kept, key=lambda index: (*costs[index], index)))


def smallest_without_growth(rungs: Sequence[Rung]) -> int | None:
    """Index of the rung with the fewest bytes among those that never grew after the first call; None if all grew.

    Where two hold the same bytes the lower p99 decides, then the order.
    """
    still = [index for index, rung in enumerate(rungs) if rung.growths == 0]
    return min(still, key=lambda index: (rungs[index].reserved_bytes, rungs[index].p99_us), default=None)
