"""Split-K for few rows: each row's blocks are dealt to several programs, and the last one to finish combines them.

The combination costs no second launch: a counter per row, which its last program sets back to zero. The counters
outlive the call; a capture gets counters of its own, so that graphs and eager calls never share one.

By dependent launches the next kernel starts while this one still runs, and waits for its end. The combination may do so
at once, being small. What follows the call's last kernel may not before that has loaded its keys, or the partial rows:
programs of the next call that wait in a multiprocessor keep its shared memory, and those that find none elsewhere wait
two to one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..selection import Selection
from ..trace import ParameterValue
from .launch import Plan, call_key, plans
from .layout import (
    LOG2E,
    LOWEST,
    context_length,
    finish,
    key_count,
    key_sources,
    load_query,
    load_rows,
    row_limit,
    selection_arguments,
    shape_constants,
    unit_last,
)


@triton.jit
def combine_splits(PART, stats, OUT, LSE, row, heads, columns, whole, H: tl.constexpr, M: tl.constexpr,
                   DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Merge SPLITS partial rows (H, DV) of PART with their maxima and totals at ``stats``, (SPLITS, 2, H) per row.

    ``columns``: DVP of them; one program of a row, that with ``whole``, writes LSE."""
    parts = tl.arange(0, SPLITS)
    inside = heads < H
    stat = stats + row * (SPLITS * 2 * H)
    tops = tl.load(stat + (parts * (2 * H))[:, None] + heads[None, :], mask=inside[None, :], other=0.0,
                   cache_modifier=".cg")  # fmt: skip
    top = tl.max(tops, 0)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DVP], tl.float32)
    keep = inside[:, None] & (columns < DV)[None, :]
    part = PART + row * (SPLITS * H * DV) + heads[:, None] * DV + columns[None, :]
    for i in tl.static_range(SPLITS):
        one = tl.load(stat + i * (2 * H) + heads, mask=inside, other=0.0, cache_modifier=".cg")
        weight = tl.math.exp2(one - top)
        total += weight * tl.load(stat + (i * 2 + 1) * H + heads, mask=inside, other=0.0, cache_modifier=".cg")
        out += weight[:, None] * tl.load(part + i * (H * DV), mask=keep, other=0.0, cache_modifier=".cg")
    out, logsum = finish(out, top, total, 1.0)
    tl.store(OUT + row * (H * DV) + heads[:, None] * DV + columns[None, :], out.to(OUT.dtype.element_ty), mask=keep)
    if LSE is not None:
        tl.store(LSE + row * H + heads, logsum, mask=inside & whole)


