"""The window branch: each query over the last ``window`` keys, and the attention calls it shares with compression.

Queries are the last S of the T keys. Routes: ``sdpa``, in chunks of queries so that memory is linear in S, and
``flash_attn`` where it is allowed and can run. Which one ran is reported to ``trace``. It knows no cache and no gates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .paths.base import installed
from .rows import row_chunks
from .trace import announce, executed

QUERY_CHUNK = {"cpu": 128, "cuda": 1024}
"""Queries per SDPA call: a chunk of c reads c + window - 1 keys, so smaller wastes less and launches more."""


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, *, window: int, scale: float | None = None, flash_attention: bool = True
) -> Tensor:
    """Attention over keys max(0, t - window + 1) .. t of the query at position t.

    query (B, S, G, h, Dk), the last S of the keys (B, G, T, Dk); value (B, G, T, Dv) -> (B, S, G, h, Dv). ``scale``:
    None = Dk**-0.5. ``flash_attention``: whether that route may be taken.
    """
    queries, keys = query.shape[1], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    reason = flash_attn_reason(query, value, flash_attention)
    if reason is None:
        first = max(0, keys - queries - window + 1)
        out = flash_attn_attention(query, key[:, :, first:], value[:, :, first:], scale, window=window)
        report("window", "flash_attn", {"window": window}, "allowed and able to run")
        return out
    chunk = QUERY_CHUNK[query.device.type]
    masks: dict[tuple[int, int], Tensor | None] = {}
    parts = []
    for begin, end in row_chunks(queries, chunk):
        position = keys - queries + begin
        first = max(0, position - window + 1)
        stop = position + end - begin
        shape = (end - begin, stop - first)
        if shape not in masks:
            masks[shape] = window_mask(*shape, window, query.device)
        parts.append(_chunk(query[:, begin:end], key[:, :, first:stop], value[:, :, first:stop], masks[shape], scale))
    report("window", "sdpa", {"window": window, "query_chunk": chunk}, reason)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor | None:
    """(queries, keys) bool for queries that are the last of the keys; None for one query, which reads all of them.

    Every query reads its own key, so no row is empty and no softmax is 0/0.
    """
    if queries == 1:
        return None
    token = torch.arange(keys, device=device)
    behind = token[keys - queries :, None] - token
    return (behind >= 0) & (behind < window)


def _chunk(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if mask is None:
        return shared_attention(query.permute(0, 2, 1, 3, 4), key, value, scale).transpose(1, 2)
    return shared_attention(query.permute(0, 2, 3, 1, 4), key, value, scale, mask=mask).permute(0, 3, 1, 2, 4)


def shared_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """SDPA of query (B, G, heads, queries, Dk) whose heads share the keys (B, G, keys, Dk), which are not replicated.

    -> (B, G, heads, queries, Dv). ``causal``: query i reads keys 0 .. i, for as many queries as keys only. On a CPU
    unequal head dims are padded with zeros: there SDPA would otherwise hold all queries x keys scores.
    """
    heads, width = query.shape[2], value.shape[-1]
    if query.device.type == "cpu" and query.shape[-1] != width:
        wide = max(width, query.shape[-1])
        query, key, value = (F.pad(tensor, (0, wide - tensor.shape[-1])) for tensor in (query, key, value))
    key, value = (tensor.flatten(0, 1)[:, None].expand(-1, heads, -1, -1) for tensor in (key, value))
    out = F.scaled_dot_product_attention(query.flatten(0, 1), key, value, attn_mask=mask, is_causal=causal, scale=scale)
    return torch.unflatten(out[..., :width], 0, query.shape[:2])


def flash_attn_reason(query: Tensor, value: Tensor, allowed: bool) -> str | None:
    """Why the route ``flash_attn`` is not taken; None if it is."""
    width = query.shape[-1]
    if not allowed:
        return "flash_attn is disallowed"
    if query.device.type != "cuda":
        return "flash_attn needs a CUDA device"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"flash_attn needs float16 or bfloat16, got {query.dtype}"
    if width != value.shape[-1] or width % 8 or width > 256:
        return f"flash_attn needs Dk == Dv, a multiple of 8 and at most 256, got {width} and {value.shape[-1]}"
    return None if installed("flash_attn") else "flash_attn needs the package flash-attn"


def flash_attn_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, window: int = 0, causal: bool = True
) -> Tensor:
    """``flash_attn_func``: query (B, S, G, heads, D), if causal the last S of the keys (B, G, T, D) -> like query.

    FlashAttention 2.1 and later align causal and windowed masks bottom-right, as needed here. ``window`` 0 = all.
    """
    from flash_attn import flash_attn_func  # an optional package, imported where it can run

    out: Tensor = flash_attn_func(
        query.flatten(2, 3),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softmax_scale=scale,
        causal=causal,
        window_size=(window - 1, 0) if window else (-1, -1),
    )
    return torch.unflatten(out, 2, query.shape[2:4])


def report(operation: str, route: str, parameters: dict[str, int | float | str | bool], reason: str) -> None:
    """Tell ``trace`` which route ran; routes of these branches are defaults, nothing was measured."""
    announce("default", reason)
    executed(operation, route, parameters)
