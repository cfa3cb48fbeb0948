"""Path ``triton_union``: one Triton program per tile of neighbouring tokens, against the union of their blocks."""

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
    """``tokens`` per tile; ``step``: keys at a time; ``warps`` and ``stages`` of the kernel; ``order``: what shares a
    tile, tokens of neighbouring ``position`` or those of 64 whose blocks ``overlap`` most; ``loads`` of keys and
    values; in mode train the backward's. Sizes that cannot be stand on no ladder: a tile has 16 to 128 query x head
    rows and up to 256 slots."""
    tokens = tile_ladder(problem)
    step = min(32, problem.block_size)
    default = min(tokens, key=lambda size: abs(size * support.padded(problem.h) - 64)) if tokens else 1
    return (
        Parameter("tokens", tokens or (1,), default),
        Parameter("step", tuple(size for size in (16, 32, 64, 128) if size <= problem.block_size), step),
        Parameter("warps", (2, 4, 8), 4),
        Parameter("stages", (2, 3, 4), 3 if problem.dtype == "bfloat16" else 2),
        Parameter("order", ("position", "overlap"), "overlap" if problem.overlap == "low" else "position"),
        Parameter(**support.loads_ladder("triton_union", problem, device)),
        *(Parameter(**ladder) for ladder in support.backward_ladders("triton_union", problem, device)),
    )


def tile_ladder(problem: SelectionProblem) -> tuple[int, ...]:
    """Tokens of a tile: 16 to 128 rows, at most 256 slots, and at least two tokens, whose bits and a block's number fit
    31 bits."""
    heads, slots = support.padded(problem.h), support.padded(problem.topk)
    blocks = support.parts(problem.T, max(1, problem.block_size))
    sizes = (size for size in (2, 4, 8, 16) if 16 <= size * heads <= 128 and size * slots <= 256)
    return tuple(size for size in sizes if blocks < 2 ** (31 - size))


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """As ``triton_token``, and several tokens that fit a tile."""
    if reason := support.common_reason("triton_union", problem, device):
        return reason
    ladder = tile_ladder(problem)
    tokens = int(parameters.get("tokens", ladder[0] if ladder else 1))
    if tokens not in ladder:
        return (
            f"triton_union cannot tile {tokens} tokens of {problem.h} heads and {problem.topk} slots; "
            f"a tile has 16 to 128 rows and up to 256 slots, which leaves {list(ladder)}"
        )
    if reason := support.loads_reason("triton_union", str(parameters.get("loads", "pointer")), problem, device):
        return reason
    rows = tokens * support.padded(problem.h)
    step = min(int(parameters.get("step", 32)), problem.block_size)
    needed = int(parameters.get("stages", 2)) * support.block_bytes(problem) * step // problem.block_size
    needed += rows * support.padded(problem.Dk, 16) * problem.item_bytes
    return support.shared_reason("triton_union", needed) or support.backward_reason(
        "triton_union", problem, device, parameters
    )


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One launch of its kernel, of the one that makes the unions, and of the one that orders tokens; neither of the
    last two where every row selects its whole context. The interpreter leaves no trace."""
    launches = {}
    if not (problem.complete and problem.dense):
        launches["nsa_union_entries"] = 1
        if parameters.get("order") == "overlap":
            launches["nsa_union_order"] = 1
    required = support.required("triton_union", problem, device, parameters, **launches)
    return Evidence(required=required, forbidden=support.forbidden("triton_union"))


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    tokens: ParameterValue = 4,
    step: ParameterValue = 64,  # what table entries from before there was a choice were measured with
    warps: ParameterValue = 4,
    stages: ParameterValue = 2,
    order: ParameterValue = "position",
    loads: ParameterValue = "pointer",
    **backward: ParameterValue,
) -> Tensor:
    """Selection attention, tile by tile. Shapes as in ``nsa.problem``."""
    from ..kernels import gradient, union  # Triton, loaded when first run

    parameters = {
        **{"tokens": tokens, "step": step, "warps": warps},
        **{"stages": stages, "order": order, "loads": loads},
    }

    def launch(q: Tensor, k: Tensor, v: Tensor, chosen: Selection, factor: float, logsum: Tensor | None) -> Tensor:
        return union.forward(q, k, v, chosen, factor, logsum, **parameters)

    out = gradient.attention(query, key, value, selection, scale, launch, backward)
    executed("selection", "triton_union", {**parameters, **backward})
    return out
