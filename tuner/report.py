"""Report: what a person reads. Live progress with a leaderboard, and the table with its evidence.

Progress and advice go to stderr, results to stdout. It computes nothing that records,
verdicts and tables do not say.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import get_args

import msgspec
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nsa.defaults import default_candidate
from nsa.device import device_identity
from nsa.dispatch_entry import DispatchEntry
from nsa.dispatch_table import DispatchTable
from nsa.problem import Mode
from tuner.measure import KNOWN
from tuner.record import Environment, Record, Value
from tuner.regret import Regret
from tuner.search import Listener
from tuner.verdict import PICK_ALPHA

TABLE_WIDTH = 110
LEADERS = 6
BUSY = 0.02
"""By how much work may read otherwise than it is known to be before we say so."""
MODES: tuple[Mode, ...] = get_args(Mode)
FAILED = ("wrong", "fell_back", "oom", "crash", "hang", "compile_error")


class LiveProgress(Listener):
    """Draws a search on stderr: a bar with time left, the leaderboard of the problem at hand, failures as they come."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.what, self.done, self.seconds_left = "starting", 0.0, 0.0
        self.board: dict[str, Record] = {}
        self.title = ""
        self.live = Live(console=console, get_renderable=self._draw, refresh_per_second=4, transient=True)
        self.interactive = console.is_terminal

    def __enter__(self) -> LiveProgress:
        if self.interactive:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.interactive:
            self.live.stop()

    def started(self, environment: Environment, problems: int, resumed: int, word: str) -> None:
        """Say what begins, or what is resumed and what was dropped."""
        device = environment.device["name"]
        self.console.print(f"{environment.sweep['name']}: {problems} problems on {device}, run {environment.run_id}")
        reads = ", ".join(f"{k} reads {environment.timer[f'{k} reads']}" for k in KNOWN)
        self.console.print(f"timer self-test: {reads}")
        if any(abs(float(environment.timer[f"{known} reads"]) / float(known) - 1) > BUSY for known in KNOWN):
            self.console.print("this machine is busy: work of known ratios does not read as known; expect ties")
        if resumed:
            self.console.print(f"resumed with {resumed} records{'; ' + word if word else ''}")

    def working(self, what: str, done: float, seconds_left: float) -> None:
        """Progress."""
        self.what, self.done, self.seconds_left = what, done, seconds_left

    def recorded(self, record: Record) -> None:
        """A record: to the leaderboard, or to the screen if it failed."""
        title = describe(record)
        if title != self.title:
            self.title, self.board = title, {}
        if record.samples:
            self.board[record.candidate] = record
        if record.outcome in FAILED:
            self.console.print(
                Text.assemble((record.outcome, "bold"), f" {record.candidate} at {title}: {record.reason}")
            )
        if not self.interactive and record.stage == "shootout":
            place = f"{record.problem['mode']} T={record.problem['T']}"
            self.console.print(f"{100 * self.done:3.0f} %  {place}: {record.candidate} {median_us(record):.1f} us")

    def _draw(self) -> Group:
        bar = ProgressBar(total=1.0, completed=self.done, width=40)
        line = Text(
            f"{100 * self.done:3.0f} %  about {self.seconds_left:.0f} s left  {self.what}",
            overflow="ellipsis",
            no_wrap=True,
        )
        return Group(leaderboard(self.title, list(self.board.values())), bar, line)


def describe(record: Record) -> str:
    """The problem of a record in a few words."""
    return f"{problem_line(record.problem)}, {record.pattern}"


def problem_line(problem: dict[str, Value]) -> str:
    """Mode, sizes, dtype and execution of a problem."""
    return f"{problem['mode']} T={problem['T']} B={problem['B']}, {shape_line(problem)}"


