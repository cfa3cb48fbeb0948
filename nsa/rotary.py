"""Leaf. Rotary position encoding: one frequency table for queries and for the raw keys of all branches and heads.

Pairs are (i, i + width/2), as in GPT-NeoX and Llama. Angles are taken in float64: in float32 that of position 2**20
is off by up to 0.06 radians.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """(width / 2,) float64: base ** (-2 i / width), the angle per position of pair i."""
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    return torch.pow(base, -exponent)


def rotation(first: int, tokens: int, width: int, base: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines and sines of positions first .. first + tokens - 1: (2, tokens, width / 2), float32 or wider."""
    positions = torch.arange(first, first + tokens, dtype=torch.float64, device=device)
    angles = positions[:, None] * frequencies(width, base, device)
    return torch.stack((angles.cos(), angles.sin())).to(torch.promote_types(dtype, torch.float32))


def rotate(tensor: Tensor, turn: Tensor) -> Tensor:
    """``tensor`` (B, S, ..., width) turned by ``turn`` (2, S, width / 2); the dtype stays."""
    shape = (1, turn.shape[1], *(1,) * (tensor.dim() - 3), turn.shape[2])
    cosine, sine = turn[0].view(shape), turn[1].view(shape)
    low, high = tensor.chunk(2, -1)
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1).to(tensor.dtype)
