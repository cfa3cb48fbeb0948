"""selection_attention: run one of the three operations by the path that was asked for, or by the table's choice.

A named path never falls back. ``path="auto"`` takes the table's choice; where that cannot run on this very call it goes
down a fixed chain, and every step is recorded, counted and warned about once. What a call needs to know is resolved
once per kind of call and remembered, so a repeated call costs a dictionary lookup.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from .device import device_identity
from .dispatch_table import MAX_REMEMBERED, Choice, DispatchTable, load_dispatch_table
from .errors import ArgumentError, DispatchTableError, StrictDispatchError, UnsupportedPathError
from .opaque import opaque
from .paths import PATHS, Candidate
from .paths.base import PathRun
from .problem import DTYPE_NAMES, CacheState, Operation, SelectionProblem
from .selection import Selection
from .trace import ParameterValue, announce
from .workspace import Workspace

CHAINS: dict[Operation, tuple[str, ...]] = {
    "selection": ("varlen", "dense", "packed"),
    "window": ("sdpa_window",),
    "compression": ("sdpa_compressed",),
}
"""Where the choice and its tied set cannot run."""

DEPLOYED_CACHE: dict[str, CacheState] = {"cpu": "hot", "cuda": "cold"}
"""The L2 state a call is looked up under: between two calls of a layer the other layers have used a GPU's cache."""

Strict = Literal["stale-ok"] | bool
Overrides = Mapping[str, Mapping[str, ParameterValue]]


class DispatchWarning(UserWarning):
    """A choice could not run on a call and the chain was followed."""


class DispatchStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the process began: ``calls`` by "path (status)", ``steps`` down the chain by their text."""

    calls: dict[str, int]
    steps: dict[str, int]


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One runnable way to serve a call, and the steps down the chain that led to it."""

    candidate: Candidate
    function: PathRun
    status: str
    reason: str
    steps: tuple[str, ...]


_table: ContextVar[DispatchTable | None] = ContextVar("dispatch_table", default=None)
_default_tables: dict[str, DispatchTable] = {}
_forced_plans: dict[Any, tuple[Attempt, ...]] = {}
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
    forced = path != "auto"
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    length = selection.context_length
    if isinstance(length, int) and key.dim() == value.dim() == 4 and length < key.shape[2]:
        key, value = key[:, :, :length], value[:, :, :length]
    if isinstance(length, Tensor) and length.device.type == "cpu" and bool((length > key.shape[-2]).any()):
        raise ArgumentError(f"context_length {length.tolist()} exceeds the {key.shape[-2]} keys that were passed")
    chosen_table = None if forced else table or active_dispatch_table(query.device.type)
    plans: dict[Any, tuple[Attempt, ...]] = _forced_plans if chosen_table is None else chosen_table.plans  # type: ignore[attr-defined]
    call = (
        *(query.shape, key.shape, value.shape, selection.signature, prefer, avoid),
        *(query.dtype, key.dtype, value.dtype, query.device, key.device, value.device),
        *(grad, capturing, strict, length if isinstance(length, int) else -1),
        *(path, tuple(parameters.items()) if parameters else None, repr(overrides) if overrides else None),
    )
    plan = plans.get(call)
    if plan is None:
        problem = call_problem(query, key, value, selection, grad=grad, capturing=capturing)
        plan = _plan(problem, query.device, path, parameters, strict, chosen_table, overrides or {}, prefer, avoid)
        if len(plans) >= MAX_REMEMBERED:
            plans.clear()
        plans[call] = plan
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _run(plan, query, key, value, selection, scale, workspace)


