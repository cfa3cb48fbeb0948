"""Bind a path whose work is launches of plans alone: note them once, and launch them again for calls alike.

Integers, strides and grids are the same for calls alike; only tensors change. An argument is an input, the output, or
memory that the path allocated and that its kernels fill. A path that does anything else to its memory (a ``zeros``, a
copy) cannot be bound like this; tests run bound paths on poisoned memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..selection import Selection
from ..trace import ParameterValue, as_part, executed, record_paths
from .launch import Plan, noted


def bind(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    parameters: dict[str, ParameterValue],
) -> Callable[[Tensor, Tensor, Tensor, Selection], Tensor] | None:
    """``function``, which is a path's ``run``, for calls alike. It runs once more, noted.

    None where the notes do not say it all: inputs that share memory, tensor maps, a query that is turned first.
    """
    launches: list[tuple[Plan, int, tuple[Any, ...]]] = []
    token = noted.set(launches)
    try:
        with as_part(), record_paths() as seen:
            out = function(query, key, value, selection, scale=scale, workspace=None, **parameters)
    finally:
        noted.reset(token)
    inputs = tensors_of(query, key, value, selection)
    places = {tensor.data_ptr(): i for i, tensor in enumerate((*inputs, out))}
    arguments = [argument for _, _, given in launches for argument in given]
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    plain = all(argument is None or isinstance(argument, (Tensor, int, float)) for argument in arguments)
    whole = scale >= 0 and out.is_contiguous() and all(tensor.numel() for tensor in tensors)
    if not plain or not whole or len(places) <= len(inputs) or out.data_ptr() not in {t.data_ptr() for t in tensors}:
        return None
    scratch: list[tuple[int, torch.dtype]] = []
    for tensor in tensors:
        if tensor.data_ptr() not in places:
            places[tensor.data_ptr()] = len(places)
            scratch.append((tensor.numel(), tensor.dtype))
    steps = [
        (
            plan,
            grid,
            [None if isinstance(argument, Tensor) else argument for argument in given],
            [(i, places[argument.data_ptr()]) for i, argument in enumerate(given) if isinstance(argument, Tensor)],
        )
        for plan, grid, given in launches
    ]
    shape, dtype, device = out.shape, out.dtype, out.device
    record = seen.executed[-1]

    def again(query: Tensor, key: Tensor, value: Tensor, selection: Selection) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        fresh = [torch.empty(size, dtype=kind, device=device) for size, kind in scratch]
        tensors = (*tensors_of(query, key, value, selection), out, *fresh)
        for plan, grid, given, sources in steps:
            filled = given.copy()
            for place, source in sources:
                filled[place] = tensors[source]
            plan(grid, *filled)
        executed(record.operation, record.path, record.parameters)
        return out

    return again


def tensors_of(query: Tensor, key: Tensor, value: Tensor, selection: Selection) -> tuple[Tensor, ...]:
    """The tensors that a call passes."""
    given = (query, key, value, selection.indices, selection.context_length, selection.query_positions)
    return tuple(item for item in given if isinstance(item, Tensor))
