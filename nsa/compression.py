"""The compression branch: raw keys or values to compressed ones, and attention over those.

Compressed token i stands for raw tokens [i*d, i*d + l) and exists once all of them do (paper eq. 7), so a compressor
given the raw tokens from i*d on yields exactly the tokens from i on. Which blocks the scores choose is ``nsa.scoring``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dispatch import selection_attention
from .dispatch_table import DispatchTable
from .kernels.support import Route, by_triton
from .opaque import opaque
from .planning import Strict
from .problem import compressed_count
from .selection import LogSums, Selection
from .trace import ParameterValue, announce, executed
from .workspace import Workspace

Compression = Literal["mean", "mlp"]
FLASH_ATTENTION = "flash_attn_compressed"


class MeanCompressor(nn.Module):
    """Mean of each block of ``kernel_size`` raw tokens. Accumulated in float32 or wider."""

    def __init__(self, kernel_size: int, kernel_stride: int) -> None:
        super().__init__()
        self.kernel_size, self.kernel_stride = kernel_size, kernel_stride

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, G, T, D) -> (B, G, N, D), N = compressed_count(T). On a GPU one kernel each way."""
        return mean_of_blocks(tokens, self.kernel_size, self.kernel_stride)


@partial(opaque, when=lambda tokens, *_, **__: tokens.is_cuda)
def mean_of_blocks(tokens: Tensor, kernel_size: int, kernel_stride: int, *, route: Route = "auto") -> Tensor:
    """``MeanCompressor``'s forward. ``route``: auto = triton on a GPU that has it."""
    if by_triton(route, tokens):
        from .kernels.compress import MeanFunction  # Triton, loaded when first run

        tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
        return cast(Tensor, MeanFunction.apply(tokens, kernel_size, kernel_stride))  # type: ignore[no-untyped-call]
    count = compressed_count(tokens.shape[2], kernel_size, kernel_stride)
    parts = kernel_size // kernel_stride
    strides = count + parts - 1 if count else 0
    pieces = torch.unflatten(tokens[:, :, : strides * kernel_stride], 2, (strides, kernel_stride))
    wide = torch.promote_types(tokens.dtype, torch.float32)
    sums = pieces.sum(3, dtype=wide)
    total = sums[:, :, :count]
    for part in range(1, parts):
        total = total + sums[:, :, part : part + count]
    return (total / kernel_size).to(tokens.dtype)


class MLPCompressor(nn.Module):
    """Learnable: each block's tokens plus their in-block position encodings, flattened, through one hidden layer.

    Shared between groups. ``position`` (kernel_size, D); ``hidden`` kernel_size * D -> 2 D; ``output`` 2 D -> D,
    without bias: one added to every key would change no softmax.
    """

    def __init__(
        self,
        kernel_size: int,
        kernel_stride: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.kernel_stride = kernel_size, kernel_stride
        self.position = nn.Parameter(torch.empty(kernel_size, width, device=device, dtype=dtype))
        self.hidden = nn.Linear(kernel_size * width, 2 * width, device=device, dtype=dtype)
        self.output = nn.Linear(2 * width, width, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Position encodings start small; the layers start as nn.Linear does."""
        nn.init.normal_(self.position, std=0.02)
        self.hidden.reset_parameters()
        self.output.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, G, T, D) -> (B, G, N, D), N = compressed_count(T)."""
        batch, groups, length, width = tokens.shape
        if length < self.kernel_size:
            return tokens.new_zeros(batch, groups, 0, width)
        blocks = tokens.unfold(2, self.kernel_size, self.kernel_stride).transpose(-1, -2) + self.position
        return cast(Tensor, self.output(F.silu(self.hidden(blocks.flatten(3)))))


def compressed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first_position: int,
    kernel_size: int,
    kernel_stride: int,
    scale: float | None = None,
    flash_attention: bool | None = None,
    path: str = "auto",
    parameters: Mapping[str, ParameterValue] | None = None,
    workspace: Workspace | None = None,
    strict: Strict = False,
    table: DispatchTable | None = None,
    sums: LogSums | None = None,
) -> Tensor:
    """Attention of the query at position t over compressed tokens i with i*d + l <= t + 1; zeros where there is none.

    query (B, S, G, h, Dk) at positions ``first_position`` ..; compressed key (B, G, N, Dk), value (B, G, N, Dv), N at
    least what exists -> (B, S, G, h, Dv). ``flash_attention``: True takes it wherever it can run, False never, None
    leaves it to dispatch. ``sums``: filled where the path has log-sum-exps to leave. The other arguments and errors are
    those of ``selection_attention``.
    """
    batch, queries, groups, heads, _ = query.shape
    if not compressed_count(first_position + queries, kernel_size, kernel_stride):
        announce("default", "no compressed token exists yet")
        executed("compression", "zeros", {})
        return value.new_zeros(batch, queries, groups, heads, value.shape[-1])
    selection = Selection.compressed(
        kernel_size,
        kernel_stride,
        rows=(batch, queries, groups),
        first_position=first_position,
        device=query.device,
        sums=sums,
    )
    return selection_attention(
        query,
        key,
        value,
        selection,
        path=path,
        parameters=parameters,
        scale=scale,
        workspace=workspace,
        strict=strict,
        table=table,
        prefer=FLASH_ATTENTION if flash_attention else "",
        avoid=FLASH_ATTENTION if flash_attention is False else "",
    )
