"""One program per tile of tokens and group: it walks the union of their blocks once.

Where tokens agree each block is loaded once for the whole tile and the rows fill a wgmma; where they do not, rows are
computed against blocks they did not choose. A first launch writes each tile's union: made at the head of the attention
program it cost about 11 us per tile (H200, 4 warps), a quarter of the time at 16k and half at 1k. Where every row is
known to select its whole context there is no list.

In bfloat16 rows do without a maximum: a weight is exp2 of its scaled score, and a tile whose sums leave float32's
comfortable range, or whose values do with them, is computed again by an online softmax. The loop then only ever adds to
its output, so that one product runs beside the next, and takes half the instructions (H200, 16k, 64/4 heads, random
blocks: 3.2 to 2.6 ms). Nothing is lost: bfloat16 has float32's exponents.
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
from .order import CHUNK_TOKENS, nsa_union_order, order_words, tile_tokens

LEAST = tl.constexpr(2.0**-100)
MOST = tl.constexpr(2.0**100)
"""Sums in between need no maximum: a weight too small for float32 is below 2**-26 of such a sum."""


@triton.jit
def add_same(block, count, other, more):
    """Of two neighbouring stretches of a sorted list: the second's block, and how often it stood at their end."""
    return other, more + tl.where(block == other, count, 0)


@triton.jit
def join_same(block, bits, other, more):
    """The same with the bits of those that chose it."""
    return other, more | tl.where(block == other, bits, 0)


