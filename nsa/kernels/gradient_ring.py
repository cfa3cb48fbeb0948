"""``gradient_products.nsa_gradient_block`` for compute capability 9.0, in Gluon: no product waits for another.

Scores stand transposed, (keys, rows). A producer warp copies rows in bulk into a ring, which keeps them off the pipe
that products read shared operands through. A turn's three products are in flight together. The next turn's begin when
the partial query gradients are stored, behind a barrier, so that they take those gradients' registers. No product is
in flight over the loop's edge, where ptxas would run them one by one.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..attend import aligned
from .invert import listed_item
from .layout import context_length, power_of_two


@constexpr_function
def columns_layout(rows, columns):
    """(rows, columns): rows as an accumulator holds them as columns, ``columns`` of a row in one thread."""
    across = [[0, 1 << bit] for bit in range(columns.bit_length() - 1)]
    along = [[1 << bit, 0] for bit in (0, *range(3, rows.bit_length() - 1))]
    lanes = [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(across + along, lanes, [[0, 0], [0, 0]], [], [rows, columns])


@constexpr_function
def tokens_layout(tokens, heads):
    """(tokens, heads): rows as an accumulator holds them as columns, by token and head."""
    bits = [[0, 1 << bit] for bit in range(heads.bit_length() - 1)]
    bits += [[1 << bit, 0] for bit in range(tokens.bit_length() - 1)]
    lanes = [*bits[1:3], *[[0, 0]] * 3] if heads > 1 else [[0, 0]] * 5
    own = [*bits[:1], *bits[3:]] if heads > 1 else bits
    return gl.DistributedLinearLayout(own, lanes, [[0, 0], [0, 0]], [], [tokens, heads])


@gluon.jit
def copy_rows(
    SOURCE, b, s, g, ready, tiles, slot, j, WIDTH: gl.constexpr, TOKENS: gl.constexpr
):  # fmt: skip
    """Start copying token ``s``'s heads to rows of token ``j`` of a slot."""
    PIECES: gl.constexpr = WIDTH // 64
    for piece in gl.static_range(PIECES):
        target = tiles.index((slot * PIECES + piece) * TOKENS + j)
        tma.async_copy_global_to_shared(SOURCE, [b, s, g, 0, piece * 64], ready, target)


