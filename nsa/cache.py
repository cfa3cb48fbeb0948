"""NSACache: what a layer keeps of the tokens it has seen, for prefill and decode.

Raw keys and values of the three branches and the compressed ones: preallocated, appended in place, grown by doubling,
in one piece per sequence or in pages. Holds no gradients and computes nothing: ``nsa.attention`` and ``nsa.decode``
fill it. Lengths live on the host, so no read waits, and once more on the device, where a captured step counts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import ArgumentError, ReserveError
from .problem import compressed_count

Branch = Literal["compression", "selection", "window"]
BRANCHES: tuple[Branch, ...] = get_args(Branch)


def check_branch(branch: Branch | None) -> None:
    """Raise ArgumentError for what is neither a branch nor None."""
    if branch is not None and branch not in BRANCHES:
        raise ArgumentError(f"unknown branch {branch!r}; expected None or one of {list(BRANCHES)}")


class NSACache:
    """One sequence batch's cache in one layer. Keys (B, G, T, Dk) and values (B, G, T, Dv) by branch.

    ``keys`` (3, slots, G, room, Dk), ``values`` (3, slots, G, room, Dv), ``compressed_keys`` and ``compressed_values``
    (slots, G, room / kernel_stride, D) are the storage; a slot is a batch entry, or with ``page_size`` a page, found by
    ``table`` (B, pages) int32: token t of entry b is in slot table[b, t // page_size] at t % page_size, and compressed
    token i where raw token i * kernel_stride is. ``lengths`` (B,) int32: the tokens of each entry, on the device.
    ``generation`` counts replacements of the storage: whoever holds addresses compares it. Raises ArgumentError for a
    page_size that is no multiple of kernel_stride.
    """

    def __init__(
        self,
        batch: int,
        groups: int,
        key_width: int,
        value_width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernel_size: int,
        kernel_stride: int,
        capacity: int = 0,
        page_size: int = 0,
    ) -> None:
        if page_size % kernel_stride or page_size < 0:
            raise ArgumentError(f"page_size is {page_size}, expected a multiple of kernel_stride {kernel_stride}, or 0")
        self.batch, self.groups, self.page_size = batch, groups, page_size
        self.kernel_size, self.kernel_stride = kernel_size, kernel_stride
        self.length = 0
        self.compressed_length = 0
        self.growths = 0
        self.generation = 0
        self.plan: object = None
        """What a fused decode step keeps for this cache; set by ``nsa.decode``."""
        self._behind: tuple[int, ...] | None = None
        self._widths = (key_width, value_width)
        self._capacity = 0
        with torch.inference_mode(False):  # a cache outlives the mode it was made in
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            slots, room = (0, page_size) if page_size else (batch, capacity)
            self.table = torch.zeros(batch, 0, dtype=torch.int32, device=device)
            self.keys, self.values, self.compressed_keys, self.compressed_values = self._make(slots, room, dtype)
        if page_size:
            self._reserve_pages(-(-capacity // page_size))
        else:
            self._capacity = capacity

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes over: all but the plan, whose launches hold addresses of this very cache's storage."""
        return self.__dict__ | {"plan": None}

    @property
    def capacity(self) -> int:
        """Raw tokens that fit before the next growth."""
        return self._capacity

    @property
    def reach(self) -> int:
        """Raw tokens up to which ``table`` and storage stay where they are; of pages, if the pool has enough."""
        return self.table.shape[1] * self.page_size if self.page_size else self._capacity

    @property
    def bytes(self) -> int:
        """Bytes of all storage, unwritten room included."""
        return sum(tensor.nbytes for tensor in self._storage())

    @property
    def ragged(self) -> bool:
        """Whether the batch entries have different lengths; ``length`` is then that of the longest."""
        return self._behind is not None

    def key(self, branch: Branch) -> Tensor:
        """Raw keys of a branch, (B, G, T, Dk), valid until the next append: a view, of pages a copy."""
        return self._tokens(self.keys[BRANCHES.index(branch)], self.length, self.page_size)

    def value(self, branch: Branch) -> Tensor:
        """Raw values of a branch, (B, G, T, Dv), valid until the next append: a view, of pages a copy."""
        return self._tokens(self.values[BRANCHES.index(branch)], self.length, self.page_size)

    @property
    def compressed_key(self) -> Tensor:
        """Compressed keys (B, G, N, Dk), valid until the next append: a view, of pages a copy."""
        return self._tokens(self.compressed_keys, self.compressed_length, self.page_size // self.kernel_stride)

    @property
    def compressed_value(self) -> Tensor:
        """Compressed values (B, G, N, Dv), valid until the next append: a view, of pages a copy."""
        return self._tokens(self.compressed_values, self.compressed_length, self.page_size // self.kernel_stride)

    def append(self, keys: Mapping[Branch, Tensor], values: Mapping[Branch, Tensor]) -> None:
        """Append raw keys (B, G, s, Dk) and values (B, G, s, Dv) of every branch.

        Raises ArgumentError for tokens of another layer or batch, and where entries have different lengths.
        """
        added = keys[BRANCHES[0]].shape[2]
        if self.ragged:
            raise ArgumentError("batch entries of different lengths take tokens by the decode route 'fused' only")
        for branch in BRANCHES:
            self._check(keys[branch], added, self.keys)
            self._check(values[branch], added, self.values)
        self.reserve(self.length + added)
        for index, branch in enumerate(BRANCHES):
            self._write(self.keys[index], keys[branch], self.length, self.page_size)
            self._write(self.values[index], values[branch], self.length, self.page_size)
        self._set_length(self.length + added)

    def append_compressed(self, key: Tensor, value: Tensor) -> None:
        """Append compressed keys (B, G, n, Dk) and values (B, G, n, Dv), n may be 0. Raises ArgumentError."""
        self._check(key, key.shape[2], self.compressed_keys)
        self._check(value, key.shape[2], self.compressed_values)
        page = self.page_size // self.kernel_stride
        self.reserve((self.compressed_length + key.shape[2]) * self.kernel_stride)
        self._write(self.compressed_keys, key, self.compressed_length, page)
        self._write(self.compressed_values, value, self.compressed_length, page)
        self.compressed_length += key.shape[2]

    def reserve(self, tokens: int) -> None:
        """Have room for ``tokens``. Capacity doubles, or grows to the need if that is more; pages are added one by one,
        and their pool doubles. Raises ReserveError while a CUDA graph is captured."""
        if tokens <= self._capacity:
            return
        if self.lengths.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ReserveError(
                f"the cache has room for {self._capacity} tokens and would have to grow to {tokens} while a CUDA graph "
                "is captured; reserve before"
            )
        if self.page_size:
            self._reserve_pages(-(-tokens // self.page_size))
            return
        room = max(tokens, 2 * self._capacity)
        self._move(self.batch, room)
        self._capacity = room

    def advance(self, steps: int = 1) -> None:
        """Count decode steps that ran on the device, by replay or by launch. Raises ReserveError beyond capacity."""
        if self.length + steps > self._capacity:
            raise ReserveError(
                f"{self.length} tokens and {steps} more do not fit a capacity of {self._capacity}; reserve before"
            )
        self.length += steps
        self.compressed_length = self._count(self.length)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length`` of each entry, and the compressed ones of what is forgotten."""
        compressed = min(self.compressed_length, self._count(length))
        if self._behind:
            self.trim([min(self.length - missing, length) for missing in self._behind])
        else:
            self._set_length(min(self.length, length))
        self.compressed_length = min(self.compressed_length, compressed)

    def trim(self, lengths: Sequence[int]) -> None:
        """Keep the first ``lengths[b]`` tokens of each entry: a prefill of padded prompts, cut to the prompts.

        Raises ArgumentError unless there is one length from 0 to the entry's own for each of the B entries.
        """
        held = [self.length - missing for missing in self._behind or (0,) * self.batch]
        if len(lengths) != self.batch or any(not 0 <= new <= old for new, old in zip(lengths, held, strict=True)):
            raise ArgumentError(f"cannot trim entries of {held} tokens to {list(lengths)}")
        self.length = max(lengths)
        self.compressed_length = self._count(self.length)
        self._behind = tuple(self.length - new for new in lengths) if len(set(lengths)) > 1 else None
        for entry, length in enumerate(lengths):
            self.lengths[entry : entry + 1].fill_(length)

    def poison(self) -> None:
        """Fill all unwritten room with NaN: what reads beyond the written tokens then shows."""
        for storage, stride in zip(self._storage(), (1, 1, self.kernel_stride, self.kernel_stride), strict=True):
            tensor = storage if storage.dim() == 5 else storage[None]
            written = torch.zeros(tensor.shape[1], tensor.shape[3], dtype=torch.bool, device=tensor.device)
            for entry, missing in enumerate(self._behind or (0,) * self.batch):
                length = self.length - missing
                token = torch.arange(length if stride == 1 else self._count(length), device=tensor.device)
                page = self.page_size // stride
                written[self.table[entry, token // page].long() if page else entry, token % page if page else token] = (
                    True
                )
            tensor.masked_fill_(~written[None, :, None, :, None], float("nan"))

    def _count(self, tokens: int) -> int:
        return compressed_count(tokens, self.kernel_size, self.kernel_stride)

    def _storage(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.compressed_keys, self.compressed_values

    def _set_length(self, length: int) -> None:
        self.length, self._behind = length, None
        self.lengths.fill_(length)

    def _make(self, slots: int, room: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raw, few = (3, slots, self.groups, room), (slots, self.groups, room // self.kernel_stride)
        key, value = self._widths
        shapes = ((*raw, key), (*raw, value), (*few, key), (*few, value))
        one, two, three, four = (torch.empty(shape, dtype=dtype, device=self.lengths.device) for shape in shapes)
        return one, two, three, four

    def _move(self, slots: int, room: int) -> None:
        """Replace the storage by a larger one with the same contents."""
        with torch.inference_mode(False):
            grown = self._make(slots, room, self.keys.dtype)
        for new, old in zip(grown, self._storage(), strict=True):
            tail = (slice(old.shape[-4]), slice(None), slice(old.shape[-2]))
            new[(..., *tail, slice(None))] = old
        self.keys, self.values, self.compressed_keys, self.compressed_values = grown
        self.growths += 1
        self.generation += 1

    def _reserve_pages(self, pages: int) -> None:
        """Give every entry ``pages`` pages. Page j of entry b is slot j * B + b unless the caller rewrote the table."""
        held, wide = self._capacity // self.page_size, self.table.shape[1]
        if pages > wide:
            with torch.inference_mode(False):
                table = self.table.new_zeros(self.batch, max(pages, 2 * wide))
            table[:, :wide] = self.table
            self.table = table
            self.generation += 1
        if pages * self.batch > self.keys.shape[1]:
            self._move(max(pages * self.batch, 2 * self.keys.shape[1]), self.page_size)
        fresh = torch.arange(held * self.batch, pages * self.batch, dtype=torch.int32, device=self.table.device)
        self.table[:, held:pages] = fresh.view(-1, self.batch).T
        self._capacity = pages * self.page_size

    def _tokens(self, storage: Tensor, length: int, page: int) -> Tensor:
        if not page:
            return storage[:, :, :length]
        pages = storage[self.table[:, : -(-length // page)].long()]
        return pages.transpose(1, 2).flatten(2, 3)[:, :, :length]

    def _write(self, storage: Tensor, tokens: Tensor, first: int, page: int) -> None:
        tokens = tokens.detach()
        if not page:
            storage[:, :, first : first + tokens.shape[2]] = tokens
            return
        token = torch.arange(first, first + tokens.shape[2], device=storage.device)
        storage.transpose(1, 2)[self.table[:, token // page].long(), token % page] = tokens.transpose(1, 2)

    def _check(self, tokens: Tensor, added: int, storage: Tensor) -> None:
        expected = (self.batch, self.groups, added, storage.shape[-1])
        if tuple(tokens.shape) != expected or tokens.dtype != storage.dtype or tokens.device != storage.device:
            raise ArgumentError(
                f"cannot append {tuple(tokens.shape)} {tokens.dtype} on {tokens.device} to a cache of {expected} "
                f"{storage.dtype} on {storage.device}; use the cache with the layer and batch it was made for"
            )
