"""Path ``varlen``: the keys of all rows packed flat with ``cu_seqlens``; K/V are not replicated per head.

A row is one sequence: its h query heads are h query tokens of one head, all reading the row's keys, none masked.
Backends: ``flash_attn`` (``flash_attn_varlen_func``), ``torch`` (``torch.nn.attention.varlen.varlen_attn``) and
``segment`` (segmented softmax in plain torch: any device, any dtype). Asked for one, it runs that one or raises.
The first two take equal head dims, so what is narrower is gathered into rows as wide as the other, zeros behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..attend import SDPA, flash_kernel_reason, widened
from ..device import installed
from ..problem import SelectionProblem
from ..rows import (
    flat_positions,
    flat_ranges,
    flat_total,
    gather,
    gathered_bytes,
    key_rows,
    row_chunks,
    row_width,
    scratch,
)
from ..selection import Selection
from ..trace import ParameterValue, executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters, capture_reason, chunk_parameter, reserve_parameter

KERNELS = {
    "flash_attn": r"^flash_attn::_flash_attn_varlen_forward$",
    "torch": r"^aten::_flash_attention_forward$",
    "segment": r"^aten::scatter_reduce_$",
}


def backend_reason(backend: str, problem: SelectionProblem, device: torch.device) -> str | None:
    """Why ``backend`` cannot run the problem on the device here; None if it can."""
    if reason := problem_reason(backend, problem, device):
        return reason
    if backend == "flash_attn" and not installed("flash_attn"):
        return "varlen backend flash_attn needs the package flash-attn"
    return None


def problem_reason(backend: str, problem: SelectionProblem, device: torch.device) -> str | None:
    """Why ``backend`` can run the problem nowhere on such a device; None if it can where its package is."""
    return None if backend == "segment" else flash_kernel_reason(f"varlen backend {backend}", problem, device)


def packed_width(backend: str, *head_dims: int) -> int:
    """What queries, keys and values are widened to, the widest head dim, or 0: each stays as wide as it is."""
    return 0 if backend == "segment" else max(head_dims)


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``backend``, by default the first that is installed; ``row_chunk``: rows packed at once, 0 = all;
    ``reserve_rows`` (N) and ``reserve_keys`` (K)."""
    backends = tuple(name for name in KERNELS if problem_reason(name, problem, device) is None)
    default = next(name for name in backends if backend_reason(name, problem, device) is None)
    copies = 2 + (problem.h if default == "segment" else 0)
    wide = packed_width(default, problem.Dk, problem.Dv)
    packed = msgspec.structs.replace(problem, Dk=max(problem.Dk, wide), Dv=max(problem.Dv, wide))
    chunk = chunk_parameter("row_chunk", problem, device, gathered_bytes(packed) * copies // 2, problem.rows)
    return (
        Parameter("backend", backends, default),
        chunk,
        reserve_parameter("reserve_rows", problem.rows),
        reserve_parameter("reserve_keys", (int(chunk.default) or problem.rows) * problem.row_width),
    )


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """The backend's reason; ranges read their key count on the host, which a capture forbids."""
    backend = str(parameters.get("backend", "segment"))
    if backend not in KERNELS:
        return f"varlen has no backend {backend!r}; it has {sorted(KERNELS)}"
    if problem.form == "ranges" and (reason := capture_reason(problem, "varlen")):
        return reason
    return backend_reason(backend, problem, device)


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One backend launch per chunk of rows over flat keys, gathered by indices (keys,), and no other backend's."""
    backend = str(parameters["backend"])
    chunks = list(row_chunks(problem.rows, int(parameters["row_chunk"])))
    others = tuple(pattern for name, pattern in KERNELS.items() if name != backend)
    bound = device.type == "cuda" and problem.form == "blocks"
    totals = [(end - first) * problem.row_width if bound else max(1, sum(lengths[first:end])) for first, end in chunks]
    gathered = tuple((2, (total,)) for total in totals for _ in ("key", "value"))
    return Evidence(
        required={KERNELS[backend]: len(chunks)},
        forbidden=(
            *others,
            SDPA,
            *((r"^aten::_local_scalar_dense$",) if bound else ()),
        ),
        shapes={r"^aten::index_select$": gathered} if backend != "segment" else {},
    )


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    backend: ParameterValue = "segment",
    row_chunk: ParameterValue = 0,
    reserve_rows: ParameterValue = 0,
    reserve_keys: ParameterValue = 0,
) -> Tensor:
    """Selection attention over flat packed keys. Shapes as in ``nsa.problem``."""
    batch, queries, groups, heads, _ = query.shape
    keys, longest = key.shape[2], row_width(selection, key.shape[2])
    ranges, workspace = flat_ranges(selection), scratch(workspace, query, key, value)
    key_view, key_base, key_step = key_rows(key, queries)
    value_view, value_base, value_step = key_rows(value, queries)
    wide = packed_width(str(backend), key.shape[3], value.shape[3])
    rows = widened(pack_queries(query, workspace, int(reserve_rows)), wide)
    attend = {"flash_attn": flash_attn_attention, "torch": torch_attention, "segment": segment_attention}[str(backend)]
    parts = []
    for first, end in row_chunks(rows.shape[0], int(row_chunk)):
        part = ranges[first:end]
        positions, row, offsets = flat_positions(part, flat_total(selection, part, keys))
        owner = row.clamp_max(end - first - 1)
        index = key_base[first:end][owner] + positions * key_step
        k = gather(key_view, index, "varlen.key", workspace, width=wide, reserve_rows=int(reserve_keys))
        index = value_base[first:end][owner] + positions * value_step
        v = gather(value_view, index, "varlen.value", workspace, width=wide, reserve_rows=int(reserve_keys))
        k, v = without_spare(k, row, end - first), without_spare(v, row, end - first)
        parts.append(attend(rows[first:end], k, v, offsets, row, longest, scale))
    executed(
        "selection",
        "varlen",
        {"backend": backend, "row_chunk": row_chunk, "reserve_rows": reserve_rows, "reserve_keys": reserve_keys},
    )
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[..., : value.shape[3]].view(batch, queries, groups, heads, -1)


