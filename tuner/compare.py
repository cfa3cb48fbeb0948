"""Compare: head against base, both in one worker, in pairs, until the evidence suffices or the budget ends.

First a process per side: does it import, is every scenario right, proved to execute, and what memory does it take. Then
at least three launches of a worker that holds both sides; a coin says which it loads first. Every line is on disk
before the next thing is measured. It decides by ``tuner.evidence`` when to stop and leaves verdicts to ``tuner.judge``.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from tuner import pacing
from tuner.compare_record import (
    SIDES,
    Checked,
    CompareFolder,
    Facts,
    Lane,
    Launched,
    Line,
    Measured,
    Question,
    Scenario,
    Side,
    unfinished,
)  # fmt: skip
from tuner.evidence import Evidence
from tuner.hiring import TIMEOUT_S, Asks, Hire, facts_in, hire_for, identify, must_import
from tuner.judge import CompareResult, judge
from tuner.pairing import Answer, PairTrial, Rounds
from tuner.record import Environment, new_run_id
from tuner.trees import Tree, TreeError
from tuner.worker import CandidateFailed, WorkerDied

BATCH_S = 2.0
DEATHS = 2
"""A worker may die once at the same thing, of whatever cause; the second time is that thing's outcome."""


class Listener:
    """What a comparison tells while it runs. Every method may be left as it is."""

    def working(self, what: str, seconds_left: float) -> None:
        """Something begins."""


