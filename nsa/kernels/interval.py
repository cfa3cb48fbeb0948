"""Attention of rows whose keys are one interval: the window, and compressed tokens under their causal staircase.

The query at position t reads keys [end - width, end), end = (t + 1 - kernel_size) // kernel_stride + 1, cut to what
exists; width 0 = from key 0. A window is kernel_size = kernel_stride = 1. One program per tile of neighbouring tokens
and group: the heads of a group stand below one another as rows, so that a tile of few tokens fills the tensor cores
and walks hardly more keys than one token does. Without a width, tiles of keys that every row reads need no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..errors import UnsupportedPathError
from ..trace import ParameterValue
from .layout import LOG2E, LOWEST, finish, load_query, load_rows, power_of_two, split_width, unit_last


@dataclass(frozen=True, slots=True, eq=False)
class Interval:
    """Which keys rows read. ``first_position``: position of query 0; ``positions`` (B, S), int: of every query, and
    then ``first_position`` means nothing."""

    kernel_size: int = 1
    kernel_stride: int = 1
    width: int = 0
    first_position: int = 0
    positions: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """(FIRST, POSITION, spb, sps) as kernels take them."""
        if self.positions is None:
            return self.first_position, None, 0, 0
        return 0, self.positions, *self.positions.stride()

    @property
    def constants(self) -> dict[str, int]:
        """The compile-time sizes."""
        return {"KERNEL": self.kernel_size, "STRIDE": self.kernel_stride, "WIDTH": self.width}


@triton.jit
def row_positions(FIRST, POSITION, b, s, spb, sps):
    """Positions of queries ``s``."""
    if POSITION is not None:
        position = tl.load(POSITION + b * spb + s * sps).to(tl.int32)
    else:
        position = FIRST + s
    return position


@triton.jit
def key_bounds(position, keys, KERNEL: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """(first, end) of the keys that rows at ``position`` read."""
    end = tl.maximum(position + 1 - KERNEL + STRIDE, 0) // STRIDE
    if WIDTH > 0:
        first = tl.maximum(end - WIDTH, 0)
    else:
        first = end * 0
    return first, tl.minimum(end, keys)


@triton.jit
def tile_bounds(
    position, FIRST, POSITION, start, last, keys, KERNEL: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr
):
    """(first key of any row, first that not every row reads, end) of a tile whose rows are at ``position``, queries
    ``start`` .. ``last``. Scalar arithmetic where positions are, so that loops over keys stay uniform."""
    if POSITION is None:
        begin, whole = key_bounds(FIRST + start, keys, KERNEL, STRIDE, WIDTH)
        _, stop = key_bounds(FIRST + last, keys, KERNEL, STRIDE, WIDTH)
    else:
        first, end = key_bounds(position, keys, KERNEL, STRIDE, WIDTH)
        begin = tl.min(first, 0)
        whole = tl.min(end, 0)
        stop = tl.max(end, 0)
    return begin, whole, stop


@triton.jit
def walk(
    q0, q1, out, top, total, begin, stop, first, end, K0, K1, V, b, g, there, scale2,
    skb, skg, skt, svb, svg, svt,
    DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
    DESCRIPTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys begin .. stop in tiles of BN. Without MASKED every row reads every key of every tile."""
    columns = tl.arange(0, BN)
    for i in range(tl.cdiv(stop - begin, BN)):
        start = begin + i * BN
        k0 = load_rows(K0, b, g, start, there - start, skb, skg, skt, 0, DK, DK0, BN, DESCRIPTOR, False)
        score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if DK1 > 0:
            k1 = load_rows(K1, b, g, start, there - start, skb, skg, skt, DK0, DK, DK1, BN, DESCRIPTOR, False)
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
        if MASKED:
            key = start + columns
            read = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
            score = tl.where(read, score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.math.exp2(score * scale2 - (new_top * scale2)[:, None])
        decay = tl.math.exp2((top - new_top) * scale2)
        total = total * decay + tl.sum(weight, 1)
        v = load_rows(V, b, g, start, there - start, svb, svg, svt, 0, DV, DVP, BN, DESCRIPTOR, False)
        out = tl.dot(weight.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        top = new_top
    return out, top, total


@triton.jit(do_not_specialize=["FIRST", "S", "keys"])
def nsa_interval_forward(
    Q, K0, K1, V, OUT, LSE, FIRST, POSITION, S, keys, G, scale2, spb, sps,
    sqb, sqs, sqg, sqh, skb, skg, skt, svb, svg, svt,
    H: tl.constexpr, HP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    BN: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,), tiles of one group beside each other, last (longest) tiles first."""
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
    position = row_positions(FIRST, POSITION, b, tl.minimum(tile * TOKENS + member, S - 1), spb, sps)
    first, end = key_bounds(position, keys, KERNEL, STRIDE, WIDTH)
    start = tile * TOKENS
    last = tl.minimum(start + TOKENS, S) - 1
    begin, whole, stop = tile_bounds(position, FIRST, POSITION, start, last, keys, KERNEL, STRIDE, WIDTH)
    there = (tile * TOKENS + member < S) & (head < H)
    base = Q + b.to(tl.int64) * sqb + g.to(tl.int64) * sqg + (tile * TOKENS).to(tl.int64) * sqs
    q0 = load_query(base, rows, member * sqs + head * sqh, there, 0, DK, DK0)
    q1 = q0
    if DK1 > 0:
        q1 = load_query(base, rows, member * sqs + head * sqh, there, DK0, DK, DK1)
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DVP], tl.float32)
    middle = begin
    if WIDTH == 0:
        middle = whole // BN * BN
        out, top, total = walk(
            q0, q1, out, top, total, begin, middle, first, end, K0, K1, V, b, g, stop, scale2,
            skb, skg, skt, svb, svg, svt, DK, DK0, DK1, DV, DVP, BN, DESCRIPTOR, False,
        )  # fmt: skip
    out, top, total = walk(
        q0, q1, out, top, total, middle, stop, first, end, K0, K1, V, b, g, stop, scale2,
        skb, skg, skt, svb, svg, svt, DK, DK0, DK1, DV, DVP, BN, DESCRIPTOR, True,
    )  # fmt: skip
    out, logsum = finish(out, top, total, scale2)
    row = ((b.to(tl.int64) * S + tile * TOKENS) * G + g) * H
    offset = member * (G * H) + head
    keep = there[:, None]
    if DVP > DV:
        keep = keep & (columns < DV)[None, :]
    tl.store(OUT + row * DV + offset[:, None] * DV + columns[None, :], out.to(OUT.dtype.element_ty), mask=keep)
    if LSE is not None:
        tl.store(LSE + row + offset, logsum, mask=there)


def sizes(query: Tensor, value: Tensor) -> dict[str, int]:
    """The compile-time sizes of heads and head dims."""
    width, value_width, heads = query.shape[4], value.shape[3], query.shape[3]
    first, second = split_width(width)
    return {
        "H": heads,
        "HP": power_of_two(heads),
        "DK": width,
        "DK0": first,
        "DK1": second,
        "DV": value_width,
        "DVP": power_of_two(value_width, 16),
    }


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interval: Interval,
    scale: float,
    logsum: Tensor | None,
    *,
    tokens: ParameterValue,
    keys: ParameterValue,
    warps: ParameterValue,
    stages: ParameterValue,
    loads: ParameterValue,
    registers: ParameterValue,
) -> Tensor:
    """Output (B, S, G, h, Dv); fills ``logsum`` (B, S, G, h) float32, base 2, if given. ``scale`` is positive.

    query (B, S, G, h, Dk), key (B, G, N, Dk), value (B, G, N, Dv). Keys that no row reads are never loaded. ``loads``
    "ring" is the kernel of ``ring``, which ``interval_support.ring_reason`` says where to take.
    """
    batch, queries, groups, heads, _ = unit_last(query, "query").shape
    if loads == "ring":
        from .ring import forward as ring_forward  # Gluon, loaded where it can run

        there, options = existing_keys(interval, queries, key.shape[2]), launch_options(warps, stages, registers)
        return ring_forward(query, key, value, interval, scale, logsum, there, int(tokens), int(keys), options)
    out = torch.empty((batch, queries, groups, heads, value.shape[3]), dtype=value.dtype, device=value.device)
    constants = sizes(query, value)
    tile = least_tokens(int(tokens), constants["HP"])
    there = existing_keys(interval, queries, key.shape[2])
    sources = key_sources(key, value, constants, int(keys), str(loads), there)
    first, positions, *position_strides = interval.arguments
    nsa_interval_forward[(batch * groups * triton.cdiv(queries, tile),)](
        query, *sources, out, logsum, first, positions, queries, there, groups, scale * LOG2E,
        *position_strides, *query.stride()[:4], *key.stride()[:3], *value.stride()[:3],
        **constants, **interval.constants, TOKENS=tile, BN=int(keys), DESCRIPTOR=loads == "descriptor",
        **launch_options(warps, stages, registers),
    )  # fmt: skip
    return out


def launch_options(warps: ParameterValue, stages: ParameterValue, registers: ParameterValue) -> dict[str, int]:
    """Launch options; ``registers`` 0 = as many as the compiler wants, else at most so many per thread, so that more
    programs fit a processor."""
    options = {"num_warps": int(warps), "num_stages": int(stages)}
    return {**options, "maxnreg": int(registers)} if registers else options


def least_tokens(tokens: int, heads: int) -> int:
    """Tokens of a tile: as asked, but at least 16 rows, which is what a matrix product takes."""
    return max(tokens, 16 // heads)


def existing_keys(interval: Interval, queries: int, keys: int) -> int:
    """Keys up to the last one that any row reads; all where positions are on the device."""
    if interval.positions is not None:
        return keys
    last = interval.first_position + queries - interval.kernel_size
    return max(0, min(keys, last // interval.kernel_stride + 1))


def key_sources(
    key: Tensor, value: Tensor, constants: dict[str, int], tile: int, loads: str, there: int
) -> tuple[Any, Any, Any]:
    """(K0, K1, V): the tensors, or descriptors of ``tile`` keys that end at key ``there``.

    Raises UnsupportedPathError where descriptors cannot be, ArgumentError unless last dimensions are contiguous.
    """
    unit_last(key, "key")
    unit_last(value, "value")
    if loads == "pointer":
        return key, key, value
    second = describe(key, there, tile, constants["DK1"]) if constants["DK1"] else None
    return describe(key, there, tile, constants["DK0"]), second, describe(value, there, tile, constants["DVP"])


def describe(tensor: Tensor, there: int, rows: int, width: int) -> TensorDescriptor:
    """A descriptor of ``rows`` keys. Raises UnsupportedPathError unless strides are multiples of 16 bytes."""
    item = tensor.element_size()
    if any(stride * item % 16 for stride in tensor.stride()[:3]) or tensor.data_ptr() % 16:
        raise UnsupportedPathError(
            f"descriptor loads need strides and start that are multiples of 16 bytes, got strides {tensor.stride()}; "
            "take loads='pointer'"
        )
    shape = [tensor.shape[0], tensor.shape[1], there, tensor.shape[3]]
    return TensorDescriptor(tensor, shape, list(tensor.stride()), [1, 1, rows, width])
