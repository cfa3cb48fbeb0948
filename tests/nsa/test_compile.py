"""torch.compile of a model with the layer: the same result and gradients, few graphs, and dispatch is never traced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nsa.attention import NSAAttention, NSAConfig
from nsa.flags import Flags
from nsa.trace import record_paths

CONFIG = NSAConfig(
    dim=16, num_heads=4, num_kv_heads=2, head_dim=8, kernel_size=8, kernel_stride=4, block_size=8, topk=4, window_size=9
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def model(device: str) -> nn.Module:
    torch.manual_seed(0)
    layers = (NSAAttention(CONFIG, flags=Flags()), nn.Linear(16, 16), NSAAttention(CONFIG, flags=Flags()))
    return nn.Sequential(*layers).to(device)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_model_gives_the_same_output_and_gradients(device):
    plain = model(device)
    compiled = torch.compile(plain, backend="aot_eager")
    for tokens in (40, 40, 21):
        x = torch.randn(2, tokens, 16, device=device, generator=torch.Generator(device).manual_seed(tokens))
        want, got = plain(x), compiled(x)
        limit = 16 * torch.finfo(torch.float32).eps * float(want.abs().max())
        assert float((want - got).detach().abs().max()) <= limit
        parameters = list(plain.parameters())
        for a, b in zip(*(torch.autograd.grad(y.sum(), parameters) for y in (want, got)), strict=True):
            assert float((a - b).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(a.abs().max() + 1)


def test_dispatch_is_not_traced_and_a_layer_is_two_graphs():
    found = torch._dynamo.explain(NSAAttention(CONFIG, flags=Flags()))(torch.randn(1, 40, 16))
    assert found.graph_count == 2
    assert all("function marked as skipped" in str(reason.reason) for reason in found.break_reasons)


def test_what_executed_in_a_compiled_model_is_recorded():
    compiled = torch.compile(model("cpu"), backend="eager")
    compiled(torch.randn(1, 40, 16))
    with record_paths() as seen:
        compiled(torch.randn(1, 40, 16))
    assert [record.operation for record in seen.executed] == ["window", "compression", "selection"] * 2
