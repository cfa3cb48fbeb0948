"""Regressions: the ratio to an anchor commit per scenario over the commits of a history, and its levels.

``RegressionPoint`` is what a history record boils down to; from points and change points ``regression_panels`` computes
what ``tuner.plot_regressions`` draws. Change points come from the caller; they attribute, they never judge. No torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import msgspec

LEAST = 0.01  # shown on either side of 1, so that noise does not look like news


class RegressionPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One commit in one scenario against the anchor commit.

    ``order``: position in the history, ascending; equal for all scenarios of a commit. ``ratio``: commit / anchor,
    above 1 is slower; None where there is no pair. ``ratio_low`` 0.0 and ``ratio_high`` None: not bounded on that side.
    ``verdict``: "slower", "faster", "same", "undecided", or what happened instead, such as "wrong" or "fell_back".
    """

    commit: str
    subject: str
    order: int
    scenario: str
    verdict: str
    ratio: float | None = None
    ratio_low: float = 0.0
    ratio_high: float | None = None


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch between change points: first and last place, median ratio (None without any), change from the last."""

    first: int
    last: int
    ratio: float | None
    change: float | None


class RegressionPanel(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario: (place, point) pairs, the ratios to show, and its levels. Place counts the commits from 0."""

    scenario: str
    points: tuple[tuple[int, RegressionPoint], ...]
    low: float
    high: float
    levels: tuple[Level, ...]


def commits_of(points: Iterable[RegressionPoint]) -> dict[str, str]:
    """Commit -> subject, in the history's order."""
    return {point.commit: point.subject for point in sorted(points, key=lambda point: point.order)}


def regression_panels(
    points: Sequence[RegressionPoint], change_points: Mapping[str, Iterable[str]]
) -> tuple[RegressionPanel, ...]:
    """A panel per scenario, in order of first appearance.

    Args:
        change_points: scenario -> commits from which on another level holds. Unknown ones raise ValueError.
    """
    places = {commit: place for place, commit in enumerate(commits_of(points))}
    scenarios = list(dict.fromkeys(point.scenario for point in points))
    strangers = [f"{s} at {c}" for s, commits in change_points.items() for c in commits if c not in places]
    strangers += [scenario for scenario in change_points if scenario not in scenarios]
    if strangers:
        raise ValueError(f"change points of no measured scenario or commit: {strangers}")
    panels = []
    for scenario in scenarios:
        mine = sorted((places[p.commit], p) for p in points if p.scenario == scenario)
        low, high = shown_range([point for _, point in mine])
        starts = sorted({places[commit] for commit in change_points.get(scenario, ())} - {0})
        levels = tuple(levels_of(mine, starts, len(places)))
        panels.append(RegressionPanel(scenario=scenario, points=tuple(mine), low=low, high=high, levels=levels))
    return tuple(panels)


def levels_of(points: Sequence[tuple[int, RegressionPoint]], starts: Sequence[int], count: int) -> list[Level]:
    """The stretches of ``count`` places that begin at 0 and at ``starts``."""
    levels: list[Level] = []
    for first, after in zip([0, *starts], [*starts, count], strict=True):
        ratios = [p.ratio for place, p in points if first <= place < after and p.ratio is not None]
        ratio = statistics.median(ratios) if ratios else None
        before = next((level.ratio for level in reversed(levels) if level.ratio is not None), None)
        change = None if ratio is None or before is None else ratio / before
        levels.append(Level(first=first, last=after - 1, ratio=ratio, change=change))
    return levels


def shown_range(points: Iterable[RegressionPoint]) -> tuple[float, float]:
    """The ratios to show: 1, points and interval ends, but for lone outliers, which would flatten all the rest.

    An outlier is three times further from the median (in log) than four fifths of all these are, and 5 % more.
    """
    timed = [point for point in points if point.ratio is not None]
    logs = [math.log(point.ratio or 1.0) for point in timed]
    ends = [math.log(end) for point in timed for end in (point.ratio_low, point.ratio_high) if end]
    centre = statistics.median(logs or [0.0])
    distances = sorted(abs(value - centre) for value in [*logs, *ends])
    reach = 3 * distances[math.ceil(0.8 * len(distances)) - 1] + 0.05 if distances else 0.0
    kept = [value for value in [*logs, *ends] if abs(value - centre) <= reach]
    low, high = min([*kept, -LEAST]), max([*kept, LEAST])
    pad = 0.12 * (high - low)
    return math.exp(low - pad), math.exp(high + pad)
