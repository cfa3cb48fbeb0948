"""What ``gradient_products`` left in parts, added up in a fixed order: query gradients per row, key and value gradients
per block."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_order(
    part, TILE: tl.constexpr, HP: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, PAIRED: tl.constexpr
):  # fmt: skip
    """Columns of (TILE, HP, PADDED) as they were before ``gradient_products.store_query_part`` with M rows, or PAIRED
    ``gradient_ring.store_query_part``."""
    if PAIRED:
        part = part.reshape(TILE, HP // 2, 4, 8, 2, PADDED // 64, 2)  # warp, column, one, tile, half
        part = tl.permute(part, (0, 1, 4, 5, 2, 6, 3)).reshape(TILE, HP, PADDED)
    elif M % 64 == 0 and PADDED % 32 == 0:
        part = part.reshape(TILE, HP, PADDED // 32, 4, 4, 2)  # group, pair, eight, one
        part = tl.permute(part, (0, 1, 2, 4, 3, 5)).reshape(TILE, HP, PADDED)
    elif M % 8 == 0 and PADDED % 64 == 0:
        part = part.reshape(TILE, HP, 4, 8, PADDED // 64, 2)  # warp, column, tile, half
        part = tl.permute(part, (0, 1, 4, 2, 5, 3)).reshape(TILE, HP, PADDED)
    return part


@triton.jit
def sum_of_partials(
    PART_Q, PLACES, chosen, unit, real, heads, COLUMN: tl.constexpr, PADDED: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, N: tl.constexpr, DK: tl.constexpr, TILE: tl.constexpr, M: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """(TILE, HP, PADDED) float32: partials of some tokens, columns COLUMN .. COLUMN + PADDED in their own order."""
    UNROLL: tl.constexpr = min(N, 8)
    columns = COLUMN + tl.arange(0, PADDED)
    inside = (columns < DK)[None, None, :]
    total = tl.zeros([TILE, HP, PADDED], tl.float32)
    for slot in tl.range(0, N, loop_unroll_factor=UNROLL):
        here = ((chosen >> slot) & 1) == 1
        place = unit + tl.load(PLACES + slot, mask=here, other=0)
        source = (place[:, None] * H + heads[None, :]) * DK
        here = here[:, None] & real
        part = tl.load(PART_Q + source[:, :, None] + columns[None, None, :], mask=here[:, :, None] & inside, other=0.0)
        total += part.to(tl.float32)
    if COLUMN + PADDED <= DK:
        total = in_order(total, TILE, HP, PADDED, M, PAIRED)
    return total


@triton.jit(do_not_specialize=["S", "first_token", "held"])
def nsa_gradient_query(
    PART_Q, PLACES, CHOSEN, DQ, S, G, first_token, held, scale,
    H: tl.constexpr, HP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, DK: tl.constexpr, DK0: tl.constexpr,
    DK1: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, M: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * tiles,): a row's query gradient is ``scale`` times the sum of its partials, of which those of
    ``held`` tokens are there."""
    tiles = tl.cdiv(held, TILE)
    pid = tl.program_id(0)
    bg = (pid // tiles).to(tl.int64)
    local = (pid % tiles) * TILE + tl.arange(0, TILE)
    s = first_token + local
    heads = tl.arange(0, HP)
    real = (heads < H)[None, :] & (s < S)[:, None]
    chosen = tl.load(CHOSEN + bg * S + s, mask=s < S, other=0)
    places = PLACES + (bg * S + s) * NP
    unit = ((bg * held + local) // SPAN) * (SPAN * N)
    row = ((((bg // G) * S + s) * G + bg % G)[:, None] * H + heads[None, :]) * DK
    columns0 = tl.arange(0, DK0)
    total0 = sum_of_partials(PART_Q, places, chosen, unit, real, heads, 0, DK0, H, HP, N, DK, TILE, M, PAIRED)
    tl.store(DQ + row[:, :, None] + columns0[None, None, :], (total0 * scale).to(DQ.dtype.element_ty),
             mask=real[:, :, None] & (columns0 < DK)[None, None, :])  # fmt: skip
    if DK1 > 0:
        columns1 = DK0 + tl.arange(0, DK1)
        total1 = sum_of_partials(PART_Q, places, chosen, unit, real, heads, DK0, DK1, H, HP, N, DK, TILE, M, PAIRED)
        tl.store(DQ + row[:, :, None] + columns1[None, None, :], (total1 * scale).to(DQ.dtype.element_ty),
                 mask=real[:, :, None] & (columns1 < DK)[None, None, :])  # fmt: skip


@triton.jit(do_not_specialize=["T", "spans", "span", "units", "item_slots", "blocks"])
def nsa_gradient_key(
    PART_KV, RANGES, DKEY, DVALUE, T, spans, span, units, item_slots, blocks, scale,
    DK: tl.constexpr, DV: tl.constexpr, BS: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Grid (B * G * blocks * column tiles, of DK then of DV): adds a block's item partials, in order, to DKEY and
    DVALUE (B, G, T, D); with ADD onto what earlier spans left there."""
    key_tiles: tl.constexpr = (DK + TILE - 1) // TILE
    tiles: tl.constexpr = key_tiles + (DV + TILE - 1) // TILE
    tile = tl.program_id(0) % tiles
    bg = (tl.program_id(0) // (tiles * blocks)).to(tl.int64)
    block = (tl.program_id(0) // tiles) % blocks
    keys = tl.arange(0, BS)
    is_key = tile < key_tiles
    column = tl.where(is_key, tile, tile - key_tiles) * TILE + tl.arange(0, TILE)
    width = tl.where(is_key, DK, DV)
    inside = (column < width)[None, :]
    source = keys[:, None] * (DK + DV) + (column + tl.where(is_key, 0, DK))[None, :]
    total = tl.zeros([BS, TILE], tl.float32)
    for unit in range(units):
        ends = RANGES + ((bg * spans + span + unit) * blocks + block) * 2
        there = span + unit < spans
        low = tl.load(ends, mask=there, other=0)
        high = tl.load(ends + 1, mask=there, other=0)
        for item in range(low, high):
            base = PART_KV + ((bg * units + unit) * item_slots + item) * (BS * (DK + DV))
            total += tl.load(base + source, mask=inside, other=0.0)
    position = block * BS + keys
    target = (bg * T + position)[:, None] * width + column[None, :]
    keep = inside & (position < T)[:, None]
    if is_key:
        total *= scale
        if ADD:
            total += tl.load(DKEY + target, mask=keep, other=0.0)
        tl.store(DKEY + target, total.to(DKEY.dtype.element_ty), mask=keep)
    else:
        if ADD:
            total += tl.load(DVALUE + target, mask=keep, other=0.0)
        tl.store(DVALUE + target, total.to(DVALUE.dtype.element_ty), mask=keep)
