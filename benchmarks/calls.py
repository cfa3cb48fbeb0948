"""Calls of ``selection.py`` and ``layer.py``: how one is held against its oracle, how a backward alone is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor

from nsa.workspace import Workspace
from tuner.gradient_oracle import GradientOracle
from tuner.inputs import Inputs
from tuner.oracle import Oracle

Run = Callable[[Inputs], Tensor]


def checked(run: Run, inputs: Inputs, oracle: Oracle | GradientOracle, name: str) -> dict[str, Any]:
    """How much was compared, and how far off it was at most, in units of the bound. Raises WrongResult."""
    if isinstance(oracle, Oracle):
        off = oracle.compare(run(inputs), name) / oracle.bound
    else:

        def call(case: Inputs, _: Workspace | None) -> Tensor:
            return run(msgspec.structs.replace(case, selection=inputs.selection))

        off = oracle.compare(call, Workspace())
    return {"checked_tokens": len(oracle.rows), "of_bound": round(off, 4)}


def with_leaves(inputs: Inputs) -> Inputs:
    """The same call, its tensors asking for gradients."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in (inputs.query, inputs.key, inputs.value))
    return Inputs(query, key, value, inputs.selection, inputs.union)


def backward(run: Run, inputs: Inputs, weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The backward alone, of a forward that ran once."""
    case = with_leaves(inputs)
    out = run(case)
    return lambda: torch.autograd.grad(out, (case.query, case.key, case.value), weight, retain_graph=True)
