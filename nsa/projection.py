"""What one projection of the tokens holds, taken apart: turned queries and keys, values, gates.

On a GPU one Triton kernel each way, which reads and writes every number once; elsewhere torch's operators.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .cache import BRANCHES, Branch
from .config import NSAConfig
from .kernels.support import Route, by_triton
from .opaque import opaque
from .rotary import rotate

Parts = tuple[Tensor, Tensor, dict[Branch, Tensor], dict[Branch, Tensor]]


def projection_widths(config: NSAConfig) -> tuple[int, ...]:
    """Columns of the projection: queries, keys by branch, values by branch, gates."""
    groups, heads = config.num_kv_heads, config.num_heads
    return (
        heads * config.head_dim,
        *(groups * config.head_dim for _ in BRANCHES),
        *(groups * config.value_width for _ in BRANCHES),
        heads * len(BRANCHES),
    )


@partial(opaque, when=lambda projected, *_, **__: projected.is_cuda)
def split_projection(
    projected: Tensor, turn: Tensor, bias: Tensor, config: NSAConfig, *, route: Route = "auto"
) -> Parts:
    """projected (B, S, W), turn as ``rotary.rotation`` has it, bias (3 * G * h) -> query (B, S, G, h, Dk), gates
    (B, S, G, h, 3) in [0, 1] (paper eq. 5), and per branch keys (B, G, S, Dk) and values (B, G, S, Dv).

    ``route``: auto = triton on a GPU that has it.
    """
    groups, width, value_width = config.num_kv_heads, config.head_dim, config.value_width
    if by_triton(route, projected):
        from .kernels.projection import SplitFunction  # Triton, loaded when first run

        query, gates, *rest = SplitFunction.apply(  # type: ignore[no-untyped-call]
            projected, turn, bias, config.num_heads, groups, width, value_width
        )
        keys, values = rest[:3], rest[3:]
        query = torch.unflatten(query, 2, (groups, -1))
    else:
        query, *rest, gates = torch.split(projected, list(projection_widths(config)), 2)
        query = rotate(torch.unflatten(query, 2, (groups, config.heads_per_group, width)), turn)
        gates = torch.sigmoid(gates + bias.to(gates.dtype))
        keys = [rotate(torch.unflatten(key, 2, (groups, width)), turn) for key in rest[:3]]
        values = [torch.unflatten(value, 2, (groups, value_width)) for value in rest[3:]]
    return (
        query,
        torch.unflatten(gates, 2, (groups, config.heads_per_group, len(BRANCHES))),
        {name: key.transpose(1, 2) for name, key in zip(BRANCHES, keys, strict=True)},
        {name: value.transpose(1, 2) for name, value in zip(BRANCHES, values, strict=True)},
    )
