"""Compressed tokens are those of the definition, whole or one at a time, and attention over them is causal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsa.attend
from nsa.compression import MeanCompressor, MLPCompressor, compressed_attention, compressed_count
from nsa.trace import record_paths

from .reference_layer import attention, bound, cast, compress

KERNEL, STRIDE = 8, 4


class Sizes:
    """What the reference's ``compress`` asks a configuration for."""

    def __init__(self, compression: str, kernel_size: int = KERNEL, kernel_stride: int = STRIDE) -> None:
        self.compression, self.kernel_size, self.kernel_stride = compression, kernel_size, kernel_stride


def compressor_of(kind: str, dtype: torch.dtype = torch.float32, kernel: int = KERNEL, stride: int = STRIDE):
    torch.manual_seed(0)
    return MeanCompressor(kernel, stride) if kind == "mean" else MLPCompressor(kernel, stride, 6, dtype=dtype)


def raw(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, length, 6, generator=torch.Generator().manual_seed(length)).to(dtype)


def loops(kind: str, module: torch.nn.Module, tokens: Tensor, dtype: torch.dtype, sizes: Sizes) -> Tensor:
    """The compressor by the reference's loops, computed in ``dtype``."""
    weights = {f"c.{name}": weight for name, weight in cast(module.state_dict(), dtype).items()}
    groups = [[compress(list(group), weights, "c", sizes) for group in batch] for batch in tokens.to(dtype)]
    return torch.stack([torch.stack([torch.stack(group) for group in batch]) for batch in groups])


@pytest.mark.parametrize(("length", "count"), [(0, 0), (1, 0), (7, 0), (8, 1), (11, 1), (12, 2), (16, 3), (17, 3)])
@pytest.mark.parametrize("kind", ["mean", "mlp"])
def test_a_token_exists_only_when_all_its_keys_do(kind, length, count):
    assert compressed_count(length, KERNEL, STRIDE) == count
    assert compressor_of(kind)(raw(length)).shape == (2, 3, count, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (4, 4), (12, 3), (1, 1)])
@pytest.mark.parametrize("kind", ["mean", "mlp"])
def test_compressed_tokens_equal_plain_loops(kind, kernel, stride, dtype):
    module, tokens = compressor_of(kind, dtype, kernel, stride), raw(23, dtype)
    sizes = Sizes(kind, kernel, stride)
    oracle = loops(kind, module, tokens, torch.float64, sizes)
    eager = loops(kind, module, tokens, dtype, sizes)
    limit = bound(float((eager.double() - oracle).abs().max()), dtype, float(oracle.abs().max()))
    assert float((module(tokens).detach().double() - oracle).abs().max()) <= limit


def test_the_mean_of_sixteen_bit_tokens_is_rounded_once():
    tokens = raw(40, torch.bfloat16)
    exact = MeanCompressor(32, 8)(tokens.double())
    assert torch.equal(MeanCompressor(32, 8)(tokens), exact.float().bfloat16())


@pytest.mark.parametrize("kind", ["mean", "mlp"])
def test_tokens_computed_as_their_keys_complete_equal_those_computed_at_once(kind):
    module, tokens = compressor_of(kind).requires_grad_(False), raw(33)
    whole = module(tokens)
    limit = 4 * torch.finfo(torch.float32).eps * float(whole.abs().max())
    for start in (1, 8, 9, 12, 33):
        parts, done = [module(tokens[:, :, :start])], compressed_count(start, KERNEL, STRIDE)
        for length in range(start + 1, 34):
            fresh = module(tokens[:, :, done * STRIDE : length])
            assert fresh.shape[2] == (1 if length >= KERNEL and length % STRIDE == 0 else 0)
            parts.append(fresh)
            done += fresh.shape[2]
        assert float((torch.cat(parts, 2) - whole).abs().max()) <= limit


