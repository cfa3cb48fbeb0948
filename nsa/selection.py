"""Leaf. Selection: which keys each row reads, given as blocks, as ranges, or as a window or compression in integers.

A row is one (b, s, g). It sees the keys below its *limit*, min(context length, query position + 1). Nothing derived is
kept: under CUDA-graph replay the indices change in place and a kept form would be stale.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .errors import ArgumentError, UnsupportedSelection
from .problem import Operation, compressed_count
from .ranges import blocks_of, blocks_to_ranges_v2, clamped, disjoint, mean_overlap


class Structure(NamedTuple):
    """What the window and the compressed branch read, in host integers: one range per row that follows from them.

    ``rows``: (B, S, G). ``first_position``: of the first query, in raw tokens; the queries follow one another.
    """

    operation: Operation
    rows: tuple[int, int, int]
    first_position: int
    device: torch.device
    window: int = 0
    kernel_size: int = 0
    kernel_stride: int = 0

    @property
    def context(self) -> int:
        """Raw tokens up to the last query."""
        return self.first_position + self.rows[1]

    @property
    def keys(self) -> int:
        """Keys that are read from: the raw tokens, or the compressed ones that exist."""
        size, stride = self.kernel_size, self.kernel_stride
        return compressed_count(self.context, size, stride) if stride else self.context


@dataclass(slots=True, eq=False)
class LogSums:
    """Where a path of the compressed branch may leave what scoring can use: ``tensor``, the log-sum-exp of each row and
    head, (B, S, G, h) float32, base 2, +inf where no token exists, without a gradient. None = nothing was left."""

    tensor: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Make it with ``from_blocks``, ``from_ranges``, ``window`` or ``compressed``; fields are what the caller passed.

    ``indices``: (B, S, G, n) block indices, -1 = none, or (B, S, G, n, 2) half-open ranges.
    ``block_size``: keys per block, 0 for ranges. ``context_length``: int or (B,), keys that exist.
    ``query_positions``: (S,) or (B, S); None = the last S positions of the context.
    ``overlap_hint``: what the caller knows of ``overlap()``; part of the dispatch problem.
    ``complete``: the caller's word that each row selects min(topk, eligible) different blocks, eligible being those
    that start at or before the row's position, as ``choose_blocks`` does; part of the dispatch problem too.
    """

    indices: Tensor
    block_size: int
    context_length: int | Tensor
    query_positions: Tensor | None = None
    overlap_hint: Literal["low", "high"] = "high"
    complete: bool = False

    @classmethod
    def from_blocks(
        cls,
        block_indices: Tensor,
        *,
        block_size: int,
        context_length: int | Tensor,
        query_positions: Tensor | None = None,
        overlap: Literal["low", "high"] = "high",
        complete: bool = False,
    ) -> Selection:
        """From block indices (B, S, G, n), int32 or int64, in any order, -1 = none, duplicates counting once."""
        if block_indices.dim() != 4:
            raise ArgumentError(f"block_indices must be (B, S, G, n), got shape {tuple(block_indices.shape)}")
        if block_size < 1:
            raise ArgumentError(f"block_size must be at least 1, got {block_size}")
        return cls._checked(block_indices, block_size, context_length, query_positions, overlap, complete)

    @classmethod
    def from_ranges(
        cls,
        ranges: Tensor,
        *,
        context_length: int | Tensor,
        query_positions: Tensor | None = None,
        overlap: Literal["low", "high"] = "high",
    ) -> Selection:
        """From half-open key ranges (B, S, G, n, 2), int32 or int64; ``end <= start`` selects nothing."""
        if ranges.dim() != 5 or ranges.shape[-1] != 2:
            raise ArgumentError(f"ranges must be (B, S, G, n, 2), got shape {tuple(ranges.shape)}")
        return cls._checked(ranges, 0, context_length, query_positions, overlap)

    @classmethod
    def _checked(
        cls,
        indices: Tensor,
        block_size: int,
        context_length: int | Tensor,
        query_positions: Tensor | None,
        overlap: Literal["low", "high"],
        complete: bool = False,
    ) -> Selection:
        batch, queries = indices.shape[:2]
        if overlap not in ("low", "high"):
            raise ArgumentError(f"overlap is {overlap!r}, expected 'low' or 'high'")
        _check_integers("indices", indices)
        if min(indices.shape) < 1:
            raise ArgumentError(f"a selection needs at least one row and one slot, got shape {tuple(indices.shape)}")
        if isinstance(context_length, Tensor):
            _check_integers("context_length", context_length)
            if context_length.shape != (batch,):
                raise ArgumentError(f"context_length must be (B,) = ({batch},), got {tuple(context_length.shape)}")
            _check_device("context_length", context_length, indices)
            context_length = context_length.contiguous()  # kernels read one after the other
        elif context_length < 1:
            raise ArgumentError(f"context_length must be at least 1, got {context_length}")
        if query_positions is not None:
            _check_integers("query_positions", query_positions)
            if tuple(query_positions.shape) not in ((queries,), (batch, queries)):
                raise ArgumentError(
                    f"query_positions must be (S,) = ({queries},) or (B, S) = ({batch}, {queries}), "
                    f"got {tuple(query_positions.shape)}"
                )
            _check_device("query_positions", query_positions, indices)
        elif not isinstance(context_length, Tensor) and context_length < queries:
            raise ArgumentError(
                f"{queries} queries cannot be the last of a context of {context_length} keys; pass query_positions"
            )
        return cls(indices, block_size, context_length, query_positions, overlap, complete)

    @staticmethod
    def window(size: int, *, rows: tuple[int, int, int], context_length: int, device: torch.device) -> Selection:
        """Each query reads its own key and the ``size`` - 1 before; ``rows`` (B, S, G), the last S of the context."""
        if size < 1:
            raise ArgumentError(f"window is {size}, expected at least 1")
        if not rows[1] <= context_length:
            raise ArgumentError(f"{rows[1]} queries cannot be the last of a context of {context_length} keys")
        return StructuredSelection(Structure("window", rows, context_length - rows[1], _placed(device), window=size))

    @staticmethod
    def compressed(
        kernel_size: int,
        kernel_stride: int,
        *,
        rows: tuple[int, int, int],
        first_position: int,
        device: torch.device,
        sums: LogSums | None = None,
    ) -> Selection:
        """The query at raw position t reads the compressed tokens i with i * kernel_stride + kernel_size <= t + 1.

        ``rows`` (B, S, G) at positions ``first_position`` ..; paths may fill ``sums``. Raises ArgumentError where no
        compressed token exists.
        """
        structure = Structure(
            "compression", rows, first_position, _placed(device), kernel_size=kernel_size, kernel_stride=kernel_stride
        )
        if kernel_stride < 1 or kernel_size < 1 or kernel_size % kernel_stride:
            raise ArgumentError(f"kernel_size {kernel_size} is no positive multiple of kernel_stride {kernel_stride}")
        if first_position < 0 or structure.keys < 1:
            raise ArgumentError(f"no compressed token exists for positions {first_position} .. {structure.context - 1}")
        return StructuredSelection(structure, sums)

    @property
    def structure(self) -> Structure | None:
        """The integers of a window or compressed selection, else None."""
        return None

    @property
    def sums(self) -> LogSums | None:
        """Where log-sum-exps are wanted, if they are."""
        return None

    @property
    def operation(self) -> Operation:
        """``window`` or ``compression`` where it was made so."""
        return "selection" if self.structure is None else self.structure.operation

    def structured(self, operation: Operation) -> Structure:
        """The structure of that operation. Raises UnsupportedSelection for any other selection."""
        if self.structure is None or self.structure.operation != operation:
            raise UnsupportedSelection(f"no selection of {operation}; make it with Selection.window or .compressed")
        return self.structure

    @property
    def rows(self) -> tuple[int, ...]:
        """(B, S, G)."""
        return tuple(self.indices.shape[:3])

    @property
    def device(self) -> torch.device:
        """Of what the caller passed."""
        return self.indices.device

    @property
    def signature(self) -> tuple[Any, ...]:
        """All that dispatch distinguishes selections by."""
        return self.indices.shape, self.block_size, self.overlap_hint, self.complete, self.indices.device

    @property
    def layout(self) -> tuple[Any, ...]:
        """All that decides how kernels read its tensors: dtypes, strides and alignment."""
        indices, length, positions = self.indices, self.context_length, self.query_positions
        return (
            *(indices.dtype, indices.stride(), indices.data_ptr() & 15),
            (length.dtype, length.data_ptr() & 15) if isinstance(length, Tensor) else length > 2**31 - 1,
            None if positions is None else (positions.dtype, positions.stride(), positions.data_ptr() & 15),
        )

    def call_layout(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
        """``layout`` of a whole call: strides and alignment of each tensor apart, then the selection's own."""
        return (
            query.stride(), key.stride(), value.stride(),
            query.data_ptr() & 15, key.data_ptr() & 15, value.data_ptr() & 15, *self.layout,
        )  # fmt: skip

    @property
    def problem_fields(self) -> dict[str, Any]:
        """What a dispatch problem takes from a selection."""
        indices = {"block_size": self.block_size, "topk": self.indices.shape[3], "form": self.form}
        return {**indices, "overlap": self.overlap_hint, "complete": self.complete}

    @property
    def form(self) -> Literal["blocks", "ranges"]:
        """Which of the two forms the caller gave."""
        return "blocks" if self.block_size else "ranges"

    @property
    def blocks(self) -> Tensor:
        """Block indices (B, S, G, n). Raises UnsupportedSelection for a selection made from ranges."""
        if not self.block_size:
            raise UnsupportedSelection(
                "this selection was made from ranges and has no blocks; use .ranges, or make it with from_blocks"
            )
        return self.indices

    @property
    def positions(self) -> Tensor:
        """Query positions (B, S), int64."""
        batch, queries = self.indices.shape[:2]
        device = self.indices.device
        if self.query_positions is not None:
            return self.query_positions.to(torch.int64).expand(batch, queries)
        steps = torch.arange(queries, device=device)
        if isinstance(self.context_length, Tensor):
            return self.context_length.to(torch.int64)[:, None] - queries + steps
        return (self.context_length - queries + steps).expand(batch, queries)

    @property
    def limits(self) -> Tensor:
        """Keys each query may see, (B, S) int64: min(context length, position + 1), at least 0."""
        limit = self.positions + 1
        if isinstance(self.context_length, Tensor):
            return torch.minimum(limit, self.context_length.to(torch.int64)[:, None]).clamp_min(0)
        return limit.clamp(0, self.context_length)

    @property
    def ranges(self) -> Tensor:
        """Half-open ranges (B, S, G, n, 2) int64 clamped to the limits; those that select nothing are (0, 0).

        Order, duplicates and overlaps are the caller's; see ``disjoint_ranges``.
        """
        if self.block_size:
            return blocks_to_ranges_v2(self.indices, self.block_size, self.limits)
        return clamped(self.indices, self.limits)

    @property
    def disjoint_ranges(self) -> Tensor:
        """``ranges`` sorted by start and cut so that no key is in two of them, (B, S, G, n, 2) int64."""
        return disjoint(self.ranges)

    @property
    def lengths(self) -> Tensor:
        """Distinct keys of each row after clamping, (B, S, G) int64."""
        start, end = self.disjoint_ranges.unbind(-1)
        return (end - start).sum(-1)

    def overlap(self) -> float:
        """Mean over windows of 4 neighbouring rows of (distinct blocks in the union) / (blocks chosen, 4*topk).

        1/4 where neighbours agree fully, 1 where they share nothing. Synchronises with the host: ask for it in a
        calibration call, never in the hot path. Ranges count by their first key's 64-key block.
        Raises ArgumentError for fewer than 4 queries.
        """
        return mean_overlap(self.indices if self.block_size else blocks_of(self.indices))


_LEFT_OUT = tuple(
    field for field in fields(Selection) if field.default is not MISSING and field.name != "query_positions"
)
"""What a window or compressed selection leaves at its default."""


class StructuredSelection(Selection):
    """A window or compressed selection: ``indices``, one range per row, are derived each time somebody asks."""

    __slots__ = ("_structure", "_sums")
    _structure: Structure
    _sums: LogSums | None

    def __init__(self, structure: Structure, sums: LogSums | None = None) -> None:
        for name, value in (
            *(("_structure", structure), ("_sums", sums), ("block_size", 0)),
            ("context_length", structure.keys),
        ):
            object.__setattr__(self, name, value)
        for field in _LEFT_OUT:
            object.__setattr__(self, field.name, field.default)

    @property
    def structure(self) -> Structure:
        """Its integers."""
        return self._structure

    @property
    def sums(self) -> LogSums | None:
        """Where log-sum-exps are wanted, if they are."""
        return self._sums

    @property
    def indices(self) -> Tensor:
        """Ranges (B, S, G, 1, 2), int64."""
        given = self._structure
        if given.operation == "window":
            end = self._steps() + 1
            start = (end - given.window).clamp_min(0)
        else:
            end = self.query_positions + 1
            start = torch.zeros_like(end)
        batch, queries, groups = given.rows
        return torch.stack((start, end), -1)[None, :, None, None].expand(batch, queries, groups, 1, 2)

    @property
    def query_positions(self) -> Tensor:
        """Of each query among the keys, (S,) int64; of a compressed selection the last token that exists, or -1."""
        given, steps = self._structure, self._steps()
        if given.operation == "window":
            return steps
        exist = torch.div(steps + 1 - given.kernel_size, given.kernel_stride, rounding_mode="floor") + 1
        return exist.clamp_min(0) - 1

    def _steps(self) -> Tensor:
        given = self._structure
        return torch.arange(given.first_position, given.context, device=given.device)

    @property
    def rows(self) -> tuple[int, ...]:
        """(B, S, G)."""
        return self._structure.rows

    @property
    def device(self) -> torch.device:
        """Of the tensors that are derived."""
        return self._structure.device

    @property
    def signature(self) -> tuple[Any, ...]:
        """All that dispatch distinguishes selections by."""
        return self._structure

    @property
    def layout(self) -> tuple[Any, ...]:
        """Nothing: tensors are derived."""
        return ()

    @property
    def problem_fields(self) -> dict[str, Any]:
        """What a dispatch problem takes from a selection; T is counted in raw tokens."""
        given = self._structure
        fixed = {"block_size": 0, "topk": 1, "form": "ranges", "overlap": "high", "T": given.context}
        sizes = {"window": given.window, "kernel_size": given.kernel_size, "kernel_stride": given.kernel_stride}
        return {**fixed, **sizes, "operation": given.operation}


def _placed(device: torch.device) -> torch.device:
    """With its index, as tensors name it: ``cuda`` is the current one."""
    bare = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if bare else device


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"{name} must be int32 or int64, got {tensor.dtype}; convert it with .to(torch.int32)")


def _check_device(name: str, tensor: Tensor, indices: Tensor) -> None:
    if tensor.device != indices.device:
        raise ArgumentError(f"{name} is on {tensor.device}, the selection on {indices.device}; move one of them")
