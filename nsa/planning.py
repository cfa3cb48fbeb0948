"""Planning: which candidates may serve a call, in order, and why. Resolved once per kind of call, then remembered.

A named path is the only attempt. Otherwise the table's choice comes first, then what it tied with, then the operation's
chain; what cannot run on the call is left out and becomes a step. ``nsa.dispatch`` runs the attempts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from .device import device_identity
from .dispatch_entry import Choice
from .dispatch_table import DispatchTable
from .errors import ArgumentError, DispatchTableError, StrictDispatchError, UnsupportedPathError
from .paths import PATHS, Candidate
from .paths.base import PathRun
from .problem import DTYPE_NAMES, CacheState, Operation, SelectionProblem
from .selection import Selection
from .trace import ParameterValue

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


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One runnable way to serve a call, and the steps down the chain that led to it."""

    candidate: Candidate
    function: PathRun
    status: str
    reason: str
    steps: tuple[str, ...]


class Attempts:
    """Attempts in order. All but the ``first`` are worked out when the first has failed, which is rare."""

    __slots__ = ("_make", "_rest", "first")

    def __init__(self, make: Callable[[], Iterator[Attempt]]) -> None:
        self._make = make
        self._rest: tuple[Attempt, ...] | None = None
        self.first = next(make())

    def __iter__(self) -> Iterator[Attempt]:
        yield self.first
        if self._rest is None:
            self._rest = tuple(self._make())[1:]
        yield from self._rest


def plan_call(
    problem: SelectionProblem,
    device: torch.device,
    path: str,
    parameters: Mapping[str, ParameterValue] | None,
    strict: Strict,
    table: DispatchTable | None,
    overrides: Overrides,
    prefer: str,
    avoid: str,
) -> Attempts:
    if table is None:
        forced = _forced(problem, device, path, parameters)
        return Attempts(lambda: iter((forced,)))
    if strict not in (False, True, "stale-ok"):
        raise ArgumentError(f"strict is {strict!r}, expected False, True or 'stale-ok'")
    if parameters:
        raise ArgumentError("parameters belong to a named path; got path='auto', whose parameters the table chooses")
    here = device_identity(device.type)
    if table.device.slug != here.slug:
        raise DispatchTableError(f"the dispatch table is for {table.device.slug}, the call is on {here.slug}")
    wanted, steps = _preferred(problem, device, prefer) if prefer else (None, ())
    if wanted:
        return Attempts(lambda: iter((wanted,)))
    choice = table.lookup(problem)
    if avoid:
        choice = _without(problem, device, choice, avoid)
    accepted = {"exact", "bucket"} | ({"stale"} if strict == "stale-ok" else set())
    if strict and choice.status not in accepted:
        raise StrictDispatchError(
            f"strict dispatch: the choice {choice.path} is {choice.status!r} ({choice.reason}); expected one of "
            f"{sorted(accepted)}; measure this problem with 'nsa-tune sweep'"
        )
    return Attempts(
        lambda: _chain(
            problem, device, choice, () if strict else _others(problem, device, choice, avoid), overrides, steps
        )
    )


def _preferred(problem: SelectionProblem, device: torch.device, path: str) -> tuple[Attempt | None, tuple[str, ...]]:
    """The preferred path, or the step that it cannot run."""
    try:
        return _forced(problem, device, path, None), ()
    except UnsupportedPathError as error:
        return None, (f"{path}: {error}",)


def _others(problem: SelectionProblem, device: torch.device, choice: Choice, avoid: str) -> Iterator[Candidate]:
    """What may serve in place of the choice, in order: what it tied with, then the chain; never ``avoid``."""
    yield from (candidate for candidate in choice.tied if candidate.path != avoid)
    for name in CHAINS[problem.operation]:
        if name != avoid:
            yield Candidate(path=name, parameters=PATHS[name].defaults(problem, device))


def _without(problem: SelectionProblem, device: torch.device, choice: Choice, avoid: str) -> Choice:
    """The choice where ``avoid`` is disallowed: itself, else the first of the others. Raises UnsupportedPathError, and
    ArgumentError for a path that nobody knows."""
    if avoid not in PATHS:
        raise ArgumentError(f"unknown path {avoid!r} to avoid; expected one of {sorted(PATHS)}")
    changes: dict[str, Any] = {"reason": f"{avoid} is disallowed; {choice.reason}"}
    if choice.path == avoid:
        other = next(_others(problem, device, choice, avoid), None)
        if other is None:
            raise UnsupportedPathError(f"{changes['reason']}, and {problem.operation} has no other path in its chain")
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
    others: Iterable[Candidate],
    overrides: Overrides,
    steps: tuple[str, ...],
) -> Iterator[Attempt]:
    """The choice and the others, as far as they can run. Raises UnsupportedPathError where none can."""
    first = Candidate(path=choice.path, parameters=choice.parameters)
    none = True
    for wanted in chain((first,), others):
        known = PATHS[wanted.path]
        parameters = {**wanted.parameters, **overrides.get(wanted.path, {})}
        candidate = Candidate(path=wanted.path, parameters=parameters)
        reason = known.unsupported_reason(problem, device, candidate.parameters)
        if reason is not None:
            steps = tuple(dict.fromkeys((*steps, f"{candidate.path}: unsupported: {reason}")))
            continue
        status, why = ("default", "; ".join(steps)) if wanted is not first else (choice.status, choice.reason)
        why = "; ".join((*steps, why)) if wanted is first else why
        none = False
        yield Attempt(candidate=candidate, function=known.function(), status=status, reason=why, steps=steps)
    if none:
        raise UnsupportedPathError("; ".join(steps))


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
    if query.device.type not in DEPLOYED_CACHE:
        raise ArgumentError(f"query is on {query.device}, expected one of {sorted(DEPLOYED_CACHE)}")
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
