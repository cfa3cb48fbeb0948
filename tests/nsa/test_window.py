"""The sliding window reads max(0, t - w + 1) .. t, without NaN, in chunks whose memory is linear in S."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from nsa.attend import aligned
from nsa.dispatch import DispatchWarning
from nsa.paths import PATHS, sdpa_window
from nsa.paths.sdpa_window import window_mask
from nsa.problem import DTYPE_NAMES, SelectionProblem
from nsa.trace import record_paths
from nsa.window import window_attention

from .reference_layer import attention, bound

WINDOW = 5


def branch_input(queries: int, keys: int, dtype: torch.dtype = torch.float32, widths: tuple[int, int] = (8, 8)):
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = ((2, queries, 2, 3, widths[0]), (2, 2, keys, widths[0]), (2, 2, keys, widths[1]))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def loops(query: Tensor, key: Tensor, value: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """One row and head at a time."""
    batch, queries, groups, heads, _ = query.shape
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows = []
    for b, s, g, i in torch.cartesian_prod(*map(torch.arange, (batch, queries, groups, heads))).tolist():
        t = key.shape[2] - queries + s
        near = range(max(0, t - window + 1), t + 1)
        rows.append(attention(query[b, s, g, i], [key[b, g, j] for j in near], [value[b, g, j] for j in near]))
    return torch.stack(rows).view(batch, queries, groups, heads, -1)


def in_chunks(*tensors: Tensor, chunk: int, window: int = WINDOW) -> Tensor:
    """By path ``sdpa_window``, ``chunk`` queries a call."""
    return window_attention(*tensors, window=window, path="sdpa_window", parameters={"query_chunk": chunk})


def assert_equals_loops(tensors: tuple[Tensor, ...], window: int, chunk: int = 128) -> None:
    got = in_chunks(*tensors, chunk=chunk, window=window)
    dtype = got.dtype
    oracle = loops(*tensors, window, torch.float64)
    eager = loops(*tensors, window, dtype)
    limit = bound(float((eager.double() - oracle).abs().max()), dtype, float(tensors[2].abs().max()))
    assert float((got.double() - oracle).abs().max()) <= limit


@pytest.mark.parametrize(
    ("queries", "keys", "magnitude"),
    [
        pytest.param(1, 1, 1.0, id="first token"),
        pytest.param(4, 4, 1.0, id="shorter than the window"),
        pytest.param(5, 5, 1.0, id="as long as the window"),
        pytest.param(6, 6, 1.0, id="one beyond the window"),
        pytest.param(13, 13, 1e4, id="twice the window and three, large magnitudes"),
        pytest.param(6, 17, 1.0, id="a later chunk"),
        pytest.param(1, 17, 1e4, id="decode, large magnitudes"),
    ],
)
def test_sliding_window_without_NaN(queries, keys, magnitude):
    query, key, value = branch_input(queries, keys)
    tensors = [(query * magnitude).requires_grad_(), (key * magnitude).requires_grad_(), value.requires_grad_()]
    out = in_chunks(*tensors, chunk=4)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert out.abs().max() <= value.abs().max() * (1 + 4 * torch.finfo(torch.float32).eps)
    behind = max(0, keys - queries - WINDOW + 1)
    assert (gradients[2][:, :, :behind] == 0).all()


@pytest.mark.parametrize("chunk", [1, 3, 4, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (13, 13), (6, 17), (1, 17)])
def test_the_window_equals_plain_loops_at_every_chunk(queries, keys, chunk):
    assert_equals_loops(branch_input(queries, keys), WINDOW, chunk)


@pytest.mark.parametrize("widths", [(8, 6), (6, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_and_unequal_head_dims_are_within_the_bound(dtype, widths):
    if dtype == torch.float64:
        tensors = branch_input(13, 13, dtype, widths)
        error = (window_attention(*tensors, window=WINDOW) - loops(*tensors, WINDOW, dtype)).abs().max()
        assert float(error) <= 8 * torch.finfo(dtype).eps * float(tensors[2].abs().max())
    else:
        assert_equals_loops(branch_input(13, 13, dtype, widths), WINDOW)


@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (6, 17)])
def test_gradients_equal_those_of_plain_loops(queries, keys):
    tensors = [tensor.requires_grad_() for tensor in branch_input(queries, keys, torch.float64, (8, 6))]
    pull = torch.randn(2, queries, 2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = torch.autograd.grad((in_chunks(*tensors, chunk=4) * pull).sum(), tensors)
    oracle = torch.autograd.grad((loops(*tensors, WINDOW, torch.float64) * pull).sum(), tensors)
    # sums of at most 64 terms in two orders, each within 32 eps of the largest gradient there is
    limit = 64 * torch.finfo(torch.float64).eps * max(float(expected.abs().max()) for expected in oracle)
    for got, expected in zip(mine, oracle, strict=True):
        assert float((got - expected).abs().max()) <= limit


def test_a_window_of_one_returns_the_own_value():
    query, key, value = branch_input(13, 13)
    out = window_attention(query, key, value, window=1)
    assert torch.equal(out, value.transpose(1, 2)[:, :, :, None].expand_as(out))


def test_only_the_windows_keys_are_read():
    query, key, value = branch_input(13, 13)
    before = window_attention(query, key, value, window=WINDOW)
    value[:, :, 4] += 1.0
    changed = (window_attention(query, key, value, window=WINDOW) != before).flatten(2).any(2).any(0)
    assert changed.nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


def test_no_mask_grows_with_the_context(monkeypatch):
    """Keys per SDPA call are at most chunk + window - 1, and all inner chunks share one mask."""
    seen = []
    original = sdpa_window.shared_attention

    def spy(query, key, value, scale, **rest):
        seen.append((key.shape[2], rest.get("mask")))
        return original(query, key, value, scale, **rest)

    monkeypatch.setattr(sdpa_window, "shared_attention", spy)
    in_chunks(*branch_input(40, 40), chunk=4)
    assert len(seen) == 10
    assert max(keys for keys, _ in seen) == 4 + WINDOW - 1
    assert len({id(mask) for _, mask in seen}) == 2


def test_the_mask_is_that_of_the_definition():
    assert window_mask(1, 7, 7, torch.device("cpu")) is None
    mask = window_mask(3, 6, 3, torch.device("cpu"))
    assert mask.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]


def test_what_ran_is_reported_with_the_reason():
    none = "no dispatch table for this device"
    with record_paths() as recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DispatchWarning)
        for wanted in (None, False, True):
            window_attention(*branch_input(3, 3), window=WINDOW, flash_attention=wanted)
    assert {(record.operation, record.path, record.status) for record in recorder.executed} == {
        ("window", "sdpa_window", "default")
    }
    assert [record.reason for record in recorder.executed] == [
        none,
        f"flash_attn_window is disallowed; {none}",
        f"flash_attn_window: unsupported: flash_attn needs a CUDA device; {none}",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (6, 17), (1, 17), (300, 300)])
def test_flash_attn_equals_plain_loops_where_it_runs(queries, keys, dtype):
    query, key, value = (tensor.cuda() for tensor in branch_input(queries, keys, dtype))
    posed = SelectionProblem(
        mode="prefill" if queries > 1 else "decode", dtype=DTYPE_NAMES[dtype], B=2, S=queries, T=keys, G=2, h=3, Dk=8,
        Dv=8, block_size=0, topk=1, form="ranges", operation="window", window=WINDOW,
    )  # fmt: skip
    if reason := PATHS["flash_attn_window"].unsupported_reason(posed, query.device, {}):
        pytest.skip(reason)
    with record_paths() as recorder:
        got = window_attention(query, key, value, window=WINDOW, flash_attention=True).cpu().double()
    assert (recorder.executed[0].path, recorder.executed[0].status) == ("flash_attn_window", "forced")
    tensors = (query.cpu(), key.cpu(), value.cpu())
    oracle = loops(*tensors, WINDOW, torch.float64)
    eager = loops(*tensors, WINDOW, dtype)
    limit = bound(float((eager.double() - oracle).abs().max()), dtype, float(value.abs().max()))
    assert float((got - oracle).abs().max()) <= limit


def test_only_tensors_whose_rows_start_off_16_bytes_are_copied_for_flash_attn():
    plain = torch.zeros(2, 5, 3, 8, dtype=torch.bfloat16)
    assert aligned(plain) is plain
    assert aligned(plain.transpose(1, 2)).data_ptr() == plain.data_ptr()
    odd = torch.arange(2 * 5 * 28, dtype=torch.bfloat16).view(2, 5, 28)[..., :24].unflatten(2, (3, 8))
    copy = aligned(odd)
    assert torch.equal(copy, odd)
    assert copy.stride() == (120, 24, 8, 1)
