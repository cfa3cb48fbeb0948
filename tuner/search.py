"""Search: walk a sweep. Screen every candidate, shoot it out between the survivors, record all, resume after a kill.

Screening ranks and prunes and never counts as evidence. The shoot-out takes fresh pairs of the finalists and of what
they are compared with: the default, or where that failed (wrong, out of memory) the first right candidate. It decides
nothing itself: ``tuner.verdict`` says when a shoot-out is settled and ``tuner.table`` what the table gets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import optuna
import torch
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError

from nsa.defaults import default_candidate
from nsa.paths import Candidate, SelectionPath
from nsa.problem import SelectionProblem
from tuner import stats, verdict
from tuner.finalists import fastest_first, finalists, screened, stand_in, stood_in
from tuner.ledger import Ledger, Progress
from tuner.measure import CALLS_PER_GRAPH, KNOWN
from tuner.record import (
    DEFAULT_REGISTRY,
    Environment,
    Record,
    RunFolder,
    Stage,
    Value,
    new_run_id,
    resume_or_start,
)
from tuner.rounds import aligned, by_round
from tuner.session import Session, next_round
from tuner.space import Effort, reserve_rungs, space_of
from tuner.sweep import Family, SweepDefinition, SweepError, families
from tuner.trial import Assessment, SequenceResult, Timing, Trial

SCREEN_ROUNDS, SHOOTOUT_BATCH = 5, 10
SCREEN_SHARE, SHOOTOUT_SHARE = 0.2, 0.5
"""Of a problem's share of the time left; checking takes the rest."""


class Listener:
    """What a search tells while it runs; ``tuner.report`` draws it. Every method may be left as it is."""

    def started(self, environment: Environment, problems: int, resumed: int, word: str) -> None:
        """A run began or was resumed with so many records; ``word`` says what was dropped."""

    def working(self, what: str, done: float, seconds_left: float) -> None:
        """Progress: what is being done, the fraction done, and seconds left by the budget."""

    def recorded(self, record: Record) -> None:
        """A record was written."""