class Comparing:
    """One run of one question. ``run`` returns its result; asked again after a kill it goes on."""

    def __init__(
        self,
        question: Question,
        *,
        out: Path,
        hire: Hire | None = None,
        clock: Callable[[], float] = time.monotonic,
        listener: Listener | None = None,
        tool_commit: str = "unknown",
    ) -> None:
        self.question, self.out, self.clock, self.tool_commit = question, out, clock, tool_commit
        self.hire = hire or hire_for(question)
        self.listener = listener or Listener()
        self.deaths: Counter[str] = Counter()
        self.hired: list[Asks] = []
        self.began = self.marked = clock()

    def run(self) -> CompareResult:
        """Check both sides, measure, judge. Raises TreeError for a side that does not import."""
        try:
            self.folder, self.device = self._open()
            self.evidence = Evidence(self.folder.lines.read())
            self.deadline = self.began + self.question.budget_s - self.evidence.seconds
            self.check(("base", self.question.base), ("head", self.question.head))
            while self.timed() and not self.enough():
                self.launch(len(self.evidence.launches))
            self.folder.finish()
            return judge(self.question, self.folder.lines.read(), run=str(self.folder.path))
        finally:
            for worker in self.hired:
                worker.close()

    def _open(self) -> tuple[CompareFolder, str]:
        """The unfinished run of this question on this device, or a new one; and the device's slug."""
        self.spare = self.worker()
        identity, software, clocks = identify(self.spare, self.question.device)
        root = self.out / "compares" / identity.slug
        found = unfinished(root, self.question, msgspec.to_builtins(software), self.tool_commit)
        if found is not None:
            return found, identity.slug
        now = datetime.now(UTC)
        run_id = new_run_id(now, self.question.head.digest)
        environment = Environment(
            run_id=run_id, commit=self.tool_commit, date=now.isoformat(timespec="seconds"), tool="nsa-tune compare",
            device=msgspec.to_builtins(identity), software=msgspec.to_builtins(software), clocks=clocks, timer={},
            sweep=msgspec.to_builtins(self.question),
        )  # fmt: skip
        folder = CompareFolder(root / run_id)
        folder.start(environment)
        return folder, identity.slug

    def worker(self) -> Asks:
        """A fresh worker, ended with the run."""
        self.hired.append(self.hire())
        return self.hired[-1]

    def write(self, line: Line) -> None:
        """To disk, then to the evidence."""
        self.folder.lines.append(line)
        self.evidence.add(line)

    def check(self, *sides: tuple[Side, Tree]) -> None:
        """Facts of every scenario on each side, in a process per side; what is known stays."""
        open_sides = [
            (side, tree, [s for s in self.question.scenarios if (s.name, side) not in self.evidence.facts])
            for side, tree in sides
        ]
        workers = {side: self.worker() if side == "head" else self.spare for side, _, todo in open_sides if todo}
        for side, tree, scenarios in open_sides:
            if not scenarios:
                continue
            must_import(workers[side], tree)
            for scenario in scenarios:
                self.listener.working(f"checking {side}: {scenario.name}", self.left())
                for _ in range(DEATHS):
                    workers[side] = workers[side] if workers[side].alive else self.worker()
                    facts = facts_in(workers[side], self.question, side, tree, scenario)
                    if facts.outcome == "ok" or workers[side].alive:
                        break
                self.write(Checked(scenario=scenario.name, side=side, facts=facts))
            workers[side].close()
        self.spare.close()

    def timed(self) -> tuple[Scenario, ...]:
        """The scenarios whose both sides passed."""
        return pacing.timed(self.question, self.evidence)

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - self.clock()

    def enough(self) -> bool:
        """Whether to stop: the wanted launches were made, and everything is settled or the budget is spent."""
        launches = len(self.evidence.launches)
        return self.left() <= 0 or (launches >= self.question.launches and self.settled())

    def settled(self) -> bool:
        """Whether nothing is open and the audit found its 4 %."""
        still_open = pacing.open_lanes(self.question, self.evidence)
        return not still_open and pacing.audit_found(self.question, self.evidence)

    def launch(self, number: int) -> None:
        """One process: load both sides in a coin's order, take pairs until settled or this launch's share is spent."""
        until = self.clock() + pacing.share_s(self.left(), self.question.launches - number)
        coin = f"{self.folder.path.name}/{number}"
        order = list(SIDES)
        random.Random(coin).shuffle(order)
        self.listener.working(f"launch {number + 1}: loading {' then '.join(order)}", self.left())
        worker = self.worker()
        try:
            trial = PairTrial(
                question=self.question, order=tuple(order), scenarios=self.timed(),
                kernels=pacing.kernels(self.question, self.evidence),
            )  # fmt: skip
            calls = worker.ask("prepare", trial, timeout_s=TIMEOUT_S)
            self.write(Launched(number=number, order=tuple(order), device=self.device, calls=calls))
            self._rounds(worker, number, coin, until)
        except (CandidateFailed, WorkerDied) as error:
            self._died(error.about if isinstance(error, WorkerDied) else worker.doing, error)
        finally:
            worker.close()

    def _rounds(self, worker: Asks, number: int, coin: str, until: float) -> None:
        """Batches of rounds. A launch takes half as many as the first at least, so that each has its say."""
        began = self.evidence.rounds
        wanted = max(pacing.BATCH_ROUNDS[0], began // (2 * max(number, 1)))
        while True:
            taken = self.evidence.rounds - began
            still_open = pacing.open_lanes(self.question, self.evidence)
            over = self.clock() >= until and (taken or self.left() <= 0)
            if over or (taken >= wanted and not still_open and self.settled()):
                return
            every: list[tuple[str, Lane]] = [(scenario.name, "head") for scenario in self.timed()]
            audited = tuple(dict.fromkeys(name for name, _ in still_open or every))
            request = Rounds(
                lanes=tuple(dict.fromkeys([*(every if taken < wanted else ()), *still_open])), audited=audited,
                coin=coin, first=self.evidence.rounds, count=pacing.batch_rounds(self.evidence.rounds),
                budget_s=BATCH_S,
            )  # fmt: skip
            what = f"launch {number + 1}: {self.evidence.rounds} rounds, {len(still_open)} lanes open"
            self.listener.working(what, self.left())
            self._batch(worker, number, request)

    def _batch(self, worker: Asks, number: int, request: Rounds) -> None:
        answer: Answer = worker.ask("rounds", (request,), timeout_s=TIMEOUT_S)
        now = self.clock()
        spent, self.marked = round(now - self.marked, 3), now
        taken = Measured(
            launch=number, pairs=answer.pairs, dropped=answer.dropped, clock_mhz=answer.clock_mhz,
            injected=answer.injected, seconds=spent,
        )  # fmt: skip
        self.write(taken)

    def _died(self, about: str, error: CandidateFailed | WorkerDied) -> None:
        """Count a death; the second at the same side of a scenario is that side's outcome."""
        self.deaths[about] += 1
        name, _, side = about.partition("|")
        known = [scenario.name for scenario in self.timed()]
        if self.deaths[about] < DEATHS:
            return
        if name not in known:
            raise TreeError(f"the worker that holds both sides failed twice while {about}: {error.reason}") from error
        failed: Side = "head" if side == "head" else "base"
        facts = Facts(outcome=error.outcome, reason=f"while timed: {error.reason}")
        self.write(Checked(scenario=name, side=failed, facts=facts))
