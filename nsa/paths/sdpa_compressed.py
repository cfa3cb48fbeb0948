"""Path ``sdpa_compressed``: queries of a stride folded into heads, then causal SDPA over the compressed tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..attend import SDPA, by_strides, shared_attention, strides
from ..problem import SelectionProblem
from ..rows import row_chunks
from ..selection import Selection
from ..trace import ParameterValue, executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``stride_chunk``: strides of queries per SDPA call, each over the tokens that its last one reads; 0 = all."""
    ladder = (size for size in (16, 64, 256, 1024) if size < problem.S // problem.kernel_stride)
    return (Parameter("stride_chunk", (0, *ladder), 0),)


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """Runs wherever a compressed token exists."""
    return None


def chunks(steps: int, first: int, stride_chunk: int) -> Iterator[tuple[int, int, int]]:
    """(first stride, end, keys) of each SDPA call; ``first``: the last token of the first stride, -1 = one call."""
    for begin, end in row_chunks(steps, stride_chunk if first >= 0 else 0):
        yield begin, end, first + end


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One SDPA call per chunk, over the chunk's compressed tokens."""
    p = problem
    rows = (p.B, p.S, p.G)
    given = Selection.compressed(
        p.kernel_size, p.kernel_stride, rows=rows, first_position=p.T - p.S, device=device
    ).structured("compression")
    _, first, _, steps = strides(given)
    if steps == 1:
        sizes = [(1, p.keys)]
    else:
        sizes = [(p.h * p.kernel_stride, keys) for _, _, keys in chunks(steps, first, int(parameters["stride_chunk"]))]
    keys = tuple((1, (p.B * p.G, heads, keys, None)) for heads, keys in sizes)
    return Evidence(required={SDPA: len(sizes)}, forbidden=(r"^flash_attn::",), shapes={SDPA: keys})


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    stride_chunk: ParameterValue = 0,
) -> Tensor:
    """Compressed attention: key (B, G, N, Dk), value (B, G, N, Dv), else shapes as in ``nsa.problem``."""

    def attend(folded: Tensor, first: int) -> Tensor:
        if first < 0:
            return shared_attention(folded, key, value, scale)
        parts = [
            causal(folded[:, :, :, begin:end], key[:, :, :keys], value[:, :, :keys], scale)
            for begin, end, keys in chunks(folded.shape[3], first, int(stride_chunk))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 3)

    out = by_strides(query, selection.structured("compression"), attend)
    executed("compression", "sdpa_compressed", {"stride_chunk": stride_chunk})
    return out


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query (B, G, heads, n, Dk), the last n of the keys (B, G, keys, Dk) -> (B, G, heads, n, Dv)."""
    count, keys = query.shape[3], key.shape[2]
    if count == keys:
        return shared_attention(query, key, value, scale, causal=True)
    mask = torch.ones(count, keys, dtype=torch.bool, device=query.device).tril(keys - count)
    return shared_attention(query, key, value, scale, mask=mask)
