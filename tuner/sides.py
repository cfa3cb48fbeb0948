"""Sides: one tree's ``nsa`` inside a worker, as calls on shared inputs, and the bench that checks it before any clock.

The measuring code is the running tool's, the same for both sides: inputs, oracle, checks and attestation. Selection,
Workspace, table, dispatch and paths are the tree's own. Worker side.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from nsa.errors import UnsupportedPathError
from nsa.paths import Candidate, SelectionPath
from nsa.paths.base import PathRun
from nsa.problem import Operation, SelectionProblem
from nsa.selection import Selection
from nsa.trace import ParameterValue
from tuner.attest import FellBack, attest_replay
from tuner.bench import Bench, captured
from tuner.compare_record import AUTO, Facts, Scenario, Side
from tuner.inputs import Inputs
from tuner.trees import Tree, load_package
from tuner.trial import Assessment, Trial

Call = Callable[[], Any]


class LoadTrial(msgspec.Struct, frozen=True, kw_only=True):
    """Only load a tree's nsa: does it import?"""

    tree: Tree

    def open_bench(self, _about: Callable[[str], None], _memory_limit_bytes: int) -> LoadedBench:
        """In the worker."""
        return LoadedBench(self)


class SideTrial(msgspec.Struct, frozen=True, kw_only=True):
    """Check one side in one scenario."""

    tree: Tree
    side: Side
    scenario: Scenario
    device: str

    def open_bench(self, about: Callable[[str], None], memory_limit_bytes: int) -> SideBench:
        """In the worker."""
        return SideBench(self, about, memory_limit_bytes)


class LoadedBench:
    """Holds nothing; that it could be made says that the tree imports."""

    def __init__(self, trial: LoadTrial) -> None:
        load_package(trial.tree, "nsa_loaded")

    def prepared(self) -> None:
        """Nothing to tell."""


class LoadedSide:
    """A tree's nsa under the name of its side, with the tree's own dispatch table in force."""

    def __init__(self, tree: Tree, side: Side, device: torch.device) -> None:
        self.side, self.device = side, device
        self.package: Any = load_package(tree, f"nsa_{side}")
        self.table, self.scope = self._own_table(tree), ExitStack()
        self.scope.enter_context(self.package.use_dispatch_table(self.table))

    def _own_table(self, tree: Tree) -> Any:
        """The table that the tree packages for this device, or an empty one. Never the user's: both would share it."""
        device = importlib.import_module(f"{self.package.__name__}.device")
        identity = device.device_identity(self.device.type)
        file = Path(tree.folder) / "nsa" / "dispatch_tables" / f"{identity.slug}.json"
        if file.exists():
            return self.package.load_dispatch_table(file, device=self.device.type)
        return self.package.DispatchTable(device=identity, software=device.software_identity())

    def selection(self, whole: Selection) -> Any:
        """The same selection as this side's own type. Raises UnsupportedPathError where it knows no such operation."""
        kind, given = self.package.Selection, whole.structure
        if given is None:
            return same_fields(whole, kind, dataclasses.fields)
        self._must_know(given.operation)
        if given.operation == "window":
            return kind.window(given.window, rows=given.rows, context_length=given.context, device=given.device)
        return kind.compressed(
            given.kernel_size, given.kernel_stride, rows=given.rows, first_position=given.first_position,
            device=given.device,
        )  # fmt: skip

    def _must_know(self, operation: Operation) -> None:
        if operation != "selection" and not hasattr(self.package.SelectionProblem, "operation"):
            raise UnsupportedPathError(f"this side dispatches selection alone, not {operation}")

    def problem(self, problem: SelectionProblem) -> Any:
        """The same problem as this side's own type. Raises UnsupportedPathError where it knows no such operation."""
        self._must_know(problem.operation)
        return same_fields(problem, self.package.SelectionProblem, msgspec.structs.fields)

    def runner(self, path: str) -> Callable[..., Tensor]:
        """What a user calls for "auto", the path's own function otherwise; takes this side's selection."""
        if path == AUTO:
            select: Callable[..., Tensor] = self.package.selection_attention
            return select
        function: Callable[..., Tensor] = self.package.PATHS[path].function()
        return function

    def defaults(self, scenario: Scenario) -> dict[str, ParameterValue]:
        """The parameters of a scenario's path; none for "auto"."""
        if scenario.path == AUTO:
            return {}
        found: dict[str, ParameterValue] = self.package.PATHS[scenario.path].defaults(
            self.problem(scenario.problem), self.device
        )
        return found

    def call(self, scenario: Scenario, case: Inputs, path: str, parameters: Mapping[str, ParameterValue]) -> Call:
        """A call ready to be timed, on inputs that all sides share (leaves in ``train``); captured for "graph"."""
        run, selection, workspace = self.runner(path), self.selection(case.selection), self.package.Workspace()
        scale = case.query.shape[-1] ** -0.5
        leaves = (case.query, case.key, case.value)

        def forward() -> Tensor:
            with torch.no_grad():
                return run(*leaves, selection, scale=scale, workspace=workspace, **parameters)

        def step() -> Tensor:
            out = run(*leaves, selection, scale=scale, workspace=workspace, **parameters)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
            return out.detach()

        call = step if scenario.problem.mode == "train" else forward
        return captured(call) if scenario.problem.execution == "graph" else call


