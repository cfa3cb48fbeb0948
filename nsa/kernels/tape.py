"""Bind a path whose work is launches of plans alone: launch what one run launched again, for calls alike.

Integers, strides and grids are the same for calls alike; only tensors change. An argument is an input, the output, or
memory that the path allocated and that its kernels fill. A path that does anything else to its memory (a ``zeros``, a
copy) cannot be bound like this; tests run bound paths on poisoned memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..selection import Selection
from ..trace import Notes, ParameterValue, executed


def bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    parameters: dict[str, ParameterValue],
    out: Tensor,
    notes: Notes,
) -> Callable[[Tensor, Tensor, Tensor, Selection], Tensor] | None:
    """A path's run that gave ``out`` and ``notes``, for calls alike.

    None where the notes do not say it all: inputs that share memory, tensor maps.
    """
    inputs = tensors_of(query, key, value, selection)
    places = {tensor.data_ptr(): i for i, tensor in enumerate((*inputs, out))}
    arguments = [argument for _, _, given in notes.launches for argument in given]
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    plain = all(argument is None or isinstance(argument, (Tensor, int, float)) for argument in arguments)
    whole = out.is_contiguous() and all(tensor.numel() for tensor in tensors)
    written = out.data_ptr() in {tensor.data_ptr() for tensor in tensors}
    if not plain or not whole or not written or len(places) <= len(inputs) or notes.reported is None:
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
        for plan, grid, given in notes.launches
    ]
    shape, dtype, device = out.shape, out.dtype, out.device
    reported = notes.reported

    def again(query: Tensor, key: Tensor, value: Tensor, selection: Selection) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        fresh = [torch.empty(size, dtype=kind, device=device) for size, kind in scratch]
        tensors = (*tensors_of(query, key, value, selection), out, *fresh)
        for plan, grid, given, sources in steps:
            filled = given.copy()
            for place, source in sources:
                filled[place] = tensors[source]
            plan(grid, *filled)
        executed(*reported)
        return out

    return again


def tensors_of(query: Tensor, key: Tensor, value: Tensor, selection: Selection) -> tuple[Tensor, ...]:
    """The tensors that a call passes."""
    given = (query, key, value, selection.indices, selection.context_length, selection.query_positions)
    return tuple(item for item in given if isinstance(item, Tensor))
