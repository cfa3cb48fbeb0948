"""Draws the figures that have a panel per family or path: latency against context, and reserves.

It takes info objects of ``tuner.plot_info`` and ``tuner.reserves`` and gives matplotlib figures; it computes nothing
that a reader could take for a result. Call within ``plot_style.house_style``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from tuner.plot_info import Family, LatencyPanel, LatencyPoint, Rates, Untimed
from tuner.plot_style import (
    BLACK,
    GREY,
    SMALL_PT,
    WIDTH_IN,
    PathStyle,
    byte_text,
    byte_ticks,
    context_text,
    context_ticks,
    dodged,
    put_ticks,
    series,
    sheet,
    time_text,
    wrapped,
)  # fmt: skip
from tuner.reserves import ReservePanel, Rung

PANEL_IN = 2.55
FLOOR_BELOW = 5.0  # times below the fastest sample; a floor further down is told, so that the paths stay apart
LABEL_GAP_PT = 10.0

Labels = Mapping[Family, str]


def latency_figure(
    panels: Sequence[LatencyPanel], labels: Labels, subtitle: str, styles: Mapping[str, PathStyle], rates: Rates | None
) -> Figure:
    """Median per path with its band, and the floor, over contexts; log-log, a panel per family."""
    figure, grid = _grid(
        "Latency of each path's best candidate against context", subtitle, latency_caption(panels, rates), len(panels)
    )
    for axes, panel in zip(grid, panels, strict=False):
        _title(axes, labels[panel.family])
        axes.set_xlabel("context T (keys; 1k = 1024)" + wrapped_note(panel.untimed, panel))
        if panel.lines:
            _latency_panel(axes, panel, styles)
        else:
            _nothing(axes, "no path was timed")
    figure.draw_without_rendering()  # settles the sizes that the labels are kept apart by
    for axes, panel in zip(grid, panels, strict=False):
        if panel.lines:
            _label_lines(figure, axes, panel, styles)
    return figure


def latency_caption(panels: Sequence[LatencyPanel], rates: Rates | None) -> str:
    """What the marks mean, and what the floor is or why there is none."""
    text = (
        "Mark: median of the samples. Band, or bar at a single context: 10 to 90 % of them. Filled mark: timed in the "
        "shoot-out; hollow: in screening only. "
    )
    if rates is None:
        return text + "No floor line: no peak rates are known for this device."
    text += (
        f"Dotted: floor, the larger of needed operations at {rates.flops_per_s / 1e12:.4g} TFLOP/s and needed bytes at "
        f"{rates.bytes_per_s / 1e12:.3g} TB/s; in words, at the largest context, where it lies below the frame."
    )
    hot = any("hot cache" in panel.family for panel in panels)
    return text + (" With a hot cache bytes may come faster than that." if hot else "")


def wrapped_note(untimed: Sequence[Untimed], panel: LatencyPanel) -> str:
    """A line below the axis on the paths without a time, '' where there is none."""
    if not untimed:
        return ""
    everywhere = {point.T for points in panel.lines.values() for point in points} | {
        T for item in untimed for T in item.contexts
    }
    parts = [
        f"{item.path} {item.outcome}"
        + ("" if set(item.contexts) == everywhere else f" at {', '.join(map(context_text, item.contexts))}")
        for item in untimed
    ]
    return "\n" + wrapped("not timed: " + "; ".join(parts), 2.7)


def _grid(title: str, subtitle: str, caption: str, count: int) -> tuple[Figure, list[Axes]]:
    """A sheet with ``count`` axes in up to two columns."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = sheet(title, subtitle, caption, (WIDTH_IN if columns == 2 else 5.0, 1.3 + PANEL_IN * rows))
    grid = [axes for row in figure.subplots(rows, columns, squeeze=False) for axes in row]
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _title(axes: Axes, text: str) -> None:
    axes.set_title(wrapped(text, 2.3), fontsize=SMALL_PT, fontweight="bold")


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")
    axes.set_xticks([])
    axes.set_yticks([])


