"""Leaf. How figures look: fonts, colours, markers, ticks with their units, labels that keep apart, and the files.

Made for black-and-white print too: paths differ by marker and line, not by colour alone; no text is below 8 points.
The same input gives the same bytes: ids are salted with a constant and no date is stored. It knows no record.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tuner.record import write_whole

SMALL_PT = 8.0
WIDTH_IN = 7.2  # the text width of an A4 page
CHARACTERS_PER_INCH = 15.5  # DejaVu Sans at 8 points, measured
PNG_DPI = 160
RULES: Any = {  # Any: matplotlib types its keys as one literal of 300 names
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": SMALL_PT,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.labelsize": SMALL_PT,
    "xtick.labelsize": SMALL_PT,
    "ytick.labelsize": SMALL_PT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 5.0,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "nsa-tune",
    "svg.fonttype": "path",
    "path.simplify": False,
}

TIMES, EN_DASH, MINUS = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{MINUS SIGN}"
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9", "#e69f00", "#000000", "#767676",
)  # fmt: skip
"""Okabe and Ito's palette for all kinds of colour vision, its pink darkened for print."""


class PathStyle(msgspec.Struct, frozen=True):
    """Colour, marker and dashes (points on, off, ...; () is solid) of one path."""

    colour: str
    marker: str
    dashes: tuple[float, ...] = ()


KNOWN = {
    "dense": PathStyle(BLUE, "o"),
    "gather": PathStyle(VERMILION, "s", (5, 2)),
    "packed": PathStyle(GREEN, "^", (5, 1.5, 1, 1.5)),
    "varlen": PathStyle(PURPLE, "D", (1.5, 1.2)),
    "flex": PathStyle(SKY, "v", (3, 1, 1, 1, 1, 1)),
    "triton_token": PathStyle(ORANGE, "P"),
    "triton_union": PathStyle(BLACK, ">", (6, 1)),
    "triton_block": PathStyle("#882255", "<", (2, 2)),
    "triton_decode": PathStyle("#44aa99", "h", (4, 1, 1, 1)),
}
SPARE = (
    PathStyle("#8c510a", "p", (6, 1)),
    PathStyle("#999933", "X", (2, 2)),
    PathStyle("#332288", "*", (4, 1, 1, 1)),
    PathStyle("#117733", "d"),
)


def path_styles(paths: Iterable[str]) -> dict[str, PathStyle]:
    """A style per path: the known ones always theirs, others from the spare ones in order of name."""
    names = sorted(set(paths))
    strangers = [name for name in names if name not in KNOWN]
    return {name: KNOWN.get(name) or SPARE[strangers.index(name) % len(SPARE)] for name in names}


@contextmanager
def house_style() -> Iterator[None]:
    """Within it, figures are made and saved by the rules above."""
    with mpl.rc_context():
        mpl.rcdefaults()  # so that a reader's own matplotlibrc changes nothing
        mpl.rcParams.update(RULES)
        yield


def sheet(title: str, subtitle: str, caption: str, size_in: tuple[float, float]) -> Figure:
    """An empty figure with its heading (what one sees; device, commit, run) and its caption, wrapped to its width."""
    figure = Figure(figsize=size_in, layout="constrained")
    figure.suptitle(wrapped(f"{title}\n{subtitle}", size_in[0] * 0.88), x=0.01, ha="left", fontsize=9)
    figure.supxlabel(wrapped(caption, size_in[0]), x=0.01, ha="left", fontsize=SMALL_PT)
    return figure


