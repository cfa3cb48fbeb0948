"""Scoring and top-k, fused: compressed probabilities summed over a group's heads, then blocks ranked, chunk by chunk.

``nsa_score_tokens`` takes the log-sum-exp of the compressed attention, or finds it, and leaves for each row the sum
over heads of every compressed token's probability. ``nsa_rank_blocks`` folds them into block scores and picks the best
by the rules of ``nsa.scoring``. Only a chunk of queries x compressed tokens is ever held. Neither is differentiated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..trace import ParameterValue
from .interval import (
    Interval,
    describe,
    existing_keys,
    key_bounds,
    launch_options,
    least_tokens,
    row_positions,
    sizes,
    tile_bounds,
)
from .layout import LOG2E, LOWEST, load_query, load_rows, power_of_two, unit_last
from .support import RING_WIDTHS

CHUNK_ELEMENTS = 2**26
"""Sums held at once: 256 MiB in float32, 512 MiB in float64."""
RANK_BLOCKS = 512
"""Blocks that one warp ranks: 16 for each lane."""


@triton.constexpr_function
def sum_type(tensor):
    """float64 for float64, else float32."""
    return tl.float64 if tensor.dtype == tl.float64 else tl.float32


@triton.constexpr_function
def shared_strides(start, kernel_size, stride, block_size):
    """Strides that a token which starts at ``start`` of a block shares with it."""
    return (min(start + kernel_size, block_size) - max(start, 0)) // stride


@triton.jit
def log_sums(
    K0, K1, q0, q1, b, g, end, skb, skg, skt, SCALE2: tl.constexpr, M: tl.constexpr,
    DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, BN: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of exp2 of scaled scores over keys 0 .. end of each row; +inf for a row without keys."""
    top = tl.full([M], LOWEST, sum_type(q0))
    total = tl.zeros([M], sum_type(q0))
    keys = tl.max(end, 0)
    for i in range(tl.cdiv(keys, BN)):
        start = i * BN + keys * 0
        k0 = load_rows(K0, b, g, start, keys - start, skb, skg, skt, 0, DK, DK0, BN, DESCRIPTOR, False).to(q0.dtype)
        score = tl.dot(q0, tl.trans(k0), input_precision="ieee", out_dtype=sum_type(q0))
        if DK1 > 0:
            k1 = load_rows(K1, b, g, start, keys - start, skb, skg, skt, DK0, DK, DK1, BN, DESCRIPTOR, False).to(
                q0.dtype
            )
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee", out_dtype=sum_type(q0))
        key = start + tl.arange(0, BN)
        score = tl.where(key[None, :] < end[:, None], score * SCALE2, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(score - new_top[:, None]), 1)
        top = new_top
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))


