"""Leaf of the Triton kernels: device functions and launch arguments that they share.

A program sees keys below its row's *limit*, min(context length, T, query position + 1), and the row's *first* entries:
valid block indices, each counted where it stands first. Scores are kept raw; ``scale2`` is scale * log2(e), so that
every exponential is an exp2. Nothing here knows a loop order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..errors import ArgumentError, UnsupportedPathError
from ..selection import Selection
from .support import padded as power_of_two

LOG2E = 1.4426950408889634
LOWEST = tl.constexpr(-1.0e30)
"""Running maximum before any key: finite, so that exp2(-inf - LOWEST) is 0 and nothing is NaN."""
NONE = tl.constexpr(2**31 - 1)
"""An entry that is not there; above every entry that is."""
CHUNK = 32
"""Entries held together: one per lane of a warp."""


@triton.jit
def key_count(LENGTH, b, T, TENSOR_LENGTH: tl.constexpr):
    """Keys that exist for batch entry ``b``: its context length, at most T."""
    return tl.minimum(context_length(LENGTH, b, TENSOR_LENGTH), T)


@triton.jit
def row_limit(POSITION, b, s, length, full_length, S, spb, sps):
    """Keys that query ``s`` (scalar or tensor) may see. ``full_length`` is the context length before the cut to T."""
    position = tl.load(POSITION + b * spb + s * sps).to(tl.int32) if POSITION is not None else full_length - S + s
    return tl.maximum(tl.minimum(length, position + 1), 0)


@triton.jit
def context_length(LENGTH, b, TENSOR_LENGTH: tl.constexpr):
    """The caller's context length of batch entry ``b``, not cut to T."""
    return tl.load(LENGTH + b).to(tl.int32) if TENSOR_LENGTH else LENGTH


@triton.jit
def load_rows(
    SOURCE,
    b,
    g,
    first,
    rows_left,
    sb,
    sg,
    st,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    CLEAR: tl.constexpr = False,
):
    """Rows first .. first + BS of (b, g), columns COLUMN .. COLUMN + PADDED, as (BS, PADDED); zero past the edges.

    By descriptor the edge is the tensor's end, or ``rows_left`` with CLEAR; by pointer ``rows_left`` rows and WIDTH
    columns. What lies behind a context length may be NaN: harmless in keys, which are masked, but not in values.
    """
    if DESCRIPTOR:
        tile = SOURCE.load([b, g, first, COLUMN]).reshape(BS, PADDED)
        if CLEAR:
            tile = tl.where((tl.arange(0, BS) < rows_left)[:, None], tile, 0.0).to(tile.dtype)
    else:
        rows = tl.arange(0, BS)
        columns = tl.arange(0, PADDED)
        base = SOURCE + b.to(tl.int64) * sb + g.to(tl.int64) * sg + first.to(tl.int64) * st + COLUMN
        mask = (rows < rows_left)[:, None]
        if COLUMN + PADDED > WIDTH:
            mask = mask & (columns < WIDTH - COLUMN)[None, :]
        tile = tl.load(base + (rows[:, None] * st + columns[None, :]), mask=mask, other=0.0)
    return tile


@triton.jit
def row_entries(pointers, slots, limit, N: tl.constexpr, BS: tl.constexpr):
    """One row's slots: block where valid and below the limit, else -1."""
    entry = tl.load(pointers, mask=slots < N, other=-1)
    return tl.where((entry >= 0) & (entry < tl.cdiv(limit, BS)), entry, -1).to(tl.int32)


@triton.jit
def first_entries(base, stride, slots, limit, N: tl.constexpr, BS: tl.constexpr):
    """A row's blocks at ``slots`` (any part of the row), NONE where invalid or seen at a lower slot.

    Compared with one scalar after the other: no shuffles and no barriers, all loads at once.
    """
    entry = row_entries(base + slots * stride, slots, limit, N, BS)
    again = tl.zeros_like(entry)
    for i in tl.static_range(N - 1):
        again |= ((tl.load(base + i * stride) == entry) & (slots > i)).to(tl.int32)
    return tl.where((entry >= 0) & (again == 0), entry, NONE)


