"""Forward of ``interval`` for compute capability 9.0, in Gluon.

Keys and values come by bulk copies into a ring of shared buffers each. Where two programs are to share a processor (128
registers a thread), the products of a Triton tile are waited for one by one, since ptxas finds too few registers to
keep them in flight together. Here it finds enough.
"""

from __future__ import annotations

import torch
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .interval import Interval, describe
from .layout import LOG2E, power_of_two, unit_last

LOWEST = gl.constexpr(-1.0e30)
"""Running maximum before any key: finite, so that exp2(-inf - LOWEST) is 0 and nothing is NaN."""


@gluon.jit
def fetch(K, V, b, g, begin, i, tiles, BN: gl.constexpr, kring, vring, ready, STAGES: gl.constexpr):
    """Start copying keys and values of tile ``i``, if there is one, into its slots."""
    slot = i % STAGES
    there = i < tiles
    key = begin + i * BN
    mbarrier.expect(ready.index(slot), K.block_type.nbytes + V.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(K, [b, g, key, 0], ready.index(slot), kring.index(slot), pred=there)
    tma.async_copy_global_to_shared(V, [b, g, key, 0], ready.index(slot), vring.index(slot), pred=there)


@gluon.jit
def soften(
    score, top, total, start, first, end, scale2, MASKED: gl.constexpr, BN: gl.constexpr, SL: gl.constexpr,
    OL: gl.constexpr, TYPE: gl.constexpr,
):  # fmt: skip
    """Online softmax of the tile from key ``start`` on: (weights as an operand, decay of what was, top, total)."""
    if MASKED:
        key = start + gl.arange(0, BN, gl.SliceLayout(0, SL))
        read = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        score = gl.where(read, score, -float("inf"))
    new_top = gl.maximum(top, gl.max(score, 1))
    weight = gl.exp2(score * scale2 - (new_top * scale2)[:, None])
    decay = gl.exp2((top - new_top) * scale2)
    total = total * decay + gl.sum(weight, 1)
    return gl.convert_layout(weight.to(TYPE), gl.DotOperandLayout(0, OL, 2)), decay, new_top, total


@gluon.jit
def walk(
    query, score, out, top, total, here, upto, count, begin, first, end, scale2, K, V, b, g,
    kring, vring, ready,
    MASKED: gl.constexpr, BN: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, SL: gl.constexpr,
    OL: gl.constexpr, TYPE: gl.constexpr,
):  # fmt: skip
    """Online softmax over tiles ``here`` .. ``upto`` of ``count``. Without MASKED every row reads all of their keys."""
    for i in range(here, upto):
        slot = i % STAGES
        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
        keys = kring.index(slot).reshape([BN, DK]).permute((1, 0))
        flight = warpgroup_mma(query, keys, score, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(0, deps=(flight,))
        start = begin + i * BN
        weight, decay, top, total = soften(score, top, total, start, first, end, scale2, MASKED, BN, SL, OL, TYPE)
        out = out * gl.convert_layout(decay, gl.SliceLayout(1, OL))[:, None]
        flight = warpgroup_mma(weight, vring.index(slot).reshape([BN, DV]), out, is_async=True)
        out = warpgroup_mma_wait(0, deps=(flight,))
        gl.thread_barrier()
        fetch(K, V, b, g, begin, i + STAGES, count, BN, kring, vring, ready, STAGES)
    return score, out, top, total


@gluon.jit
def key_end(position, keys, KERNEL: gl.constexpr, STRIDE: gl.constexpr):
    """End of the keys that a row at ``position`` reads, before the cut to what exists, and after it."""
    end = gl.maximum(position + 1 - KERNEL + STRIDE, 0) // STRIDE
    return end, gl.minimum(end, keys)


@gluon.jit(do_not_specialize=["FIRST", "S", "keys"])
def nsa_interval_ring(
    Q, K, V, OUT, LSE, FIRST, S, keys, G, scale2, sqb, sqs, sqg, sqh,
    H: gl.constexpr, HP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, KERNEL: gl.constexpr, STRIDE: gl.constexpr,
    WIDTH: gl.constexpr, TOKENS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,), tiles of one group beside each other, last (longest) tiles first."""
    M: gl.constexpr = TOKENS * HP
    WARPS: gl.constexpr = gl.num_warps()
    TYPE: gl.constexpr = Q.dtype.element_ty
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV, 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    pid = gl.program_id(0)
    tiles = gl.cdiv(S, TOKENS)
    tile = tiles - 1 - pid % tiles
    g = (pid // tiles) % G
    b = pid // (tiles * G)
    start = tile * TOKENS
    low, whole = key_end(FIRST + start, keys, KERNEL, STRIDE)
    _, stop = key_end(FIRST + gl.minimum(start + TOKENS, S) - 1, keys, KERNEL, STRIDE)
    begin = stop * 0
    if WIDTH > 0:
        begin = gl.maximum(low - WIDTH, 0)
    count = gl.cdiv(stop - begin, BN)

    kring = gl.allocate_shared_memory(TYPE, [STAGES, 1, 1, BN, DK], SHARED)
    vring = gl.allocate_shared_memory(TYPE, [STAGES, 1, 1, BN, DV], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    for s in gl.static_range(STAGES):
        fetch(K, V, b, g, begin, s, count, BN, kring, vring, ready, STAGES)

    line = gl.arange(0, M, gl.SliceLayout(1, LOAD))
    there = (start + line // HP < S) & (line % HP < H)
    columns = gl.arange(0, DK, gl.SliceLayout(0, LOAD))
    base = Q + b.to(gl.int64) * sqb + g.to(gl.int64) * sqg + start.to(gl.int64) * sqs
    place = (line // HP * sqs + line % HP * sqh)[:, None] + columns[None, :]
    loaded = gl.load(base + place, mask=there[:, None], other=0.0)
    query = gl.allocate_shared_memory(TYPE, [M, DK], gl.NVMMASharedLayout(128, 16, 2), loaded)
    fence_async_shared()
    gl.thread_barrier()

    ROW: gl.constexpr = gl.SliceLayout(1, SL)
    row = gl.arange(0, M, ROW)
    reach, end = key_end(FIRST + gl.minimum(start + row // HP, S - 1), keys, KERNEL, STRIDE)
    first = end * 0
    if WIDTH > 0:
        first = gl.maximum(reach - WIDTH, 0)
    top = gl.full([M], LOWEST, gl.float32, ROW)
    total = gl.zeros([M], gl.float32, ROW)
    out = gl.zeros([M, DV], gl.float32, OL)
    score = gl.zeros([M, BN], gl.float32, SL)
    inner = 0
    if WIDTH == 0:
        inner = whole // BN
        score, out, top, total = walk(
            query, score, out, top, total, 0, inner, count, begin, first, end, scale2, K, V, b, g,
            kring, vring, ready, False, BN, DK, DV, STAGES, SL, OL, TYPE,
        )  # fmt: skip
    score, out, top, total = walk(
        query, score, out, top, total, inner, count, count, begin, first, end, scale2, K, V, b, g,
        kring, vring, ready, True, BN, DK, DV, STAGES, SL, OL, TYPE,
    )  # fmt: skip
    some = total > 0
    divisor = gl.where(some, total, 1.0)
    logsum = gl.where(some, top * scale2 + gl.log2(divisor), float("inf"))
    out = out * gl.convert_layout(1.0 / divisor, gl.SliceLayout(1, OL))[:, None]
    base = ((b.to(gl.int64) * S + start) * G + g) * H
    gl.store(LSE + base + row // HP * (G * H) + row % HP, logsum, mask=(start + row // HP < S) & (row % HP < H))
    result = gl.convert_layout(out.to(TYPE), LOAD)
    columns = gl.arange(0, DV, gl.SliceLayout(0, LOAD))
    place = (line // HP * (G * H) + line % HP)[:, None] * DV + columns[None, :]
    gl.store(OUT + base * DV + place, result, mask=there[:, None])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interval: Interval,
    scale: float,
    logsum: Tensor | None,
    there: int,
    tokens: int,
    keys: int,
    options: dict[str, int],
) -> Tensor:
    """``interval.forward``; ``there``: keys that exist for some row. Positions must follow from the first one."""
    batch, queries, groups, heads, width = query.shape
    out = torch.empty((batch, queries, groups, heads, value.shape[3]), dtype=value.dtype, device=value.device)
    if logsum is None:
        logsum = torch.empty(query.shape[:4], dtype=torch.float32, device=query.device)
    stages = options["num_stages"]
    nsa_interval_ring[(batch * groups * triton.cdiv(queries, tokens),)](
        query, *(describe_ring(tensor, there, keys) for tensor in (key, value)), out, logsum, interval.first_position,
        queries, there, groups, scale * LOG2E, *query.stride()[:4], H=heads, HP=power_of_two(heads), DK=width,
        DV=value.shape[3], **interval.constants, TOKENS=tokens, BN=keys, STAGES=stages, **options,
    )  # fmt: skip
    return out


def describe_ring(tensor: Tensor, there: int, rows: int) -> TensorDescriptor:
    """A descriptor of ``rows`` keys of (B, G, N, D), which end at key ``there``. Raises as ``interval.describe``."""
    plain = describe(unit_last(tensor, "keys or values"), max(1, there), rows, tensor.shape[3])
    return TensorDescriptor(tensor, plain.shape, plain.strides, plain.block_shape, gl.NVMMASharedLayout(128, 16, 4))