@triton.jit(do_not_specialize=["LENGTH", "S", "T"])
def nsa_decode_forward(
    Q,
    K0,
    K1,
    V,
    X,
    LENGTH,
    POSITION,
    OUT,
    LSE,
    PART,
    COUNTER,
    T,
    scale2,
    S,
    G,
    spb,
    sps,
    sqb,
    sqs,
    sqg,
    sqh,
    skb,
    skg,
    skt,
    svb,
    svg,
    svt,
    sxb,
    sxs,
    sxg,
    sxn,
    H: tl.constexpr,
    HP: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    DK: tl.constexpr,
    DK0: tl.constexpr,
    DK1: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BS: tl.constexpr,
    TENSOR_LENGTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    INSIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (B * S * G * SPLITS,), the splits of a row beside each other; split i takes the slots i modulo SPLITS.

    A slot's keys are asked for as soon as its index is there, STEP at a time; whether an earlier slot holds the same
    block is found out meanwhile.
    """
    LAST: tl.constexpr = INSIDE or SPLITS == 1
    if DEPENDENT:
        if not LAST:
            gdc_launch_dependents()
        gdc_wait()
    M: tl.constexpr = max(HP, 16)
    PARTS: tl.constexpr = BS // STEP
    STEPS: tl.constexpr = (N + SPLITS - 1) // SPLITS * PARTS
    pid = tl.program_id(0)
    split = pid % SPLITS
    place = pid // SPLITS
    g = place % G
    s = (place // G) % S
    b = place // (G * S)
    slots = tl.arange(0, NP)
    heads = tl.arange(0, M)
    keys = tl.arange(0, STEP)
    columns = tl.arange(0, DVP)
    row = X + b.to(tl.int64) * sxb + s.to(tl.int64) * sxs + g * sxg
    entries = tl.load(row + slots * sxn, mask=slots < N, other=-1)
    length = key_count(LENGTH, b, T, TENSOR_LENGTH)
    limit = row_limit(POSITION, b, s, length, context_length(LENGTH, b, TENSOR_LENGTH), S, spb, sps)
    base = Q + b.to(tl.int64) * sqb + s.to(tl.int64) * sqs + g.to(tl.int64) * sqg
    q0 = load_query(base, heads, heads * sqh, heads < H, 0, DK, DK0)
    q1 = q0
    if DK1 > 0:
        q1 = load_query(base, heads, heads * sqh, heads < H, DK0, DK, DK1)
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DVP], tl.float32)
    for i in range(STEPS):
        slot = i // PARTS * SPLITS + split
        entry = tl.load(row + slot * sxn, mask=slot < N, other=-1)
        valid = (entry >= 0) & (entry < tl.cdiv(limit, BS))
        first = tl.where(valid, entry, 0).to(tl.int32) * BS + i % PARTS * STEP
        there = tl.where(valid, length - first, 0)
        k0 = load_rows(K0, b, g, first, there, skb, skg, skt, 0, DK, DK0, STEP, DESCRIPTOR, False)
        k1 = k0
        if DK1 > 0:
            k1 = load_rows(K1, b, g, first, there, skb, skg, skt, DK0, DK, DK1, STEP, DESCRIPTOR, False)
        v = load_rows(V, b, g, first, there, svb, svg, svt, 0, DV, DVP, STEP, DESCRIPTOR, TENSOR_LENGTH)
        score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if DK1 > 0:
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
        again = tl.max(((entries == entry) & (slots < slot)).to(tl.int32), 0)
        seen = tl.where(valid & (again == 0), limit - first, 0)
        score = tl.where((keys < seen)[None, :], score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.math.exp2(score * scale2 - (new_top * scale2)[:, None])
        decay = tl.math.exp2((top - new_top) * scale2)
        total = total * decay + tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        top = new_top
    if DEPENDENT and LAST:
        gdc_launch_dependents()
    place = place.to(tl.int64)
    keep = (heads < H)[:, None] & (columns < DV)[None, :]
    if SPLITS == 1:
        out, logsum = finish(out, top, total, scale2)
        tl.store(OUT + place * (H * DV) + heads[:, None] * DV + columns[None, :], out.to(OUT.dtype.element_ty),
                 mask=keep)  # fmt: skip
        if LSE is not None:
            tl.store(LSE + place * H + heads, logsum, mask=heads < H)
    else:
        part = place * SPLITS + split
        stats = PART + tl.num_programs(0).to(tl.int64) * (H * DV)
        tl.store(PART + part * (H * DV) + heads[:, None] * DV + columns[None, :], out, mask=keep)
        tl.store(stats + part * (2 * H) + heads, top * scale2, mask=heads < H)
        tl.store(stats + part * (2 * H) + H + heads, total, mask=heads < H)
        if INSIDE:
            tl.debug_barrier()  # every thread's stores come before the one thread's release
            if tl.atomic_add(COUNTER + place, 1, sem="acq_rel") == SPLITS - 1:
                combine_splits(PART, stats, OUT, LSE, place, heads, columns, True, H, M, DV, DVP, SPLITS)
                tl.store(COUNTER + place, 0)


@triton.jit
def nsa_decode_combine(PART, OUT, LSE, H: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr,
                       DEPENDENT: tl.constexpr):  # fmt: skip
    """Grid (B * S * G * H,): the same combination as a launch of its own, head by head."""
    if DEPENDENT:
        gdc_wait()
    pid = tl.program_id(0)
    row = (pid // H).to(tl.int64)
    head = pid % H
    parts = tl.arange(0, SPLITS)
    columns = tl.arange(0, DVP)
    part = row * SPLITS + parts
    stat = PART + (tl.num_programs(0) // H).to(tl.int64) * (SPLITS * H * DV) + part * (2 * H) + head
    tops = tl.load(stat)
    totals = tl.load(stat + H)
    inside = (columns < DV)[None, :]
    outs = tl.load(PART + ((part * H + head) * DV)[:, None] + columns[None, :], mask=inside, other=0.0)
    if DEPENDENT:
        gdc_launch_dependents()
    top = tl.max(tops, 0)
    weight = tl.math.exp2(tops - top)
    total = tl.sum(weight * totals, 0)
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    out = tl.sum(outs * weight[:, None], 0) / divisor
    tl.store(OUT + (row * H + head) * DV + columns, out.to(OUT.dtype.element_ty), mask=columns < DV)
    if LSE is not None:
        tl.store(LSE + row * H + head, tl.where(some, top + tl.math.log2(divisor), float("inf")))


COMBINE_WARPS = 2
"""With 1 a batch of 8 took 10.1 us where it takes 7.9, with 4 14.5; one entry 4.7, 5.0 and 5.0."""


class Call:
    """One kind of call, ready: what follows from layouts and parameters is worked out once."""

    __slots__ = ("combine", "elements", "forward", "heads", "inside", "keys", "loads", "rows", "shape", "splits")

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, selection: Selection, parameters: dict[str, ParameterValue]
    ) -> None:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            unit_last(tensor, name)
        batch, queries, groups, heads, width = query.shape
        self.rows, self.splits, self.heads = batch * queries * groups, int(parameters["splits"]), heads
        self.keys, self.loads = min(int(parameters["step"]), selection.block_size), parameters["loads"]
        self.inside = self.splits > 1 and parameters["combine"] == "inside"
        self.shape = (*query.shape[:4], value.shape[3]) if value.shape[3] != width else None
        self.elements = self.rows * self.splits * heads * (value.shape[3] + 2) if self.splits > 1 else 0
        early = bool(parameters["dependent"])
        constants = shape_constants(query, value, selection)
        constants |= {"DESCRIPTOR": self.loads == "descriptor", "SPLITS": self.splits, "INSIDE": self.inside}
        constants |= {"STEP": self.keys, "DEPENDENT": early}
        options = {"num_warps": int(parameters["warps"]), "num_stages": int(parameters["stages"]), "launch_pdl": early}
        strides = (*query.stride()[:4], *key.stride()[:3], *value.stride()[:3], *selection.blocks.stride())
        trailing = (queries, groups, *selection_arguments(selection)[2:], *strides)
        self.forward = Plan(nsa_decode_forward, constants, options, trailing)
        wanted = {name: constants[name] for name in ("H", "DV", "DVP", "SPLITS", "DEPENDENT")}
        self.combine = Plan(nsa_decode_combine, wanted, {"num_warps": COMBINE_WARPS, "launch_pdl": early})

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float, logsum: Tensor | None
    ) -> Tensor:
        """Output (B, S, G, h, Dv); fills ``logsum`` (B, S, G, h) float32 if given, always or never for one Call."""
        if self.shape is None:  # a third of the host time that spelling it out takes
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
        else:
            out = torch.empty(self.shape, dtype=value.dtype, device=value.device)
        part = counter = None
        if self.inside:
            part, counter = scratch(self.rows, self.elements, out)
        elif self.elements:
            part = torch.empty(self.elements, dtype=torch.float32, device=out.device)
        sources = (key, key, value)
        if self.loads == "descriptor":
            sources = key_sources(key, value, selection, self.forward.constants, "descriptor", self.keys)
        self.forward(
            self.rows * self.splits,
            query, *sources, selection.indices, selection.context_length, selection.query_positions, out, logsum,
            part, counter, key.shape[2], scale * LOG2E,
        )  # fmt: skip
        if self.elements and not self.inside:
            self.combine(self.rows * self.heads, part, out, logsum)
        return out


def call_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    logsum: bool,
    parameters: dict[str, ParameterValue],
) -> Call:
    """The Call that serves these arguments, with or without ``logsum``. Shapes as in ``nsa.problem``."""
    name = call_key(query, key, value, selection, "decode", logsum, *parameters.values())
    known = plans(name)
    if not known:
        known["call"] = Call(query, key, value, selection, parameters)
    found: Call = known["call"]
    return found


KEPT_BYTES = 2**24
"""Partial rows that a stream keeps between calls; larger ones are allocated by each call."""
POOL = 65536
"""Counters set aside per device for captured calls: 256 KiB."""
_eager: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
_pools: dict[int, list[Tensor]] = {}


def scratch(rows: int, elements: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(``elements`` of float32, for partial rows and behind them their maxima and totals; ``rows`` int32 counters that
    are zero when the stream gets there and that nobody else uses), on the device of ``like``, for one launch.

    Eager calls share buffers per stream: each launch leaves zeros in the counters. A captured call has partial rows of
    its own and takes the next piece of a pool of counters, zeroed outside any capture, for good; without pool or room
    it records a memset of its own.
    """
    device = like.device
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.empty(elements, dtype=torch.float32, device=device), _captured_counters(rows, device)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    held = _eager.get(key)
    if held is not None and held[0].numel() >= elements and held[1].numel() >= rows:
        return held
    if device.index not in _pools:
        _pools[device.index] = [torch.zeros(POOL, dtype=torch.int32, device=device)]
    used, _eager[key] = grown(held, rows, elements, device)
    return used


def grown(
    held: tuple[Tensor, Tensor] | None, rows: int, elements: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Partial rows and counters of one call, and those that its stream keeps: counters always, so that only the first
    call of so many rows zeroes them, and partial rows up to KEPT_BYTES."""
    part, counters = held or (torch.empty(0, device=device), torch.empty(0, dtype=torch.int32, device=device))
    if counters.numel() < rows:
        counters = torch.zeros(max(rows, 1024), dtype=torch.int32, device=device)
    needed = part
    if part.numel() < elements:
        needed = torch.empty(elements, dtype=torch.float32, device=device)
    return (needed, counters), (needed if needed.nbytes <= KEPT_BYTES else part, counters)


def _captured_counters(rows: int, device: torch.device) -> Tensor:
    pieces = _pools.get(device.index) if device.type == "cuda" else None
    room = -(-rows // 4) * 4  # pieces stay aligned to 16 bytes, which kernels are compiled for
    if pieces and pieces[0].numel() >= room:
        piece, pieces[0] = pieces[0][:room], pieces[0][room:]
        return piece
    return torch.zeros(rows, dtype=torch.int32, device=device)
