"""Leaf. Row machinery that gathering paths share: views of keys, positions of a row's keys, chunks, padded attention.

A row is one (b, s, g); rows are numbered in that order, R = B * S * G.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from .problem import SelectionProblem
from .selection import Selection
from .workspace import Workspace

SUMMED_AT_ONCE = 2**20
"""Gathered rows whose gradients are widened at a time."""


def key_rows(tensor: Tensor, queries: int) -> tuple[Tensor, Tensor, int]:
    """A (N, D) view of keys or values (B, G, T, D) of any strides, and where each row finds its keys in it.

    Returns (view, base (R,) int64, step): key t of row r is ``view[base[r] + t * step]``. Nothing is copied unless
    the last dimension is strided or rows of the view would overlap.
    """
    batch, groups, _, width = tensor.shape
    strides = [stride for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if size > 1]
    unit = math.gcd(*strides) if any(strides) else width
    if tensor.stride(3) != 1 or unit < width:
        tensor = tensor.contiguous()
        unit = width
    by_batch, by_group, step = (stride // unit for stride in tensor.stride()[:3])
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape[:3], (by_batch, by_group, step), strict=True))
    view = tensor.as_strided((last + 1, width), (unit, 1))
    index = torch.arange(batch, device=tensor.device)[:, None] * by_batch
    base = index + torch.arange(groups, device=tensor.device) * by_group
    return view, base[:, None].expand(batch, queries, groups).reshape(-1), step


def flat_ranges(selection: Selection) -> Tensor:
    """Disjoint ranges by row, (R, n, 2) int64."""
    return selection.disjoint_ranges.flatten(0, 2)


def row_width(selection: Selection, keys: int) -> int:
    """Keys of the longest row: a bound for blocks, the exact number, at one host synchronisation, for ranges."""
    if selection.form == "blocks":
        return min(keys, selection.indices.shape[3] * selection.block_size)
    return max(1, int(selection.lengths.max()))


def padded_positions(ranges: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positions of each row's keys, padded to ``width``: disjoint ranges (R, n, 2) -> ((R, width) int64, mask).

    Absent slots have mask False and repeat the row's last key (position 0 in an empty row): what lies outside the row,
    NaN in unused cache say, is never read.
    """
    start, end = ranges.unbind(-1)
    upto = (end - start).cumsum(-1)
    slots = torch.arange(width, device=ranges.device).expand(ranges.shape[0], width).contiguous()
    part = torch.searchsorted(upto, slots, right=True).clamp_max_(ranges.shape[1] - 1)
    shift = end - upto
    present = slots < upto[:, -1:]
    last = (end.amax(-1, keepdim=True) - 1).clamp_min(0)
    return torch.where(present, slots + shift.gather(1, part), last), present


def flat_total(selection: Selection, ranges: Tensor, keys: int) -> int:
    """Slots for all keys of ``ranges`` (R, n, 2): their number, or on a GPU an upper bound that needs no host
    synchronisation, which only blocks have."""
    if ranges.is_cuda and selection.form == "blocks":
        return ranges.shape[0] * row_width(selection, keys)
    return max(1, int((ranges[..., 1] - ranges[..., 0]).sum()))


def flat_positions(ranges: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of all rows' keys, one row after the other, from disjoint ranges (R, n, 2).

    Returns positions (total,), row of each slot (total,), offsets (R + 1,) of rows, all int64. ``total`` is the number
    of keys of all rows or more; slots from ``offsets[-1]`` on are spare: position 0, row R.
    """
    rows, slots = ranges.shape[:2]
    start, end = ranges.reshape(-1, 2).unbind(-1)
    upto = (end - start).cumsum(0)
    slot = torch.arange(total, device=ranges.device)
    part = torch.searchsorted(upto, slot, right=True)
    shift = torch.cat((end - upto, upto.new_zeros(1)))
    positions = (slot + shift[part]) * (part < rows * slots)
    return positions, part // slots, torch.cat((upto.new_zeros(1), upto[slots - 1 :: slots]))


def row_chunks(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    """(first, end) of consecutive chunks of ``chunk`` rows; one chunk of all rows where ``chunk`` is 0."""
    step = chunk or rows
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def gathered_bytes(problem: SelectionProblem) -> int:
    """Bytes of one row's gathered keys and values, at the widest."""
    return problem.row_width * (problem.Dk + problem.Dv) * problem.item_bytes


def tracked(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether derivatives of what is made of them may be wanted: backward, or forward inside one of torch's dual
    levels."""
    wanted = query.requires_grad or key.requires_grad or value.requires_grad
    return (wanted and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def scratch(workspace: Workspace | None, query: Tensor, key: Tensor, value: Tensor) -> Workspace | None:
    """The workspace, or None where derivatives will need what would lie in it."""
    return None if tracked(query, key, value) else workspace


class Gathered(torch.autograd.Function):
    """Rows of a view. A key's gradient is a sum over all rows that read it, taken in float32 or better: torch's own
    sum, in bfloat16, stands still after some hundred of them."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = view.shape[0]
        return view.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.count, grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
        for places, part in zip(torch.split(index, SUMMED_AT_ONCE), torch.split(grad, SUMMED_AT_ONCE), strict=True):
            total.index_add_(0, places, part.to(total.dtype))
        return total.to(grad.dtype), None


def gather(
    view: Tensor, index: Tensor, role: str, workspace: Workspace | None, *, width: int = 0, reserve_rows: int = 0
) -> Tensor:
    """``view`` (N, D) rows at ``index`` (K,) -> (K, max(D, width)), zeros from column D on: in the workspace, or a
    fresh tensor where there is none."""
    held = view.shape[1]
    if workspace is None:
        rows = cast(Tensor, Gathered.apply(view, index))  # type: ignore[no-untyped-call]
        return F.pad(rows, (0, width - held)) if width > held else rows
    out = workspace.take(
        role, index.numel(), max(held, width), dtype=view.dtype, device=view.device, reserve_rows=reserve_rows
    )
    if width > held:
        out[:, held:].zero_()  # an assignment would ask a number for its value
        torch.index_select(view, 0, index, out=out[:, :held])
    else:
        torch.index_select(view, 0, index, out=out)
    return out


def padded_attention(query: Tensor, key: Tensor, value: Tensor, present: Tensor, scale: float) -> Tensor:
    """SDPA of (r, 1, h, Dk) queries over padded keys (r, 1, w, Dk); ``present`` (r, w); empty rows give zeros."""
    empty = ~present[:, :1]
    mask = torch.cat((torch.ones_like(empty), present[:, 1:]), 1)  # slot 0 is a real key or stands in for none
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None], scale=scale)
    return out.masked_fill(empty[:, None, :, None], 0.0)