@gluon.jit
def produce(
    Q, GRAD, ROWS, pairs, low, high, b, g, S, G, qring, gring, rring, ready, free,
    NP: gl.constexpr, HP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the rings, turn by turn. Past the end the last pair stands again."""
    SIX: gl.constexpr = gl.NVMMASharedLayout(128, 16, 5)
    qtiles = qring._reinterpret(Q.dtype, [STAGES * (DK // 64) * TOKENS, 1, 1, 1, HP, 64], SIX)
    gtiles = gring._reinterpret(Q.dtype, [STAGES * (DV // 64) * TOKENS, 1, 1, 1, HP, 64], SIX)
    rtiles = rring._reinterpret(gl.float32, [STAGES * TOKENS, 1, HP, 4], gl.NVMMASharedLayout(0, 32, 3))
    for start in range(low, high, TOKENS):
        turn = (start - low) // TOKENS
        slot = turn % STAGES
        barrier = ready.index(slot)
        s0 = gl.load(pairs + start) // NP
        s1, s2, s3 = s0, s0, s0
        if TOKENS > 1:
            s1 = gl.load(pairs + gl.minimum(start + 1, high - 1)) // NP
        if TOKENS > 2:
            s2 = gl.load(pairs + gl.minimum(start + 2, high - 1)) // NP
            s3 = gl.load(pairs + gl.minimum(start + 3, high - 1)) // NP
        mbarrier.wait(free.index(slot), ((turn // STAGES) & 1) ^ 1)
        mbarrier.expect(barrier, TOKENS * HP * ((DK + DV) * 2 + 16))
        for j in gl.static_range(TOKENS):
            s = s0 if j == 0 else s1 if j == 1 else s2 if j == 2 else s3
            tma.async_copy_global_to_shared(ROWS, [(b * S + s) * G + g, 0, 0], barrier, rtiles.index(slot * TOKENS + j))
            copy_rows(Q, b, s, g, barrier, qtiles, slot, j, DK, TOKENS)
            copy_rows(GRAD, b, s, g, barrier, gtiles, slot, j, DV, TOKENS)


@gluon.jit
def rows_of_keys(SOURCE, b, g, first, left, sb, sg, st, WIDTH: gl.constexpr, BS: gl.constexpr):
    """Shared (BS, WIDTH): keys from ``first`` on, of which ``left`` exist."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    keys = gl.arange(0, BS, gl.SliceLayout(1, LOAD))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, LOAD))
    base = SOURCE + b.to(gl.int64) * sb + g.to(gl.int64) * sg + first.to(gl.int64) * st
    tile = gl.load(base + (keys[:, None] * st + columns[None, :]), mask=(keys < left)[:, None], other=0.0)
    return gl.allocate_shared_memory(tile.dtype, [BS, WIDTH], gl.NVMMASharedLayout(128, 16, 2), tile)


@gluon.jit
def known_of_rows(ring, slot, TOKENS: gl.constexpr, HP: gl.constexpr, ROW: gl.constexpr):
    """(log-sum-exp, delta, limit) of a slot's rows."""
    M: gl.constexpr = TOKENS * HP
    both = ring.index(slot).slice(0, 2, dim=1).load(columns_layout(M, 2))
    logsum, delta = gl.split(both)
    tokens = ring._reinterpret(gl.float32, [ring.shape[0], TOKENS, HP * 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    limit = tokens.index(slot).slice(2, 1, dim=1).load(tokens_layout(TOKENS, 1))
    spread: gl.constexpr = gl.SliceLayout(1, tokens_layout(TOKENS, HP))
    limit = gl.convert_layout(limit.reshape([TOKENS]), spread, assert_trivial=True).to(gl.int32, bitcast=True)
    limit = limit[:, None].broadcast_to([TOKENS, HP]).reshape([M])
    return gl.convert_layout(logsum, ROW), gl.convert_layout(delta, ROW), gl.convert_layout(limit, ROW)


@constexpr_function
def parts_layout(units, last):
    """(4, 8, 4, units, last): lanes hold the first two dims, warps the third, a thread the others."""
    own = [[0, 0, 0, 0, 1 << bit] for bit in range(last.bit_length() - 1)]
    own += [[0, 0, 0, 1 << bit, 0] for bit in range(units.bit_length() - 1)]
    lanes = [[1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 4, 0, 0, 0]]
    return gl.DistributedLinearLayout(own, lanes, [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0]], [], [4, 8, 4, units, last])


@gluon.jit
def store_query_part(
    dq, target, left, M: gl.constexpr, H: gl.constexpr, HP: gl.constexpr, DK: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Store partial query gradients (DK, M) of the first ``left`` tokens as threads hold them: in the order of
    ``gradient_products.store_query_part``, or PAIRED, two heads' in one piece."""
    ROWS: gl.constexpr = 2 if PAIRED else 1
    UNITS: gl.constexpr = M // (4 * ROWS)
    LAST: gl.constexpr = ROWS * (DK // 32)
    L: gl.constexpr = parts_layout(UNITS, LAST)
    part = dq.reshape([DK // 64, 4, 2, 8, M // 8, 4, 2])  # tile, warp, half, column, eight, pair, one
    part = gl.convert_layout(part.permute((5, 3, 1, 4, 6, 0, 2)).reshape([4, 8, 4, UNITS, LAST]), L)
    pair = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, L)))))
    column = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, L)))))
    warp = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, L)))))
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, L)))))
    last = gl.arange(0, LAST, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L)))))
    pair = pair[:, None, None, None, None] * 2  # with an outer row's last bit, rows below 8: all of one token
    outer = unit * 8 if PAIRED else unit // 2 * 8 + unit % 2
    outer = outer[None, None, None, :, None]
    keep = outer // HP < left
    if H < HP:
        keep = keep & (outer % HP + pair < H)
    own = column[None, :, None, None, None] * LAST + warp[None, None, :, None, None] * (8 * LAST)
    fixed = (outer // HP * H + outer % HP) * DK + last[None, None, None, None, :]
    gl.store((target + (own + pair * DK)) + fixed, part, mask=keep)


@gluon.jit
def next_products(k, v, held0, held1, qring, gring, slot, none, DV: gl.constexpr):
    """Start a slot's scores, and the products of values and its output gradients, (keys, rows) both. ``held``: values
    of columns 0 to 63 and 64 to 95 in registers; so many fit beside the accumulators, and shared memory is the pipe
    that is busiest."""
    score = warpgroup_mma(k, qring.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    grads = gring.index(slot)
    fall = warpgroup_mma(held0, grads.slice(0, 64, dim=1).permute((1, 0)), none, use_acc=False, is_async=True)
    if DV > 64:
        fall = warpgroup_mma(held1, grads.slice(64, 32, dim=1).permute((1, 0)), fall, is_async=True)
        fall = warpgroup_mma(v.slice(96, 32, dim=1), grads.slice(96, 32, dim=1).permute((1, 0)), fall, is_async=True)
    return score, fall


@gluon.jit
def consume(
    k, v, slopes, qring, gring, rring, ready, free, first, low, high, scale2, target, part,
    H: gl.constexpr, HP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    BS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """The products of an item, turn by turn."""
    M: gl.constexpr = TOKENS * HP
    TYPE: gl.constexpr = k.dtype
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    KL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    VL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, SL)
    dk = gl.zeros([BS, DK], gl.float32, KL)
    dv = gl.zeros([BS, DV], gl.float32, VL)
    key = first + gl.arange(0, BS, gl.SliceLayout(1, SL))
    token = gl.arange(0, M, ROW) // HP
    none = gl.zeros([BS, M], gl.float32, SL)
    held0 = v.slice(0, 64, dim=1).load(gl.DotOperandLayout(0, SL, 2))
    held1 = held0
    if DV > 64:
        held1 = v.slice(64, 32, dim=1).load(gl.DotOperandLayout(0, SL, 2))
    mbarrier.wait(ready.index(0), 0)
    score, fall = next_products(k, v, held0, held1, qring, gring, 0, none, DV)
    score, fall = warpgroup_mma_wait(0, deps=(score, fall))
    for start in range(low, high, TOKENS):
        turn = (start - low) // TOKENS
        slot = turn % STAGES
        after = (turn + 1) % STAGES
        logsum, delta, limit = known_of_rows(rring, slot, TOKENS, HP, ROW)
        limit = gl.where(start + token < high, limit, 0)
        seen = gl.where(key[:, None] < limit[None, :], score, -float("inf"))
        weight = gl.exp2(seen * scale2 - logsum[None, :])
        slope = (weight * (fall - delta[None, :])).to(TYPE)
        slopes.store(slope)
        fence_async_shared()
        operand = gl.convert_layout(weight.to(TYPE), gl.DotOperandLayout(0, VL, 2))
        adding_v = warpgroup_mma(operand, gring.index(slot), dv, is_async=True)
        operand = gl.convert_layout(slope, gl.DotOperandLayout(0, KL, 2))
        adding_k = warpgroup_mma(operand, qring.index(slot), dk, is_async=True)
        empty = gl.zeros([DK, M], gl.float32, SL)
        parting = warpgroup_mma(k.permute((1, 0)), slopes, empty, use_acc=False, is_async=True)
        mbarrier.wait(ready.index(after), ((turn + 1) // STAGES) & 1, pred=start + TOKENS < high)
        own = target + start.to(gl.int64) * (H * DK)
        dv, dk, dq = warpgroup_mma_wait(0, deps=(adding_v, adding_k, parting))
        dq = dq.to(target.dtype.element_ty)
        store_query_part(dq, own, high - start, M, H, HP, DK, PAIRED)
        mbarrier.arrive(free.index(slot), count=1)  # and a barrier: what comes next takes the registers of ``dq``
        score, fall = next_products(k, v, held0, held1, qring, gring, after, none, DV)
        score, fall = warpgroup_mma_wait(0, deps=(score, fall))
    keys = gl.arange(0, BS, gl.SliceLayout(1, KL))
    columns = gl.arange(0, DK, gl.SliceLayout(0, KL))
    gl.store(part + (keys[:, None] * (DK + DV) + columns[None, :]), dk)
    keys = gl.arange(0, BS, gl.SliceLayout(1, VL))
    columns = gl.arange(0, DV, gl.SliceLayout(0, VL))
    gl.store(part + (keys[:, None] * (DK + DV) + (columns + DK)[None, :]), dv)


@gluon.jit(do_not_specialize=["LENGTH", "S", "T", "spans", "span", "units", "item_slots"])
def nsa_gradient_ring(
    Q, K, V, GRAD, ROWS, LENGTH, PAIRS, ITEMS, ITEM_COUNT, PART_Q, PART_KV,
    S, T, G, spans, span, units, item_slots, scale2, sqb, sqs, sqg, sqh, skb, skg, skt, svb, svg, svt,
    H: gl.constexpr, HP: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, DK: gl.constexpr,
    DV: gl.constexpr, BS: gl.constexpr, TENSOR_LENGTH: gl.constexpr, TOKENS: gl.constexpr,
    SPAN: gl.constexpr, STAGES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Grid (B * G * units * item_slots,): as ``gradient_products.nsa_gradient_block``; a turn's rows are tokens
    outside, heads inside. Q (B, S, G, H, DK), GRAD (B, S, G, H, DV) and ROWS (B * S * G, H, 4) are descriptors of HP
    rows, so the query's strides are not asked for."""
    M: gl.constexpr = TOKENS * HP
    TYPE: gl.constexpr = Q.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    pid = gl.program_id(0)
    i = pid % item_slots
    held = pid // item_slots
    bg = held // units
    of_bg = span + held % units
    unit = (bg * spans + of_bg).to(gl.int64)
    if i < gl.load(ITEM_COUNT + unit, mask=of_bg < spans, other=0):
        g = bg % G
        b = bg // G
        block, low, high = listed_item(ITEMS, unit, item_slots, i)
        first = block * BS
        pairs = PAIRS + unit * (SPAN * NP)
        qring = gl.allocate_shared_memory(TYPE, [STAGES, M, DK], TILE)
        gring = gl.allocate_shared_memory(TYPE, [STAGES, M, DV], TILE)
        rring = gl.allocate_shared_memory(gl.float32, [STAGES, M, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(STAGES):
            mbarrier.init(ready.index(s), count=1)
            mbarrier.init(free.index(s), count=1)
        length = gl.minimum(context_length(LENGTH, b, TENSOR_LENGTH), T)
        k = rows_of_keys(K, b, g, first, length - first, skb, skg, skt, DK, BS)
        v = rows_of_keys(V, b, g, first, length - first, svb, svg, svt, DV, BS)
        slopes = gl.allocate_shared_memory(TYPE, [BS, M], gl.NVMMASharedLayout(2 * M, 16, 2))
        fence_async_shared()
        gl.thread_barrier()
        target = PART_Q + held.to(gl.int64) * (SPAN * N * H * DK)
        part = PART_KV + pid.to(gl.int64) * (BS * (DK + DV))
        gl.warp_specialize(
            [
                (
                    consume,
                    (
                        k, v, slopes, qring, gring, rring, ready, free, first, low, high, scale2, target,
                        part, H, HP, DK, DV, BS, TOKENS, STAGES, PAIRED,
                    ),
                ),
                (
                    produce,
                    (
                        Q, GRAD, ROWS, pairs, low, high, b, g, S, G, qring, gring, rring, ready, free,
                        NP, HP, DK, DV, TOKENS, STAGES,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip


def describe(query: Tensor, grad: Tensor, known: Tensor) -> tuple[TensorDescriptor, ...]:
    """(Q, GRAD, ROWS) as the kernel takes them; queries and gradients as ``in_bulk`` gives them."""
    heads, padded = query.shape[3], power_of_two(query.shape[3])
    groups = known.numel() // (heads * 4)
    layout = gl.NVMMASharedLayout(0, 32, 3)
    rows = TensorDescriptor(known, [groups, heads, 4], [heads * 4, 4, 1], [1, padded, 4], layout)
    return *(describe_rows(tensor, padded) for tensor in (query, grad)), rows


def describe_rows(tensor: Tensor, heads: int) -> TensorDescriptor:
    """A descriptor of (B, S, G, h, D) in boxes of ``heads`` heads and 64 columns."""
    strides = [stride if size > 1 else 64 for size, stride in zip(tensor.shape[:4], tensor.stride()[:4], strict=True)]
    layout = gl.NVMMASharedLayout(128, 16, 5)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, 1, heads, 64], layout)


def in_bulk(tensor: Tensor) -> Tensor:
    """The tensor (B, S, G, h, D), copied if a row starts at no multiple of 16 bytes or dims share their memory."""
    shared = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.contiguous() if shared else aligned(tensor)
