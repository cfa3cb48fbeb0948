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


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``span``: tokens sorted and merged together, 0 = all; ``rows``: query x head rows multiplied at a time, of which
    a program takes ``item_rows``; ``ring``: spans whose partials are held; ``partial``: their dtype; ``warps``,
    ``stages`` and ``registers`` (0 = the compiler's choice); ``loads`` of keys and values; in mode train the
    backward's."""
    heads = support.padded(problem.h)
    spans = (512, 1024, 2048, 4096, 8192)
    return (
        Parameter("span", spans, min(spans, key=lambda size: abs(size - 8192 // heads))),
        Parameter("rows", tuple(size for size in (16, 32, 64, 128) if size >= heads), 64),
        Parameter("item_rows", (128, 256, 512, 1024), 256),
        Parameter("ring", (2, 3, 4, 8), 3),
        Parameter("partial", ("value", "float32"), "value"),
        Parameter("warps", (4, 8), 4),
        Parameter("stages", (1, 2, 3, 4), 3),
        Parameter("registers", (0, 128, 160), 0),
        Parameter(**support.loads_ladder("triton_block", problem, device)),
        *(Parameter(**ladder) for ladder in support.backward_ladders(problem)),
    )


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """As ``triton_token``; a ring of at least two spans, or its programs would wait for each other."""
    if reason := support.common_reason("triton_block", problem, device):
        return reason
    if int(parameters.get("ring", 3)) < 2:
        return f"triton_block needs a ring of at least 2, got {parameters['ring']}"
    if reason := support.loads_reason("triton_block", str(parameters.get("loads", "pointer")), problem, device):
        return reason
    rows = max(int(parameters.get("rows", 64)), support.padded(problem.h))
    row_bytes = support.padded(problem.Dk, 16) * problem.item_bytes
    needed = support.block_bytes(problem) + int(parameters.get("stages", 3)) * rows * row_bytes
    return support.shared_reason("triton_block", needed) or support.backward_reason(
        "triton_block", problem, parameters
    )


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One launch of its kernel and of each that sorts the pairs; the interpreter leaves no trace. In mode train the
    backward sorts them again."""
    sorting = {rf"^nsa_invert_{step}$": 1 if problem.mode != "train" else 0 for step in ("mark", "offsets", "fill")}
    required = {support.KERNELS["triton_block"]: 1, **sorting} if device.type == "cuda" else {}
    return Evidence(required=required, forbidden=support.forbidden("triton_block"))


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    span: ParameterValue = 512,
    rows: ParameterValue = 64,
    item_rows: ParameterValue = 256,
    ring: ParameterValue = 3,
    partial: ParameterValue = "value",
    warps: ParameterValue = 4,
    stages: ParameterValue = 3,
    registers: ParameterValue = 0,
    loads: ParameterValue = "pointer",
    **backward: ParameterValue,
) -> Tensor:
    """Selection attention, block by block. Shapes as in ``nsa.problem``."""
    from ..kernels import block, gradient  # Triton, loaded when first run

    parameters = {
        "span": span,
        "rows": rows,
        "item_rows": item_rows,
        "ring": ring,
        "partial": partial,
        "warps": warps,
        "stages": stages,
        "registers": registers,
        "loads": loads,
    }

    def launch(q: Tensor, k: Tensor, v: Tensor, chosen: Selection, factor: float, logsum: Tensor | None) -> Tensor:
        return block.forward(q, k, v, chosen, factor, logsum, workspace=workspace, **parameters)

    out = gradient.attention(query, key, value, selection, scale, launch, backward)
    executed("selection", "triton_block", {**parameters, **backward})
    return out