def _latency_panel(axes: Axes, panel: LatencyPanel, styles: Mapping[str, PathStyle]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for path, points in panel.lines.items():
        _latency_line(axes, points, styles[path])
    if panel.floor:
        axes.plot(*zip(*panel.floor, strict=True), color=GREY, linestyle=(0, (1, 2)), marker="_", zorder=1)
    everything = [point for points in panel.lines.values() for point in points]
    contexts = sorted({point.T for point in everything} | {T for T, _ in panel.floor})
    lowest = min(point.low_us for point in everything)
    low = max(min([lowest, *(us for _, us in panel.floor)]), lowest / FLOOR_BELOW)
    high = max(point.high_us for point in everything)
    pad = max(1.15, (contexts[-1] / contexts[0]) ** 0.05)
    axes.set_xlim(contexts[0] / pad, contexts[-1] * pad)
    axes.set_ylim(low / 1.3, high * 1.3)
    put_ticks(axes, "x", context_ticks(contexts), context_text)
    put_ticks(axes, "y", series(low / 1.3, high * 1.3), time_text)
    axes.set_ylabel("latency per call (log)")


def _latency_line(axes: Axes, points: Sequence[LatencyPoint], style: PathStyle) -> None:
    T, medians = [point.T for point in points], [point.median_us for point in points]
    low, high = [point.low_us for point in points], [point.high_us for point in points]
    axes.plot(T, medians, color=style.colour, linestyle=(0, style.dashes) if style.dashes else "-")
    if len(points) > 1:
        axes.fill_between(T, low, high, color=style.colour, alpha=0.13, linewidth=0)
    else:
        axes.vlines(T, low, high, color=style.colour, linewidth=0.8)
    for point in points:
        inside = style.colour if point.stage == "shootout" else "white"
        axes.plot(point.T, point.median_us, marker=style.marker, color=style.colour, markerfacecolor=inside)


def _label_lines(figure: Figure, axes: Axes, panel: LatencyPanel, styles: Mapping[str, PathStyle]) -> None:
    """Each line's name right of the axes, kept apart, with a leader to the line's last point."""
    ends = [(path, points[-1].T, points[-1].median_us, styles[path].colour) for path, points in panel.lines.items()]
    bottom = axes.get_ylim()[0]
    for T, us in panel.floor[-1:]:
        ends.append(("floor" if us >= bottom else f"floor: {time_text(us)}", T, max(us, bottom), GREY))
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((T, us))[1]) for _, T, us, _ in ends]
    right = offset_copy(axes.transAxes, fig=figure, x=12, units="points")
    height_pt = axes.get_window_extent().height / figure.dpi * 72
    places = dodged(wanted, LABEL_GAP_PT / height_pt)
    for (name, T, us, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            name, (T, us), (1.0, place), textcoords=right, va="center", fontsize=SMALL_PT,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkB": 4},
            annotation_clip=False,
        )  # fmt: skip


def reserve_figure(
    panels: Sequence[ReservePanel], labels: Labels, subtitle: str, styles: Mapping[str, PathStyle]
) -> Figure:
    """p99 latency against reserved bytes, a mark per rung and a panel per problem and path."""
    caption = (
        "A mark per reserve, along one sequence of calls with growing, alternating and shrinking context. Number: "
        "growths after the first call. Line and filled marks: Pareto set of bytes and p99. Ring: smallest reserve with "
        f"no growth. p99 is a measured call, the slowest of fewer than 100. Calls a mark: {calls_text(panels)}."
    )
    figure, grid = _grid("What workspace reserves cost and buy", subtitle, caption, len(panels))
    for axes, panel in zip(grid, panels, strict=False):
        _title(axes, f"{panel.path}: {labels[panel.family]}, T up to {context_text(panel.T)}")
        failed = f"\nnot timed: {', '.join(panel.failed)}" if panel.failed else ""
        axes.set_xlabel("workspace at the end (log)" + failed)
        if panel.rungs:
            problem = [other for other in panels if (other.family, other.T) == (panel.family, panel.T)]
            _reserve_panel(axes, panel, styles[panel.path], [rung for other in problem for rung in other.rungs])
        else:
            _nothing(axes, "no reserve was timed")
    return figure


def calls_text(panels: Sequence[ReservePanel]) -> str:
    """How many calls the sequences had: "16", "16 to 160", "none"."""
    counts = sorted({rung.calls for panel in panels for rung in panel.rungs})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "none"


def _reserve_panel(axes: Axes, panel: ReservePanel, style: PathStyle, problem: Sequence[Rung]) -> None:
    """One path's rungs, on the y range of all rungs of the ``problem``, so that neighbours compare."""
    axes.set_yscale("log")
    sizes = [max(rung.reserved_bytes, 1) for rung in panel.rungs]
    axes.set_xscale("log", base=2)
    span = max(4.0, math.log2(max(sizes) / min(sizes)))
    left, right = min(sizes) / 2 ** (0.5 * span), max(sizes) * 2 ** (0.15 * span)  # room for the words at the left
    axes.set_xlim(left, right)
    low, high = min(rung.p99_us for rung in problem) / 1.5, max(rung.p99_us for rung in problem) * 1.6
    axes.set_ylim(low, high)
    best = [panel.rungs[index] for index in panel.pareto]
    axes.plot([r.reserved_bytes for r in best], [r.p99_us for r in best], color=style.colour)
    for index, rung in enumerate(panel.rungs):
        inside = style.colour if index in panel.pareto else "white"
        place = (max(rung.reserved_bytes, 1), rung.p99_us)
        axes.plot(*place, marker=style.marker, color=style.colour, markerfacecolor=inside)
        if index == panel.enough:
            axes.plot(*place, marker="o", markersize=13, color=BLACK, markerfacecolor="none", markeredgewidth=1.0)
        side, where = (-9, "right") if rung.growths else (9, "left")
        text = f"{rung.growths} growth{'s' * (rung.growths > 1)}" if rung.growths else "0"
        axes.annotate(text, place, (side, 0), textcoords="offset points", ha=where, va="center", fontsize=SMALL_PT)
    put_ticks(axes, "x", byte_ticks(left, right, 4), lambda size: byte_text(size) if size > 1 else "0")
    put_ticks(axes, "y", series(low, high), time_text)
    axes.set_ylabel("p99 latency per call (log)")
