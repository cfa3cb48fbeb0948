"""What only a GPU shows: cuDNN's route is the oracle, and neither prefill nor a training step waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from nsa.attention import NSAAttention, NSAConfig
from nsa.compression import compressed_attention, compressed_count
from nsa.flags import Flags
from nsa.paths import PATHS
from nsa.selection import LogSums, Selection

pytestmark = pytest.mark.gpu


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any host synchronisation inside is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prefill_and_a_training_step_do_not_synchronise(dtype: torch.dtype) -> None:
    config = NSAConfig(dim=64, num_heads=8, num_kv_heads=2, head_dim=32, window_size=64)
    layer = NSAAttention(config, flags=Flags(path="triton_token"), device="cuda", dtype=dtype)
    x = torch.randn(1, 700, 64, device="cuda", dtype=dtype)
    for _ in range(2):  # first compile, then run
        layer(x).float().sum().backward()
        layer.prefill(x)
    with no_synchronisation():
        layer(x).float().sum().backward()
        layer.prefill(x)


def test_a_synchronisation_would_be_seen() -> None:
    with pytest.raises(RuntimeError), no_synchronisation():
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize(
    "tokens", [50, 64, 1003]
)  # below 48 no row has two tokens, and gradients are 0 but for rounding
def test_cudnn_over_compressed_tokens_is_the_oracle_with_gradients_and_log_sums(tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens)
    count = compressed_count(tokens, 32, 16)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_()

    leaves = draw(2, tokens, 2, 4, 64), draw(2, 2, count, 64), draw(2, 2, count, 64)
    pull = torch.randn_like(leaves[0])
    selection = Selection.compressed(32, 16, rows=(2, tokens, 2), first_position=0, device=pull.device)
    results = []
    for dtype in ("float64", "bfloat16"):
        oracle = PATHS["reference"].function()
        out = oracle(*leaves, selection, scale=0.125, workspace=None, compute_dtype=dtype)
        results.append((out, *torch.autograd.grad(out, leaves, pull.to(out.dtype))))
    sums, other = LogSums(), LogSums()
    sizes = {"first_position": 0, "kernel_size": 32, "kernel_stride": 16}
    out = compressed_attention(*leaves, path="cudnn_compressed", sums=sums, **sizes)
    found = (out, *torch.autograd.grad(out, leaves, pull))
    for one, exact, eager in zip(found, *results, strict=True):
        largest = float(exact.detach().abs().max())
        bound = max(2 * float((eager - exact).abs().max()), 4 * torch.finfo(torch.bfloat16).eps * largest)
        assert float((one.double() - exact).abs().max()) <= bound
    compressed_attention(*leaves, path="triton_compressed", sums=other, **sizes)
    assert torch.equal(sums.tensor.isinf(), other.tensor.isinf())
    there = sums.tensor.isfinite()
    assert float((sums.tensor - other.tensor)[there].abs().max()) <= 64 * torch.finfo(torch.float32).eps