@triton.jit(do_not_specialize=["FIRST", "S", "keys", "first"])
def nsa_score_tokens(
    Q, K0, K1, LSE, SUMS, FIRST, POSITION, S, first, keys, G, spb, sps, sqb, sqs, sqg, sqh, skb, skg, skt,
    slb, sls, slg, slh, plane,
    H: tl.constexpr, HP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, RATIO: tl.constexpr, SCALE2: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr,
    DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,): tiles of the S queries from ``first`` on -> SUMS (B, G, S, RATIO, plane), token i at
    (i % RATIO, i // RATIO), up to the tile's last existing one; what lies beyond a row's own is not its probability.

    Scores stand transposed, (keys, rows): the heads of a token are then neighbouring columns, most of them in one
    thread, and adding them up takes few shuffles.
    """
    M: tl.constexpr = TOKENS * HP
    pid = tl.program_id(0)
    tiles = tl.cdiv(S, TOKENS)
    tile = tiles - 1 - pid % tiles
    g = (pid // tiles) % G
    b = pid // (tiles * G)
    rows = tl.arange(0, M)
    member = rows // HP
    head = rows % HP
    tokens = tl.arange(0, TOKENS)
    position = row_positions(FIRST, POSITION, b, first + tl.minimum(tile * TOKENS + tokens, S - 1), spb, sps)
    last = first + tl.minimum(tile * TOKENS + TOKENS, S) - 1
    _, _, stop = tile_bounds(position, FIRST, POSITION, first + tile * TOKENS, last, keys, KERNEL, STRIDE, 0)
    there = (tile * TOKENS + member < S) & (head < H)
    start = (first + tile * TOKENS).to(tl.int64)
    base = Q + b.to(tl.int64) * sqb + g.to(tl.int64) * sqg + start * sqs
    q0 = load_query(base, rows, member * sqs + head * sqh, there, 0, DK, DK0)
    q1 = q0
    if DK1 > 0:
        q1 = load_query(base, rows, member * sqs + head * sqh, there, DK0, DK, DK1)
    if WIDE:
        q0 = q0.to(tl.float64)
        q1 = q1.to(tl.float64)
    if LSE is not None:
        base = LSE + b.to(tl.int64) * slb + g * slg + start * sls
        logsum = tl.load(base + member * sls + head * slh, mask=there, other=float("inf"))
    else:
        s = first + tl.minimum(tile * TOKENS + member, S - 1)
        _, own = key_bounds(row_positions(FIRST, POSITION, b, s, spb, sps), keys, KERNEL, STRIDE, 0)
        logsum = log_sums(K0, K1, q0, q1, b, g, own, skb, skg, skt, SCALE2, M, DK, DK0, DK1, BN, DESCRIPTOR)
        logsum = tl.where(there, logsum, float("inf"))
    row = (((b * G + g) * S + tile * TOKENS).to(tl.int64) + tokens) * (RATIO * plane)
    kept = tile * TOKENS + tokens < S
    for i in range(tl.cdiv(stop, BN)):
        begin = i * BN + stop * 0
        k0 = load_rows(K0, b, g, begin, stop - begin, skb, skg, skt, 0, DK, DK0, BN, DESCRIPTOR, False).to(q0.dtype)
        score = tl.dot(k0, tl.trans(q0), input_precision="ieee", out_dtype=sum_type(q0))
        if DK1 > 0:
            k1 = load_rows(K1, b, g, begin, stop - begin, skb, skg, skt, DK0, DK, DK1, BN, DESCRIPTOR, False).to(
                q0.dtype
            )
            score = tl.dot(k1, tl.trans(q1), score, input_precision="ieee", out_dtype=sum_type(q0))
        weight = tl.exp2(score * SCALE2 - logsum[None, :])
        total = tl.sum(tl.reshape(weight, [BN, TOKENS, HP]), 2)
        key = begin + tl.arange(0, BN)
        place = key % RATIO * plane + key // RATIO
        tl.store(SUMS + row[None, :] + place[:, None], total, mask=(key < stop)[:, None] & kept[None, :])


@triton.jit
def last_chosen(key, TOPK: tl.constexpr):
    """The TOPK-th largest of different keys, or -1 where there are fewer above -1."""
    least = tl.max(key, 0)
    for _ in range(TOPK - 1):
        least = tl.max(tl.where(key < least, key, -1), 0)
    return least


@triton.jit(do_not_specialize=["FIRST", "S", "first", "keys", "queries"])
def nsa_rank_blocks(
    SUMS, BLOCKS, FIRST, POSITION, S, first, keys, queries, G, spb, sps, plane,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    FOLDED: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, NB: tl.constexpr, INDEX_BITS: tl.constexpr,
    FORCED: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * S,), a row each: SUMS as ``nsa_score_tokens`` left them, FOLDED as ``nsa_score_ring`` did -> BLOCKS
    (B, queries, G, TOPK) from query ``first`` on.

    A block adds its tokens in ascending order. Keys rank as in ``nsa.scoring.rank_blocks`` and are all different, so
    those from the TOPK-th largest on are the choice, and a running count puts them in ascending order. In float32 the
    scores themselves, half as wide, serve where no two of those are equal.
    """
    pid = tl.program_id(0)
    s = pid % S
    g = (pid // S) % G
    b = pid // (S * G)
    position = row_positions(FIRST, POSITION, b, first + s, spb, sps)
    _, end = key_bounds(position, keys, KERNEL, STRIDE, 0)
    block = tl.arange(0, NB)
    if FOLDED:
        row = SUMS + pid.to(tl.int64) * (2 * plane) + block
        score = tl.load(row + plane - 1, mask=(block > 0) & ((block - 1) * RATIO < end), other=0.0)
        score += tl.load(row, mask=block * RATIO < end, other=0.0)
    else:
        row = SUMS + pid.to(tl.int64) * (RATIO * plane)
        score = tl.zeros([NB], SUMS.dtype.element_ty)
        for place in tl.static_range(KERNEL // STRIDE - 1 + RATIO):
            token = block * RATIO + (place - KERNEL // STRIDE + 1)
            part = row + token % RATIO * plane + token // RATIO
            part = tl.load(part, mask=(token >= 0) & (token < end), other=0.0)
            score += part * shared_strides(place * STRIDE - KERNEL + STRIDE, KERNEL, STRIDE, SIZE)
    own = position // SIZE
    chosen = block <= own
    tied = True
    if not WIDE:
        value = score.to(tl.int32, bitcast=True)
        value = tl.where(block == own - 1, 0x7F800001, value)
        value = tl.where(block == own, 0x7F800002, value)
        value = tl.where(block == 0, 0x7F800003, value)
        value = tl.where(block <= own, value, -1)
        chosen = (value >= last_chosen(value, TOPK)) & (value >= 0)
        tied = tl.sum(chosen.to(tl.int32), 0) > TOPK
    if tied:
        rank = (score.to(tl.float64).to(tl.int64, bitcast=True) + (1 << (INDEX_BITS - 1))) >> INDEX_BITS
        rank = tl.where(block == own - 1, FORCED + 1, rank)
        rank = tl.where(block == own, FORCED + 2, rank)
        rank = tl.where(block == 0, FORCED + 3, rank)
        key = (rank << INDEX_BITS) + ((1 << INDEX_BITS) - 1 - block)
        key = tl.where(block <= own, key, -1)
        chosen = (key >= last_chosen(key, TOPK)) & (key >= 0)
    count = tl.cumsum(chosen.to(tl.int32), 0)
    target = BLOCKS + ((b.to(tl.int64) * queries + first + s) * G + g) * TOPK
    tl.store(target + count - 1, block, mask=chosen)
    slots = tl.arange(0, SLOTS)
    tl.store(target + slots, -1, mask=(slots < TOPK) & (slots >= tl.max(count, 0)))


def tiles(
    query: Tensor, key: Tensor, wide: bool, interval: Interval, logsum: Tensor | None, block_size: int
) -> dict[str, ParameterValue]:
    """Tile and launch for query (B, S, G, h, Dk) and key (B, G, N, Dk); ``wide``: scores are float64."""
    aligned = all(stride * key.element_size() % 16 == 0 for stride in key.stride()[:3]) and key.data_ptr() % 16 == 0
    capability = torch.cuda.get_device_capability(key.device) if key.is_cuda else (0, 0)
    large = query.shape[4] > 128
    bulk = aligned and capability >= (9, 0) and not wide
    known = logsum is not None and interval.positions is None
    heads = power_of_two(query.shape[3])
    fitting = query.shape[4] in RING_WIDTHS and 2 <= heads <= 32
    fitting = fitting and interval.kernel_size <= block_size <= 64 * interval.kernel_stride
    if bulk and capability[0] == 9 and known and fitting and 64 * interval.kernel_stride % block_size == 0:
        tokens = 128 // heads
        return {"tokens": tokens, "keys": 64, "warps": 4, "stages": 2, "loads": "ring", "registers": 168}
    return {
        "tokens": max(1, (64 if wide else 128 if large else 256) // power_of_two(query.shape[3])),
        "keys": 32 if wide else 64,
        "warps": 4 if wide or large else 8,
        "stages": 1 if wide else 2,
        "loads": "descriptor" if bulk else "pointer",
        "registers": 112 if bulk and not large else 0,
    }


def choose(
    query: Tensor,
    key: Tensor,
    interval: Interval,
    logsum: Tensor | None,
    scale: float,
    *,
    block_size: int,
    topk: int,
    blocks: int,
    wide: bool,
    index_bits: int,
    forced: int,
    tokens: ParameterValue,
    keys: ParameterValue,
    warps: ParameterValue,
    stages: ParameterValue,
    loads: ParameterValue,
    registers: ParameterValue,
) -> Tensor:
    """Blocks (B, S, G, topk) int32, ascending, then -1, of query (B, S, G, h, Dk) and compressed key (B, G, N, Dk).

    ``blocks`` of the context; ``wide``: score in float64; ``logsum`` (B, S, G, h) float32, base 2, of the compressed
    attention with this scale, or None = found here, but by ``loads`` "ring", the kernel of ``score_ring``.
    ``index_bits`` and ``forced`` are those of ``nsa.scoring``.
    """
    if scale < 0:
        query, scale = -query, -scale
    batch, queries, groups = unit_last(query, "query").shape[:3]
    constants = sizes(query, unit_last(key, "key"))
    del constants["DV"], constants["DVP"]
    tile = least_tokens(int(tokens), constants["HP"])
    there = existing_keys(interval, queries, key.shape[2])
    sources = (key, key)
    if loads == "descriptor" and there:
        second = describe(key, there, int(keys), constants["DK1"]) if constants["DK1"] else None
        sources = (describe(key, there, int(keys), constants["DK0"]), second)
    ratio = block_size // interval.kernel_stride
    folded = loads == "ring"
    plane = triton.cdiv(max(1, triton.cdiv(there, ratio)), 16) * 16
    row = batch * groups * (2 if folded else ratio) * plane
    chunk = max(1, min(queries, CHUNK_ELEMENTS // row))
    if chunk < queries:
        chunk = max(tile, chunk // tile * tile)
    dtype = torch.float64 if wide else torch.float32
    sums = torch.empty(row * chunk, dtype=dtype, device=query.device)
    chosen = torch.empty((batch, queries, groups, topk), dtype=torch.int32, device=query.device)
    position, positions, *position_strides = interval.arguments
    logsum_strides = (0, 0, 0, 0) if logsum is None else logsum.stride()
    rule = {"KERNEL": interval.kernel_size, "STRIDE": interval.kernel_stride, "WIDE": wide}
    launch = launch_options(warps, stages, registers)
    for first in range(0, queries, chunk):
        count = min(chunk, queries - first)
        upto = existing_keys(interval, first + count, key.shape[2])
        reach = blocks if positions is not None else (position + first + count - 1) // block_size + 1
        if upto and folded and logsum is not None:
            from .score_ring import score_blocks  # Gluon, loaded where it can run

            score_blocks(
                query, key, logsum, sums, interval, first=first, count=count, there=upto, plane=plane, scale=scale,
                ratio=ratio, tokens=tile, keys=int(keys), options=launch,
            )  # fmt: skip
        elif upto:
            nsa_score_tokens[(batch * groups * triton.cdiv(count, tile),)](
                query, *sources, logsum, sums, position, positions, count, first, upto, groups,
                *position_strides, *query.stride()[:4], *key.stride()[:3], *logsum_strides, plane,
                **constants, **rule, RATIO=ratio, SCALE2=scale * LOG2E, TOKENS=tile, BN=int(keys),
                DESCRIPTOR=loads == "descriptor", **launch,
            )  # fmt: skip
        held = power_of_two(max(1, min(reach, blocks)))
        nsa_rank_blocks[(batch * groups * count,)](
            sums, chosen, position, positions, count, first, upto, queries, groups, *position_strides, plane,
            **rule, RATIO=ratio, SIZE=block_size, FOLDED=folded, TOPK=topk, SLOTS=power_of_two(topk), NB=held,
            INDEX_BITS=index_bits, FORCED=forced >> index_bits,
            num_warps=max(1, min(8, held // RANK_BLOCKS)),
        )  # fmt: skip
    return chosen
