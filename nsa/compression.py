"""The compression branch: raw keys or values to compressed ones, and attention over those.

Compressed token i stands for raw tokens [i*d, i*d + l) and exists once all of them do (paper eq. 7), so a compressor
given the raw tokens from i*d on yields exactly the tokens from i on. Which blocks the scores choose is ``nsa.scoring``.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .window import flash_attn_attention, flash_attn_reason, report, shared_attention

Compression = Literal["mean", "mlp"]


def compressed_count(tokens: int, kernel_size: int, kernel_stride: int) -> int:
    """Compressed tokens that exist for a context of so many raw tokens."""
    return max(0, (tokens - kernel_size) // kernel_stride + 1)


class MeanCompressor(nn.Module):
    """Mean of each block of ``kernel_size`` raw tokens. Accumulated in float32 or wider."""

    def __init__(self, kernel_size: int, kernel_stride: int) -> None:
        super().__init__()
        self.kernel_size, self.kernel_stride = kernel_size, kernel_stride

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, G, T, D) -> (B, G, N, D), N = compressed_count(T). Each raw token is read once."""
        count = compressed_count(tokens.shape[2], self.kernel_size, self.kernel_stride)
        parts = self.kernel_size // self.kernel_stride
        strides = count + parts - 1 if count else 0
        pieces = torch.unflatten(tokens[:, :, : strides * self.kernel_stride], 2, (strides, self.kernel_stride))
        wide = torch.promote_types(tokens.dtype, torch.float32)
        sums = pieces.sum(3, dtype=wide)
        total = sums[:, :, :count]
        for part in range(1, parts):
            total = total + sums[:, :, part : part + count]
        return (total / self.kernel_size).to(tokens.dtype)


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
    flash_attention: bool = True,
) -> Tensor:
    """Attention of the query at position t over compressed tokens i with i*d + l <= t + 1; zeros where there is none.

    query (B, S, G, h, Dk) at positions ``first_position`` ..; compressed key (B, G, N, Dk), value (B, G, N, Dv) ->
    (B, S, G, h, Dv). The d queries from i*d + l - 1 on read the same tokens 0 .. i, so they are folded into the heads
    of one query i: plain causal attention of S/d queries, whose memory is linear in S on every route.
    """
    batch, queries, groups, heads, _ = query.shape
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = compressed_count(first_position + queries, kernel_size, kernel_stride)
    if not tokens:
        report("compression", "zeros", {"tokens": 0}, "no compressed token exists yet")
        return value.new_zeros(batch, queries, groups, heads, value.shape[-1])
    empty = max(0, kernel_size - 1 - first_position)
    first, front = divmod(first_position + empty + 1 - kernel_size, kernel_stride)
    steps = tokens - first
    reason = flash_attn_reason(query, value, flash_attention)
    attend = partial(_attend, key=key[:, :, :tokens], value=value[:, :, :tokens], scale=scale, flash=reason is None)
    if steps == 1:
        out = attend(query[:, empty:].transpose(1, 2).flatten(2, 3)[:, :, None], causal=False)
        out = torch.unflatten(out[:, :, 0], 2, (-1, heads)).transpose(1, 2)
    else:
        back = steps * kernel_stride - front - (queries - empty)
        padded = F.pad(query[:, empty:], (0, 0, 0, 0, 0, 0, front, back))
        out = _unfold(attend(_fold(padded, kernel_stride), causal=True), kernel_stride)
        out = out[:, front : front + queries - empty]
    route = "sdpa" if reason else "flash_attn"
    report("compression", route, {"tokens": tokens}, reason or "allowed and able to run")
    return F.pad(out, (0, 0, 0, 0, 0, 0, empty, 0)) if empty else out


def _fold(query: Tensor, stride: int) -> Tensor:
    """(B, n * stride, G, h, D) -> (B, G, h * stride, n, D): the queries of a stride become heads of one query."""
    return torch.unflatten(query, 1, (-1, stride)).permute(0, 3, 4, 2, 1, 5).flatten(2, 3)


def _unfold(out: Tensor, stride: int) -> Tensor:
    """The inverse of ``_fold``."""
    return torch.unflatten(out, 2, (-1, stride)).permute(0, 4, 3, 1, 2, 5).flatten(1, 2)


def _attend(query: Tensor, *, key: Tensor, value: Tensor, scale: float, causal: bool, flash: bool) -> Tensor:
    """query (B, G, heads, n, Dk) -> (B, G, heads, n, Dv). Causal: query j reads keys 0 .. N - n + j, else all N."""
    count, keys = query.shape[3], key.shape[2]
    if flash:
        out = flash_attn_attention(query.permute(0, 3, 1, 2, 4), key, value, scale, causal=causal)
        return out.permute(0, 2, 3, 1, 4)
    if causal and count < keys:
        mask = torch.ones(count, keys, dtype=torch.bool, device=query.device).tril(keys - count)
        return shared_attention(query, key, value, scale, mask=mask)
    return shared_attention(query, key, value, scale, causal=causal)
