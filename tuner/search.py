"""Search: walk a sweep. Screen every candidate, shoot it out between the survivors, record everything, resume after a kill.

Screening ranks and prunes and never counts as evidence. The shoot-out takes fresh pairs of the finalists, the default
always among them. It decides nothing itself: ``tuner.verdict`` says when a shoot-out is settled and ``tuner.table`` what
the table gets.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import optuna
import torch
from optuna.storages.journal import JournalFileBackend

from nsa.dispatch_table import default_candidate
from nsa.paths import Candidate, Parameter, SelectionPath
from nsa.problem import SelectionProblem
from tuner import verdict
from tuner.ledger import Ledger, Proposal, Space
from tuner.record import Environment, Outcome, Record, RunFolder, Sample, Stage, run_folders
from tuner.sweep import Family, SweepDefinition, families
from tuner.trial import Assessment, Rounds, Sequence, SequenceResult, Timing, Trial
from tuner.worker import CandidateFailed, Worker, WorkerDied

ALPHA = 0.01
"""Chance that one entry names something no faster than the default."""
FINALISTS = 4
SCREEN_ROUNDS = 5
SAMPLE_US = 2000.0
TIMEOUTS_S = {"prepare": 120.0, "assess": 120.0, "rounds": 120.0, "sequence": 120.0}


class Effort(msgspec.Struct, frozen=True):
    """How much to spend: pairs per shoot-out, whole ladders, paths that take long to build on a CPU, repeats of
    reserve sequences, and how many seconds a request may take before it counts as a hang."""

    pairs: int
    whole_ladders: bool
    slow_to_build: bool
    repeats: int
    timeout_scale: float


EFFORTS = {"quick": Effort(60, False, False, 1, 1.0), "full": Effort(200, True, True, 10, 4.0)}


class Listener:
    """What a search tells while it runs; ``tuner.report`` draws it. Every method may be left as it is."""

    def started(self, environment: Environment, problems: int, resumed: int, word: str) -> None:
        """A run began or was resumed with so many records; ``word`` says what was dropped."""

    def working(self, what: str, done: float, seconds_left: float) -> None:
        """Progress: what is being done, the fraction done, and seconds left by the budget."""

    def recorded(self, record: Record) -> None:
        """A record was written."""


class Search:
    """One sweep on one device. ``run`` returns the run's folder."""

    def __init__(
        self,
        sweep: SweepDefinition,
        *,
        out: Path,
        device: str,
        commit: str,
        effort: str = "quick",
        storage: str | None = None,
        registry: str = "nsa.paths:PATHS",
        paths: dict[str, SelectionPath],
        listener: Listener | None = None,
    ) -> None:
        self.sweep, self.out, self.device, self.commit = sweep, out, device, commit
        self.effort = EFFORTS[effort]
        self.storage, self.registry, self.paths = storage, registry, paths
        self.listener = listener or Listener()
        self.families = families(sweep, torch.device(device).type)
        self.worker: Worker | None = None
        self.prepared: Trial | None = None
        self.assessed: dict[str, Assessment] = {}
        self.began = time.monotonic()
        self.steps_done = 0
        self.steps = sum(len(family.problems) for family in self.families)

    def run(self) -> RunFolder:
        """Run the sweep to its end, or go on where a killed one stopped."""
        self.began = time.monotonic()
        try:
            identity, software, clocks = self.ask("identify", None, "prepare")
            timer = read_self_test(self.ask("self_test", 30, "prepare"))
            self.folder, word = self._folder(identity, software, clocks, timer)
            records, _ = self.folder.records()
            self.records = records
            self.listener.started(self.folder.environment(), self.steps, len(records), word)
            for family in self.families:
                if self.sweep.kind == "reserve":
                    for problem in family.problems:
                        self.reserve_sequences(family, problem)
                        self._advance()
                else:
                    self.run_family(family)
            self.folder.finish()
            return self.folder
        finally:
            if self.worker is not None:
                self.worker.close()

    def _folder(self, identity: Any, software: Any, clocks: Any, timer: Any) -> tuple[RunFolder, str]:
        """The unfinished run of the same sweep, commit and software on this device, or a new one."""
        root = self.out / "records" / identity.slug / self.sweep.name
        resolved = {**msgspec.to_builtins(self.sweep), "effort": [n for n, e in EFFORTS.items() if e is self.effort][0]}
        for folder in reversed(list(run_folders(root))):
            before = folder.environment()
            same = (before.sweep, before.commit, before.software) == (
                resolved, self.commit, msgspec.to_builtins(software)
            )  # fmt: skip
            if not folder.complete and same:
                return folder, folder.repair()
        now = datetime.now(UTC)
        run_id = f"{now:%Y%m%dT%H%M%S}-{self.commit[:7]}"
        folder = RunFolder(root / run_id)
        folder.start(
            Environment(
                run_id=run_id, commit=self.commit, date=now.isoformat(timespec="seconds"), tool="nsa-tune sweep",
                device=msgspec.to_builtins(identity), software=msgspec.to_builtins(software), clocks=clocks,
                timer=timer, sweep=resolved,
            )  # fmt: skip
        )
        return folder, ""

    def run_family(self, family: Family) -> None:
        """Screen the family's candidates over its contexts, and shoot out each problem in the last generation."""
        space, problem = self.space(family), family.problems[-1]
        ledger = Ledger(
            f"{self.sweep.name}/{self.folder.path.name}/{family.name}", space, self._storage(), self.sweep.seed
        )
        for generation in range(ledger.generations):
            alive = ledger.ask(generation)
            everyone = list(alive)
            values: dict[str, list[float]] = {proposal.candidate.name: [] for proposal in alive}
            peaks: dict[str, float] = {}
            pruned: set[str] = set()
            for index, problem in enumerate(family.problems):
                self.screen(family, problem, [proposal.candidate for proposal in alive], thorough=index == 0)
                slow = self._report(ledger, problem, family, alive, values, peaks)
                pruned |= slow
                alive = [proposal for proposal in alive if proposal.candidate.name not in slow]
                if generation == ledger.generations - 1:
                    self.shoot_out(family, problem)
                    self._advance()
            if generation == ledger.generations - 1 and self.effort.repeats:
                self.reserve_sequences(family, family.problems[0])
            for proposal in everyone:
                name = proposal.candidate.name
                over = peaks.get(name, math.inf) - (self.sweep.memory_limit_bytes or 2**62)
                ledger.close(proposal, values[name], over, pruned=name in pruned)

    def space(self, family: Family) -> Space:
        """Path -> parameters to cross: the sweep's ladders in quick effort, the paths' own in full; reserves left out."""
        problem, device = family.problems[-1], torch.device(self.device)
        space: dict[str, tuple[Parameter, ...]] = {}
        for name in self.sweep.paths:
            path = self.paths[name]
            reason = path.unsupported_reason(problem, device, path.defaults(problem, device))
            if path.slow_to_build and device.type == "cpu" and not self.effort.slow_to_build:
                reason = reason or "takes tens of seconds to compile on a CPU; run with --effort full"
            if reason is not None:
                for each in family.problems:
                    self._unsupported(family, each, name, reason)
                continue
            ladders = {} if self.effort.whole_ladders else self.sweep.ladders.get(name, {})
            space[name] = tuple(
                narrowed(item, ladders.get(item.name)) for item in path.tunables(problem, device) if not item.reserve
            )
        return space

    def _unsupported(self, family: Family, problem: SelectionProblem, name: str, reason: str) -> None:
        candidate = Candidate(path=name)
        if not self.known(family, problem, "screen", candidate):
            self.write(family, problem, "screen", candidate, Assessment(outcome="unsupported", reason=reason))

    def screen(
        self, family: Family, problem: SelectionProblem, candidates: list[Candidate], *, thorough: bool
    ) -> None:
        """Assess and time what no record knows yet, in rounds shared with the default."""
        default = default_candidate(problem, torch.device(self.device).type)
        fresh = [c for c in candidates if not self.known(family, problem, "screen", c)]
        if not fresh:
            return
        ready: list[Candidate] = []
        for candidate in [default, *(c for c in fresh if c != default)]:
            self._working(f"{family.name} T={problem.T}: checking {candidate.name}")
            assessment = self.assess(family, problem, candidate, thorough=thorough)
            if assessment.outcome == "ok":
                ready.append(candidate)
            elif not self.known(family, problem, "screen", candidate):
                self.write(family, problem, "screen", candidate, assessment)
        self._working(f"{family.name} T={problem.T}: screening {len(ready)} candidates")
        self.time_and_record(family, problem, "screen", ready, SCREEN_ROUNDS)

    def shoot_out(self, family: Family, problem: SelectionProblem) -> None:
        """Fresh pairs of the finalists and the default, until settled, out of time or out of pairs."""
        default = default_candidate(problem, torch.device(self.device).type)
        if self.known(family, problem, "shootout", default):
            return
        finalists = [default, *(c for c in self.finalists(family, problem) if c != default)]
        ready = [c for c in finalists if self.assess(family, problem, c, thorough=False).outcome == "ok"]
        self._working(f"{family.name} T={problem.T}: shoot-out of {len(ready)}")
        if len(ready) >= 1:
            self.time_and_record(family, problem, "shootout", ready, self.effort.pairs)

    def finalists(self, family: Family, problem: SelectionProblem) -> list[Candidate]:
        """The fastest by screening, one of each path before a second of any."""
        ratios = self.screened(family, problem)
        found = {r.candidate: Candidate(path=r.path, parameters=r.parameters) for r in self.of(family, problem, "screen")}
        ranked = sorted(ratios, key=ratios.__getitem__)
        firsts = [n for i, n in enumerate(ranked) if found[n].path not in {found[m].path for m in ranked[:i]}]
        best = [name for name in ranked if ratios[name] < 0.1][:FINALISTS]
        return [found[name] for name in dict.fromkeys((*best, *firsts[:2]))]

    def screened(self, family: Family, problem: SelectionProblem) -> dict[str, float]:
        """Candidate name -> median log-ratio to the default in shared screening rounds."""
        default = default_candidate(problem, torch.device(self.device).type).name
        samples = rounds_by_candidate(self.of(family, problem, "screen"))
        base = samples.get(default, {})
        return {
            name: statistics.median(math.log(us / base[number]) for number, us in taken.items() if number in base)
            for name, taken in samples.items()
            if base.keys() & taken.keys()
        }

    def _report(
        self, ledger: Ledger, problem: SelectionProblem, family: Family, alive: list[Proposal],
        values: dict[str, list[float]], peaks: dict[str, float],
    ) -> set[str]:  # fmt: skip
        """Tell the ledger this context's values; names too slow or failed, each path's best being kept."""
        ratios = self.screened(family, problem)
        records = {record.candidate: record for record in self.of(family, problem, "screen")}
        best = {
            path: min((n for n in ratios if records[n].path == path), key=ratios.__getitem__, default="")
            for path in {record.path for record in records.values()}
        }
        out: set[str] = set()
        for proposal in alive:
            name = proposal.candidate.name
            if name not in ratios:
                out.add(name)
                continue
            values[name].append(ratios[name])
            peaks[name] = max(peaks.get(name, 0.0), float(records[name].peak_bytes or 0))
            if ledger.report(proposal, ratios[name], problem.T) and best[proposal.candidate.path] != name:
                out.add(name)
        return out

    def reserve_sequences(self, family: Family, problem: SelectionProblem) -> None:
        """Latency, peak and growths of each reserve rung along growing, alternating and shrinking contexts."""
        if problem.mode == "train":
            return  # what backward needs is never a workspace buffer
        device = torch.device(self.device)
        sizes = [max(problem.block_size or 1, problem.T * eighths // 8) for eighths in (1, 2, 4, 8)]
        if problem.mode == "prefill":
            sizes = [size for size in sizes if size > 4]
        walk = (*sizes, *(sizes[-1], sizes[0]) * 4, *reversed(sizes)) * self.effort.repeats
        for name in self.sweep.paths:
            path = self.paths[name]
            items = path.tunables(problem, device)
            reserves = [item for item in items if item.reserve]
            for rung in range(max((len(item.ladder) for item in reserves), default=0)):
                chosen = {item.name: item.ladder[min(rung, len(item.ladder) - 1)] for item in reserves}
                candidate = Candidate(path=name, parameters={**path.defaults(problem, device), **chosen})
                if not self.known(family, problem, "reserve", candidate):
                    self._working(f"{family.name} T={problem.T}: reserves of {name}, rung {rung}")
                    self._sequence(family, problem, candidate, walk)

    def _sequence(
        self, family: Family, problem: SelectionProblem, candidate: Candidate, contexts: tuple[int, ...]
    ) -> None:
        assessment = self.assess(family, problem, candidate, thorough=False)
        result: SequenceResult | None = None
        if assessment.outcome == "ok":
            try:
                result = self.ask("sequence", (Sequence(candidate=candidate, contexts=contexts),), "sequence")
            except (CandidateFailed, WorkerDied) as error:
                assessment = Assessment(outcome=error.outcome, reason=error.reason)
        self.write(family, problem, "reserve", candidate, assessment, sequence=result)

    def assess(
        self, family: Family, problem: SelectionProblem, candidate: Candidate, *, thorough: bool
    ) -> Assessment:
        """Build, check and attest in the worker; failures become outcomes. Remembered per prepared problem."""
        try:
            self.prepare(family, problem)
            known = self.assessed.get(candidate.name)
            if known is not None:
                return known
            found: Assessment = self.ask("assess", (candidate, thorough), "assess")
        except (CandidateFailed, WorkerDied) as error:
            found = Assessment(outcome=error.outcome, reason=error.reason)
        limit = self.sweep.memory_limit_bytes
        if limit and found.peak_bytes and found.peak_bytes > limit:
            found = Assessment(
                outcome="oom", reason=f"one call held {found.peak_bytes} bytes, the sweep's limit is {limit}"
            )
        self.assessed[candidate.name] = found
        return found

    def time_and_record(
        self, family: Family, problem: SelectionProblem, stage: Stage, ready: list[Candidate], count: int
    ) -> None:
        """Shared rounds in batches; a candidate that kills the worker gets its outcome and the rest start over."""
        default = default_candidate(problem, torch.device(self.device).type)
        collected: dict[str, list[Timing]] = {}
        first = 1 + max((s.round for r in self.of(family, problem, stage) for s in r.samples), default=-1)
        budget_s = self._share(stage)
        began, done, batch = time.monotonic(), 0, SCREEN_ROUNDS if stage == "screen" else 10
        while ready and done < count:
            request = Rounds(
                candidates=tuple(ready), count=min(batch, count - done), first=first + done,
                seed=hash((self.sweep.seed, first + done)) & 0xFFFFFFFF, sample_us=SAMPLE_US,
                budget_s=max(0.0, budget_s - (time.monotonic() - began)),
            )  # fmt: skip
            try:
                timings = self.ask("rounds", (request,), "rounds")
            except (CandidateFailed, WorkerDied) as error:
                ready = self._without_culprit(family, problem, stage, ready, error)
                collected.clear()
                continue
            for name, timing in timings.items():
                collected.setdefault(name, []).append(timing)
            done += request.count
            over = time.monotonic() - began > budget_s
            if over or (stage == "shootout" and verdict.settled(default.name, aligned(collected), alpha=ALPHA)):
                break
        records = [
            self.make(family, problem, stage, c, self.assessed[c.name], timings=collected[c.name]) for c in ready
        ]
        self._append(records)

    def _without_culprit(
        self, family: Family, problem: SelectionProblem, stage: Stage, ready: list[Candidate],
        error: CandidateFailed | WorkerDied,
    ) -> list[Candidate]:  # fmt: skip
        about = error.about if isinstance(error, WorkerDied) else self.worker.doing if self.worker else ""
        culprits = [c for c in ready if c.name == about] or ready[-1:]
        for culprit in culprits:
            failed = Assessment(outcome=error.outcome, reason=f"while timed: {error.reason}")
            self.write(family, problem, stage, culprit, failed)
            self.assessed[culprit.name] = failed
        rest = [c for c in ready if c not in culprits]
        return [c for c in rest if self.assess(family, problem, c, thorough=False).outcome == "ok"]

    def prepare(self, family: Family, problem: SelectionProblem) -> None:
        """Make the worker hold this problem's inputs."""
        trial = Trial(
            problem=problem, pattern=family.pattern, seed=self.sweep.seed, device=self.device, registry=self.registry
        )
        if self.prepared == trial and self.worker is not None and self.worker.alive:
            return
        if self.prepared != trial:
            self.assessed = {}
        else:
            self.assessed = {name: found for name, found in self.assessed.items() if found.outcome != "ok"}
        self.prepared = None
        self.union = self.ask("prepare", trial, "prepare")
        self.prepared = trial

    def ask(self, verb: str, argument: Any, kind: str) -> Any:
        """Ask the worker, starting one where there is none or the last one is gone."""
        if self.worker is None or not self.worker.alive:
            if self.worker is not None:
                self.worker.close()
            self.prepared = None if verb == "prepare" else self.prepared
            self.worker = Worker(self.device, memory_limit_bytes=self.sweep.memory_limit_bytes)
        return self.worker.ask(verb, argument, timeout_s=TIMEOUTS_S[kind] * self.effort.timeout_scale)

    def of(self, family: Family, problem: SelectionProblem, stage: Stage) -> list[Record]:
        """Records of a problem and stage so far."""
        fields = msgspec.to_builtins(problem)
        return [
            r for r in self.records if r.stage == stage and r.pattern == family.pattern and r.problem == fields
        ]

    def known(self, family: Family, problem: SelectionProblem, stage: Stage, candidate: Candidate) -> bool:
        """Whether a record of this candidate exists."""
        return any(record.candidate == candidate.name for record in self.of(family, problem, stage))

    def write(
        self, family: Family, problem: SelectionProblem, stage: Stage, candidate: Candidate, assessment: Assessment,
        sequence: SequenceResult | None = None,
    ) -> None:  # fmt: skip
        """Record a candidate that has no shared rounds: a failure, or a reserve sequence."""
        self._append([self.make(family, problem, stage, candidate, assessment, sequence=sequence)])

    def make(
        self, family: Family, problem: SelectionProblem, stage: Stage, candidate: Candidate, assessment: Assessment,
        timings: list[Timing] | None = None, sequence: SequenceResult | None = None,
    ) -> Record:  # fmt: skip
        """A record."""
        samples: list[Sample] = [sample for timing in timings or [] for sample in timing.samples]
        default = default_candidate(problem, torch.device(self.device).type)
        outcome: Outcome = assessment.outcome
        return Record(
            run_id=self.folder.path.name, commit=self.commit,
            date=datetime.now(UTC).isoformat(timespec="seconds"), stage=stage, problem=msgspec.to_builtins(problem),
            pattern=family.pattern, union=getattr(self, "union", None), path=candidate.path,
            parameters=candidate.parameters, baseline=candidate == default, outcome=outcome,
            reason=assessment.reason, oracle_error=assessment.oracle_error, oracle_bound=assessment.oracle_bound,
            kernels=assessment.kernels, samples=samples, sequence=sequence.samples if sequence else [],
            dropped=sum(timing.dropped for timing in timings or []),
            calls_per_sample=timings[0].calls_per_sample if timings else 0, peak_bytes=assessment.peak_bytes,
            workspace_bytes=sequence.workspace_bytes if sequence else assessment.workspace_bytes,
            growths=sequence.growths if sequence else assessment.growths,
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

    def _share(self, stage: Stage) -> float:
        """Seconds this problem's rounds may take: of what is left, shared by the problems left."""
        left = max(0.0, self.sweep.budget_s - (time.monotonic() - self.began))
        return left / max(1, self.steps - self.steps_done) * (0.2 if stage == "screen" else 0.6)

    def _advance(self) -> None:
        self.steps_done += 1

    def _working(self, what: str) -> None:
        spent = time.monotonic() - self.began
        left = max(0.0, self.sweep.budget_s - spent)
        self.listener.working(what, self.steps_done / max(1, self.steps), left)


def narrowed(item: Parameter, ladder: tuple[int | float | str | bool, ...] | None) -> Parameter:
    """A parameter on a sweep's coarser ladder; its default stays where the ladder has it, else the ladder's first."""
    if ladder is None:
        return item
    default = item.default if item.default in ladder else ladder[0]
    return Parameter(item.name, ladder, default, item.reserve)


def rounds_by_candidate(records: list[Record]) -> dict[str, dict[int, float]]:
    """Candidate name -> round -> microseconds, of records that have samples."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if record.outcome == "ok":
            found.setdefault(record.candidate, {}).update({s.round: s.us for s in record.samples})
    return {name: samples for name, samples in found.items() if samples}


def aligned(collected: dict[str, list[Timing]]) -> dict[str, list[float]]:
    """Candidate name -> microseconds by round, NaN where a sample was dropped."""
    by_round = {
        name: {sample.round: sample.us for timing in timings for sample in timing.samples}
        for name, timings in collected.items()
    }
    numbers = sorted(set().union(*by_round.values()))
    return {name: [taken.get(number, math.nan) for number in numbers] for name, taken in by_round.items()}


def read_self_test(timings: dict[str, Timing]) -> dict[str, int | float | str | bool]:
    """The timer self-test as figures: measured ratio and interval per known ratio."""
    samples = aligned({name: [timing] for name, timing in timings.items()})
    found: dict[str, int | float | str | bool] = {}
    for known in ("1.00", "1.01", "1.04"):
        shown = verdict.compare(verdict.log_ratios(samples["base"], samples[known]), alpha=0.001, effect=0.0)
        found[f"{known} reads"] = round(shown.ratio or 0.0, 5)
        found[f"{known} low"] = round(shown.ratio_low, 5)
        found[f"{known} high"] = round(shown.ratio_high or 0.0, 5)
    return found


