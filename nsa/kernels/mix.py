"""The gated sum of the three branches in one pass over them, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import power_of_two

TILE = 4096
"""Elements of a program's tile."""


@triton.jit
def wide(tensor):
    """In float32, or float64 where it is float64."""
    return tensor if tensor.dtype == tl.float64 else tensor.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def nsa_mix_forward(GATES, A, B, C, OUT, rows, DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr):
    """Grid (tiles,): GATES (rows, 3), branches (rows, DV) -> OUT (rows, DV)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, DVP)
    place = row[:, None] * DV + columns[None, :]
    keep = (row < rows)[:, None] & (columns < DV)[None, :]
    total = wide(tl.load(A + place, mask=keep)) * wide(tl.load(GATES + row * 3, mask=row < rows))[:, None]
    total += wide(tl.load(B + place, mask=keep)) * wide(tl.load(GATES + row * 3 + 1, mask=row < rows))[:, None]
    total += wide(tl.load(C + place, mask=keep)) * wide(tl.load(GATES + row * 3 + 2, mask=row < rows))[:, None]
    tl.store(OUT + place, total.to(OUT.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows"])
def nsa_mix_backward(
    GATES, A, B, C, GRAD, DGATES, DA, DB, DC, rows, DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr
):
    """Grid (tiles,): gradients of gates (rows, 3) and branches (rows, DV) from GRAD (rows, DV)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, DVP)
    place = row[:, None] * DV + columns[None, :]
    keep = (row < rows)[:, None] & (columns < DV)[None, :]
    grad = wide(tl.load(GRAD + place, mask=keep, other=0.0))
    for branch in tl.static_range(3):
        if branch == 0:
            source, target = A, DA
        elif branch == 1:
            source, target = B, DB
        else:
            source, target = C, DC
        gate = wide(tl.load(GATES + row * 3 + branch, mask=row < rows, other=0.0))
        change = tl.sum(wide(tl.load(source + place, mask=keep, other=0.0)) * grad, 1)
        tl.store(target + place, (grad * gate[:, None]).to(target.dtype.element_ty), mask=keep)
        tl.store(DGATES + row * 3 + branch, change.to(DGATES.dtype.element_ty), mask=row < rows)


class MixFunction(torch.autograd.Function):
    """gates (..., 3) and three branches (..., Dv) -> (..., Dv). Not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        """One launch."""
        tensors = tuple(tensor.contiguous() for tensor in (gates, first, second, third))
        out = torch.empty_like(tensors[1])
        rows, width = out.numel() // out.shape[-1], out.shape[-1]
        padded = power_of_two(width)
        tile = max(1, TILE // padded)
        nsa_mix_forward[(triton.cdiv(rows, tile),)](*tensors, out, rows, DV=width, DVP=padded, ROWS=tile, num_warps=8)
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """One launch."""
        tensors = ctx.saved_tensors
        grads = tuple(torch.empty_like(tensor) for tensor in tensors)
        rows, width = grad.numel() // grad.shape[-1], grad.shape[-1]
        padded = power_of_two(width)
        tile = max(1, TILE // padded)
        nsa_mix_backward[(triton.cdiv(rows, tile),)](
            *tensors, grad.contiguous(), *grads, rows, DV=width, DVP=padded, ROWS=tile, num_warps=8
        )
        return grads
