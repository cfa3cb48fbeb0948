"""One program per (block, some of the rows that chose it): its keys and values are loaded once for all of them.

Each pair (row, block) leaves a partial output, its maximum and its total; a second launch merges a row's partials.
Where few heads share a key set this is the only order that fills a product: rows of many tokens stand on each other.
``span`` bounds the partials: spans of tokens are worked on one after the other, two launches each, in one buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selection import Selection
from ..trace import ParameterValue
from ..workspace import Workspace
from .invert import invert, listed_item
from .launch import Plan, call_key, plans
from .layout import (
    LOG2E,
    context_length,
    gather_rows,
    key_count,
    key_sources,
    load_rows,
    row_limit,
    selection_arguments,
    shape_constants,
    unit_last,
    wide_offsets,
)


@triton.jit(do_not_specialize=["LENGTH", "S", "T", "spans", "span", "item_slots"])
def nsa_block_forward(
    Q, K0, K1, V, LENGTH, POSITION, PAIRS, ITEMS, ITEM_COUNT, PART, STAT,
    S, T, G, spans, span, item_slots, scale2, spb, sps, sqb, sqs, sqg, sqh, skb, skg, skt, svb, svg, svt,
    H: tl.constexpr, HP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr,
    DK1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BS: tl.constexpr, TENSOR_LENGTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * item_slots,): item i of the span of each (b, g), TOKENS rows of HP heads at a time."""
    pid = tl.program_id(0)
    bg = pid // item_slots
    i = pid % item_slots
    unit = (bg * spans + span).to(tl.int64)
    if i < tl.load(ITEM_COUNT + unit):
        g = bg % G
        b = bg // G
        block, low, high = listed_item(ITEMS, unit, item_slots, i)
        first = block * BS
        length = key_count(LENGTH, b, T, TENSOR_LENGTH)
        full = context_length(LENGTH, b, TENSOR_LENGTH)
        k0 = load_rows(K0, b, g, first, length - first, skb, skg, skt, 0, DK, DK0, BS, DESCRIPTOR, False)
        k1 = k0
        if DK1 > 0:
            k1 = load_rows(K1, b, g, first, length - first, skb, skg, skt, DK0, DK, DK1, BS, DESCRIPTOR, False)
        v = load_rows(V, b, g, first, length - first, svb, svg, svt, 0, DV, DVP, BS, DESCRIPTOR, TENSOR_LENGTH)
        rows = tl.arange(0, TOKENS * HP)
        head = rows % HP
        keys = tl.arange(0, BS)
        columns = tl.arange(0, DVP)
        base = Q + b.to(tl.int64) * sqb + g.to(tl.int64) * sqg
        pairs = PAIRS + unit * (SPAN * NP)
        part = PART + bg.to(tl.int64) * (SPAN * NP * H * DV)
        stat = STAT + bg.to(tl.int64) * (SPAN * NP * H * 2)
        for start in range(low, high, TOKENS):
            place = start + rows // HP
            there = (place < high) & (head < H)
            # past the end the last pair stands again: every load is of a row that exists, and is not stored
            pair = tl.load(pairs + tl.minimum(place, high - 1))
            s = pair // NP
            limit = row_limit(POSITION, b, s, length, full, S, spb, sps)
            s = s.to(tl.int64) if WIDE else s
            offsets = s * sqs + head * sqh
            q0 = gather_rows(base, offsets, head, H, HP, 0, DK, DK0)
            score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            if DK1 > 0:
                q1 = gather_rows(base, offsets, head, H, HP, DK0, DK, DK1)
                score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
            score = tl.where(keys[None, :] < (limit - first)[:, None], score, -float("inf"))
            top = tl.max(score, 1) * scale2
            weight = tl.math.exp2(score * scale2 - top[:, None])
            total = tl.sum(weight, 1)
            out = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            left = pair - span * (SPAN * NP)
            left = (left.to(tl.int64) if WIDE else left) * H + head
            keep = there[:, None]
            if DVP > DV:
                keep = keep & (columns < DV)[None, :]
            tl.store(part + left[:, None] * DV + columns[None, :], out.to(PART.dtype.element_ty), mask=keep)
            tl.store(stat + left * 2, top, mask=there)
            tl.store(stat + left * 2 + 1, total, mask=there)


