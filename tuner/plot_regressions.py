"""Draws the regressions of a history: ratio to the anchor with its interval, per scenario over commits.

It takes ``tuner.regressions`` and gives SVG and PNG. All that a reader would hover for stands in the figure: commits of
change points, their subjects, outliers' ratios, and verdicts that are no judgement of time. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuner.plot_style import (
    BLACK,
    BLUE,
    GREY,
    SMALL_PT,
    VERMILION,
    WIDTH_IN,
    house_style,
    percent_text,
    put_ticks,
    ratio_ticks,
    save,
    sheet,
)  # fmt: skip
from tuner.regressions import RegressionPanel, RegressionPoint, commits_of, regression_panels

PANELS_PER_FIGURE = 8
COMMITS_LABELLED = 48
NOTES = 14
FEW = 9  # commits whose names fit side by side
NAME_ROOM = 0.1  # of a panel's width, for a commit's name
OUTLIER_ROOM = 0.3  # of the other ratios' range in log
STRIP = 0.35  # of a panel's height, below, for verdicts that are no judgement of time
MARKS = {
    "slower": ("^", VERMILION, VERMILION),
    "faster": ("v", BLUE, BLUE),
    "same": ("o", BLACK, BLACK),
    "undecided": ("o", GREY, "white"),
}
"""Verdict -> marker, colour, inside. Any other verdict (wrong, fell_back, crash, ...) is a cross with its name."""
LEGEND = (
    "▲ slower, ▼ faster, ● same, ○ undecided, ✕ another verdict, as its word says. Bar: ratios not rejected, cut at "
    "the frame. Dashed: change point. Grey line: median between change points."
)


def draw_regressions(
    points: Sequence[RegressionPoint], change_points: Mapping[str, Sequence[str]], out: Path, title: str
) -> list[Path]:
    """Write ``regressions`` (.svg, .png) into the folder ``out``; returns the files, none where there are no points.

    After eight scenarios it goes on in ``regressions-2`` ...

    Args:
        change_points: scenario -> commits from which on another level holds.
        title: what, range, device and anchor commit; what follows its first line break is the subtitle.
    """
    panels, commits = regression_panels(points, change_points), list(commits_of(points))
    written: list[Path] = []
    with house_style():
        for number, start in enumerate(range(0, len(panels), PANELS_PER_FIGURE), 1):
            figure = regressions_figure(panels[start : start + PANELS_PER_FIGURE], commits, title)
            written += save(figure, out, "regressions" if number == 1 else f"regressions-{number}")
    return written


def regressions_figure(panels: Sequence[RegressionPanel], commits: Sequence[str], title: str) -> Figure:
    """A panel per scenario below one another, commits across. Call within ``house_style``."""
    head, _, subtitle = title.partition("\n")
    caption = "\n".join([LEGEND, *notes(panels)])
    figure = sheet(head, subtitle, caption, (WIDTH_IN, 1.6 + 0.14 * caption.count("\n") + 1.5 * len(panels)))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _panel(axes, panel, commits)
    _commit_ticks(grid[-1], commits)
    return figure


def notes(panels: Iterable[RegressionPanel]) -> list[str]:
    """A line per change of level and per commit without a verdict on time, by commit: what, where, subject."""
    found: list[tuple[int, str]] = []
    for panel in panels:
        by_place = dict(panel.points)
        for level in panel.levels[1:]:
            change = "another level" if level.change is None else percent_text(level.change)
            if point := by_place.get(level.first):
                found.append((level.first, f"{point.commit[:7]} {change} in {panel.scenario}: {point.subject}"))
        for place, point in panel.points:
            if point.verdict not in MARKS:
                found.append((place, f"{point.commit[:7]} {point.verdict} in {panel.scenario}: {point.subject}"))
    lines = [line if len(line) <= 108 else f"{line[:107]}…" for _, line in sorted(found)]
    return lines if len(lines) <= NOTES else [*lines[:NOTES], f"and {len(lines) - NOTES} more"]


def _panel(axes: Axes, panel: RegressionPanel, commits: Sequence[str]) -> None:
    axes.set_yscale("log")
    words = [(place, point) for place, point in panel.points if point.verdict not in MARKS]
    low, high = frame(panel)
    axes.set_ylim(low / (high / low) ** (STRIP / (1 - STRIP) if words else 0), high)
    axes.set_xlim(-0.7, len(commits) - 0.3)
    axes.axhline(1.0, color=BLACK, linewidth=0.7)
    _levels(axes, panel, commits)
    for place, point in panel.points:
        _point(axes, place, point, low, high)
    _words(axes, words, turned=len(commits) > FEW)
    last = panel.points[-1][1]
    now = f", {percent_text(last.ratio)}" if last.ratio is not None else ""
    pad = 14 if len(panel.levels) > 1 else 6  # the commits of change points stand between title and frame
    axes.set_title(panel.scenario, fontweight="bold", pad=pad)
    axes.set_title(f"{last.commit[:7]}: {last.verdict}{now}", loc="right", fontsize=SMALL_PT, pad=pad)
    put_ticks(axes, "y", ratio_ticks(panel.low, panel.high, 5), percent_text)
    axes.set_ylabel("time against\nthe anchor (log)")


def frame(panel: RegressionPanel) -> tuple[float, float]:
    """The panel's ratios, with room at the edge where an outlier stands with its ratio in words."""
    ratios = [point.ratio for _, point in panel.points if point.ratio is not None]
    room = (panel.high / panel.low) ** OUTLIER_ROOM
    below, above = any(ratio < panel.low for ratio in ratios), any(ratio > panel.high for ratio in ratios)
    return panel.low / (room if below else 1.0), panel.high * (room if above else 1.0)


