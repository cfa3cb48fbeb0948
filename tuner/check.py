"""Check: does a candidate compute its operation? Against the float64 oracle, in the worker, before any clock.

Poisoned outputs and workspace, two calls in a row, reserves above and below the need, a call sequence that must not
grow twice, small inputs of every awkward kind, and gradients in ``train``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor

from nsa.paths import SelectionPath
from nsa.problem import SelectionProblem
from nsa.trace import ParameterValue
from nsa.workspace import Workspace
from tuner.awkward import WITH_GRADIENTS, awkward_inputs, other_contents, problem_of
from tuner.gradient_oracle import EXP_ERROR, GradientOracle
from tuner.inputs import Inputs
from tuner.oracle import Call, Oracle, WrongResult

ADDITION_ERROR = 2.0**-24
"""Relative, of one addition in float32, in which weights are summed."""
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's precision of float32 products": (
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    ),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "flash SDPA": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "memory-efficient SDPA": (
        torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp
    ),
    "math SDPA": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "cuDNN SDPA": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
}  # fmt: skip
"""Of the process, name -> how to read and to set it."""


class Checked(msgspec.Struct, frozen=True):
    """Largest error seen and the bound it stayed below, for the problem's own inputs."""

    error: float
    bound: float


class Checker:
    """The checks of one problem; oracles are computed once and serve every candidate."""

    def __init__(
        self, problem: SelectionProblem, inputs: Inputs, new_workspace: Callable[[], Workspace] = Workspace
    ) -> None:
        self.problem, self.inputs, self.new_workspace = problem, inputs, new_workspace
        self.scale = problem.Dk**-0.5
        self.oracle = Oracle(inputs, self.scale)
        self.other: Oracle | None = None
        self.awkward: list[tuple[str, Inputs, Oracle, GradientOracle | None]] | None = None
        self.gradients: GradientOracle | None = None

    def check(self, path: SelectionPath, parameters: Mapping[str, ParameterValue], *, thorough: bool) -> Checked:
        """Check a candidate. ``thorough`` adds what does not depend on the context: reserves, growth, awkward inputs.

        Raises WrongResult; whatever the path raises passes through.
        """
        run = path.function()

        def call(case: Inputs, workspace: Workspace | None, **changes: ParameterValue) -> Tensor:
            return run(
                case.query, case.key, case.value, case.selection,
                scale=self.scale, workspace=workspace, **{**parameters, **changes},
            )  # fmt: skip

        with settings_kept():
            return self._checked(path, parameters, call, thorough=thorough)

    def _checked(
        self, path: SelectionPath, parameters: Mapping[str, ParameterValue], call: Call, *, thorough: bool
    ) -> Checked:
        workspace = self.new_workspace()
        with torch.no_grad():
            with filled_with_nan():
                first = call(self.inputs, workspace)
            error = self.oracle.compare(first, "first call, outputs poisoned")
            with other_contents(self.problem, self.inputs):
                added = EXP_ERROR + self.problem.row_width * ADDITION_ERROR
                self.other = self.other or Oracle(self.inputs, self.scale, weight_error=added)
                self.other.compare(call(self.inputs, workspace), "the same tensors with other contents")
            self.oracle.compare(first, "the first call's output, after another call")
            workspace.poison()
            error = max(error, self.oracle.compare(call(self.inputs, workspace), "second call, workspace poisoned"))
            if thorough:
                self._reserves(path, call)
                check_growth(call, self.inputs, self.new_workspace)
        if thorough:
            self._awkward(path, parameters, call)
        if self.problem.mode == "train":
            self.gradients = self.gradients or GradientOracle(self.inputs, self.scale)
            self.gradients.compare(call, self.new_workspace())
        return Checked(error, self.oracle.bound)

    def check_once(self, path: SelectionPath, parameters: Mapping[str, ParameterValue]) -> Checked:
        """One call against the oracle. Raises WrongResult."""
        case = self.inputs
        with torch.no_grad():
            out = path.function()(
                case.query, case.key, case.value, case.selection,
                scale=self.scale, workspace=self.new_workspace(), **parameters,
            )  # fmt: skip
        return Checked(self.oracle.compare(out, "the process that is timed"), self.oracle.bound)

    def _reserves(self, path: SelectionPath, call: Call) -> None:
        """Reserve size never changes the output: one below the need, one above it, with a poisoned workspace.

        At the default chunk of rows, for whose need the reserves' ladders are made.
        """
        items = path.tunables(self.problem, self.inputs.query.device)
        reserves = [item for item in items if item.reserve]
        chunk = {item.name: item.default for item in items if item.name == "row_chunk"}
        below = {item.name: max(1, int(item.ladder[1]) // 4) for item in reserves} | chunk
        above = {item.name: int(item.ladder[2]) for item in reserves} | chunk
        for label, chosen in (("below", below), ("above", above)) if reserves else ():
            workspace = self.new_workspace()
            for turn in ("first", "second"):
                out = call(self.inputs, workspace, **chosen)
                self.oracle.compare(out, f"reserve {label} the need {chosen}, {turn} call")
                workspace.poison()

    def _awkward(self, path: SelectionPath, parameters: Mapping[str, ParameterValue], call: Call) -> None:
        device, train = self.inputs.query.device, self.problem.mode == "train"
        if self.awkward is None:
            cases = awkward_inputs(self.problem, device)
            self.awkward = [
                (
                    name,
                    case,
                    Oracle(case, self.scale),
                    GradientOracle(case, self.scale) if train and name in WITH_GRADIENTS else None,
                )
                for name, case in cases
            ]
        for name, case, oracle, gradients in self.awkward:
            if path.unsupported_reason(problem_of(case, self.problem), device, parameters) is None:
                with filled_with_nan(), torch.no_grad(), unchanged(case, name):
                    oracle.compare(call(case, self.new_workspace()), name)
                if gradients is not None:
                    gradients.compare(call, self.new_workspace(), f"{name}, ", frozen=True)


@contextmanager
def settings_kept() -> Iterator[None]:
    """Raises WrongResult where one of SETTINGS is another at the end: what runs after it in this process, other
    candidates and the oracle among them, would run by it. It is put back."""
    before = {name: read() for name, (read, _) in SETTINGS.items()}
    try:
        yield
    finally:
        after = {name: read() for name, (read, _) in SETTINGS.items()}
        for name, (_, write) in SETTINGS.items():
            if after[name] != before[name]:
                write(before[name])
    for name, value in before.items():
        if after[name] != value:
            raise WrongResult(f"the path leaves {name} at {after[name]}, it was {value}")


@contextmanager
def unchanged(case: Inputs, where: str) -> Iterator[None]:
    """Raises WrongResult where the inputs' bits are others at the end."""
    tensors = {"query": case.query, "key": case.key, "value": case.value}
    if case.selection.structure is None:
        tensors["indices"] = case.selection.indices
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    yield
    for name, tensor in tensors.items():
        if not torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) or not torch.equal(
            tensor.isnan(), before[name].isnan()
        ):
            raise WrongResult(f"{where}: the call changed its {name}")


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """Inside, torch fills memory that nobody has written with NaN (deterministic mode, warnings only)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_growth(call: Call, inputs: Inputs, new_workspace: Callable[[], Workspace] = Workspace) -> None:
    """A workspace that has served a shape serves it again without growing, whatever came between."""
    if inputs.key.shape[2] < 2 or not inputs.selection.block_size:
        return
    workspace = new_workspace()
    half = inputs.at(max(1, inputs.key.shape[2] // 2))
    call(inputs, workspace)
    call(half, workspace)  # may need what the whole call did not: a copy of queries that are no longer contiguous
    grown = workspace.growths
    for case in (inputs, half, inputs):
        call(case, workspace)
    if workspace.growths > grown:
        raise WrongResult(
            f"the workspace grew {workspace.growths - grown} more times while shapes alternated that it had served"
        )
