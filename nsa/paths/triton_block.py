"""Path ``triton_block``: one Triton program per block and some of the rows that chose it; partials merged per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import support
from ..problem import SelectionProblem
from ..selection import Selection
from ..trace import ParameterValue, executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters

SPANS = (2048, 8192, 32768, 131072)


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``span``: tokens whose partials are held at a time; ``rows``: query x head rows multiplied at a time, of which a
    program takes ``item_rows``; ``partial``: the partials' dtype; ``warps`` and ``stages`` of the kernel; ``loads`` of
    keys and values; in mode train the backward's."""
    heads = support.padded(problem.h)
    row_bytes = problem.B * problem.G * support.padded(problem.topk) * problem.h * problem.Dv * problem.item_bytes
    fitting = [span for span in SPANS if span * row_bytes <= 2**33]
    return (
        Parameter("span", SPANS, fitting[-1] if fitting else SPANS[0]),
        Parameter("rows", tuple(size for size in (16, 32, 64, 128) if size >= heads), max(64, heads)),
        Parameter("item_rows", (128, 256, 512, 1024), 512),
        Parameter("partial", ("value", "float32"), "value"),
        Parameter("warps", (4, 8), 4),
        Parameter("stages", (2, 3, 4), 2),
        Parameter(**support.loads_ladder("triton_block", problem, device)),
        *(Parameter(**ladder) for ladder in support.backward_ladders("triton_block", problem, device)),
    )


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """As ``triton_token``."""
    if reason := support.common_reason("triton_block", problem, device):
        return reason
    if reason := support.loads_reason("triton_block", str(parameters.get("loads", "pointer")), problem, device):
        return reason
    rows = max(int(parameters.get("rows", 64)), support.padded(problem.h))
    row_bytes = support.padded(problem.Dk, 16) * problem.item_bytes
    needed = support.block_bytes(problem) + int(parameters.get("stages", 3)) * rows * row_bytes
    return support.shared_reason("triton_block", needed) or support.backward_reason(
        "triton_block", problem, device, parameters
    )


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One launch of its kernel and of the merge per span, and of each that sorts the pairs; the interpreter leaves no
    trace. In mode train the backward sorts them again."""
    spans = span_count(problem, int(parameters.get("span", SPANS[-1])))
    sorting = {rf"^nsa_invert_{step}$": 1 if problem.mode != "train" else 0 for step in ("mark", "offsets", "fill")}
    kernels = {support.KERNELS["triton_block"]: spans, r"^nsa_block_merge$": spans, **sorting}
    required = support.required("triton_block", problem, device, parameters)
    return Evidence(required=required | kernels if required else {}, forbidden=support.forbidden("triton_block"))


def span_count(problem: SelectionProblem, span: int) -> int:
    """Spans of a call: ``kernels.invert`` rounds them up to whole bitmaps of up to 512 tokens."""
    bitmap = min(512, support.padded(problem.S, 32))
    bitmaps = support.parts(problem.S, bitmap)
    return support.parts(bitmaps, min(bitmaps, support.parts(span or problem.S, bitmap)))


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    span: ParameterValue = 8192,
    rows: ParameterValue = 64,
    item_rows: ParameterValue = 512,
    partial: ParameterValue = "value",
    warps: ParameterValue = 4,
    stages: ParameterValue = 3,
    loads: ParameterValue = "pointer",
    **backward: ParameterValue,
) -> Tensor:
    """Selection attention, block by block. Shapes as in ``nsa.problem``."""
    from ..kernels import block, gradient  # Triton, loaded when first run

    parameters = {
        "span": span,
        "rows": rows,
        "item_rows": item_rows,
        "partial": partial,
        "warps": warps,
        "stages": stages,
        "loads": loads,
    }

    def launch(q: Tensor, k: Tensor, v: Tensor, chosen: Selection, factor: float, logsum: Tensor | None) -> Tensor:
        return block.forward(q, k, v, chosen, factor, logsum, workspace=workspace, **parameters)

    out = gradient.attention(query, key, value, selection, scale, launch, backward)
    executed("selection", "triton_block", {**parameters, **backward})
    return out
