"""Check: does a candidate compute selection attention? Against the float64 oracle, in the worker, before any clock.

Poisoned outputs and workspace, two calls in a row, reserves above and below the need, a call sequence that must not
grow twice, small inputs of every awkward kind, and gradients in ``train``. The bound is derived, never chosen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec
import torch
from torch import Tensor

from nsa.errors import ArgumentError
from nsa.paths import SelectionPath, reference
from nsa.problem import TORCH_DTYPES, SelectionProblem
from nsa.selection import Selection
from nsa.trace import ParameterValue
from nsa.workspace import Workspace
from tuner.inputs import Inputs

FULL_SCORES = 2**24
"""Up to this many scores every row is compared; beyond it spot rows are."""
SPOT_ROWS = 64
ORDERS = 4

Call = Callable[..., Tensor]


class WrongResult(Exception):
    """The result differs from the oracle, or the workspace contract was broken. Says where and by how much."""


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
        self.awkward: list[tuple[str, Inputs, Oracle]] | None = None
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

        workspace = self.new_workspace()
        with torch.no_grad():
            with filled_with_nan():
                error = self.oracle.compare(call(self.inputs, workspace), "first call, outputs poisoned")
            workspace.poison()
            error = max(error, self.oracle.compare(call(self.inputs, workspace), "second call, workspace poisoned"))
            if thorough:
                self._reserves(path, call)
                check_growth(call, self.inputs, self.new_workspace)
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
        """Reserve size never changes the output: one below the need, one above it, with a poisoned workspace."""
        reserves = [item for item in path.tunables(self.problem, self.inputs.query.device) if item.reserve]
        below = {item.name: max(1, int(item.ladder[1]) // 4) for item in reserves}
        above = {item.name: int(item.ladder[2]) for item in reserves}
        for label, chosen in (("below", below), ("above", above)) if reserves else ():
            workspace = self.new_workspace()
            for turn in ("first", "second"):
                out = call(self.inputs, workspace, **chosen)
                self.oracle.compare(out, f"reserve {label} the need {chosen}, {turn} call")
                workspace.poison()

    def _awkward(self, path: SelectionPath, parameters: Mapping[str, ParameterValue], call: Call) -> None:
        device = self.inputs.query.device
        if self.awkward is None:
            cases = awkward_inputs(self.problem, device)
            self.awkward = [(name, case, Oracle(case, self.scale)) for name, case in cases]
        for name, case, oracle in self.awkward:
            if path.unsupported_reason(problem_of(case, self.problem), device, parameters) is None:
                with filled_with_nan():
                    oracle.compare(call(case, self.new_workspace()), name)


class Oracle:
    """The float64 result of one call, on all rows or on spot rows, and the derived bound.

    The bound is the larger of twice the error that the same formula has in the working dtype and 4*eps*max|v|. That
    error is the largest over ORDERS orders of the sum over the head dim: one order alone may happen to be a lucky one,
    and in float64 the first is the oracle's own.
    """

    def __init__(self, inputs: Inputs, scale: float) -> None:
        batch, queries, groups, heads, _ = inputs.query.shape
        scores = batch * queries * groups * heads * inputs.key.shape[2]
        if scores <= FULL_SCORES:
            self.rows = torch.arange(queries)
        else:
            edges = torch.linspace(0, queries - 1, SPOT_ROWS // 2).long()
            self.rows = torch.unique(torch.cat((edges, torch.randint(0, queries, (SPOT_ROWS // 2,)))))
        self.rows = self.rows.to(inputs.query.device)
        part = selected_rows(inputs, self.rows)
        self.truth = reference.run(*part, scale=scale)
        floor = 4 * torch.finfo(inputs.query.dtype).eps * float(inputs.value.nan_to_num().abs().max())
        self.bound = max(2 * self._usual_error(part, scale), floor)
        if not self.bound < float("inf"):
            raise ArgumentError("the oracle's bound is not finite: the working dtype overflows on these inputs")
        self.shape = (batch, queries, groups, heads, inputs.value.shape[3])
        self.dtype = inputs.value.dtype

    def _usual_error(self, part: tuple[Tensor, Tensor, Tensor, Selection], scale: float) -> float:
        query, key, value, selection = part
        width, dtype = query.shape[-1], str(query.dtype).removeprefix("torch.")
        random = torch.Generator().manual_seed(0)
        worst = 0.0
        for order in (torch.randperm(width, generator=random).to(query.device) for _ in range(ORDERS)):
            eager = reference.run(
                query[..., order], key[..., order], value, selection, scale=scale, compute_dtype=dtype
            )
            worst = max(worst, float((eager.to(torch.float64) - self.truth).abs().max()))
        return worst

    def compare(self, out: Tensor, where: str) -> float:
        """The largest error. Raises WrongResult for another shape or dtype, what is not finite, or beyond the bound."""
        if tuple(out.shape) != self.shape or out.dtype != self.dtype:
            raise WrongResult(f"{where}: output is {out.dtype} {tuple(out.shape)}, expected {self.dtype} {self.shape}")
        finite = out.isfinite()
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise WrongResult(f"{where}: {bad} of {out.numel()} output elements are not finite (unwritten or NaN)")
        error = (out[:, self.rows].to(torch.float64) - self.truth).abs()
        worst = float(error.max())
        if not worst <= self.bound:
            place = tuple(int(index) for index in torch.unravel_index(error.argmax(), error.shape))
            raise WrongResult(
                f"{where}: off by {worst:.3g} at (b, row, g, head, d) {place}, derived bound {self.bound:.3g}"
            )
        return worst


def selected_rows(inputs: Inputs, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Selection]:
    """The same call for some of its query tokens only, their positions made explicit."""
    whole = inputs.selection
    batch, queries = inputs.query.shape[:2]
    if whole.query_positions is None:
        length = torch.as_tensor(whole.context_length, device=rows.device).expand(batch)
        positions = length[:, None] - queries + rows
    else:
        positions = whole.query_positions.expand(batch, queries)[:, rows]
    part = Selection(whole.indices[:, rows], whole.block_size, whole.context_length, positions)
    return inputs.query[:, rows], inputs.key, inputs.value, part


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
    grown = workspace.growths
    for case in (half, inputs, half, inputs):
        call(case, workspace)
    if workspace.growths > grown:
        raise WrongResult(
            f"the workspace grew {workspace.growths - grown} more times while shapes alternated that it had served"
        )


class GradientOracle:
    """Gradients of two layers that share keys, values and a workspace, in float64 and in the working dtype."""

    def __init__(self, inputs: Inputs, scale: float) -> None:
        self.inputs, self.scale = inputs, scale
        self.truth = self._of_reference("float64")
        self.usual = self._of_reference(str(inputs.query.dtype).removeprefix("torch."))

    def _of_reference(self, dtype: str) -> list[Tensor]:
        def run(case: Inputs, workspace: Workspace | None) -> Tensor:
            tensors = case.query, case.key, case.value
            return reference.run(*tensors, case.selection, scale=self.scale, compute_dtype=dtype)

        kind, case = TORCH_DTYPES[dtype], self.inputs
        cast = Inputs(case.query.to(kind), case.key.to(kind), case.value.to(kind), case.selection, None)
        return two_layers(run, cast, None)

    def compare(self, call: Call, workspace: Workspace) -> None:
        """Two steps with one workspace, poisoned in between. Raises WrongResult."""
        for step in ("first", "second"):
            gradients = two_layers(call, self.inputs, workspace)
            for name, found, want, usual in zip("qkv", gradients, self.truth, self.usual, strict=True):
                floor = 4 * torch.finfo(self.inputs.query.dtype).eps * float(want.abs().max())
                bound = max(2 * float((usual.double() - want).abs().max()), floor)
                error = float((found.double() - want).abs().max())
                if not error <= bound:
                    raise WrongResult(f"{step} step: gradient of {name} off by {error:.3g}, derived bound {bound:.3g}")
            workspace.poison()


def two_layers(run: Call, case: Inputs, workspace: Workspace | None) -> list[Tensor]:
    """Gradients with respect to query, key and value through two calls, the second reading the first one's output."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
    query, key, value = leaves
    width = query.shape[-1]
    out = run(Inputs(query, key, value, case.selection, None), workspace)
    mixed = torch.nn.functional.pad(out, (0, max(0, width - out.shape[-1])))[..., :width]
    again = run(Inputs(query + mixed, key, value, case.selection, None), workspace)
    weight = torch.linspace(-1, 1, again.shape[-1], device=again.device, dtype=again.dtype)
    return list(torch.autograd.grad((again * weight).sum(), leaves))


