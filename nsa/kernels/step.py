"""The decode step's second half: compressed attention, choice of blocks, attention over them and the window, gates.

Four kernels, each a grid of fixed size whatever the context: the position of each entry is read from the device, so
that one captured graph serves every step. A group (b, g) is a row; its attention is dealt to ``PARTS`` programs, those
of the compressed tokens first, then those of the selected blocks, then the window's, and ``nsa_step_combine`` merges
them. With WIDE (float32) scores are float64 and in natural units, as ``nsa.scoring`` asks; otherwise float32, base 2.
Then equal scores of blocks in different tiles may round a unit apart: 16-bit types break ties within scoring's bound,
where float32's 32 compared bits keep them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import LOWEST
from .step_append import SIZES, await_launch, context, storage_rows

INDEX = tl.constexpr(20)
"""``nsa.scoring.INDEX_BITS``."""
LOW = tl.constexpr(2**20 - 1)
ROUND = tl.constexpr(2**19)
FORCED = tl.constexpr(0x7FF0_0000_0000_0000 >> 20)
"""``nsa.scoring.FORCED`` without the index bits."""


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
    DEPENDENT: tl.constexpr,
):
    """Grid (B * G * SPLITS,): a contiguous share of the compressed tokens.

    SCORE (B * G, H, 2, width) gets, per block, the logarithm of the sum over the tokens that start in it of exp(score)
    times the strides shared with that block, and times those shared with the next one: all that a block's score needs
    (paper eq. 9 and 10, kernel_size up to block_size + kernel_stride). Without SCORED it is not written, without VALUED
    no value is read.
    """
    await_launch(DEPENDENT)
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


@triton.jit
def pick_blocks(RANK, PICK, own, TOPK: tl.constexpr, TP: tl.constexpr, NB: tl.constexpr):
    """The TOPK blocks of highest rank among blocks 0 to ``own``, then -1."""
    block = tl.arange(0, NB)
    rank = tl.load(RANK + block, mask=block <= own, other=-1, cache_modifier=".cg")
    chosen = tl.minimum(own + 1, TOPK)
    slots = tl.arange(0, TP)
    picks = tl.full([TP], -1, tl.int32)
    for slot in range(chosen):
        best = tl.max(rank, 0)
        picks = tl.where(slots == slot, ((best & LOW) ^ LOW).to(tl.int32), picks)
        rank = tl.where(rank == best, -1, rank)
    tl.store(PICK + slots, picks, mask=slots < TOPK)


@triton.jit(do_not_specialize=SIZES)
def nsa_step_choose(
    SCORE,
    TOP,
    TOTAL,
    LENGTH,
    RANK,
    PICK,
    COUNTER,
    capacity,
    width,
    G: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    BS: tl.constexpr,
    TOPK: tl.constexpr,
    TP: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BJ: tl.constexpr,
    NB: tl.constexpr,
    SHARES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (B * G * SHARES,): PICK (B * G, TOPK) gets the row's blocks, then -1, by the rules of ``nsa.scoring``.

    Each program ranks a share of the row's blocks, and the last one to finish picks: COUNTER (B * G,) is 0 before and
    after. RANK (B * G, NB) int64 is scratch: a block's leading score bits above its index, all different.
    """
    await_launch(DEPENDENT)
    row = tl.program_id(0) // SHARES
    b = row // G
    position = context(LENGTH, b, capacity) - 1
    count = compressed_tokens(position + 1, L, STRIDE)
    own = position // BS
    heads = tl.arange(0, HP)
    part = (row.to(tl.int64) * PARTS + tl.arange(0, SPLITS))[None, :] * H + heads[:, None]
    tops = tl.load(TOP + part, mask=(heads < H)[:, None], other=LOWEST)
    top = tl.max(tops, 1)
    totals = tl.load(TOTAL + part, mask=(heads < H)[:, None], other=0.0)
    total = tl.sum(totals * power(tops - top[:, None], WIDE), 1)
    share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    kept = SCORE + (row.to(tl.int64) * H + heads)[:, None] * (2 * width)
    RANK += row.to(tl.int64) * NB
    begin = tl.program_id(0) % SHARES * tl.cdiv(own + 1, SHARES)
    end = tl.minimum(begin + tl.cdiv(own + 1, SHARES), own + 1)
    for first in range(begin, end, BJ):
        block = first + tl.arange(0, BJ)
        here = (heads < H)[:, None] & (block * (BS // STRIDE) < count)[None, :]
        logsum = tl.load(kept + block[None, :], mask=here, other=-float("inf"))
        before = (heads < H)[:, None] & ((block > 0) & ((block - 1) * (BS // STRIDE) < count))[None, :]
        reaching = tl.load(kept + width + block[None, :] - 1, mask=before, other=-float("inf"))
        weight = power(logsum - top[:, None], WIDE) + power(reaching - top[:, None], WIDE)
        score = tl.sum(weight * share[:, None], 0)
        bits = score.to(tl.float64).to(tl.int64, bitcast=True)
        leading = (bits + ROUND) >> INDEX
        leading = tl.where(block == own - 1, FORCED + 1, leading)
        leading = tl.where(block == own, FORCED + 2, leading)
        leading = tl.where(block == 0, FORCED + 3, leading)
        tl.store(RANK + block, (leading << INDEX) + (block ^ LOW), mask=block < end)
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    if SHARES == 1:
        pick_blocks(RANK, PICK + row * TOPK, own, TOPK, TP, NB)
    else:
        if tl.atomic_add(COUNTER + row, 1, sem="acq_rel") == SHARES - 1:
            pick_blocks(RANK, PICK + row * TOPK, own, TOPK, TP, NB)
            tl.store(COUNTER + row, 0)


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
    DEPENDENT: tl.constexpr,
):
    """Grid (B * G * (SELECTED + RECENT),): selected blocks by SELECTED programs of a row, its window by RECENT.

    Parts are written behind the BEFORE parts of the compressed tokens.
    """
    await_launch(DEPENDENT)
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


@triton.jit
def merged(PART, TOP, TOTAL, first, i, columns, raw, H: tl.constexpr, DV: tl.constexpr, COUNT: tl.constexpr,
           GATED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Head i's attention (DVP,) from the COUNT parts from ``first`` on, times its gate; zeros where there is no key."""
    out = tl.zeros([columns.shape[0]], tl.float32)
    if COUNT > 0:
        at = (first + tl.arange(0, COUNT)).to(tl.int64) * H + i
        tops = tl.load(TOP + at)
        weight = power(tops - tl.max(tops, 0), WIDE)
        total = tl.sum(weight * tl.load(TOTAL + at), 0)
        weight = (weight / tl.where(total > 0, total, 1.0)).to(tl.float32)
        parts = tl.load(PART + at[:, None] * DV + columns[None, :], mask=(columns < DV)[None, :], other=0.0)
        out = tl.sum(parts * weight[:, None], 0)
        if GATED:
            out = out / (1.0 + tl.exp(-raw))
    return out


@triton.jit
def nsa_step_combine(
    PROJECTED,
    BIAS,
    PART,
    TOP,
    TOTAL,
    MIXED,
    LENGTH,
    width,
    G: tl.constexpr,
    H: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    GATE: tl.constexpr,
    COMPRESSED: tl.constexpr,
    SELECTED: tl.constexpr,
    RECENT: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (B * G * H,): merge the parts of each branch that has any, gate, add; then the entry is one token longer.

    A branch's parts begin at 0, SECOND and THIRD. Gates stand in PROJECTED from column GATE on, three per head; without
    GATED they are 1.
    """
    await_launch(DEPENDENT)
    pid = tl.program_id(0)
    i, b = pid % H, pid // (G * H)
    first = pid // H * PARTS
    columns = tl.arange(0, DVP)
    at = pid % (G * H) * 3
    gates = PROJECTED + b.to(tl.int64) * width + GATE + at
    raw0 = tl.load(gates).to(tl.float32) + tl.load(BIAS + at).to(tl.float32)
    raw1 = tl.load(gates + 1).to(tl.float32) + tl.load(BIAS + at + 1).to(tl.float32)
    raw2 = tl.load(gates + 2).to(tl.float32) + tl.load(BIAS + at + 2).to(tl.float32)
    out = merged(PART, TOP, TOTAL, first, i, columns, raw0, H, DV, COMPRESSED, GATED, WIDE)
    out += merged(PART, TOP, TOTAL, first + SECOND, i, columns, raw1, H, DV, SELECTED, GATED, WIDE)
    out += merged(PART, TOP, TOTAL, first + THIRD, i, columns, raw2, H, DV, RECENT, GATED, WIDE)
    tl.store(MIXED + pid.to(tl.int64) * DV + columns, out.to(MIXED.dtype.element_ty), mask=columns < DV)
    if pid % (G * H) == 0:
        tl.store(LENGTH + b, tl.load(LENGTH + b) + 1)
