"""One program per (block, some of the rows that chose it): its keys and values are loaded once for all of them.

Each pair (row, block) leaves a partial output, its maximum and its total; a row's partials are merged by the same
launch. The grid goes unit by unit (a span of tokens of one group, ``invert``): first the unit's items, ``DELAY`` units
later the programs that merge its rows, so that partials are read while they are in L2, from a ring of ``RING`` units.
Programs wait only for programs with lower numbers, which the device starts first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selection import Selection
from ..trace import ParameterValue
from ..workspace import Workspace
from .invert import Lists, invert
from .layout import (
    LOG2E,
    context_length,
    key_count,
    key_sources,
    load_query,
    load_rows,
    row_limit,
    selection_arguments,
    shape_constants,
    unit_last,
)


@triton.jit
def attend_item(
    unit, first, low, high, Q, K0, K1, V, LENGTH, POSITION, PAIRS, DONE, FREE, PART, STAT,
    S, T, G, spans, merges, scale2, spb, sps, sqb, sqs, sqg, sqh, skb, skg, skt, svb, svg, svt,
    H: tl.constexpr, HP: tl.constexpr, NP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, BS: tl.constexpr, TENSOR_LENGTH: tl.constexpr, DESCRIPTOR: tl.constexpr,
    TOKENS: tl.constexpr, SPAN: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Pairs ``low`` to ``high`` of ``unit``, TOKENS rows of HP heads at a time, against the block at key ``first``."""
    bg = unit // spans
    g = bg % G
    b = bg // G
    length = key_count(LENGTH, b, T, TENSOR_LENGTH)
    full = context_length(LENGTH, b, TENSOR_LENGTH)
    k0 = load_rows(K0, b, g, first, length - first, skb, skg, skt, 0, DK, DK0, BS, DESCRIPTOR, False)
    k1 = k0
    if DK1 > 0:
        k1 = load_rows(K1, b, g, first, length - first, skb, skg, skt, DK0, DK, DK1, BS, DESCRIPTOR, False)
    v = load_rows(V, b, g, first, length - first, svb, svg, svt, 0, DV, DVP, BS, DESCRIPTOR, TENSOR_LENGTH)
    if unit >= RING:  # an atomic is one thread's and the same for all; a plain load could differ between threads
        while tl.atomic_add(FREE + unit - RING, 0, sem="acquire") < merges:
            pass
    rows = tl.arange(0, TOKENS * HP)
    head = rows % HP
    keys = tl.arange(0, BS)
    columns = tl.arange(0, DVP)
    base = Q + b.to(tl.int64) * sqb + g.to(tl.int64) * sqg
    ring = ((unit % RING) * SPAN - (unit % spans) * SPAN).to(tl.int64) * NP
    for start in range(low, high, TOKENS):
        place = start + rows // HP
        there = (place < high) & (head < H)
        pair = tl.load(PAIRS + unit.to(tl.int64) * (SPAN * NP) + place, mask=place < high, other=0)
        s = pair // NP
        limit = row_limit(POSITION, b, s, length, full, S, spb, sps)
        reach = tl.where(there, limit - first, BS)
        offsets = s.to(tl.int64) * sqs + head * sqh
        q0 = load_query(base, rows, offsets, there, 0, DK, DK0)
        score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if DK1 > 0:
            q1 = load_query(base, rows, offsets, there, DK0, DK, DK1)
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
        score = tl.where(keys[None, :] < reach[:, None], score, -float("inf"))
        top = tl.max(score, 1) * scale2
        weight = tl.math.exp2(score * scale2 - top[:, None])
        total = tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        target = (ring + pair) * H + head
        keep = there[:, None]
        if DVP > DV:
            keep = keep & (columns < DV)[None, :]
        tl.store(PART + target[:, None] * DV + columns[None, :], out.to(PART.dtype.element_ty), mask=keep)
        tl.store(STAT + target * 2, top, mask=there)
        tl.store(STAT + target * 2 + 1, total, mask=there)
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    tl.atomic_add(DONE + unit, 1, sem="release")


