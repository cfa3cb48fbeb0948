"""Which blocks each row selects: compressed attention probabilities -> block scores -> forced blocks and top-k.

Reads the compressed keys of ``nsa.compression`` and yields the block indices of a ``Selection``; also used on its own,
by the tuner's ``scored`` pattern. Nothing here is differentiated. Chunked over queries, so memory is bounded. Two
routes with one rule: ``torch``, and on a GPU the two kernels of ``kernels.score``.

The choice must not depend on how a context was split into calls, though matrix products of other shapes round
differently. So float32 and float64 are scored in float64 (the design asks for float32 at least; 16-bit types are scored
in float32): between prefill and decode scores then differ by 4e-8 at most, in float32 by 2.5e-7, and a row's last
chosen and first left-out score are closer than g with probability 25 g (measured: random layer, dim 256, 5244 rows).
Blocks add their tokens in one fixed order, so structural ties (blocks under the same compressed tokens) are exact, and
scores that agree to 32 mantissa bits (2.3e-10) count as tied, which keeps ties from repeated content: the lower block.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ArgumentError, UnsupportedPathError
from .kernels.support import Route, device_reason
from .opaque import opaque
from .problem import compressed_count
from .rows import row_chunks

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Probabilities held at once: 32 MiB or 1 GiB in float64, and three times that in passing."""

INDEX_BITS = 20
"""Low bits of a ranking key that hold the block, which leaves 32 mantissa bits of the score; 2**20 blocks at most."""

FORCED = 0x7FF0_0000_0000_0000
"""Bits of float64 infinity: above every score."""


