"""Draws a table's picks: the winner map, and the evidence as a forest plot.

It takes ``plot_info.PickInfo`` and gives matplotlib figures. Call within ``plot_style.house_style``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nsa.paths import Candidate
from tuner.plot_info import Family, PickInfo
from tuner.plot_style import (
    BLACK,
    GREY,
    SMALL_PT,
    WIDTH_IN,
    PathStyle,
    context_text,
    evidence_text,
    put_ticks,
    ratio_text,
    ratio_ticks,
    sheet,
    wrapped,
)  # fmt: skip

CELL_IN, ROW_IN, LABELS_IN = 1.12, 0.62, 1.6
BLOCK = 5  # contexts that fit the page side by side
LINE_IN = 0.15
COLUMNS = {34: "pairs", 84: "E"}  # right edges, in points from the axes; a fixed width, so that the layout settles
BEYOND = 4.0  # an interval is drawn to this factor beyond the ratios shown, then it ends in an arrow

STAND_IN = " Stand-in: the first right candidate, the default being wrong or out of memory."

Labels = Mapping[Family, str]


def winners_figure(picks: Sequence[PickInfo], labels: Labels, subtitle: str, styles: Mapping[str, PathStyle]) -> Figure:
    """Families down, contexts across, five to a block: the path that the table names, its ratio and how sure it is."""
    contexts = sorted({pick.T for pick in picks})
    blocks = [contexts[start : start + BLOCK] for start in range(0, len(contexts), BLOCK)]
    families = list(dict.fromkeys(pick.family for pick in picks))
    caption = (
        "Filled: certified. Hatched: the default stays by a tie, nothing being certified against it. White: nothing "
        "to compare with. Ratio: time over the default's; where the default stays, over its runner-up's."
    ) + (STAND_IN if any(pick.base == "stand-in" for pick in picks) else "")
    width = max(5.0, LABELS_IN + CELL_IN * len(blocks[0]))
    figure = sheet(
        "Which path the table names", subtitle, caption, (width, 1.5 + (0.4 + ROW_IN * len(families)) * len(blocks))
    )
    for axes, block in zip(figure.subplots(len(blocks), 1, squeeze=False)[:, 0], blocks, strict=True):
        for pick in picks:
            if pick.T in block:
                _cell(axes, block.index(pick.T), families.index(pick.family), pick, styles[pick.pick.path])
        axes.set_xlim(-0.5, len(blocks[0]) - 0.5)
        axes.set_ylim(len(families) - 0.5, -0.5)
        axes.set_xticks(range(len(block)), [context_text(T) for T in block])
        axes.set_yticks(range(len(families)), [wrapped(labels[family], LABELS_IN) for family in families])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("context T (keys; 1k = 1024)")
    return figure


def _cell(axes: Axes, column: int, row: int, pick: PickInfo, style: PathStyle) -> None:
    pale = tuple(1 - 0.3 * (1 - part) for part in to_rgb(style.colour))
    certified, tie = pick.certainty == "certified", pick.certainty == "tie"
    box = Rectangle(
        (column - 0.47, row - 0.45), 0.94, 0.9, facecolor=pale if certified else "white",
        edgecolor=pale if tie else GREY, hatch="////" if tie else None, linewidth=0 if tie else 0.5,
    )  # fmt: skip
    axes.add_patch(box)
    back = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if tie else None
    than = "runner-up" if pick.stays else pick.base
    ratio = "" if pick.ratio is None else f"\n{ratio_text(pick.ratio)} {than}"
    text = f"{pick.pick.path}{ratio}\n{standing(pick)}"
    axes.text(column, row, text, ha="center", va="center", fontsize=SMALL_PT, linespacing=1.15, bbox=back)


def standing(pick: PickInfo) -> str:
    """How the pick stands, in two words: "faster", "default: best", "stand-in: tie", "only one"."""
    if pick.certainty == "unopposed":
        return "only one"
    return f"{pick.base}: {'tie' if pick.certainty == 'tie' else 'best'}" if pick.stays else "faster"


def evidence_figure(
    picks: Sequence[PickInfo], labels: Labels, subtitle: str, styles: Mapping[str, PathStyle]
) -> Figure:
    """A row per entry under its family: ratio with interval on a log axis, pairs and e-value at the right."""
    names = [wrapped(f"T {context_text(pick.T)}: {contest(pick)}", 2.7) for pick in picks]
    heads, rows, lines = evidence_rows(picks, names)
    caption = (
        "Mark: median ratio. Filled: certified; hollow: tie. Bar: ratios that the pairs do not reject; an arrow where "
        "it goes on. A row compares the pick with the default, or the default with its runner-up."
    ) + (STAND_IN if any(pick.base == "stand-in" for pick in picks) else "")
    figure = sheet("How sure each pick is", subtitle, caption, (WIDTH_IN, 1.9 + LINE_IN * lines))
    axes = figure.subplots()
    low, high = ratio_range(picks)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(lines, 0)
    axes.axvline(1.0, color=BLACK, linewidth=0.8)
    for pick, place in zip(picks, rows, strict=True):
        _evidence_row(axes, place, pick, styles[pick.pick.path], low, high)
    put_ticks(axes, "x", ratio_ticks(low, high), ratio_text)
    axes.set_xlabel("time of the pick / time of what it is compared with (log; left of 1 the pick is faster)")
    _evidence_names(axes, dict(zip(rows, names, strict=True)), {line: labels[name] for line, name in heads.items()})
    return figure


def _evidence_names(axes: Axes, rows: Mapping[float, str], heads: Mapping[float, str]) -> None:
    """Names of rows and families at the left, of the columns at the right, by line of text from the top."""
    axes.set_yticks([*rows, *heads], [*rows.values(), *(wrapped(head, 2.3) for head in heads.values())])
    for label in axes.get_yticklabels()[len(rows) :]:
        label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0, pad=8)
    axes.spines["left"].set_visible(False)
    for place, word in COLUMNS.items():
        axes.annotate(
            word, (1.0, 1.0), (place, 2), xycoords="axes fraction", textcoords="offset points", ha="right",
            va="bottom", fontweight="bold",
        )  # fmt: skip


def evidence_rows(picks: Sequence[PickInfo], names: Sequence[str]) -> tuple[dict[float, Family], list[float], float]:
    """In lines of text from the top: where each family's heading and each pick stands, and how many lines in all."""
    heads: dict[float, Family] = {}
    rows: list[float] = []
    line = 0.0
    for number, (pick, name) in enumerate(zip(picks, names, strict=True)):
        if number == 0 or picks[number - 1].family != pick.family:
            heads[line + 1.0] = pick.family
            line += 2.0
        tall = name.count("\n") + 1.6
        rows.append(line + tall / 2)
        line += tall
    return heads, rows, line