@triton.jit(do_not_specialize=["LENGTH", "S", "T"])
def nsa_union_entries(
    X, LENGTH, POSITION, ORDER, ENTRIES, S, T, G, spb, sps, sxb, sxs, sxg, sxn,
    N: tl.constexpr, NP: tl.constexpr, BS: tl.constexpr, TENSOR_LENGTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,): a tile's union, ascending, ``block << TOKENS | bits``, NONE where it has ended; behind all
    unions their sizes. Bit i of ``bits`` says that token i of the tile chose the block. One warp: no barriers."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(S, TOKENS)
    tile = pid % tiles
    g = (pid // tiles) % G
    b = pid // (tiles * G)
    places = tl.arange(0, TOKENS * NP)
    length = key_count(LENGTH, b, T, TENSOR_LENGTH)
    full = context_length(LENGTH, b, TENSOR_LENGTH)
    base = X + b.to(tl.int64) * sxb + g.to(tl.int64) * sxg
    member = places // NP
    start, local = tile_tokens(ORDER, b * G + g, tile, member, S, TOKENS)
    token = tl.minimum(start + local, S - 1)
    limit = row_limit(POSITION, b, token, length, full, S, spb, sps)
    entry = row_entries(base + token.to(tl.int64) * sxs + (places % NP) * sxn, places % NP, limit, N, BS)
    entry = tl.where((entry >= 0) & (start + local < S), entry, NONE // TOKENS)
    entry = tl.sort(entry * TOKENS + member)
    block = entry // TOKENS
    bits = tl.full([TOKENS * NP], 1, tl.int32) << (entry % TOKENS)
    _, place = tl.associative_scan((block, tl.full([TOKENS * NP], 1, tl.int32)), 0, add_same)
    _, bits = tl.associative_scan((block, bits), 0, join_same, reverse=True)
    first = (place == 1) & (block < NONE // TOKENS)
    entry = tl.sort(tl.where(first, (block << TOKENS) | bits, NONE))
    tl.store(ENTRIES + pid.to(tl.int64) * (TOKENS * NP) + places, entry)
    sizes = ENTRIES + tl.num_programs(0).to(tl.int64) * (TOKENS * NP) + pid
    tl.store(sizes, tl.sum((entry != NONE).to(tl.int32), 0))


@triton.jit
def held(q, WIDTH: tl.constexpr):
    """The same rows as the result of a product with one, which stays in registers; Triton reads rows that were loaded
    from shared memory anew for each product, half of what the loop reads there."""
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
):  # fmt: skip
    """Raw scores (M, STEP) of keys ``first`` on, -inf at a row's limit and above."""
    k0 = load_rows(K0, b, g, first, left, skb, skg, skt, 0, DK, DK0, STEP, DESCRIPTOR, False)
    score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if DK1 > 0:
        k1 = load_rows(K1, b, g, first, left, skb, skg, skt, DK0, DK, DK1, STEP, DESCRIPTOR, False)
        score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
    return tl.where(tl.arange(0, STEP)[None, :] < (limit - first)[:, None], score, -float("inf"))


@triton.jit
def attend_direct(
    q0, q1, ENTRIES, size, member, limit, K0, K1, V, b, g, length, scale2, skb, skg, skt, svb, svg, svt,
    M: tl.constexpr, TOKENS: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, BS: tl.constexpr, STEP: tl.constexpr, DESCRIPTOR: tl.constexpr, TENSOR_LENGTH: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """(weighted values (M, DVP), total (M,)) without a maximum, over ``size`` entries; row i is of token ``member[i]``.

    Eight sums a row are carried, which stay inside a thread.
    """
    out = tl.zeros([M, DVP], tl.float32)
    sums = tl.zeros([M, 8], tl.float32)
    parts: tl.constexpr = BS // STEP
    for i in range(size * parts):
        block, chosen = next_block(ENTRIES, i // parts, member, TOKENS, DENSE)
        first = block * BS + (i % parts) * STEP
        bias = tl.where(chosen, 0.0, -float("inf"))
        score = load_scores(
            q0, q1, K0, K1, b, g, first, length - first, limit, skb, skg, skt, DK, DK0, DK1, STEP, DESCRIPTOR
        )
        weight = tl.math.exp2(score * scale2 + bias[:, None])
        sums += tl.sum(weight.reshape(M, STEP // 8, 8), 1)
        v = load_rows(V, b, g, first, length - first, svb, svg, svt, 0, DV, DVP, STEP, DESCRIPTOR, TENSOR_LENGTH)
        out = tl.dot(weight.to(v.dtype), v, out, input_precision="ieee")
    return out, tl.sum(sums, 1)


@triton.jit
def attend_online(
    q0, q1, ENTRIES, size, member, limit, K0, K1, V, b, g, length, scale2, skb, skg, skt, svb, svg, svt,
    M: tl.constexpr, TOKENS: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, BS: tl.constexpr, STEP: tl.constexpr, DESCRIPTOR: tl.constexpr, TENSOR_LENGTH: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """(weighted values, running maximum (M,), total) as ``layout.attend``, over the same entries as ``attend_direct``.

    Rows that chose a block or not differ by their maximum alone.
    """
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DVP], tl.float32)
    parts: tl.constexpr = BS // STEP
    for i in range(size * parts):
        block, chosen = next_block(ENTRIES, i // parts, member, TOKENS, DENSE)
        first = block * BS + (i % parts) * STEP
        score = load_scores(
            q0, q1, K0, K1, b, g, first, length - first, limit, skb, skg, skt, DK, DK0, DK1, STEP, DESCRIPTOR
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
    else:
        place = ((b * G + g) * tiles + tile).to(tl.int64)
        entries = ENTRIES + place * (TOKENS * NP)
        size = tl.load(ENTRIES + tl.num_programs(0).to(tl.int64) * (TOKENS * NP) + place)
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
    if DIRECT:
        top = tl.zeros([M], tl.float32)
        out, total = attend_direct(
            q0, q1, entries, size, member, limit, K0, K1, V, b, g, length, scale2, skb, skg, skt, svb, svg, svt,
            M, TOKENS, DK, DK0, DK1, DV, DVP, BS, STEP, DESCRIPTOR, TENSOR_LENGTH, DENSE,
        )  # fmt: skip
        fine = (total >= LEAST) & (total <= MOST) & (tl.sum(out * 0.0, 1) == 0.0)  # false for NaN
        if tl.min((fine | (start + local >= S)).to(tl.int32), 0) == 0:
            out, top, total = attend_online(
                q0, q1, entries, size, member, limit, K0, K1, V, b, g, length, scale2, skb, skg, skt, svb, svg, svt,
                M, TOKENS, DK, DK0, DK1, DV, DVP, BS, STEP, DESCRIPTOR, TENSOR_LENGTH, DENSE,
            )  # fmt: skip
    else:
        out, top, total = attend_online(
            q0, q1, entries, size, member, limit, K0, K1, V, b, g, length, scale2, skb, skg, skt, svb, svg, svt,
            M, TOKENS, DK, DK0, DK1, DV, DVP, BS, STEP, DESCRIPTOR, TENSOR_LENGTH, DENSE,
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
    shape = logsum is None, dense, words, tokens, keys
    name = call_key(query, key, value, selection, "union", shape, warps, stages, loads)
    known = plans(name)
    if not known:
        unit_last(query, "query")
        constants = shape_constants(query, value, selection)
        constants |= {"DESCRIPTOR": loads == "descriptor", "STEP": keys, "TOKENS": int(tokens)}
        constants |= {"DIRECT": value.dtype == torch.bfloat16, "DENSE": dense}
        constants["HELD"] = bool(constants["DIRECT"]) and holds_query(constants, int(tokens), int(warps))
        options = {"num_warps": int(warps), "num_stages": int(stages)}
        if constants["HELD"] and keys <= 32:
            options["maxnreg"] = 168  # three programs a processor; ptxas needs no more, but takes up to 254
        known["forward"] = Plan(nsa_union_forward, constants, options)
        ordering = {"N": constants["N"], "TOKENS": int(tokens), "WORDS": words}
        known["order"] = Plan(nsa_union_order, ordering, {"num_warps": 1})
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
        entries = torch.empty(tiles * (int(tokens) * constants["NP"] + 1), dtype=torch.int32, device=value.device)
        known["entries"](
            tiles,
            blocks, length, positions, turned, entries,
            queries, key.shape[2], groups, *position_strides, *blocks.stride(),
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


def holds_query(constants: dict[str, int | bool], tokens: int, warps: int) -> bool:
    """Whether a tile's queries have room in registers: one wgmma's rows, and sums that leave room for them."""
    return tokens * constants["HP"] == 64 and warps == 4 and constants["DK"] <= 192 and constants["DVP"] <= 128
