"""What a path is: SelectionPath, its Parameters, its Evidence, and Candidate, a path with values filled in.

``run(query, key, value, selection, *, scale, workspace, **parameters) -> output`` does one thing: it reads no
environment, catches no exception, falls back to nothing, and reports itself with ``trace.executed`` from its innermost
function. ``workspace`` may be None: then scratch memory is plain allocations and reserves mean nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from ..problem import Mode, Operation, SelectionProblem
from ..selection import Selection
from ..trace import Notes, ParameterValue
from ..workspace import Workspace

Parameters = Mapping[str, ParameterValue]


class Parameter(msgspec.Struct, frozen=True):
    """One tunable: a finite ladder and the value taken where nobody chose, which stands on the ladder.

    ``reserve``: changes memory and re-allocations only, so it is swept by call sequence, not crossed with the rest.
    """

    name: str
    ladder: tuple[ParameterValue, ...]
    default: ParameterValue
    reserve: bool = False

    def fault(self, value: ParameterValue) -> str | None:
        """Why a value cannot be; None if it can. Numbers may leave the ladder, but not its kind or its sign."""
        if type(value) is not type(self.default):
            return f"{self.name}={value!r} is no {type(self.default).__name__}"
        if isinstance(value, str) and value not in self.ladder:
            return f"{self.name}={value!r} is none of {list(self.ladder)}"
        least = 0 if 0 in self.ladder else 1
        if not isinstance(value, (str, bool)) and value < least:
            return f"{self.name}={value!r} is below {least}"
        return None


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What a profiler must see of one call, and must not. Regular expressions, searched in operator and kernel names.

    ``required``: pattern -> exact number of launches, or 0 for "at least once". ``forbidden``: patterns never seen.
    ``shapes``: pattern -> the input shapes that operator must have been called with, in order of calls, each a tuple
    of input position and shape; None in a shape matches any size. Labels of the path's own making prove nothing.
    """

    required: dict[str, int]
    forbidden: tuple[str, ...] = ()
    shapes: dict[str, tuple[tuple[int, tuple[int | None, ...]], ...]] = {}


class Candidate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A path with its parameters filled in: what is checked, timed and picked."""

    path: str
    parameters: dict[str, ParameterValue] = {}

    @property
    def name(self) -> str:
        """``path(parameter=value, ...)``, in the parameters' order."""
        inner = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.path}({inner})" if inner else self.path


class PathRun(Protocol):
    """The call signature of a path's function."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selection: Selection,
        *,
        scale: float,
        workspace: Workspace | None,
        **parameters: ParameterValue,
    ) -> Tensor:
        """Query (B, S, G, h, Dk), key (B, G, T, Dk), value (B, G, T, Dv) -> output (B, S, G, h, Dv); N keys for T where
        the operation is compression. ``scale`` is above 0: dispatch moves any other into the query."""


class Bound(Protocol):
    """A path with parameters and scale filled in, for calls alike: same shapes but for T, strides, dtypes, devices,
    alignment, and no gradients. It reports itself as ``run`` does."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, selection: Selection) -> Tensor:
        """Shapes as in ``PathRun``; keys and values may go on behind the context."""