@triton.jit
def count_entries(e0, e1, e2, e3, CHUNKS: tl.constexpr):
    """How many entries of up to four chunks are not NONE."""
    count = tl.sum((e0 != NONE).to(tl.int32), 0)
    if CHUNKS > 1:
        count += tl.sum((e1 != NONE).to(tl.int32), 0)
    if CHUNKS > 2:
        count += tl.sum((e2 != NONE).to(tl.int32), 0) + tl.sum((e3 != NONE).to(tl.int32), 0)
    return count


@triton.jit
def next_entry(e0, e1, e2, e3, last, CHUNKS: tl.constexpr):
    """The smallest entry above ``last``. Chunks have at most 32 entries, so that the minimum stays inside a warp."""
    entry = tl.min(tl.where(e0 > last, e0, NONE), 0)
    if CHUNKS > 1:
        entry = tl.minimum(entry, tl.min(tl.where(e1 > last, e1, NONE), 0))
    if CHUNKS > 2:
        entry = tl.minimum(entry, tl.min(tl.where(e2 > last, e2, NONE), 0))
        entry = tl.minimum(entry, tl.min(tl.where(e3 > last, e3, NONE), 0))
    return entry


@triton.jit
def load_query(base, rows, offsets, mask, COLUMN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Query rows (M, PADDED) at ``base + offsets``, columns COLUMN .. COLUMN + PADDED, zero where masked."""
    columns = tl.arange(0, PADDED)
    inside = mask[:, None]
    if COLUMN + PADDED > WIDTH:
        inside = inside & (columns < WIDTH - COLUMN)[None, :]
    return tl.load(base + offsets[:, None] + (columns + COLUMN)[None, :], mask=inside, other=0.0)


@triton.jit
def gather_rows(
    base, offsets, head, H: tl.constexpr, HP: tl.constexpr, COLUMN: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Rows (M, PADDED) at ``base + offsets`` that all exist, but for padded heads; unmasked where nothing is padded."""
    columns = tl.arange(0, PADDED)
    pointers = base + offsets[:, None] + (columns + COLUMN)[None, :]
    if COLUMN + PADDED > WIDTH:
        tile = tl.load(pointers, mask=(head < H)[:, None] & (columns < WIDTH - COLUMN)[None, :], other=0.0)
    elif H < HP:
        tile = tl.load(pointers, mask=(head < H)[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def attend(
    q0, q1, e0, e1, e2, e3, limit, K0, K1, V, b, g, length, scale2, skb, skg, skt, svb, svg, svt,
    M: tl.constexpr, CHUNKS: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, BS: tl.constexpr, STEP: tl.constexpr, DESCRIPTOR: tl.constexpr,
    TENSOR_LENGTH: tl.constexpr,
):  # fmt: skip
    """Online softmax of M query rows over the blocks in the registers ``e0`` to ``e3``, in ascending order.

    Returns (weighted values (M, DVP), running maximum (M,), total (M,)), not yet divided. STEP keys are taken at a
    time: fewer than a block need less shared memory, so that more programs share a multiprocessor.
    The loop has no branch, so that its loads are pipelined.
    """
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DVP], tl.float32)
    keys = tl.arange(0, STEP)
    parts: tl.constexpr = BS // STEP
    last = -1
    for i in range(count_entries(e0, e1, e2, e3, CHUNKS) * parts):
        entry = next_entry(e0, e1, e2, e3, last, CHUNKS)
        last = tl.where(i % parts == parts - 1, entry, last)
        first = entry * BS + (i % parts) * STEP
        k0 = load_rows(K0, b, g, first, length - first, skb, skg, skt, 0, DK, DK0, STEP, DESCRIPTOR, False)
        score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if DK1 > 0:
            k1 = load_rows(K1, b, g, first, length - first, skb, skg, skt, DK0, DK, DK1, STEP, DESCRIPTOR, False)
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
        score = tl.where((keys < limit - first)[None, :], score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.math.exp2(score * scale2 - (new_top * scale2)[:, None])
        decay = tl.math.exp2((top - new_top) * scale2)
        total = total * decay + tl.sum(weight, 1)
        v = load_rows(V, b, g, first, length - first, svb, svg, svt, 0, DV, DVP, STEP, DESCRIPTOR, TENSOR_LENGTH)
        out = tl.dot(weight.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        top = new_top
    return out, top, total


@triton.jit
def finish(out, top, total, scale2):
    """Divide by the total; a row without keys gives zeros and a log-sum-exp (base 2) of +inf."""
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    logsum = tl.where(some, top * scale2 + tl.math.log2(divisor), float("inf"))
    return out * (1.0 / divisor)[:, None], logsum


def split_width(width: int) -> tuple[int, int]:
    """A head dim as two powers of two from 16 on, the second 0 where one serves: 192 is (128, 64), not 256."""
    whole = power_of_two(width, 16)
    half = whole // 2
    if width > half >= 16 and (rest := power_of_two(width - half, 16)) < half:
        return half, rest
    return whole, 0


def shape_constants(query: Tensor, value: Tensor, selection: Selection) -> dict[str, int | bool]:
    """The compile-time sizes that every kernel takes."""
    width, value_width = query.shape[4], value.shape[3]
    first, second = split_width(width)
    slots = selection.indices.shape[3]
    return {
        "H": query.shape[3],
        "HP": power_of_two(query.shape[3]),
        "N": slots,
        "NP": power_of_two(slots),
        "DK": width,
        "DK0": first,
        "DK1": second,
        "DV": value_width,
        "DVP": power_of_two(value_width, 16),
        "BS": selection.block_size,
        "TENSOR_LENGTH": isinstance(selection.context_length, Tensor),
    }


def selection_arguments(selection: Selection) -> tuple[Any, ...]:
    """(LENGTH, POSITION, spb, sps): context length, int or (B,), and positions, None or of strides (spb, sps)."""
    positions = selection.query_positions
    if positions is None:
        return selection.context_length, None, 0, 0
    strides = positions.stride() if positions.dim() == 2 else (0, positions.stride(0))
    return selection.context_length, positions, *strides


def wide_offsets(spanned: int, *tensors: Tensor) -> bool:
    """Whether an offset inside one (b, g) of the tensors, or among ``spanned`` elements, needs 64 bits."""
    rows = (tensor.shape[1] * abs(tensor.stride(1)) + tensor.shape[3] * abs(tensor.stride(3)) for tensor in tensors)
    return max(spanned, *rows) >= 2**31


def unit_last(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself. Raises ArgumentError unless its last dimension is contiguous."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ArgumentError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
    return tensor


def key_sources(
    key: Tensor, value: Tensor, selection: Selection, constants: dict[str, int | bool], loads: str, step: int = 0
) -> tuple[Any, Any, Any]:
    """(K0, K1, V) as kernels take them: the tensors, or tensor-map descriptors of ``step`` keys each, 0 = a block.

    Raises UnsupportedPathError where descriptors cannot be: start or strides that are no multiple of 16 bytes.
    """
    unit_last(key, "key")
    unit_last(value, "value")
    if loads == "pointer":
        return key, key, value
    length = selection.context_length
    keys = key.shape[2] if isinstance(length, Tensor) else min(key.shape[2], length)
    size = step or selection.block_size
    second = _descriptor(key, keys, size, int(constants["DK1"])) if constants["DK1"] else None
    return (
        _descriptor(key, keys, size, int(constants["DK0"])),
        second,
        _descriptor(value, keys, size, int(constants["DVP"])),
    )


def _descriptor(tensor: Tensor, keys: int, step: int, width: int) -> TensorDescriptor:
    item = tensor.element_size()
    if any(stride * item % 16 for stride in tensor.stride()[:3]) or tensor.data_ptr() % 16:
        raise UnsupportedPathError(
            f"descriptor loads need strides and start that are multiples of 16 bytes, got strides {tensor.stride()}; "
            "take loads='pointer'"
        )
    shape = [tensor.shape[0], tensor.shape[1], keys, tensor.shape[3]]
    return TensorDescriptor(tensor, shape, list(tensor.stride()), [1, 1, step, width])
