"""One program per row (token and group), or a few one after the other: a row's h query heads stand against its own
blocks, block by block.

Traffic is every row's keys and values through L2, whatever the neighbours read: bound by L2 where h is small. Several
tokens make fewer programs with longer lives, and change no product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selection import Selection
from ..trace import ParameterValue
from .launch import Plan, call_key, plans
from .layout import (
    LOG2E,
    attend,
    context_length,
    finish,
    first_entries,
    key_count,
    key_sources,
    load_query,
    row_limit,
    selection_arguments,
    shape_constants,
    unit_last,
)


@triton.jit(do_not_specialize=["LENGTH", "S", "T"])
def nsa_token_forward(
    Q,
    K0,
    K1,
    V,
    X,
    LENGTH,
    POSITION,
    OUT,
    LSE,
    S,
    T,
    G,
    scale2,
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
    GROUP_FIRST: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid (B * tiles * G,), tiles of TOKENS neighbouring tokens that a program takes one after the other. With
    GROUP_FIRST neighbours in the grid are groups of one tile, else tiles of one group. A token past S reads and writes
    nothing."""
    M: tl.constexpr = max(HP, 16)
    CHUNKS: tl.constexpr = max(NP // 32, 1)
    CHUNK_SIZE: tl.constexpr = min(NP, 32)
    pid = tl.program_id(0)
    tiles = tl.cdiv(S, TOKENS)
    if GROUP_FIRST:
        g = pid % G
        tile = (pid // G) % tiles
    else:
        tile = pid % tiles
        g = (pid // tiles) % G
    b = pid // (tiles * G)
    slots = tl.arange(0, CHUNK_SIZE)
    heads = tl.arange(0, M)
    columns = tl.arange(0, DVP)
    length = key_count(LENGTH, b, T, TENSOR_LENGTH)
    full = context_length(LENGTH, b, TENSOR_LENGTH)
    for turn in range(TOKENS):
        token = tile * TOKENS + turn
        s = tl.minimum(token, S - 1) if TOKENS > 1 else token
        limit = row_limit(POSITION, b, s, length, full, S, spb, sps)
        there = heads < H
        if TOKENS > 1:
            limit = tl.where(token < S, limit, 0)
            there = there & (token < S)
        row = X + b.to(tl.int64) * sxb + s.to(tl.int64) * sxs + g * sxg
        e0 = first_entries(row, sxn, slots, limit, N, BS)
        e1 = e0
        e2 = e0
        e3 = e0
        if CHUNKS > 1:
            e1 = first_entries(row, sxn, slots + CHUNK_SIZE, limit, N, BS)
        if CHUNKS > 2:
            e2 = first_entries(row, sxn, slots + 2 * CHUNK_SIZE, limit, N, BS)
            e3 = first_entries(row, sxn, slots + 3 * CHUNK_SIZE, limit, N, BS)
        base = Q + b.to(tl.int64) * sqb + s.to(tl.int64) * sqs + g.to(tl.int64) * sqg
        q0 = load_query(base, heads, heads * sqh, there, 0, DK, DK0)
        q1 = q0
        if DK1 > 0:
            q1 = load_query(base, heads, heads * sqh, there, DK0, DK, DK1)
        out, top, total = attend(
            q0, q1, e0, e1, e2, e3, limit, K0, K1, V, b, g, length, scale2,
            skb, skg, skt, svb, svg, svt,
            M, CHUNKS, DK, DK0, DK1, DV, DVP, BS, STEP, DESCRIPTOR, TENSOR_LENGTH,
        )  # fmt: skip
        out, logsum = finish(out, top, total, scale2)
        place = ((b.to(tl.int64) * S + s) * G + g) * H
        keep = there[:, None]
        if DVP > DV:
            keep = keep & (columns < DV)[None, :]
        tl.store(OUT + place * DV + heads[:, None] * DV + columns[None, :], out.to(OUT.dtype.element_ty), mask=keep)
        if LSE is not None:
            tl.store(LSE + place + heads, logsum, mask=there)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    logsum: Tensor | None,
    *,
    step: ParameterValue,
    warps: ParameterValue,
    stages: ParameterValue,
    order: ParameterValue,
    loads: ParameterValue,
    tokens: ParameterValue,
) -> Tensor:
    """Output (B, S, G, h, Dv); fills ``logsum`` (B, S, G, h) float32 if given. Shapes as in ``nsa.problem``."""
    batch, queries, groups, heads, _ = query.shape
    out = torch.empty((batch, queries, groups, heads, value.shape[3]), dtype=value.dtype, device=value.device)
    keys = min(int(step), selection.block_size)
    name = call_key(query, key, value, selection, "token", logsum is None, keys, warps, stages, order, loads, tokens)
    known = plans(name)
    if not known:
        unit_last(query, "query")
        constants = shape_constants(query, value, selection)
        constants |= {"DESCRIPTOR": loads == "descriptor", "STEP": keys, "GROUP_FIRST": order == "group"}
        constants |= {"TOKENS": int(tokens)}
        options = {"num_warps": int(warps), "num_stages": int(stages)}
        known["forward"] = Plan(nsa_token_forward, constants, options)
    plan = known["forward"]
    sources = key_sources(key, value, selection, plan.constants, str(loads), keys)
    length, positions, *position_strides = selection_arguments(selection)
    plan(
        batch * groups * -(-queries // int(tokens)),
        query, *sources, selection.blocks, length, positions, out, logsum,
        queries, key.shape[2], groups, scale * LOG2E, *position_strides,
        *query.stride()[:4], *key.stride()[:3], *value.stride()[:3], *selection.blocks.stride(),
    )  # fmt: skip
    return out