def without_spare(gathered: Tensor, row: Tensor, rows: int) -> Tensor:
    """The gathered keys themselves, whose gradients at spare slots (row ``rows``) are dropped: FlashAttention writes
    none there, so what stands in its buffer would be added to the key that a spare slot repeats."""
    if gathered.requires_grad:
        gathered.register_hook(lambda grad: grad.masked_fill((row == rows)[:, None], 0.0))  # type: ignore[no-untyped-call]
    return gathered


def pack_queries(query: Tensor, workspace: Workspace | None, reserve_rows: int) -> Tensor:
    """Query (B, S, G, h, Dk) as rows (R, h, Dk): itself where its strides allow, else a copy in the workspace."""
    heads, width = query.shape[3:]
    if workspace is None or query.is_contiguous():
        return query.reshape(-1, heads, width)
    rows = query.shape[:3].numel()
    out = workspace.take(
        "varlen.query", rows, heads * width, dtype=query.dtype, device=query.device, reserve_rows=reserve_rows
    )
    return out.view(query.shape).copy_(query).view(rows, heads, width)


def flash_attn_attention(
    rows: Tensor, key: Tensor, value: Tensor, offsets: Tensor, row: Tensor, longest: int, scale: float
) -> Tensor:
    """``flash_attn_varlen_func``: rows (r, h, D), flat keys and values (K, D) -> (r, h, D)."""
    from flash_attn import flash_attn_varlen_func  # an optional package, imported where it is asked for

    return by_sequences(partial(flash_attn_varlen_func, softmax_scale=scale), rows, key, value, offsets, longest)


def torch_attention(
    rows: Tensor, key: Tensor, value: Tensor, offsets: Tensor, row: Tensor, longest: int, scale: float
) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn``, the FlashAttention inside torch; arguments as above."""
    from torch.nn.attention.varlen import varlen_attn  # pulls in much of torch that no other backend needs

    return by_sequences(partial(varlen_attn, scale=scale), rows, key, value, offsets, longest)


def by_sequences(
    attend: Callable[..., Any], rows: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    """``attend`` over sequences of a row's h query heads, as query tokens of one head, and of the row's keys."""
    count, heads, width = rows.shape
    cu_seqlens_q = torch.arange(0, (count + 1) * heads, heads, dtype=torch.int32, device=rows.device)
    flat, offsets = rows.reshape(count * heads, 1, width), offsets.to(torch.int32)
    out: Tensor = attend(flat, key[:, None], value[:, None], cu_seqlens_q, offsets, heads, longest)
    return out.view(count, heads, -1)


def segment_attention(
    rows: Tensor, key: Tensor, value: Tensor, offsets: Tensor, row: Tensor, longest: int, scale: float
) -> Tensor:
    """Softmax by segments in plain torch, scores in float32 or better; arguments as above, but rows and keys may have
    another head dim than values; spare slots have row r."""
    count, heads, _ = rows.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    padded = torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))
    scores = torch.bmm(padded.index_select(0, row), key[:, :, None])[..., 0].to(wide) * scale
    index = row[:, None].expand(-1, heads)
    top = scores.new_full((count + 1, heads), float("-inf")).scatter_reduce_(0, index, scores.detach(), "amax")
    weights = torch.exp(scores - top.index_select(0, row))
    total = torch.zeros_like(top).index_add(0, row, weights)
    weights = weights / total.index_select(0, row)
    weighted = weights[..., None] * value[:, None].to(wide)
    out = weights.new_zeros(count + 1, heads, value.shape[1]).index_add(0, row, weighted)
    return out[:count].to(value.dtype)
