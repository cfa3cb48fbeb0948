"""Bisect: which commit between GOOD and BAD made one scenario worse. Pairs go where they tell most.

What fails (wrong, fell_back, crash, more memory) is found by checks alone. What is slower is found by measuring commits
against GOOD in one process: each visit goes to the commit that splits the suspicion most evenly, and its pairs shift
the suspicion by their evidence for BAD's side of the middle against GOOD's. The culprit is then compared with the
commit before it as the gate would do it. Commits that do not import or cannot be measured are skipped and named.
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import msgspec

from tuner import stats
from tuner.attribution import memory_changes
from tuner.compare import Comparing, Listener
from tuner.compare_record import SIDES, Facts, Lane, LineFile, Question
from tuner.hiring import TIMEOUT_S, Asks, Hire, facts_in, hire_for, must_import
from tuner.judge import CompareResult, ScenarioResult
from tuner.pairing import Answer, PairTrial, Rounds
from tuner.trees import TreeError, commit_of, commits_between, open_tree, subject_of, top_of
from tuner.worker import CandidateFailed, WorkerDied

VISIT_ROUNDS, VISIT_S = 12, 20.0
VISITS_AT_MOST = 60
"""A scenario whose sides differ by less than the noise shows is given up on after that many."""
CERTAIN = 30.0
"""Log odds of what a check says."""


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One visit to a commit: log ratios to GOOD, or what its check alone said, or why it was skipped.

    One with none of these says that the worker died; the second time that is the reason for a skip.
    """

    commit: str
    ratios: list[float] = []
    bad: bool | None = None
    skipped: str = ""


class BisectResult(msgspec.Struct, frozen=True, kw_only=True):
    """``culprit``: '' where none was found, for ``reason``. ``confirmed``: the gate on it against the last good one.

    ``suspects``: commits between those two, which could not be measured and so may be the culprit too.
    """

    culprit: str
    subject: str
    suspects: tuple[str, ...]
    skipped: dict[str, str]
    reason: str
    confirmed: ScenarioResult | None
    visits: int
    pairs: int

    @property
    def exit_code(self) -> int:
        """0 found and confirmed, 4 otherwise."""
        return 0 if self.culprit and self.confirmed is not None and self.confirmed.regressed else 4


