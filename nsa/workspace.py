"""Leaf. Workspace: buffers by role that grow, are reused, count and report.

Capacity of a buffer is the most ever needed or reserved, not this call's need; a buffer that must grow again at least
doubles, so that a context that grows by one token a call does not re-allocate on every call. Buffers hold no
gradients: what backward needs is never one of them. Reserves and capacities count rows of ``width`` elements; bytes
are always shown.
"""

from __future__ import annotations

import os

import msgspec
import torch
from torch import Tensor

from .errors import ReserveError


class WorkspaceReport(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one workspace. ``buffers`` maps role to bytes; ``bytes`` is their sum, retired ones included."""

    bytes: int
    growths: int
    reuses: int
    buffers: dict[str, int]


class Workspace:
    """Reserved buffers, by (role, dtype, device). Not thread-safe; one per stream.

    ``memory_limit_bytes`` bounds what all buffers may hold; None = what the device has free.
    """

    def __init__(self, *, memory_limit_bytes: int | None = None) -> None:
        self.memory_limit_bytes = memory_limit_bytes
        self.growths = 0
        self.reuses = 0
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._captured: set[tuple[str, torch.dtype, torch.device]] = set()
        self._retired: list[Tensor] = []

    @property
    def bytes(self) -> int:
        """Bytes held by all buffers, those kept alive for captured graphs included."""
        return sum(buffer.nbytes for buffer in (*self._buffers.values(), *self._retired))

    def take(
        self, role: str, rows: int, width: int, *, dtype: torch.dtype, device: torch.device, reserve_rows: int = 0
    ) -> Tensor:
        """A (rows, width) view, contents undefined, of a buffer that has room for ``max(rows, reserve_rows)`` rows.

        The view is valid until the next ``take`` of the role. Raises ReserveError where the room cannot be had, or
        where it would have to grow while a CUDA graph is captured.
        """
        key = (role, dtype, device)
        buffer = self._buffers.get(key)
        need = max(rows, reserve_rows) * width
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if buffer is None or buffer.numel() < need:
            buffer = self._grow(key, need, capturing)
        else:
            self.reuses += 1
        if capturing:
            self._captured.add(key)
        return buffer[: rows * width].view(rows, width)

    def _grow(self, key: tuple[str, torch.dtype, torch.device], elements: int, capturing: bool) -> Tensor:
        role, dtype, device = key
        wanted = elements * dtype.itemsize
        if capturing:
            raise ReserveError(
                f"buffer {role!r} would have to grow to {wanted} bytes while a CUDA graph is captured; "
                "call once before capture, or reserve enough"
            )
        old = self._buffers.get(key)
        keep = old is not None and key in self._captured
        doubled = 0 if old is None else 2 * old.numel()
        held = self.bytes - (0 if old is None or keep else old.nbytes)
        room = free_bytes(device) + (0 if old is None or keep else old.nbytes)
        if self.memory_limit_bytes is not None:
            room = min(room, self.memory_limit_bytes - held)
        if doubled * dtype.itemsize <= room:
            elements = max(elements, doubled)
        if wanted > room:
            raise ReserveError(
                f"buffer {role!r} asked for {wanted} bytes ({wanted / 2**30:.2f} GiB), {max(room, 0)} bytes "
                f"({max(room, 0) / 2**30:.2f} GiB) are there; lower the reserve or the rows per chunk"
            )
        if keep and old is not None:
            self._retired.append(old)
            self._captured.discard(key)
        self._buffers.pop(key, None)
        del old
        with torch.inference_mode(False):  # a buffer outlives the mode it was first needed in
            self._buffers[key] = torch.empty(elements, dtype=dtype, device=device)
        self.growths += 1
        return self._buffers[key]

    def poison(self) -> None:
        """Fill every buffer with NaN: what a path reads without having written it then shows in its output."""
        for buffer in self._buffers.values():
            buffer.fill_(float("nan") if buffer.is_floating_point() else -1)

    def report(self) -> WorkspaceReport:
        """Counters so far."""
        return WorkspaceReport(
            bytes=self.bytes,
            growths=self.growths,
            reuses=self.reuses,
            buffers={role: buffer.nbytes for (role, _, _), buffer in self._buffers.items()},
        )


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: of the GPU plus what torch's allocator holds unused, or of the host."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
