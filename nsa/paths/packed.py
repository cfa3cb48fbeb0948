"""Path ``packed``: rows bucketed by length, each bucket gathered into the workspace, one SDPA per bucket.

No Python loop over rows; a loop over buckets, and over chunks of a bucket's rows where ``row_chunk`` bounds memory.
Bucket sizes are read on the host: one synchronisation per call (``torch.bincount`` alone would wait twice).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from .base import Evidence, Parameter, Parameters, capture_reason, chunk_parameter, reserve_parameter

COUNT = r"^aten::scatter_add_$"
"""The bucket sizes."""


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``bucket_rounding``: lengths are rounded up to a multiple; ``row_chunk``: rows of a bucket gathered at once, 0 =
    all; ``reserve_rows`` and ``reserve_length``: the workspace has room for that many rows of that many keys."""
    chunk = chunk_parameter("row_chunk", problem, device, gathered_bytes(problem), problem.rows)
    return (
        Parameter("bucket_rounding", (16, 64, 256), 64),
        chunk,
        reserve_parameter("reserve_rows", int(chunk.default) or problem.rows),
        reserve_parameter("reserve_length", problem.row_width),
    )


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """Bucket sizes depend on the selection's contents, so no CUDA graph can be captured."""
    return capture_reason(problem, "packed")


def buckets(lengths: Sequence[int], rounding: int, row_chunk: int) -> Iterator[tuple[int, int]]:
    """(rows, padded length) of each SDPA call, shortest bucket first; rows without keys form a bucket of length 0."""
    rounded = [-(-length // rounding) * rounding for length in lengths]
    for length in sorted(set(rounded) - {0}):
        for first, end in row_chunks(rounded.count(length), row_chunk):
            yield end - first, length


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One SDPA and two gathers per bucket (and chunk), keys (rows, 1, padded length, Dk), shortest bucket first."""
    calls = list(buckets(lengths, int(parameters["bucket_rounding"]), int(parameters["row_chunk"])))
    return Evidence(
        required={SDPA: len(calls), COUNT: 1} if calls else {COUNT: 1},
        forbidden=(r"flash_attn_varlen",),
        shapes={SDPA: tuple((1, (rows, 1, length, problem.Dk)) for rows, length in calls)} if calls else {},
    )


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    bucket_rounding: ParameterValue = 64,
    row_chunk: ParameterValue = 0,
    reserve_rows: ParameterValue = 0,
    reserve_length: ParameterValue = 0,
) -> Tensor:
    """Selection attention, one SDPA per length bucket. Shapes as in ``nsa.problem``."""
    batch, queries, groups, heads, width = query.shape
    ranges, workspace = flat_ranges(selection), scratch(workspace, query, key, value)
    rounding = int(bucket_rounding)
    bucket = ((ranges[..., 1] - ranges[..., 0]).sum(-1) + rounding - 1) // rounding
    order = bucket.argsort(stable=True)
    longest = row_width(selection, key.shape[2]) if selection.form == "blocks" else key.shape[2]
    counted = bucket.new_zeros((longest + rounding - 1) // rounding + 1)
    sizes = counted.scatter_add_(0, bucket, torch.ones_like(bucket)).tolist()
    rows = query.reshape(-1, 1, heads, width)
    key_view, key_base, key_step = key_rows(key, queries)
    value_view, value_base, value_step = key_rows(value, queries)
    reserve = int(reserve_rows) * int(reserve_length)
    parts = [query.new_zeros((sizes[0], 1, heads, value.shape[3]), dtype=value.dtype)]
    done = sizes[0]
    for step, size in enumerate(sizes[1:], 1):
        for first, end in row_chunks(size, int(row_chunk)) if size else ():
            chosen = order[done + first : done + end]
            positions, present = padded_positions(ranges[chosen], step * rounding)
            index = (key_base[chosen, None] + positions * key_step).flatten()
            k = gather(key_view, index, "packed.key", workspace, reserve_rows=reserve)
            index = (value_base[chosen, None] + positions * value_step).flatten()
            v = gather(value_view, index, "packed.value", workspace, reserve_rows=reserve)
            shape = (end - first, 1, step * rounding, -1)
            parts.append(padded_attention(rows[chosen], k.view(shape), v.view(shape), present, scale))
        done += size
    if len(parts) == 1:  # all rows are empty, and where gradients are wanted they are zeros
        parts[0] = parts[0] + query[:0].sum() + key[:0].sum() + value[:0].sum()
    executed(
        "selection",
        "packed",
        {
            "bucket_rounding": bucket_rounding,
            "row_chunk": row_chunk,
            "reserve_rows": reserve_rows,
            "reserve_length": reserve_length,
        },
    )
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return torch.cat(parts).index_select(0, back).view(batch, queries, groups, heads, -1)
