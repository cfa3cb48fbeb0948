"""Path ``cudnn_compressed``: queries of a stride as entries of a batch, then cuDNN's causal attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..folding import by_residues
from ..problem import SelectionProblem
from ..selection import Selection
from ..trace import executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters

OPERATOR = r"^aten::_scaled_dot_product_cudnn_attention$"


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """Nothing to tune."""
    return ()


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """A GPU, 16 bits, head dims that are multiples of 8 up to 128, a whole context: cuDNN's causal mask starts at the
    first key."""
    if device.type != "cuda":
        return "cudnn_compressed needs a CUDA device"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"cudnn_compressed needs float16 or bfloat16, got {problem.dtype}"
    if max(problem.Dk, problem.Dv) > 128 or problem.Dk % 8 or problem.Dv % 8:
        return f"cudnn_compressed needs head dims of a multiple of 8 up to 128, got {problem.Dk} and {problem.Dv}"
    if problem.S != problem.T:
        return "cudnn_compressed needs a whole context, from position 0 on"
    if (problem.S, problem.h) == (problem.kernel_size, 1):
        return "cudnn_compressed cannot multiply one query by one token"
    return None


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One call for the whole strides, one for what is left."""
    return Evidence(required={OPERATOR: 0}, forbidden=(r"^flash_attn::", r"^aten::_scaled_dot_product_flash"))


def run(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float, workspace: Workspace | None = None
) -> Tensor:
    """Compressed attention: key (B, G, N, Dk), value (B, G, N, Dv), else shapes as in ``nsa.problem``."""
    given = selection.structured("compression")
    out, logsum = by_residues(
        query,
        key,
        value,
        partial(attend, scale=scale),
        first_position=given.first_position,
        kernel_size=given.kernel_size,
        kernel_stride=given.kernel_stride,
        sums=selection.sums is not None,
    )
    if selection.sums is not None:
        selection.sums.tensor = logsum
    executed("compression", "cudnn_compressed", {})
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """``folding.Attend`` by cuDNN, which reads a group's keys for all of its heads."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out, logsum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), logsum.reshape(logsum.shape[:3])
