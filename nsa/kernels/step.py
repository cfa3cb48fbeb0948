"""The decode step's attention: over the compressed tokens, and over the chosen blocks and the window.

``step_choose`` runs between these two kernels and ``step_combine`` behind them, each a grid of fixed size whatever the
context: the position of each entry is read from the device, so that one captured graph serves every step. A group
(b, g) is a row; its attention is dealt to ``PARTS`` programs, those of the compressed tokens first, then those of the
selected blocks, then the window's. With WIDE (float32) scores are float64 and in natural units, as ``nsa.scoring``
asks; otherwise float32, base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import LOWEST
from .step_append import SIZES, context, storage_rows


@triton.jit
def compressed_tokens(length, L: tl.constexpr, STRIDE: tl.constexpr):
    """Compressed tokens of a context of ``length`` raw ones."""
    return tl.where(length >= L, (length - L) // STRIDE + 1, 0)


@triton.jit
def power(exponent, WIDE: tl.constexpr):
    """The exponential in the units of scores."""
    if WIDE:
        return tl.exp(exponent)
    else:
        return tl.exp2(exponent)


@triton.jit
def scores_of(query, Q, KEY, rows, heads, inside, H: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr,
              CHUNK: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Scaled scores (M, BN) of the query rows against key rows, -inf where not inside.

    CHUNK > 0: products in float64, CHUNK columns at a time, query rows read at Q; else on tensor cores.
    """
    if CHUNK > 0:
        score = tl.zeros([heads.shape[0], rows.shape[0]], tl.float64)
        for first in range(0, DK, CHUNK):
            columns = first + tl.arange(0, CHUNK)
            keep = (columns < DK)[None, :]
            part = tl.load(Q + heads[:, None] * DK + columns[None, :], mask=(heads < H)[:, None] & keep, other=0.0)
            key = tl.load(KEY + rows[:, None] * DK + columns[None, :], mask=inside[:, None] & keep, other=0.0)
            score += tl.sum(part.to(tl.float64)[:, None, :] * key.to(tl.float64)[None, :, :], 2)
        score = score * SCALE
    else:
        columns = tl.arange(0, DKP)
        keep = inside[:, None] & (columns < DK)[None, :]
        key = tl.load(KEY + rows[:, None] * DK + columns[None, :], mask=keep, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * (SCALE if WIDE else SCALE * 1.4426950408889634)
    return tl.where(inside[None, :], score, -float("inf"))


@triton.jit
def weigh(top, total, score, WIDE: tl.constexpr):
    """One step of the online softmax: (weights like score, decay (M,) of what is older, new maximum, new total)."""
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = power(score - new_top[:, None], WIDE)
    decay = power(top - new_top, WIDE)
    return weight, decay, new_top, total * decay + tl.sum(weight, 1)


@triton.jit
def add_values(out, weight, decay, VALUE, rows, inside, DV: tl.constexpr, DVP: tl.constexpr):
    """Weighted values (M, DVP) float32, older ones decayed."""
    columns = tl.arange(0, DVP)
    keep = inside[:, None] & (columns < DV)[None, :]
    value = tl.load(VALUE + rows[:, None] * DV + columns[None, :], mask=keep, other=0.0)
    decayed = out * decay.to(tl.float32)[:, None]
    return tl.dot(weight.to(value.dtype), value, decayed, input_precision="ieee")


@triton.jit
def block_logsum(weight, strides, top, RATIO: tl.constexpr, WIDE: tl.constexpr):
    """Logarithms (M, BN / RATIO) of the sums over each block's tokens of weight times strides, in units of scores."""
    shape: tl.constexpr = [weight.shape[0], weight.shape[1] // RATIO, RATIO]
    total = tl.sum(tl.reshape(weight * strides[None, :], shape), 2)
    return (tl.log(total) if WIDE else tl.log2(total)) + top[:, None]


@triton.jit
def store_part(PART, TOP, TOTAL, part, out, top, total, heads, H: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    """Write one program's share of a row."""
    columns = tl.arange(0, DVP)
    keep = (heads < H)[:, None] & (columns < DV)[None, :]
    at = part.to(tl.int64) * H + heads
    tl.store(PART + at[:, None] * DV + columns[None, :], out, mask=keep)
    tl.store(TOP + at, top.to(TOP.dtype.element_ty), mask=heads < H)
    tl.store(TOTAL + at, total.to(TOTAL.dtype.element_ty), mask=heads < H)


@triton.jit(do_not_specialize=SIZES)
def nsa_step_compressed(
    QUERY,
    CKEY,
    CVALUE,
    LENGTH,
    TABLE,
    SCORE,
    PART,
    TOP,
    TOTAL,
    slots,
    croom,
    pages,
    capacity,
    width,
    G: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BS: tl.constexpr,
    SCORED: tl.constexpr,
    VALUED: tl.constexpr,
):
    """Grid (B * G * SPLITS,): a contiguous share of the compressed tokens.

    SCORE (B * G, H, 2, width) gets, per block, the logarithm of the sum over the tokens that start in it of exp(score)
    times the strides shared with that block, and times those shared with the next one: all that a block's score needs
    (paper eq. 9 and 10, kernel_size up to block_size + kernel_stride). Without SCORED it is not written, without VALUED
    no value is read.
    """
    RATIO: tl.constexpr = BS // STRIDE
    pid = tl.program_id(0)
    row, split = pid // SPLITS, pid % SPLITS
    b, g = row // G, row % G
    count = compressed_tokens(context(LENGTH, b, capacity), L, STRIDE)
    share = tl.cdiv(tl.cdiv(count, SPLITS), BN) * BN
    begin = split * share
    end = tl.minimum(begin + share, count)
    heads = tl.arange(0, M)
    columns = tl.arange(0, DKP)
    Q = QUERY + row.to(tl.int64) * (H * DK)
    keep = (heads < H)[:, None] & (columns < DK)[None, :]
    query = tl.load(Q + heads[:, None] * DK + columns[None, :], mask=keep, other=0.0)
    top = tl.full([M], LOWEST, tl.float64 if WIDE else tl.float32)
    total = tl.zeros([M], tl.float64 if WIDE else tl.float32)
    out = tl.zeros([M, DVP], tl.float32)
    kept = SCORE + (row.to(tl.int64) * H + heads)[:, None] * (2 * width)
    place = tl.arange(0, BN) % RATIO * STRIDE
    own_strides = (tl.minimum(place + L, BS) - place) // STRIDE
    next_strides = tl.maximum(place + L - BS, 0) // STRIDE
    for first in range(begin, end, BN):
        tokens = first + tl.arange(0, BN)
        inside = tokens < end
        rows = storage_rows(TABLE, pages, 0, b, g, tokens, inside, slots, croom, G, PAGE // STRIDE)
        score = scores_of(query, Q, CKEY, rows, heads, inside, H, DK, DKP, CHUNK, SCALE, WIDE)
        weight, decay, top, total = weigh(top, total, score, WIDE)
        if SCORED:
            blocks = first // RATIO + tl.arange(0, BN // RATIO)
            there = (heads < H)[:, None] & (blocks * RATIO < end)[None, :]
            tl.store(kept + blocks[None, :], block_logsum(weight, own_strides, top, RATIO, WIDE), mask=there)
            logsum = block_logsum(weight, next_strides, top, RATIO, WIDE)
            tl.store(kept + width + blocks[None, :], logsum, mask=there)
        if VALUED:
            out = add_values(out, weight, decay, CVALUE, rows, inside, DV, DVP)
    store_part(PART, TOP, TOTAL, row * PARTS + split, out, top, total, heads, H, DV, DVP)


@triton.jit(do_not_specialize=SIZES)
def nsa_step_attend(
    QUERY,
    KEY,
    VALUE,
    LENGTH,
    TABLE,
    PICK,
    PART,
    TOP,
    TOTAL,
    slots,
    room,
    pages,
    capacity,
    G: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BS: tl.constexpr,
    TOPK: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    BN: tl.constexpr,
    BEFORE: tl.constexpr,
    SELECTED: tl.constexpr,
    RECENT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (B * G * (SELECTED + RECENT),): selected blocks by SELECTED programs of a row, its window by RECENT.

    Parts are written behind the BEFORE parts of the compressed tokens.
    """
    SLOTS: tl.constexpr = (TOPK + SELECTED - 1) // SELECTED if SELECTED > 0 else 0
    TILES: tl.constexpr = (BS + BN - 1) // BN
    PIECE: tl.constexpr = (WINDOW + RECENT - 1) // RECENT if RECENT > 0 else 0
    pid = tl.program_id(0)
    row, split = pid // (SELECTED + RECENT), pid % (SELECTED + RECENT)
    b, g = row // G, row % G
    length = context(LENGTH, b, capacity)
    selected = split < SELECTED
    slot = split * SLOTS
    piece = tl.maximum(length - WINDOW, 0) + (split - SELECTED) * PIECE
    piece_end = tl.minimum(piece + PIECE, length)
    branch = tl.where(selected, 1, 2)
    heads = tl.arange(0, M)
    columns = tl.arange(0, DKP)
    Q = QUERY + row.to(tl.int64) * (H * DK)
    keep = (heads < H)[:, None] & (columns < DK)[None, :]
    query = tl.load(Q + heads[:, None] * DK + columns[None, :], mask=keep, other=0.0)
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DVP], tl.float32)
    for tile in range(tl.where(selected, SLOTS * TILES, tl.cdiv(tl.maximum(piece_end - piece, 0), BN))):
        at = slot + tile // TILES
        block = tl.load(PICK + row * TOPK + at, mask=selected & (at < TOPK), other=-1)
        first = tl.where(selected, block * BS + tile % TILES * BN, piece + tile * BN)
        block_end = tl.where(block >= 0, tl.minimum(block * BS + BS, length), 0)
        tokens = first + tl.arange(0, BN)
        inside = (tokens >= 0) & (tokens < tl.where(selected, block_end, piece_end))
        rows = storage_rows(TABLE, pages, branch, b, g, tokens, inside, slots, room, G, PAGE)
        score = scores_of(query, Q, KEY, rows, heads, inside, H, DK, DKP, 0, SCALE, WIDE)
        weight, decay, top, total = weigh(top, total, score, WIDE)
        out = add_values(out, weight, decay, VALUE, rows, inside, DV, DVP)
    store_part(PART, TOP, TOTAL, row * PARTS + BEFORE + split, out, top, total, heads, H, DV, DVP)
