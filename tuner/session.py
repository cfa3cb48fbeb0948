"""Session: drive two workers through problems, one that proves and one that times. Failures become assessments.

A process that has been profiled is no longer timed (see ``bench.Bench.build``); dead workers are replaced. It stands
between ``tuner.search`` (what to measure) and ``tuner.worker`` (where it runs), and keeps no records.
"""

from __future__ import annotations

import os
import queue
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import msgspec
import torch

from nsa.paths import Candidate
from tuner.record import Record
from tuner.rounds import by_round
from tuner.trial import Assessment, Rounds, SequenceResult, Timing, Trial
from tuner.trial import Sequence as Calls
from tuner.worker import CandidateFailed, Worker, WorkerDied

SAMPLE_US = 2000.0
"""Aimed length of one sample; a slower call makes a sample of its own."""
TIMEOUT_S = 120.0
"""After that long without an answer a request counts as a hang."""


LEAST_S = 20.0
"""A shoot-out that could not prove anything is given that long beyond its budget."""


class Timed(msgspec.Struct, frozen=True):
    """Shared rounds of the candidates that survived them, and the failures of those that did not."""

    timings: dict[str, list[Timing]]
    failed: dict[str, Assessment]

    def rounds(self) -> dict[str, dict[int, float]]:
        """Candidate name -> round -> microseconds."""
        return {
            name: by_round(sample for timing in timings for sample in timing.samples)
            for name, timings in self.timings.items()
        }


class Seat:
    """A place for one worker at a time, and which trial the worker in it holds."""

    def __init__(self, device: str, memory_limit_bytes: int) -> None:
        self.device, self.memory_limit_bytes = device, memory_limit_bytes
        self.worker: Worker | None = None
        self.held: Trial | None = None
        self.union: float | None = None

    @property
    def alive(self) -> bool:
        """Whether a worker sits here that can answer."""
        return self.worker is not None and self.worker.alive

    def ask(self, verb: str, argument: Any, trial: Trial | None, timeout_s: float) -> Any:
        """Ask the worker, a new one where the last is gone, about a trial. Raises CandidateFailed, WorkerDied."""
        if self.worker is None or not self.worker.alive:
            self.close()
            self.worker = Worker(self.device, memory_limit_bytes=self.memory_limit_bytes)
        if trial is not None and self.held != trial:
            self.held = None
            self.union = self.worker.ask("prepare", trial, timeout_s=timeout_s)
            self.held = trial
        return self.worker.ask(verb, argument, timeout_s=timeout_s)

    def forget(self, timeout_s: float) -> None:
        """Let the worker drop what it holds, and its memory; one that cannot is ended."""
        if self.alive and self.held is not None:
            assert self.worker is not None
            try:
                self.worker.ask("forget", timeout_s=timeout_s)
            except (CandidateFailed, WorkerDied):
                self.close()
            self.held = None

    def close(self) -> None:
        """End the worker."""
        if self.worker is not None:
            self.worker.close()
        self.worker, self.held = None, None


def provers_on(device: str) -> int:
    """Workers that prove side by side: on a GPU all cores but one, since most of a proof is compiling; on a CPU one."""
    if torch.device(device).type != "cuda":
        return 1
    return max(1, min(8, len(os.sched_getaffinity(0)) - 1))


