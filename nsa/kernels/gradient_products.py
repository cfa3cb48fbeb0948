"""The products of the Triton paths' backward: one program per (block, some of the rows that chose it), five at once.

Key and value gradients grow in registers; each pair (row, block) leaves a partial query gradient. ``gradient_sums``
adds both up, ``gradient`` launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .invert import listed_item
from .layout import context_length, gather_rows, key_count, load_rows, row_limit


@triton.jit(do_not_specialize=["LENGTH", "S", "T", "rows"])
def nsa_gradient_rows(
    OUT, GRAD, LSE, LENGTH, POSITION, ROWS, S, T, GH, rows, spb, sps,
    DV: tl.constexpr, DVP: tl.constexpr, TILE: tl.constexpr, TENSOR_LENGTH: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,): ROWS (rows, 4) float32, what the products need to know of a row: its log-sum-exp, the sum of
    OUT * GRAD over the head dim, its limit's bits, and nothing; one load of 16 bytes instead of three of 4."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = row < rows
    columns = tl.arange(0, DVP)
    offsets = row.to(tl.int64)[:, None] * DV + columns[None, :]
    mask = there[:, None] & (columns < DV)[None, :]
    out = tl.load(OUT + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + offsets, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out * grad, 1)
    token = tl.minimum(row, rows - 1) // GH
    b, s = token // S, token % S
    length = key_count(LENGTH, b, T, TENSOR_LENGTH)
    limit = row_limit(POSITION, b, s, length, context_length(LENGTH, b, TENSOR_LENGTH), S, spb, sps)
    limit = tl.zeros_like(row) + limit
    logsum = tl.load(LSE + row, mask=there, other=0.0)
    known = tl.join(tl.join(logsum, limit.to(tl.float32, bitcast=True)), tl.join(delta, tl.zeros_like(delta)))
    place = row.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(ROWS + place, known.reshape(TILE, 4), mask=there[:, None])


@triton.jit
def store_query_part(
    slope, k, target, left,
    M: tl.constexpr, H: tl.constexpr, TOKENS: tl.constexpr, DK: tl.constexpr, COLUMN: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Multiply slope (keys, M) with k (keys, PADDED) and store the partial query gradients (M, PADDED) at ``target``,
    those of the first ``left`` tokens.

    They are stored as the tensor core holds them, a thread's values side by side, so that they leave in pieces of up to
    16 bytes without a turn through shared memory; ``gradient_sums.in_order`` puts them right. Fewer rows than a
    warpgroup's 64 are multiplied transposed. Dimensions are kept apart, so that where a value goes is a thread's own
    place and a constant.
    """
    if M % 64 == 0 and PADDED % 32 == 0 and COLUMN + PADDED <= DK:
        dq = tl.dot(tl.trans(slope), k, input_precision="ieee")
        tiles: tl.constexpr = M // 64
        groups: tl.constexpr = PADDED // 32
        part = dq.reshape(tiles, 4, 2, 8, groups, 4, 4, 2)  # tile, warp, half, row, group, eight, pair, one
        part = tl.permute(part, (3, 1, 0, 2, 4, 6, 5, 7)).reshape(8, 4, tiles * 2, groups, 32)
        unit = tl.arange(0, tiles * 2)
        row0 = tl.arange(0, 8)[:, None, None, None, None]
        row1 = tl.arange(0, 4)[None, :, None, None, None] * 16
        row2 = (unit // 2 * 64 + unit % 2 * 8)[None, None, :, None, None]
        column = (tl.arange(0, groups) * 32)[:, None] + tl.arange(0, 32)[None, :]
    elif M % 8 == 0 and PADDED % 64 == 0 and COLUMN + PADDED <= DK:
        dq = tl.dot(tl.trans(k), slope, input_precision="ieee")
        part = dq.reshape(PADDED // 64, 4, 2, 8, M // 8, 4, 2)  # tile, warp, half, column, eight, pair, one
        part = tl.permute(part, (5, 3, 1, 4, 6, 0, 2)).reshape(4, 8, 4, M // 4, PADDED // 32)
        unit = tl.arange(0, M // 4)
        row0 = tl.arange(0, 4)[:, None, None, None, None] * 2
        row1 = tl.zeros_like(row0)
        row2 = (unit // 2 * 8 + unit % 2)[None, None, None, :, None]
        column = (tl.arange(0, 8) * (PADDED // 32))[:, None] + (tl.arange(0, 4) * (PADDED // 4))[None, :]
        column = column[:, :, None, None] + tl.arange(0, PADDED // 32)[None, None, None, :]
    else:
        part = tl.trans(tl.dot(tl.trans(k), slope, input_precision="ieee"))
        row0 = tl.arange(0, M)[:, None]
        row1 = tl.zeros_like(row0)
        row2 = row1
        column = tl.arange(0, PADDED)
    place = row_place(row0, H, TOKENS) + row_place(row1, H, TOKENS) + row_place(row2, H, TOKENS)
    keep = row0 % TOKENS + row1 % TOKENS + row2 % TOKENS < left
    if M > TOKENS * H:
        keep = keep & (row0 // TOKENS + row1 // TOKENS + row2 // TOKENS < H)
    column += COLUMN
    if COLUMN + PADDED > DK:
        keep = keep & (column < DK)
    tl.store(target + (place * DK + column), part.to(target.dtype.element_ty), mask=keep)


@triton.jit
def row_place(row, H: tl.constexpr, TOKENS: tl.constexpr):
    """Where a row of a tile stands, tokens outside, heads inside. A sum of rows without common bits goes to the sum."""
    return row % TOKENS * H + row // TOKENS


@triton.jit(do_not_specialize=["LENGTH", "S", "T", "spans", "span", "units", "item_slots"])
def nsa_gradient_block(
    Q, K, V, GRAD, ROWS, LENGTH, PAIRS, ITEMS, ITEM_COUNT, PART_Q, PART_KV,
    S, T, G, spans, span, units, item_slots, scale2, sqb, sqs, sqg, sqh, skb, skg, skt, svb, svg, svt,
    H: tl.constexpr, HP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr,
    DK1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BS: tl.constexpr, TENSOR_LENGTH: tl.constexpr,
    TOKENS: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * units * item_slots,): item i of a unit, of the ``units`` from ``span`` on of each (b, g). Scores
    stand transposed, (keys, rows): they enter the key and value products from registers."""
    M: tl.constexpr = TOKENS * HP
    pid = tl.program_id(0)
    i = pid % item_slots
    held = pid // item_slots
    bg = held // units
    of_bg = span + held % units
    unit = (bg * spans + of_bg).to(tl.int64)
    if i < tl.load(ITEM_COUNT + unit, mask=of_bg < spans, other=0):
        g = bg % G
        b = bg // G
        block, low, high = listed_item(ITEMS, unit, item_slots, i)
        first = block * BS
        length = key_count(LENGTH, b, T, TENSOR_LENGTH)
        rows = tl.arange(0, M)
        head = rows // TOKENS  # heads side by side: a thread's rows are of few tokens
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
        target = PART_Q + held.to(tl.int64) * (SPAN * N * H * DK)
        # past the end the last pair stands again: every load is of a row that exists, and weighs nothing
        tokens = tl.arange(0, TOKENS)
        ahead = tl.load(pairs + tl.minimum(low + tokens, high - 1))
        for start in range(low, high, TOKENS):
            s = tl.broadcast_to((ahead // NP)[None, :], [HP, TOKENS]).reshape(M)
            ahead = tl.load(pairs + tl.minimum(start + TOKENS + tokens, high - 1))
            s = s.to(tl.int64) if WIDE else s
            local = s * (G * H) + tl.minimum(head, H - 1)
            known = tl.load(ROWS + row * 4 + local[:, None] * 4 + tl.arange(0, 4)[None, :])
            ends, delta = tl.split(known.reshape(M, 2, 2))
            logsum, limit = tl.split(ends)
            delta, _ = tl.split(delta)
            there = (start + rows % TOKENS < high) & (head < H)
            limit = tl.where(there, limit.to(tl.int32, bitcast=True), 0)
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
            fall = tl.dot(v, tl.trans(grad), input_precision="ieee")
            slope = (weight * (fall - delta[None, :])).to(q0.dtype)
            dk0 = tl.dot(slope, q0, dk0, input_precision="ieee")
            own = target + tl.full([], H * DK, tl.int64) * start
            store_query_part(slope, k0, own, high - start, M, H, TOKENS, DK, 0, DK0)
            if DK1 > 0:
                dk1 = tl.dot(slope, q1, dk1, input_precision="ieee")
                store_query_part(slope, k1, own, high - start, M, H, TOKENS, DK, DK0, DK1)
        part = PART_KV + (pid.to(tl.int64) * BS + keys)[:, None] * (DK + DV)
        tl.store(part + columns0[None, :], dk0, mask=(columns0 < DK)[None, :])
        if DK1 > 0:
            columns1 = DK0 + tl.arange(0, DK1)
            tl.store(part + columns1[None, :], dk1, mask=(columns1 < DK)[None, :])
        tl.store(part + DK + columns[None, :], dv, mask=(columns < DV)[None, :])