def same_fields(value: Any, kind: Any, fields: Callable[[Any], Sequence[Any]]) -> Any:
    """A ``kind`` with the fields of ``value`` that it has; an older tree may know fewer."""
    return kind(**{field.name: getattr(value, field.name) for field in fields(kind) if hasattr(value, field.name)})


class SidePath(SelectionPath, frozen=True, kw_only=True):
    """A path of a side as one of the running tool's: the checks hand it the tool's problems and selections."""

    side: Any
    runs: str

    def function(self) -> PathRun:
        """The side's run function, its selection turned into the side's own."""
        run = self.side.runner(self.runs)

        def call(query: Tensor, key: Tensor, value: Tensor, selection: Selection, **rest: Any) -> Tensor:
            out: Tensor = run(query, key, value, self.side.selection(selection), **rest)
            return out

        return call


def side_path(side: LoadedSide, name: str) -> SidePath:
    """A path of a side by name."""
    own = side.package.PATHS[name]
    return SidePath(
        name=name, target="", summary="", modes=own.modes, deterministic=own.deterministic, side=side, runs=name,
        operations=getattr(own, "operations", ("selection",)),
        tunables=lambda problem, device: own.tunables(side.problem(problem), device),
        unsupported=lambda problem, device, chosen: own.unsupported_reason(side.problem(problem), device, chosen),
        evidence=lambda problem, device, chosen, keys: own.evidence(side.problem(problem), device, chosen, keys),
    )  # fmt: skip


def dispatched_path(side: LoadedSide, choice: Any) -> SidePath:
    """What dispatch makes of a problem: runs everything, and must show the evidence of what its table chose."""
    chosen = side_path(side, choice.path)
    return msgspec.structs.replace(
        chosen, name=AUTO, runs=AUTO, tunables=lambda *_: (), unsupported=lambda *_: None,
        evidence=lambda problem, device, _, keys: chosen.evidence(problem, device, choice.parameters, keys),
    )  # fmt: skip


class SideBench(Bench):
    """One side's checks of one scenario, in a process of its own."""

    def __init__(self, trial: SideTrial, about: Callable[[str], None], memory_limit_bytes: int) -> None:
        scenario = trial.scenario
        super().__init__(
            Trial(problem=scenario.problem, pattern=scenario.pattern, seed=0, device=trial.device),
            about, memory_limit_bytes,
        )  # fmt: skip
        self.scenario, self.loaded = scenario, LoadedSide(trial.tree, trial.side, self.device)
        self.paths = {name: side_path(self.loaded, name) for name in self.loaded.package.PATHS}

    def _workspace(self) -> Any:
        return self.loaded.package.Workspace(memory_limit_bytes=self.memory_limit_bytes or None)

    def facts(self) -> Facts:
        """Outcome, and what ran. "auto" is checked as the path it chose, thoroughly, and again as dispatched."""
        scenario, status = self.scenario, "named"
        if scenario.path != AUTO:
            if scenario.path not in self.paths:
                return Facts(outcome="unsupported", reason=f"this side has no path {scenario.path!r}")
            candidate = Candidate(path=scenario.path, parameters=self.loaded.defaults(scenario))
            return facts_of(self.assess(candidate, True), candidate, status)
        chosen = self._chosen()
        candidate, status = Candidate(path=chosen.path, parameters=chosen.parameters), chosen.status
        found = self.assess(candidate, True)
        if found.outcome == "ok" and scenario.problem.execution == "graph":
            self._hold_replay(found)
        elif found.outcome == "ok":
            self.paths[AUTO] = dispatched_path(self.loaded, chosen)
            found = self.assess(Candidate(path=AUTO), False)
        return facts_of(found, candidate, status)

    def _hold_replay(self, found: Assessment) -> None:
        """A dispatched call's replay launches the choice's kernels and is right. Called eagerly it is another problem,
        for which the table may choose another path. Raises FellBack, WrongResult."""
        assert self.checker is not None, "assess made it"
        call = self.loaded.call(self.scenario, self.inputs, AUTO, {})
        attest_replay(call, set(found.gpu_kernels))
        self.checker.oracle.compare(call(), "the replay of a dispatched call")

    def _chosen(self) -> Any:
        """What executed for this very call. Raises FellBack where that is not what the side's table chooses."""
        case = leaves_of(self.inputs) if self.scenario.problem.mode == "train" else self.inputs
        with self.loaded.package.record_paths() as recorder:
            self.loaded.call(self.scenario, case, AUTO, {})()
        choice = self.loaded.table.lookup(self.loaded.problem(self.scenario.problem))
        if not recorder.executed:
            raise FellBack(f"the table chooses {choice.path}; what ran did not report itself as a path of this side")
        ran = recorder.executed[-1]
        if ran.path != choice.path:
            raise FellBack(f"the table chooses {choice.path}, {ran.path} ran ({ran.status}: {ran.reason})")
        return ran


def leaves_of(case: Inputs) -> Inputs:
    """The same inputs, requiring gradients."""
    query, key, value = (part.detach().clone().requires_grad_() for part in (case.query, case.key, case.value))
    return Inputs(query, key, value, case.selection, case.union)


def facts_of(found: Assessment, candidate: Candidate, status: str) -> Facts:
    """What the gate keeps of an assessment."""
    return Facts(
        outcome=found.outcome, reason=found.reason, path=candidate.path, parameters=candidate.parameters,
        status=status, oracle_error=found.oracle_error, oracle_bound=found.oracle_bound, peak_bytes=found.peak_bytes,
        workspace_bytes=found.workspace_bytes, growths=found.growths,
    )  # fmt: skip
