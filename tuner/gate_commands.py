"""What the gate's commands do, once the command line has been read: compare, history, bisect, selftest.

Each prints its result on stdout, progress on stderr, and returns the exit code. They raise TreeError (a side that
cannot be had), DoesNotImport, DeviceError, SweepError and RecordError for the command line to put in words.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.status import Status
from rich.text import Text

from tuner import compare_report
from tuner import selftest as selftests
from tuner.bisect import Bisecting, BisectResult
from tuner.compare import Comparing, Listener
from tuner.compare_record import AUTO, Question, Scenario, scenarios_of
from tuner.console import choose_device, plain_console, seconds
from tuner.history import HistoryResult, read_history
from tuner.history import history as walk
from tuner.marks import points_of
from tuner.record import write_whole
from tuner.sweep import SweepError, read_sweep
from tuner.trees import Tree, open_trees


class GateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line said. ``budget``: of one comparison. ``paths``: "auto" and names; () is the sweep's own."""

    repository: Path = Path()
    sweep: str = "quick"
    overrides: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    alpha: float = 0.001
    effect: str = "1%"
    budget: str = "5m"
    device: str = "auto"
    out: Path = Path("results")
    commit: str = "unknown"
    json: bool = False

    def settings(self) -> dict[str, Any]:
        """As a Question takes them. Raises SweepError for what cannot be read."""
        sweep = read_sweep(self.sweep, self.overrides)
        return {
            "device": choose_device(self.device), "alpha": self.alpha, "effect": fraction(self.effect),
            "budget_s": seconds(self.budget), "memory_limit_bytes": sweep.memory_limit_bytes,
        }  # fmt: skip

    def scenarios(self) -> tuple[Scenario, ...]:
        """What is compared."""
        sweep = read_sweep(self.sweep, self.overrides)
        unknown = sorted(set(self.paths) - {AUTO, *sweep.paths})
        if unknown:
            raise SweepError(f"sweep {sweep.name!r} has no paths {unknown}; expected some of {[AUTO, *sweep.paths]}")
        return scenarios_of(sweep, torch.device(choose_device(self.device)).type, self.paths)


class Progress(Listener):
    """A line on stderr that says what is going on."""

    def __init__(self) -> None:
        self.status: Status = plain_console(stderr=True).status("starting")

    def __enter__(self) -> Progress:
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def working(self, what: str, seconds_left: float) -> None:
        """Shown."""
        self.status.update(Text(f"{what}, {seconds_left:.0f} s left" if seconds_left > 0 else what))


def compare(base: str, head: str | None, options: GateOptions, *, markdown: Path | None = None) -> int:
    """Compare two trees; ``head`` None is the working tree. 3 regressed, 4 undecided, 0 otherwise."""
    scenarios, settings = options.scenarios(), options.settings()
    with open_trees(base, head, repository=options.repository) as (before, after), Progress() as listener:
        question = Question(base=before, head=after, scenarios=scenarios, **settings)
        result = Comparing(question, out=options.out, listener=listener, tool_commit=options.commit).run()
    say(compare_report.as_json(result).decode() if options.json else compare_report.as_text(result))
    print(f"records  {result.run}", file=sys.stderr)
    if markdown is not None:
        write_whole(markdown, compare_report.as_markdown(result).encode())
    return compare_report.exit_code(result)


def history(commits: str, options: GateOptions, *, anchor: str | None = None) -> int:
    """Measure each commit of FIRST..LAST against the anchor (FIRST). 3 if one is marked, 4 if undecided, else 0."""
    with Progress() as listener:
        result = walk(
            commits, repository=options.repository, scenarios=options.scenarios(), out=options.out, anchor=anchor,
            listener=listener, **options.settings(),
        )  # fmt: skip
    say(as_json(result, result.exit_code) if options.json else history_text(result))
    print(f"records  {result.file}", file=sys.stderr)
    return result.exit_code


def bisect(good: str, bad: str, scenario: str, options: GateOptions) -> int:
    """Find the commit that made a scenario worse. 0 found and confirmed, 4 otherwise."""
    sweep = read_sweep(options.sweep, options.overrides)
    kind = torch.device(choose_device(options.device)).type
    chosen = named(scenario, scenarios_of(sweep, kind, options.paths or (AUTO, *sweep.paths)))
    nobody = Tree(asked="", folder="")
    ask = Question(base=nobody, head=nobody, scenarios=(chosen,), **options.settings())
    with Progress() as listener:
        search = Bisecting(good, bad, repository=options.repository, ask=ask, out=options.out, listener=listener)
        result = search.run()
    say(as_json(result, result.exit_code) if options.json else bisect_text(result))
    return result.exit_code