def wrapped(text: str, width_in: float) -> str:
    """Text broken into lines of at most so many inches at 8 points; its own line breaks stay."""
    width = max(12, int(width_in * CHARACTERS_PER_INCH))
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.svg`` and ``name.png``; the same figure gives the same bytes. Call within ``house_style``."""
    written = []
    for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=PNG_DPI)
        path = folder / f"{name}.{kind}"
        write_whole(path, buffer.getvalue())
        written.append(path)
    return written


def dodged(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Positions nearest to the wanted ones (least squares), at least ``gap`` apart, in [low, high] if there is room."""
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], index))
    blocks: list[list[float]] = []  # neighbours that touch, each as its wanted positions less their places in the row
    for place, index in enumerate(order):
        blocks.append([wanted[index] - gap * place])
        while len(blocks) > 1 and fmean(blocks[-2]) >= fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    highest = max(low, high - gap * (len(order) - 1))
    spread = [min(max(fmean(block), low), highest) for block in blocks for _ in block]
    found = [0.0] * len(wanted)
    for place, index in enumerate(order):
        found[index] = spread[place] + gap * place
    return found


def series(low: float, high: float, most: int = 6) -> list[float]:
    """Ticks of a log axis in [low, high]: 1-2-5, 1-5, decades or every n-th one, the finest of at most ``most``."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    kept: list[float] = []
    for steps in ((1, 2, 5), (1, 5), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        kept = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(kept) <= most:
            return kept
    return kept[:: math.ceil(len(kept) / most)]


def ratio_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Ticks of a ratio axis in [low, high]: equal steps through 1 where that is near 1, else 1-2-5."""
    if low < 0.5 or high > 2.0:
        return series(low, high, most)
    for step in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        first, last = math.ceil((low - 1) / step - 1e-9), math.floor((high - 1) / step + 1e-9)
        if last - first < most:
            return [1 + step * number for number in range(first, last + 1)]
    return series(low, high, most)


def byte_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Ticks of a byte axis in [low, high]: powers of two, evenly thinned."""
    powers = range(math.ceil(math.log2(max(low, 1.0)) - 1e-9), math.floor(math.log2(max(high, 1.0)) + 1e-9) + 1)
    step = max(1, math.ceil(len(powers) / most))
    return [2.0**power for power in powers if (power - powers[0]) % step == 0]


def context_ticks(contexts: Sequence[int], most: int = 6) -> list[int]:
    """Of ascending contexts those whose names have room on a log axis: a ``most``-th of its length apart."""
    apart = math.log(contexts[-1] / contexts[0]) / most
    kept = [contexts[0]]
    for context in contexts[1:]:
        if math.log(context / kept[-1]) >= apart:
            kept.append(context)
    return kept


def put_ticks(axes: Axes, which: str, ticks: Sequence[float], text: Any) -> None:
    """Exactly these ticks, written by ``text(value)``, no minor ones, and a light grid."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _position: text(value)))
    axes.grid(True, axis="x" if which == "x" else "y")


def time_text(us: float) -> str:
    """Microseconds with the unit that reads best: "0.5 µs", "200 µs", "5 ms", "2 s"."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} µs"


def context_text(keys: float) -> str:
    """512, 1k, 64k: k is 1024 keys."""
    return f"{round(keys) // 1024}k" if keys >= 1024 and round(keys) % 1024 == 0 else f"{round(keys)}"


def byte_text(size: float) -> str:
    """Bytes in binary units: "0", "512 B", "256 KiB", "1.5 GiB"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B" if size else "0"


def ratio_text(ratio: float) -> str:
    """0.482×, 1.04×, 27×."""
    return (f"{ratio:.3g}" if ratio < 100 else f"{ratio:.0f}") + TIMES


def percent_text(ratio: float) -> str:
    """A ratio as its distance from 1: "+4 %", "−12.5 %", "0 %"; from 2 on as "27×"."""
    if not 0.5 <= ratio <= 2.0:
        return ratio_text(ratio)
    change = round(100 * (ratio - 1), 2)
    return f"{change:+.3g} %".replace("-", MINUS) if change else "0 %"


def evidence_text(e_value: float | None) -> str:
    """An e-value: a dash for none, "0.2", "17", "3.2e+05", "> 1e+99"."""
    if e_value is None:
        return EN_DASH
    return "> 1e+99" if e_value > 1e99 else f"{e_value:.2g}" if e_value < 10 or e_value >= 1e4 else f"{e_value:.0f}"
