"""Path ``sdpa_window``: the window through SDPA in chunks of queries, each over its own keys only: linear in S."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..attend import SDPA, shared_attention
from ..problem import SelectionProblem
from ..rows import row_chunks
from ..selection import Selection
from ..trace import ParameterValue, executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters

QUERY_CHUNK = {"cpu": 128, "cuda": 1024}
"""Queries per SDPA call: a chunk of c reads c + window - 1 keys, so smaller wastes less and launches more."""


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``query_chunk``: query tokens per SDPA call, 0 = all."""
    ladder = tuple(size for size in (64, 128, 256, 512, 1024, 2048) if size < problem.S)
    chunk = QUERY_CHUNK[device.type]
    return (Parameter("query_chunk", (*ladder, 0), chunk if chunk in ladder else 0),)


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """Runs every window."""
    return None


def chunks(queries: int, keys: int, window: int, query_chunk: int) -> Iterator[tuple[int, int, int, int]]:
    """(first query, end, first key, end) of each SDPA call; the queries are the last of the keys."""
    for begin, end in row_chunks(queries, query_chunk):
        yield begin, end, max(0, keys - queries + begin - window + 1), keys - queries + end


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One SDPA call per chunk of queries, over the chunk's keys."""
    p = problem
    calls = list(chunks(p.S, p.T, p.window, int(parameters["query_chunk"])))
    sizes = ((1 if end - begin == 1 else p.h, stop - first) for begin, end, first, stop in calls)
    keys = tuple((1, (p.B * p.G, heads, count, None)) for heads, count in sizes)
    return Evidence(required={SDPA: len(calls)}, forbidden=(r"^flash_attn::",), shapes={SDPA: keys})


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    query_chunk: ParameterValue = 0,
) -> Tensor:
    """Window attention, chunk by chunk. Shapes as in ``nsa.problem``."""
    window = selection.structured("window").window
    masks: dict[tuple[int, int], Tensor | None] = {}
    parts = []
    for begin, end, first, stop in chunks(query.shape[1], key.shape[2], window, int(query_chunk)):
        shape = (end - begin, stop - first)
        if shape not in masks:
            masks[shape] = window_mask(*shape, window, query.device)
        parts.append(_chunk(query[:, begin:end], key[:, :, first:stop], value[:, :, first:stop], masks[shape], scale))
    executed("window", "sdpa_window", {"query_chunk": query_chunk})
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