@partial(opaque, when=lambda query, *_, **__: query.is_cuda)
@torch.no_grad()
def choose_blocks(
    query: Tensor,
    compressed_key: Tensor,
    *,
    context_length: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    positions: Tensor | None = None,
    scale: float | None = None,
    logsum: Tensor | None = None,
    route: Route = "auto",
) -> Tensor:
    """The min(topk, eligible) blocks of each row, ascending, then -1: (B, S, G, topk) int32.

    query (B, S, G, h, Dk); compressed_key (B, G, N, Dk), N >= the compressed tokens of the context; ``positions`` (S,)
    or (B, S), None = the last S of the context. Eligible are blocks that start at or before the position. Block 0, the
    row's own and the one before are forced, each once; below topk 3 in this order. Then by score, ties to the lower.
    No host synchronisation. ``logsum``: the compressed attention's log-sum-exps with the same scale, as
    ``selection.LogSums`` has them; saves finding them where scores are float32. ``route``: auto = triton where it can
    run on a GPU. Raises ArgumentError, and UnsupportedPathError where ``triton`` is asked for and cannot run.
    """
    sizes = (context_length, kernel_size, kernel_stride, block_size, topk)
    _check_sizes(query, compressed_key, *sizes, positions)
    if route == "triton" or (route == "auto" and query.is_cuda):
        reason = fused_reason(query)
        if reason is None:
            return _fused(query, compressed_key, *sizes, positions, scale, logsum)
        if route == "triton":
            raise UnsupportedPathError(reason)
    batch, queries, groups, heads, _ = query.shape
    blocks = -(-context_length // block_size)
    tokens = compressed_count(context_length, kernel_size, kernel_stride)
    compressed_key = compressed_key[:, :, :tokens].to(scoring_dtype(query.dtype))
    steps = torch.arange(context_length - queries, context_length, device=query.device)
    places = steps.expand(batch, -1) if positions is None else positions.expand(batch, -1)
    chunk = max(1, CHUNK_ELEMENTS[query.device.type] // (batch * groups * heads * max(1, tokens, blocks)))
    parts = []
    for first, end in row_chunks(queries, chunk):
        last = context_length - queries + end if positions is None else context_length
        scores = block_scores(
            query[:, first:end],
            compressed_key[:, :, : compressed_count(last, kernel_size, kernel_stride)],
            positions=places[:, first:end],
            blocks=blocks,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            block_size=block_size,
            scale=scale,
        )
        parts.append(rank_blocks(scores, places[:, first:end], block_size, topk))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _fused(
    query: Tensor,
    compressed_key: Tensor,
    context_length: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    positions: Tensor | None,
    scale: float | None,
    logsum: Tensor | None,
) -> Tensor:
    """``choose_blocks`` by the kernels."""
    from .kernels import score  # Triton, loaded when first run
    from .kernels.interval import Interval

    wide = scoring_dtype(query.dtype) == torch.float64
    places = None if positions is None else positions.expand(query.shape[0], -1)
    key = compressed_key[:, :, : compressed_count(context_length, kernel_size, kernel_stride)]
    interval = Interval(kernel_size, kernel_stride, 0, context_length - query.shape[1], places)
    logsum = None if wide else logsum
    return score.choose(
        query if query.stride(-1) == 1 else query.contiguous(),
        key if key.stride(-1) == 1 else key.contiguous(),
        interval,
        logsum,
        query.shape[-1] ** -0.5 if scale is None else scale,
        block_size=block_size,
        topk=topk,
        blocks=-(-context_length // block_size),
        index_bits=INDEX_BITS,
        forced=FORCED,
        wide=wide,
        **score.tiles(query, key, wide, interval, logsum, block_size),
    )


def fused_reason(query: Tensor) -> str | None:
    """Why the route ``triton`` cannot run; None if it can, on a GPU or in Triton's interpreter."""
    if query.shape[4] > 256 or query.shape[3] > 64:
        return f"scoring by triton needs up to 64 heads of head dims up to 256, got {tuple(query.shape[3:])}"
    return device_reason("scoring by triton", query.device)


@torch.no_grad()
def block_scores(
    query: Tensor,
    compressed_key: Tensor,
    *,
    positions: Tensor,
    blocks: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    scale: float | None = None,
) -> Tensor:
    """Scores (B, S, G, blocks), float32 or wider; 0 where no existing compressed token overlaps the block.

    score_j = sum over heads and i of p_i * |[i*d, i*d + l) & [j*l', (j+1)*l')| / d (paper eq. 9 and 10), p the softmax
    of a head over the compressed tokens with i*d + l <= position + 1. Arguments as in ``choose_blocks``.
    """
    wide = scoring_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):  # it would take the products in 16 bits
        stacked = query.permute(0, 2, 3, 1, 4).to(wide)
        logits = stacked.flatten(2, 3).mul(scale) @ compressed_key.to(wide).transpose(-1, -2)
        logits = torch.unflatten(logits, 2, stacked.shape[2:4])
        ends = torch.arange(compressed_key.shape[2], device=query.device) * kernel_stride + kernel_size
        exists = ends <= positions[:, None, None, :, None] + 1
        logits.masked_fill_(~exists, torch.finfo(wide).min)
        probabilities = logits.softmax(-1).mul_(exists)  # a row without compressed tokens would be uniform
    return overlap_sum(probabilities.sum(2), blocks, kernel_size, kernel_stride, block_size).transpose(1, 2)


def overlap_sum(weights: Tensor, blocks: int, kernel_size: int, kernel_stride: int, block_size: int) -> Tensor:
    """(..., N) weights of compressed tokens -> (..., blocks), each times the strides by which token and block overlap.

    Every block adds its tokens in ascending order, so equal sets give equal sums.
    """
    before, ratio = kernel_size // kernel_stride - 1, block_size // kernel_stride
    weights = weights[..., : blocks * ratio]
    padded = F.pad(weights, (before, blocks * ratio - weights.shape[-1]))
    total = padded.new_zeros(*padded.shape[:-1], blocks)
    for place in range(before + ratio):
        start = (place - before) * kernel_stride
        overlap = min(start + kernel_size, block_size) - max(start, 0)
        part = padded[..., place : place + blocks * ratio : ratio]
        total += part if overlap == kernel_stride else part * (overlap // kernel_stride)
    return total


def rank_blocks(scores: Tensor, positions: Tensor, block_size: int, topk: int) -> Tensor:
    """Scores (B, S, G, blocks), positions (B, S) -> (B, S, G, topk) int32, ascending, -1 = none.

    ``torch.topk`` promises no order among equals, so it ranks integers that are all different: the leading bits of the
    score (those of a positive float sort like the float), then the block, the lower the higher.
    """
    blocks = scores.shape[-1]
    block = torch.arange(blocks, device=scores.device)
    place = positions[:, :, None, None]
    own = torch.div(place, block_size, rounding_mode="floor")
    rounded = (scores.double().view(torch.int64) + (1 << (INDEX_BITS - 1))) >> INDEX_BITS
    for rank, forced in enumerate((block == own - 1, block == own, block == 0), 1):
        rounded = torch.where(forced, (FORCED >> INDEX_BITS) + rank, rounded)
    key = (rounded << INDEX_BITS) + ((1 << INDEX_BITS) - 1 - block)
    key = torch.where(block * block_size <= place, key, -1)
    best, chosen = key.topk(min(topk, blocks), dim=-1)
    chosen = torch.where(best >= 0, chosen, blocks).sort(-1).values
    chosen = torch.where(chosen < blocks, chosen, -1).to(torch.int32)
    return F.pad(chosen, (0, topk - chosen.shape[-1]), value=-1)


def scoring_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores are computed in: float64 for float32 and float64, float32 for the 16-bit types."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _check_sizes(
    query: Tensor,
    compressed_key: Tensor,
    context_length: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    positions: Tensor | None,
) -> None:
    check_block_sizes(kernel_size, kernel_stride, block_size, topk)
    if query.dim() != 5 or compressed_key.dim() != 4:
        raise ArgumentError(
            "expected query (B, S, G, h, Dk) and compressed_key (B, G, N, Dk), got "
            f"{tuple(query.shape)} and {tuple(compressed_key.shape)}"
        )
    batch, queries, groups, _, width = query.shape
    needed = compressed_count(context_length, kernel_size, kernel_stride)
    batch_groups_width = (*compressed_key.shape[:2], compressed_key.shape[3])
    if batch_groups_width != (batch, groups, width) or compressed_key.shape[2] < needed:
        raise ArgumentError(
            f"compressed_key has shape {tuple(compressed_key.shape)}, expected ({batch}, {groups}, at least {needed}, "
            f"{width}) for query {tuple(query.shape)} and a context of {context_length}"
        )
    if positions is not None and tuple(positions.shape) not in ((queries,), (batch, queries)):
        raise ArgumentError(
            f"positions must be (S,) = ({queries},) or (B, S) = ({batch}, {queries}), got {tuple(positions.shape)}"
        )
    if positions is None and context_length < queries:
        raise ArgumentError(f"{queries} queries cannot be the last of a context of {context_length}; pass positions")
    if context_length > block_size << INDEX_BITS:
        raise ArgumentError(f"context_length {context_length} has more than 2**{INDEX_BITS} blocks of {block_size}")


def check_block_sizes(kernel_size: int, kernel_stride: int, block_size: int, topk: int) -> None:
    """Raise ArgumentError unless all are positive and kernel_stride divides kernel_size and block_size."""
    sizes = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "block_size": block_size, "topk": topk}
    for name, size in sizes.items():
        if size < 1:
            raise ArgumentError(f"{name} is {size}, expected at least 1")
    for name in ("kernel_size", "block_size"):
        if sizes[name] % kernel_stride:
            raise ArgumentError(
                f"kernel_stride {kernel_stride} does not divide {name} {sizes[name]}; choose a {name} that is a "
                "multiple of kernel_stride"
            )
