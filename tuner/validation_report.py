"""The validation report: all sections as a Document, and that as terminal summary, Markdown or one HTML file."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import msgspec
from markupsafe import Markup

from tuner.record import write_whole
from tuner.sweep import SweepError
from tuner.validation import Validation, read_validation, short
from tuner.validation_figures import as_file, interval_svg, span_of
from tuner.validation_layout import Cell, Document, Figure, Table
from tuner.validation_rules import RULES, Recommendation, recommend
from tuner.validation_sections import correctness_section, environment_section, memory_section, routes_section
from tuner.validation_times import regressions_section, timed_section, training_section

TEMPLATE = Path(__file__).with_name("validation.html.j2")
MARKS = {"good": "●", "bad": "✕", "open": "○", "": ""}
"""Tone -> a mark, so that print and colour-blind readers see it too."""
WORST_SHOWN = 12


def document_of(found: Validation, recommendation: Recommendation) -> Document:
    """All sections of a validation."""
    about = f"{short(found.subject)} on {found.device}" if found.device else f"no records below {found.root}"
    if found.compare:
        about += f", against {found.compare.result.base.label}"
    return Document(
        title="Validation", about=about, word=recommendation.word,
        reasons=tuple((reason.word, reason.text) for reason in recommendation.reasons),
        rules=(*RULES.values(), ("merge", "none of these applies")),
        sections=(
            environment_section(found), correctness_section(found), routes_section(found),
            timed_section(found, "decode"), timed_section(found, "prefill"), training_section(found),
            memory_section(found), regressions_section(found),
        ),
    )  # fmt: skip


def report(root: Path, *, device: str, commit: str, markdown: Path | None, html: Path | None) -> tuple[Document, int]:
    """Read the records, recommend, and write what was asked for. Returns the document and the exit code.

    Raises SweepError where a device or a commit was named that nothing was recorded of.
    """
    found = read_validation(root, device=device, commit=commit)
    if (device or commit) and not found.environments and (commit or found.history is None):
        wanted = " and ".join(f"--{name} {value}" for name, value in (("device", device), ("commit", commit)) if value)
        there = "; ".join(found.left_out) or "none"
        raise SweepError(f"no records below {root} fit {wanted}; there are: {there}")
    recommendation = recommend(found)
    document = document_of(found, recommendation)
    if markdown is not None:
        write_whole(markdown, as_markdown(document, markdown).encode())
    if html is not None:
        write_whole(html, as_html(document).encode())
    return document, recommendation.exit_code


def as_text(document: Document) -> str:
    """For a terminal: the recommendation, its reasons, a line per section."""
    lines = [f"{document.word.upper()}  {document.about}", ""]
    for word, text in document.reasons[:WORST_SHOWN]:
        lines.append(f"  {word}: {text}")
    if len(document.reasons) > WORST_SHOWN:
        lines.append(f"  and {len(document.reasons) - WORST_SHOWN} reasons more")
    lines += [""] if document.reasons else []
    width = max(len(section.title) for section in document.sections)
    for section in document.sections:
        how = f"; run '{section.missing}'" if section.missing else ""
        lines.append(f"{section.title.ljust(width)}  {section.summary}{how}")
    return "\n".join(lines) + "\n"


def as_json(document: Document) -> bytes:
    """The document without its drawings."""
    sections = tuple(msgspec.structs.replace(section, figures=()) for section in document.sections)
    return (
        msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(document, sections=sections)), indent=1) + b"\n"
    )


def as_markdown(document: Document, file: Path) -> str:
    """For a forge. Figures become files beside ``file``, named after it."""
    lines = [f"# {document.title}: {document.word}", "", escaped(document.about) + ".", ""]
    lines += [f"- **{word}**: {escaped(text)}" for word, text in document.reasons]
    for section in document.sections:
        how = f"; `{section.missing}` makes them" if section.missing else ""
        lines += ["", f"## {section.title}", "", escaped(section.summary) + how + "."]
        for table in section.tables:
            lines += ["", f"**{escaped(table.caption)}**", "", *table_lines(table)]
        for figure in section.figures:
            picture = file.with_name(f"{file.stem}-{figure.name}.svg")
            write_whole(picture, as_file(figure.svg))
            lines += ["", f"![{escaped(figure.caption)}]({picture.name})"]
    lines += ["", "## Rules", "", *(f"- **{word}** where {when}" for word, when in document.rules)]
    return "\n".join(lines) + "\n"


def table_lines(table: Table) -> list[str]:
    """A table in Markdown."""
    marks = ["---:" if place in table.numeric else "---" for place in range(len(table.columns))]
    rows = [table.columns, marks, *([text_of(cell) for cell in row] for row in table.rows)]
    return [f"| {' | '.join(row)} |" for row in rows]


def text_of(cell: Cell) -> str:
    """A cell in Markdown; what is bad stands out."""
    text = escaped(cell.text)
    return f"**{text}**" if cell.tone == "bad" and text else text


def escaped(text: str) -> str:
    """Text that Markdown leaves as it is, on one line. An underscore inside a word means nothing on a forge."""
    return re.sub(r"([\\`*{}\[\]<>|#]|(?<!\w)_|_(?!\w))", r"\\\1", text.replace("\n", " "))


def as_html(document: Document) -> str:
    """One file: styles and drawings inside, nothing fetched."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(drawn=drawn, mark=mark)
    return environment.from_string(TEMPLATE.read_text()).render(document=document, span=table_span)


def table_span(table: Table) -> float:
    """How far the intervals of a table reach from 1."""
    return span_of([cell.interval for row in table.rows for cell in row if cell.interval])


def drawn(what: Figure | Cell, span: float = 2.0) -> Markup:
    """A figure, or a cell's interval, as SVG."""
    if isinstance(what, Figure):
        return Markup(what.svg)
    return Markup(interval_svg(*what.interval, span)) if what.interval else Markup("")


def mark(cell: Cell) -> str:
    """A cell's mark."""
    return MARKS[cell.tone]
