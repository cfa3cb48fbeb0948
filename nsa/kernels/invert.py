"""From "which blocks did this row choose" to "which rows chose this block", by counting sort on the device.

Rows of one (b, g) are cut into *spans* of tokens; a *unit* is one span of one (b, g). Each unit gets its pairs (row,
slot) sorted by block, then token, and cut into *items* of at most ``item_tokens`` pairs of one block. Sizes follow from
shapes alone, nothing is read on the host, and the order is the same in every run: a pair's rank is the number of set
bits below its own in a bitmap of the tokens that chose the block, 512 tokens to a bitmap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selection import Selection
from .launch import Plan, plans, selection_key
from .layout import context_length, key_count, power_of_two, row_limit, selection_arguments

BITMAP_TOKENS = 512
"""Tokens of one bitmap; spans are multiples of it where there are more tokens."""


class Lists(NamedTuple):
    """Pairs by block. U units = B * G * spans; unit u is span u % spans of (b, g) = u // spans.

    ``chosen`` (B*G, S) int64: bit i says that slot i counts. ``pairs`` (U, span_tokens * NP) int32: token * NP + slot.
    ``items`` (U, item_slots, 3) int32: block, first and end pair. ``item_count`` (U,) int32. ``ranges`` (U, blocks, 2)
    int32: each block's items. ``places`` (B*G, S, NP) int32: where a slot's pair stands among its unit's, if asked for.
    """

    chosen: Tensor
    pairs: Tensor
    items: Tensor
    item_count: Tensor
    ranges: Tensor
    places: Tensor | None
    spans: int
    span_tokens: int
    item_slots: int
    blocks: int

    @property
    def tile(self) -> int:
        """The largest power of two that divides a span: tiles of tokens up to it lie in one span."""
        return self.span_tokens & -self.span_tokens


@triton.jit
def listed_item(ITEMS, unit, item_slots, i):
    """(block, first pair, end pair) of a unit's item ``i``."""
    item = ITEMS + (unit * item_slots + i) * 3
    return tl.load(item), tl.load(item + 1), tl.load(item + 2)


