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
from nsa.selection import Selection, Structure
from tuner.inputs import Inputs

FULL_SCORES = 2**24
"""Up to this many scores every row is compared; beyond it spot rows are."""
SPOT_ROWS = 64
ORDERS = 4

Call = Callable[..., Tensor]


class WrongResult(Exception):
    """The result differs from the oracle, or the workspace contract was broken. Says where and by how much."""


class Oracle:
    """The float64 result of one call, on all rows or on spot rows, and the derived bound.

    The bound is the larger of twice the error that the same formula has in the working dtype and 4*eps*max|v|. That
    error is the largest over ORDERS orders of the sum over the head dim: one order alone may happen to be a lucky one,
    and in float64 the first is the oracle's own. ``weight_error``: of a weight, relative, where inputs are such that
    errors of weights add up; an output is then off by twice as much of max|v|, for the weights are normalised.
    """

    def __init__(self, inputs: Inputs, scale: float, *, weight_error: float = 0.0) -> None:
        batch, queries, groups, heads, _ = inputs.query.shape
        self.rows = compared_rows(inputs, FULL_SCORES, SPOT_ROWS)
        part = selected_rows(inputs, self.rows)
        self.truth = reference.run(*part, scale=scale)
        part_of_most = max(4 * torch.finfo(inputs.query.dtype).eps, 2 * weight_error)
        most = max(float(part.nan_to_num().abs().max()) for part in inputs.value)  # whole, a copy or two of the cache
        floor = part_of_most * most
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
