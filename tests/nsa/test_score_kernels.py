"""Scoring and top-k in Triton choose what ``nsa.scoring`` chooses; the gated sum is the formula's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interpreter import prepare

INTERPRETED = prepare()

from nsa.compression import compressed_attention, compressed_count  # noqa: E402  kernels load Triton, see above
from nsa.errors import UnsupportedPathError  # noqa: E402
from nsa.kernels import score, score_ring  # noqa: E402
from nsa.kernels.interval import Interval  # noqa: E402
from nsa.mix import mix_branches  # noqa: E402
from nsa.scoring import FORCED, INDEX_BITS, block_scores, choose_blocks  # noqa: E402
from nsa.selection import LogSums  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SIZES = [(8, 4, 8), (16, 4, 4), (4, 4, 4), (6, 3, 9), (32, 16, 64)]
"""kernel_size, kernel_stride, block_size; of the second several blocks lie under the same tokens."""

RING_3, RING_16 = (pytest.param(True, 64, heads, marks=pytest.mark.gpu) for heads in (3, 16))


def rows_of(
    queries: int, first: int, sizes: tuple[int, int, int], dtype: torch.dtype, *, heads: int = 3, width: int = 16,
    batch: int = 1, distinct: int = 0,
) -> tuple[Tensor, Tensor, dict[str, int]]:  # fmt: skip
    """Query (B, S, 2, h, D), compressed keys with NaN behind the last that exists, and the sizes as arguments.

    ``distinct``: so many different keys, repeated, so that scores tie.
    """
    kernel_size, kernel_stride, block_size = sizes
    generator = torch.Generator().manual_seed(queries + first)
    count = compressed_count(first + queries, kernel_size, kernel_stride)
    query = torch.randn(batch, queries, 2, heads, width, generator=generator)
    key = torch.randn(batch, 2, count, width, generator=generator)
    if distinct:
        key = key[:, :, torch.arange(count) % distinct]
    key = torch.cat((key, torch.full_like(query[:, :2, :, 0].transpose(1, 2), float("nan"))), 2)
    arguments = {"context_length": first + queries, "kernel_size": kernel_size, "kernel_stride": kernel_stride}
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype), {**arguments, "block_size": block_size}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float32_and_float64_choose_exactly_as_torch_does(sizes, dtype) -> None:
    for queries, first, topk in ((37, 0, 5), (9, 41, 3)):
        query, key, arguments = rows_of(queries, first, sizes, dtype, batch=2 if first else 1)
        wanted = choose_blocks(query, key, topk=topk, route="torch", **arguments)
        assert torch.equal(choose_blocks(query, key, topk=topk, route="triton", **arguments), wanted)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.sampled_from(SIZES[:4]), st.integers(1, 30), st.integers(0, 60), st.integers(1, 9), st.integers(0, 3))
def test_any_sizes_topk_and_ties_choose_as_torch_does(sizes, queries, first, topk, distinct) -> None:
    query, key, arguments = rows_of(queries, first, sizes, torch.float32, heads=2, distinct=distinct)
    wanted = choose_blocks(query, key, topk=topk, route="torch", **arguments)
    assert torch.equal(choose_blocks(query, key, topk=topk, route="triton", **arguments), wanted)


@pytest.mark.parametrize(("given_sums", "width", "heads"), [(False, 16, 3), (True, 16, 3), RING_3, RING_16])
def test_sixteen_bit_rows_differ_only_where_scores_are_within_the_bound(
    given_sums: bool, width: int, heads: int
) -> None:
    """On a GPU of compute capability 9.0 those of width 64 are scored by the kernel in Gluon."""
    sizes, topk = (8, 4, 8), 4
    query, key, arguments = rows_of(61, 0, sizes, torch.bfloat16, batch=2, width=width, heads=heads)
    logsum = None
    if given_sums:
        sums = LogSums()
        path = {"path": "triton_compressed", "parameters": {"tokens": 4, "keys": 32, "loads": "pointer"}}
        compressed_attention(query, key, key, first_position=0, kernel_size=8, kernel_stride=4, sums=sums, **path)
        logsum = sums.tensor
        assert logsum is not None
    wanted = choose_blocks(query.double(), key.double(), topk=topk, route="torch", **arguments)
    found = choose_blocks(query, key, topk=topk, route="triton", logsum=logsum, **arguments)
    options = {"positions": torch.arange(61, device=DEVICE).expand(2, -1), "blocks": 8}
    options |= {"kernel_size": 8, "kernel_stride": 4, "block_size": 8}
    exact, eager = (block_scores(query.to(d), key[:, :, :14].to(d), **options) for d in (torch.float64, torch.float32))
    bound = max(2 * float((eager - exact).abs().max()), 4 * torch.finfo(torch.float32).eps * float(exact.max()))
    different = (found != wanted).any(-1).nonzero().tolist()
    assert len(different) <= 0.01 * wanted.shape[0] * 61 * 2
    for b, s, g in different:
        swapped = set(found[b, s, g].tolist()) ^ set(wanted[b, s, g].tolist())
        scores = exact[b, s, g, sorted(swapped)]
        assert float(scores.max() - scores.min()) <= 2 * bound


@pytest.mark.parametrize("width", [16, pytest.param(64, marks=pytest.mark.gpu)])
def test_exact_ties_of_sixteen_bit_rows_go_to_the_lower_block(width: int) -> None:
    query, key, arguments = rows_of(80, 0, (4, 4, 4), torch.bfloat16, distinct=1, width=width)
    sums = LogSums()
    path = {"path": "triton_compressed", "parameters": {"tokens": 4, "keys": 32, "loads": "pointer"}}
    compressed_attention(query, key, key, first_position=0, kernel_size=4, kernel_stride=4, sums=sums, **path)
    for logsum in (None, sums.tensor):
        found = choose_blocks(query, key, topk=6, route="triton", logsum=logsum, **arguments)
        assert found[0, 79].tolist() == [[0, 1, 2, 3, 18, 19]] * 2


def folded(
    query: Tensor, key: Tensor, logsum: Tensor, sums: Tensor, interval: Interval, *, first: int, count: int, there: int,
    plane: int, scale: float, ratio: int, **_: object,
) -> None:  # fmt: skip
    """What ``score_ring.score_blocks`` leaves, by torch."""
    rows = query[:, first : first + count].permute(0, 2, 1, 3, 4)
    scores = torch.einsum("bgshd,bgtd->bgsht", rows, key[:, :, :there]) * (scale / math.log(2))
    weights = torch.exp2(scores - logsum[:, first : first + count].permute(0, 2, 1, 3)[..., None]).sum(3)
    position = interval.first_position + first + torch.arange(count)
    end = (position + 1 - interval.kernel_size).div(interval.kernel_stride, rounding_mode="floor") + 1
    weights = weights * (torch.arange(there) < end[:, None])
    weights = torch.nn.functional.pad(weights, (0, plane * ratio - there)).unflatten(3, (plane, ratio))
    reach = (torch.arange(ratio) + interval.kernel_size // interval.kernel_stride - ratio).clamp_min(0)
    own = weights * (interval.kernel_size // interval.kernel_stride - reach)
    held = sums[: 2 * plane * weights[..., 0, 0].numel()].view(*weights.shape[:3], 2, plane)
    held[:, :, :, 0], held[:, :, :, 1] = own.sum(4), (weights * reach).sum(4)


@pytest.mark.skipif(not INTERPRETED, reason="stands in for a kernel that runs on a GPU")
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[2], SIZES[4], (8, 2, 16)], ids=str)
def test_blocks_ranked_from_their_own_part_and_what_the_one_before_reaches_over_are_torchs(
    sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_ring, "score_blocks", folded)
    monkeypatch.setattr(score, "CHUNK_ELEMENTS", 2**10)
    kernel_size, kernel_stride, block_size = sizes
    for queries, first in ((90, 0), (33, 71)):
        query, key, arguments = rows_of(queries, first, sizes, torch.float32)
        sums = LogSums()
        path = {"path": "triton_compressed", "parameters": {"tokens": 4, "keys": 32, "loads": "pointer"}}
        interval = Interval(kernel_size, kernel_stride, first_position=first)
        common = {"first_position": first, "kernel_size": kernel_size, "kernel_stride": kernel_stride}
        compressed_attention(query, key, key, sums=sums, **common, **path)
        found = score.choose(
            query, key, interval, sums.tensor, 16**-0.5, block_size=block_size, topk=5, wide=False,
            blocks=-(-arguments["context_length"] // block_size), index_bits=INDEX_BITS, forced=FORCED,
            tokens=4, keys=64, warps=4, stages=2, loads="ring", registers=0,
        )  # fmt: skip
        assert torch.equal(found, choose_blocks(query, key, topk=5, route="torch", **arguments))


def test_positions_in_any_order_and_chunks_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, arguments = rows_of(29, 12, (8, 4, 8), torch.float32)
    whole = choose_blocks(query, key, topk=4, route="triton", **arguments)
    order = torch.randperm(29, generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    placed = choose_blocks(query[:, order], key, topk=4, route="triton", positions=order + 12, **arguments)
    assert torch.equal(placed, whole[:, order])
    monkeypatch.setattr(score, "CHUNK_ELEMENTS", 2 * 16 * 2 * 17)
    assert torch.equal(choose_blocks(query, key, topk=4, route="triton", **arguments), whole)


def test_what_triton_cannot_score_is_refused_where_it_is_asked_for() -> None:
    query, key, arguments = rows_of(9, 0, (8, 4, 8), torch.float32, width=288)
    with pytest.raises(UnsupportedPathError, match="256"):
        choose_blocks(query, key, topk=4, route="triton", **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gated_sum_and_its_gradients_are_the_formulas(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 2, 3, 3), *((2, 7, 2, 3, 24),) * 3)
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    pull = torch.randn(shapes[1], generator=generator).to(DEVICE, dtype)
    results = {}
    for name, one in (("mine", dtype), ("eager", dtype), ("exact", torch.float64)):
        leaves = [tensor.to(one).detach().requires_grad_() for tensor in tensors]
        out = mix_branches(*leaves, route="triton" if name == "mine" else "torch")
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, pull.to(one))]
    for mine, eager, exact in zip(*results.values(), strict=True):
        bound = max(2 * float((eager - exact).abs().max()), 4 * torch.finfo(dtype).eps * float(exact.abs().max()))
        assert float((mine.double() - exact).abs().max()) <= bound
