"""Session: drive a worker through problems. Failures inside become assessments, dead workers are replaced.

It stands between ``tuner.search`` (what to measure) and ``tuner.worker`` (where it runs), and keeps no records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

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


class Session:
    """One worker at a time on one device. ``hold`` a trial, then ``assess`` and ``time`` its candidates."""

    def __init__(self, device: str, *, memory_limit_bytes: int = 0, timeout_s: float = TIMEOUT_S) -> None:
        self.device, self.memory_limit_bytes, self.timeout_s = device, memory_limit_bytes, timeout_s
        self.worker: Worker | None = None
        self.trial: Trial | None = None
        self.held = False
        self.union: float | None = None
        self.assessed: dict[str, Assessment] = {}

    def close(self) -> None:
        """End the worker."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def ask(self, verb: str, argument: Any = None) -> Any:
        """Ask the worker, starting a new one where the last is gone. Raises CandidateFailed, WorkerDied."""
        if self.worker is None or not self.worker.alive:
            self.close()
            self.worker = Worker(self.device, memory_limit_bytes=self.memory_limit_bytes)
            self.held = False
            self.assessed = {name: found for name, found in self.assessed.items() if found.outcome != "ok"}
        if self.trial is not None and not self.held and verb not in ("identify", "self_test", "prepare"):
            self.union = self.worker.ask("prepare", self.trial, timeout_s=self.timeout_s)
            self.held = True
        return self.worker.ask(verb, argument, timeout_s=self.timeout_s)

    def hold(self, trial: Trial) -> None:
        """Turn to a problem; its inputs are made when first needed."""
        if trial != self.trial:
            self.trial, self.held, self.union, self.assessed = trial, False, None, {}

    def assess(self, candidate: Candidate, *, thorough: bool) -> Assessment:
        """Build, check and attest, once per problem and worker; a failure is the assessment."""
        known = self.assessed.get(candidate.name)
        if known is not None and self.worker is not None and self.worker.alive:
            return known
        try:
            found: Assessment = self.ask("assess", (candidate, thorough))
        except (CandidateFailed, WorkerDied) as error:
            found = Assessment(outcome=error.outcome, reason=error.reason)
        limit = self.memory_limit_bytes
        if limit and found.peak_bytes and found.peak_bytes > limit:
            why = f"one call held {found.peak_bytes} bytes, the limit is {limit}"
            found = Assessment(outcome="oom", reason=why)
        self.assessed[candidate.name] = found
        return found

    def release(self, keep: Sequence[Candidate]) -> None:
        """Let the worker forget what it holds of all other candidates."""
        names = tuple(set(self.assessed) - {candidate.name for candidate in keep})
        if names and self.held and self.worker is not None and self.worker.alive:
            self.ask("release", (names,))
            for name in names:
                if self.assessed[name].outcome == "ok":
                    del self.assessed[name]

    def time(
        self,
        candidates: Sequence[Candidate],
        *,
        count: int,
        batch: int,
        first: int,
        budget_s: float,
        settled: Callable[[dict[str, dict[int, float]]], bool] = lambda _: False,
    ) -> Timed:
        """``count`` shared rounds in batches, fewer where ``settled`` or out of time; at least one.

        A candidate that fails or kills the worker is left out with its outcome and the others start over.
        """
        ready, failed = list(candidates), dict[str, Assessment]()
        done, began = Timed({}, failed), time.monotonic()
        taken = 0
        while ready and taken < count:
            left = budget_s - (time.monotonic() - began)
            if taken and left <= 0:
                break
            request = Rounds(
                candidates=tuple(ready), count=min(batch, count - taken), first=first + taken,
                seed=first + taken, sample_us=SAMPLE_US, budget_s=max(0.0, left),
            )  # fmt: skip
            try:
                timings: dict[str, Timing] = self.ask("rounds", (request,))
            except (CandidateFailed, WorkerDied) as error:
                ready = self._without(ready, error, failed)
                done, taken = Timed({}, failed), 0
                continue
            for name, timing in timings.items():
                done.timings.setdefault(name, []).append(timing)
            taken += request.count
            if settled(done.rounds()):
                break
        return done

    def _without(
        self, ready: list[Candidate], error: CandidateFailed | WorkerDied, failed: dict[str, Assessment]
    ) -> list[Candidate]:
        about = error.about if isinstance(error, WorkerDied) else self.worker.doing if self.worker else ""
        culprit = next((candidate for candidate in ready if candidate.name == about), ready[-1])
        failure = Assessment(outcome=error.outcome, reason=f"while timed: {error.reason}")
        failed[culprit.name] = self.assessed[culprit.name] = failure
        rest = [candidate for candidate in ready if candidate is not culprit]
        return [candidate for candidate in rest if self.assess(candidate, thorough=False).outcome == "ok"]

    def call_sequence(self, candidate: Candidate, contexts: tuple[int, ...]) -> SequenceResult | Assessment:
        """The candidate along a sequence of contexts with one workspace; a failure is an assessment."""
        assessment = self.assess(candidate, thorough=False)
        if assessment.outcome != "ok":
            return assessment
        try:
            result: SequenceResult = self.ask("sequence", (Calls(candidate=candidate, contexts=contexts),))
        except (CandidateFailed, WorkerDied) as error:
            return Assessment(outcome=error.outcome, reason=error.reason)
        return result


def next_round(records: Sequence[Record]) -> int:
    """A round number that no record has used."""
    return 1 + max((sample.round for record in records for sample in record.samples), default=-1)
