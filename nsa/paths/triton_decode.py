"""Path ``triton_decode``: split-K, each row's blocks dealt to several Triton programs, combined by the last one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..kernels import support
from ..problem import SelectionProblem
from ..selection import Selection
from ..trace import Notes, ParameterValue, executed
from ..workspace import Workspace
from .base import Bound, Evidence, Parameter, Parameters

COMBINE = r"^nsa_decode_combine$"


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``splits``: programs per row; ``combine``: ``inside`` by the last program of a row, ``launch`` by a second
    kernel; ``step``: keys at a time; ``warps`` and ``stages``; ``loads`` of keys and values; ``dependent``: launches
    that are prepared while the kernel before them ends; in mode train the backward's.

    Default: up to 8 splits that make about one program per multiprocessor of a large GPU. A second launch is quicker
    on the device and slower on the host, which a graph spares.
    """
    ladder = tuple(size for size in (1, 2, 4, 8, 16, 32) if size <= support.padded(problem.topk))
    fitting = [size for size in ladder if size * problem.rows <= 128 and size <= 8]
    graph = problem.execution == "graph" and len(fitting) > 1
    early = device.type == "cuda" and dependent_reason(device) is None
    return (
        Parameter("splits", ladder, fitting[-1] if fitting else 1),
        Parameter("combine", ("inside", "launch"), "launch" if graph else "inside"),
        Parameter("step", tuple(size for size in (16, 32, 64, 128) if size <= problem.block_size), problem.block_size),
        Parameter("warps", (1, 2, 4, 8), 4),
        Parameter("stages", (2, 3, 4), 3 if 3 * support.block_bytes(problem) <= support.SHARED_BYTES else 2),
        Parameter(**support.loads_ladder("triton_decode", problem, device)),
        Parameter("dependent", (False, True) if early else (False,), graph and early),
        *(Parameter(**ladder) for ladder in support.backward_ladders("triton_decode", problem, device)),
    )


def dependent_reason(device: torch.device) -> str | None:
    """Why launches cannot be dependent; None if they can, as far as is known without the device."""
    if device.type != "cuda":
        return "dependent launches need a CUDA device"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (9, 0):
        return "dependent launches need compute capability 9.0"
    return None


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """As ``triton_token``."""
    if reason := support.common_reason("triton_decode", problem, device):
        return reason
    if reason := support.loads_reason("triton_decode", str(parameters.get("loads", "pointer")), problem, device):
        return reason
    if parameters.get("dependent") and (reason := dependent_reason(device)):
        return f"triton_decode: {reason}"
    step = min(int(parameters.get("step", 128)), problem.block_size)
    needed = int(parameters.get("stages", 2)) * support.block_bytes(problem) * step // problem.block_size
    return support.shared_reason("triton_decode", needed) or support.backward_reason(
        "triton_decode", problem, device, parameters
    )


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One launch of its kernel, and one of the combination where that is a launch; the interpreter leaves no trace."""
    combined = parameters.get("combine") == "launch" and int(parameters.get("splits", 1)) > 1
    required = support.required("triton_decode", problem, device, parameters)
    absent = (*support.forbidden("triton_decode"), *(() if combined else (COMBINE,)))
    return Evidence(required=required | ({COMBINE: 1} if combined and device.type == "cuda" else {}), forbidden=absent)


USUAL: dict[str, ParameterValue] = {
    "splits": 8,
    "combine": "inside",
    "step": 128,  # what table entries from before there was a choice were measured with: a whole block
    "warps": 4,
    "stages": 2,
    "loads": "pointer",
    "dependent": False,
}
"""Of the forward; what a call leaves out."""


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    **parameters: ParameterValue,
) -> Tensor:
    """Selection attention for few rows. Shapes as in ``nsa.problem``."""
    decode, gradient = _kernels()
    chosen = {name: parameters.pop(name, default) for name, default in USUAL.items()}

    def launch(q: Tensor, k: Tensor, v: Tensor, blocks: Selection, factor: float, logsum: Tensor | None) -> Tensor:
        made: Tensor = decode.call_for(q, k, v, blocks, logsum is not None, chosen)(q, k, v, blocks, factor, logsum)
        return made

    out: Tensor = gradient.attention(query, key, value, selection, scale, launch, parameters)
    executed("selection", "triton_decode", chosen | parameters)
    return out


def bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    parameters: dict[str, ParameterValue],
    out: Tensor,
    notes: Notes,
) -> Bound:
    """``run`` for calls alike."""
    chosen = {name: parameters.get(name, default) for name, default in USUAL.items()}
    filled = chosen | parameters
    call = _kernels()[0].call_for(query, key, value, selection, False, chosen)

    def again(query: Tensor, key: Tensor, value: Tensor, selection: Selection) -> Tensor:
        out: Tensor = call(query, key, value, selection, scale, None)
        executed("selection", "triton_decode", filled)
        return out

    return again


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """Modules that need Triton, loaded when first run."""
    from ..kernels import decode, gradient

    return decode, gradient
