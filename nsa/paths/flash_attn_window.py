"""Path ``flash_attn_window``: the window through ``flash_attn_func``, whose kernel skips what lies outside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attend import FLASH_ATTN, SDPA, flash_attn_attention, flash_attn_reason
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
    """One forward of the package, over the keys that any query reads."""
    p = problem
    keys = (p.B, min(p.T, p.S + p.window - 1), p.G, p.Dk)
    return Evidence(required={FLASH_ATTN: 1}, forbidden=(SDPA,), shapes={FLASH_ATTN: ((1, keys),)})


def run(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float, workspace: Workspace | None = None
) -> Tensor:
    """Window attention in one call. Shapes as in ``nsa.problem``."""
    window = selection.structured("window").window
    first = max(0, key.shape[2] - query.shape[1] - window + 1)
    out = flash_attn_attention(query, key[:, :, first:], value[:, :, first:], scale, window=window)
    executed("window", "flash_attn_window", {})
    return out
