"""Path ``triton_decode``: split-K, each row's blocks dealt to several Triton programs, combined by the last one."""

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

COMBINE = r"^nsa_decode_combine$"


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``splits``: programs per row; ``combine``: ``inside`` by the last program of a row, ``launch`` by a second
    kernel; ``warps`` and ``stages``; ``loads`` of keys and values; in mode train the backward's.

    Default: about two programs per multiprocessor of a large GPU.
    """
    ladder = tuple(size for size in (1, 2, 4, 8, 16, 32) if size <= support.padded(problem.topk))
    fitting = [size for size in ladder if size * problem.rows <= 256]
    return (
        Parameter("splits", ladder, fitting[-1] if fitting else 1),
        Parameter("combine", ("inside", "launch"), "inside"),
        Parameter("warps", (1, 2, 4, 8), 4),
        Parameter("stages", (2, 3, 4), 2),
        Parameter(**support.loads_ladder("triton_decode", problem, device)),
        *(Parameter(**ladder) for ladder in support.backward_ladders(problem)),
    )


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """As ``triton_token``."""
    if reason := support.common_reason("triton_decode", problem, device):
        return reason
    if reason := support.loads_reason("triton_decode", str(parameters.get("loads", "pointer")), problem, device):
        return reason
    needed = int(parameters.get("stages", 2)) * support.block_bytes(problem)
    return support.shared_reason("triton_decode", needed) or support.backward_reason(
        "triton_decode", problem, parameters
    )


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One launch of its kernel, and one of the combination where that is a launch; the interpreter leaves no trace."""
    combined = parameters.get("combine") == "launch" and int(parameters.get("splits", 1)) > 1
    required = support.required("triton_decode", problem, device)
    absent = (*support.forbidden("triton_decode"), *(() if combined else (COMBINE,)))
    return Evidence(required=required | ({COMBINE: 1} if combined and device.type == "cuda" else {}), forbidden=absent)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    splits: ParameterValue = 8,
    combine: ParameterValue = "inside",
    warps: ParameterValue = 4,
    stages: ParameterValue = 2,
    loads: ParameterValue = "pointer",
    **backward: ParameterValue,
) -> Tensor:
    """Selection attention for few rows. Shapes as in ``nsa.problem``."""
    from ..kernels import decode, gradient  # Triton, loaded when first run

    parameters = {"splits": splits, "combine": combine, "warps": warps, "stages": stages, "loads": loads}

    def launch(q: Tensor, k: Tensor, v: Tensor, chosen: Selection, factor: float, logsum: Tensor | None) -> Tensor:
        return decode.forward(q, k, v, chosen, factor, logsum, **parameters)

    out = gradient.attention(query, key, value, selection, scale, launch, backward)
    executed("selection", "triton_decode", {**parameters, **backward})
    return out
