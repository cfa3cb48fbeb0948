"""Path ``dense``: all keys under the selection mask, through SDPA, in query chunks so that memory stays bounded.

Grouped heads share K/V without a copy: the h heads of a row stand beside each other in the query dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attend import SDPA
from ..problem import SelectionProblem
from ..rows import row_chunks
from ..selection import Selection
from ..trace import ParameterValue, executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters, chunk_parameter


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``query_chunk``: query tokens per SDPA call, 0 = all."""
    mask_bytes = problem.B * problem.G * problem.h * problem.keys * 5
    return (chunk_parameter("query_chunk", problem, device, mask_bytes, problem.S),)


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """Runs everything."""
    return None


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One SDPA call per chunk of queries, each over all keys of all groups."""
    chunks = list(row_chunks(problem.S, int(parameters["query_chunk"])))
    keys = (problem.B, problem.G, problem.keys, problem.Dk)
    return Evidence(
        required={SDPA: len(chunks)},
        forbidden=(r"^aten::index_select$", r"^aten::_local_scalar_dense$", r"flash_attn_varlen"),
        shapes={SDPA: ((1, keys),) * len(chunks)},
    )


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
    """Selection attention through masked SDPA. Shapes as in ``nsa.problem``."""
    ranges = selection.disjoint_ranges
    if isinstance(selection.context_length, Tensor):  # what lies beyond a sequence may be NaN, which no mask removes
        beyond = torch.arange(key.shape[2], device=key.device) >= selection.context_length[:, None]
        key, value = (tensor.masked_fill(beyond[:, None, :, None], 0.0) for tensor in (key, value))
    parts = [
        _chunk(query[:, first:end], key, value, ranges[:, first:end], scale)
        for first, end in row_chunks(query.shape[1], int(query_chunk))
    ]
    executed(selection.operation, "dense", {"query_chunk": query_chunk})
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _chunk(query: Tensor, key: Tensor, value: Tensor, ranges: Tensor, scale: float) -> Tensor:
    batch, queries, groups, heads, width = query.shape
    mask = range_mask(ranges, key.shape[2])
    empty = ~mask.any(-1)
    mask[..., 0] |= empty  # a row without keys would be 0/0; it reads key 0 and is zeroed below
    stacked = query.transpose(1, 2).reshape(batch, groups, queries * heads, width)
    mask = mask.transpose(1, 2)[:, :, :, None].expand(batch, groups, queries, heads, -1)
    out = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask.flatten(2, 3), scale=scale)
    out = out.view(batch, groups, queries, heads, -1).transpose(1, 2)
    return out.masked_fill(empty[..., None, None], 0.0)


def range_mask(ranges: Tensor, keys: int) -> Tensor:
    """Disjoint ranges (..., n, 2) -> mask (..., keys): a running sum of +1 at starts and -1 at ends."""
    start, end = ranges.unbind(-1)
    edges = torch.zeros((*start.shape[:-1], keys + 1), dtype=torch.int8, device=ranges.device)
    one = torch.ones_like(start, dtype=torch.int8)
    edges.scatter_add_(-1, start, one).scatter_add_(-1, end, -one)
    return edges.cumsum(-1, dtype=torch.int8)[..., :-1] > 0