def _levels(axes: Axes, panel: RegressionPanel, commits: Sequence[str]) -> None:
    """Medians and change points, named above the frame where the last name leaves room; the notes have them all."""
    named = -math.inf
    for level in panel.levels if len(panel.levels) > 1 else ():
        if level.ratio is not None:
            axes.hlines(level.ratio, level.first - 0.5, level.last + 0.5, color=GREY, linewidth=1.0, zorder=1)
        if level.first == 0:
            continue
        axes.axvline(level.first - 0.5, color=BLACK, linewidth=0.9, linestyle=(0, (4, 2)))
        if level.first - named >= NAME_ROOM * len(commits):
            axes.annotate(
                commits[level.first][:7], (level.first - 0.5, 1.0), (0, 1), xycoords=("data", "axes fraction"),
                textcoords="offset points", va="bottom", ha="center", fontsize=SMALL_PT,
            )  # fmt: skip
            named = level.first


def _point(axes: Axes, place: int, point: RegressionPoint, bottom: float, top: float) -> None:
    if point.ratio is None:
        if point.verdict in MARKS:
            marker, colour, inside = MARKS[point.verdict]
            axes.plot(place, bottom, marker=marker, color=colour, markerfacecolor=inside, clip_on=False)
            axes.annotate("no ratio", (place, bottom), (0, 6), textcoords="offset points", ha="center")
        return
    marker, colour, inside = MARKS.get(point.verdict, ("x", BLACK, BLACK))
    shown = min(max(point.ratio, bottom), top)
    low = max(point.ratio_low, bottom)
    high = top if point.ratio_high is None else min(point.ratio_high, top)
    if low < high:
        axes.vlines(place, low, high, color=colour, linewidth=0.9)
    axes.plot(place, shown, marker=marker, color=colour, markerfacecolor=inside, clip_on=False)
    if shown != point.ratio:
        side, where = (-7, "top") if point.ratio > shown else (7, "bottom")
        axes.annotate(
            percent_text(point.ratio), (place, shown), (0, side), textcoords="offset points", ha="center", va=where
        )


def _words(axes: Axes, words: Sequence[tuple[int, RegressionPoint]], *, turned: bool) -> None:
    """Crosses at the foot of the panel for verdicts that are no judgement of time, the first of a run with its word."""
    across = axes.get_xaxis_transform()
    before = (-2, "")
    for place, point in words:
        axes.plot(place, 0.05, marker="x", color=BLACK, transform=across, clip_on=False)
        if before != (place - 1, point.verdict):
            axes.annotate(
                point.verdict, (place, 0.05), (0, 5), xycoords=across, textcoords="offset points", va="bottom",
                ha="center", rotation=90 if turned else 0, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.3},
            )  # fmt: skip
        before = (place, point.verdict)


def _commit_ticks(axes: Axes, commits: Sequence[str]) -> None:
    step = math.ceil(len(commits) / COMMITS_LABELLED)
    chosen = range(0, len(commits), step)
    axes.set_xticks(list(chosen), [commits[place][:7] for place in chosen], rotation=90 if len(commits) > FEW else 0)
    axes.set_xlabel("commit, oldest first" + (f" (one in {step} is named)" if step > 1 else ""))
