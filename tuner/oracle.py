"""Oracle: what a call must give, in float64, and by how much it may differ. The bound is derived, never chosen.

It reads what the caller of a path passed: blocks, ranges and positions, or the integers of a window or compression,
whose ranges it writes from the definition. ``tuner.check`` asks it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsa.errors import ArgumentError
from nsa.paths import reference
from nsa.problem import TORCH_DTYPES
from nsa.selection import Selection, Structure
from nsa.workspace import Workspace
from tuner.inputs import Inputs

FULL_SCORES = 2**24
"""Up to this many scores every row is compared; beyond it spot rows are."""
SPOT_ROWS = 64
FULL_GRADIENT_SCORES, GRADIENT_SCORES, LEAST_GRADIENT_ROWS = 2**25, 2**26, 32
"""As above, for gradients: beyond the first, spot rows of the second; autograd keeps a dozen float64 copies of them."""
ORDERS = 4
EXP_ERROR = 2.0**-20
"""Relative error of the least exact exponential in use: torch's SDPA on a CPU takes exp_u20, 20 bits; ex2.approx of a
GPU and libm are better."""
TURNS = (1.0, -1.0)
"""What the queries of the two calls of a training step are multiplied with."""

Call = Callable[..., Tensor]


class WrongResult(Exception):
    """The result differs from the oracle, or the workspace contract was broken. Says where and by how much."""


class Oracle:
    """The float64 result of one call, on all rows or on spot rows, and the derived bound.

    The bound is the larger of twice the error that the same formula has in the working dtype and 4*eps*max|v|. That
    error is the largest over ORDERS orders of the sum over the head dim: one order alone may happen to be a lucky one,
    and in float64 the first is the oracle's own.
    """

    def __init__(self, inputs: Inputs, scale: float) -> None:
        batch, queries, groups, heads, _ = inputs.query.shape
        self.rows = compared_rows(inputs, FULL_SCORES, SPOT_ROWS)
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
        dtype, worst = str(query.dtype).removeprefix("torch."), 0.0
        for order in orders(query.shape[-1], query.device):
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


def orders(width: int, device: torch.device) -> list[Tensor]:
    """ORDERS permutations of so many components, always the same."""
    random = torch.Generator().manual_seed(0)
    return [torch.randperm(width, generator=random).to(device) for _ in range(ORDERS)]


def compared_rows(inputs: Inputs, full_scores: int, spots: int) -> Tensor:
    """Query tokens that are compared: all up to so many scores, else spots, half of them drawn anew each time."""
    queries = inputs.query.shape[1]
    rows = torch.arange(queries)
    if inputs.query.shape[:4].numel() * inputs.key.shape[2] > full_scores:
        edges = torch.linspace(0, queries - 1, spots // 2).long()
        rows = torch.unique(torch.cat((edges, torch.randint(0, queries, (spots // 2,)))))
    return rows.to(inputs.query.device)


def selected_rows(inputs: Inputs, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Selection]:
    """The same call for some of its query tokens only, their positions made explicit."""
    whole = inputs.selection
    if whole.structure is not None:
        return inputs.query[:, rows], inputs.key, inputs.value, ranges_of(whole.structure, rows)
    batch, queries = inputs.query.shape[:2]
    if whole.query_positions is None:
        length = torch.as_tensor(whole.context_length, device=rows.device).expand(batch)
        positions = length[:, None] - queries + rows
    else:
        positions = whole.query_positions.expand(batch, queries)[:, rows]
    part = Selection(whole.indices[:, rows], whole.block_size, whole.context_length, positions)
    return inputs.query[:, rows], inputs.key, inputs.value, part


def ranges_of(structure: Structure, rows: Tensor) -> Selection:
    """What the oracle reads of a window or compressed selection: ranges of some query tokens, from the definition.

    A window is the keys t - w + 1 .. t of the query at t, a compressed row the tokens i with i*d + l <= t + 1.
    """
    batch, _, groups = structure.rows
    ranges = []
    for t in (rows + structure.first_position).tolist():
        if structure.operation == "window":
            ranges.append((max(0, t - structure.window + 1), t + 1))
        else:
            missing = structure.kernel_size - (t + 1)
            ranges.append((0, 0 if missing > 0 else 1 + -missing // structure.kernel_stride))
    end = max(1, structure.keys)
    indices = torch.tensor(ranges, device=rows.device)[None, :, None, None].expand(batch, -1, groups, -1, -1)
    everywhere = torch.full_like(rows, end - 1)  # the ranges alone say what a row reads
    return Selection.from_ranges(indices, context_length=end, query_positions=everywhere)


class GradientOracle:
    """Gradients of two calls that share keys, values and a workspace, in float64, and the derived bounds.

    A bound is the largest of twice the error that the same formula has in the working dtype, 4*eps of the largest
    gradient, and what weights that are right to EXP_ERROR may do (``weight_errors``). Of large problems the loss reads
    spot rows only: the others' gradients are zero, and the oracle computes no others.
    """

    def __init__(self, inputs: Inputs, scale: float) -> None:
        self.inputs, self.scale = inputs, scale
        of_a_row = inputs.query.shape[:4].numel() // inputs.query.shape[1] * inputs.key.shape[2]
        spots = max(LEAST_GRADIENT_ROWS, GRADIENT_SCORES // of_a_row)
        self.rows = compared_rows(inputs, FULL_GRADIENT_SCORES, spots)
        self.truth = self._of_reference("float64")
        usual = self._of_reference(str(inputs.query.dtype).removeprefix("torch."))
        part = selected_rows(inputs, self.rows)
        allowed = [sum(pair) for pair in zip(*(weight_errors(part, scale, turn) for turn in TURNS), strict=True)]
        least = 4 * torch.finfo(inputs.query.dtype).eps
        self.bounds = [
            max(2 * float((found.double() - want).abs().max()), least * float(want.abs().max()), EXP_ERROR * error)
            for found, want, error in zip(usual, self.truth, allowed, strict=True)
        ]

    def _of_reference(self, dtype: str) -> list[Tensor]:
        def run(case: Inputs, workspace: Workspace | None) -> Tensor:
            tensors = case.query, case.key, case.value
            return reference.run(*tensors, case.selection, scale=self.scale, compute_dtype=dtype)

        query, key, value, selection = selected_rows(self.inputs, self.rows)
        kind = TORCH_DTYPES[dtype]
        cast = Inputs(query.to(kind), key.to(kind), value.to(kind), selection, None)
        found, *rest = two_calls(run, cast, None, torch.arange(len(self.rows), device=query.device))
        whole = torch.zeros_like(self.inputs.query, dtype=found.dtype)
        whole[:, self.rows] = found
        return [whole, *rest]

    def compare(self, call: Call, workspace: Workspace) -> None:
        """Two steps with one workspace, poisoned in between. Raises WrongResult."""
        for step in ("first", "second"):
            gradients = two_calls(call, self.inputs, workspace, self.rows)
            for name, found, want, bound in zip("qkv", gradients, self.truth, self.bounds, strict=True):
                error = float((found.double() - want).abs().max())
                if not error <= bound:
                    raise WrongResult(f"{step} step: gradient of {name} off by {error:.3g}, derived bound {bound:.3g}")
            workspace.poison()


def two_calls(run: Call, case: Inputs, workspace: Workspace | None, rows: Tensor) -> list[Tensor]:
    """Gradients with respect to query, key and value of a loss over the query tokens ``rows`` of two calls, the second
    of the query turned round. What a path keeps in the workspace for its first backward, its second call overwrites."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
    query, key, value = leaves
    losses = []
    for turn in TURNS:
        out = run(Inputs(query * turn, key, value, case.selection, None), workspace)[:, rows]
        losses.append((out * loss_weight(out.shape, out.dtype, out.device)).sum())
    return list(torch.autograd.grad(losses, leaves))


