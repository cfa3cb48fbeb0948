"""Path ``flash_attn_compressed``: queries of a stride folded into heads, then causal ``flash_attn_func``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attend import FLASH_ATTN, SDPA, by_strides, flash_attn_attention, flash_attn_reason
from ..problem import SelectionProblem
from ..selection import Selection
from ..trace import executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """Nothing to tune."""
    return ()


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """A GPU, 16 bits, equal head dims, and the package."""
    return flash_attn_reason(problem, device)


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One forward of the package, over the compressed tokens."""
    keys = (problem.B, problem.keys, problem.G, problem.Dk)
    return Evidence(required={FLASH_ATTN: 1}, forbidden=(SDPA,), shapes={FLASH_ATTN: ((1, keys),)})


def run(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float, workspace: Workspace | None = None
) -> Tensor:
    """Compressed attention in one call: key (B, G, N, D), value (B, G, N, D), else shapes as in ``nsa.problem``."""

    def attend(folded: Tensor, first: int) -> Tensor:
        out = flash_attn_attention(folded.permute(0, 3, 1, 2, 4), key, value, scale, causal=first >= 0)
        return out.permute(0, 2, 3, 1, 4)

    out = by_strides(query, selection.structured("compression"), attend)
    executed("compression", "flash_attn_compressed", {})
    return out
