"""NSACache: what a layer keeps of the tokens it has seen, for prefill and decode.

Raw keys and values of the three branches and the compressed ones: preallocated, appended in place, grown by doubling.
Holds no gradients and computes nothing: ``nsa.attention`` fills it. Lengths live on the host, so no read waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import ArgumentError

Branch = Literal["compression", "selection", "window"]
BRANCHES: tuple[Branch, ...] = get_args(Branch)


class Buffer:
    """(B, G, capacity, D) of which the first ``length`` tokens are written; the rest is undefined."""

    def __init__(
        self, batch: int, groups: int, width: int, *, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.length = 0
        self.growths = 0
        self.storage = torch.empty(batch, groups, capacity, width, dtype=dtype, device=device)

    @property
    def tokens(self) -> Tensor:
        """(B, G, length, D) view of what is written; valid until the buffer grows."""
        return self.storage[:, :, : self.length]

    def append(self, tokens: Tensor) -> None:
        """Write tokens (B, G, s, D) behind the last one. Capacity doubles, or grows to the need if that is more."""
        batch, groups, capacity, width = self.storage.shape
        expected = (batch, groups, tokens.shape[2], width)
        if (
            tuple(tokens.shape) != expected
            or tokens.dtype != self.storage.dtype
            or tokens.device != self.storage.device
        ):
            raise ArgumentError(
                f"cannot append {tuple(tokens.shape)} {tokens.dtype} on {tokens.device} to a cache of {expected} "
                f"{self.storage.dtype} on {self.storage.device}; use the cache with the layer and batch it was made for"
            )
        end = self.length + tokens.shape[2]
        if end > capacity:
            grown = self.storage.new_empty(batch, groups, max(end, 2 * capacity), width)
            grown[:, :, : self.length] = self.tokens
            self.storage = grown
            self.growths += 1
        self.storage[:, :, self.length : end] = tokens.detach()
        self.length = end


class NSACache:
    """One sequence batch's cache in one layer. Keys (B, G, T, Dk) and values (B, G, T, Dv) by branch."""

    def __init__(
        self,
        batch: int,
        groups: int,
        key_width: int,
        value_width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 0,
        compressed_capacity: int = 0,
    ) -> None:
        def buffer(width: int, room: int) -> Buffer:
            return Buffer(batch, groups, width, capacity=room, dtype=dtype, device=device)

        self._keys = {branch: buffer(key_width, capacity) for branch in BRANCHES}
        self._values = {branch: buffer(value_width, capacity) for branch in BRANCHES}
        self._compressed_key = buffer(key_width, compressed_capacity)
        self._compressed_value = buffer(value_width, compressed_capacity)

    @property
    def length(self) -> int:
        """Raw tokens held, T."""
        return self._keys["selection"].length

    @property
    def compressed_length(self) -> int:
        """Compressed tokens held, N."""
        return self._compressed_key.length

    @property
    def capacity(self) -> int:
        """Raw tokens that fit before the next growth."""
        return self._keys["selection"].storage.shape[2]

    @property
    def growths(self) -> int:
        """Times that a buffer was re-allocated."""
        return sum(buffer.growths for buffer in self._buffers())

    @property
    def bytes(self) -> int:
        """Bytes of all buffers, unwritten room included."""
        return sum(buffer.storage.nbytes for buffer in self._buffers())

    def key(self, branch: Branch) -> Tensor:
        """Raw keys of a branch, (B, G, T, Dk): a view, valid until the next append."""
        return self._keys[branch].tokens

    def value(self, branch: Branch) -> Tensor:
        """Raw values of a branch, (B, G, T, Dv): a view, valid until the next append."""
        return self._values[branch].tokens

    @property
    def compressed_key(self) -> Tensor:
        """Compressed keys (B, G, N, Dk): a view, valid until the next append."""
        return self._compressed_key.tokens

    @property
    def compressed_value(self) -> Tensor:
        """Compressed values (B, G, N, Dv): a view, valid until the next append."""
        return self._compressed_value.tokens

    def append(self, keys: Mapping[Branch, Tensor], values: Mapping[Branch, Tensor]) -> None:
        """Append raw keys (B, G, s, Dk) and values (B, G, s, Dv) of every branch. Raises ArgumentError."""
        for branch in BRANCHES:
            self._keys[branch].append(keys[branch])
            self._values[branch].append(values[branch])

    def append_compressed(self, key: Tensor, value: Tensor) -> None:
        """Append compressed keys (B, G, n, Dk) and values (B, G, n, Dv), n may be 0. Raises ArgumentError."""
        self._compressed_key.append(key)
        self._compressed_value.append(value)

    def truncate(self, length: int, compressed_length: int) -> None:
        """Forget all tokens but the first ``length``, and all compressed ones but the first ``compressed_length``."""
        for buffer in (*self._keys.values(), *self._values.values()):
            buffer.length = min(buffer.length, length)
        for buffer in (self._compressed_key, self._compressed_value):
            buffer.length = min(buffer.length, compressed_length)

    def poison(self) -> None:
        """Fill all unwritten room with NaN: what reads beyond the written tokens then shows."""
        for buffer in self._buffers():
            buffer.storage[:, :, buffer.length :] = float("nan")

    def _buffers(self) -> tuple[Buffer, ...]:
        return (*self._keys.values(), *self._values.values(), self._compressed_key, self._compressed_value)