def plot_regressions(out: Path, to: Path | None) -> None:
    """Draw the newest history below ``out``. Raises TreeError where there is none."""
    from tuner.plot_regressions import draw_regressions  # matplotlib takes a second to import

    files = sorted((out / "history").glob("*.jsonl"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise SweepError(f"no history below {out / 'history'}; run 'nsa-tune history FIRST..LAST' first")
    found = read_history(files[-1])
    title = f"Time of each commit over the anchor's\n{files[-1].stem}, {found.lines[0].device if found.lines else ''}"
    for figure in draw_regressions(points_of(found.lines), found.change_points, to or out / "history" / "plots", title):
        print(figure)


def selftest(options: GateOptions) -> int:
    """Say what this machine can and cannot detect. 1 where a broken path passed, 4 where it cannot see, 0 otherwise."""
    with Progress() as listener:
        result = selftests.selftest(
            out=options.out, device=choose_device(options.device), budget_s=seconds(options.budget), listener=listener
        )
    say(as_json(result, result.exit_code) if options.json else selftests.as_text(result))
    return result.exit_code


def named(scenario: str, known: tuple[Scenario, ...]) -> Scenario:
    """The scenario of that name, or the only one whose name holds it. Raises SweepError."""
    found = [each for each in known if each.name == scenario] or [each for each in known if scenario in each.name]
    if len(found) != 1:
        names = [each.name for each in found or known]
        raise SweepError(f"--scenario {scenario!r} names {len(found)} scenarios; expected one of {names}")
    return found[0]


def fraction(text: str) -> float:
    """``1%`` or ``0.01``. Raises SweepError."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise SweepError(f"--effect {text!r}: expected a share such as 1% or 0.01") from error


def history_text(result: HistoryResult) -> str:
    """A line per commit, then what is marked."""
    lines = []
    for line in result.lines:
        lines.append(f"{line.commit[:10]}  {line.verdict:16s}  {line.subject}")
        if not line.scenarios:
            lines.append(f"    {line.reason}")
        for found in line.scenarios:
            ratio = "" if found.ratio is None else f" {found.ratio:.3f}"
            reason = f" ({found.reason})" if found.verdict == "undecided" else ""
            lines.append(f"    {found.scenario}: {found.verdict}{ratio}{reason}")
    lines += ["", "marked:" if result.marks else "no commit is worse than the one before it"]
    for mark in result.marks:
        lines.append(f"    {mark.commit[:10]} {mark.scenario}: {mark.what}; {mark.subject}")
        lines += [f"        or {commit[:10]}, which could not be told" for commit in mark.suspects]
    moved = [f"{name}: {', '.join(c[:10] for c in found)}" for name, found in result.change_points.items() if found]
    return "\n".join([*lines, *(f"change points (attribution only)  {words}" for words in moved)]) + "\n"


def bisect_text(result: BisectResult) -> str:
    """The culprit, how sure, and what was skipped."""
    lines = [f"{result.culprit[:10]}  {result.subject}" if result.culprit else f"no culprit: {result.reason}"]
    if result.confirmed is not None:
        found = result.confirmed
        ratio = compare_report.ratio_of(found.comparison)
        words = f"against the last good commit before it: {found.verdict} {ratio} {compare_report.why(found)}"
        lines.append(words.rstrip())
    lines += [f"may also be {commit[:10]}, which could not be measured" for commit in result.suspects]
    lines += [f"skipped {commit[:10]}: {reason}" for commit, reason in result.skipped.items()]
    return "\n".join([*lines, f"{result.visits} visits, {result.pairs} pairs"]) + "\n"


def as_json(result: msgspec.Struct, code: int) -> str:
    """Indented JSON with the exit code."""
    fields = {**msgspec.to_builtins(result), "exit_code": code}
    return msgspec.json.format(msgspec.json.encode(fields), indent=1).decode() + "\n"


def say(text: str) -> None:
    """On stdout, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()
