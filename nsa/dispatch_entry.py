"""DispatchEntry, one measured pick with its evidence, read strictly; Choice, what a lookup among them answers."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import torch

from .defaults import DEFAULT_PATHS
from .errors import DispatchTableError
from .paths import PATHS, Candidate
from .problem import SelectionProblem
from .trace import ParameterValue

Level = Literal["branch", "layer"]
Status = Literal["exact", "bucket", "interpolated", "extrapolated", "stale", "default", "forced"]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What a lookup answers: the candidate, how good the evidence is (``status``), whose table (``tier``), and why."""

    path: str
    parameters: dict[str, ParameterValue]
    status: Status
    tier: str
    entry: str = ""
    reason: str = ""
    tied: tuple[Candidate, ...] = ()


class DispatchEntry(SelectionProblem, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pick: the problem's fields by name, the candidate, and its evidence.

    ``ratio`` is time of the pick over time of the default, of the default over the runner-up where the default won;
    below 1 is faster. None where there was nothing to compare with. ``pattern`` names the selections measured on.
    ``default``: what the default was then, None in tables of version 1. ``level``: what was timed, the branch alone or
    the layer around it. ``hinted``: measured on calls that say that they are complete, of a path that then launches
    less; it serves calls that do not say so as ``extrapolated``.
    """

    path: str
    parameters: dict[str, ParameterValue]
    pattern: str = "scored"
    level: Level = "branch"
    hinted: bool = False
    default: Candidate | None = None
    pairs: int = 0
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    e_value: float | None = None
    tied: tuple[Candidate, ...] = ()
    runner_up: Candidate | None = None
    median_us: float
    peak_bytes: int
    oracle_error: float
    oracle_bound: float
    kernels: tuple[str, ...]
    run_id: str
    date: str

    def __post_init__(self) -> None:
        super().__post_init__()
        named = [(self.path, self.parameters), *((other.path, other.parameters) for other in self.tied)]
        named += [(other.path, other.parameters) for other in (self.runner_up, self.default) if other]
        for name, parameters in named:
            path = PATHS.get(name)
            if path is None or not path.dispatchable:
                names = sorted(known.name for known in PATHS.values() if known.dispatchable)
                raise DispatchTableError(f"unknown path {name!r}; this version has {names}")
            if self.operation not in path.operations:
                raise DispatchTableError(f"path {name!r} is no path of {self.operation}")
            items = [item for kind in ("cpu", "cuda") for item in path_tunables(name, self.problem(), kind)]
            unknown = set(parameters) - {item.name for item in items}
            if unknown:
                raise DispatchTableError(f"path {name!r} has no parameter {sorted(unknown)}")
            for parameter, value in parameters.items():
                faults = [item.fault(value) for item in items if item.name == parameter]
                if all(faults):
                    raise DispatchTableError(f"path {name!r}: {faults[0]}")
        numbers = {"ratio": self.ratio, "median_us": self.median_us, "oracle_bound": self.oracle_bound}
        for label, number in numbers.items():
            if number is not None and not number > 0:
                raise DispatchTableError(f"{label} must be above 0, got {number}")
        if self.pairs < 0 or self.peak_bytes < 0:
            raise DispatchTableError(f"pairs and peak_bytes must be 0 or more, got {self.pairs}, {self.peak_bytes}")

    def problem(self) -> SelectionProblem:
        """The problem alone, as lookups ask for it."""
        return SelectionProblem(**{name: getattr(self, name) for name in SelectionProblem.__struct_fields__})

    @property
    def certified(self) -> bool:
        """Whether the pick is faster than what it is compared with, by its interval; else it is a tie."""
        return self.ratio_high is not None and self.ratio_high < 1

    def default_failed(self, kind: str) -> bool:
        """Whether, on a kind of device, it is compared with what stood in for the default: with none of its paths."""
        defaults = DEFAULT_PATHS[self.operation][kind, self.mode]
        return self.level == "branch" and self.default is not None and self.default.path not in defaults


def path_tunables(path: str, problem: SelectionProblem, kind: str) -> tuple[Any, ...]:
    """The Parameters of a path for a problem on a kind of device."""
    return PATHS[path].tunables(problem, torch.device(kind))
