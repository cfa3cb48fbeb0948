"""Compressed attention folded into plain causal problems is the oracle, for any first position, with gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nsa.folding import by_residues
from nsa.paths import PATHS
from nsa.selection import Selection

KERNEL, STRIDE = 8, 4
calls: list[tuple[tuple[int, ...], bool, bool]] = []


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """``folding.Attend`` written out; notes the shapes, and whether queries were copied."""
    calls.append((tuple(query.shape), causal, query.is_contiguous()))
    heads = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(heads, 2) for tensor in (key, value))
    scores = torch.einsum("bnhd,bkhd->bhnk", query, key) * 0.4
    if causal:
        count, keys = scores.shape[2:]
        scores = scores.masked_fill(~torch.ones(count, keys, dtype=torch.bool).tril(keys - count), float("-inf"))
    return torch.einsum("bhnk,bkhd->bnhd", scores.softmax(-1), value), scores.logsumexp(-1)


def tensors(queries: int, first: int, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    keys = max(0, (first + queries - KERNEL) // STRIDE + 1) + 2  # two more than may be read
    shapes = ((batch, queries, 2, 3, 8), (batch, 2, keys, 8), (batch, 2, keys, 6))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("queries", "first"),
    [(61, 0), (8, 0), (9, 0), (33, 10), (1, 20), (2, 9), (40, 7), (64, 8), (3, 13), (12, 0), (11, 0)],
)
def test_output_log_sums_and_gradients_are_the_oracles(queries: int, first: int, batch: int) -> None:
    leaves = tensors(queries, first, batch)
    sizes = {"first_position": first, "kernel_size": KERNEL, "kernel_stride": STRIDE}
    found, logsum = by_residues(*leaves, attend, sums=True, **sizes)
    selection = Selection.compressed(
        KERNEL, STRIDE, rows=(batch, queries, 2), first_position=first, device=torch.device("cpu")
    )
    exact = PATHS["reference"].function()(*leaves, selection, scale=0.4, workspace=None)
    limit = 64 * torch.finfo(torch.float64).eps * float(leaves[2].detach().abs().max())
    assert float((found - exact).detach().abs().max()) <= limit
    pull = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine, oracle = (torch.autograd.grad(out, leaves, pull) for out in (found, exact))
    # sums of at most 64 terms in two orders, each within 32 eps of the largest gradient there is
    limit = 64 * torch.finfo(torch.float64).eps * max(float(one.abs().max()) for one in oracle)
    for one, wanted in zip(mine, oracle, strict=True):
        assert float((one - wanted).abs().max()) <= limit
    exist = (torch.arange(queries) + first + 1 - KERNEL).div(STRIDE, rounding_mode="floor") + 1
    scores = torch.einsum("bsghd,bgtd->bsght", leaves[0], leaves[1]).detach() * 0.4
    there = torch.arange(scores.shape[-1]) < exist[:, None]
    sums = scores.masked_fill(~there[None, :, None, None], float("-inf")).logsumexp(-1) / math.log(2)
    assert not logsum.requires_grad
    assert torch.equal(logsum == float("inf"), sums.isinf())
    assert float((logsum - sums)[sums.isfinite()].abs().max()) <= 1e-5  # kept in float32


def test_no_query_is_copied_and_each_problem_is_a_stride_shorter() -> None:
    calls.clear()
    leaves = tensors(7 + 32 + 2, 0, 1)
    by_residues(*leaves, attend, first_position=0, kernel_size=KERNEL, kernel_stride=STRIDE)
    (folded, causal, copied), (rest, dense, _) = calls
    assert (folded, causal, copied) == ((STRIDE, 8, 6, 8), True, False)
    assert (rest, dense) == ((1, 2 * 3, 2, 8), False)


def test_one_whole_stride_is_rows_since_cudnn_refuses_one_query_of_one_token() -> None:
    calls.clear()
    by_residues(*tensors(7 + 4 + 1, 0, 1), attend, first_position=0, kernel_size=KERNEL, kernel_stride=STRIDE)
    assert [(shape, causal) for shape, causal, _ in calls] == [((1, 4 * 3, 2, 8), False), ((1, 3, 2, 8), False)]
