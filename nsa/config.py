"""NSAConfig: the sizes of a layer, checked when they are put together."""

from __future__ import annotations

import msgspec

from .compression import Compression
from .errors import ArgumentError
from .scoring import check_block_sizes


class NSAConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of a layer. Raises ArgumentError for sizes that do not go together.

    ``dim`` of the token; ``num_heads`` = G * h query heads, ``num_kv_heads`` = G; ``head_dim`` Dk, even for rotary;
    ``value_head_dim`` Dv, None = Dk. ``compression``: ``mean``, or ``mlp``, which learns. ``rotary_base``: angle base.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int | None = None
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 16
    window_size: int = 512
    compression: Compression = "mean"
    rotary_base: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "num_kv_heads", "head_dim", "window_size", "value_width"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ArgumentError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ArgumentError(f"head_dim {self.head_dim} is odd; rotary turns pairs, so it must be even")
        if self.compression not in ("mean", "mlp"):
            raise ArgumentError(f"compression is {self.compression!r}, expected 'mean' or 'mlp'")
        if not self.rotary_base > 0:
            raise ArgumentError(f"rotary_base is {self.rotary_base}, expected more than 0")
        check_block_sizes(self.kernel_size, self.kernel_stride, self.block_size, self.topk)

    @property
    def value_width(self) -> int:
        """Dv."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def heads_per_group(self) -> int:
        """h."""
        return self.num_heads // self.num_kv_heads
