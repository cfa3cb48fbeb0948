"""The fused mean of raw tokens is the exact mean within rounding, both ways; interpreted where no GPU is."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter import prepare

INTERPRETED = prepare()

from nsa.compression import mean_of_blocks  # noqa: E402  kernels load Triton, which asks for its mode once

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("tokens", [5, 31, 32, 47, 48, 133])
def test_the_fused_mean_and_its_gradient_are_exact_within_rounding(
    tokens: int, heads_inside: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, 3, tokens, 20, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    if heads_inside:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    exact_leaf, leaf = x.double().requires_grad_(), x.clone().requires_grad_()
    exact = torch.stack(
        [exact_leaf[:, :, i : i + 32].mean(2) for i in range(0, tokens - 31, 16)] or [exact_leaf[:, :, :0].sum(2)], 2
    )
    exact = exact if tokens >= 32 else exact[:, :, :0]
    out = mean_of_blocks(leaf, 32, 16, route="triton")
    assert out.shape == exact.shape
    pull = torch.randn(exact.shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    pairs = [(out, exact)]
    if tokens >= 32:
        (grad,), (exact_grad,) = (
            torch.autograd.grad(out, leaf, pull),
            torch.autograd.grad(exact, exact_leaf, pull.double()),
        )
        pairs.append((grad, exact_grad))
    for found, wanted in pairs:
        bound = 4 * torch.finfo(dtype).eps * float(wanted.detach().abs().max()) if wanted.numel() else 0.0
        assert found.dtype == dtype
        assert float((found.double() - wanted).detach().abs().amax() if wanted.numel() else 0.0) <= bound


def test_a_token_does_not_depend_on_what_else_a_call_holds() -> None:
    x = torch.randn(1, 2, 400, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole = mean_of_blocks(x, 32, 16, route="triton")
    for first in (1, 7, 20):
        assert torch.equal(mean_of_blocks(x[:, :, first * 16 :], 32, 16, route="triton"), whole[:, :, first:])