class PathBind(Protocol):
    """The call signature of a path's ``bind``."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selection: Selection,
        scale: float,
        parameters: dict[str, ParameterValue],
        out: Tensor,
        notes: Notes,
    ) -> Bound | None:
        """For calls like the one that has just given ``out``, as noted; None where they cannot be bound."""


class SelectionPath(msgspec.Struct, frozen=True, kw_only=True):
    """A way to run selection, or another of the three ``operations``.

    ``target``: ``"module:function"``, the module relative to this package or absolute; imported when first run, so
    listing paths needs neither its packages nor a GPU.
    ``tunables(problem, device)``: its Parameters there. ``unsupported(problem, device, parameters)``: None, or why not.
    ``evidence(problem, device, parameters, lengths)``: what one call must show; ``lengths`` are the rows' key counts.
    ``dispatchable``: may be chosen by a table; the oracle may not.
    ``bound``: ``"module:function"`` of a PathBind, for a path that needs no workspace; "" = none. It spares the host
    what is the same at every call.
    ``slow_to_build``: takes tens of seconds to compile on a CPU, so only ``--effort full`` tries it there.
    ``needs_complete``: runs complete selections only. ``reads_complete``: launches less for a dense prompt (see
    ``SelectionProblem.dense``) that is declared complete.
    """

    name: str
    target: str
    summary: str
    modes: tuple[Mode, ...]
    deterministic: bool
    tunables: Callable[[SelectionProblem, torch.device], tuple[Parameter, ...]]
    unsupported: Callable[[SelectionProblem, torch.device, Parameters], str | None]
    evidence: Callable[[SelectionProblem, torch.device, Parameters, Sequence[int]], Evidence]
    bound: str = ""
    operations: tuple[Operation, ...] = ("selection",)
    dispatchable: bool = True
    slow_to_build: bool = False
    needs_complete: bool = False
    reads_complete: bool = False

    def function(self) -> PathRun:
        """The path's run function, imported now."""
        function: PathRun = _imported(self.target)
        return function

    def bind(self) -> PathBind | None:
        """The path's bind function, imported now; None where it has none."""
        bind: PathBind | None = _imported(self.bound) if self.bound else None
        return bind

    def defaults(self, problem: SelectionProblem, device: torch.device) -> dict[str, ParameterValue]:
        """Every parameter at its default; none for a problem of another operation."""
        if problem.operation not in self.operations:
            return {}
        return {parameter.name: parameter.default for parameter in self.tunables(problem, device)}

    def unsupported_reason(self, problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
        """Why this path cannot run this problem with these parameters here; None if it can. Cheap, no side effects."""
        if problem.operation not in self.operations:
            return f"{self.name} is no path of {problem.operation}"
        if problem.mode not in self.modes:
            return f"{self.name} has no {problem.mode} mode"
        if self.needs_complete and not problem.complete:
            return f"{self.name} needs a selection that is declared complete"
        known = {parameter.name for parameter in self.tunables(problem, device)}
        if not known.issuperset(parameters):
            return f"{self.name} has no parameter {sorted(set(parameters) - known)}; it has {sorted(known)}"
        return self.unsupported(problem, device, parameters)


def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module, __package__), name)


def registered(name: str) -> SelectionPath:
    """The path of that name in PATHS, asked for when it is needed: for a path that hands rows to another.

    Paths never import one another, and PATHS imports every path; so the lookup stands here and happens late.
    """
    path: SelectionPath = importlib.import_module(__package__).PATHS[name]
    return path


def need_blocks(problem: SelectionProblem) -> str | None:
    """The reason of a blocks-only path for a ranges problem."""
    return None if problem.form == "blocks" else "needs blocks"


def capture_reason(problem: SelectionProblem, name: str) -> str | None:
    """The reason of a path whose launches depend on the selection's contents, under CUDA-graph capture."""
    return f"{name} reads row lengths on the host" if problem.execution == "graph" else None


CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**31}
"""Gathered key and value bytes per chunk that the default aims at: about the last-level cache, or 2 GiB on a GPU."""


def chunk_parameter(
    name: str, problem: SelectionProblem, device: torch.device, unit_bytes: int, units: int
) -> Parameter:
    """A ladder of how many units (rows, queries) go at once; 0 = all. Default: as many as fit CHUNK_BYTES."""
    ladder = [size for size in (64, 256, 1024, 4096, 16384, 65536) if size < units]
    fitting = [size for size in ladder if size * unit_bytes <= CHUNK_BYTES[device.type]]
    if units * unit_bytes <= CHUNK_BYTES[device.type]:
        default = 0
    else:
        default = fitting[-1] if fitting else ladder[0] if ladder else 0
    return Parameter(name, (0, *ladder), default)


def reserve_parameter(name: str, need: int) -> Parameter:
    """The ladder of a reserve: 0 (grow when needed), the need of a call at the default chunk, and the three powers of
    two above it."""
    above = 1 << need.bit_length()
    return Parameter(name, (0, need, above, 2 * above, 4 * above), 0, reserve=True)
