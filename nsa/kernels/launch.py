"""Leaf of the Triton kernels: launch the same kernel again without asking Triton which one it is.

Triton finds the compiled kernel of a call by looking at every argument, 10 to 15 us of host time for the 50 arguments
of an attention kernel. Here a call is known by a key of its own, made from strides, dtypes and parameters; the first
call under a key goes through Triton, later ones launch what it returned. The interpreter always goes through Triton.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction

from ..selection import Selection

PLANS_AT_MOST = 1024
"""Keys held at a time; with one more all are forgotten, and found again at the price of a slow launch each."""


class Plan:
    """A kernel with its compile-time arguments, which come last in its signature, and its launch options."""

    __slots__ = ("compiled", "constants", "kernel", "options", "tail")

    def __init__(self, kernel: Any, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.kernel, self.constants, self.options = kernel, constants, options
        self.compiled: Any = None
        self.tail: tuple[Any, ...] = ()

    def __call__(self, grid: int, *arguments: Any) -> None:
        """Launch ``grid`` programs. Under one key the arguments must be alike in all that Triton specialises on."""
        if self.compiled is not None:
            self.compiled[(grid, 1, 1)](*arguments, *self.tail)
            return
        done = self.kernel[(grid,)](*arguments, **self.constants, **self.options)
        if isinstance(self.kernel, JITFunction):
            names = self.kernel.arg_names[len(arguments) :]
            self.tail = tuple(self.constants[name] for name in names)
            self.compiled = done


_plans: dict[tuple[Any, ...], dict[str, Plan]] = {}


def plans(key: tuple[Any, ...]) -> dict[str, Plan]:
    """The plans of a key, by a name for each launch; empty when the key is new, and the caller's to fill."""
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= PLANS_AT_MOST:
            _plans.clear()
        found = _plans[key] = {}
    return found


def selection_key(selection: Selection) -> tuple[Any, ...]:
    """Of a selection, all that decides which compiled kernel reads it."""
    blocks, length, positions = selection.indices, selection.context_length, selection.query_positions
    return (
        blocks.device.index, blocks.dtype, blocks.shape[3], blocks.stride(), blocks.data_ptr() & 15,
        selection.block_size,
        (length.dtype, length.data_ptr() & 15) if isinstance(length, Tensor) else length > 2**31 - 1,
        (positions.dtype, positions.stride(), positions.data_ptr() & 15) if positions is not None else None,
    )  # fmt: skip


def call_key(query: Tensor, key: Tensor, value: Tensor, selection: Selection, *rest: Any) -> tuple[Any, ...]:
    """All that decides which compiled kernel serves a call: device, dtypes, widths, strides, alignment, and ``rest``.

    Token counts, context length and T are left out: kernels do not specialise on them.
    """
    return (
        *selection_key(selection), query.dtype, value.dtype, query.shape[2:], value.shape[3],
        query.stride(), key.stride(), value.stride(), (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15, rest,
    )  # fmt: skip
