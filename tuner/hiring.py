"""Hiring: what the gate asks of a worker before any clock is read: does a tree import, is a scenario right there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from tuner.compare_record import Facts, Question, Scenario, Side
from tuner.sides import LoadTrial, SideTrial
from tuner.trees import DoesNotImport, Tree
from tuner.worker import CandidateFailed, Worker, WorkerDied

TIMEOUT_S = 180.0


class Asks(Protocol):
    """``tuner.worker.Worker``, or what a test puts in its place."""

    doing: str

    def ask(self, verb: str, argument: Any = None, *, timeout_s: float) -> Any:
        """Send a request and wait."""

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""

    def close(self) -> None:
        """End it."""


Hire = Callable[[], Asks]
"""Starts a worker; tests put one in the same process there."""


def hire_for(question: Question) -> Hire:
    """Real processes, with the question's device and memory limit."""
    return lambda: Worker(question.device, memory_limit_bytes=question.memory_limit_bytes)


class DeviceError(ValueError):
    """The device that was asked for is not there."""


def identify(worker: Asks, device: str) -> tuple[Any, Any, Any]:
    """Device, software and clocks as a worker sees them. Raises DeviceError."""
    try:
        found: tuple[Any, Any, Any] = worker.ask("identify", timeout_s=TIMEOUT_S)
    except (CandidateFailed, WorkerDied) as error:
        raise DeviceError(f"device {device!r} cannot be used here: {error.reason}; use --device cpu") from error
    return found


def must_import(worker: Asks, tree: Tree) -> None:
    """Raises DoesNotImport where the tree's nsa does not import, or is not one that can be measured."""
    try:
        worker.ask("prepare", LoadTrial(tree=tree), timeout_s=TIMEOUT_S)
    except (CandidateFailed, WorkerDied) as error:
        raise DoesNotImport(f"{tree.asked} ({tree.label}) does not import: {error.reason}") from error


def facts_in(worker: Asks, question: Question, side: Side, tree: Tree, scenario: Scenario) -> Facts:
    """One side's facts of one scenario from a worker; what fails in there is its outcome."""
    trial = SideTrial(tree=tree, side=side, scenario=scenario, device=question.device)
    try:
        worker.ask("prepare", trial, timeout_s=TIMEOUT_S)
        facts: Facts = worker.ask("facts", (), timeout_s=TIMEOUT_S)
    except (CandidateFailed, WorkerDied) as error:
        return Facts(outcome=error.outcome, reason=error.reason)
    limit = question.memory_limit_bytes
    if limit and facts.peak_bytes and facts.peak_bytes > limit:
        why = f"one call held {facts.peak_bytes} bytes, the limit is {limit}"
        return msgspec.structs.replace(facts, outcome="oom", reason=why)
    return facts