def ratio_range(picks: Sequence[PickInfo]) -> tuple[float, float]:
    """The ratios to show: all ratios and 1, and interval ends that lie within a factor of BEYOND of those."""
    ratios = [pick.ratio for pick in picks if pick.ratio is not None] + [1.0]
    ends = [pick.ratio_low for pick in picks] + [pick.ratio_high or 0.0 for pick in picks]
    within = [end for end in ends if min(ratios) / BEYOND <= end <= max(ratios) * BEYOND]
    low, high = min(ratios + within), max(ratios + within)
    pad = max(1.02, (high / low) ** 0.06)
    return low / pad, high * pad


def _evidence_row(axes: Axes, row: float, pick: PickInfo, style: PathStyle, low: float, high: float) -> None:
    transform = axes.get_yaxis_transform()
    for place, text in zip(COLUMNS, (f"{pick.pairs}", evidence_text(pick.e_value)), strict=True):
        axes.annotate(
            text, (1.0, row), (place, 0), xycoords=transform, textcoords="offset points", ha="right", va="center"
        )
    if pick.ratio is None:
        axes.text(0.5, row, "nothing to compare with", transform=transform, ha="center", va="center", fontsize=SMALL_PT)
        return
    left = max(pick.ratio_low, low)
    right = high if pick.ratio_high is None else min(pick.ratio_high, high)
    axes.hlines(row, left, right, color=style.colour, linewidth=1.4)
    for end, cut, arrow in ((left, pick.ratio_low < low, "<"), (right, (pick.ratio_high or high * 2) > high, ">")):
        axes.plot(end, row, marker=arrow if cut else "|", color=style.colour, markersize=6, clip_on=False)
    inside = style.colour if pick.certainty == "certified" else "white"
    axes.plot(pick.ratio, row, marker=style.marker, color=style.colour, markerfacecolor=inside, markersize=6)


def contest(pick: PickInfo) -> str:
    """Who is compared with whom: path names, and the parameters that differ where the path is the same."""
    if pick.against is None:
        return f"{pick.pick.path} alone"
    mine, other = short_names(pick.pick, pick.against)
    return f"{mine} ({pick.base}) vs {other}" if pick.stays else f"{mine} vs {other} ({pick.base})"


def short_names(one: Candidate, other: Candidate) -> tuple[str, str]:
    """Two candidates by path, with the parameters in which they differ where the path is the same."""
    if one.path != other.path:
        return one.path, other.path
    differing = [name for name, value in one.parameters.items() if other.parameters.get(name) != value]

    def name(candidate: Candidate) -> str:
        inner = ", ".join(f"{key} {candidate.parameters.get(key)}" for key in differing)
        return f"{candidate.path} [{inner}]"

    return name(one), name(other)
