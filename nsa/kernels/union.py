"""One program per tile of neighbouring tokens and group: it walks the union of their blocks once.

Where neighbours agree each block is loaded once for the whole tile and the rows fill a wgmma; where they do not, rows
are computed against blocks they did not choose. A first launch writes each tile's union: made at the head of the
attention program it cost about 11 us per tile (H200, 4 warps), a quarter of the time at 16k and half at 1k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selection import Selection
from ..trace import ParameterValue
from .launch import Plan, call_key, plans
from .order import CHUNK_TOKENS, nsa_union_order, order_words, tile_tokens
from .layout import (
    LOG2E,
    LOWEST,
    NONE,
    context_length,
    finish,
    key_count,
    key_sources,
    load_query,
    load_rows,
    row_entries,
    row_limit,
    selection_arguments,
    shape_constants,
    unit_last,
)


HELD = False
REGS = 0
SPLIT = True
FORCE: bool | None = None
UNROLL = tl.constexpr(1)
LEAST = tl.constexpr(2.0**-100)
MOST = tl.constexpr(2.0**100)
"""Totals in between need no maximum: weights that float32 cannot hold are too small to count."""


@triton.jit(do_not_specialize=["LENGTH", "S", "T"])
def nsa_union_entries(
    X, LENGTH, POSITION, ORDER, ENTRIES, S, T, G, spb, sps, sxb, sxs, sxg, sxn,
    N: tl.constexpr, NP: tl.constexpr, BS: tl.constexpr, TENSOR_LENGTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,): a tile's union, ascending, ``block << TOKENS | bits``, NONE where it has ended; behind all
    unions their sizes, behind those how many of their blocks every token sees to the end. Bit i of ``bits`` says that
    token i of the tile chose the block. One warp: no barriers."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(S, TOKENS)
    tile = pid % tiles
    g = (pid // tiles) % G
    b = pid // (tiles * G)
    places = tl.arange(0, TOKENS * NP)
    slots = tl.arange(0, NP)
    length = key_count(LENGTH, b, T, TENSOR_LENGTH)
    full = context_length(LENGTH, b, TENSOR_LENGTH)
    base = X + b.to(tl.int64) * sxb + g.to(tl.int64) * sxg
    start, local = tile_tokens(ORDER, b * G + g, tile, places // NP, S, TOKENS)
    token = tl.minimum(start + local, S - 1)
    limit = row_limit(POSITION, b, token, length, full, S, spb, sps)
    entry = row_entries(base + token.to(tl.int64) * sxs + (places % NP) * sxn, places % NP, limit, N, BS)
    entry = tl.where(start + local < S, entry, -1)
    least = tl.min(limit, 0)
    bits = tl.zeros_like(entry)
    seen = tl.zeros_like(entry)
    for other in tl.static_range(TOKENS):
        start, local = tile_tokens(ORDER, b * G + g, tile, other, S, TOKENS)
        s = start + local
        limit = row_limit(POSITION, b, tl.minimum(s, S - 1), length, full, S, spb, sps)
        row = row_entries(base + tl.minimum(s, S - 1).to(tl.int64) * sxs + slots * sxn, slots, limit, N, BS)
        row = tl.where(s < S, row, -1)
        same = row[:, None] == entry[None, :]  # lanes along the tile's slots: what is reduced lies in one lane
        where = other * NP + tl.min(tl.where(same, slots[:, None], NP), 0)
        found = where < (other + 1) * NP
        bits |= found.to(tl.int32) << other
        seen |= found & (where < places)
    entry = tl.sort(tl.where((entry >= 0) & (seen == 0), (entry << TOKENS) | bits, NONE))
    tl.store(ENTRIES + pid.to(tl.int64) * (TOKENS * NP) + places, entry)
    sizes = ENTRIES + tl.num_programs(0).to(tl.int64) * (TOKENS * NP) + pid
    tl.store(sizes, tl.sum((entry != NONE).to(tl.int32), 0))
    tl.store(sizes + tl.num_programs(0), tl.sum((entry < ((least // BS) << TOKENS)).to(tl.int32), 0))


@triton.jit
def held(q, WIDTH: tl.constexpr):
    """The same rows, as the result of a product."""
    columns = tl.arange(0, WIDTH)
    one = tl.where(columns[:, None] == columns[None, :], 1.0, 0.0).to(q.dtype)
    return tl.dot(q, one, input_precision="ieee").to(q.dtype)


@triton.jit
def next_block(ENTRIES, place, member, TOKENS: tl.constexpr, DENSE: tl.constexpr):
    """(block, whether each row's token chose it) of entry ``place``; with DENSE every token chose every block."""
    if DENSE:
        block = place
        chosen = member >= 0
    else:
        entry = tl.load(ENTRIES + place)
        block = entry >> TOKENS
        chosen = ((entry >> member) & 1) == 1
    return block, chosen


@triton.jit
def load_scores(
    q0, q1, K0, K1, b, g, first, left, limit, skb, skg, skt,
    DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, STEP: tl.constexpr, DESCRIPTOR: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Raw scores (M, STEP) of keys ``first`` on; with MASKED those at a row's limit or above are -inf."""
    k0 = load_rows(K0, b, g, first, left, skb, skg, skt, 0, DK, DK0, STEP, DESCRIPTOR, False)
    score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if DK1 > 0:
        k1 = load_rows(K1, b, g, first, left, skb, skg, skt, DK0, DK, DK1, STEP, DESCRIPTOR, False)
        score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
    if MASKED:
        score = tl.where(tl.arange(0, STEP)[None, :] < (limit - first)[:, None], score, -float("inf"))
    return score


@triton.jit
def attend_direct(
    out, total, q0, q1, ENTRIES, low, high, member, limit, K0, K1, V, b, g, length, scale2,
    skb, skg, skt, svb, svg, svt,
    M: tl.constexpr, TOKENS: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, BS: tl.constexpr, STEP: tl.constexpr, DESCRIPTOR: tl.constexpr, TENSOR_LENGTH: tl.constexpr,
    DENSE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Softmax numerators without a maximum, over entries ``low`` to ``high``; row i belongs to token ``member[i]``.

    ``total`` (M, 8): eight sums a row, which stay inside a thread. Nothing in the loop waits for a maximum, and the
    product with the values only ever adds to ``out``, so that it runs beside the next scores.
    """
    parts: tl.constexpr = BS // STEP
    for i in tl.range(low * parts, high * parts, loop_unroll_factor=UNROLL):
        block, chosen = next_block(ENTRIES, i // parts, member, TOKENS, DENSE)
        first = block * BS + (i % parts) * STEP
        bias = tl.where(chosen, 0.0, -float("inf"))
        score = load_scores(
            q0, q1, K0, K1, b, g, first, length - first, limit, skb, skg, skt, DK, DK0, DK1, STEP, DESCRIPTOR, MASKED
        )
        weight = tl.math.exp2(score * scale2 + bias[:, None])
        total += tl.sum(weight.reshape(M, STEP // 8, 8), 1)
        v = load_rows(V, b, g, first, length - first, svb, svg, svt, 0, DV, DVP, STEP, DESCRIPTOR, TENSOR_LENGTH)
        out = tl.dot(weight.to(v.dtype), v, out, input_precision="ieee")
    return out, total


@triton.jit
def attend_online(
    out, top, total, q0, q1, ENTRIES, low, high, member, limit, K0, K1, V, b, g, length, scale2,
    skb, skg, skt, svb, svg, svt,
    TOKENS: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, BS: tl.constexpr, STEP: tl.constexpr, DESCRIPTOR: tl.constexpr, TENSOR_LENGTH: tl.constexpr,
    DENSE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax as ``layout.attend``, over entries ``low`` to ``high``; row i belongs to token ``member[i]``.

    Rows that chose a block or not differ by their maximum alone.
    """
    parts: tl.constexpr = BS // STEP
    for i in range(low * parts, high * parts):
        block, chosen = next_block(ENTRIES, i // parts, member, TOKENS, DENSE)
        first = block * BS + (i % parts) * STEP
        score = load_scores(
            q0, q1, K0, K1, b, g, first, length - first, limit, skb, skg, skt, DK, DK0, DK1, STEP, DESCRIPTOR, MASKED
        )
        new_top = tl.where(chosen, tl.maximum(top, tl.max(score, 1)), top)
        weight = tl.math.exp2(score * scale2 - tl.where(chosen, new_top * scale2, float("inf"))[:, None])
        decay = tl.math.exp2((top - new_top) * scale2)
        total = total * decay + tl.sum(weight, 1)
        v = load_rows(V, b, g, first, length - first, svb, svg, svt, 0, DV, DVP, STEP, DESCRIPTOR, TENSOR_LENGTH)
        out = tl.dot(weight.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        top = new_top
    return out, top, total


@triton.jit(do_not_specialize=["LENGTH", "S", "T"])
def nsa_union_forward(
    Q,
    K0,
    K1,
    V,
    ORDER,
    ENTRIES,
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
    STEP: tl.constexpr,
    TOKENS: tl.constexpr,
    DIRECT: tl.constexpr,
    HELD: tl.constexpr,
    SPLIT: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Grid (B * G * tiles,), tiles of TOKENS tokens, of one group beside each other, last (longest) tiles first."""
    M: tl.constexpr = TOKENS * HP
    pid = tl.program_id(0)
    tiles = tl.cdiv(S, TOKENS)
    tile = tiles - 1 - pid % tiles
    g = (pid // tiles) % G
    b = pid // (tiles * G)
    rows = tl.arange(0, M)
    member = rows // HP
    head = rows % HP
    columns = tl.arange(0, DVP)
    length = key_count(LENGTH, b, T, TENSOR_LENGTH)
    full = context_length(LENGTH, b, TENSOR_LENGTH)
    start, local = tile_tokens(ORDER, b * G + g, tile, member, S, TOKENS)
    limit = row_limit(POSITION, b, tl.minimum(start + local, S - 1), length, full, S, spb, sps)
    if DENSE:
        entries = ENTRIES
        size = tl.cdiv(tl.minimum((tile + 1) * TOKENS, S), BS)
        whole = (tile * TOKENS + 1) // BS
    else:
        place = ((b * G + g) * tiles + tile).to(tl.int64)
        entries = ENTRIES + place * (TOKENS * NP)
        sizes = ENTRIES + tl.num_programs(0).to(tl.int64) * (TOKENS * NP) + place
        size = tl.load(sizes)
        whole = tl.load(sizes + tl.num_programs(0))
    there = (start + local < S) & (head < H)
    base = Q + b.to(tl.int64) * sqb + g.to(tl.int64) * sqg + start.to(tl.int64) * sqs
    q0 = load_query(base, rows, local * sqs + head * sqh, there, 0, DK, DK0)
    if HELD:
        q0 = held(q0, DK0)
    q1 = q0
    if DK1 > 0:
        q1 = load_query(base, rows, local * sqs + head * sqh, there, DK0, DK, DK1)
        if HELD:
            q1 = held(q1, DK1)
    top = tl.zeros([M], tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DVP], tl.float32)
    if DIRECT:
        sums = tl.zeros([M, 8], tl.float32)
        if SPLIT:
            out, sums = attend_direct(
                out, sums, q0, q1, entries, 0, whole, member, limit, K0, K1, V, b, g, length, scale2,
                skb, skg, skt, svb, svg, svt,
                M, TOKENS, DK, DK0, DK1, DV, DVP, BS, STEP, DESCRIPTOR, TENSOR_LENGTH, DENSE, False,
            )  # fmt: skip
        out, sums = attend_direct(
            out, sums, q0, q1, entries, whole if SPLIT else 0, size, member, limit, K0, K1, V, b, g, length, scale2,
            skb, skg, skt, svb, svg, svt,
            M, TOKENS, DK, DK0, DK1, DV, DVP, BS, STEP, DESCRIPTOR, TENSOR_LENGTH, DENSE, True,
        )  # fmt: skip
        total = tl.sum(sums, 1)
        fine = (total >= LEAST) & (total <= MOST) & (tl.sum(out * 0.0, 1) == 0.0)
        if tl.min((fine | (start + local >= S)).to(tl.int32), 0) == 0:
            top = tl.full([M], LOWEST, tl.float32)
            total = tl.zeros([M], tl.float32)
            out = tl.zeros([M, DVP], tl.float32)
            out, top, total = attend_online(
                out, top, total, q0, q1, entries, 0, size, member, limit, K0, K1, V, b, g, length, scale2,
                skb, skg, skt, svb, svg, svt,
                TOKENS, DK, DK0, DK1, DV, DVP, BS, STEP, DESCRIPTOR, TENSOR_LENGTH, DENSE, True,
            )  # fmt: skip
    else:
        top = tl.full([M], LOWEST, tl.float32)
        out, top, total = attend_online(
            out, top, total, q0, q1, entries, 0, whole, member, limit, K0, K1, V, b, g, length, scale2,
            skb, skg, skt, svb, svg, svt,
            TOKENS, DK, DK0, DK1, DV, DVP, BS, STEP, DESCRIPTOR, TENSOR_LENGTH, DENSE, False,
        )  # fmt: skip
        out, top, total = attend_online(
            out, top, total, q0, q1, entries, whole, size, member, limit, K0, K1, V, b, g, length, scale2,
            skb, skg, skt, svb, svg, svt,
            TOKENS, DK, DK0, DK1, DV, DVP, BS, STEP, DESCRIPTOR, TENSOR_LENGTH, DENSE, True,
        )  # fmt: skip
    out, logsum = finish(out, top, total, scale2)
    row = ((b.to(tl.int64) * S + start) * G + g) * H
    offset = local * (G * H) + head
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
    step: ParameterValue,
    warps: ParameterValue,
    stages: ParameterValue,
    loads: ParameterValue,
    order: ParameterValue = "position",
) -> Tensor:
    """Output (B, S, G, h, Dv); fills ``logsum`` (B, S, G, h) float32 if given. Shapes as in ``nsa.problem``."""
    batch, queries, groups, heads, _ = query.shape
    out = torch.empty((batch, queries, groups, heads, value.shape[3]), dtype=value.dtype, device=value.device)
    keys = min(int(step), selection.block_size)
    dense = takes_everything(selection, queries, key.shape[2])
    words = order_words(key.shape[2], selection.block_size) if order == "overlap" and not dense else 0
    name = call_key(query, key, value, selection, "union", logsum is None, tokens, keys, warps, stages, loads, dense, words)
    known = plans(name)
    if not known:
        unit_last(query, "query")
        constants = shape_constants(query, value, selection)
        constants |= {"DESCRIPTOR": loads == "descriptor", "STEP": keys, "TOKENS": int(tokens)}
        constants["DIRECT"] = value.dtype == torch.bfloat16 if FORCE is None else FORCE
        constants["HELD"] = HELD
        constants["SPLIT"] = SPLIT
        constants["DENSE"] = dense
        options = {"num_warps": int(warps), "num_stages": int(stages)} | ({"maxnreg": REGS} if REGS else {})
        known["forward"] = Plan(nsa_union_forward, constants, options)
        known["order"] = Plan(nsa_union_order, {"N": constants["N"], "TOKENS": int(tokens), "WORDS": words}, {"num_warps": 1})
        wanted = {field: constants[field] for field in ("N", "NP", "BS", "TENSOR_LENGTH", "TOKENS")}
        known["entries"] = Plan(nsa_union_entries, wanted, {"num_warps": 1})
    constants = known["forward"].constants
    sources = key_sources(key, value, selection, constants, str(loads), keys)
    length, positions, *position_strides = selection_arguments(selection)
    tiles = batch * groups * triton.cdiv(queries, int(tokens))
    entries = turned = None
    if not dense:
        blocks = selection.blocks
        if words:
            chunks = batch * groups * triton.cdiv(queries, CHUNK_TOKENS)
            turned = torch.empty(chunks * CHUNK_TOKENS, dtype=torch.int32, device=value.device)
            known["order"](chunks, blocks, turned, queries, groups, *blocks.stride())
        entries = torch.empty(tiles * (int(tokens) * constants["NP"] + 2), dtype=torch.int32, device=value.device)
        known["entries"](
            tiles,
            blocks, length, positions, turned, entries, queries, key.shape[2], groups, *position_strides, *blocks.stride(),
        )  # fmt: skip
    known["forward"](
        tiles,
        query, *sources, turned, entries, length, positions, out, logsum,
        queries, key.shape[2], groups, scale * LOG2E, *position_strides,
        *query.stride()[:4], *key.stride()[:3], *value.stride()[:3],
    )  # fmt: skip
    return out


def takes_everything(selection: Selection, queries: int, keys: int) -> bool:
    """Whether every row is known to select its whole context: complete, a whole prompt, no more blocks than slots."""
    length = selection.context_length
    if not selection.complete or selection.query_positions is not None or isinstance(length, Tensor):
        return False
    return length == queries == keys <= selection.indices.shape[3] * selection.block_size
