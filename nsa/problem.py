"""Leaf. SelectionProblem: what identifies a launch of one of the three operations, and the table of symbols.

    B   batch                                       Dk, Dv      head dims of key and value
    S   query tokens of this call (1 in decode)     block_size  selection block l'
    T   context: key/value tokens                   topk        blocks (or ranges) per row, n
    G   key/value heads (groups)                    row         one (b, s, g): h query heads, one key set
    h   query heads per group                       R           number of rows, B * S * G

Query (B, S, G, h, Dk); key (B, G, T, Dk); value (B, G, T, Dv); output (B, S, G, h, Dv). Compressed keys and values are
(B, G, N, D): token i stands for the raw keys [i*d, i*d + l), l = kernel_size, d = kernel_stride.
It holds no tensors and says nothing about which path runs it.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import torch

from .errors import ArgumentError

Operation = Literal["selection", "compression", "window"]
Mode = Literal["decode", "prefill", "train"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
Form = Literal["blocks", "ranges"]
Overlap = Literal["low", "high"]
Execution = Literal["eager", "graph"]
CacheState = Literal["hot", "cold"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES: dict[torch.dtype, DType] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def compressed_count(tokens: int, kernel_size: int, kernel_stride: int) -> int:
    """N: compressed tokens that exist for a context of so many raw tokens."""
    return max(0, (tokens - kernel_size) // kernel_stride + 1)


class SelectionProblem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything by which two launches may prefer different paths.

    ``operation``: ``selection`` reads blocks or ranges; ``window`` one range of the last ``window`` keys per row;
    ``compression`` one range of the compressed tokens that exist for the row, of ``T`` raw tokens.
    ``mode``: ``decode`` (S = 1), ``prefill`` (S > 1 without grad; S < T is a later chunk), ``train`` (with grad).
    ``form``: ``ranges`` has ``block_size`` 0 and ``topk`` ranges per row.
    ``complete``: each row is known to select min(topk, eligible) blocks (see ``Selection``).
    ``overlap``: ``high`` where neighbouring rows agree (see ``Selection.overlap``).
    ``execution``: ``graph`` while a CUDA graph is captured. ``cache``: ``cold`` where each launch finds L2 flushed.
    Raises ArgumentError where sizes contradict the mode or the form.
    """

    mode: Mode
    dtype: DType
    B: int
    S: int
    T: int
    G: int
    h: int
    Dk: int
    Dv: int
    block_size: int
    topk: int
    form: Form = "blocks"
    overlap: Overlap = "high"
    execution: Execution = "eager"
    cache: CacheState = "hot"
    operation: Operation = "selection"
    window: int = 0
    kernel_size: int = 0
    kernel_stride: int = 0
    complete: bool = False

    def __post_init__(self) -> None:
        sizes = (self.B, self.S, self.T, self.G, self.h, self.Dk, self.Dv, self.topk)
        if min(sizes) < 1:
            raise ArgumentError(f"problem sizes must be positive, got {self!r}")
        if (self.form == "blocks") != (self.block_size > 0):
            raise ArgumentError(f"block_size {self.block_size} does not go with form {self.form!r}: ranges have 0")
        if self.mode == "decode" and self.S != 1:
            raise ArgumentError(f"decode has one query token, got S={self.S}; use mode 'prefill'")
        self._check_operation()

    def _check_operation(self) -> None:
        sizes = (self.window, self.kernel_size, self.kernel_stride)
        own = (self.operation == "window", self.operation == "compression", self.operation == "compression")
        if min(sizes) < 0 or tuple(size > 0 for size in sizes) != own:
            raise ArgumentError(f"window, kernel_size and kernel_stride {sizes} do not go with {self.operation!r}")
        if self.operation != "selection" and (self.form, self.topk) != ("ranges", 1):
            raise ArgumentError(f"{self.operation!r} reads one range per row, got {self.topk} {self.form}")

    @property
    def dense(self) -> bool:
        """Whether a complete selection of it selects everything: a whole prompt of no more blocks than slots."""
        return self.form == "blocks" and self.mode != "decode" and self.S == self.T <= self.topk * self.block_size

    @property
    def rows(self) -> int:
        """Number of rows (b, s, g)."""
        return self.B * self.S * self.G

    @property
    def row_width(self) -> int:
        """Upper bound of the distinct keys of one row, known without looking at the selection."""
        if self.operation == "window":
            return min(self.T, self.window)
        return min(self.T, self.topk * self.block_size) if self.form == "blocks" else self.keys

    @property
    def keys(self) -> int:
        """Keys that are passed: T, or the compressed tokens of a context of T."""
        return compressed_count(self.T, self.kernel_size, self.kernel_stride) if self.kernel_stride else self.T

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return TORCH_DTYPES[self.dtype].itemsize