@triton.jit
def count_bits(word):
    """Set bits of each int32."""
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["LENGTH", "S", "T", "blocks", "bitmaps"])
def nsa_invert_mark(
    X,
    LENGTH,
    POSITION,
    CHOSEN,
    BITS,
    COUNTS,
    S,
    T,
    G,
    spb,
    sps,
    sxb,
    sxs,
    sxg,
    sxn,
    blocks,
    bitmaps,
    N: tl.constexpr,
    NP: tl.constexpr,
    BS: tl.constexpr,
    TENSOR_LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Grid (B * G * tiles,): sets CHOSEN, and per (b, g, bitmap, block) the tokens' bits and their number."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(S, TILE)
    tile = pid % tiles
    bg = pid // tiles
    g = bg % G
    b = bg // G
    slots = tl.arange(0, NP)
    s = tile * TILE + tl.arange(0, TILE)
    real = s < S
    length = key_count(LENGTH, b, T, TENSOR_LENGTH)
    full = context_length(LENGTH, b, TENSOR_LENGTH)
    limit = row_limit(POSITION, b, tl.minimum(s, S - 1), length, full, S, spb, sps)
    base = X + b.to(tl.int64) * sxb + g.to(tl.int64) * sxg
    entry = tl.load(base + s.to(tl.int64)[:, None] * sxs + (slots * sxn)[None, :],
                    mask=real[:, None] & (slots < N)[None, :], other=-1)  # fmt: skip
    valid = (entry >= 0) & (entry < tl.cdiv(limit, BS)[:, None])
    entry = tl.where(valid, entry, -1).to(tl.int32)
    same = (entry[:, :, None] == entry[:, None, :]) & (slots[None, :] < slots[:, None])[None, :, :]
    first = valid & (tl.sum(same.to(tl.int32), 2) == 0)
    flag = tl.full([1], 1, tl.int64) << slots.to(tl.int64)
    chosen = tl.sum(tl.where(first, flag[None, :], 0), 1)
    tl.store(CHOSEN + bg.to(tl.int64) * S + s, chosen, mask=real)
    bitmap = bg.to(tl.int64) * bitmaps + (tile * TILE) // (WORDS * 32)
    cell = bitmap * blocks + entry
    word = (s % (WORDS * 32)) // 32
    bit = tl.full([1], 1, tl.int32) << (s % 32)
    tl.atomic_or(BITS + cell * WORDS + word[:, None], tl.broadcast_to(bit[:, None], TILE, NP), mask=first,
                 sem="relaxed")  # fmt: skip
    tl.atomic_add(COUNTS + cell, tl.full([TILE, NP], 1, tl.int32), mask=first, sem="relaxed")


@triton.jit(do_not_specialize=["blocks", "bitmaps", "spans", "item_slots"])
def nsa_invert_offsets(
    COUNTS,
    BASE,
    ITEMS,
    ITEM_COUNT,
    RANGES,
    blocks,
    bitmaps,
    spans,
    item_slots,
    SPAN_BITMAPS: tl.constexpr,
    BITMAPS_PADDED: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
    ITEM_TOKENS: tl.constexpr,
):
    """Grid (U,): where each (bitmap, block) begins among the unit's pairs, and the unit's items."""
    unit = tl.program_id(0).to(tl.int64)
    bg = unit // spans
    bitmap = (unit % spans) * SPAN_BITMAPS + tl.arange(0, BITMAPS_PADDED)
    real = (tl.arange(0, BITMAPS_PADDED) < SPAN_BITMAPS) & (bitmap < bitmaps)
    pairs = 0
    items = 0
    for start in range(0, blocks, BLOCK_TILE):
        block = start + tl.arange(0, BLOCK_TILE)
        inside = block < blocks
        cell = (bg * bitmaps + bitmap)[:, None] * blocks + block[None, :]
        mask = real[:, None] & inside[None, :]
        count = tl.load(COUNTS + cell, mask=mask, other=0)
        total = tl.sum(count, 0)
        low = pairs + tl.cumsum(total, 0) - total
        tl.store(BASE + cell, low[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        parts = tl.cdiv(total, ITEM_TOKENS)
        item = items + tl.cumsum(parts, 0) - parts
        tl.store(RANGES + (unit * blocks + block) * 2, item, mask=inside)
        tl.store(RANGES + (unit * blocks + block) * 2 + 1, item + parts, mask=inside)
        for part in range(0, tl.max(parts, 0)):
            where = ITEMS + (unit * item_slots + item + part) * 3
            begin = low + part * ITEM_TOKENS
            tl.store(where, block, mask=part < parts)
            tl.store(where + 1, begin, mask=part < parts)
            tl.store(where + 2, tl.minimum(begin + ITEM_TOKENS, low + total), mask=part < parts)
        pairs += tl.sum(total, 0)
        items += tl.sum(parts, 0)
    tl.store(ITEM_COUNT + unit, items)


@triton.jit(do_not_specialize=["S", "blocks", "bitmaps", "spans"])
def nsa_invert_fill(
    X,
    CHOSEN,
    BITS,
    BASE,
    PAIRS,
    PLACES,
    S,
    G,
    sxb,
    sxs,
    sxg,
    sxn,
    blocks,
    bitmaps,
    spans,
    NP: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    SPAN_BITMAPS: tl.constexpr,
):
    """Grid (B * G * tiles,): writes every pair to its place, and the place to PLACES if there is one."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(S, TILE)
    tile = pid % tiles
    bg = (pid // tiles).to(tl.int64)
    g = bg % G
    b = bg // G
    slots = tl.arange(0, NP)
    s = tile * TILE + tl.arange(0, TILE)
    chosen = tl.load(CHOSEN + bg * S + s, mask=s < S, other=0)
    first = ((chosen[:, None] >> slots.to(tl.int64)[None, :]) & 1) == 1
    base = X + b * sxb + g * sxg
    entry = tl.load(base + s.to(tl.int64)[:, None] * sxs + (slots * sxn)[None, :], mask=first, other=0)
    bitmap = (tile * TILE) // (WORDS * 32)
    cell = (bg * bitmaps + bitmap) * blocks + entry
    words = tl.arange(0, WORDS)
    mine = (s % (WORDS * 32)) // 32
    lower = (tl.full([1], 1, tl.int32) << (s % 32)) - 1
    below = tl.where(words[None, :] < mine[:, None], -1, tl.where(words[None, :] == mine[:, None], lower[:, None], 0))
    bits = tl.load(BITS + cell[:, :, None] * WORDS + words[None, None, :], mask=first[:, :, None], other=0)
    rank = tl.sum(count_bits(bits & below[:, None, :]), 2)
    place = tl.load(BASE + cell, mask=first, other=0) + rank
    unit = bg * spans + bitmap // SPAN_BITMAPS
    pairs = PAIRS + unit * (SPAN_BITMAPS * WORDS * 32 * NP)
    tl.store(pairs + place, s[:, None] * NP + slots[None, :], mask=first)
    if PLACES is not None:
        tl.store(PLACES + (bg * S + s)[:, None] * NP + slots[None, :], place, mask=first)


def invert(selection: Selection, keys: int, *, span: int, item_tokens: int, placed: bool = False) -> Lists:
    """Sort a selection's pairs by block. ``span`` tokens per unit, rounded up to whole bitmaps; 0 = all tokens.
    ``placed``: ``Lists.places`` too."""
    indices = selection.blocks
    batch, queries, groups, slots = indices.shape
    device, padded = indices.device, power_of_two(slots)
    blocks = triton.cdiv(keys, selection.block_size)
    bitmap_tokens = min(BITMAP_TOKENS, power_of_two(queries, 32))
    bitmaps = triton.cdiv(queries, bitmap_tokens)
    span_bitmaps = min(bitmaps, triton.cdiv(span or queries, bitmap_tokens))
    spans = triton.cdiv(bitmaps, span_bitmaps)
    span_tokens = span_bitmaps * bitmap_tokens
    units, cells = batch * groups * spans, batch * groups * bitmaps * blocks
    item_slots = min(blocks, span_tokens * slots) + span_tokens * slots // item_tokens
    words = bitmap_tokens // 32
    zeros = torch.zeros(aligned(cells * words) + aligned(cells), dtype=torch.int32, device=device)
    bits, counts = pieces(zeros, cells * words, cells)
    sizes = (cells, units * span_tokens * padded, units * item_slots * 3, units, units * blocks * 2)
    fresh = torch.empty(sum(map(aligned, sizes)), dtype=torch.int32, device=device)
    base, pairs, items, item_count, ranges = pieces(fresh, *sizes)
    chosen = torch.empty(batch * groups * queries, dtype=torch.int64, device=device)
    places = torch.empty(batch * groups * queries * padded, dtype=torch.int32, device=device) if placed else None
    length, positions, *position_strides = selection_arguments(selection)
    tile = max(1, min(bitmap_tokens, 512 // padded))
    bitmaps_padded = power_of_two(span_bitmaps)
    block_tile = min(power_of_two(blocks), max(16, min(1024, 8192 // bitmaps_padded)))
    sizes_known = (groups, placed, item_tokens, tile, words, span_bitmaps, block_tile)
    known = plans((*selection_key(selection), "invert", *sizes_known))
    if not known:
        shared = {"NP": padded, "TILE": tile, "WORDS": words}
        marked = {"N": slots, "BS": selection.block_size, "TENSOR_LENGTH": isinstance(length, Tensor), **shared}
        listed = {"SPAN_BITMAPS": span_bitmaps, "BITMAPS_PADDED": bitmaps_padded, "BLOCK_TILE": block_tile}
        known["mark"] = Plan(nsa_invert_mark, marked, {"num_warps": 4})
        known["offsets"] = Plan(nsa_invert_offsets, {**listed, "ITEM_TOKENS": item_tokens}, {"num_warps": 8})
        known["fill"] = Plan(nsa_invert_fill, {**shared, "SPAN_BITMAPS": span_bitmaps}, {"num_warps": 4})
    grid = batch * groups * triton.cdiv(queries, tile)
    known["mark"](
        grid, indices, length, positions, chosen, bits, counts, queries, keys, groups,
        *position_strides, *indices.stride(), blocks, bitmaps,
    )  # fmt: skip
    known["offsets"](units, counts, base, items, item_count, ranges, blocks, bitmaps, spans, item_slots)
    known["fill"](
        grid, indices, chosen, bits, base, pairs, places, queries, groups, *indices.stride(), blocks, bitmaps, spans
    )
    return Lists(chosen, pairs, items, item_count, ranges, places, spans, span_tokens, item_slots, blocks)


def aligned(size: int) -> int:
    """``size`` int32 rounded up to 16 bytes, for which kernels are compiled."""
    return -(-size // 4) * 4


def pieces(whole: Tensor, *sizes: int) -> list[Tensor]:
    """Consecutive aligned pieces of a buffer, each cut to its size."""
    return [part[:size] for part, size in zip(whole.split([aligned(size) for size in sizes]), sizes, strict=True)]
