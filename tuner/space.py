"""Space: which candidates a sweep tries for a family, and how much effort goes into them. It runs nothing."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch

from nsa.paths import Candidate, Parameter, SelectionPath
from nsa.problem import SelectionProblem
from tuner.ledger import Space
from tuner.record import Value
from tuner.sweep import Family, SweepDefinition


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """How much to spend. ``repeats``: of reserve sequences. ``patience``: scales how long a request may take."""

    name: str
    pairs: int
    whole_ladders: bool
    slow_builds: bool
    repeats: int
    patience: float


EFFORTS = {
    "quick": Effort(name="quick", pairs=60, whole_ladders=False, slow_builds=False, repeats=1, patience=1.0),
    "full": Effort(name="full", pairs=200, whole_ladders=True, slow_builds=True, repeats=10, patience=4.0),
}


def space_of(
    sweep: SweepDefinition, effort: Effort, paths: Mapping[str, SelectionPath], family: Family, device: str
) -> tuple[Space, dict[str, str]]:
    """Path -> parameters to cross, reserves left out, and path -> why it is not in. Ladders at the largest context."""
    problem, target = family.problems[-1], torch.device(device)
    space: dict[str, tuple[Parameter, ...]] = {}
    left_out: dict[str, str] = {}
    for name in sweep.paths:
        path = paths[name]
        if problem.operation not in path.operations:
            continue
        reason = unsupported_at_defaults(path, problem, target)
        if reason is None and path.slow_to_build and target.type == "cpu" and not effort.slow_builds:
            reason = "takes tens of seconds to compile on a CPU; run with --effort full"
        if reason is not None:
            left_out[name] = reason
            continue
        ladders = {} if effort.whole_ladders else sweep.ladders.get(name, {})
        items = [item for item in path.tunables(problem, target) if not item.reserve]
        space[name] = tuple(narrowed(item, ladders.get(item.name)) for item in items)
    return space, left_out


def unsupported_at_defaults(path: SelectionPath, problem: SelectionProblem, device: torch.device) -> str | None:
    """Why a path cannot run a problem on a device, or nothing can; None if it can."""
    if problem.execution == "graph" and device.type == "cpu":
        return "execution graph replays a CUDA graph, which needs a GPU"
    return path.unsupported_reason(problem, device, path.defaults(problem, device))


def narrowed(item: Parameter, ladder: tuple[Value, ...] | None) -> Parameter:
    """A parameter on the part of its ladder that the sweep names; its default stays where it can.

    Values that the path does not offer for this problem (a chunk of more rows than there are) drop out.
    """
    kept = tuple(value for value in item.ladder if ladder is None or value in ladder) or (item.default,)
    return Parameter(item.name, kept, item.default if item.default in kept else kept[0])


def reserve_rungs(path: SelectionPath, problem: SelectionProblem, device: torch.device) -> list[Candidate]:
    """The path at its defaults with its reserves at the first rung of their ladders, the second, and so on."""
    if problem.operation not in path.operations:
        return []
    items = [item for item in path.tunables(problem, device) if item.reserve]
    defaults = path.defaults(problem, device)
    if not items or unsupported_at_defaults(path, problem, device):
        return []
    rungs = range(max(len(item.ladder) for item in items))
    chosen = ({item.name: item.ladder[min(rung, len(item.ladder) - 1)] for item in items} for rung in rungs)
    return [Candidate(path=path.name, parameters={**defaults, **reserves}) for reserves in chosen]
