"""Backward of every Triton path: one program per (block, some of the rows that chose it), five products at once.

Key and value gradients grow in registers, one partial per item of ``invert`` (popular blocks are split), added in
order afterwards; each pair (row, block) leaves a partial query gradient, added per row afterwards. No atomics on
gradients: the result is the same in every run. ``span`` bounds the partials' memory: spans are worked on one after the
other and key and value gradients then add up in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..selection import Selection
from ..trace import ParameterValue
from .invert import Lists, invert
from .launch import Plan, call_key, plans
from .layout import (
    LOG2E,
    context_length,
    gather_rows,
    key_count,
    load_rows,
    power_of_two,
    row_limit,
    selection_arguments,
    shape_constants,
    wide_offsets,
)

Forward = Callable[[Tensor, Tensor, Tensor, Selection, float, Tensor | None], Tensor]


@triton.jit(do_not_specialize=["rows"])
def nsa_gradient_delta(OUT, GRAD, DELTA, rows, DV: tl.constexpr, DVP: tl.constexpr, TILE: tl.constexpr):
    """Grid (tiles,): DELTA[row] = sum of OUT * GRAD over the head dim, both (rows, DV)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, DVP)
    offsets = row.to(tl.int64)[:, None] * DV + columns[None, :]
    mask = (row < rows)[:, None] & (columns < DV)[None, :]
    out = tl.load(OUT + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(DELTA + row, tl.sum(out * grad, 1), mask=row < rows)


@triton.jit(do_not_specialize=["LENGTH", "S", "T", "spans", "span", "item_slots"])
def nsa_gradient_block(
    Q, K, V, GRAD, LSE, DELTA, LENGTH, POSITION, PAIRS, ITEMS, ITEM_COUNT, PART_Q, PART_KV,
    S, T, G, spans, span, item_slots, scale2, spb, sps, sqb, sqs, sqg, sqh, skb, skg, skt, svb, svg, svt,
    H: tl.constexpr, HP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr,
    DK1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BS: tl.constexpr, TENSOR_LENGTH: tl.constexpr,
    TOKENS: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * item_slots,): item i of the span of each (b, g). Scores stand transposed, (keys, rows): they enter
    the key and value products from registers, and every product has 64 or more rows of keys or head dim."""
    pid = tl.program_id(0)
    bg = pid // item_slots
    i = pid % item_slots
    unit = (bg * spans + span).to(tl.int64)
    if i < tl.load(ITEM_COUNT + unit):
        g = bg % G
        b = bg // G
        item = ITEMS + (unit * item_slots + i) * 3
        first = tl.load(item) * BS
        low = tl.load(item + 1)
        high = tl.load(item + 2)
        length = key_count(LENGTH, b, T, TENSOR_LENGTH)
        full = context_length(LENGTH, b, TENSOR_LENGTH)
        rows = tl.arange(0, TOKENS * HP)
        head = rows % HP
        keys = tl.arange(0, BS)
        columns0 = tl.arange(0, DK0)
        columns = tl.arange(0, DVP)
        k0 = load_rows(K, b, g, first, length - first, skb, skg, skt, 0, DK, DK0, BS, False, False)
        k1 = k0
        if DK1 > 0:
            k1 = load_rows(K, b, g, first, length - first, skb, skg, skt, DK0, DK, DK1, BS, False, False)
        v = load_rows(V, b, g, first, length - first, svb, svg, svt, 0, DV, DVP, BS, False, False)
        dk0 = tl.zeros([BS, DK0], tl.float32)
        dk1 = tl.zeros([BS, DK1 if DK1 > 0 else 16], tl.float32)
        dv = tl.zeros([BS, DVP], tl.float32)
        base = Q + b.to(tl.int64) * sqb + g.to(tl.int64) * sqg
        row = (b.to(tl.int64) * S * G + g) * H
        pairs = PAIRS + unit * (SPAN * NP)
        target = PART_Q + bg.to(tl.int64) * (SPAN * NP * H * DK)
        for start in range(low, high, TOKENS):
            place = start + rows // HP
            there = (place < high) & (head < H)
            # past the end the last pair stands again: every load is of a row that exists, and weighs nothing
            pair = tl.load(pairs + tl.minimum(place, high - 1))
            s = pair // NP
            limit = row_limit(POSITION, b, s, length, full, S, spb, sps)
            s = s.to(tl.int64) if WIDE else s
            local = s * (G * H) + tl.minimum(head, H - 1)
            logsum = tl.load(LSE + row + local)
            logsum = tl.where(there, logsum, float("inf"))
            delta = tl.load(DELTA + row + local)
            q0 = gather_rows(base, s * sqs + head * sqh, head, H, HP, 0, DK, DK0)
            grad = gather_rows(GRAD + row * DV, local * DV, head, H, HP, 0, DV, DVP)
            score = tl.dot(k0, tl.trans(q0), input_precision="ieee")
            q1 = q0
            if DK1 > 0:
                q1 = gather_rows(base, s * sqs + head * sqh, head, H, HP, DK0, DK, DK1)
                score = tl.dot(k1, tl.trans(q1), score, input_precision="ieee")
            score = tl.where(keys[:, None] < (limit - first)[None, :], score, -float("inf"))
            weight = tl.math.exp2(score * scale2 - logsum[None, :])
            dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision="ieee")
            slope = tl.dot(v, tl.trans(grad), input_precision="ieee")
            slope = (weight * (slope - delta[None, :])).to(q0.dtype)
            dk0 = tl.dot(slope, q0, dk0, input_precision="ieee")
            left = pair - span * (SPAN * NP)
            left = left.to(tl.int64) if WIDE else left
            left = ((left * H + head) * DK)[None, :]
            dq0 = tl.dot(tl.trans(k0), slope, input_precision="ieee")
            keep = there[None, :]
            if DK0 > DK:
                keep = keep & (columns0 < DK)[:, None]
            tl.store(target + left + columns0[:, None], dq0.to(PART_Q.dtype.element_ty), mask=keep)
            if DK1 > 0:
                dk1 = tl.dot(slope, q1, dk1, input_precision="ieee")
                dq1 = tl.dot(tl.trans(k1), slope, input_precision="ieee")
                columns1 = DK0 + tl.arange(0, DK1)
                tl.store(target + left + columns1[:, None], dq1.to(PART_Q.dtype.element_ty),
                         mask=there[None, :] & (columns1 < DK)[:, None])  # fmt: skip
        part = PART_KV + (pid.to(tl.int64) * BS + keys)[:, None] * (DK + DV)
        tl.store(part + columns0[None, :], dk0, mask=(columns0 < DK)[None, :])
        if DK1 > 0:
            columns1 = DK0 + tl.arange(0, DK1)
            tl.store(part + columns1[None, :], dk1, mask=(columns1 < DK)[None, :])
        tl.store(part + DK + columns[None, :], dv, mask=(columns < DV)[None, :])


@triton.jit(do_not_specialize=["S", "span"])
def nsa_gradient_query(
    PART_Q, CHOSEN, DQ, S, G, span, scale,
    H: tl.constexpr, HP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,): a row's query gradient is ``scale`` times the sum of its partials."""
    tiles: tl.constexpr = (SPAN + TILE - 1) // TILE
    UNROLL: tl.constexpr = min(N, 8)
    pid = tl.program_id(0)
    bg = (pid // tiles).to(tl.int64)
    local = (pid % tiles) * TILE + tl.arange(0, TILE)
    s = span * SPAN + local
    heads = tl.arange(0, HP)
    columns = tl.arange(0, DKP)
    real = (heads < H)[None, :] & (s < S)[:, None]
    inside = (columns < DK)[None, None, :]
    chosen = tl.load(CHOSEN + bg * S + s, mask=s < S, other=0)
    place = (bg * SPAN + local) * NP
    total = tl.zeros([TILE, HP, DKP], tl.float32)
    for slot in tl.range(0, N, loop_unroll_factor=UNROLL):
        here = (((chosen >> slot) & 1) == 1)[:, None] & real
        source = ((place + slot)[:, None] * H + heads[None, :]) * DK
        part = tl.load(PART_Q + source[:, :, None] + columns[None, None, :], mask=here[:, :, None] & inside, other=0.0)
        total += part.to(tl.float32)
    row = (((bg // G) * S + s) * G + bg % G)[:, None] * H + heads[None, :]
    tl.store(DQ + row[:, :, None] * DK + columns[None, None, :], (total * scale).to(DQ.dtype.element_ty),
             mask=real[:, :, None] & inside)  # fmt: skip


@triton.jit(do_not_specialize=["T", "spans", "span", "item_slots", "blocks"])
def nsa_gradient_key(
    PART_KV, RANGES, DKEY, DVALUE, T, spans, span, item_slots, blocks, scale,
    DK: tl.constexpr, DV: tl.constexpr, BS: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * blocks * column tiles, of DK then of DV): adds a block's item partials, in order, to DKEY and
    DVALUE (B, G, T, D); with ADD onto what earlier spans left there."""
    key_tiles: tl.constexpr = (DK + TILE - 1) // TILE
    tiles: tl.constexpr = key_tiles + (DV + TILE - 1) // TILE
    tile = tl.program_id(0) % tiles
    bg = (tl.program_id(0) // (tiles * blocks)).to(tl.int64)
    block = (tl.program_id(0) // tiles) % blocks
    keys = tl.arange(0, BS)
    low = tl.load(RANGES + ((bg * spans + span) * blocks + block) * 2)
    high = tl.load(RANGES + ((bg * spans + span) * blocks + block) * 2 + 1)
    is_key = tile < key_tiles
    column = tl.where(is_key, tile, tile - key_tiles) * TILE + tl.arange(0, TILE)
    width = tl.where(is_key, DK, DV)
    inside = (column < width)[None, :]
    source = keys[:, None] * (DK + DV) + (column + tl.where(is_key, 0, DK))[None, :]
    total = tl.zeros([BS, TILE], tl.float32)
    for item in range(low, high):
        base = PART_KV + (bg * item_slots + item) * (BS * (DK + DV))
        total += tl.load(base + source, mask=inside, other=0.0)
    position = block * BS + keys
    target = (bg * T + position)[:, None] * width + column[None, :]
    keep = inside & (position < T)[:, None]
    if is_key:
        total *= scale
        if ADD:
            total += tl.load(DKEY + target, mask=keep, other=0.0)
        tl.store(DKEY + target, total.to(DKEY.dtype.element_ty), mask=keep)
    else:
        if ADD:
            total += tl.load(DVALUE + target, mask=keep, other=0.0)
        tl.store(DVALUE + target, total.to(DVALUE.dtype.element_ty), mask=keep)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    out: Tensor,
    logsum: Tensor,
    grad: Tensor,
    *,
    backward_rows: ParameterValue = 64,
    backward_item_rows: ParameterValue = 4096,
    backward_span: ParameterValue = 16384,
    backward_partial: ParameterValue = "value",
    backward_warps: ParameterValue = 4,
    backward_stages: ParameterValue = 3,
    backward_registers: ParameterValue = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``out`` (B, S, G, h, Dv) and ``logsum`` (B, S, G, h) are the forward's."""
    batch, queries, groups, heads, width = query.shape
    keys, value_width, device = key.shape[2], value.shape[3], query.device
    constants = shape_constants(query, value, selection)
    padded = int(constants["HP"])
    tokens = max(1, int(backward_rows) // padded)
    lists = invert(selection, keys, span=int(backward_span), item_tokens=max(tokens, int(backward_item_rows) // padded))
    grad = grad.contiguous()
    delta = torch.empty_like(logsum)
    single = lists.spans == 1
    sums = torch.float32
    query_grad = torch.empty(query.shape, dtype=query.dtype, device=device)
    key_grad = torch.empty(key.shape, dtype=key.dtype if single else sums, device=device)
    value_grad = torch.empty(value.shape, dtype=value.dtype if single else sums, device=device)
    part_dtype = sums if backward_partial == "float32" else query.dtype
    pairs = batch * groups * lists.span_tokens * int(constants["NP"])
    part_query = torch.empty(pairs * heads * width, dtype=part_dtype, device=device)
    part_items = batch * groups * lists.item_slots * selection.block_size
    part_keys = torch.empty(part_items * (width + value_width), dtype=sums, device=device)
    length, positions, *position_strides = selection_arguments(selection)
    wide = wide_offsets(pairs // (batch * groups) * heads * width, query, grad)
    tile = min(lists.tile, max(1, 2048 // (padded * power_of_two(width, 16))))
    name = call_key(
        query, key, value, selection, "gradient", grad.dtype, (grad.data_ptr() | out.data_ptr()) & 15, tokens,
        lists.span_tokens, single, wide, part_dtype, backward_warps, backward_stages, backward_registers,
    )  # fmt: skip
    known = plans(name)
    if not known:
        known.update(
            _plan({**constants, "WIDE": wide}, tokens, tile, lists, backward_warps, backward_stages, backward_registers)
        )
    known["delta"](triton.cdiv(logsum.numel(), 32), out, grad, delta, logsum.numel())
    columns = triton.cdiv(width, COLUMNS) + triton.cdiv(value_width, COLUMNS)
    for span in range(lists.spans):
        known["block"](
            batch * groups * lists.item_slots,
            query, key, value, grad, logsum, delta, length, positions, lists.pairs, lists.items, lists.item_count,
            part_query, part_keys, queries, keys, groups, lists.spans, span, lists.item_slots, scale * LOG2E,
            *position_strides, *query.stride()[:4], *key.stride()[:3], *value.stride()[:3],
        )  # fmt: skip
        known["query"](
            batch * groups * triton.cdiv(lists.span_tokens, tile),
            part_query, lists.chosen, query_grad, queries, groups, span, scale,
        )  # fmt: skip
        known["key" if span == 0 else "key_add"](
            batch * groups * lists.blocks * columns,
            part_keys, lists.ranges, key_grad, value_grad, keys, lists.spans, span, lists.item_slots, lists.blocks,
            scale,
        )  # fmt: skip
    return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype)


COLUMNS = 32
"""Columns of a key or value gradient that one program adds up."""


def _plan(
    constants: dict[str, Any],
    tokens: int,
    tile: int,
    lists: Lists,
    warps: ParameterValue,
    stages: ParameterValue,
    registers: ParameterValue,
) -> dict[str, Plan]:
    """The launches of one backward."""
    sizes = {name: constants[name] for name in ("H", "HP", "N", "NP", "DK")}
    adding = {name: constants[name] for name in ("DK", "DV", "BS")}
    options = {"num_warps": int(warps), "num_stages": int(stages), "maxnreg": int(registers) or None}
    few = {"num_warps": 4}
    keys = {
        name: Plan(nsa_gradient_key, {**adding, "TILE": COLUMNS, "ADD": name == "key_add"}, {**few, "num_stages": 4})
        for name in ("key", "key_add")
    }
    return {
        "delta": Plan(nsa_gradient_delta, {"DV": constants["DV"], "DVP": constants["DVP"], "TILE": 32}, few),
        "block": Plan(nsa_gradient_block, {**constants, "TOKENS": tokens, "SPAN": lists.span_tokens}, options),
        "query": Plan(
            nsa_gradient_query,
            {**sizes, "DKP": power_of_two(constants["DK"], 16), "TILE": tile, "SPAN": lists.span_tokens},
            few,
        ),
        **keys,
    }


class SelectionFunction(torch.autograd.Function):
    """A Triton forward with the backward above. Not differentiable twice."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selection: Selection,
        scale: float,
        launch: Forward,
        parameters: dict[str, ParameterValue],
    ) -> Tensor:
        """Runs ``launch`` and keeps what backward needs."""
        logsum = torch.empty(query.shape[:4], dtype=torch.float32, device=query.device)
        out = launch(query, key, value, selection, scale, logsum)
        ctx.save_for_backward(query, key, value, out, logsum, selection.indices)
        ctx.rest = (selection, scale, parameters)  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, logsum, indices = ctx.saved_tensors
        selection, scale, parameters = ctx.rest
        selection = replace(selection, indices=indices)
        return *backward(query, key, value, selection, scale, out, logsum, grad, **parameters), None, None, None, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    launch: Forward,
    parameters: dict[str, ParameterValue],
) -> Tensor:
    """``launch(query, key, value, selection, scale, logsum or None)``, differentiable where gradients are wanted.

    Kernels take the largest raw score for the largest scaled one, so a negative scale moves into the query.
    """
    if scale < 0:
        query, scale = -query, -scale
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out: Tensor = SelectionFunction.apply(query, key, value, selection, scale, launch, parameters)  # type: ignore[no-untyped-call]
        return out
    return launch(query, key, value, selection, scale, None)
