"""Plot: a run's figures and their gallery, from its records and table entries. Needs no GPU.

``draw_run`` reads a run folder, computes what is to be seen (``plot_info``, ``reserves``), has it drawn
(``plot_panels``, ``plot_picks``) and writes SVG, PNG and a README that names their command, run, commit and device. A
figure is written only where there is something to show. ``tuner.plot_regressions`` draws histories of commits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from matplotlib.figure import Figure

from nsa.dispatch_entry import DispatchEntry
from tuner.plot_info import KNOWN_RATES, Rates, family_labels, latency_panels, pick_infos
from tuner.plot_panels import latency_figure, reserve_figure
from tuner.plot_picks import evidence_figure, winners_figure
from tuner.plot_style import house_style, path_styles, save
from tuner.record import Environment, Record, RunFolder, write_whole
from tuner.reserves import reserve_panels
from tuner.sweep import sweep_command_line

PANELS_PER_FIGURE = 8
ROWS_PER_FIGURE = 40

Item = TypeVar("Item")


class Sheet(NamedTuple):
    """A figure with its file name, and what the gallery says it shows."""

    name: str
    shows: str
    figure: Figure


def draw_run(
    folder: RunFolder, entries: Sequence[DispatchEntry], out: Path, *, rates: Rates | None = None
) -> list[Path]:
    """Write the figures of a run and their gallery README.md into ``out``; returns the files written, README last.

    ``latency``, ``winners``, ``reserve`` and ``evidence``, each .svg and .png; latency and reserve go on in
    ``latency-2`` ... after eight panels, evidence after forty rows. Figures without anything to show are not written.

    Args:
        folder: the run; a half-written last record is left out.
        entries: table entries; those of other runs are left out, because their defaults are in other records.
        out: made where it is missing; files of the same names are replaced.
        rates: peak rates of the device for the floor line, by default those of KNOWN_RATES for its slug, else no floor.
    """
    environment, (records, _) = folder.environment(), folder.records()
    entries = [entry for entry in entries if entry.run_id == environment.run_id]
    rates = rates or KNOWN_RATES.get(str(environment.device.get("slug")))
    written: list[Path] = []
    gallery: list[Sheet] = []
    with house_style():
        for drawn in sheets(records, entries, environment, rates):
            written += save(drawn.figure, out, drawn.name)
            gallery.append(drawn)
    readme = out / "README.md"
    write_whole(readme, gallery_text(gallery, environment, folder.path).encode())
    return [*written, readme]


def sheets(
    records: Sequence[Record], entries: Sequence[DispatchEntry], environment: Environment, rates: Rates | None
) -> Iterator[Sheet]:
    """Every figure of a run, drawn. Call within ``house_style``."""
    styles = path_styles([record.path for record in records] + [entry.path for entry in entries])
    panels, picks, reserves = latency_panels(records, rates), pick_infos(entries, records), reserve_panels(records)
    common, labels = family_labels(item.family for group in (panels, picks, reserves) for item in group)
    subtitle = f"{common}\n{origin(environment)}"
    for name, part in pages("latency", panels, PANELS_PER_FIGURE):
        shows = "Latency of each path's best candidate against context"
        yield Sheet(name, shows, latency_figure(part, labels, subtitle, styles, rates))
    if picks:
        shows = "The path that the table names per shape and context, its ratio to the default, and how sure that is"
        yield Sheet("winners", shows, winners_figure(picks, labels, subtitle, styles))
    for name, rows in pages("reserve", reserves, PANELS_PER_FIGURE):
        shows = "Tail latency against workspace reserve, the Pareto set and the smallest reserve with no growth"
        yield Sheet(name, shows, reserve_figure(rows, labels, subtitle, styles))
    for name, entries_shown in pages("evidence", picks, ROWS_PER_FIGURE):
        shows = "Ratio with interval, pairs and e-value of each table entry"
        yield Sheet(name, shows, evidence_figure(entries_shown, labels, subtitle, styles))


def pages(name: str, items: Sequence[Item], most: int) -> Iterator[tuple[str, Sequence[Item]]]:
    """Items in parts of at most ``most``, named ``name``, ``name-2``, ...; none where there are no items."""
    for number, start in enumerate(range(0, len(items), most), 1):
        yield (name if number == 1 else f"{name}-{number}"), items[start : start + most]


def origin(environment: Environment) -> str:
    """Device, commit and run in one line."""
    device = environment.device
    sweep = environment.sweep.get("name", "")
    return (
        f"{device.get('name')} ({device.get('slug')}) · commit {environment.commit[:10]} · "
        f"{environment.tool} {sweep} · run {environment.run_id}"
    )


def gallery_text(gallery: Sequence[Sheet], environment: Environment, run: Path) -> str:
    """The gallery's Markdown: the command, run, commit and device behind the figures, and what each shows.

    ``run``: the run's folder, shown relative to the working directory where it lies below.
    """
    shown = run.resolve().relative_to(Path.cwd()) if run.resolve().is_relative_to(Path.cwd()) else run
    parts = [
        f"# Figures of run {environment.run_id}\n",
        "| command | run | commit | device |\n|---|---|---|---|\n"
        f"| `{sweep_command_line(environment.sweep)}`, then `nsa-tune plot {shown}` "
        f"| `{environment.run_id}` | `{environment.commit}` "
        f"| {environment.device.get('name')} (`{environment.device.get('slug')}`) |\n",
        "Heads are query heads / key/value heads. The sweep's axes: `environment.json`.\n",
    ]
    parts += [f"## {sheet.shows}\n\n![{sheet.shows}]({sheet.name}.svg)\n" for sheet in gallery]
    return "\n".join(parts if gallery else [*parts, "Nothing was measured, so there is nothing to show.\n"])
