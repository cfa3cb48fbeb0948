"""Leaf. Compressed attention by plain causal attention: queries that read the same tokens become entries of a batch.

The d queries from i*d + l - 1 on read the tokens 0 .. i. Query r of each stride, for all strides, is a causal problem
of its own over the same tokens: d problems, which a batch of strided views holds without copying a query.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""query (b, n, G * h, Dk), key (b, N, G, Dk), value (b, N, G, Dv), causal -> output (b, n, G * h, Dv) and its natural
log-sum-exp (b, G * h, n). Causal: query j reads the keys 0 .. N - n + j."""


def by_residues(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Attend,
    *,
    first_position: int,
    kernel_size: int,
    kernel_stride: int,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """query (B, S, G, h, Dk) at positions ``first_position`` .., key (B, G, N, Dk), value (B, G, N, Dv) ->
    (B, S, G, h, Dv), zeros where no compressed token exists; and, if ``sums``, log-sum-exps as ``selection.LogSums``.
    """
    queries = query.shape[1]
    cuts = _cuts(queries, first_position, kernel_size, kernel_stride)
    pieces = torch.split(query, [count for count, _, _ in cuts], 1)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    parts, found = [], []
    for piece, (count, steps, tokens) in zip(pieces, cuts, strict=True):
        if not count:
            continue
        if not tokens:
            out = value.new_zeros(*piece.shape[:4], value.shape[3])
            logsum = piece.new_full(piece.shape[:4], float("inf"), dtype=torch.float32)
        elif steps:
            out, logsum = _strides(piece, key[:, :tokens], value[:, :tokens], steps, attend)
        else:
            out, logsum = _rows(piece, key[:, :tokens], value[:, :tokens], attend)
        parts.append(out)
        found.append(logsum)
    return torch.cat(parts, 1), torch.cat(found, 1).detach() * math.log2(math.e) if sums else None


def _cuts(queries: int, first: int, size: int, stride: int) -> list[tuple[int, int, int]]:
    """(queries, whole strides of them, tokens that the last one reads) of the rows without tokens, the rest of a
    stride, whole strides, and the start of one. Where there are fewer than two whole strides they are rows too."""
    empty = min(queries, max(0, size - 1 - first))
    reach = first + empty + 1 - size
    front = min(queries - empty, -reach % stride)
    whole = (queries - empty - front) // stride
    back = queries - empty - front - whole * stride
    tokens = reach // stride + 1
    after = (reach + front) // stride
    return [
        (empty, 0, 0),
        (front, 0, tokens),
        (whole * stride, whole if whole > 1 else 0, after + whole),
        (back, 0, after + whole + 1),
    ]


def _strides(query: Tensor, key: Tensor, value: Tensor, steps: int, attend: Attend) -> tuple[Tensor, Tensor]:
    batch, queries, groups, heads, _ = query.shape
    stride = queries // steps
    folded = torch.unflatten(query, 1, (steps, stride)).transpose(1, 2).flatten(3, 4)
    folded = folded.reshape(batch * stride, *folded.shape[2:])
    spread = (tensor[:, None].expand(-1, stride, -1, -1, -1) for tensor in (key, value))
    wide_key, wide_value = (tensor.reshape(batch * stride, *tensor.shape[2:]) for tensor in spread)
    out, logsum = attend(folded, wide_key, wide_value, True)
    out = torch.unflatten(torch.unflatten(out, 0, (batch, stride)).transpose(1, 2).flatten(1, 2), 2, (groups, heads))
    logsum = torch.unflatten(logsum, 0, (batch, stride)).permute(0, 3, 1, 2).flatten(1, 2)
    return out, torch.unflatten(logsum, 2, (groups, heads))


def _rows(query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
    """Rows that all read all keys: queries and heads of a group are queries of one head."""
    queries, heads = query.shape[1], query.shape[3]
    out, logsum = attend(query.transpose(2, 3).flatten(1, 2), key, value, False)
    out = torch.unflatten(out, 1, (queries, heads)).transpose(2, 3)
    return out, torch.unflatten(logsum, 2, (queries, heads)).permute(0, 2, 1, 3)
