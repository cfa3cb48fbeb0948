"""Attention calls of libraries for heads that share keys, and the folding that makes compressed attention causal.

Shared by the paths of the window and compressed branches: ``scaled_dot_product_attention`` and ``flash_attn_func``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .device import installed
from .problem import SelectionProblem
from .selection import Structure

FLASH_ATTN = r"^flash_attn::_flash_attn_forward$"
SDPA = r"^aten::scaled_dot_product_attention$"


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
        query, key, value = (widened(tensor, wide) for tensor in (query, key, value))
    key, value = (tensor.flatten(0, 1)[:, None].expand(-1, heads, -1, -1) for tensor in (key, value))
    out = F.scaled_dot_product_attention(query.flatten(0, 1), key, value, attn_mask=mask, is_causal=causal, scale=scale)
    return torch.unflatten(out[..., :width], 0, query.shape[:2])


def widened(tensor: Tensor, width: int) -> Tensor:
    """The tensor with zeros behind its last dimension up to ``width``; itself where it has as many. Exact: zeros behind
    queries and keys change no score, those behind values are columns of the output to be cut off."""
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing > 0 else tensor


def flash_attn_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, window: int = 0, causal: bool = True
) -> Tensor:
    """``flash_attn_func``: query (B, S, G, heads, D), if causal the last S of the keys (B, G, T, D) -> like query.

    FlashAttention 2.1 and later align causal and windowed masks bottom-right, as needed here. ``window`` 0 = all.
    """
    from flash_attn import flash_attn_func  # an optional package, imported where it can run

    out: Tensor = flash_attn_func(
        *by_tokens(query, key, value),
        softmax_scale=scale,
        causal=causal,
        window_size=(window - 1, 0) if window else (-1, -1),
    )
    return torch.unflatten(out, 2, query.shape[2:4])


def by_tokens(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """(B, S, G, heads, D), twice (B, G, T, D) -> (B, tokens, heads, D) each, as FlashAttention takes them, aligned."""
    return tuple(aligned(tensor) for tensor in (query.flatten(2, 3), key.transpose(1, 2), value.transpose(1, 2)))


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if a row does not start at a multiple of 16 bytes: FlashAttention loads as much at once."""
    item = tensor.element_size()
    if tensor.data_ptr() % 16 or any(stride * item % 16 for stride in tensor.stride()[:-1]):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def flash_attn_reason(problem: SelectionProblem, device: torch.device) -> str | None:
    """Why ``flash_attn_func`` cannot run a problem; None if it can."""
    if reason := flash_kernel_reason("flash_attn", problem, device):
        return reason
    if problem.Dk != problem.Dv:
        return f"flash_attn needs Dk == Dv, got {problem.Dk} and {problem.Dv}"
    return None if installed("flash_attn") else "flash_attn needs the package flash-attn"


def flash_kernel_reason(name: str, problem: SelectionProblem, device: torch.device) -> str | None:
    """Why the kernels of FlashAttention cannot run a problem whose head dims are made equal; None if they can."""
    if device.type != "cuda":
        return f"{name} needs a CUDA device"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"{name} needs float16 or bfloat16, got {problem.dtype}"
    if (wide := max(problem.Dk, problem.Dv)) % 8 or wide > 256:
        return f"{name} needs a head dim that is a multiple of 8 and at most 256, got {wide}"
    return None


def by_strides(query: Tensor, structure: Structure, attend: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Compressed attention of query (B, S, G, h, Dk) -> (B, S, G, h, Dv), zeros where no token exists.

    The d queries from i*d + l - 1 on read the same tokens 0 .. i, so they are folded into the heads of one query:
    ``attend(query (B, G, heads, n, Dk), first)`` -> (B, G, heads, n, Dv), query j reading tokens 0 .. first + j where
    n > 1, whose memory is linear in S. ``first`` is -1 where all n queries read all tokens.
    """
    heads, (empty, first, front, steps) = query.shape[3], strides(structure)
    stride, queries = structure.kernel_stride, structure.rows[1] - empty
    if steps == 1:
        out = attend(query[:, empty:].transpose(1, 2).flatten(2, 3)[:, :, None], -1)
        out = torch.unflatten(out[:, :, 0], 2, (-1, heads)).transpose(1, 2)
    else:
        padded = F.pad(query[:, empty:], (0, 0, 0, 0, 0, 0, front, steps * stride - front - queries))
        folded = torch.unflatten(padded, 1, (-1, stride)).permute(0, 3, 4, 2, 1, 5).flatten(2, 3)
        out = torch.unflatten(attend(folded, first), 2, (-1, stride)).permute(0, 4, 3, 1, 2, 5).flatten(1, 2)
        out = out[:, front : front + queries]
    return F.pad(out, (0, 0, 0, 0, 0, 0, empty, 0)) if empty else out


def strides(structure: Structure) -> tuple[int, int, int, int]:
    """(queries before any token exists, last token of the first query that has one, queries of its stride before it,
    strides of queries) of a compressed selection."""
    empty = max(0, structure.kernel_size - 1 - structure.first_position)
    reach = structure.first_position + empty + 1 - structure.kernel_size
    first, front = divmod(reach, structure.kernel_stride)
    return empty, first, front, structure.keys - first