def awkward_inputs(problem: SelectionProblem, device: torch.device) -> Iterator[tuple[str, Inputs]]:
    """Small calls that break careless kernels, with the problem's heads, head dims, dtype, block size and topk."""
    p = problem
    dtype = TORCH_DTYPES[p.dtype]
    batch, groups, size = 2, 2, p.block_size or 8
    context = 3 * size + size // 2 + 1  # a tail block that is not full
    generator = torch.Generator().manual_seed(7)
    queries = 1 if p.mode == "decode" else 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = (
        normal(batch, queries, groups, p.h, p.Dk),
        normal(batch, groups, context, p.Dk),
        normal(batch, context, groups, p.Dv).transpose(1, 2),  # a strided view, as (B, T, H, D) models pass
    )
    k = torch.cat((k, k), -1)[..., : p.Dk]  # strided too
    count = -(-context // size)
    ragged = torch.randint(-1, count, (batch, queries, groups, p.topk), generator=generator, dtype=torch.int32)
    ragged[0, 0, 0] = -1  # an empty row
    ragged[-1, -1, -1] = count - 1  # duplicates, of the tail block
    if p.topk > 1:
        ragged[0, -1, 1, 1:] = -1

    def blocks(indices: Tensor) -> Selection:
        return Selection.from_blocks(indices.to(device), block_size=size, context_length=context)

    if p.form == "blocks":
        yield "ragged rows, duplicates, an empty row, a tail block", Inputs(q, k, v, blocks(ragged), None)
        yield "all rows empty", Inputs(q, k, v, blocks(torch.full_like(ragged, -1)), None)
        yield "tied scores", Inputs(q, torch.ones_like(k), v, blocks(ragged), None)
        yield "large magnitudes", Inputs(q * 3, k * 3, v * 30, blocks(ragged), None)
        lengths = torch.tensor([size + 1, context], device=device)
        first = Selection.from_blocks(ragged.to(device), block_size=size, context_length=lengths)
        if queries <= size + 1:
            unused = torch.arange(context, device=device) >= lengths[:, None]
            spoilt_k, spoilt_v = (
                tensor.clone().masked_fill_(unused[:, None, :, None], float("nan")) for tensor in (k, v)
            )
            case = Inputs(q, spoilt_k, spoilt_v, first, None)
            yield "different context lengths in one batch, NaN beyond them", case
    else:
        low = torch.randint(-2, context, (batch, queries, groups, p.topk), generator=generator)
        ranges = torch.stack((low, low + torch.randint(-3, size, low.shape, generator=generator)), -1)
        ranges[0, 0, 0] = 3
        ranges[-1, 0, 0, 0] = torch.tensor((2, 3))
        selection = Selection.from_ranges(ranges.to(device), context_length=context)
        yield "overlapping, inverted and empty ranges", Inputs(q, k, v, selection, None)


def problem_of(case: Inputs, like: SelectionProblem) -> SelectionProblem:
    """The problem that a call poses, mode and execution as in ``like``."""
    batch, queries, groups, heads, _ = case.query.shape
    changes = {"B": batch, "S": queries, "T": case.key.shape[2], "G": groups, "h": heads}
    changes["complete"] = case.selection.complete
    return msgspec.structs.replace(like, **changes)
