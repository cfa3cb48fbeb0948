"""One program per tile of neighbouring tokens and group: it walks the union of their blocks once.

Where neighbours agree each block is loaded once for the whole tile and the rows fill a wgmma; where they do not, rows
are computed against blocks they did not choose. The union is made in the program's registers: no preparing launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selection import Selection
from ..trace import ParameterValue
from .layout import (
    LOG2E,
    NONE,
    attend,
    context_length,
    finish,
    key_count,
    key_sources,
    load_query,
    row_entries,
    row_limit,
    selection_arguments,
    shape_constants,
    unit_last,
)


@triton.jit
def union_entries(base, tile, sxs, sxn, places, POSITION, b, length, full, S, spb, sps, N: tl.constexpr,
                  NP: tl.constexpr, BS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Of the tile's slots, numbered token by token, those at ``places``: ``block << TOKENS | bits``, each block where
    it stands first, else NONE. Bit i of ``bits`` says that token i of the tile chose the block."""
    token = places // NP
    s = tl.minimum(tile * TOKENS + token, S - 1)
    limit = row_limit(POSITION, b, s, length, full, S, spb, sps)
    entry = row_entries(base + s.to(tl.int64) * sxs + (places % NP) * sxn, places % NP, limit, N, BS)
    entry = tl.where(tile * TOKENS + token < S, entry, -1)
    slots = tl.arange(0, NP)
    bits = tl.zeros_like(entry)
    seen = tl.zeros_like(entry)
    for other in tl.static_range(TOKENS):
        s = tile * TOKENS + other
        limit = row_limit(POSITION, b, tl.minimum(s, S - 1), length, full, S, spb, sps)
        row = row_entries(base + tl.minimum(s, S - 1).to(tl.int64) * sxs + slots * sxn, slots, limit, N, BS)
        row = tl.where(s < S, row, -1)
        same = entry[:, None] == row[None, :]
        before = (other * NP + slots)[None, :] < places[:, None]
        bits |= (tl.max(same.to(tl.int32), 1)) << other
        seen |= tl.max((same & before).to(tl.int32), 1)
    return tl.where((entry >= 0) & (seen == 0), (entry << TOKENS) | bits, NONE)


@triton.jit(do_not_specialize=["LENGTH", "S", "T"])
def nsa_union_forward(
    Q,
    K0,
    K1,
    V,
    X,
    LENGTH,
    POSITION,
    OUT,
    LSE,
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
    TOKENS: tl.constexpr,
):
    """Grid (B * G * tiles,), tiles of TOKENS tokens, of one group beside each other, last (longest) tiles first."""
    M: tl.constexpr = TOKENS * HP
    CHUNKS: tl.constexpr = max(TOKENS * NP // 32, 1)
    CHUNK_SIZE: tl.constexpr = min(TOKENS * NP, 32)
    pid = tl.program_id(0)
    tiles = tl.cdiv(S, TOKENS)
    tile = tiles - 1 - pid % tiles
    g = (pid // tiles) % G
    b = pid // (tiles * G)
    rows = tl.arange(0, M)
    member = rows // HP
    head = rows % HP
    columns = tl.arange(0, DVP)
    places = tl.arange(0, CHUNK_SIZE)
    length = key_count(LENGTH, b, T, TENSOR_LENGTH)
    full = context_length(LENGTH, b, TENSOR_LENGTH)
    s = tl.minimum(tile * TOKENS + member, S - 1)
    limit = row_limit(POSITION, b, s, length, full, S, spb, sps)
    base = X + b.to(tl.int64) * sxb + g.to(tl.int64) * sxg
    e0 = union_entries(base, tile, sxs, sxn, places, POSITION, b, length, full, S, spb, sps, N, NP, BS, TOKENS)
    e1 = e0
    e2 = e0
    e3 = e0
    if CHUNKS > 1:
        places += CHUNK_SIZE
        e1 = union_entries(base, tile, sxs, sxn, places, POSITION, b, length, full, S, spb, sps, N, NP, BS, TOKENS)
    if CHUNKS > 2:
        places += CHUNK_SIZE
        e2 = union_entries(base, tile, sxs, sxn, places, POSITION, b, length, full, S, spb, sps, N, NP, BS, TOKENS)
        places += CHUNK_SIZE
        e3 = union_entries(base, tile, sxs, sxn, places, POSITION, b, length, full, S, spb, sps, N, NP, BS, TOKENS)
    there = (tile * TOKENS + member < S) & (head < H)
    base = Q + b.to(tl.int64) * sqb + g.to(tl.int64) * sqg + (tile * TOKENS).to(tl.int64) * sqs
    q0 = load_query(base, rows, member * sqs + head * sqh, there, 0, DK, DK0)
    q1 = q0
    if DK1 > 0:
        q1 = load_query(base, rows, member * sqs + head * sqh, there, DK0, DK, DK1)
    out, top, total = attend(
        q0, q1, e0, e1, e2, e3, member, limit, K0, K1, V, b, g, length, scale2,
        skb, skg, skt, svb, svg, svt,
        M, TOKENS, CHUNKS, DK, DK0, DK1, DV, DVP, BS, DESCRIPTOR,
    )  # fmt: skip
    out, logsum = finish(out, top, total, scale2)
    row = ((b.to(tl.int64) * S + tile * TOKENS) * G + g) * H
    offset = member * (G * H) + head
    keep = there[:, None]
    if DVP > DV:
        keep = keep & (columns < DV)[None, :]
    tl.store(OUT + row * DV + offset[:, None] * DV + columns[None, :], out.to(OUT.dtype.element_ty), mask=keep)
    if LSE is not None:
        tl.store(LSE + row + offset, logsum, mask=there)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    logsum: Tensor | None,
    *,
    tokens: ParameterValue,
    warps: ParameterValue,
    stages: ParameterValue,
    loads: ParameterValue,
) -> Tensor:
    """Output (B, S, G, h, Dv); fills ``logsum`` (B, S, G, h) float32 if given. Shapes as in ``nsa.problem``."""
    batch, queries, groups, heads, _ = unit_last(query, "query").shape
    out = torch.empty((batch, queries, groups, heads, value.shape[3]), dtype=value.dtype, device=value.device)
    constants = shape_constants(query, value, selection)
    sources = key_sources(key, value, selection, constants, str(loads))
    length, positions, *position_strides = selection_arguments(selection)
    nsa_union_forward[(batch * groups * triton.cdiv(queries, int(tokens)),)](
        query, *sources, selection.blocks, length, positions, out, logsum,
        queries, key.shape[2], groups, scale * LOG2E, *position_strides,
        *query.stride()[:4], *key.stride()[:3], *value.stride()[:3], *selection.blocks.stride(),
        **constants, DESCRIPTOR=loads == "descriptor", TOKENS=int(tokens),
        num_warps=int(warps), num_stages=int(stages),
    )  # fmt: skip
    return out
