"""The end of the decode step's attention: merge the parts of each branch, gate and add them, count the new token."""

from __future__ import annotations

import triton
import triton.language as tl

from .step import power


@triton.jit
def parts_of(PART, TOP, TOTAL, first, BEGIN: tl.constexpr, i, columns, H: tl.constexpr, DV: tl.constexpr,
             COUNT: tl.constexpr):  # fmt: skip
    """Head i's maxima, totals and values (COUNT, DVP) of its COUNT parts from BEGIN on; of none zeros."""
    if COUNT > 0:
        at = (first + BEGIN + tl.arange(0, COUNT)).to(tl.int64) * H + i
        parts = tl.load(PART + at[:, None] * DV + columns[None, :], mask=(columns < DV)[None, :], other=0.0)
        return tl.load(TOP + at), tl.load(TOTAL + at), parts
    else:
        nothing = tl.zeros([1], TOP.dtype.element_ty)
        return nothing, nothing, tl.zeros([1, columns.shape[0]], tl.float32)


@triton.jit
def merged(tops, totals, parts, raw, COUNT: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr):
    """Attention (DVP,) from its parts, times its gate; zeros where there is no key or no part."""
    if COUNT > 0:
        weight = power(tops - tl.max(tops, 0), WIDE)
        total = tl.sum(weight * totals, 0)
        weight = (weight / tl.where(total > 0, total, 1.0)).to(tl.float32)
        out = tl.sum(parts * weight[:, None], 0)
        if GATED:
            out = out / (1.0 + tl.exp(-raw))
        return out
    else:
        return tl.zeros([parts.shape[1]], tl.float32)


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
):
    """Grid (B * G * H,): merge the parts of each branch that has any, gate, add; then the entry is one token longer.

    A branch's parts begin at 0, SECOND and THIRD. Gates stand in PROJECTED from column GATE on, three per head; without
    GATED they are 1.
    """
    pid = tl.program_id(0)
    i, b = pid % H, pid // (G * H)
    first = pid // H * PARTS
    columns = tl.arange(0, DVP)
    at = pid % (G * H) * 3
    gates = PROJECTED + b.to(tl.int64) * width + GATE + at
    raw0 = tl.load(gates).to(tl.float32) + tl.load(BIAS + at).to(tl.float32)
    raw1 = tl.load(gates + 1).to(tl.float32) + tl.load(BIAS + at + 1).to(tl.float32)
    raw2 = tl.load(gates + 2).to(tl.float32) + tl.load(BIAS + at + 2).to(tl.float32)
    # all is asked for before anything is waited for
    top0, total0, parts0 = parts_of(PART, TOP, TOTAL, first, 0, i, columns, H, DV, COMPRESSED)
    top1, total1, parts1 = parts_of(PART, TOP, TOTAL, first, SECOND, i, columns, H, DV, SELECTED)
    top2, total2, parts2 = parts_of(PART, TOP, TOTAL, first, THIRD, i, columns, H, DV, RECENT)
    out = merged(top0, total0, parts0, raw0, COMPRESSED, GATED, WIDE)
    out += merged(top1, total1, parts1, raw1, SELECTED, GATED, WIDE)
    out += merged(top2, total2, parts2, raw2, RECENT, GATED, WIDE)
    tl.store(MIXED + pid.to(tl.int64) * DV + columns, out.to(MIXED.dtype.element_ty), mask=columns < DV)
    if pid % (G * H) == 0:
        tl.store(LENGTH + b, tl.load(LENGTH + b) + 1)
