"""The decode step's first half: rotate the new token's queries and keys, append, compress what the token completes.

The position of each batch entry is read from the device. What the second half, ``step``, shares is here as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["slots", "room", "croom", "pages", "capacity"]
"""Arguments that kernels do not specialise on."""


@triton.jit
def storage_rows(TABLE, pages, branch, b, g, tokens, inside, slots, room, G: tl.constexpr, PAGE: tl.constexpr):
    """Rows of a storage (branches, slots, G, room, D) that hold ``tokens`` of (b, g)."""
    if PAGE > 0:
        slot = tl.load(TABLE + b * pages + tokens // PAGE, mask=inside, other=0).to(tl.int64)
        return ((slot + slots * branch) * G + g) * room + tokens % PAGE
    else:
        return ((slots * branch + b).to(tl.int64) * G + g) * room + tokens


@triton.jit
def context(LENGTH, b, capacity):
    """Tokens of entry b, the new one included, at most ``capacity``: beyond it nothing is there to be read."""
    return tl.minimum(tl.load(LENGTH + b) + 1, capacity)


@triton.jit
def mean_of(SOURCE, TABLE, pages, b, g, first, position, columns, real, new, slots, room, G: tl.constexpr,
            D: tl.constexpr, PAGE: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """Mean of the tokens from ``first`` to before ``position``, and the new one: summed in float32, 8 at a time."""
    total = new.to(tl.float32)
    for start in range(0, L, 8):
        tokens = first + start + tl.arange(0, 8)
        old = tokens < position
        rows = storage_rows(TABLE, pages, 0, b, g, tokens, old, slots, room, G, PAGE)
        keep = old[:, None] & real[None, :]
        tile = tl.load(SOURCE + rows[:, None] * D + columns[None, :], mask=keep, other=0.0)
        total += tl.sum(tile.to(tl.float32), 0)
    return (total / L).to(new.dtype)


@triton.jit
def turn_queries(SOURCE, TARGET, g, half, real, cosine, sine, H: tl.constexpr, HP: tl.constexpr, DK: tl.constexpr):
    """Rotate the queries of group g."""
    heads = tl.arange(0, HP)
    keep = (heads < H)[:, None] & real[None, :]
    at = (g * H + heads)[:, None] * DK + half[None, :]
    low = tl.load(SOURCE + at, mask=keep, other=0.0).to(tl.float32)
    high = tl.load(SOURCE + at + DK // 2, mask=keep, other=0.0).to(tl.float32)
    turned = low * cosine[None, :] - high * sine[None, :]
    tl.store(TARGET + at, turned.to(TARGET.dtype.element_ty), mask=keep)
    turned = high * cosine[None, :] + low * sine[None, :]
    tl.store(TARGET + at + DK // 2, turned.to(TARGET.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=SIZES)
def nsa_step_append(
    PROJECTED,
    QUERY,
    KEY,
    VALUE,
    CKEY,
    CVALUE,
    LENGTH,
    TABLE,
    FREQUENCY,
    slots,
    room,
    croom,
    pages,
    capacity,
    width,
    G: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    DK: tl.constexpr,
    HALF: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    MEAN_ROLE: tl.constexpr,
):
    """Grid (B * G, 4): role 0 to 2 appends a branch's key and value, role 3 turns the queries.

    PROJECTED (B, width): queries, keys by branch, values by branch. MEAN_ROLE (0, or -1: nobody) also writes the mean
    of a kernel that this token completes. Nothing is written at or beyond ``capacity``.
    """
    row = tl.program_id(0)
    role = tl.program_id(1)
    b, g = row // G, row % G
    position = tl.load(LENGTH + b)
    source = PROJECTED + b.to(tl.int64) * width
    half = tl.arange(0, HALF)
    real = half < DK // 2
    angle = position.to(tl.float64) * tl.load(FREQUENCY + half, mask=real, other=0.0)
    cosine, sine = tl.cos(angle).to(tl.float32), tl.sin(angle).to(tl.float32)
    if role == 3:
        turn_queries(source, QUERY + b.to(tl.int64) * (G * H * DK), g, half, real, cosine, sine, H, HP, DK)
    else:
        columns = tl.arange(0, DVP)
        fits = position < capacity
        at = source + G * H * DK + (role * G + g) * DK + half
        low = tl.load(at, mask=real, other=0.0).to(tl.float32)
        high = tl.load(at + DK // 2, mask=real, other=0.0).to(tl.float32)
        key_low = (low * cosine - high * sine).to(KEY.dtype.element_ty)
        key_high = (high * cosine + low * sine).to(KEY.dtype.element_ty)
        at = source + G * H * DK + 3 * G * DK + (role * G + g) * DV + columns
        value = tl.load(at, mask=columns < DV, other=0.0)
        new = storage_rows(TABLE, pages, role, b, g, position, fits, slots, room, G, PAGE)
        tl.store(KEY + new * DK + half, key_low, mask=real & fits)
        tl.store(KEY + new * DK + DK // 2 + half, key_high, mask=real & fits)
        tl.store(VALUE + new * DV + columns, value, mask=(columns < DV) & fits)
        first = position + 1 - L
        if (role == MEAN_ROLE) & (first >= 0) & (first % STRIDE == 0) & fits:
            done = storage_rows(TABLE, pages, 0, b, g, first // STRIDE, fits, slots, croom, G, PAGE // STRIDE)
            mean = mean_of(KEY, TABLE, pages, b, g, first, position, half, real, key_low, slots, room, G, DK, PAGE, L)
            tl.store(CKEY + done * DK + half, mean, mask=real)
            other = DK // 2 + half
            mean = mean_of(KEY, TABLE, pages, b, g, first, position, other, real, key_high, slots, room, G, DK, PAGE, L)
            tl.store(CKEY + done * DK + other, mean, mask=real)
            inside = columns < DV
            average = mean_of(
                VALUE, TABLE, pages, b, g, first, position, columns, inside, value, slots, room, G, DV, PAGE, L
            )
            tl.store(CVALUE + done * DV + columns, average, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def nsa_step_recent(SOURCE, RECENT, LENGTH, TABLE, slots, room, pages, capacity, G: tl.constexpr, D: tl.constexpr,
                    DP: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Grid (B * G,): the last L tokens of branch 0, the new one included, to RECENT (B * G, L, D); zeros before 0."""
    row = tl.program_id(0)
    b, g = row // G, row % G
    slot = tl.arange(0, LP)
    columns = tl.arange(0, DP)
    tokens = context(LENGTH, b, capacity) - L + slot
    there = (tokens >= 0) & (slot < L)
    rows = storage_rows(TABLE, pages, 0, b, g, tokens, there, slots, room, G, PAGE)
    inside = (columns < D)[None, :]
    got = tl.load(SOURCE + rows[:, None] * D + columns[None, :], mask=there[:, None] & inside, other=0.0)
    target = RECENT + (row.to(tl.int64) * L + slot)[:, None] * D + columns[None, :]
    tl.store(target, got, mask=(slot < L)[:, None] & inside)


@triton.jit(do_not_specialize=SIZES)
def nsa_step_keep(FRESH, TARGET, LENGTH, TABLE, slots, croom, pages, capacity, G: tl.constexpr, D: tl.constexpr,
                  DP: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Grid (B * G,): FRESH (B * G, D) is the compressed token of a kernel that the new token completes, if any."""
    row = tl.program_id(0)
    b, g = row // G, row % G
    columns = tl.arange(0, DP)
    first = context(LENGTH, b, capacity) - L
    if (first >= 0) & (first % STRIDE == 0):
        new = storage_rows(TABLE, pages, 0, b, g, first // STRIDE, first >= 0, slots, croom, G, PAGE // STRIDE)
        fresh = tl.load(FRESH + row * D + columns, mask=columns < D, other=0.0)
        tl.store(TARGET + new * D + columns, fresh, mask=columns < D)