def shape_line(problem: dict[str, Value]) -> str:
    """All but mode, context and batch."""
    p = problem
    width = f"{p['Dk']}" if p["Dk"] == p["Dv"] else f"{p['Dk']},{p['Dv']}"
    heads = f"{int(p['G']) * int(p['h'])}/{p['G']} heads D {width}"
    kind = f"{p['execution']}, {p['cache']} cache"
    if p.get("operation", "selection") == "selection":
        return f"{heads}, block {p['block_size']} top {p['topk']}, {p['dtype']}, {kind}, {p['overlap']} overlap"
    size = f"window {p['window']}" if p["window"] else f"compression {p['kernel_size']}/{p['kernel_stride']}"
    return f"{heads}, {size}, {p['dtype']}, {kind}"


def median_us(record: Record) -> float:
    """Median of a record's samples."""
    return statistics.median(sample.us for sample in record.samples)


def leaderboard(title: str, records: Sequence[Record]) -> Table:
    """The fastest candidates of a problem so far."""
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("candidate")
    table.add_column("median us", justify="right")
    table.add_column("to default", justify="right")
    table.add_column("peak MiB", justify="right")
    base = next((median_us(record) for record in records if record.baseline), None)
    for record in sorted(records, key=median_us)[:LEADERS]:
        us = median_us(record)
        table.add_row(
            record.candidate + (" (default)" if record.baseline else ""), f"{us:.1f}",
            f"{us / base:.2f}x" if base else "",
            f"{(record.peak_bytes or 0) / 2**20:.1f}",
        )  # fmt: skip
    return table


def leaderboards(records: Sequence[Record]) -> Group:
    """The leaderboard of each problem's shoot-out."""
    boards: dict[str, list[Record]] = {}
    for record in records:
        if record.stage == "shootout" and record.samples:
            boards.setdefault(describe(record), []).append(record)
    return Group(*(leaderboard(title, found) for title, found in boards.items()))