def _run(
    plan: tuple[Attempt, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    workspace: Workspace | None,
) -> Tensor:
    late: tuple[str, ...] = ()
    for attempt in plan:
        candidate = attempt.candidate
        status, reason = attempt.status, attempt.reason
        if late:
            status, reason = "default", "; ".join((*late, reason))
        announce(status, reason)
        try:
            with as_given(query.device.type):
                out = attempt.function(
                    query, key, value, selection, scale=scale, workspace=workspace, **candidate.parameters
                )
        except UnsupportedPathError as error:
            if attempt is plan[-1]:
                raise
            late = tuple(dict.fromkeys((*late, f"{candidate.path}: {error}")))
            continue
        finally:
            announce("direct", "")  # a path that raised has not used up what was announced
        _calls[candidate.path, status] += 1
        for step in (*attempt.steps, *late):
            _count_step(step)
        return out if out.dtype == value.dtype else out.to(value.dtype)  # the oracle computes in float64
    raise AssertionError("a plan has at least one attempt")


def as_given(kind: str) -> AbstractContextManager[Any]:
    """A context in which autocast leaves a path's dtypes as the caller gave them."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _count_step(step: str) -> None:
    _steps[step] += 1
    if _steps[step] == 1:
        warnings.warn(f"nsa dispatch went down its chain: {step}", DispatchWarning, stacklevel=4)


def _plan(
    problem: SelectionProblem,
    device: torch.device,
    path: str,
    parameters: Mapping[str, ParameterValue] | None,
    strict: Strict,
    table: DispatchTable | None,
    overrides: Overrides,
    prefer: str,
    avoid: str,
) -> tuple[Attempt, ...]:
    if table is None:
        return (_forced(problem, device, path, parameters),)
    if parameters:
        raise ArgumentError("parameters belong to a named path; got path='auto', whose parameters the table chooses")
    here = device_identity(device.type)
    if table.device.slug != here.slug:
        raise DispatchTableError(f"the dispatch table is for {table.device.slug}, the call is on {here.slug}")
    wanted, steps = _preferred(problem, device, prefer) if prefer else (None, ())
    if wanted:
        return (wanted,)
    choice = table.lookup(problem)
    if avoid:
        choice = _without(problem, device, choice, avoid)
    accepted = {"exact", "bucket"} | ({"stale"} if strict == "stale-ok" else set())
    if strict and choice.status not in accepted:
        raise StrictDispatchError(
            f"strict dispatch: the choice {choice.path} is {choice.status!r} ({choice.reason}); expected one of "
            f"{sorted(accepted)}; measure this problem with 'nsa-tune sweep'"
        )
    return _chain(problem, device, choice, bool(strict), overrides, steps)


def _preferred(problem: SelectionProblem, device: torch.device, path: str) -> tuple[Attempt | None, tuple[str, ...]]:
    """The preferred path, or the step that it cannot run."""
    try:
        return _forced(problem, device, path, None), ()
    except UnsupportedPathError as error:
        return None, (f"{path}: {error}",)


def _without(problem: SelectionProblem, device: torch.device, choice: Choice, avoid: str) -> Choice:
    """The choice where ``avoid`` is disallowed: itself, else the first tied that is another path, else the default."""
    reason = f"{avoid} is disallowed; {choice.reason}"
    tied = tuple(candidate for candidate in choice.tied if candidate.path != avoid)
    changes: dict[str, Any] = {"reason": reason, "tied": tied}
    if choice.path == avoid:
        names = CHAINS[problem.operation]
        rest = (Candidate(path=name, parameters=PATHS[name].defaults(problem, device)) for name in names)
        other = next(candidate for candidate in (*tied, *rest) if candidate.path != avoid)
        changes |= {"path": other.path, "parameters": other.parameters, "status": "default"}
    return msgspec.structs.replace(choice, **changes)


def _forced(
    problem: SelectionProblem, device: torch.device, path: str, parameters: Mapping[str, ParameterValue] | None
) -> Attempt:
    if path not in PATHS:
        raise ArgumentError(f"unknown path {path!r}; expected 'auto' or one of {sorted(PATHS)}")
    known = PATHS[path]
    filled = {**known.defaults(problem, device), **(parameters or {})}
    reason = known.unsupported_reason(problem, device, filled)
    if reason is not None:
        raise UnsupportedPathError(reason)
    faults = [item.fault(filled[item.name]) for item in known.tunables(problem, device)]
    if any(faults):
        raise ArgumentError(f"path {path!r}: {', '.join(fault for fault in faults if fault)}")
    candidate = Candidate(path=path, parameters=filled)
    return Attempt(candidate=candidate, function=known.function(), status="forced", reason="named", steps=())


def _chain(
    problem: SelectionProblem,
    device: torch.device,
    choice: Choice,
    strict: bool,
    overrides: Overrides,
    steps: tuple[str, ...],
) -> tuple[Attempt, ...]:
    first = Candidate(path=choice.path, parameters=choice.parameters)
    chain = CHAINS[problem.operation]
    rest = (Candidate(path=name, parameters=PATHS[name].defaults(problem, device)) for name in chain)
    attempts: list[Attempt] = []
    for wanted in (first,) if strict else (first, *choice.tied, *rest):
        known = PATHS[wanted.path]
        parameters = {**wanted.parameters, **overrides.get(wanted.path, {})}
        candidate = Candidate(path=wanted.path, parameters=parameters)
        reason = known.unsupported_reason(problem, device, candidate.parameters)
        if reason is not None:
            steps = tuple(dict.fromkeys((*steps, f"{candidate.path}: unsupported: {reason}")))
            continue
        status, why = ("default", "; ".join(steps)) if wanted is not first else (choice.status, choice.reason)
        why = "; ".join((*steps, why)) if wanted is first else why
        attempts.append(Attempt(candidate=candidate, function=known.function(), status=status, reason=why, steps=steps))
    if not attempts:
        raise UnsupportedPathError("; ".join(steps))
    return tuple(attempts)


def call_problem(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, grad: bool, capturing: bool
) -> SelectionProblem:
    """The problem of a call. Raises ArgumentError where shapes, dtypes or devices disagree."""
    if query.dim() != 5 or key.dim() != 4 or value.dim() != 4:
        raise ArgumentError(
            "expected query (B, S, G, h, Dk), key (B, G, T, Dk), value (B, G, T, Dv); got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    batch, queries, groups, heads, width = query.shape
    keys = key.shape[2]
    expected = ((batch, groups, keys, width), (batch, groups, keys, value.shape[3]), (batch, queries, groups))
    got = (tuple(key.shape), tuple(value.shape), selection.rows)
    for name, want, have in zip(("key", "value", "selection rows"), expected, got, strict=True):
        if want != have:
            raise ArgumentError(f"{name} has shape {have}, expected {want} from query {tuple(query.shape)}")
    if len({query.dtype, key.dtype, value.dtype}) > 1 or query.dtype not in DTYPE_NAMES:
        raise ArgumentError(
            f"query, key and value must share one of {list(DTYPE_NAMES)}; got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    devices = {query.device, key.device, value.device, selection.device}
    if len(devices) > 1:
        raise ArgumentError(f"query, key, value and selection are on {sorted(map(str, devices))}; move them to one")
    length = selection.context_length
    if isinstance(length, int) and length > keys:
        raise ArgumentError(f"the selection's context_length {length} exceeds the {keys} keys that were passed")
    fields: dict[str, Any] = {
        "mode": "train" if grad else "decode" if queries == 1 else "prefill",
        "dtype": DTYPE_NAMES[query.dtype],
        **dict(zip(("B", "S", "G", "h", "Dk"), (batch, queries, groups, heads, width), strict=True)),
        **{"T": keys, "Dv": value.shape[3], "cache": DEPLOYED_CACHE[query.device.type]},
        "execution": "graph" if capturing else "eager",
    }
    return SelectionProblem(**{**fields, **selection.problem_fields})
