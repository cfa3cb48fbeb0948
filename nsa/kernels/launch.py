"""Leaf of the Triton kernels: launch the same kernel again without asking Triton which one it is.

Triton finds the compiled kernel of a call by looking at every argument, 10 to 15 us of host time for the 50 arguments
of an attention kernel, and its launcher asks the driver about every tensor. Here a call is known by a key of its own,
made from strides, dtypes and parameters; the first call under a key goes through Triton, later ones hand addresses to
the launcher that Triton compiled. Triton's launch hooks (Proton's labels) see first calls only; kernels show up in
every profiler. The interpreter always goes through Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ..selection import Selection
from ..trace import noted

PLANS_AT_MOST = 1024
"""Keys held at a time; with one more all are forgotten, and found again at the price of a slow launch each."""
KNOWN_LAUNCHER = "iiiKKppOOOOOO"
"""What the compiled launcher of Triton 3.6 takes before a kernel's own arguments; of another one we ask no favours."""


class Launcher:
    """A compiled kernel, ready: ``launcher(wide, high, arguments)`` launches it on the device's current stream.

    Arguments are all of the kernel's signature, tensors as addresses; compile-time ones are not looked at.
    """

    __slots__ = ("_device", "_fixed", "_launch", "_stream")

    def __init__(self, compiled: Any) -> None:
        from triton.backends.nvidia import driver as nvidia  # needs no driver to be there, but is for CUDA alone

        whole, active = compiled.run, driver.active
        scratch = whole.global_scratch_size or whole.profile_scratch_size
        self._stream: Callable[[int], int] = active.get_current_stream
        self._device: int = active.get_current_device()
        self._launch, self._fixed = whole, (compiled.function, compiled.packed_metadata, None, None, None)
        if getattr(nvidia, "_BASE_ARGS_FORMAT", "") == KNOWN_LAUNCHER and not scratch:
            modes = (whole.launch_cooperative_grid, whole.launch_pdl, None, None)
            self._launch, self._fixed = whole.launch, (compiled.function, *modes, *self._fixed[1:])

    def __call__(self, wide: int, high: int, arguments: Iterable[Any]) -> None:
        """Launch a grid of ``wide`` by ``high`` programs."""
        self._launch(wide, high, 1, self._stream(self._device), *self._fixed, *arguments)


class Plan:
    """A kernel with what is the same at every call under one key: the last of its arguments, ``trailing``, and behind
    them its compile-time ones; and its launch options."""

    __slots__ = ("_launcher", "_tail", "_tensors", "constants", "kernel", "options", "trailing")

    def __init__(
        self, kernel: Any, constants: dict[str, Any], options: dict[str, Any], trailing: tuple[Any, ...] = ()
    ) -> None:
        self.kernel, self.constants, self.options, self.trailing = kernel, constants, options, trailing
        self._launcher: Launcher | None = None
        self._tensors: tuple[int, ...] = ()
        self._tail: tuple[Any, ...] = ()

    def __call__(self, grid: int, *arguments: Any) -> None:
        """Launch ``grid`` programs. Under one key the arguments must be alike in all that Triton specialises on."""
        if (notes := noted.get()) is not None:
            notes.launches.append((self, grid, arguments))
        if self._launcher is not None:
            given = [*arguments, *self._tail]
            for place in self._tensors:
                given[place] = given[place].data_ptr()
            self._launcher(grid, 1, given)
            return
        arguments += self.trailing
        compiled = self.kernel[(grid,)](*arguments, **self.constants, **self.options)
        if isinstance(self.kernel, JITFunction):
            self._tensors = tuple(i for i, argument in enumerate(arguments) if isinstance(argument, Tensor))
            constants = (self.constants[name] for name in self.kernel.arg_names[len(arguments) :])
            self._tail = (*self.trailing, *constants)
            self._launcher = Launcher(compiled)


_plans: dict[tuple[Any, ...], dict[str, Any]] = {}


def plans(key: tuple[Any, ...]) -> dict[str, Any]:
    """The plans of a key, by a name for each launch; empty when the key is new, and the caller's to fill."""
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= PLANS_AT_MOST:
            _plans.clear()
        found = _plans[key] = {}
    return found


def selection_key(selection: Selection) -> tuple[Any, ...]:
    """Of a selection, all that decides which compiled kernel reads it."""
    blocks = selection.indices
    return blocks.get_device(), blocks.shape[3], selection.block_size, *selection.layout


def call_key(query: Tensor, key: Tensor, value: Tensor, selection: Selection, *rest: Any) -> tuple[Any, ...]:
    """All that decides which compiled kernel serves a call: device, dtypes, widths, strides, alignment, and ``rest``.

    T and context length are left out, which grow from call to call: kernels do not specialise on them.
    """
    blocks = selection.indices
    return (
        blocks.get_device(), blocks.shape[3], selection.block_size, query.dtype, value.dtype, query.shape,
        value.shape[3], *selection.call_layout(query, key, value), rest,
    )  # fmt: skip
