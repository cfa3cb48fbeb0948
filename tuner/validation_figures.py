"""Draws a validation report's figures as SVG text: intervals in table cells, loss curves, regressions per commit.

Every SVG stands alone and can stand inside HTML: no reference to anything outside, ids of its own.
"""

from __future__ import annotations

import io
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tuner.history import HistoryResult
from tuner.marks import points_of

INTERVAL_SIZE = (120, 14)
CURVE_SIZE = (640, 180)
CURVE_MARGIN = (46, 10, 8, 26)
"""Left, right, top, bottom."""


def interval_svg(ratio: float, low: float, high: float | None, span: float) -> str:
    """A ratio and its interval about 1 on a log axis that reaches from 1 / ``span`` to ``span``; arrows beyond it."""
    width, height = INTERVAL_SIZE
    middle, reach = height / 2, math.log(span)

    def x(value: float) -> float:
        place = max(-1.0, min(1.0, math.log(value) / reach)) if value > 0 else -1.0
        return round(width / 2 * (1 + 0.94 * place), 1)

    left, right = x(low), x(high) if high is not None else width
    return (
        f'<svg class="interval" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{ratio:.3f}"><line x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}" class="one"/>'
        f'<line x1="{left}" x2="{right}" y1="{middle}" y2="{middle}" class="bar"/>'
        f'<circle cx="{x(ratio)}" cy="{middle}" r="3" class="dot"/></svg>'
    )


def span_of(intervals: Sequence[tuple[float, float, float | None]]) -> float:
    """How far from 1 a table's intervals reach, at least 5 %."""
    ends = [end for ratio, low, high in intervals for end in (ratio, low, high) if end]
    return math.exp(max([abs(math.log(end)) for end in ends] + [0.05]) * 1.05)


def curve_svg(losses: Sequence[float]) -> str:
    """Loss over steps, linear axes."""
    width, height = CURVE_SIZE
    left, right, top, bottom = CURVE_MARGIN
    low, high = min(losses), max(losses)
    pad = 0.05 * (high - low) or 0.5
    low, high = low - pad, high + pad

    def x(step: int) -> float:
        return round(left + (width - left - right) * step / max(1, len(losses) - 1), 1)

    def y(loss: float) -> float:
        return round(top + (height - top - bottom) * (high - loss) / (high - low), 1)

    points = " ".join(f"{x(step)},{y(loss)}" for step, loss in enumerate(losses))
    ticks = "".join(
        f'<text x="{left - 6}" y="{y(loss) + 4}" text-anchor="end">{loss:.2f}</text>'
        f'<line x1="{left}" x2="{width - right}" y1="{y(loss)}" y2="{y(loss)}" stroke="#ddd" stroke-width="0.7"/>'
        for loss in (low + pad, (low + high) / 2, high - pad)
    )
    steps = "".join(
        f'<text x="{x(step)}" y="{height - 8}" text-anchor="{anchor}">{step + 1}</text>'
        for step, anchor in ((0, "start"), (len(losses) // 2, "middle"), (len(losses) - 1, "end"))
    )
    head = f'viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" font-size="12"'
    line = f'<polyline points="{points}" fill="none" stroke="#0072b2" stroke-width="1.6"/>'
    return f'<svg {head} role="img" aria-label="loss over steps">{ticks}{steps}{line}</svg>'


def regressions_svgs(found: HistoryResult) -> list[str]:
    """The history's regression plot, drawn by ``tuner.plot_regressions``; one SVG per sheet of panels."""
    from tuner.plot_regressions import draw_regressions  # matplotlib takes a second to import

    title = f"Time of each commit over the anchor's\n{Path(found.file).stem}, {found.lines[0].device}"
    with tempfile.TemporaryDirectory() as folder:
        files = draw_regressions(points_of(found.lines), found.change_points, Path(folder), title)
        texts = [file.read_text() for file in files if file.suffix == ".svg"]
    return [standing_alone(text, f"r{number}-") for number, text in enumerate(texts)]


def standing_alone(svg: str, prefix: str) -> str:
    """matplotlib's SVG without its header, DOCTYPE and metadata, with ids that no other figure has."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r"url\(#", f"url(#{prefix}", body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}', body)
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", body)


def as_file(svg: str) -> bytes:
    """An SVG from here as a file of its own."""
    buffer = io.StringIO()
    buffer.write('<?xml version="1.0" encoding="utf-8"?>\n')
    buffer.write(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))
    return buffer.getvalue().encode()
