"""selection_attention: run one of the three operations by the path that was asked for, or by the table's choice.

A named path never falls back. ``path="auto"`` takes the table's choice; where that cannot run on this very call it goes
down a fixed chain, and every step is recorded, counted and warned about once. What a call needs to know is resolved
once per kind of call and remembered, so a repeated call costs a dictionary lookup.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import msgspec
import torch
from torch import Tensor

from .dispatch_table import MAX_REMEMBERED, DispatchTable, load_dispatch_table
from .errors import ArgumentError, UnsupportedPathError
from .opaque import opaque
from .paths import PATHS
from .paths.base import Bound
from .planning import Attempt, Attempts, Overrides, Strict, call_problem, plan_call
from .rows import tracked
from .selection import Selection
from .trace import Notes, ParameterValue, announce, noted, recording
from .workspace import Workspace


class DispatchWarning(UserWarning):
    """A choice could not run on a call and the chain was followed."""


class DispatchStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the process began: ``calls`` by "path (status)", ``steps`` down the chain by their text."""

    calls: dict[str, int]
    steps: dict[str, int]


_table: ContextVar[DispatchTable | None] = ContextVar("dispatch_table", default=None)
_default_tables: dict[str, DispatchTable] = {}
_forced_plans: dict[Any, _Kind] = {}
_calls: Counter[tuple[str, str]] = Counter()
_steps: Counter[str] = Counter()


def dispatch_stats() -> DispatchStats:
    """What dispatch has done in this process so far."""
    calls = {f"{path} ({status})": count for (path, status), count in _calls.items()}
    return DispatchStats(calls=calls, steps=dict(_steps))


@contextmanager
def use_dispatch_table(table: DispatchTable) -> Iterator[DispatchTable]:
    """Inside the ``with`` block, ``path="auto"`` consults ``table``."""
    token = _table.set(table)
    try:
        yield table
    finally:
        _table.reset(token)


def active_dispatch_table(kind: str) -> DispatchTable:
    """The table in force on a kind of device; the first call without a context loads it (see load_dispatch_table)."""
    table = _table.get() or _default_tables.get(kind)
    if table is None:
        table = _default_tables[kind] = load_dispatch_table(device=kind)
    return table


@opaque
def selection_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    path: str = "auto",
    parameters: Mapping[str, ParameterValue] | None = None,
    scale: float | None = None,
    workspace: Workspace | None = None,
    strict: Strict = False,
    table: DispatchTable | None = None,
    overrides: Overrides | None = None,
    prefer: str = "",
    avoid: str = "",
) -> Tensor:
    """Attention of each row over the union of its selected keys; shapes as in ``nsa.problem``.

    query (B, S, G, h, Dk), key (B, G, T, Dk), value (B, G, T, Dv), any strides -> (B, S, G, h, Dv) in value's dtype.
    ``selection``: also a window or compressed one, which ``window_attention`` and ``compressed_attention`` make.
    ``path``: a key of PATHS, or "auto". ``parameters``: of a named path; those left out take their defaults.
    ``scale``: None = Dk**-0.5. ``workspace``: buffers to reuse between calls that need no gradients.
    ``strict``: True makes every choice but an exact, bucket or forced one an error; "stale-ok" accepts stale ones too.
    ``table``: instead of the one in force. ``overrides``: path -> parameters that "auto" sets where it takes that path,
    such as reserves. ``prefer``: a path that "auto" takes before the table's choice wherever it can run; ``avoid``: one
    that it never takes. A row that selects nothing gives zeros.

    Raises ArgumentError (shapes, dtypes, devices), UnsupportedPathError (a named path, or the whole chain, cannot
    run), StrictDispatchError, ReserveError.

    Inside ``torch.compile`` it is one graph break: nothing of dispatch is traced, the path runs eagerly.
    """
    shape, device = query.shape, query.device
    kind = device.type
    capturing = kind == "cuda" and torch.cuda.is_current_stream_capturing()
    grad = tracked(query, key, value)
    scale = shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:  # fused kernels take the largest raw score for the largest scaled one, and mask by -inf * scale
        query, scale = (-query, -scale) if scale else (query * 0, 1.0)
    try:
        length = selection.context_length
    except AttributeError as error:
        made = "make it with Selection.from_blocks or Selection.from_ranges"
        raise ArgumentError(f"selection is a {type(selection).__name__}, expected a Selection; {made}") from error
    fixed = -1 if isinstance(length, Tensor) else length
    if isinstance(length, Tensor) and length.device.type == "cpu" and bool((length > key.shape[-2]).any()):
        raise ArgumentError(f"context_length {length.tolist()} exceeds the {key.shape[-2]} keys that were passed")
    chosen_table = None if path != "auto" else table or active_dispatch_table(kind)
    kinds: dict[Any, _Kind] = _forced_plans if chosen_table is None else chosen_table.plans  # type: ignore[attr-defined]
    layout = None
    if bindable := kind == "cuda" or "triton" in sys.modules:  # elsewhere nothing depends on layouts
        layout = selection.call_layout(query, key, value)
    call = (
        shape, key.shape, value.shape, layout,
        query.dtype, key.dtype, value.dtype, device, key.device, value.device,
        selection.signature, fixed, scale, grad, capturing, strict, prefer, avoid,
        path, tuple(parameters.items()) if parameters else None, repr(overrides) if overrides else None,
    )  # fmt: skip
    known = kinds.get(call)
    if known is not None and known.bound is not None and not torch.is_autocast_enabled(kind):
        try:
            return _run_bound(known, query, key, value, selection)
        except UnsupportedPathError:
            known.bound = None  # below the chain is followed, which says so
    if key.dim() == value.dim() == 4 and 0 <= fixed < key.shape[2]:
        key, value = key[:, :, :fixed], value[:, :, :fixed]
    if known is None:
        problem = call_problem(query, key, value, selection, grad=grad, capturing=capturing)
        plan = plan_call(problem, device, path, parameters, strict, chosen_table, overrides or {}, prefer, avoid)
        if len(kinds) >= MAX_REMEMBERED:
            kinds.clear()
        known = kinds[call] = _Kind(plan)
    if known.served > 1 or grad or capturing or not bindable:
        return _run(known.plan, kind, query, key, value, selection, scale, workspace)[0]
    notes = Notes()
    token = noted.set(notes if known.served else None)  # a kind of call that comes once is not worth binding
    try:
        out, ran = _run(known.plan, kind, query, key, value, selection, scale, workspace)
    finally:
        noted.reset(token)
    if ran is known.plan.first:
        known.served += 1
        bind = PATHS[ran.candidate.path].bind() if known.served > 1 else None
        if bind:
            known.bound = bind(query, key, value, selection, scale, ran.candidate.parameters, out, notes)
    return out


