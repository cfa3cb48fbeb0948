"""Paths ``triton_window`` and ``triton_compressed``: an interval of keys per row, the window or the compressed tokens
under their staircase, by the same Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import interval_support as support
from ..kernels.support import LIBRARIES
from ..problem import Operation, SelectionProblem
from ..selection import Selection
from ..trace import ParameterValue, executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters

NAMES: dict[Operation, str] = {"window": "triton_window", "compression": "triton_compressed"}


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """Tiles and launch of the forward; in mode train the backward's too."""
    return tuple(Parameter(**ladder) for ladder in support.ladders(NAMES[problem.operation], problem, device))


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """Up to 64 heads a group, head dims up to 256, a GPU from compute capability 8.0 on or Triton's interpreter."""
    return support.reason(NAMES[problem.operation], problem, device, dict(parameters))


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One launch of the forward; the interpreter leaves no trace."""
    required = {support.FORWARD: 1} if device.type == "cuda" else {}
    return Evidence(required=required, forbidden=(LIBRARIES["sdpa"], LIBRARIES["flash_attn"]))


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    tokens: ParameterValue = 4,
    keys: ParameterValue = 32,
    warps: ParameterValue = 4,
    stages: ParameterValue = 2,
    loads: ParameterValue = "pointer",
    registers: ParameterValue = 0,
    **backward: ParameterValue,
) -> Tensor:
    """Attention of the selection's operation. Shapes as in ``nsa.problem``, N keys for T where it is compression."""
    from ..kernels.interval import Interval  # Triton, loaded when first run
    from ..kernels.interval_gradient import attention

    operation = selection.operation
    given = selection.structured(operation)
    interval = Interval(given.kernel_size or 1, given.kernel_stride or 1, given.window, given.first_position)
    forward = {
        **{"tokens": tokens, "keys": keys, "warps": warps, "stages": stages},
        **{"loads": loads, "registers": registers},
    }
    out, logsum = attention(query, key, value, interval, scale, forward, backward)
    if selection.sums is not None:
        selection.sums.tensor = logsum
    executed(operation, NAMES[operation], {**forward, **backward})
    return out
