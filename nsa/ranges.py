"""Leaf. What rows select, as tensors: blocks to ranges of keys, ranges clamped and made disjoint, their overlap.

Everything is vectorised and free of host synchronisation, except ``blocks_to_ranges_v1``, the readable twin of ``_v2``,
and ``mean_overlap``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ArgumentError


def blocks_to_ranges_v1(blocks: Tensor, block_size: int, limits: Tensor) -> Tensor:
    """The readable loop ("ranges v1"): blocks (B, S, G, n) and limits (B, S) to ranges (B, S, G, n, 2) int64."""
    ranges = torch.zeros((*blocks.shape, 2), dtype=torch.int64)
    for b, s, g, i in torch.cartesian_prod(*(torch.arange(size) for size in blocks.shape)).reshape(-1, 4).tolist():
        block, limit = int(blocks[b, s, g, i]), int(limits[b, s])
        start, end = block * block_size, min((block + 1) * block_size, limit)
        if block >= 0 and start < end:
            ranges[b, s, g, i] = torch.tensor((start, end))
    return ranges.to(blocks.device)


def blocks_to_ranges_v2(blocks: Tensor, block_size: int, limits: Tensor) -> Tensor:
    """The vectorised twin ("ranges v2"), without host synchronisation; same arguments, same result."""
    limit = limits[:, :, None, None]
    start = blocks.to(torch.int64) * block_size
    end = torch.minimum(start + block_size, limit)
    valid = (blocks >= 0) & (start < end)
    return torch.stack((start, end), -1) * valid[..., None]


def clamped(ranges: Tensor, limits: Tensor) -> Tensor:
    """Ranges (B, S, G, n, 2) cut at 0 and at limits (B, S), int64; those that then select nothing are (0, 0)."""
    cut = torch.minimum(ranges.to(torch.int64).clamp_min(0), limits[:, :, None, None, None])
    return cut * (cut[..., 1:] > cut[..., :1])


def disjoint(ranges: Tensor) -> Tensor:
    """Ranges (..., n, 2) sorted by start and cut so that no key is in two of them, same shape."""
    start, end = ranges.unbind(-1)
    start, order = start.sort(-1)
    end = end.gather(-1, order)
    covered = end.cummax(-1).values
    start = torch.cat((start[..., :1], torch.maximum(start[..., 1:], covered[..., :-1])), -1)
    return torch.stack((start, torch.maximum(start, end)), -1)


def blocks_of(ranges: Tensor) -> Tensor:
    """Ranges (..., 2) to the 64-key block (...) of each one's first key, -1 for a range that selects nothing."""
    start, end = ranges.unbind(-1)
    return torch.where(end > start, start // 64, -1)


def mean_overlap(blocks: Tensor) -> float:
    """Blocks (B, S, G, n): mean over windows of 4 neighbouring rows of (distinct in the union) / (chosen).

    Synchronises with the host. Raises ArgumentError for fewer than 4 queries.
    """
    batch, queries, groups, slots = blocks.shape
    if queries < 4:
        raise ArgumentError(f"overlap needs at least 4 neighbouring queries, got {queries}")
    whole = queries // 4 * 4
    windows = blocks[:, :whole].reshape(batch, -1, 4, groups, slots).transpose(2, 3).flatten(3)
    ordered = windows.sort(-1).values
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    union = (fresh & (ordered >= 0)).sum(-1)
    chosen = (windows >= 0).sum(-1).clamp_min(1)
    return float((union / chosen).mean())
