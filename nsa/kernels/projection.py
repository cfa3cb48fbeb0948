"""One projection of the tokens taken apart in one pass: queries and keys turned, values copied, gates squashed.

Backward puts the projection's gradient together in one pass too. A program takes one head of a tile of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import power_of_two
from .mix import wide

ROWS = 32
"""Tokens of a program's tile."""


@triton.jit
def of_three(unit, G: tl.constexpr, FIRST, SECOND, THIRD):
    """Which of three tensors the head ``unit`` of 3 * G lies in."""
    if unit < G:
        chosen = FIRST
    elif unit < 2 * G:
        chosen = SECOND
    else:
        chosen = THIRD
    return chosen


@triton.jit
def turned(source, target, sines, plane, keep, D: tl.constexpr, BACK: tl.constexpr):
    """(rows, D / 2) pairs, the second of each D / 2 beyond the first, turned forward or back into ``target``."""
    low = wide(tl.load(source, mask=keep))
    high = wide(tl.load(source + D // 2, mask=keep))
    cosine = tl.load(sines, mask=keep)
    sine = tl.load(sines + plane, mask=keep)
    if BACK:
        sine = -sine
    tl.store(target, (low * cosine - high * sine).to(target.dtype.element_ty), mask=keep)
    tl.store(target + D // 2, (high * cosine + low * sine).to(target.dtype.element_ty), mask=keep)


@triton.jit
def copy(source, target, there, D: tl.constexpr, DP: tl.constexpr):
    """Rows of D numbers as they are."""
    column = tl.arange(0, DP)[None, :]
    keep = there & (column < D)
    tl.store(target + column, tl.load(source + column, mask=keep), mask=keep)


@triton.jit(do_not_specialize=["rows", "S"])
def nsa_split_forward(
    P, TURN, BIAS, QUERY, K0, K1, K2, V0, V1, V2, GATES, rows, S, HQ: tl.constexpr, G: tl.constexpr, DK: tl.constexpr,
    DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * (HQ + 6 G + 1),): P (rows, W), TURN (2, S, DK / 2), BIAS (3 HQ) -> QUERY (rows, HQ, DK), keys
    (rows, G, DK), values (rows, G, DV), GATES (rows, 3 HQ). W = HQ DK + 3 G DK + 3 G DV + 3 HQ."""
    units: tl.constexpr = HQ + 6 * G + 1
    W: tl.constexpr = (HQ + 3 * G) * DK + 3 * G * DV + 3 * HQ
    unit = tl.program_id(0) % units
    row = tl.program_id(0) // units * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    line = P + row.to(tl.int64)[:, None] * W
    long = row.to(tl.int64)[:, None]
    if unit < HQ + 3 * G:
        pair = tl.arange(0, DKP)[None, :]
        sines = TURN + (row % S)[:, None] * (DK // 2) + pair
        if unit < HQ:
            target = QUERY + (long * HQ + unit) * DK + pair
        else:
            target = of_three(unit - HQ, G, K0, K1, K2) + (long * G + (unit - HQ) % G) * DK + pair
        turned(line + unit * DK + pair, target, sines, S * (DK // 2), there & (pair < DK // 2), DK, False)
    elif unit < units - 1:
        place = unit - HQ - 3 * G
        value = of_three(place, G, V0, V1, V2) + (long * G + place % G) * DV
        copy(line + (HQ + 3 * G) * DK + place * DV, value, there, DV, DVP)
    else:
        column = tl.arange(0, GP)[None, :]
        keep = there & (column < 3 * HQ)
        raw = wide(tl.load(line + W - 3 * HQ + column, mask=keep, other=0.0))
        raw += wide(tl.load(BIAS + column, mask=column < 3 * HQ, other=0.0)).to(raw.dtype)
        gate = 1 / (1 + tl.exp(-raw))
        tl.store(GATES + long * (3 * HQ) + column, gate.to(GATES.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "S"])
def nsa_split_backward(
    CHANGE, TURN, SQUASHED, QUERY, K0, K1, K2, V0, V1, V2, GATES, rows, S, HQ: tl.constexpr, G: tl.constexpr,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid as forward: gradients of what it left, and its gates SQUASHED -> CHANGE (rows, W)."""
    units: tl.constexpr = HQ + 6 * G + 1
    W: tl.constexpr = (HQ + 3 * G) * DK + 3 * G * DV + 3 * HQ
    unit = tl.program_id(0) % units
    row = tl.program_id(0) // units * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    long = row.to(tl.int64)[:, None]
    line = CHANGE + long * W
    if unit < HQ + 3 * G:
        pair = tl.arange(0, DKP)[None, :]
        sines = TURN + (row % S)[:, None] * (DK // 2) + pair
        if unit < HQ:
            source = QUERY + (long * HQ + unit) * DK + pair
        else:
            source = of_three(unit - HQ, G, K0, K1, K2) + (long * G + (unit - HQ) % G) * DK + pair
        turned(source, line + unit * DK + pair, sines, S * (DK // 2), there & (pair < DK // 2), DK, True)
    elif unit < units - 1:
        place = unit - HQ - 3 * G
        value = of_three(place, G, V0, V1, V2) + (long * G + place % G) * DV
        copy(value, line + (HQ + 3 * G) * DK + place * DV, there, DV, DVP)
    else:
        column = tl.arange(0, GP)[None, :]
        keep = there & (column < 3 * HQ)
        gate = wide(tl.load(SQUASHED + long * (3 * HQ) + column, mask=keep))
        change = wide(tl.load(GATES + long * (3 * HQ) + column, mask=keep)) * gate * (1 - gate)
        tl.store(line + W - 3 * HQ + column, change.to(CHANGE.dtype.element_ty), mask=keep)


class SplitFunction(torch.autograd.Function):
    """projected (B, S, W), turn (2, S, Dk / 2), bias (3 HQ) -> query (B, S, HQ, Dk), gates (B, S, 3 HQ), then by branch
    keys (B, S, G, Dk) and values (B, S, G, Dv). ``turn`` has no gradient. Not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, turn: Tensor, bias: Tensor, heads: int, groups: int, width: int, value_width: int
    ) -> tuple[Tensor, ...]:
        """One launch."""
        batch, tokens, _ = projected.shape
        projected, turn = projected.contiguous(), turn.contiguous()
        lead = (batch, tokens)
        query = projected.new_empty(*lead, heads, width)
        keys = tuple(projected.new_empty(*lead, groups, width) for _ in range(3))
        values = tuple(projected.new_empty(*lead, groups, value_width) for _ in range(3))
        gates = projected.new_empty(*lead, 3 * heads)
        grid, constants = _launch(batch * tokens, heads, groups, width, value_width)
        nsa_split_forward[grid](
            projected, turn, bias, query, *keys, *values, gates, batch * tokens, tokens, **constants, num_warps=4
        )
        ctx.save_for_backward(turn, gates)
        ctx.sizes, ctx.bias_dtype = (heads, groups, width, value_width), bias.dtype
        return query, gates, *keys, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch, and the sum over tokens that is the bias's gradient."""
        turn, gates = ctx.saved_tensors
        query, squashed, *rest = (grad.contiguous() for grad in grads)
        batch, tokens = gates.shape[:2]
        heads, groups, width, value_width = ctx.sizes
        total = (heads + 3 * groups) * width + 3 * groups * value_width + 3 * heads
        change = gates.new_empty(batch, tokens, total)
        grid, constants = _launch(batch * tokens, heads, groups, width, value_width)
        nsa_split_backward[grid](
            change, turn, gates, query, *rest, squashed, batch * tokens, tokens, **constants, num_warps=4
        )
        wanted = ctx.needs_input_grad[2]
        bias = change[..., -3 * heads :].sum((0, 1), dtype=turn.dtype).to(ctx.bias_dtype) if wanted else None
        return change, None, bias, None, None, None, None


def _launch(rows: int, heads: int, groups: int, width: int, value_width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and compile-time sizes."""
    constants = {
        **{"HQ": heads, "G": groups, "DK": width, "DKP": power_of_two(width // 2), "DV": value_width},
        **{"DVP": power_of_two(value_width), "GP": power_of_two(3 * heads), "ROWS": ROWS},
    }
    return (triton.cdiv(rows, ROWS) * (heads + 6 * groups + 1),), constants