class _Kind:
    """What is remembered of a kind of call: its plan, how often (0 to 2) the first attempt served, that one bound."""

    __slots__ = ("bound", "plan", "served")

    def __init__(self, plan: Attempts) -> None:
        self.plan = plan
        self.served = 0
        self.bound: Bound | None = None


def _run_bound(known: _Kind, query: Tensor, key: Tensor, value: Tensor, selection: Selection) -> Tensor:
    attempt = known.plan.first
    if told := recording():
        announce(attempt.status, attempt.reason)
    try:
        out = known.bound(query, key, value, selection)  # type: ignore[misc]
    finally:
        if told:
            announce("direct", "")
    _count(attempt, attempt.status, ())
    return out


def _run(
    plan: Attempts,
    kind: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    workspace: Workspace | None,
) -> tuple[Tensor, Attempt]:
    """The output and the attempt that made it. Raises the last one's UnsupportedPathError where all do."""
    late: tuple[str, ...] = ()
    failed = UnsupportedPathError("a plan has at least one attempt")
    for attempt in plan:
        candidate = attempt.candidate
        status, reason = attempt.status, attempt.reason
        if late:
            status, reason = "default", "; ".join((*late, reason))
        announce(status, reason)
        try:
            with as_given(kind):
                out = attempt.function(
                    query, key, value, selection, scale=scale, workspace=workspace, **candidate.parameters
                )
        except UnsupportedPathError as error:
            failed = error
            late = tuple(dict.fromkeys((*late, f"{candidate.path}: {error}")))
            continue
        finally:
            announce("direct", "")  # a path that raised has not used up what was announced
        _count(attempt, status, late)
        return (out if out.dtype == value.dtype else out.to(value.dtype)), attempt  # the oracle computes in float64
    raise failed


def as_given(kind: str) -> AbstractContextManager[Any]:
    """A context in which autocast leaves a path's dtypes as the caller gave them."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _count(attempt: Attempt, status: str, late: tuple[str, ...]) -> None:
    _calls[attempt.candidate.path, status] += 1
    if attempt.steps or late:
        for step in (*attempt.steps, *late):
            _count_step(step)


def _count_step(step: str) -> None:
    _steps[step] += 1
    if _steps[step] == 1:
        warnings.warn(f"nsa dispatch went down its chain: {step}", DispatchWarning, stacklevel=6)
