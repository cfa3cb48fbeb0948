"""The fused taking apart of a projection is the operators' within rounding, both ways; interpreted where no GPU is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.interpreter import prepare

INTERPRETED = prepare()

from nsa.config import NSAConfig  # noqa: E402  kernels load Triton, which asks for its mode once
from nsa.projection import Parts, projection_widths, split_projection  # noqa: E402
from nsa.rotary import rotation  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def flat(parts: Parts) -> list[Tensor]:
    query, gates, keys, values = parts
    return [query, gates, *keys.values(), *values.values()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "width", "value_width"), [(4, 2, 16, 16), (6, 2, 12, 20), (3, 3, 2, 1)])
def test_the_fused_split_and_its_gradient_are_exact_within_rounding(
    heads: int, groups: int, width: int, value_width: int, dtype: torch.dtype
) -> None:
    config = NSAConfig(
        dim=8, num_heads=heads, num_kv_heads=groups, head_dim=width, value_head_dim=value_width, window_size=8
    )
    generator = torch.Generator().manual_seed(width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    raw, bias = draw(2, 45, sum(projection_widths(config))).to(dtype), draw(3 * heads).to(dtype)
    turn = rotation(7, 45, width, 100.0, dtype=torch.float64, device=torch.device("cpu"))
    results, pulls = [], None
    for route, kind in (("torch", torch.float64), ("torch", dtype), ("triton", dtype)):
        leaves = tuple(tensor.to(DEVICE, kind).requires_grad_() for tensor in (raw, bias))
        table = turn.to(DEVICE, torch.promote_types(kind, torch.float32))
        outs = flat(split_projection(leaves[0], table, leaves[1], config, route=route))
        pulls = pulls or [draw(*out.shape).to(dtype) for out in outs]
        grads = torch.autograd.grad(
            outs, leaves, [pull.to(DEVICE, out.dtype) for pull, out in zip(pulls, outs, strict=True)]
        )
        results.append([tensor.detach() for tensor in (*outs, *grads)])
    exact, eager, found = results
    for one, other, wanted in zip(found, eager, exact, strict=True):
        error, bound = (float((tensor.double() - wanted).abs().max()) for tensor in (one, other))
        assert one.shape == wanted.shape
        assert one.dtype == dtype
        assert error <= max(2 * bound, 4 * torch.finfo(dtype).eps * float(wanted.abs().max()))
