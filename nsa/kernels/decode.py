"""Split-K for few rows: each row's blocks are dealt to several programs, and the last one to finish combines them.

The combination costs no second launch: a counter per row, which its last program sets back to zero. The counters
outlive the call; a capture gets counters of its own, so that graphs and eager calls never share one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selection import Selection
from ..trace import ParameterValue
from .launch import Plan, call_key, plans
from .layout import (
    LOG2E,
    NONE,
    attend,
    context_length,
    finish,
    first_entries,
    key_count,
    key_sources,
    load_query,
    row_limit,
    selection_arguments,
    shape_constants,
    unit_last,
)


@triton.jit
def combine_splits(PART, stats, OUT, LSE, row, heads, columns, whole, H: tl.constexpr, M: tl.constexpr,
                   DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Merge SPLITS partial rows (H, DV) of PART with their maxima and totals at ``stats``, (SPLITS, 2, H) per row.

    ``columns``: DVP of them; one program of a row, that with ``whole``, writes LSE."""
    parts = tl.arange(0, SPLITS)
    inside = heads < H
    stat = stats + row * (SPLITS * 2 * H)
    tops = tl.load(stat + (parts * (2 * H))[:, None] + heads[None, :], mask=inside[None, :], other=0.0,
                   cache_modifier=".cg")  # fmt: skip
    top = tl.max(tops, 0)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DVP], tl.float32)
    keep = inside[:, None] & (columns < DV)[None, :]
    part = PART + row * (SPLITS * H * DV) + heads[:, None] * DV + columns[None, :]
    for i in tl.static_range(SPLITS):
        one = tl.load(stat + i * (2 * H) + heads, mask=inside, other=0.0, cache_modifier=".cg")
        weight = tl.math.exp2(one - top)
        total += weight * tl.load(stat + (i * 2 + 1) * H + heads, mask=inside, other=0.0, cache_modifier=".cg")
        out += weight[:, None] * tl.load(part + i * (H * DV), mask=keep, other=0.0, cache_modifier=".cg")
    out, logsum = finish(out, top, total, 1.0)
    tl.store(OUT + row * (H * DV) + heads[:, None] * DV + columns[None, :], out.to(OUT.dtype.element_ty), mask=keep)
    if LSE is not None:
        tl.store(LSE + row * H + heads, logsum, mask=inside & whole)


