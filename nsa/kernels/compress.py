"""The mean of each block of raw tokens, one launch each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..problem import compressed_count
from .layout import power_of_two, unit_last

ROWS = 8
"""Compressed tokens, or strides of raw ones, of a program."""


@triton.constexpr_function
def sum_type(dtype):
    """float64 for float64, else float32."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit(do_not_specialize=["N"])
def nsa_mean_forward(
    X, OUT, N, G, sxb, sxg, sxt, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,): X (B, G, T, D) -> OUT (B, G, N, D). A token adds its raw ones in ascending order."""
    tiles = tl.cdiv(N, ROWS)
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles
    token = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, DP)
    keep = (token < N)[:, None] & (columns < D)[None, :]
    base = X + (pair // G).to(tl.int64) * sxb + (pair % G).to(tl.int64) * sxg
    place = base + (token.to(tl.int64) * STRIDE * sxt)[:, None] + columns[None, :]
    total = tl.zeros([ROWS, DP], sum_type(X.dtype.element_ty))
    for i in range(SIZE):
        total += tl.load(place + i * sxt, mask=keep, other=0.0).to(total.dtype)
    target = OUT + (pair.to(tl.int64) * N + token)[:, None] * D + columns[None, :]
    tl.store(target, (total / SIZE).to(OUT.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["N", "T"])
def nsa_mean_backward(
    GRAD, DX, N, T, G, sgb, sgg, sgt, sxb, sxg, sxt, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,), tiles of strides: GRAD (B, G, N, D) -> DX (B, G, T, D), zero where no token reads."""
    tiles = tl.cdiv(tl.cdiv(T, STRIDE), ROWS)
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles
    stride = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, DP)
    inside = (columns < D)[None, :]
    base = GRAD + (pair // G).to(tl.int64) * sgb + (pair % G).to(tl.int64) * sgg
    total = tl.zeros([ROWS, DP], sum_type(GRAD.dtype.element_ty))
    for i in range(SIZE // STRIDE):
        token = stride - i
        keep = ((token >= 0) & (token < N))[:, None] & inside
        source = base + token.to(tl.int64)[:, None] * sgt + columns[None, :]
        total += tl.load(source, mask=keep, other=0.0).to(total.dtype)
    change = (total / SIZE).to(DX.dtype.element_ty)
    base = DX + (pair // G).to(tl.int64) * sxb + (pair % G).to(tl.int64) * sxg
    for i in range(STRIDE):
        token = stride * STRIDE + i
        tl.store(
            base + token.to(tl.int64)[:, None] * sxt + columns[None, :], change, mask=(token < T)[:, None] & inside
        )


class MeanFunction(torch.autograd.Function):
    """tokens (B, G, T, D) -> (B, G, N, D). Not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
        """One launch."""
        batch, groups, length, width = unit_last(tokens, "tokens").shape
        count = compressed_count(length, kernel_size, kernel_stride)
        out = tokens.new_empty(batch, groups, count, width)
        ctx.given = (kernel_size, kernel_stride, length, tokens.stride(1) < tokens.stride(2))
        if count:
            nsa_mean_forward[(batch * groups * triton.cdiv(count, ROWS),)](
                tokens, out, count, groups, *tokens.stride()[:3],
                D=width, DP=power_of_two(width), SIZE=kernel_size, STRIDE=kernel_stride, ROWS=ROWS,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """One launch."""
        kernel_size, kernel_stride, length, heads_inside = ctx.given
        batch, groups, count, width = grad.shape
        if heads_inside:  # as the tokens were laid out
            change = grad.new_empty(batch, length, groups, width).transpose(1, 2)
        else:
            change = grad.new_empty(batch, groups, length, width)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        nsa_mean_backward[(batch * groups * triton.cdiv(triton.cdiv(length, kernel_stride), ROWS),)](
            grad, change, count, length, groups, *grad.stride()[:3], *change.stride()[:3],
            D=width, DP=power_of_two(width), SIZE=kernel_size, STRIDE=kernel_stride, ROWS=ROWS,
        )  # fmt: skip
        return change, None, None