@triton.jit(do_not_specialize=["S", "span"])
def nsa_block_merge(
    PART, STAT, CHOSEN, OUT, LSE, S, G, span,
    H: tl.constexpr, HP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,): adds the partials of TILE tokens, each brought to the row's largest maximum."""
    tiles: tl.constexpr = (SPAN + TILE - 1) // TILE
    UNROLL: tl.constexpr = min(N, 8)
    pid = tl.program_id(0)
    bg = (pid // tiles).to(tl.int64)
    local = (pid % tiles) * TILE + tl.arange(0, TILE)
    s = span * SPAN + local
    slots = tl.arange(0, NP)
    heads = tl.arange(0, HP)
    columns = tl.arange(0, DVP)
    real = (heads < H)[None, :] & (s < S)[:, None]
    chosen = tl.load(CHOSEN + bg * S + s, mask=s < S, other=0)
    picked = ((chosen[:, None] >> slots.to(tl.int64)[None, :]) & 1) == 1
    place = (bg * SPAN + local) * NP
    stat = STAT + ((place[:, None, None] + slots[None, :, None]) * H + heads[None, None, :]) * 2
    there = picked[:, :, None] & real[:, None, :]
    tops = tl.load(stat, mask=there, other=-float("inf"))
    totals = tl.load(stat + 1, mask=there, other=0.0)
    top = tl.max(tops, 1)
    top = tl.where(top > -float("inf"), top, 0.0)
    total = tl.sum(tl.math.exp2(tops - top[:, None, :]) * totals, 1)
    divisor = tl.where(total > 0, total, 1.0)
    inverse = 1.0 / divisor
    inside = (columns < DV)[None, None, :]
    out = tl.zeros([TILE, HP, DVP], tl.float32)
    for slot in tl.range(0, N, loop_unroll_factor=UNROLL):
        here = (((chosen >> slot) & 1) == 1)[:, None] & real
        source = (place + slot)[:, None] * H + heads[None, :]
        one = tl.load(STAT + source * 2, mask=here, other=-float("inf"))
        part = tl.load(PART + source[:, :, None] * DV + columns[None, None, :], mask=here[:, :, None] & inside,
                       other=0.0)  # fmt: skip
        out += (tl.math.exp2(one - top) * inverse)[:, :, None] * part.to(tl.float32)
    row = (((bg // G) * S + s) * G + bg % G)[:, None] * H + heads[None, :]
    tl.store(OUT + row[:, :, None] * DV + columns[None, None, :], out.to(OUT.dtype.element_ty),
             mask=real[:, :, None] & inside)  # fmt: skip
    if LSE is not None:
        tl.store(LSE + row, tl.where(total > 0, top + tl.math.log2(divisor), float("inf")), mask=real)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    logsum: Tensor | None,
    *,
    workspace: Workspace | None,
    span: ParameterValue,
    rows: ParameterValue,
    item_rows: ParameterValue,
    partial: ParameterValue,
    warps: ParameterValue,
    stages: ParameterValue,
    loads: ParameterValue,
) -> Tensor:
    """Output (B, S, G, h, Dv); fills ``logsum`` (B, S, G, h) float32 if given. Shapes as in ``nsa.problem``.

    ``rows`` query x head rows are multiplied at a time, ``item_rows`` of them are one program's work.
    """
    batch, queries, groups, heads, _ = unit_last(query, "query").shape
    width, device = value.shape[3], value.device
    out = torch.empty((batch, queries, groups, heads, width), dtype=value.dtype, device=device)
    constants = shape_constants(query, value, selection)
    padded, slots = int(constants["HP"]), int(constants["NP"])
    tokens = max(1, int(rows) // padded)
    lists = invert(selection, key.shape[2], span=int(span), item_tokens=max(tokens, int(item_rows) // padded))
    part_rows = batch * groups * lists.span_tokens * slots * heads
    part_dtype = torch.float32 if partial == "float32" else value.dtype
    part = scratch(workspace, "triton_block.part", part_rows, width, part_dtype, device)
    stat = scratch(workspace, "triton_block.stat", part_rows, 2, torch.float32, device)
    wide = wide_offsets(lists.span_tokens * slots * heads * width, query)
    shape = tokens, lists.span_tokens, part_dtype, wide
    name = call_key(query, key, value, selection, "block", logsum is None, shape, warps, stages, loads)
    known = plans(name)
    tile = min(lists.tile, max(1, 2048 // (padded * int(constants["DVP"]))))
    if not known:
        spanned = {"SPAN": lists.span_tokens, "TOKENS": tokens, "WIDE": wide, "DESCRIPTOR": loads == "descriptor"}
        merged = {name: constants[name] for name in ("H", "HP", "N", "NP", "DV", "DVP")}
        options = {"num_warps": int(warps), "num_stages": int(stages)}
        known["forward"] = Plan(nsa_block_forward, {**constants, **spanned}, options)
        known["merge"] = Plan(nsa_block_merge, {**merged, "TILE": tile, "SPAN": lists.span_tokens}, {"num_warps": 4})
    sources = key_sources(key, value, selection, constants, str(loads))
    length, positions, *position_strides = selection_arguments(selection)
    for step in range(lists.spans):
        known["forward"](
            batch * groups * lists.item_slots,
            query, *sources, length, positions, lists.pairs, lists.items, lists.item_count, part, stat,
            queries, key.shape[2], groups, lists.spans, step, lists.item_slots, scale * LOG2E,
            *position_strides, *query.stride()[:4], *key.stride()[:3], *value.stride()[:3],
        )  # fmt: skip
        known["merge"](
            batch * groups * triton.cdiv(lists.span_tokens, tile),
            part, stat, lists.chosen, out, logsum, queries, groups, step,
        )  # fmt: skip
    return out


def scratch(
    workspace: Workspace | None, role: str, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(rows, width), contents undefined: the workspace's, or plain memory where there is none."""
    if workspace is None:
        return torch.empty((rows, width), dtype=dtype, device=device)
    return workspace.take(role, rows, width, dtype=dtype, device=device)
