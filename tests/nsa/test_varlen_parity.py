"""PR31's suite "FA2 varlen parity", here against the oracle and not against another path; see docs/log.md."""

import sys
from types import ModuleType

import pytest
import torch

import nsa
from nsa.paths import reference, varlen
from nsa.paths.varlen import backend_reason
from nsa.problem import SelectionProblem
from nsa.selection import Selection
from nsa.workspace import Workspace
from tests.nsa.cases import tensors
from tests.nsa.test_paths import bound

CUDA = torch.device("cuda")
SHAPES = [(1, 1, 2, 4, 200), (2, 33, 2, 4, 200), (1, 64, 1, 16, 130), (1, 700, 2, 2, 700)]
"""(B, S, G, h, T); the last has 1400 rows, more than the 1024 at which PR31's kernel broke."""
DIMS = [(32, 32), (48, 32), (24, 40)]
"""(Dk, Dv)."""


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


@pytest.fixture
def stand_ins(monkeypatch):
    """Both kernels in plain torch, a sequence at a time, equal head dims alone; a list of those they were given."""
    seen = []

    def kernel(query, key, value, query_offsets, offsets, most_queries, most_keys, *, scale):
        seen.append((query.shape[2], key.shape[2], value.shape[2]))
        assert len(set(seen[-1])) == 1
        assert query_offsets.dtype == offsets.dtype == torch.int32
        outs = []
        for first, end, start, stop in zip(query_offsets, query_offsets[1:], offsets, offsets[1:], strict=False):
            assert end - first <= most_queries
            assert stop - start <= most_keys
            weights = (query[first:end, 0] @ key[start:stop, 0].T * scale).softmax(-1)
            outs.append((weights @ value[start:stop, 0])[:, None])
        return torch.cat(outs)

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = lambda *tensors, softmax_scale: kernel(*tensors, scale=softmax_scale)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    return seen


@pytest.mark.parametrize("backend", ["flash_attn", "torch"])
@pytest.mark.parametrize("row_chunk", [0, 64])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize(("batch", "queries", "groups", "heads", "context"), SHAPES[:3])
def test_a_kernel_is_given_a_sequence_per_row_and_equal_head_dims_which_change_no_output_and_no_gradient(
    batch, queries, groups, heads, context, dims, row_chunk, backend, stand_ins
):
    selection = ragged(batch, queries, groups, context)
    leaves = [t.double().requires_grad_() for t in tensors(selection, context, heads, *dims)]
    backends = ("segment", backend)
    outs = [varlen.run(*leaves, selection, scale=0.2, backend=name, row_chunk=row_chunk) for name in backends]
    assert set(stand_ins) == {(max(dims),) * 3}
    assert outs[0].shape == outs[1].shape
    weight = torch.linspace(-1, 1, outs[0].numel(), dtype=torch.float64).view_as(outs[0])
    want, found = (torch.autograd.grad((out * weight).sum(), leaves) for out in outs)
    for have, usual in zip((outs[1], *found), (outs[0], *want), strict=True):
        torch.testing.assert_close(have, usual, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_widened_keys_lie_in_the_workspace_and_read_nothing_that_stood_there(dims, stand_ins):
    selection, workspace = ragged(2, 33, 2, 200), Workspace()
    query, key, value = tensors(selection, 200, 4, *dims)
    truth, allowed = bound(selection, query, key, value, 0.2, torch.float32)
    for _ in range(2):
        out = varlen.run(query, key, value, selection, scale=0.2, workspace=workspace, backend="flash_attn")
        assert (out - truth).abs().max() <= allowed
        workspace.poison()
    keys = int(selection.lengths.sum())
    assert workspace.report().buffers == dict.fromkeys(("varlen.key", "varlen.value"), keys * max(dims) * 4)
    assert (workspace.growths, workspace.reuses) == (2, 2)


def paper(**changes):
    fields = {
        "mode": "prefill", "dtype": "bfloat16", "B": 1, "S": 16384, "T": 16384, "G": 4, "h": 16, "Dk": 192, "Dv": 128,
        "block_size": 64, "topk": 16,
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


@pytest.mark.parametrize("mode", ["prefill", "train"])
def test_the_papers_head_dims_run_by_flash_attention_with_the_chunks_of_the_wider_one(mode):
    unequal, equal = ({p.name: p for p in varlen.tunables(paper(mode=mode, Dv=d), CUDA)} for d in (128, 192))
    assert unequal["backend"].ladder == ("flash_attn", "torch", "segment")
    assert unequal["backend"].default != "segment"
    assert unequal["row_chunk"] == equal["row_chunk"]


@pytest.mark.parametrize("backend", ["flash_attn", "torch"])
def test_the_wider_head_dim_decides_what_flash_attention_takes(backend):
    for dims in ((192, 128), (128, 192), (64, 20), (256, 8)):
        assert varlen.problem_reason(backend, paper(Dk=dims[0], Dv=dims[1]), CUDA) is None
    for dims, wide in (((264, 128), 264), ((128, 264), 264), ((20, 16), 20)):
        reason = varlen.problem_reason(backend, paper(Dk=dims[0], Dv=dims[1]), CUDA)
        assert reason is not None
        assert reason.endswith(f"a multiple of 8 and at most 256, got {wide}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "torch", "segment"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize(("batch", "queries", "groups", "heads", "context"), SHAPES)
def test_varlen_parity_on_the_gpu(batch, queries, groups, heads, context, dims, backend, dtype):
    made = ragged(batch, queries, groups, context)
    selection = Selection.from_blocks(made.indices.cuda(), block_size=16, context_length=context)
    query, key, value = (t.detach().cuda().requires_grad_() for t in tensors(made, context, heads, *dims, dtype))
    scale = dims[0] ** -0.5
    truth, allowed = bound(selection, query, key, value, scale, dtype)
    out = nsa.selection_attention(query, key, value, selection, path="varlen", parameters={"backend": backend})
    assert (out.double() - truth).abs().max() <= allowed
    weight = torch.linspace(-1, 1, out.shape[-1], device="cuda", dtype=dtype)
    found = torch.autograd.grad((out * weight).sum(), (query, key, value))
    leaves = [t.detach().double().requires_grad_() for t in (query, key, value)]
    want = torch.autograd.grad((reference.run(*leaves, selection, scale=scale) * weight.double()).sum(), leaves)
    working = [t.detach().requires_grad_() for t in (query, key, value)]
    eager = reference.run(*working, selection, scale=scale, compute_dtype=str(dtype)[6:])
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
