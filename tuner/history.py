"""History: every commit of a range against one fixed anchor commit, in the same way as a comparison, a line per commit.

A line stands as soon as its commit is measured, so a killed history goes on where it stopped. Marks say which commit
brought what, from verdicts and intervals; change points (ruptures) attribute and plot, they are never a gate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from tuner.compare import Comparing, Listener
from tuner.compare_record import LineFile, Question, Scenario
from tuner.hiring import Hire, hire_for, identify, must_import
from tuner.judge import CompareResult
from tuner.marks import NO_IMPORT, CommitLine, Mark, change_points, marks_of, scenarios_in
from tuner.trees import Tree, TreeError, commit_of, commits_between, open_tree, subject_of, top_of


class HistoryResult(msgspec.Struct, frozen=True, kw_only=True):
    """All lines in order, the marks, and change points by scenario; ``file`` holds the lines."""

    lines: tuple[CommitLine, ...]
    marks: tuple[Mark, ...]
    change_points: dict[str, tuple[str, ...]]
    file: str

    @property
    def exit_code(self) -> int:
        """3 where a commit is marked, 4 where one is undecided or does not import, 0 otherwise."""
        if self.marks:
            return 3
        return 4 if any(line.verdict in ("undecided", NO_IMPORT) for line in self.lines) else 0


def history(
    commits: str,
    *,
    repository: Path,
    scenarios: tuple[Scenario, ...],
    out: Path,
    anchor: str | None = None,
    hire: Hire | None = None,
    clock: Callable[[], float] = time.monotonic,
    listener: Listener | None = None,
    **settings: Any,
) -> HistoryResult:
    """Measure each commit of ``FIRST..LAST`` (after FIRST) against ``anchor`` (FIRST). ``settings``: of Question.

    Raises TreeError for a range or anchor that cannot be had, or a history begun on another device.
    """
    first, last = parse_range(commits)
    top = top_of(repository, last)
    fixed = commit_of(top, anchor or first)
    with open_tree(fixed, repository=top) as base:
        ask = Question(base=base, head=base, scenarios=scenarios, **settings)
        hire = hire or hire_for(ask)
        file = history_file(out, ask)
        device = device_of(hire, ask)
        known = {line.commit: line for line in file.read()}
        strangers = {line.device for line in known.values()} - {device}
        if strangers:
            raise TreeError(f"{file.path} was measured on {', '.join(strangers)}, this is {device}; give another --out")
        wanted = commits_between(top, first, last)
        for order, commit in enumerate(wanted):
            if commit not in known:
                run = Walk(ask, device, out, hire, clock, listener)
                known[commit] = run.measure(top, commit, order)
                file.append(known[commit])
    lines = tuple(msgspec.structs.replace(known[commit], order=order) for order, commit in enumerate(wanted))
    return HistoryResult(
        lines=lines, marks=tuple(marks_of(lines)), change_points=change_points(lines), file=str(file.path)
    )


def read_history(file: Path) -> HistoryResult:
    """What a history's file says, measured or not to its end; nothing is measured."""
    lines = tuple(sorted(LineFile[CommitLine](file, CommitLine).read(), key=lambda line: line.order))
    return HistoryResult(lines=lines, marks=tuple(marks_of(lines)), change_points=change_points(lines), file=str(file))


class Walk:
    """Measures one commit after the other against the same base."""

    def __init__(
        self, ask: Question, device: str, out: Path, hire: Hire, clock: Callable[[], float], listener: Listener | None
    ) -> None:
        self.ask, self.device, self.out, self.hire = ask, device, out, hire
        self.clock, self.listener = clock, listener

    def measure(self, top: Path, commit: str, order: int) -> CommitLine:
        """The commit's line; one that does not import has no scenarios."""
        date, subject = subject_of(top, commit)
        began = self.clock()
        line = CommitLine(
            commit=commit, date=date, subject=subject, order=order, anchor=self.ask.base.commit, device=self.device,
            settings=settings_of(self.ask), verdict=NO_IMPORT,
        )  # fmt: skip
        try:
            with open_tree(commit, repository=top) as head:
                result = self._compare(head)
        except TreeError as error:
            return msgspec.structs.replace(line, reason=str(error))
        return msgspec.structs.replace(
            line, verdict=result.verdict, reason=result.audit.reason, run=result.run,
            seconds=round(self.clock() - began, 1), scenarios=tuple(scenarios_in(result)),
        )  # fmt: skip

    def _compare(self, head: Tree) -> CompareResult:
        question = msgspec.structs.replace(self.ask, head=head)
        return Comparing(question, out=self.out, hire=self.hire, clock=self.clock, listener=self.listener).run()


def parse_range(commits: str) -> tuple[str, str]:
    """(FIRST, LAST) of ``FIRST..LAST``. Raises TreeError."""
    first, dots, last = commits.partition("..")
    if not (first and dots and last) or last.startswith("."):
        raise TreeError(f"{commits!r}: expected FIRST..LAST, such as v1.0..HEAD")
    return first, last


def history_file(out: Path, ask: Question) -> LineFile[CommitLine]:
    """Where the lines of this anchor and these settings are."""
    return LineFile(out / "history" / f"{ask.base.commit[:10]}-{settings_of(ask)}.jsonl", CommitLine)


def settings_of(ask: Question) -> str:
    """A short hash of all that must be equal for two lines to stand in one history."""
    same = (ask.scenarios, ask.device, ask.alpha, ask.effect, ask.budget_s, ask.sample_us, ask.launches, ask.watch)
    return sha256(msgspec.json.encode(same)).hexdigest()[:8]


def device_of(hire: Hire, ask: Question) -> str:
    """The device's slug, as a worker sees it. Raises DeviceError, DoesNotImport for an anchor that does not."""
    worker = hire()
    try:
        identity, _, _ = identify(worker, ask.device)
        must_import(worker, ask.base)
    finally:
        worker.close()
    slug: str = identity.slug
    return slug
