"""Path ``flex``: ``flex_attention`` under a block mask made from the selected blocks, compiled.

Compiling takes tens of seconds on a CPU and needs a C++ compiler there; where it cannot be, ``unsupported`` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..attend import SDPA
from ..problem import SelectionProblem
from ..selection import Selection
from ..trace import ParameterValue, executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters, need_blocks

SHAPES = 256
"""Distinct shapes that one process may compile before torch raises; its own limit is 8."""


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``query_block``: rows of the block mask."""
    return (Parameter("query_block", (64, 128), 128),)


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """Blocks of a power of two from 16 on; on a CPU a C++ compiler and no gradients."""
    if reason := need_blocks(problem):
        return reason
    if problem.block_size < 16 or problem.block_size & (problem.block_size - 1):
        return f"flex needs a block_size that is a power of two from 16 on, got {problem.block_size}"
    if problem.execution == "graph":
        return "flex builds its block mask on the host"
    if problem.Dk != problem.Dv and device.type == "cpu":
        return "flex on a CPU needs Dk == Dv"
    if problem.dtype == "float64":
        return "flex has no float64"
    if device.type == "cpu":
        if problem.mode == "train":
            return "flex on a CPU has no backward"
        return compiler_reason()
    return None


@cache
def compiler_reason() -> str | None:
    """Why torch cannot compile for the CPU here; None if it can."""
    from torch._inductor import cpp_builder, exc  # imports much of torch's compiler

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "flex needs a C++ compiler"
    return None


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """A compiled kernel and no eager attention."""
    seen = r"flex_attention" if device.type == "cuda" else r"Torch-Compiled Region|inductor|cpp_flex_attention"
    return Evidence(required={seen: 0}, forbidden=(SDPA, r"flash_attn", r"^aten::softmax$"))


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    query_block: ParameterValue = 128,
) -> Tensor:
    """Selection attention through compiled flex_attention. Shapes as in ``nsa.problem``."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, queries, groups, heads, width = query.shape
    keys, size = key.shape[2], selection.block_size
    blocks = selection.blocks.to(torch.int64)
    count = -(-keys // size)
    valid = (blocks >= 0) & (blocks < count)
    chosen = torch.zeros(batch, queries, groups, count + 1, dtype=torch.bool, device=query.device)
    chosen = chosen.scatter(-1, blocks.where(valid, count), True)
    limits = selection.limits

    def readable(b: Tensor, head: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return chosen[b, s, head // heads, t // size] & (t < limits[b, s])

    mask = create_block_mask(
        readable, batch, groups * heads, queries, keys, device=query.device, BLOCK_SIZE=(int(query_block), size)
    )
    stacked = query.reshape(batch, queries, groups * heads, width).transpose(1, 2)
    out = compiled()(stacked, key, value, block_mask=mask, scale=scale, enable_gqa=heads > 1)
    executed("selection", "flex", {"query_block": query_block})
    return out.transpose(1, 2).reshape(batch, queries, groups, heads, -1)  # type: ignore[no-any-return]


@cache
def compiled() -> Callable[..., Any]:
    """flex_attention compiled once per process, and by torch once more for each new shape.

    ``fullgraph`` makes torch raise where it would otherwise fall back to the eager form, as it does after
    ``recompile_limit`` shapes. Shapes stay static: with dynamic ones torch 2.13 emits C++ that does not compile.
    """
    from torch import _dynamo
    from torch.nn.attention.flex_attention import flex_attention

    run = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return _dynamo.config.patch(recompile_limit=SHAPES)(run)  # type: ignore[no-any-return]