def loss_weight(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each output element counts in the loss: one of 17 eighths, exact in every dtype, neighbours unlike."""
    return ((torch.arange(shape.numel(), device=device) * 7919 % 17 - 6) / 8).to(dtype).view(shape)


def weight_errors(part: tuple[Tensor, Tensor, Tensor, Selection], scale: float, turn: float) -> list[float]:
    """By how much each of the gradients of query, key and value of one call is off at most, to first order, for a unit
    of relative error in every weight P = exp(score - top).

    Normalised, P_j is off by at most P_j, dP - delta by m = sum of P_j |dP_j - delta|, so dS by P (|dP - delta| + m)
    and its sums over keys and rows by the same sums of absolute values.
    """
    query, key, value = (tensor.double().nan_to_num() for tensor in part[:3])
    selection = part[3]
    batch, queries, groups, heads, _ = query.shape
    upstream = loss_weight(torch.Size((*query.shape[:4], value.shape[3])), query.dtype, query.device)
    step = max(1, reference.SCORE_ELEMENTS // (batch * groups * heads * key.shape[2]))
    of_query, of_key, of_value = 0.0, torch.zeros_like(key), torch.zeros_like(value)
    for first in range(0, queries, step):
        q, weight = query[:, first : first + step] * turn, upstream[:, first : first + step]
        mask = reference.selected_keys(selection, key.shape[2], first, first + q.shape[1])[:, :, :, None]
        scores = torch.einsum("bsghd,bgtd->bsght", q, key).mul(scale).masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)
        slope = torch.einsum("bgtd,bsghd->bsght", value, weight)
        slope = (slope - (weights * slope).sum(-1, keepdim=True)).abs()
        slope = weights * (slope + (weights * slope).sum(-1, keepdim=True)) * scale
        of_query = max(of_query, float(torch.einsum("bsght,bgtd->bsghd", slope, key.abs()).max()))
        of_key += torch.einsum("bsght,bsghd->bgtd", slope, q.abs())
        of_value += torch.einsum("bsght,bsghd->bgtd", weights, weight.abs())
    return [of_query, float(of_key.max()), float(of_value.max())]
