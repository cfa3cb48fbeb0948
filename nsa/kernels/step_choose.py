"""The decode step's choice of blocks from the scores that compressed attention left, by the rules of ``nsa.scoring``.

In 16-bit types equal scores of blocks in different tiles may round a unit apart: ties break within scoring's bound,
where float32's 32 compared bits keep them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import LOWEST
from .step import compressed_tokens, power
from .step_append import SIZES, context

INDEX = tl.constexpr(20)
"""``nsa.scoring.INDEX_BITS``."""
LOW = tl.constexpr(2**20 - 1)
ROUND = tl.constexpr(2**19)
FORCED = tl.constexpr(0x7FF0_0000_0000_0000 >> 20)
"""``nsa.scoring.FORCED`` without the index bits."""


@triton.jit
def block_sums(kept, block, count, heads, width, H: tl.constexpr, STRIDE: tl.constexpr, BS: tl.constexpr):
    """Logarithms (HP, blocks) of what a block's own tokens, and those that reach into it, add to its score."""
    here = (heads < H)[:, None] & (block * (BS // STRIDE) < count)[None, :]
    own = tl.load(kept + block[None, :], mask=here, other=-float("inf"))
    before = (heads < H)[:, None] & ((block > 0) & ((block - 1) * (BS // STRIDE) < count))[None, :]
    return own, tl.load(kept + width + block[None, :] - 1, mask=before, other=-float("inf"))


@triton.jit
def row_sum(TOP, TOTAL, row, heads, H: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """Each head's maximum, and one over its total relative to that, of all compressed tokens."""
    part = (row.to(tl.int64) * PARTS + tl.arange(0, SPLITS))[None, :] * H + heads[:, None]
    tops = tl.load(TOP + part, mask=(heads < H)[:, None], other=LOWEST)
    totals = tl.load(TOTAL + part, mask=(heads < H)[:, None], other=0.0)
    top = tl.max(tops, 1)
    total = tl.sum(totals * power(tops - top[:, None], WIDE), 1)
    return top, tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def ranks_of(block, logsum, reaching, top, share, own, WIDE: tl.constexpr):
    """Ranks int64 of blocks: leading bits of the score above the index, all different."""
    weight = power(logsum - top[:, None], WIDE) + power(reaching - top[:, None], WIDE)
    score = tl.sum(weight * share[:, None], 0)
    bits = score.to(tl.float64).to(tl.int64, bitcast=True)
    leading = (bits + ROUND) >> INDEX
    leading = tl.where(block == own - 1, FORCED + 1, leading)
    leading = tl.where(block == own, FORCED + 2, leading)
    leading = tl.where(block == 0, FORCED + 3, leading)
    return (leading << INDEX) + (block ^ LOW)


@triton.jit
def pick_by_count(rank, block, RANK, PICK, own, TOPK: tl.constexpr, TP: tl.constexpr):
    """The TOPK blocks of highest rank among blocks 0 to ``own``, then -1: a block's slot is the number of those above.

    Compared with one scalar after the other: no shuffles and one barrier.
    """
    tl.store(RANK + block, rank, mask=block <= own)
    tl.debug_barrier()
    slot = tl.zeros_like(block)
    for first in range(0, own + 1, 16):
        for i in tl.static_range(16):
            other = tl.load(RANK + first + i, mask=first + i <= own, other=-1)
            slot += (other > rank).to(tl.int32)
    tl.store(PICK + slot, block, mask=(block <= own) & (slot < TOPK))
    slots = tl.arange(0, TP)
    tl.store(PICK + slots, tl.full([TP], -1, tl.int32), mask=(slots > own) & (slots < TOPK))


@triton.jit
def pick_by_maximum(RANK, PICK, own, TOPK: tl.constexpr, TP: tl.constexpr, NB: tl.constexpr):
    """The TOPK blocks of highest rank among blocks 0 to ``own``, then -1: one maximum after the other."""
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
    FEW: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Grid (B * G * SHARES,): PICK (B * G, TOPK) gets the row's blocks, then -1, by the rules of ``nsa.scoring``.

    Up to FEW blocks, or none where it is 0, are ranked and picked by one program of the row. Of more each program ranks
    a share, and the last one to finish picks: COUNTER (B * G,) is 0 before and after, RANK (B * G, NB) int64 scratch.
    """
    row = tl.program_id(0) // SHARES
    b = row // G
    position = context(LENGTH, b, capacity) - 1
    count = compressed_tokens(position + 1, L, STRIDE)
    own = position // BS
    heads = tl.arange(0, HP)
    kept = SCORE + (row.to(tl.int64) * H + heads)[:, None] * (2 * width)
    RANK += row.to(tl.int64) * NB
    if own < FEW:
        if tl.program_id(0) % SHARES == 0:
            block = tl.arange(0, max(FEW, 1))
            logsum, reaching = block_sums(kept, block, count, heads, width, H, STRIDE, BS)
            top, share = row_sum(TOP, TOTAL, row, heads, H, SPLITS, PARTS, WIDE)
            rank = ranks_of(block, logsum, reaching, top, share, own, WIDE)
            pick_by_count(rank, block, RANK, PICK + row * TOPK, own, TOPK, TP)
    else:
        top, share = row_sum(TOP, TOTAL, row, heads, H, SPLITS, PARTS, WIDE)
        begin = tl.program_id(0) % SHARES * tl.cdiv(own + 1, SHARES)
        end = tl.minimum(begin + tl.cdiv(own + 1, SHARES), own + 1)
        for first in range(begin, end, BJ):
            block = first + tl.arange(0, BJ)
            logsum, reaching = block_sums(kept, block, count, heads, width, H, STRIDE, BS)
            rank = ranks_of(block, logsum, reaching, top, share, own, WIDE)
            tl.store(RANK + block, rank, mask=block < end)
        tl.debug_barrier()  # every thread's stores come before the one thread's release
        if SHARES == 1:
            pick_by_maximum(RANK, PICK + row * TOPK, own, TOPK, TP, NB)
        else:
            if tl.atomic_add(COUNTER + row, 1, sem="acq_rel") == SHARES - 1:
                pick_by_maximum(RANK, PICK + row * TOPK, own, TOPK, TP, NB)
                tl.store(COUNTER + row, 0)