@triton.jit
def merge_rows(
    unit, i, OUT, LSE, CHOSEN, ITEM_COUNT, DONE, FREE, PART, STAT, S, G, spans,
    H: tl.constexpr, HP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    MERGE_TOKENS: tl.constexpr, SPAN: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Rows ``i`` * MERGE_TOKENS and following of ``unit``: add their partials, each brought to the largest maximum."""
    UNROLL: tl.constexpr = min(N, 8)
    bg = unit // spans
    local = i * MERGE_TOKENS + tl.arange(0, MERGE_TOKENS)
    s = (unit % spans) * SPAN + local
    slots = tl.arange(0, NP)
    heads = tl.arange(0, HP)
    columns = tl.arange(0, DVP)
    chosen = tl.load(CHOSEN + bg.to(tl.int64) * S + s, mask=s < S, other=0)
    first = ((chosen[:, None] >> slots.to(tl.int64)[None, :]) & 1) == 1
    expected = tl.load(ITEM_COUNT + unit)
    while tl.atomic_add(DONE + unit, 0, sem="acquire") < expected:
        pass
    place = ((unit % RING) * SPAN + local).to(tl.int64) * NP
    real = heads < H
    stat = STAT + ((place[:, None, None] + slots[None, :, None]) * H + heads[None, None, :]) * 2
    there = first[:, :, None] & real[None, None, :]
    tops = tl.load(stat, mask=there, other=-float("inf"), cache_modifier=".cg")
    totals = tl.load(stat + 1, mask=there, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 1)
    top = tl.where(top > -float("inf"), top, 0.0)
    total = tl.sum(tl.math.exp2(tops - top[:, None, :]) * totals, 1)
    divisor = tl.where(total > 0, total, 1.0)
    inverse = 1.0 / divisor
    out = tl.zeros([MERGE_TOKENS, HP, DVP], tl.float32)
    for slot in tl.range(0, N, loop_unroll_factor=UNROLL):
        here = (((chosen >> slot) & 1) == 1)[:, None] & real[None, :]
        source = (place + slot)[:, None] * H + heads[None, :]
        one = tl.load(STAT + source * 2, mask=here, other=-float("inf"), cache_modifier=".cg")
        inside = here[:, :, None] & (columns < DV)[None, None, :]
        part = tl.load(PART + source[:, :, None] * DV + columns[None, None, :], mask=inside, other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        out += (tl.math.exp2(one - top) * inverse)[:, :, None] * part.to(tl.float32)
    row = (((bg // G).to(tl.int64) * S + s) * G + bg % G)[:, None] * H + heads[None, :]
    keep = (s < S)[:, None] & real[None, :]
    tl.store(OUT + row[:, :, None] * DV + columns[None, None, :], out.to(OUT.dtype.element_ty),
             mask=keep[:, :, None] & (columns < DV)[None, None, :])  # fmt: skip
    if LSE is not None:
        tl.store(LSE + row, tl.where(total > 0, top + tl.math.log2(divisor), float("inf")), mask=keep)
    tl.debug_barrier()  # every thread's loads come before the ring's slot is given back
    tl.atomic_add(FREE + unit, 1, sem="release")


@triton.jit(do_not_specialize=["LENGTH", "S", "T", "units", "spans", "item_slots", "merges"])
def nsa_block_forward(
    Q, K0, K1, V, LENGTH, POSITION, OUT, LSE, CHOSEN, PAIRS, ITEMS, ITEM_COUNT, DONE, FREE, PART, STAT,
    S, T, G, units, spans, item_slots, merges, scale2, spb, sps, sqb, sqs, sqg, sqh, skb, skg, skt, svb, svg, svt,
    H: tl.constexpr, HP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr,
    DK1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BS: tl.constexpr, TENSOR_LENGTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr, TOKENS: tl.constexpr, MERGE_TOKENS: tl.constexpr, SPAN: tl.constexpr,
    RING: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """Grid ((units + DELAY) * (item_slots + merges),)."""
    pid = tl.program_id(0)
    turn = pid // (item_slots + merges)
    i = pid % (item_slots + merges)
    if i < item_slots:
        if turn < units:
            item = ITEMS + (turn.to(tl.int64) * item_slots + i) * 3
            block = tl.load(item)  # all four loads at once: past the count they are nothing and unused
            low = tl.load(item + 1)
            high = tl.load(item + 2)
            if i < tl.load(ITEM_COUNT + turn):
                attend_item(
                    turn, block * BS, low, high, Q, K0, K1, V, LENGTH, POSITION, PAIRS, DONE, FREE, PART, STAT,
                    S, T, G, spans, merges, scale2, spb, sps,
                    sqb, sqs, sqg, sqh, skb, skg, skt, svb, svg, svt,
                    H, HP, NP, DK, DK0, DK1, DV, DVP, BS, TENSOR_LENGTH, DESCRIPTOR, TOKENS, SPAN, RING,
                )  # fmt: skip
    else:
        if turn >= DELAY:
            merge_rows(
                turn - DELAY, i - item_slots, OUT, LSE, CHOSEN, ITEM_COUNT, DONE, FREE, PART, STAT, S, G, spans,
                H, HP, N, NP, DV, DVP, MERGE_TOKENS, SPAN, RING,
            )  # fmt: skip


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
    ring: ParameterValue,
    partial: ParameterValue,
    warps: ParameterValue,
    stages: ParameterValue,
    registers: ParameterValue,
    loads: ParameterValue,
) -> Tensor:
    """Output (B, S, G, h, Dv); fills ``logsum`` (B, S, G, h) float32 if given. Shapes as in ``nsa.problem``.

    ``rows`` query x head rows are multiplied at a time, ``item_rows`` of them are one program's work; ``registers``
    bounds a thread's, 0 = the compiler's choice.
    """
    batch, queries, groups, heads, _ = unit_last(query, "query").shape
    width, device = value.shape[3], value.device
    out = torch.empty((batch, queries, groups, heads, width), dtype=value.dtype, device=device)
    constants = shape_constants(query, value, selection)
    padded = int(constants["HP"])
    tokens = max(1, int(rows) // padded)
    lists = invert(selection, key.shape[2], span=int(span), item_tokens=max(tokens, int(item_rows) // padded))
    units, slots = batch * groups * lists.spans, int(constants["NP"])
    held = min(int(ring), units)
    part_rows = held * lists.span_tokens * slots * heads
    part = scratch(workspace, "triton_block.part", part_rows, width, partial_dtype(str(partial), value), device)
    stat = scratch(workspace, "triton_block.stat", part_rows, 2, torch.float32, device)
    merge_tokens = max(1, 16 // padded)
    merges = triton.cdiv(lists.span_tokens, merge_tokens)
    delay = 1
    sources = key_sources(key, value, selection, constants, str(loads))
    length, positions, *position_strides = selection_arguments(selection)
    nsa_block_forward[((units + delay) * (lists.item_slots + merges),)](
        query, *sources, length, positions, out, logsum,
        lists.chosen, lists.pairs, lists.items, lists.item_count, lists.flags, lists.flags[units:], part, stat,
        queries, key.shape[2], groups, units, lists.spans, lists.item_slots, merges, scale * LOG2E,
        *position_strides, *query.stride()[:4], *key.stride()[:3], *value.stride()[:3],
        **constants, DESCRIPTOR=loads == "descriptor", TOKENS=tokens, MERGE_TOKENS=merge_tokens,
        SPAN=lists.span_tokens, RING=held, DELAY=delay,
        num_warps=int(warps), num_stages=int(stages), maxnreg=int(registers) or None,
    )  # fmt: skip
    return out


def partial_dtype(name: str, value: Tensor) -> torch.dtype:
    """``value`` = the value's dtype, ``float32``."""
    return torch.float32 if name == "float32" else value.dtype


def scratch(
    workspace: Workspace | None, role: str, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(rows, width), contents undefined: the workspace's, or plain memory where there is none."""
    if workspace is None:
        return torch.empty((rows, width), dtype=dtype, device=device)
    return workspace.take(role, rows, width, dtype=dtype, device=device)


__all__ = ["Lists", "forward", "partial_dtype", "scratch"]
