"""Leaf. What a validation report is made of: sections with tables and figures. It knows no record and no output."""

from __future__ import annotations

from typing import Literal

import msgspec

Tone = Literal["", "good", "bad", "open"]


class Cell(msgspec.Struct, frozen=True):
    """A table's cell. ``interval``: (ratio, low, high), high None where open, drawn where the output can draw."""

    text: str
    tone: Tone = ""
    interval: tuple[float, float, float | None] | None = None


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """``numeric``: the columns that are numbers, by place. The first column names its row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: tuple[int, ...] = ()


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """An SVG and what it shows, in words. ``name`` is a file name where it becomes a file."""

    name: str
    svg: str
    caption: str


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """``summary``: one sentence. ``missing``: the command that makes its records, where there are none."""

    key: str
    title: str
    summary: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    missing: str = ""


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """The whole report. ``reasons``: (rule's word, text). ``rules``: (word, when)."""

    title: str
    about: str
    word: str
    reasons: tuple[tuple[str, str], ...]
    rules: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


def cells(*values: object) -> tuple[Cell, ...]:
    """A row: cells as they are, everything else as its text, None as nothing."""
    return tuple(value if isinstance(value, Cell) else Cell("" if value is None else str(value)) for value in values)


TONES: dict[str, Tone] = {
    "ok": "good", "faster": "good", "same": "good", "passed": "good", "merge": "good", "yes": "good",
    "undecided": "open", "unsupported": "", "oom": "open", "does not import": "open",
}  # fmt: skip


def verdict_cell(verdict: str) -> Cell:
    """A verdict or outcome with its tone; what is not known to be good or open is bad."""
    return Cell(verdict, TONES.get(verdict, "bad"))
