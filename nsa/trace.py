"""Leaf. What really executed: each path's innermost function reports here, dispatch says why it was chosen.

Labels in here are convenience for callers, not proof; proof is the kernels a profiler saw (tuner.attest).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import msgspec

ParameterValue = int | float | str | bool


class ExecutionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One execution. ``status`` and ``reason`` are those of the Choice; ``direct`` when no dispatch was involved."""

    operation: str
    path: str
    parameters: dict[str, ParameterValue]
    status: str
    reason: str


class PathRecorder:
    """Collects executions in order; see ``record_paths``."""

    def __init__(self) -> None:
        self.executed: list[ExecutionRecord] = []


_recorders: ContextVar[tuple[PathRecorder, ...]] = ContextVar("recorders", default=())
_why: ContextVar[tuple[str, str]] = ContextVar("why", default=("direct", ""))


@contextmanager
def as_part() -> Iterator[None]:
    """Inside, what executes is part of a path that reports itself, and is not reported."""
    token = _recorders.set(())
    try:
        yield
    finally:
        _recorders.reset(token)


@contextmanager
def record_paths() -> Iterator[PathRecorder]:
    """Yield an object whose ``.executed`` lists an ExecutionRecord per execution inside the ``with`` block."""
    recorder = PathRecorder()
    token = _recorders.set((*_recorders.get(), recorder))
    try:
        yield recorder
    finally:
        _recorders.reset(token)


class Notes:
    """What one run of a path did: its launches, as the kernels' launcher appends them, and what it reported."""

    __slots__ = ("launches", "reported")

    def __init__(self) -> None:
        self.launches: list[tuple[Any, int, tuple[Any, ...]]] = []
        self.reported: tuple[str, str, Mapping[str, ParameterValue]] | None = None


noted: ContextVar[Notes | None] = ContextVar("noted", default=None)
"""Where a run is noted down, if it is."""


def recording() -> bool:
    """Whether anybody records."""
    return bool(_recorders.get())


def announce(status: str, reason: str) -> None:
    """Called by dispatch before it runs a path: the status and reason that the next execution carries."""
    if recording():
        _why.set((status, reason))


def executed(operation: str, path: str, parameters: Mapping[str, ParameterValue]) -> None:
    """Called by the innermost function of a path, after its work was launched."""
    if (notes := noted.get()) is not None:
        notes.reported = operation, path, parameters
    recorders = _recorders.get()
    if not recorders:
        return
    status, reason = _why.get()
    _why.set(("direct", ""))
    record = ExecutionRecord(operation=operation, path=path, parameters=dict(parameters), status=status, reason=reason)
    for recorder in recorders:
        recorder.executed.append(record)