class Bisecting:
    """One search. ``ask`` has one scenario; its base and head are replaced. Asked again after a kill it goes on."""

    def __init__(
        self,
        good: str,
        bad: str,
        *,
        repository: Path,
        ask: Question,
        out: Path,
        hire: Hire | None = None,
        clock: Callable[[], float] = time.monotonic,
        listener: Listener | None = None,
    ) -> None:
        if len(ask.scenarios) != 1:
            raise ValueError(f"bisect takes one scenario, got {[scenario.name for scenario in ask.scenarios]}")
        self.top = top_of(repository, bad)
        self.good, self.commits = commit_of(self.top, good), commits_between(self.top, good, bad)
        self.ask, self.out, self.clock = ask, out, clock
        self.hire, self.listener = hire or hire_for(ask), listener or Listener()
        same = (self.good, self.commits, ask.scenarios, ask.device, ask.alpha, ask.effect, ask.watch)
        name = sha256(msgspec.json.encode(same)).hexdigest()[:12]
        self.file: LineFile[Probe] = LineFile(out / "bisect" / f"{name}.jsonl", Probe)
        self.probes = self.file.read()

    def run(self) -> BisectResult:
        """Find the commit. Raises TreeError where GOOD or BAD does not import."""
        ends = self.compare(self.good, self.commits[-1]).scenarios[0]
        if not ends.regressed:
            return self.result("", f"BAD is not shown to be worse than GOOD: {ends.verdict}; {ends.reason}", None)
        step = math.log(ends.comparison.ratio or 1.0) if ends.comparison and ends.verdict == "slower" else None
        while len(self.probes) < VISITS_AT_MOST:
            place = next_place(self.commits, self.probes, step, self.ask.alpha)
            if place is None:
                return self.confirm(step)
            self.listener.working(f"visiting {self.commits[place][:10]}, {len(self.probes)} visits so far", 0.0)
            probe = self.probe(self.commits[place], ends, step)
            self.file.append(probe)
            self.probes.append(probe)
        suspicion = suspicions(self.commits, self.probes, step)
        likely = sorted(suspicion, key=lambda place: -suspicion[place])[:3]
        words = ", ".join(f"{self.commits[place][:10]} {suspicion[place]:.0%}" for place in likely)
        return self.result("", f"not told apart in {VISITS_AT_MOST} visits: {words}", None)

    def compare(self, base: str, head: str) -> CompareResult:
        """The gate's comparison of two commits in the one scenario."""
        with open_tree(base, repository=self.top) as before, open_tree(head, repository=self.top) as after:
            question = msgspec.structs.replace(self.ask, base=before, head=after)
            return Comparing(question, out=self.out, hire=self.hire, clock=self.clock, listener=self.listener).run()

    def probe(self, commit: str, ends: ScenarioResult, step: float | None) -> Probe:
        """Check a commit, and where the check does not tell, take pairs of it against GOOD."""
        known = any(probe.commit == commit and probe.ratios for probe in self.probes)
        worker = self.hire()
        try:
            with open_tree(self.good, repository=self.top) as good, open_tree(commit, repository=self.top) as head:
                if not known:
                    must_import(worker, head)
                    facts = facts_in(worker, self.ask, "head", head, self.ask.scenarios[0])
                    if facts.outcome != "ok" or step is None:
                        return self.by_check(commit, facts, ends)
                    worker.close()
                    worker = self.hire()
                question = msgspec.structs.replace(self.ask, base=good, head=head)
                return Probe(commit=commit, ratios=self.visit(worker, question))
        except TreeError as error:
            return Probe(commit=commit, skipped=str(error))
        except (CandidateFailed, WorkerDied) as error:
            died_before = any(probe.commit == commit and probe == Probe(commit=commit) for probe in self.probes)
            return Probe(commit=commit, skipped=f"while timed: {error}" if died_before else "")
        finally:
            worker.close()

    def by_check(self, commit: str, facts: Facts, ends: ScenarioResult) -> Probe:
        """What a check says: good, bad in BAD's own way, or something else that tells nothing."""
        if facts.outcome == "ok":
            memory = list(memory_changes(ends.base, facts)) if ends.base else []
            return Probe(commit=commit, bad=bool(memory) and ends.head is not None and ends.head.outcome == "ok")
        if ends.head is not None and facts.outcome == ends.head.outcome:
            return Probe(commit=commit, bad=True)
        return Probe(commit=commit, skipped=f"{facts.outcome}: {facts.reason}")

    def visit(self, worker: Asks, question: Question) -> list[float]:
        """Log ratios of some rounds in a fresh process, the sides loaded in a coin's order."""
        order, coin = list(SIDES), secrets.token_hex(8)
        random.Random(coin).shuffle(order)
        trial = PairTrial(question=question, order=tuple(order), scenarios=question.scenarios)
        worker.ask("prepare", trial, timeout_s=TIMEOUT_S)
        lane: tuple[str, Lane] = (question.scenarios[0].name, "head")
        request = Rounds(lanes=(lane,), audited=(), first=0, count=VISIT_ROUNDS, coin=coin, budget_s=VISIT_S)
        answer: Answer = worker.ask("rounds", (request,), timeout_s=TIMEOUT_S)
        return [math.log(pair.other_us / pair.base_us) for pair in answer.pairs]

    def confirm(self, step: float | None) -> BisectResult:
        """Compare the likeliest culprit with the last commit before it that could be measured."""
        suspicion = suspicions(self.commits, self.probes, step)
        place = max(suspicion, key=suspicion.__getitem__)
        before = max((other for other in suspicion if other < place), default=-1)
        last_good = self.good if before < 0 else self.commits[before]
        found = self.compare(last_good, self.commits[place]).scenarios[0]
        return self.result(self.commits[place], "" if found.regressed else found.reason, found, before)

    def result(self, culprit: str, reason: str, confirmed: ScenarioResult | None, before: int = -1) -> BisectResult:
        """All that is known."""
        place = self.commits.index(culprit) if culprit else 0
        return BisectResult(
            culprit=culprit, subject=subject_of(self.top, culprit)[1] if culprit else "", reason=reason,
            suspects=tuple(self.commits[before + 1 : place]), confirmed=confirmed, visits=len(self.probes),
            skipped={probe.commit: probe.skipped for probe in self.probes if probe.skipped},
            pairs=sum(len(probe.ratios) for probe in self.probes),
        )  # fmt: skip


def suspicions(commits: Sequence[str], probes: Sequence[Probe], step: float | None) -> dict[int, float]:
    """Place -> probability that it is the culprit, given that there is one, over the places that can be measured.

    ``step``: log ratio of BAD to GOOD. A commit's pairs count by the evidence of their e-processes around half of it.
    """
    skipped = {probe.commit for probe in probes if probe.skipped}
    places = [place for place, commit in enumerate(commits) if commit not in skipped or place == len(commits) - 1]
    weight, total = dict[int, float](), 0.0
    for place in reversed(places):  # if place is the culprit, it and all after it are bad
        total += log_odds([probe for probe in probes if probe.commit == commits[place]], step)
        weight[place] = total
    top = max(weight.values())
    odds = {place: math.exp(value - top) for place, value in weight.items()}
    return {place: value / sum(odds.values()) for place, value in sorted(odds.items())}


def log_odds(probes: Sequence[Probe], step: float | None) -> float:
    """Evidence that a commit is bad rather than good."""
    told = [probe.bad for probe in probes if probe.bad is not None]
    if told:
        return CERTAIN if told[-1] else -CERTAIN
    ratios = [ratio for probe in probes for ratio in probe.ratios]
    if step is None or not ratios:
        return 0.0
    slower = stats.log_e(ratios, delta=step / 2, direction="slower")
    return slower - stats.log_e(ratios, delta=step / 2, direction="faster")


def next_place(commits: Sequence[str], probes: Sequence[Probe], step: float | None, alpha: float) -> int | None:
    """The place whose answer is most open; None where one culprit has all suspicion but ``alpha``."""
    suspicion = suspicions(commits, probes, step)
    if max(suspicion.values()) >= 1.0 - alpha:
        return None
    bad, sums = 0.0, dict[int, float]()
    for place, chance in suspicion.items():
        bad += chance
        sums[place] = bad
    return min((place for place in sums if place < len(commits) - 1), key=lambda place: abs(sums[place] - 0.5))
