"""Path ``gather``: each row's keys gathered and padded to the longest row, SDPA with a length mask, row-chunked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attend import SDPA
from ..problem import SelectionProblem
from ..rows import (
    flat_ranges,
    gather,
    gathered_bytes,
    key_rows,
    padded_attention,
    padded_positions,
    row_chunks,
    row_width,
    scratch,
)
from ..selection import Selection
from ..trace import ParameterValue, executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters, capture_reason, chunk_parameter


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``row_chunk``: rows gathered at once, 0 = all."""
    return (chunk_parameter("row_chunk", problem, device, gathered_bytes(problem), problem.rows),)


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """Ranges need the longest row on the host, so no CUDA graph can be captured over them."""
    return capture_reason(problem, "gather") if problem.form == "ranges" else None


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """Per chunk of rows one SDPA over (rows, 1, width, Dk) keys and two gathers."""
    width = problem.row_width if problem.form == "blocks" else max(1, *lengths)
    chunks = list(row_chunks(problem.rows, int(parameters["row_chunk"])))
    keys = tuple((1, (end - first, 1, width, problem.Dk)) for first, end in chunks)
    forbidden = (r"flash_attn_varlen",) + ((r"^aten::_local_scalar_dense$",) if problem.form == "blocks" else ())
    return Evidence(
        required={SDPA: len(chunks), r"^aten::index_select$": 2 * len(chunks)},
        forbidden=forbidden,
        shapes={SDPA: keys},
    )


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    row_chunk: ParameterValue = 0,
) -> Tensor:
    """Selection attention over gathered keys. Shapes as in ``nsa.problem``."""
    batch, queries, groups, heads, width = query.shape
    ranges, workspace = flat_ranges(selection), scratch(workspace, query, key, value)
    longest = row_width(selection, key.shape[2])
    key_view, key_base, key_step = key_rows(key, queries)
    value_view, value_base, value_step = key_rows(value, queries)
    rows = query.reshape(-1, 1, heads, width)
    parts = []
    for first, end in row_chunks(rows.shape[0], int(row_chunk)):
        positions, present = padded_positions(ranges[first:end], longest)
        index = (key_base[first:end, None] + positions * key_step).flatten()
        k = gather(key_view, index, "gather.key", workspace).view(end - first, 1, longest, -1)
        index = (value_base[first:end, None] + positions * value_step).flatten()
        v = gather(value_view, index, "gather.value", workspace).view(end - first, 1, longest, -1)
        parts.append(padded_attention(rows[first:end], k, v, present, scale))
    executed("selection", "gather", {"row_chunk": row_chunk})
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(batch, queries, groups, heads, -1)
