"""Marks: what a history's lines say: which commit brought what, and where levels change. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from tuner.attribution import Change
from tuner.judge import CompareResult
from tuner.regressions import RegressionPoint

WORSE = {"faster": 0, "same": 0, "undecided": 0, "unsupported": 0, "slower": 1}
"""Rank of a verdict; any other (wrong, fell_back, crash, ...) has FAILED."""
FAILED = 2
SPREAD_FLOOR = 0.003
"""Of log ratios over commits, for change points: what the gate resolves at best on a CPU."""
NO_IMPORT = "does not import"


class CommitScenario(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario of a commit against the anchor; as in ScenarioResult and Comparison."""

    scenario: str
    verdict: str
    reason: str = ""
    ratio: float | None = None
    ratio_low: float = 0.0
    ratio_high: float | None = None
    pairs: int = 0
    changes: tuple[Change, ...] = ()


class CommitLine(msgspec.Struct, frozen=True, kw_only=True):
    """One commit. ``order``: place in the range. ``verdict``: of the comparison, or "does not import"."""

    commit: str
    date: str
    subject: str
    order: int
    anchor: str
    device: str
    settings: str
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    run: str = ""
    scenarios: tuple[CommitScenario, ...] = ()


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """The first commit at which a scenario is worse than at the measured commit before it.

    ``suspects``: commits between those two that may be it too: they do not import or, where time is what is worse, were
    undecided.
    """

    commit: str
    subject: str
    scenario: str
    what: str
    suspects: tuple[str, ...] = ()


def scenarios_in(result: CompareResult) -> Iterable[CommitScenario]:
    """What a line keeps of a comparison."""
    for found in result.scenarios:
        figures = found.comparison
        yield CommitScenario(
            scenario=found.scenario, verdict=found.verdict, reason=found.reason, changes=found.changes,
            ratio=figures.ratio if figures else None, ratio_low=figures.ratio_low if figures else 0.0,
            ratio_high=figures.ratio_high if figures else None, pairs=figures.pairs if figures else 0,
        )  # fmt: skip


def marks_of(lines: Sequence[CommitLine]) -> Iterable[Mark]:
    """Where a scenario got worse: a worse verdict, an interval wholly above the last one's, or a new kind of change."""
    before: dict[str, tuple[int, CommitScenario]] = {}
    for place, line in enumerate(lines):
        for now in line.scenarios:
            known, last = before.get(now.scenario, (-1, None))
            what = worse_than(last, now)
            if what:
                timed = now.verdict == "slower"
                between = [each.commit for each in lines[known + 1 : place] if timed or each.verdict == NO_IMPORT]
                yield Mark(
                    commit=line.commit, subject=line.subject, scenario=now.scenario, what=what,
                    suspects=tuple(between),
                )  # fmt: skip
            if now.verdict != "undecided":
                before[now.scenario] = (place, now)


def worse_than(before: CommitScenario | None, now: CommitScenario) -> str:
    """What is worse, '' where nothing is. The first commit stands against the anchor, which is itself."""
    rank_before = WORSE.get(before.verdict, FAILED) if before else 0
    rank = WORSE.get(now.verdict, FAILED)
    known = {change.kind for change in before.changes} if before else set()
    fresh = [f"{change.kind}: {change.detail}" for change in now.changes if change.kind not in known]
    if rank > rank_before or (rank == FAILED and before and before.verdict != now.verdict):
        return "; ".join([now.verdict, *fresh] if fresh else [now.verdict, now.reason])
    if rank == 1 and before and before.ratio_high is not None and now.ratio_low > before.ratio_high:
        return f"slower still: {now.ratio:.3f} against the anchor, {before.ratio:.3f} before"
    memory = [text for text in fresh if text.startswith("more ")]
    return "; ".join(memory)


def change_points(lines: Sequence[CommitLine]) -> dict[str, tuple[str, ...]]:
    """Scenario -> commits from which its log ratio keeps another level (PELT, squared error). For attribution only."""
    import ruptures  # takes a second to import, and nothing else here needs it

    series: dict[str, list[tuple[str, float]]] = {}
    for line in lines:
        for found in line.scenarios:
            if found.ratio is not None:
                series.setdefault(found.scenario, []).append((line.commit, math.log(found.ratio)))
    points: dict[str, tuple[str, ...]] = {}
    for scenario, taken in series.items():
        values = np.array([value for _, value in taken])
        if len(values) < 2:
            continue
        spread = max(float(np.median(np.abs(np.diff(values)))), SPREAD_FLOOR)
        penalty = 3.0 * math.log(len(values) + 1) * spread**2
        ends = ruptures.Pelt(model="l2", min_size=1, jump=1).fit(values[:, None]).predict(pen=penalty)
        points[scenario] = tuple(taken[end][0] for end in ends[:-1])
    return points


def points_of(lines: Iterable[CommitLine]) -> list[RegressionPoint]:
    """The lines as ``tuner.plot_regressions`` draws them."""
    return [
        RegressionPoint(
            commit=line.commit, subject=line.subject, order=line.order, scenario=found.scenario,
            verdict=found.verdict, ratio=found.ratio, ratio_low=found.ratio_low, ratio_high=found.ratio_high,
        )
        for line in lines
        for found in line.scenarios
    ]  # fmt: skip
