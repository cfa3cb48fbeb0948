"""PR31's suite "FA2 varlen parity", here against the oracle and not against another path; see docs/log.md."""

import pytest
import torch

import nsa
from nsa.paths import reference, varlen
from nsa.paths.varlen import backend_reason
from nsa.selection import Selection
from tests.nsa.cases import tensors
from tests.nsa.test_paths import bound

SHAPES = [(1, 1, 2, 4, 200), (2, 33, 2, 4, 200), (1, 64, 1, 16, 130), (1, 700, 2, 2, 700)]
"""(B, S, G, h, T); the last has 1400 rows, more than the 1024 at which PR31's kernel broke."""


def ragged(batch, queries, groups, context):
    generator = torch.Generator().manual_seed(queries)
    blocks = torch.randint(-1, -(-context // 16), (batch, queries, groups, 4), generator=generator, dtype=torch.int32)
    return Selection.from_blocks(blocks, block_size=16, context_length=context)


@pytest.mark.parametrize(("batch", "queries", "groups", "heads", "context"), SHAPES)
def test_varlen_segment_parity(batch, queries, groups, heads, context):
    selection = ragged(batch, queries, groups, context)
    query, key, value = tensors(selection, context, heads, 32, 32)
    truth, allowed = bound(selection, query, key, value, 32**-0.5, torch.float32)
    out = nsa.selection_attention(query, key, value, selection, path="varlen", parameters={"backend": "segment"})
    assert (out - truth).abs().max() <= allowed


class LeavesSpareGradients(torch.autograd.Function):
    """The identity, whose backward writes nothing behind ``end``, as FlashAttention's does."""

    @staticmethod
    def forward(ctx, keys, end):
        ctx.end = end
        return keys.clone()

    @staticmethod
    def backward(ctx, grad):
        unwritten = torch.full_like(grad, float("nan"))
        unwritten[: ctx.end] = grad[: ctx.end]
        return unwritten, None


@pytest.mark.parametrize(("batch", "queries", "groups", "heads", "context"), SHAPES)
def test_gradients_that_a_kernel_does_not_write_reach_no_key(
    batch, queries, groups, heads, context, monkeypatch: pytest.MonkeyPatch
):
    selection = ragged(batch, queries, groups, context)
    leaves = [tensor.requires_grad_() for tensor in tensors(selection, context, heads, 32, 32)]
    want = torch.autograd.grad(varlen.run(*leaves, selection, scale=32**-0.5).sum(), leaves)

    def attention(rows, key, value, offsets, *rest):
        end = int(offsets[-1])
        assert end < len(key)
        key, value = (LeavesSpareGradients.apply(tensor, end) for tensor in (key, value))
        return segment(rows, key, value, offsets, *rest)

    segment, total = varlen.segment_attention, varlen.flat_total
    monkeypatch.setattr(varlen, "segment_attention", attention)
    monkeypatch.setattr(varlen, "flat_total", lambda *arguments: total(*arguments) + 5)
    found = torch.autograd.grad(varlen.run(*leaves, selection, scale=32**-0.5).sum(), leaves)
    for have, usual in zip(found, want, strict=True):
        torch.testing.assert_close(have, usual)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "torch", "segment"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "queries", "groups", "heads", "context"), SHAPES)
def test_varlen_parity_on_the_gpu(batch, queries, groups, heads, context, backend, dtype):
    made = ragged(batch, queries, groups, context)
    selection = Selection.from_blocks(made.indices.cuda(), block_size=16, context_length=context)
    query, key, value = (t.detach().cuda().requires_grad_() for t in tensors(made, context, heads, 32, 32, dtype))
    truth, allowed = bound(selection, query, key, value, 32**-0.5, dtype)
    out = nsa.selection_attention(query, key, value, selection, path="varlen", parameters={"backend": backend})
    assert (out.double() - truth).abs().max() <= allowed
    weight = torch.linspace(-1, 1, out.shape[-1], device="cuda", dtype=dtype)
    found = torch.autograd.grad((out * weight).sum(), (query, key, value))
    leaves = [t.detach().double().requires_grad_() for t in (query, key, value)]
    want = torch.autograd.grad((reference.run(*leaves, selection, scale=32**-0.5) * weight.double()).sum(), leaves)
    working = [t.detach().requires_grad_() for t in (query, key, value)]
    eager = reference.run(*working, selection, scale=32**-0.5, compute_dtype=str(dtype)[6:])
    usual = torch.autograd.grad((eager * weight).sum(), working)
    for have, true, common in zip(found, want, usual, strict=True):
        floor = 4 * torch.finfo(dtype).eps * float(true.abs().max())
        assert (have.double() - true).abs().max() <= max(2 * float((common.double() - true).abs().max()), floor)


def test_flash_attention_backends_say_why_they_cannot_run_on_a_cpu():
    selection = ragged(1, 2, 1, 40)
    query, key, value = tensors(selection, 40, 2, 32, 32)
    for backend in ("flash_attn", "torch"):
        with pytest.raises(nsa.UnsupportedPathError, match=f"^unsupported: varlen backend {backend} needs a CUDA"):
            nsa.selection_attention(query, key, value, selection, path="varlen", parameters={"backend": backend})


def test_every_backend_has_a_reason_or_none_for_every_dtype():
    selection = ragged(1, 2, 1, 40)
    problem = nsa.planning.call_problem(*tensors(selection, 40, 2, 32, 32), selection, grad=False, capturing=False)
    assert backend_reason("segment", problem, torch.device("cpu")) is None
