"""Backward of ``interval``: one kernel per tile of queries, then one per tile of keys and part of its queries.

Both recompute the weights from the log-sum-exp. Where there are few keys (compression) a tile's queries are cut into
``splits``, whose partial key and value gradients are added afterwards in order. No atomics: every run gives the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..rows import tracked
from ..trace import ParameterValue
from .interval import (
    Interval,
    existing_keys,
    forward,
    key_bounds,
    launch_options,
    least_tokens,
    row_positions,
    sizes,
    tile_bounds,
)
from .layout import LOG2E, load_query, load_rows, unit_last

PROGRAMS = 1024
"""Programs of the key kernel that ``splits`` 0 aims at: 4 for each of an H200's processors, and room for stragglers."""


@triton.jit
def walk_keys(
    q0, q1, grad, logsum, delta, dq0, dq1, begin, stop, first, end, K, V, b, g, there, scale2,
    skb, skg, skt, svb, svg, svt,
    DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Query gradients (without the scale) over keys begin .. stop."""
    columns = tl.arange(0, BN)
    for i in range(tl.cdiv(stop - begin, BN)):
        start = begin + i * BN
        k0 = load_rows(K, b, g, start, there - start, skb, skg, skt, 0, DK, DK0, BN, False, False)
        score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if DK1 > 0:
            k1 = load_rows(K, b, g, start, there - start, skb, skg, skt, DK0, DK, DK1, BN, False, False)
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
        v = load_rows(V, b, g, start, there - start, svb, svg, svt, 0, DV, DVP, BN, False, False)
        change = tl.dot(grad, tl.trans(v), input_precision="ieee")
        weight = tl.math.exp2(score * scale2 - logsum[:, None])
        key = start + columns
        read = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        weight = tl.where(read, weight, 0.0)
        change = (weight * (change - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(change, k0, dq0, input_precision="ieee")
        if DK1 > 0:
            dq1 = tl.dot(change, k1, dq1, input_precision="ieee")
    return dq0, dq1


@triton.jit(do_not_specialize=["FIRST", "S", "keys"])
def nsa_interval_gradient_query(
    Q, K, V, OUT, GRAD, LSE, DELTA, DQ, FIRST, POSITION, S, keys, G, scale, scale2, spb, sps,
    sqb, sqs, sqg, sqh, skb, skg, skt, svb, svg, svt,
    H: tl.constexpr, HP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,), as the forward. Also leaves DELTA, the sum of OUT * GRAD of each row."""
    M: tl.constexpr = TOKENS * HP
    pid = tl.program_id(0)
    tiles = tl.cdiv(S, TOKENS)
    tile = tiles - 1 - pid % tiles
    g = (pid // tiles) % G
    b = pid // (tiles * G)
    rows = tl.arange(0, M)
    member = rows // HP
    head = rows % HP
    position = row_positions(FIRST, POSITION, b, tl.minimum(tile * TOKENS + member, S - 1), spb, sps)
    first, end = key_bounds(position, keys, KERNEL, STRIDE, WIDTH)
    start = tile * TOKENS
    last = tl.minimum(start + TOKENS, S) - 1
    begin, _, stop = tile_bounds(position, FIRST, POSITION, start, last, keys, KERNEL, STRIDE, WIDTH)
    there = (tile * TOKENS + member < S) & (head < H)
    base = Q + b.to(tl.int64) * sqb + g.to(tl.int64) * sqg + (tile * TOKENS).to(tl.int64) * sqs
    q0 = load_query(base, rows, member * sqs + head * sqh, there, 0, DK, DK0)
    q1 = q0
    if DK1 > 0:
        q1 = load_query(base, rows, member * sqs + head * sqh, there, DK0, DK, DK1)
    row = ((b.to(tl.int64) * S + tile * TOKENS) * G + g) * H
    offset = member * (G * H) + head
    grad = load_query(GRAD + row * DV, rows, offset * DV, there, 0, DV, DVP)
    out = load_query(OUT + row * DV, rows, offset * DV, there, 0, DV, DVP)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(DELTA + row + offset, delta, mask=there)
    logsum = tl.load(LSE + row + offset, mask=there, other=float("inf"))
    dq0 = tl.zeros([M, DK0], tl.float32)
    dq1 = tl.zeros([M, DK1 if DK1 > 0 else 16], tl.float32)
    dq0, dq1 = walk_keys(
        q0, q1, grad, logsum, delta, dq0, dq1, begin, stop, first, end, K, V, b, g, stop, scale2,
        skb, skg, skt, svb, svg, svt, DK, DK0, DK1, DV, DVP, BN,
    )  # fmt: skip
    columns = tl.arange(0, DK0)
    target = DQ + row * DK + offset[:, None] * DK
    tl.store(target + columns[None, :], (dq0 * scale).to(DQ.dtype.element_ty),
             mask=there[:, None] & (columns < DK)[None, :])  # fmt: skip
    if DK1 > 0:
        columns = DK0 + tl.arange(0, DK1)
        tl.store(target + columns[None, :], (dq1 * scale).to(DQ.dtype.element_ty),
                 mask=there[:, None] & (columns < DK)[None, :])  # fmt: skip


@triton.jit
def walk_queries(
    k0, k1, v, dk0, dk1, dv, begin, stop, key, Q, GRAD, LSE, DELTA, FIRST, POSITION, b, g, S, G, keys, scale2,
    spb, sps, sqb, sqs, sqg, sqh,
    H: tl.constexpr, HP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Key and value gradients over queries begin .. stop. Scores stand transposed, (keys, rows), so that they enter
    the products without a transposition."""
    rows = tl.arange(0, TOKENS * HP)
    member = rows // HP
    head = rows % HP
    for i in range(tl.cdiv(stop - begin, TOKENS)):
        s = begin + i * TOKENS
        there = (s + member < stop) & (head < H)
        base = Q + b.to(tl.int64) * sqb + g.to(tl.int64) * sqg + s.to(tl.int64) * sqs
        q0 = load_query(base, rows, member * sqs + head * sqh, there, 0, DK, DK0)
        score = tl.dot(k0, tl.trans(q0), input_precision="ieee")
        if DK1 > 0:
            q1 = load_query(base, rows, member * sqs + head * sqh, there, DK0, DK, DK1)
            score = tl.dot(k1, tl.trans(q1), score, input_precision="ieee")
        row = ((b.to(tl.int64) * S + s) * G + g) * H
        offset = member * (G * H) + head
        logsum = tl.load(LSE + row + offset, mask=there, other=float("inf"))
        delta = tl.load(DELTA + row + offset, mask=there, other=0.0)
        weight = tl.math.exp2(score * scale2 - logsum[None, :])
        position = row_positions(FIRST, POSITION, b, tl.minimum(s + member, S - 1), spb, sps)
        first, end = key_bounds(position, keys, KERNEL, STRIDE, WIDTH)
        read = (key[:, None] >= first[None, :]) & (key[:, None] < end[None, :])
        weight = tl.where(read, weight, 0.0)
        grad = load_query(GRAD + row * DV, rows, offset * DV, there, 0, DV, DVP)
        dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision="ieee")
        change = tl.dot(v, tl.trans(grad), input_precision="ieee")
        change = (weight * (change - delta[None, :])).to(q0.dtype)
        dk0 = tl.dot(change, q0, dk0, input_precision="ieee")
        if DK1 > 0:
            dk1 = tl.dot(change, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv


@triton.jit(do_not_specialize=["FIRST", "S", "keys", "T"])
def nsa_interval_gradient_key(
    Q, K, V, GRAD, LSE, DELTA, DKEY, DVALUE, FIRST, POSITION, S, keys, T, G, scale, scale2, spb, sps,
    sqb, sqs, sqg, sqh, skb, skg, skt, svb, svg, svt,
    H: tl.constexpr, HP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    BN: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles * SPLITS * B * G,), longest tiles first: into DKEY (SPLITS, B, G, T, DK), DVALUE alike."""
    pid = tl.program_id(0)
    g = pid % G
    split = (pid // G) % SPLITS
    tiles = tl.cdiv(T, BN)
    start = ((pid // (G * SPLITS)) % tiles) * BN
    b = pid // (G * SPLITS * tiles)
    key = start + tl.arange(0, BN)
    k0 = load_rows(K, b, g, start, keys - start, skb, skg, skt, 0, DK, DK0, BN, False, False)
    k1 = k0
    if DK1 > 0:
        k1 = load_rows(K, b, g, start, keys - start, skb, skg, skt, DK0, DK, DK1, BN, False, False)
    v = load_rows(V, b, g, start, keys - start, svb, svg, svt, 0, DV, DVP, BN, False, False)
    dk0 = tl.zeros([BN, DK0], tl.float32)
    dk1 = tl.zeros([BN, DK1 if DK1 > 0 else 16], tl.float32)
    dv = tl.zeros([BN, DVP], tl.float32)
    low = start * 0
    high = low + S
    if POSITION is None:
        low = tl.maximum(start * STRIDE + KERNEL - 1 - FIRST, 0)
        if WIDTH > 0:
            high = tl.minimum((start + BN - 1 + WIDTH) * STRIDE + KERNEL - 1 - FIRST, S)
    part = tl.cdiv(tl.maximum(high - low, 0), SPLITS)
    low += split * part
    dk0, dk1, dv = walk_queries(
        k0, k1, v, dk0, dk1, dv, low, tl.minimum(low + part, high), key, Q, GRAD, LSE, DELTA, FIRST, POSITION, b, g,
        S, G, keys, scale2, spb, sps, sqb, sqs, sqg, sqh,
        H, HP, DK, DK0, DK1, DV, DVP, KERNEL, STRIDE, WIDTH, TOKENS,
    )  # fmt: skip
    batches = tl.num_programs(0) // (G * SPLITS * tiles)
    row = ((split * batches + b).to(tl.int64) * G + g) * T + key
    inside = (key < T)[:, None]
    columns = tl.arange(0, DK0)
    tl.store(DKEY + row[:, None] * DK + columns[None, :], (dk0 * scale).to(DKEY.dtype.element_ty),
             mask=inside & (columns < DK)[None, :])  # fmt: skip
    if DK1 > 0:
        columns = DK0 + tl.arange(0, DK1)
        tl.store(DKEY + row[:, None] * DK + columns[None, :], (dk1 * scale).to(DKEY.dtype.element_ty),
                 mask=inside & (columns < DK)[None, :])  # fmt: skip
    columns = tl.arange(0, DVP)
    tl.store(DVALUE + row[:, None] * DV + columns[None, :], dv.to(DVALUE.dtype.element_ty),
             mask=inside & (columns < DV)[None, :])  # fmt: skip


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interval: Interval,
    scale: float,
    out: Tensor,
    logsum: Tensor,
    grad: Tensor,
    *,
    query_tokens: ParameterValue = 4,
    query_keys: ParameterValue = 32,
    key_tokens: ParameterValue = 4,
    key_keys: ParameterValue = 32,
    splits: ParameterValue = 0,
    backward_warps: ParameterValue = 4,
    backward_stages: ParameterValue = 1,
    backward_registers: ParameterValue = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``out`` (B, S, G, h, Dv) and ``logsum`` (B, S, G, h) are the forward's.

    ``splits`` 0: as many as bring the programs to PROGRAMS.
    """
    batch, queries, groups, _, width = query.shape
    total, value_width, device = key.shape[2], value.shape[3], query.device
    constants = {**sizes(query, value), **interval.constants}
    keys = existing_keys(interval, queries, total)
    grad = grad.contiguous()
    delta = torch.empty_like(logsum)
    query_grad = torch.empty(query.shape, dtype=query.dtype, device=device)
    first, positions, *position_strides = interval.arguments
    strides = (*query.stride()[:4], *unit_last(key, "key").stride()[:3], *unit_last(value, "value").stride()[:3])
    launch = launch_options(backward_warps, backward_stages, backward_registers)
    tile = least_tokens(int(query_tokens), constants["HP"])
    nsa_interval_gradient_query[(batch * groups * triton.cdiv(queries, tile),)](
        query, key, value, out, grad, logsum, delta, query_grad, first, positions, queries, keys, groups, scale,
        scale * LOG2E, *position_strides, *strides, **constants, TOKENS=tile, BN=int(query_keys), **launch,
    )  # fmt: skip
    tiles = batch * groups * triton.cdiv(total, int(key_keys))
    parts = int(splits) or max(1, min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(queries, 256)))
    single = parts == 1
    lead = (parts, batch, groups, total)
    key_grad = torch.empty((*lead, width), dtype=key.dtype if single else torch.float32, device=device)
    value_grad = torch.empty((*lead, value_width), dtype=value.dtype if single else torch.float32, device=device)
    tile = least_tokens(int(key_tokens), constants["HP"])
    nsa_interval_gradient_key[(tiles * parts,)](
        query, key, value, grad, logsum, delta, key_grad, value_grad, first, positions, queries, keys, total, groups,
        scale, scale * LOG2E, *position_strides, *strides,
        **constants, TOKENS=tile, BN=int(key_keys), SPLITS=parts, **launch,
    )  # fmt: skip
    if single:
        return query_grad, key_grad[0], value_grad[0]
    return query_grad, key_grad.sum(0).to(key.dtype), value_grad.sum(0).to(value.dtype)


class IntervalFunction(torch.autograd.Function):
    """The forward of ``interval`` with the backward above. Not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        interval: Interval,
        scale: float,
        forward_parameters: dict[str, ParameterValue],
        backward_parameters: dict[str, ParameterValue],
    ) -> tuple[Tensor, Tensor]:
        """Runs the forward and keeps what backward needs."""
        logsum = torch.empty(query.shape[:4], dtype=torch.float32, device=query.device)
        out = forward(query, key, value, interval, scale, logsum, **forward_parameters)
        ctx.save_for_backward(query, key, value, out, logsum)
        ctx.rest = (interval, scale, backward_parameters)
        ctx.mark_non_differentiable(logsum)
        return out, logsum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, logsum = ctx.saved_tensors
        interval, scale, parameters = ctx.rest
        gradients = backward(query, key, value, interval, scale, out, logsum, grad, **parameters)
        return *gradients, None, None, None, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interval: Interval,
    scale: float,
    forward_parameters: dict[str, ParameterValue],
    backward_parameters: dict[str, ParameterValue],
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp (B, S, G, h) float32, base 2), the output differentiable where gradients are wanted."""
    if tracked(query, key, value):
        found: tuple[Tensor, Tensor] = IntervalFunction.apply(
            query, key, value, interval, scale, forward_parameters, backward_parameters
        )
        return found
    logsum = torch.empty(query.shape[:4], dtype=torch.float32, device=query.device)
    return forward(query, key, value, interval, scale, logsum, **forward_parameters), logsum