class Session:
    """One problem at a time on one device. ``hold`` a trial, then ``assess`` and ``time`` its candidates."""

    def __init__(
        self, device: str, *, memory_limit_bytes: int = 0, timeout_s: float = TIMEOUT_S, provers: int | None = None
    ) -> None:
        self.memory_limit_bytes, self.timeout_s = memory_limit_bytes, timeout_s
        self.provers = [Seat(device, memory_limit_bytes) for _ in range(provers or provers_on(device))]
        self.prover, self.timer = self.provers[0], Seat(device, memory_limit_bytes)
        self.trial: Trial | None = None
        self.assessed: dict[str, Assessment] = {}
        self.built: set[str] = set()

    @property
    def union(self) -> float | None:
        """Overlap of the selections that the trial at hand is measured on."""
        return self.prover.union

    def close(self) -> None:
        """End all workers."""
        for seat in (*self.provers, self.timer):
            seat.close()

    def ask(self, verb: str, argument: Any = None) -> Any:
        """Ask the timing worker something that needs no trial."""
        return self.timer.ask(verb, argument, None, self.timeout_s)

    def hold(self, trial: Trial) -> None:
        """Turn to a problem; its inputs are made when first needed."""
        if trial != self.trial:
            self.trial, self.assessed, self.built = trial, {}, set()

    def assess(self, candidate: Candidate, *, thorough: bool) -> Assessment:
        """Prove a candidate in the one worker and build it in the other; a failure is the assessment."""
        if not self.timer.alive:
            self.built.clear()
        known = self.assessed.get(candidate.name)
        if known is not None and (known.outcome != "ok" or candidate.name in self.built):
            return known
        found = known or self._within_limit(self._prove(self.prover, candidate, thorough))
        if found.outcome == "ok":
            try:
                self.timer.ask("build", (candidate,), self.trial, self.timeout_s)
                self.built.add(candidate.name)
            except (CandidateFailed, WorkerDied) as error:
                found = Assessment(outcome=error.outcome, reason=error.reason)
        self.assessed[candidate.name] = found
        return found

    def prove(
        self, candidates: Sequence[Candidate], until: float, *, thorough: bool, begun: Callable[[Candidate], None]
    ) -> list[Candidate]:
        """Prove candidates, side by side where compiling and checking them can be spread over provers.

        Returns those that now have an assessment, in order: all but what had not begun at ``until`` (monotonic
        seconds), of which still the first of each path is taken. Who ran out of memory beside others is proven alone.
        """
        if self.timer.held != self.trial:
            self.timer.forget(self.timeout_s)  # what it held of the last problem may be what is wanting
        first = {candidate.path: candidate.name for candidate in reversed(candidates)}
        seats: queue.SimpleQueue[Seat] = queue.SimpleQueue()
        for seat in self.provers if thorough else self.provers[:1]:
            seats.put(seat)

        def one(candidate: Candidate) -> Assessment | None:
            if candidate.name in self.assessed:
                return self.assessed[candidate.name]
            seat = seats.get()
            try:
                if time.monotonic() > until and candidate.name != first[candidate.path]:
                    return None
                begun(candidate)
                return self._prove(seat, candidate, thorough)
            finally:
                seats.put(seat)

        with ThreadPoolExecutor(seats.qsize()) as pool:
            found = list(pool.map(one, candidates))
        for other in self.provers[1:]:
            other.forget(self.timeout_s)
        proven = [(candidate, known) for candidate, known in zip(candidates, found, strict=True) if known is not None]
        shared = seats.qsize() > 1 or self.timer.held is not None
        for candidate, known in proven:
            fresh = candidate.name not in self.assessed
            in_time = time.monotonic() <= until or candidate.name == first[candidate.path]
            if known.outcome == "oom" and fresh and shared and in_time:
                self.timer.forget(self.timeout_s)
                self.built.clear()
                begun(candidate)
                known = self._prove(self.prover, candidate, thorough)
            self.assessed[candidate.name] = self._within_limit(known)
        return [candidate for candidate, _ in proven]

    def _prove(self, seat: Seat, candidate: Candidate, thorough: bool) -> Assessment:
        try:
            return cast(Assessment, seat.ask("assess", (candidate, thorough), self.trial, self.timeout_s))
        except (CandidateFailed, WorkerDied) as error:
            return Assessment(outcome=error.outcome, reason=error.reason)

    def _within_limit(self, found: Assessment) -> Assessment:
        limit = self.memory_limit_bytes
        if limit and found.peak_bytes and found.peak_bytes > limit:
            return Assessment(outcome="oom", reason=f"one call held {found.peak_bytes} bytes, the limit is {limit}")
        return found

    def release(self, keep: Sequence[Candidate]) -> None:
        """Let the timing worker forget what it holds of all other candidates."""
        names = tuple(self.built - {candidate.name for candidate in keep})
        if names and self.timer.alive:
            self.timer.ask("release", (names,), self.trial, self.timeout_s)
            self.built.difference_update(names)

    def time(
        self,
        candidates: Sequence[Candidate],
        *,
        count: int,
        batch: int,
        first: int,
        budget_s: float,
        least: int = 1,
        settled: Callable[[dict[str, dict[int, float]]], bool] = lambda _: False,
    ) -> Timed:
        """``count`` shared rounds in batches, fewer where ``settled`` or out of time; ``least`` are made all the same
        as long as they do not take LEAST_S.

        A candidate that fails or kills the worker is left out with its outcome and the others start over.
        """
        failed: dict[str, Assessment] = {}
        ready = self._built(candidates, failed)
        done, began = Timed({}, failed), time.monotonic()
        taken = 0
        while ready and taken < count:
            spent = time.monotonic() - began
            left = max(budget_s, LEAST_S if taken < least else 0.0) - spent
            if taken and left <= 0:
                break
            request = Rounds(
                candidates=tuple(ready), count=min(batch, count - taken), first=first + taken,
                seed=secrets.randbits(63), sample_us=SAMPLE_US, budget_s=max(0.0, left),
            )  # fmt: skip
            try:
                timings: dict[str, Timing] = self.timer.ask("rounds", (request,), self.trial, self.timeout_s)
            except (CandidateFailed, WorkerDied) as error:
                ready = self._without(ready, error, failed)
                done, taken = Timed({}, failed), 0
                continue
            for name, timing in timings.items():
                done.timings.setdefault(name, []).append(timing)
            taken += request.count
            if settled(done.rounds()):
                break
        for candidate in [candidate for candidate in ready if candidate.name in done.timings]:
            self._recheck(candidate, done)
        return done

    def _built(self, candidates: Sequence[Candidate], failed: dict[str, Assessment]) -> list[Candidate]:
        """Those that the timing worker holds: a failure in building one may have ended the worker that held others."""
        ready = list(candidates)
        while not self.timer.alive or any(candidate.name not in self.built for candidate in ready):
            for candidate in ready:
                if (found := self.assess(candidate, thorough=False)).outcome != "ok":
                    failed[candidate.name] = found
            ready = [candidate for candidate in ready if candidate.name not in failed]
            if not ready:
                break
        return ready

    def _recheck(self, candidate: Candidate, done: Timed) -> None:
        """A candidate whose timed call gives something else after its rounds than before has no time."""
        try:
            self.timer.ask("recheck", (candidate,), self.trial, self.timeout_s)
        except (CandidateFailed, WorkerDied) as error:
            failure = Assessment(outcome=error.outcome, reason=f"after its rounds: {error.reason}")
            done.failed[candidate.name] = self.assessed[candidate.name] = failure
            del done.timings[candidate.name]

    def _without(
        self, ready: list[Candidate], error: CandidateFailed | WorkerDied, failed: dict[str, Assessment]
    ) -> list[Candidate]:
        about = error.about if isinstance(error, WorkerDied) else self.timer.worker.doing if self.timer.worker else ""
        culprit = next((candidate for candidate in ready if candidate.name == about), ready[-1])
        failure = Assessment(outcome=error.outcome, reason=f"while timed: {error.reason}")
        failed[culprit.name] = self.assessed[culprit.name] = failure
        return self._built([candidate for candidate in ready if candidate is not culprit], failed)

    def call_sequence(self, candidate: Candidate, contexts: tuple[int, ...]) -> SequenceResult | Assessment:
        """The candidate along a sequence of contexts with one workspace; a failure is an assessment."""
        assessment = self.assess(candidate, thorough=False)
        if assessment.outcome != "ok":
            return assessment
        try:
            request = (Calls(candidate=candidate, contexts=contexts),)
            result: SequenceResult = self.timer.ask("sequence", request, self.trial, self.timeout_s)
        except (CandidateFailed, WorkerDied) as error:
            return Assessment(outcome=error.outcome, reason=error.reason)
        return result


def next_round(records: Sequence[Record]) -> int:
    """A round number that no record has used."""
    return 1 + max((sample.round for record in records for sample in record.samples), default=-1)
