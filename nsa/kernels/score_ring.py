"""Scores of blocks for compute capability 9.0, in Gluon: a tile is multiplied behind the last one's exponentials.

The probabilities of a block's tokens are added up before they are stored: a block has its own part, and what its tokens
reach over into the next one. Two tiles' scores take turns, written out twice, so that they never move between
registers, and nothing is in flight over the loop's edge, where ptxas would run products one by one.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .interval import Interval
from .layout import LOG2E, power_of_two
from .ring import describe_ring, key_end


@gluon.jit
def fetch(K, b, g, i, tiles, BN: gl.constexpr, ring, ready, STAGES: gl.constexpr):
    """Start copying tile ``i``, if there is one, into its slot."""
    slot = i % STAGES
    there = i < tiles
    mbarrier.expect(ready.index(slot), K.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(K, [b, g, i * BN, 0], ready.index(slot), ring.index(slot), pred=there)


@gluon.jit
def product(score, i, query, ring, ready, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Start the scores (BN, rows) of tile ``i`` in the registers of ``score``."""
    mbarrier.wait(ready.index(i % STAGES), (i // STAGES) & 1)
    keys = ring.index(i % STAGES).reshape([BN, D])
    return warpgroup_mma(keys, query, score, use_acc=False, is_async=True)


@gluon.jit
def fold(
    score, lse, i, end, line, kept, SUMS, plane, SCALE2: gl.constexpr, KERNEL: gl.constexpr, STRIDE: gl.constexpr,
    RATIO: gl.constexpr, BN: gl.constexpr, TOKENS: gl.constexpr, HP: gl.constexpr, MMA: gl.constexpr,
    OUT: gl.constexpr,
):  # fmt: skip
    """Tile ``i``'s probabilities, added over heads and over each block's tokens."""
    logsum = lse.load(gl.SliceLayout(0, MMA))
    weight = gl.exp2(score * SCALE2 - logsum[None, :])
    PAIRS: gl.constexpr = HP // 2
    total = gl.sum(gl.sum(weight.reshape([BN, TOKENS // 4, PAIRS, 4, 2]), 4), 2)
    total = gl.convert_layout(total.reshape([BN, TOKENS]), OUT)
    key = gl.arange(0, BN, gl.SliceLayout(1, OUT))
    total = gl.where(key[:, None] < end[None, :] - i * BN, total, 0.0)
    over = gl.maximum(key % RATIO + KERNEL // STRIDE - RATIO, 0)
    BLOCKS: gl.constexpr = BN // RATIO
    own = gl.sum((total * (KERNEL // STRIDE - over).to(gl.float32)[:, None]).reshape([BLOCKS, RATIO, TOKENS]), 1)
    beyond = gl.sum((total * over.to(gl.float32)[:, None]).reshape([BLOCKS, RATIO, TOKENS]), 1)
    block = i * BLOCKS + gl.arange(0, BLOCKS, gl.SliceLayout(1, own.type.layout))
    target = SUMS + gl.convert_layout(line, gl.SliceLayout(0, own.type.layout))[None, :] + block[:, None]
    there = gl.convert_layout(kept, gl.SliceLayout(0, own.type.layout))[None, :] & (block < plane)[:, None]
    gl.store(target, own, mask=there)
    gl.store(target + plane, beyond, mask=there)


@gluon.jit
def member(column, HP: gl.constexpr):
    """(token, head) of a column. The four lanes that share a row of scores hold two neighbouring columns of eight each;
    a token's heads are the pairs of one lane, so that adding them up takes no exchange between lanes."""
    octet = column // 8
    token = octet // (HP // 2) * 4 + column % 8 // 2
    return token, octet % (HP // 2) * 2 + column % 2


@gluon.jit(do_not_specialize=["FIRST", "S", "keys", "first"])
def nsa_score_ring(
    Q, K, LSE, SUMS, FIRST, S, first, keys, G, sqb, sqs, sqg, sqh, slb, sls, slg, slh, plane,
    H: gl.constexpr, HP: gl.constexpr, DK: gl.constexpr, KERNEL: gl.constexpr, STRIDE: gl.constexpr,
    RATIO: gl.constexpr, SCALE2: gl.constexpr, TOKENS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,): tiles of the S queries from ``first`` on -> SUMS (B, G, S, 2, plane): each block's own
    part, then what goes to the block after it; zero for tokens that do not exist for the row."""
    M: gl.constexpr = TOKENS * HP
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, M // (WARPS // 4), 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([RATIO, 1], [16, 2], [1, WARPS], [0, 1])
    TYPE: gl.constexpr = Q.dtype.element_ty
    pid = gl.program_id(0)
    tiles = gl.cdiv(S, TOKENS)
    tile = tiles - 1 - pid % tiles
    g = (pid // tiles) % G
    b = pid // (tiles * G)
    start = tile * TOKENS
    _, stop = key_end(FIRST + first + gl.minimum(start + TOKENS, S) - 1, keys, KERNEL, STRIDE)
    count = gl.cdiv(stop, BN)

    ring = gl.allocate_shared_memory(TYPE, [STAGES, 1, 1, BN, DK], gl.NVMMASharedLayout(128, 16, 4))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    for s in gl.static_range(STAGES):
        fetch(K, b, g, s, count, BN, ring, ready, STAGES)

    place = (first + start).to(gl.int64)
    row = gl.arange(0, M, gl.SliceLayout(1, LOAD))
    columns = gl.arange(0, DK, gl.SliceLayout(0, LOAD))
    base = Q + b.to(gl.int64) * sqb + g.to(gl.int64) * sqg + place * sqs
    token, head = member(row, HP)
    offset = (token * sqs + head * sqh)[:, None] + columns[None, :]
    there = (start + token < S) & (head < H)
    loaded = gl.load(base + offset, mask=there[:, None], other=0.0)
    query = gl.allocate_shared_memory(TYPE, [M, DK], gl.NVMMASharedLayout(128, 16, 2), loaded).permute((1, 0))
    token, head = member(gl.arange(0, M, gl.SliceLayout(0, MMA)), HP)
    base = LSE + b.to(gl.int64) * slb + g.to(gl.int64) * slg + place * sls
    there = (start + token < S) & (head < H)
    logsum = gl.load(base + token * sls + head * slh, mask=there, other=float("inf"))
    lse = gl.allocate_shared_memory(gl.float32, [M], gl.SwizzledSharedLayout(1, 1, 1, [0]), logsum)
    query_of = start + gl.arange(0, TOKENS, gl.SliceLayout(0, OUT))
    _, end = key_end(FIRST + first + query_of, keys, KERNEL, STRIDE)
    line = ((b * G + g) * S + query_of).to(gl.int64) * (2 * plane)
    kept = query_of < S
    fence_async_shared()
    gl.thread_barrier()

    even = gl.zeros([BN, M], gl.float32, MMA)
    odd = gl.zeros([BN, M], gl.float32, MMA)
    if count > 0:
        flight = product(even, 0, query, ring, ready, BN, DK, STAGES)
        even = warpgroup_mma_wait(0, deps=(flight,))
        pairs = (count - 1) // 2
        for j in range(pairs):
            i = 2 * j
            flight = product(odd, i + 1, query, ring, ready, BN, DK, STAGES)
            gl.thread_barrier()
            fetch(K, b, g, i + STAGES, count, BN, ring, ready, STAGES)
            fold(
                even, lse, i, end, line, kept, SUMS, plane, SCALE2, KERNEL, STRIDE, RATIO, BN, TOKENS, HP, MMA, OUT
            )  # fmt: skip
            odd = warpgroup_mma_wait(0, deps=(flight,))
            flight = product(even, i + 2, query, ring, ready, BN, DK, STAGES)
            gl.thread_barrier()
            fetch(K, b, g, i + 1 + STAGES, count, BN, ring, ready, STAGES)
            fold(
                odd, lse, i + 1, end, line, kept, SUMS, plane, SCALE2, KERNEL, STRIDE, RATIO, BN, TOKENS, HP, MMA, OUT
            )  # fmt: skip
            even = warpgroup_mma_wait(0, deps=(flight,))
        i = 2 * pairs
        after = gl.minimum(i + 1, count - 1)
        flight = product(odd, after, query, ring, ready, BN, DK, STAGES)
        fold(even, lse, i, end, line, kept, SUMS, plane, SCALE2, KERNEL, STRIDE, RATIO, BN, TOKENS, HP, MMA, OUT)
        odd = warpgroup_mma_wait(0, deps=(flight,))
        if after > i:
            fold(
                odd, lse, after, end, line, kept, SUMS, plane, SCALE2, KERNEL, STRIDE, RATIO, BN, TOKENS, HP, MMA, OUT
            )  # fmt: skip


def score_blocks(
    query: Tensor,
    key: Tensor,
    logsum: Tensor,
    sums: Tensor,
    interval: Interval,
    *,
    first: int,
    count: int,
    there: int,
    plane: int,
    scale: float,
    ratio: int,
    tokens: int,
    keys: int,
    options: dict[str, int],
) -> None:
    """Fill ``sums`` (B, G, count, 2, plane) for the ``count`` queries from ``first`` on, of which ``there`` compressed
    tokens exist for some. ``ratio``: strides of a block."""
    batch, _, groups, heads, width = query.shape
    nsa_score_ring[(batch * groups * triton.cdiv(count, tokens),)](
        query, describe_ring(key, there, keys), logsum, sums, interval.first_position, count, first, there, groups,
        *query.stride()[:4], *logsum.stride(), plane, H=heads, HP=power_of_two(heads), DK=width,
        KERNEL=interval.kernel_size, STRIDE=interval.kernel_stride, RATIO=ratio, SCALE2=scale * LOG2E, TOKENS=tokens,
        BN=keys, STAGES=options["num_stages"], **options,
    )  # fmt: skip