@triton.jit(do_not_specialize=["LENGTH", "S", "T"])
def nsa_decode_forward(
    Q,
    K0,
    K1,
    V,
    X,
    LENGTH,
    POSITION,
    OUT,
    LSE,
    PART,
    COUNTER,
    S,
    T,
    G,
    scale2,
    spb,
    sps,
    sqb,
    sqs,
    sqg,
    sqh,
    skb,
    skg,
    skt,
    svb,
    svg,
    svt,
    sxb,
    sxs,
    sxg,
    sxn,
    H: tl.constexpr,
    HP: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    DK: tl.constexpr,
    DK0: tl.constexpr,
    DK1: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BS: tl.constexpr,
    TENSOR_LENGTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SPLITS: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Grid (B * S * G * SPLITS,), the splits of a row beside each other; split i takes the slots i modulo SPLITS."""
    M: tl.constexpr = max(HP, 16)
    CHUNKS: tl.constexpr = max(NP // 32, 1)
    CHUNK_SIZE: tl.constexpr = min(NP, 32)
    pid = tl.program_id(0)
    split = pid % SPLITS
    place = pid // SPLITS
    g = place % G
    s = (place // G) % S
    b = place // (G * S)
    slots = tl.arange(0, CHUNK_SIZE)
    heads = tl.arange(0, M)
    columns = tl.arange(0, DVP)
    length = key_count(LENGTH, b, T, TENSOR_LENGTH)
    limit = row_limit(POSITION, b, s, length, context_length(LENGTH, b, TENSOR_LENGTH), S, spb, sps)
    row = X + b.to(tl.int64) * sxb + s.to(tl.int64) * sxs + g * sxg
    mine = slots % SPLITS == split
    e0 = tl.where(mine, first_entries(row, sxn, slots, limit, N, BS), NONE)
    e1 = e0
    e2 = e0
    e3 = e0
    if CHUNKS > 1:
        e1 = tl.where(mine, first_entries(row, sxn, slots + CHUNK_SIZE, limit, N, BS), NONE)
    if CHUNKS > 2:
        e2 = tl.where(mine, first_entries(row, sxn, slots + 2 * CHUNK_SIZE, limit, N, BS), NONE)
        e3 = tl.where(mine, first_entries(row, sxn, slots + 3 * CHUNK_SIZE, limit, N, BS), NONE)
    base = Q + b.to(tl.int64) * sqb + s.to(tl.int64) * sqs + g.to(tl.int64) * sqg
    q0 = load_query(base, heads, heads * sqh, heads < H, 0, DK, DK0)
    q1 = q0
    if DK1 > 0:
        q1 = load_query(base, heads, heads * sqh, heads < H, DK0, DK, DK1)
    out, top, total = attend(
        q0, q1, e0, e1, e2, e3, limit, K0, K1, V, b, g, length, scale2,
        skb, skg, skt, svb, svg, svt,
        M, CHUNKS, DK, DK0, DK1, DV, DVP, BS, BS, DESCRIPTOR, TENSOR_LENGTH,
    )  # fmt: skip
    place = place.to(tl.int64)
    keep = (heads < H)[:, None] & (columns < DV)[None, :]
    if SPLITS == 1:
        out, logsum = finish(out, top, total, scale2)
        tl.store(OUT + place * (H * DV) + heads[:, None] * DV + columns[None, :], out.to(OUT.dtype.element_ty),
                 mask=keep)  # fmt: skip
        if LSE is not None:
            tl.store(LSE + place * H + heads, logsum, mask=heads < H)
    else:
        part = place * SPLITS + split
        stats = PART + tl.num_programs(0).to(tl.int64) * (H * DV)
        tl.store(PART + part * (H * DV) + heads[:, None] * DV + columns[None, :], out, mask=keep)
        tl.store(stats + part * (2 * H) + heads, top * scale2, mask=heads < H)
        tl.store(stats + part * (2 * H) + H + heads, total, mask=heads < H)
        if INSIDE:
            tl.debug_barrier()  # every thread's stores come before the one thread's release
            if tl.atomic_add(COUNTER + place, 1, sem="acq_rel") == SPLITS - 1:
                combine_splits(PART, stats, OUT, LSE, place, heads, columns, True, H, M, DV, DVP, SPLITS)
                tl.store(COUNTER + place, 0)


@triton.jit
def nsa_decode_combine(PART, OUT, LSE, H: tl.constexpr, HP: tl.constexpr, DV: tl.constexpr,
                       DVP: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Grid (B * S * G * DVP / COLUMNS,): the same combination as a launch of its own, by column tiles."""
    tiles: tl.constexpr = DVP // COLUMNS
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    stats = PART + (tl.num_programs(0) // tiles).to(tl.int64) * (SPLITS * H * DV)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    combine_splits(PART, stats, OUT, LSE, row, tl.arange(0, HP), columns, tile == 0, H, HP, DV, COLUMNS, SPLITS)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    logsum: Tensor | None,
    *,
    splits: ParameterValue,
    combine: ParameterValue,
    warps: ParameterValue,
    stages: ParameterValue,
    loads: ParameterValue,
) -> Tensor:
    """Output (B, S, G, h, Dv); fills ``logsum`` (B, S, G, h) float32 if given. Shapes as in ``nsa.problem``."""
    batch, queries, groups, heads, _ = query.shape
    rows, split, width = batch * queries * groups, int(splits), value.shape[3]
    out = torch.empty((batch, queries, groups, heads, width), dtype=value.dtype, device=value.device)
    inside = split > 1 and combine == "inside"
    name = call_key(query, key, value, selection, "decode", logsum is None, split, combine, warps, stages, loads)
    known = plans(name)
    if not known:
        unit_last(query, "query")
        constants = shape_constants(query, value, selection)
        constants |= {"DESCRIPTOR": loads == "descriptor", "SPLITS": split, "INSIDE": inside}
        known["forward"] = Plan(nsa_decode_forward, constants, {"num_warps": int(warps), "num_stages": int(stages)})
        wanted = {name: constants[name] for name in ("H", "HP", "DV", "DVP", "SPLITS")}
        wanted["COLUMNS"] = min(32, constants["DVP"])
        known["combine"] = Plan(nsa_decode_combine, wanted, {"num_warps": 2})
    plan = known["forward"]
    part = None
    if split > 1:  # partial rows, and behind them their maxima and totals
        part = torch.empty((rows * split * heads, width + 2), dtype=torch.float32, device=value.device)
    sources = key_sources(key, value, selection, plan.constants, str(loads))
    length, positions, *position_strides = selection_arguments(selection)
    plan(
        rows * split,
        query, *sources, selection.blocks, length, positions, out, logsum,
        part, counters(rows, value.device) if inside else None,
        queries, key.shape[2], groups, scale * LOG2E, *position_strides,
        *query.stride()[:4], *key.stride()[:3], *value.stride()[:3], *selection.blocks.stride(),
    )  # fmt: skip
    if split > 1 and not inside:
        combining = known["combine"]
        tiles = combining.constants["DVP"] // combining.constants["COLUMNS"]
        combining(rows * tiles, part, out, logsum)
    return out


_eager: dict[tuple[torch.device, int], Tensor] = {}
_pools: dict[torch.device, list[Tensor]] = {}
POOL = 65536
"""Counters set aside per device for captured calls: 256 KiB."""


def counters(rows: int, device: torch.device) -> Tensor:
    """``rows`` int32 counters that are zero when the stream gets there and that nobody else uses.

    Eager calls share one buffer per stream: each call leaves zeros behind. A captured call takes the next piece of a
    pool zeroed outside any capture, for good; without pool or room it records a memset of its own.
    """
    if device.type != "cuda":
        return torch.zeros(rows, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        pieces = _pools.get(device)
        room = -(-rows // 4) * 4  # pieces stay aligned to 16 bytes, which kernels are compiled for
        if pieces and pieces[0].numel() >= room:
            piece, pieces[0] = pieces[0][:room], pieces[0][room:]
            return piece
        return torch.zeros(rows, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if device not in _pools:
        _pools[device] = [torch.zeros(POOL, dtype=torch.int32, device=device)]
    held = _eager.get(key)
    if held is None or held.numel() < rows:
        held = _eager[key] = torch.zeros(max(rows, 1024), dtype=torch.int32, device=device)
    return held
