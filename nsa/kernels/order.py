"""Leaf of the union kernel: which tokens share a tile. Neighbours, or the tokens of a chunk that share most blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from .invert import count_bits
from .layout import power_of_two

CHUNK_TOKENS = 64
"""Tokens among which tiles are made up: as many as share their own block, where a block has that many keys."""
CHUNK = tl.constexpr(CHUNK_TOKENS)


@triton.jit
def tile_tokens(ORDER, bg, tile, member, S, TOKENS: tl.constexpr):
    """(start, local): token ``member`` of a tile is ``start + local``; at S or above there is none."""
    if ORDER is None:
        start = tile * TOKENS
        local = member
    else:
        start = (tile * TOKENS) // CHUNK * CHUNK
        local = tl.load(ORDER + bg * (tl.cdiv(S, CHUNK) * CHUNK) + tile * TOKENS + member)
    return start, local


@triton.jit(do_not_specialize=["S"])
def nsa_union_order(
    X, ORDER, S, G, sxb, sxs, sxg, sxn, N: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Grid (B * G * chunks,): a chunk's tokens, tile by tile. A tile takes the first token left, then one after the
    other that which shares most blocks with those it has. Blocks WORDS * 32 apart count as the same: this chooses
    company, not keys. One warp: no barriers."""
    pid = tl.program_id(0)
    chunks = tl.cdiv(S, CHUNK)
    g = (pid // chunks) % G
    b = pid // (chunks * G)
    lanes = tl.arange(0, CHUNK)
    words = tl.arange(0, WORDS)
    s = (pid % chunks) * CHUNK + lanes
    row = X + b.to(tl.int64) * sxb + g.to(tl.int64) * sxg + s.to(tl.int64) * sxs
    bits = tl.zeros([WORDS, CHUNK], tl.int32)
    for slot in tl.static_range(N):
        block = tl.load(row + slot * sxn, mask=s < S, other=-1).to(tl.int32)
        mine = (words[:, None] == ((block >> 5) & (WORDS - 1))[None, :]) & (block >= 0)[None, :]
        bits |= tl.where(mine, (tl.full([CHUNK], 1, tl.int32) << (block & 31))[None, :], 0)
    left = tl.where(s < S, 2, 1)  # tokens that do not exist come last
    for tile in range(CHUNK // TOKENS):
        held = tl.zeros([WORDS], tl.int32)
        for member in tl.static_range(TOKENS):
            shared = tl.sum(count_bits(bits & held[:, None]), 0)
            rank = tl.where(left == 2, (shared + 1) * CHUNK, 0) + CHUNK - 1 - lanes
            best = CHUNK - 1 - tl.max(tl.where(left > 0, rank, -1), 0) % CHUNK
            left = tl.where(lanes == best, 0, left)
            held |= tl.sum(tl.where((lanes == best)[None, :], bits, 0), 1)
            tl.store(ORDER + pid * CHUNK + tile * TOKENS + member, best)


def order_words(keys: int, block_size: int) -> int:
    """Words of 32 blocks in which a token's blocks are noted: enough for all of ``keys``, but at most 32."""
    return min(32, power_of_two(triton.cdiv(triton.cdiv(keys, block_size), 32)))
