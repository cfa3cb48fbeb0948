"""A dispatch table as a Markdown page: the pick of every problem, by how much, how sure, and where it was measured.

It reads the table and the environments of the runs that its entries name. The same table and records give the same
page, so that a page in a repository can be checked against them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nsa.dispatch_entry import DispatchEntry
from nsa.dispatch_table import DispatchTable
from tuner.record import Environment, RunFolder, run_folders
from tuner.sweep import sweep_command_line

EXPLANATION = (
    "Each cell: the path, its median time, and that over the default's time in shared rounds with its interval "
    "(*tied*: not certified faster; over the runner-up where the default itself is the pick; *no default*: over the "
    "first right candidate, the default being wrong or out of memory; *hinted*: measured on calls that say that they "
    "are complete)."
)

NOT_HERE = "its records are not here"


def page(table: DispatchTable, records: Path) -> str:
    """The page. ``records``: folder in which the runs of the entries are looked for."""
    runs: dict[str, list[RunFolder]] = {}
    for folder in run_folders(records / table.device.slug):
        runs.setdefault(folder.path.name, []).append(folder)
    ours = {entry.run_id for entry in table.entries} & set(runs)
    environments = {run_id: runs[run_id][0].environment() for run_id in ours}
    blocks: dict[str, list[DispatchEntry]] = {}
    for entry in table.entries:
        blocks.setdefault(shape(entry), []).append(entry)
    software = table.software
    versions = {"torch": software.torch, "triton": software.triton, "flash-attn": software.flash_attn}
    lines = [
        f"# What the runtime takes on {table.device.name}",
        "",
        f"{len(table.entries)} entries; {', '.join(f'{k} {v}' for k, v in versions.items() if v)}. {EXPLANATION}",
        "",
    ]
    for title, entries in blocks.items():
        lines += [f"## {title}", "", *grid(entries, environments, kind=table.device.kind), ""]
    lines += ["## Runs", "", "| run | command | commit | device, power limit, SM clock at most |", "|---|---|---|---|"]
    for run_id in dict.fromkeys(entry.run_id for entry in table.entries):
        found = runs.get(run_id, [])  # two where, before ids were random, machines began in the same second
        lines += [run_line(folder) for folder in found] or [f"| {run_id} | {NOT_HERE} | | |"]
    return "\n".join(lines) + "\n"


def shape(entry: DispatchEntry) -> str:
    """Heads, head dims, operation and dtype."""
    width = f"{entry.Dk}" if entry.Dk == entry.Dv else f"{entry.Dk}/{entry.Dv}"
    what = {
        "selection": f"block {entry.block_size} top {entry.topk}",
        "window": f"window of {entry.window}",
        "compression": f"compressed {entry.kernel_size}/{entry.kernel_stride}",
    }[entry.operation]
    return f"{entry.G * entry.h}/{entry.G} heads, D {width}, {what}, {entry.dtype}"


def call(entry: DispatchEntry, environments: Mapping[str, Environment]) -> str:
    """What kind of call: mode, batch, execution, overlap, level. ``environments``: by run."""
    words = [entry.mode + (f" B{entry.B}" if entry.B > 1 or entry.mode == "decode" else "")]
    if entry.mode == "decode":
        made = environments.get(entry.run_id)
        unknown = entry.execution + (" of calls not known" if entry.execution == "graph" else "")
        words.append(made.execution_words(entry.mode, entry.execution) if made else unknown)
    if entry.operation == "selection" and entry.mode != "decode":
        words.append(entry.pattern + (", complete" if entry.complete else ""))
    if entry.level == "layer":
        words.append("in the layer")
    return ", ".join(words)


def grid(entries: Sequence[DispatchEntry], environments: Mapping[str, Environment], *, kind: str) -> list[str]:
    """One row a kind of call, one column a context."""
    contexts = sorted({entry.T for entry in entries})
    rows: dict[str, dict[int, DispatchEntry]] = {}
    for entry in entries:
        rows.setdefault(call(entry, environments), {})[entry.T] = entry
    lines = [f"| | {' | '.join(map(str, contexts))} |", "|---|" + "---|" * len(contexts)]
    for name in sorted(rows, key=lambda name: (*order(next(iter(rows[name].values()))), name)):
        cells = [cell(rows[name][context], kind=kind) if context in rows[name] else "" for context in contexts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def order(entry: DispatchEntry) -> tuple[int, int]:
    """Prefill, train, decode; batches by size."""
    return ("prefill", "train", "decode").index(entry.mode), entry.B


def cell(entry: DispatchEntry, *, kind: str) -> str:
    """``path`` time, ratio [interval]."""
    text = f"`{entry.path}` {duration(entry.median_us)}"
    if entry.ratio is None:
        return text
    high = "?" if entry.ratio_high is None else f"{entry.ratio_high:.3g}"
    tie = "" if entry.certified else ", *tied*"
    notes = (", *no default*" if entry.default_failed(kind) else "") + (", *hinted*" if entry.hinted else "")
    return f"{text}, {entry.ratio:.3g} [{entry.ratio_low or 0:.3g}, {high}]{tie}{notes}"


def duration(us: float) -> str:
    """Three digits, in microseconds or milliseconds."""
    return f"{us:.1f} us" if us < 100 else f"{us:.0f} us" if us < 1000 else f"{us / 1000:.3g} ms"


def run_line(folder: RunFolder) -> str:
    """Where a run was made."""
    found: Environment = folder.environment()
    units = {"power_limit_w": "W", "max_sm_mhz": "MHz"}
    known = [f"{found.clocks[name]:g} {unit}" for name, unit in units.items() if found.clocks.get(name)]
    machine = ", ".join((str(found.device["name"]), *known))
    return f"| {found.run_id} | `{sweep_command_line(found.sweep)}` | {found.commit[:12]} | {machine} |"
