"""Path ``triton_token``: one Triton program per token and group, or per few tokens, heads against their own blocks."""

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
    """``tokens`` of a program, which takes them one after the other; ``step``: keys at a time; ``warps`` and ``stages``
    of the kernel; ``order``: what runs side by side, tokens of a ``group`` or groups of a ``token``; ``loads`` of keys
    and values; in mode train the backward's."""
    return (
        Parameter("tokens", tuple(size for size in (1, 2, 4) if size <= problem.S), 1),
        Parameter("step", tuple(size for size in (16, 32, 64, 128) if size <= problem.block_size), problem.block_size),
        Parameter("warps", (1, 2, 4, 8), 4),
        Parameter("stages", (2, 3, 4), 2),
        Parameter("order", ("group", "token"), "group"),
        Parameter(**support.loads_ladder("triton_token", problem, device)),
        *(Parameter(**ladder) for ladder in support.backward_ladders("triton_token", problem, device)),
    )


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """Blocks, head dims up to 256, a GPU from compute capability 8.0 on or Triton's interpreter."""
    if reason := support.common_reason("triton_token", problem, device):
        return reason
    if reason := support.loads_reason("triton_token", str(parameters.get("loads", "pointer")), problem, device):
        return reason
    step = min(int(parameters.get("step", problem.block_size)), problem.block_size)
    needed = int(parameters.get("stages", 2)) * support.block_bytes(problem) * step // problem.block_size
    return support.shared_reason("triton_token", needed) or support.backward_reason(
        "triton_token", problem, device, parameters
    )


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One launch of its kernel; the interpreter leaves no trace."""
    required = support.required("triton_token", problem, device, parameters)
    return Evidence(required=required, forbidden=support.forbidden("triton_token"))


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    tokens: ParameterValue = 1,
    step: ParameterValue = 128,  # a whole block, as where there is no choice
    warps: ParameterValue = 4,
    stages: ParameterValue = 2,
    order: ParameterValue = "group",
    loads: ParameterValue = "pointer",
    **backward: ParameterValue,
) -> Tensor:
    """Selection attention, token by token. Shapes as in ``nsa.problem``."""
    from ..kernels import gradient, token  # Triton, loaded when first run

    parameters = {
        **{"tokens": tokens, "step": step, "warps": warps},
        **{"stages": stages, "order": order, "loads": loads},
    }

    def launch(q: Tensor, k: Tensor, v: Tensor, chosen: Selection, factor: float, logsum: Tensor | None) -> Tensor:
        return token.forward(q, k, v, chosen, factor, logsum, **parameters)

    out = gradient.attention(query, key, value, selection, scale, launch, backward)
    executed("selection", "triton_token", {**parameters, **backward})
    return out