def test_in_block_position_matters_to_mlp_alone():
    tokens = raw(8)
    shuffled = tokens[:, :, torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    mean, mlp = compressor_of("mean"), compressor_of("mlp")
    assert (mean(tokens) - mean(shuffled)).abs().max() <= 4 * torch.finfo(torch.float32).eps * tokens.abs().max()
    assert (mlp(tokens) - mlp(shuffled)).abs().max() > 1e-3
    with torch.no_grad():
        equal = mlp(torch.zeros(1, 1, 8, 6))
        mlp.position.mul_(5)
        assert not torch.equal(mlp(torch.zeros(1, 1, 8, 6)), equal)


def attention_loops(query: Tensor, key: Tensor, value: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """Compressed attention, one row and head at a time."""
    batch, queries, groups, heads, _ = query.shape
    out = torch.zeros(batch, queries, groups, heads, value.shape[-1], dtype=dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    for b, s, g, i in torch.cartesian_prod(*map(torch.arange, (batch, queries, groups, heads))).tolist():
        exist = sum(1 for j in range(key.shape[2]) if j * STRIDE + KERNEL <= first + s + 1)
        if exist:
            out[b, s, g, i] = attention(query[b, s, g, i], list(key[b, g, :exist]), list(value[b, g, :exist]))
    return out


def branch_input(queries: int, first: int, dtype: torch.dtype, widths: tuple[int, int], heads: int = 2):
    generator = torch.Generator().manual_seed(queries + first)
    count = compressed_count(first + queries, KERNEL, STRIDE) + 1  # one more than may be read
    shapes = ((2, queries, 2, heads, widths[0]), (2, 2, count, widths[0]), (2, 2, count, widths[1]))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def attend(query: Tensor, key: Tensor, value: Tensor, first: int, **options) -> Tensor:
    sizes = {"kernel_size": KERNEL, "kernel_stride": STRIDE}
    return compressed_attention(query, key, value, first_position=first, **sizes, **options)


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("widths", [(8, 8), (8, 6), (6, 8)])
@pytest.mark.parametrize(
    ("queries", "first"),
    [
        (1, 0),
        (7, 0),
        (8, 0),
        (9, 0),
        (12, 0),
        (29, 0),
        (1, 7),
        (1, 8),
        (1, 28),
        (3, 6),
        (3, 10),
        (14, 9),
        (4, 11),
        (14, 13),
        (9, 28),
    ],
)
def test_compressed_attention_equals_plain_loops(queries, first, widths, chunk):
    """From an empty context, at a later chunk, in decode; rows without a token among them."""
    tensors = branch_input(queries, first, torch.float32, widths)
    named = compressed_count(first + queries, KERNEL, STRIDE) > 0
    options = {"path": "sdpa_compressed", "parameters": {"stride_chunk": chunk}} if named else {}
    got = attend(*tensors, first, **options)
    oracle = attention_loops(*tensors, first, torch.float64)
    eager = attention_loops(*tensors, first, torch.float32)
    limit = bound(float((eager.double() - oracle).abs().max()), torch.float32, float(tensors[2].abs().max()))
    assert float((got.double() - oracle).abs().max()) <= limit
    assert (got[:, : max(0, KERNEL - 1 - first)] == 0).all()


@pytest.mark.parametrize(("queries", "first"), [(29, 0), (9, 0), (14, 13), (3, 6)])
def test_its_gradients_equal_those_of_plain_loops_and_rows_without_tokens_give_none(queries, first):
    tensors = [tensor.requires_grad_() for tensor in branch_input(queries, first, torch.float64, (8, 6))]
    pull = torch.randn(2, queries, 2, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = torch.autograd.grad((attend(*tensors, first) * pull).sum(), tensors)
    oracle = torch.autograd.grad((attention_loops(*tensors, first, torch.float64) * pull).sum(), tensors)
    # sums of at most 64 terms in two orders, each within 32 eps of the largest gradient there is
    limit = 64 * torch.finfo(torch.float64).eps * max(float(expected.abs().max()) for expected in oracle)
    for got, expected in zip(mine, oracle, strict=True):
        assert float((got - expected).abs().max()) <= limit
    assert (mine[0][:, : max(0, KERNEL - 1 - first)] == 0).all()


def test_a_later_compressed_token_changes_nothing_before_it():
    query, key, value = branch_input(29, 0, torch.float32, (8, 8))
    before = attend(query, key, value, 0)
    key[:, :, 3:], value[:, :, 3:] = 100.0, -100.0
    after = attend(query, key, value, 0)
    readable = 3 * STRIDE + KERNEL - 1  # rows before token 3 exists
    assert torch.equal(before[:, :readable], after[:, :readable])
    assert not torch.equal(before[:, readable], after[:, readable])


def test_no_route_holds_scores_of_all_queries_against_all_tokens(monkeypatch):
    """Folded, S queries are S/d; from an empty context no mask; unequal head dims keep the fused kernel."""
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **rest):
        seen.append((query.shape, value.shape, rest["attn_mask"], rest["is_causal"]))
        return original(query, key, value, **rest)

    monkeypatch.setattr(nsa.attend.F, "scaled_dot_product_attention", spy)
    attend(*branch_input(KERNEL - 1 + 32, 0, torch.float32, (8, 6)), 0)
    ((query, value, mask, causal),) = seen
    assert (query, value, mask, causal) == ((4, 2 * STRIDE, 8, 8), (4, 2 * STRIDE, 8, 8), None, True)


def test_what_ran_is_reported():
    with record_paths() as recorder:
        attend(*branch_input(3, 0, torch.float32, (8, 8)), 0)
        attend(*branch_input(9, 0, torch.float32, (8, 8)), 0)
    assert [(record.path, record.parameters) for record in recorder.executed] == [
        ("zeros", {}),
        ("sdpa_compressed", {"stride_chunk": 0}),
    ]