class Search:
    """One sweep on one device. ``run`` returns the run's folder, complete."""

    def __init__(
        self,
        sweep: SweepDefinition,
        *,
        out: Path,
        device: str,
        commit: str,
        effort: Effort,
        paths: Mapping[str, SelectionPath],
        storage: str | None = None,
        registry: str = DEFAULT_REGISTRY,
        listener: Listener | None = None,
    ) -> None:
        self.sweep, self.out, self.device, self.commit, self.effort = sweep, out, device, commit, effort
        self.storage, self.registry, self.paths = storage, registry, paths
        self.listener = listener or Listener()
        self.session = Session(device, memory_limit_bytes=sweep.memory_limit_bytes, timeout_s=120.0 * effort.patience)
        self.families = families(sweep, torch.device(device).type)
        self.problems = sum(len(family.problems) for family in self.families)
        self.done = 0
        self.records: list[Record] = []

    def run(self) -> RunFolder:
        """Run the sweep to its end, or go on where a killed one stopped."""
        self.began = time.monotonic()
        try:
            identity, software, clocks = self.session.ask("identify")
            timer = read_self_test(self.session.ask("self_test", 30))
            environment = self.environment(identity, software, clocks, timer)
            self.folder, word = resume_or_start(self.out / "records", environment)
            self.records, _ = self.folder.records()
            self.listener.started(self.folder.environment(), self.problems, len(self.records), word)
            try:
                self._walk()
            finally:
                self.folder.release()
            return self.folder
        finally:
            self.session.close()

    def _walk(self) -> None:
        for number, family in enumerate(self.families):
            if self.sweep.kind == "paths":
                self.run_family(family)
                if number == 0:
                    self.reserves(family, family.problems[0])
            else:
                for problem in family.problems:
                    self.reserves(family, problem)
                    self.done += 1
        self.folder.finish()

    def asked(self) -> dict[str, Any]:
        """What is measured, as the environment of a run keeps it: the same again is the same run."""
        asked = {"effort": self.effort.name, "registry": self.registry, "calls_per_graph": CALLS_PER_GRAPH}
        return {**msgspec.to_builtins(self.sweep), **asked}

    def environment(self, identity: Any, software: Any, clocks: Any, timer: dict[str, Value]) -> Environment:
        """What a run that begins now says of itself."""
        now = datetime.now(UTC)
        return Environment(
            run_id=new_run_id(now, self.commit), commit=self.commit, date=now.isoformat(timespec="seconds"),
            tool="nsa-tune sweep", device=msgspec.to_builtins(identity), software=msgspec.to_builtins(software),
            clocks=clocks, timer=timer, sweep=self.asked(),
        )  # fmt: skip

    def run_family(self, family: Family) -> None:
        """Screen the family's candidates over its contexts; shoot out each problem in the last generation."""
        space, left_out = space_of(self.sweep, self.effort, self.paths, family, self.device)
        for name, reason in left_out.items():
            for problem in family.problems:
                self._fail(
                    family, problem, "screen", Candidate(path=name), Assessment(outcome="unsupported", reason=reason)
                )
        study = f"{self.sweep.name}/{self.folder.path.name}/{family.name}"
        try:
            ledger = Ledger(study, space, self._storage(), self.sweep.seed)
        except (ValueError, optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
            raise SweepError(f"--storage {self.storage}: {str(error).splitlines()[0]}") from error
        for generation in range(ledger.generations):
            proposals = ledger.ask(generation)
            progress = Progress(ledger, proposals)
            last = generation == ledger.generations - 1
            for index, problem in enumerate(family.problems):
                alive = [proposal.candidate for proposal in progress.alive]
                self.screen(family, problem, alive, thorough=index == 0)
                found = self.of(family, problem, "screen")
                progress.report(problem.T, screened(found, self.baseline(family, problem)), found)
                if last:
                    self.shoot_out(family, problem)
                    self.done += 1
            progress.close(self.sweep.memory_limit_bytes)

    def screen(self, family: Family, problem: SelectionProblem, candidates: list[Candidate], *, thorough: bool) -> None:
        """Assess and time what no record knows yet, in rounds shared with the baseline.

        Out of time, only the first candidate of each path is still taken: every path is measured on every problem, the
        baseline's by the baseline, others by what was fastest at the nearest context. The first path by the sweep's
        order, not the fastest, stands in for a default that failed.
        """
        known = {record.candidate for record in self.of(family, problem, "screen")}
        fresh = [candidate for candidate in candidates if candidate.name not in known]
        if not fresh:
            return
        self._hold(family, problem)
        base, deadline = self.baseline(family, problem), time.monotonic() + self._share(1.0 - SHOOTOUT_SHARE)
        given = [base, *(candidate for candidate in fresh if candidate != base)]
        wanted = [base, *fastest_first(given[1:], self.elsewhere(family, problem))]
        ready: list[Candidate] = []

        def begun(candidate: Candidate) -> None:
            self._working(family, problem, f"checking {candidate.name}")

        for candidate in self.session.prove(wanted, deadline, thorough=thorough, begun=begun):
            assessment = self.session.assess(candidate, thorough=thorough)
            if assessment.outcome == "ok":
                ready.append(candidate)
            else:
                self._fail(family, problem, "screen", candidate, assessment)
        self._working(family, problem, f"screening {len(ready)} candidates")
        paths = list(dict.fromkeys(one.path for one in (*given[1:], base)))  # in which one may stand in for the base
        ready.sort(key=lambda one: (one != base, paths.index(one.path), given.index(one)))
        if ready:
            self._time(family, problem, "screen", ready, SCREEN_ROUNDS, base)

    def shoot_out(self, family: Family, problem: SelectionProblem) -> None:
        """Fresh pairs of the finalists and the baseline, until settled, out of time or out of pairs."""
        met = {record.candidate: record for record in self.of(family, problem, "shootout")}
        base = self.baseline(family, problem)
        chosen = finalists(self.of(family, problem, "screen"), base)
        if any(record.baseline for record in met.values()) and all(one.name in met for one in chosen):
            return  # else a run that went on has screened more candidates, or was cut
        self._hold(family, problem)
        wanted = [base, *(c for c in chosen if c != base)]
        self.session.release(wanted)
        ready = [c for c in wanted if self.session.assess(c, thorough=False).outcome == "ok"]
        self._working(family, problem, f"shoot-out of {len(ready)}")
        if ready:
            self._time(family, problem, "shootout", ready, self.effort.pairs, base)

    def reserves(self, family: Family, problem: SelectionProblem) -> None:
        """Latency, peak and growths of each reserve rung along growing, alternating and shrinking contexts."""
        if problem.mode == "train":
            return  # what backward needs is never a workspace buffer
        self._hold(family, problem)
        device = torch.device(self.device)
        steps = [max(16, problem.T * eighths // 8) for eighths in (1, 2, 4, 8)]
        walk = tuple((*steps, *(steps[-1], steps[0]) * 4, *reversed(steps)) * self.effort.repeats)
        known = {record.candidate for record in self.of(family, problem, "reserve")}
        for name in self.sweep.paths:
            for rung, candidate in enumerate(reserve_rungs(self.paths[name], problem, device)):
                if candidate.name not in known:
                    self._working(family, problem, f"reserves of {name}, rung {rung}")
                    found = self.session.call_sequence(candidate, walk)
                    if isinstance(found, Assessment):
                        self._fail(family, problem, "reserve", candidate, found)
                    else:
                        self._append(
                            [self._record(family, problem, "reserve", candidate, self.default(problem), sequence=found)]
                        )

    def baseline(self, family: Family, problem: SelectionProblem) -> Candidate:
        """What others are compared with: the default, or where that failed what stood in for it when screened."""
        return stood_in(self.of(family, problem, "screen"), self.default(problem))

    def elsewhere(self, family: Family, problem: SelectionProblem) -> list[dict[str, float]]:
        """What screening says of the family's other problems so far, the nearest context first."""
        others = (other for other in family.problems if other != problem)
        near_first = sorted(others, key=lambda other: abs(math.log(other.T / problem.T)))
        return [screened(self.of(family, other, "screen"), self.baseline(family, other)) for other in near_first]

    def default(self, problem: SelectionProblem) -> Candidate:
        """The literal default."""
        return default_candidate(problem, torch.device(self.device).type)

    def of(self, family: Family, problem: SelectionProblem, stage: Stage) -> list[Record]:
        """Records of a problem and stage so far."""
        fields = msgspec.to_builtins(problem)
        return [r for r in self.records if r.stage == stage and r.pattern == family.pattern and r.problem == fields]

    def _hold(self, family: Family, problem: SelectionProblem) -> None:
        pattern, seed = family.pattern, self.sweep.seed
        self.session.hold(
            Trial(problem=problem, pattern=pattern, seed=seed, device=self.device, registry=self.registry)
        )

    def _time(
        self, family: Family, problem: SelectionProblem, stage: Stage, ready: list[Candidate], count: int,
        base: Candidate,
    ) -> None:  # fmt: skip
        base = stand_in(base, ready, self.paths)

        def settled(taken: dict[str, dict[int, float]]) -> bool:
            against = stand_in(base, [candidate for candidate in ready if candidate.name in taken], self.paths)
            return stage == "shootout" and verdict.settled(against.name, aligned(taken), alpha=verdict.PICK_ALPHA)

        timed = self.session.time(
            ready, count=count, batch=SCREEN_ROUNDS if stage == "screen" else SHOOTOUT_BATCH,
            first=next_round(self.of(family, problem, stage)), settled=settled,
            least=1 if stage == "screen" else fewest_pairs(len(ready)),
            budget_s=self._share(SCREEN_SHARE if stage == "screen" else SHOOTOUT_SHARE),
        )  # fmt: skip
        for candidate in ready:
            if candidate.name in timed.failed:
                self._fail(family, problem, stage, candidate, timed.failed[candidate.name])
        base = stand_in(base, [candidate for candidate in ready if candidate.name in timed.timings], self.paths)
        self._append(
            [
                self._record(family, problem, stage, candidate, base, timings=timed.timings[candidate.name])
                for candidate in sorted(ready, key=lambda candidate: candidate == base)
                if candidate.name in timed.timings
            ]  # the baseline last: a batch that was cut short has none, and is measured again
        )

    def _fail(
        self, family: Family, problem: SelectionProblem, stage: Stage, candidate: Candidate, why: Assessment
    ) -> None:
        """Record a failure, once."""
        if not any(record.candidate == candidate.name for record in self.of(family, problem, stage)):
            self.session.assessed[candidate.name] = why
            self._append([self._record(family, problem, stage, candidate, self.default(problem))])

    def _record(
        self, family: Family, problem: SelectionProblem, stage: Stage, candidate: Candidate, base: Candidate, *,
        timings: list[Timing] | None = None, sequence: SequenceResult | None = None,
    ) -> Record:  # fmt: skip
        found = self.session.assessed[candidate.name]
        return Record(
            run_id=self.folder.path.name, commit=self.commit, date=datetime.now(UTC).isoformat(timespec="seconds"),
            stage=stage, problem=msgspec.to_builtins(problem), pattern=family.pattern, union=self.session.union,
            path=candidate.path, parameters=candidate.parameters, baseline=candidate == base,
            outcome=found.outcome, reason=found.reason, oracle_error=found.oracle_error,
            oracle_bound=found.oracle_bound, kernels=found.kernels, peak_bytes=found.peak_bytes,
            samples=[sample for timing in timings or [] for sample in timing.samples],
            sequence=sequence.samples if sequence else [], dropped=sum(timing.dropped for timing in timings or []),
            calls_per_sample=timings[0].calls_per_sample if timings else 0,
            workspace_bytes=sequence.workspace_bytes if sequence else found.workspace_bytes,
            growths=sequence.growths if sequence else found.growths,
        )  # fmt: skip

    def _append(self, records: list[Record]) -> None:
        self.folder.append(records)
        self.records.extend(records)
        for record in records:
            self.listener.recorded(record)

    def _storage(self) -> optuna.storages.BaseStorage | str:
        if self.storage is not None:
            return self.storage
        return optuna.storages.JournalStorage(JournalFileBackend(str(self.folder.path / "optuna.journal")))

    def _left_s(self) -> float:
        return max(0.0, self.sweep.budget_s - (time.monotonic() - self.began))

    def _share(self, fraction: float) -> float:
        """Seconds for a part of this problem's work: of what is left, shared by the problems left."""
        return self._left_s() / max(1, self.problems - self.done) * fraction

    def _working(self, family: Family, problem: SelectionProblem, what: str) -> None:
        self.listener.working(f"{family.name} T={problem.T}: {what}", self.done / self.problems, self._left_s())


def fewest_pairs(candidates: int) -> int:
    """Rounds after which a clear difference among so many candidates, the default included, can be certified."""
    return stats.pairs_needed(alpha=verdict.PICK_ALPHA, scenarios=max(1, candidates - 1)) + 4


def read_self_test(timings: dict[str, Timing]) -> dict[str, Value]:
    """The timer self-test as figures: measured ratio and interval per known ratio."""
    samples = aligned({name: by_round(timing.samples) for name, timing in timings.items()})
    found: dict[str, Value] = {}
    for known in KNOWN:
        shown = verdict.compare(verdict.log_ratios(samples["base"], samples[known]), alpha=0.001, effect=0.0)
        found[f"{known} reads"] = round(shown.ratio or 0.0, 5)
        found[f"{known} low"] = round(shown.ratio_low, 5)
        found[f"{known} high"] = round(shown.ratio_high or 0.0, 5)
    return found