def outcome_table(records: Sequence[Record]) -> Table:
    """Each path: how many candidates had which outcome, and why not."""
    table = Table(title="What ran", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("path", "proven and timed", "not", "why not"):
        table.add_column(column, justify="left" if column in ("path", "why not") else "right")
    for path in dict.fromkeys(record.path for record in records):
        mine = [record for record in records if record.path == path]
        good = {(record.candidate, describe(record)) for record in mine if record.outcome == "ok"}
        bad = {(r.outcome, r.reason) for r in mine if r.outcome != "ok"}
        reasons = "; ".join(f"{outcome}: {reason}" for outcome, reason in sorted(bad))
        table.add_row(path, str(len(good)), str(len(bad)) if bad else "", reasons[:150])
    return table


def evidence_tables(entries: Sequence[DispatchEntry], kind: str, width: int) -> Group:
    """Each entry: the pick, how fast, by how much, how sure; a block for each shape, dtype and execution.

    Where the terminal is too narrow for a table, two lines an entry.
    """
    groups: dict[str, list[DispatchEntry]] = {}
    for entry in entries:
        groups.setdefault(shape_line(msgspec.to_builtins(entry.problem())), []).append(entry)
    draw = _evidence_table if width >= TABLE_WIDTH else _evidence_lines
    for members in groups.values():
        members.sort(key=lambda entry: (MODES.index(entry.mode), entry.B, entry.T))  # a table has the newest run last
    legend = f"ratio: time over time, below 1 is faster; E: evidence, certified from (candidates - 1) / {PICK_ALPHA} on"
    return Group(*(draw(title, members, kind) for title, members in groups.items()), Text(legend, style="dim"))


def _evidence_lines(title: str, entries: Sequence[DispatchEntry], kind: str) -> Text:
    lines = [title]
    for entry in entries:
        batch = f" B{entry.B}" if entry.B > 1 else ""
        ratio, interval = ratio_texts(entry, kind)
        evidence = "" if entry.e_value is None else f", E {entry.e_value:.1e}"
        name = candidate_name(entry.path, entry.parameters)
        lines.append(f"  {entry.mode}{batch}{level_word(entry)} {entry.T}: {name}")
        lines.append(f"      {entry.median_us:.1f} us, {ratio} {interval}{evidence}, {entry.pairs} pairs")
    return Text("\n".join(lines))


def _evidence_table(title: str, entries: Sequence[DispatchEntry], kind: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    words = [word for entry in entries for word in candidate_name(entry.path, entry.parameters).split()]
    for column in ("mode", "context", "the runtime takes", "median us", "time ratio", "interval", "E", "pairs"):
        wraps = column in ("mode", "the runtime takes", "time ratio")
        width = max(map(len, words)) if column == "the runtime takes" else None  # a cut word would hide a parameter
        table.add_column(column, justify="left" if wraps else "right", no_wrap=not wraps, min_width=width)
    for entry in entries:
        table.add_row(
            entry.mode + (f" B{entry.B}" if entry.B > 1 else "") + level_word(entry), str(entry.T),
            candidate_name(entry.path, entry.parameters), f"{entry.median_us:.1f}",
            *ratio_texts(entry, kind), "" if entry.e_value is None else f"{entry.e_value:.1e}", str(entry.pairs),
        )  # fmt: skip
    return table


def regret_tables(found: Sequence[Regret]) -> Group:
    """Each problem: what the table answers, what was fastest, and how much slower the answer is; a table per shape."""
    tables: dict[str, Table] = {}
    for one in found:
        fields = msgspec.to_builtins(one.problem)
        title = shape_line(fields)
        if title not in tables:
            tables[title] = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
            for column in ("mode", "context", "regret", "rounds", "status", "the table answers", "of", "fastest else"):
                right = column in ("context", "regret", "of")
                tables[title].add_column(column, justify="right" if right else "left")
        tables[title].add_row(
            one.problem.mode + (f" B{one.problem.B}" if one.problem.B > 1 else ""), str(one.problem.T),
            "unknown" if one.regret is None else f"{one.regret:.2%}",
            one.reason or f"{one.rounds} {one.stage}", one.status, one.answer, str(one.candidates),
            "" if one.best == one.answer else one.best,
        )  # fmt: skip
    return Group(*tables.values())


def level_word(entry: DispatchEntry) -> str:
    """`` in the layer`` where the whole layer was timed."""
    return " in the layer" if entry.level == "layer" else ""


def candidate_name(path: str, parameters: dict[str, Value]) -> str:
    """``path(parameter=value, ...)``."""
    inner = ", ".join(f"{name}={value}" for name, value in parameters.items())
    return f"{path}({inner})" if inner else path


def ratio_texts(entry: DispatchEntry, kind: str) -> tuple[str, str]:
    """The entry's ratio, to the default or to the runner-up where the default stays, and its interval."""
    if entry.ratio is None:
        return "nothing to compare with", ""
    high = "?" if entry.ratio_high is None else f"{entry.ratio_high:.3f}"
    low = "0" if entry.ratio_low is None else f"{entry.ratio_low:.3f}"
    tie = "" if entry.certified else ", tied"
    return f"{entry.ratio:.3f} of {compared_with(entry, kind)}{tie}", f"[{low}, {high}]"


def compared_with(entry: DispatchEntry, kind: str) -> str:
    """What the ratio is to."""
    default = entry.default or default_candidate(entry.problem(), kind)
    if (entry.path, entry.parameters) == (default.path, default.parameters) and entry.runner_up:
        return f"runner-up {entry.runner_up.path}"
    return f"{default.path}, the default failing" if entry.default_failed(kind) else f"default {default.path}"


def table_summary(table: DispatchTable) -> str:
    """Device, software, and whether the table holds for this machine."""
    software, here = table.software, device_identity(table.device.kind) if usable(table.device.kind) else None
    versions = f"torch {software.torch}" + (f", triton {software.triton}" if software.triton else "")
    if here is None or here.slug != table.device.slug:
        state = "for another device than this one"
    else:
        state = f"STALE here: {table.__dict__['stale']}" if table.__dict__["stale"] else "current"
    return f"{len(table.entries)} entries for {table.device.name}, made with {versions}; {state}"


def usable(kind: str) -> bool:
    """Whether this machine has a device of a kind."""
    return kind == "cpu" or torch.cuda.is_available()
