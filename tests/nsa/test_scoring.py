"""Block scores by the overlap rule, forced blocks, eligible blocks, ties: hand-computed and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nsa.scoring
from nsa.attention import NSAConfig
from nsa.errors import ArgumentError
from nsa.scoring import block_scores, choose_blocks, overlap_sum, rank_blocks

from .reference_layer import pick_blocks, score_blocks, softmax


def sizes(kernel_size: int, kernel_stride: int, block_size: int) -> dict[str, int]:
    return {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "block_size": block_size}


PAPER = sizes(32, 16, 64)
SMALL = sizes(8, 4, 8)


def random_rows(length: int, per_stride: dict[str, int], dtype: torch.dtype, *, batch: int = 2, heads: int = 3):
    """Query (B, S, 2, h, 8) and compressed key (B, 2, N, 8) of a whole context."""
    generator = torch.Generator().manual_seed(length)
    count = max(0, (length - per_stride["kernel_size"]) // per_stride["kernel_stride"] + 1)
    query = torch.randn(batch, length, 2, heads, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, 2, count, 8, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def loop_blocks(query: Tensor, key: Tensor, per_stride: dict[str, int], topk: int):
    """Scores and blocks of every row by plain loops in float64, the last S positions of S."""
    batch, queries, groups, heads, width = query.shape
    config = NSAConfig(dim=1, num_heads=1, num_kv_heads=1, head_dim=2, topk=topk, **per_stride)
    scores, blocks = {}, {}
    for b in range(batch):
        for t in range(queries):
            exist = max(0, (t + 1 - config.kernel_size) // config.kernel_stride + 1)
            for g in range(groups):
                logits = (query[b, t, g].double() @ key[b, g, :exist].double().T * width**-0.5).tolist()
                scores[b, t, g] = score_blocks([softmax(head) for head in logits[:heads]], t, config)
                blocks[b, t, g] = pick_blocks(scores[b, t, g], t, config)
    return scores, blocks


def chosen(blocks: Tensor, row: tuple[int, ...]) -> list[int]:
    return [block for block in blocks[row].tolist() if block >= 0]


@pytest.mark.parametrize(
    ("per_stride", "weights", "expected"),
    [
        (PAPER, [1, 2, 3, 4, 5, 6, 7, 8, 9], [2 + 4 + 6 + 4, 4 + 10 + 12 + 14 + 8, 8 + 18]),
        (PAPER, [0, 0, 0, 1, 0, 0, 0, 0, 0], [1, 1, 0]),  # token 3, keys 48..79, lies half in block 0, half in 1
        (sizes(8, 4, 4), [1, 2, 3], [1, 3, 5, 3]),
        (sizes(12, 3, 6), [1, 10, 100], [12, 222, 210]),
        (sizes(4, 4, 4), [5, 6, 7], [5, 6, 7]),
        (sizes(16, 4, 8), [1, 100], [2 + 100, 2 + 200, 100]),
        (PAPER, [], [0, 0]),
    ],
)
def test_a_token_counts_for_a_block_by_the_strides_they_share(per_stride, weights, expected):
    got = overlap_sum(torch.tensor(weights, dtype=torch.float64), len(expected), *per_stride.values())
    assert got.tolist() == expected


def test_scores_are_softmax_sums_over_the_groups_heads():
    """l = d = l' = 4, so a block's score is its token's probability: heads (1/4, 3/4) and (1/2, 1/2)."""
    key = torch.tensor([[[[0.0], [math.log(3.0)]]]])
    query = torch.tensor([[[[[1.0], [0.0]]]]])
    at = torch.tensor([[7]])
    got = block_scores(query, key, positions=at, blocks=2, scale=1.0, **sizes(4, 4, 4))
    assert got.flatten().tolist() == pytest.approx([0.75, 1.25], rel=1e-7)  # log(3) itself is float32


@pytest.mark.parametrize(("position", "expected"), [(0, 0), (30, 0), (31, 1), (46, 1), (47, 2), (62, 2), (63, 3)])
def test_a_compressed_token_exists_from_its_last_key_on(position, expected):
    """Zero queries spread the probability evenly: block 0 holds 2 strides of each of the first three tokens."""
    key = torch.full((1, 1, 9, 4), 3.0)
    got = block_scores(torch.zeros(1, 1, 1, 1, 4), key, positions=torch.tensor([[position]]), blocks=3, **PAPER)
    assert got[0, 0, 0, 0] == (2.0 if expected else 0.0)
    later = torch.cat((key[:, :, :expected], torch.full((1, 1, 9 - expected, 4), float("inf"))), 2)
    same = block_scores(torch.zeros(1, 1, 1, 1, 4), later, positions=torch.tensor([[position]]), blocks=3, **PAPER)
    assert torch.equal(got, same)


def test_equal_scores_go_to_the_lower_block():
    query, key = torch.zeros(1, 1, 1, 2, 4), torch.randn(1, 1, 400, 4)
    assert chosen(choose_blocks(query, key, context_length=1600, topk=6, **sizes(4, 4, 4)), (0, 0, 0)) == [
        *(0, 1, 2, 3, 398, 399)
    ]
    got = choose_blocks(query, key[:, :, :99], context_length=1600, topk=6, **PAPER)
    assert chosen(got, (0, 0, 0)) == [0, 1, 2, 3, 23, 24]


def test_blocks_under_the_same_tokens_tie_exactly():
    """l = 4 strides, one stride per block: with tokens 0, 1, 2 blocks 2 and 3 both hold all three, 1 and 4 hold two."""
    query, key = torch.randn(1, 1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    got = block_scores(query, key, positions=torch.tensor([[23]]), blocks=6, **sizes(16, 4, 4))[0, 0, 0]
    assert got[2] == got[3]
    assert len(set(got.tolist())) == 5


@pytest.mark.parametrize(
    ("topk", "position", "expected"),
    [
        (16, 0, [0]),
        (16, 7, [0]),
        (16, 8, [0, 1]),
        (16, 31, [0, 1, 2, 3]),
        (3, 39, [0, 3, 4]),
        (4, 39, [0, 1, 3, 4]),
        (3, 12, [0, 1]),
        (2, 39, [0, 4]),
        (1, 39, [0]),
    ],
)
def test_forced_blocks_count_once_inside_topk_and_eligible_ones_are_taken_at_score_zero(topk, position, expected):
    query, key = torch.randn(1, 1, 1, 1, 4), torch.zeros(1, 1, 0, 4)
    at = torch.tensor([position])
    got = choose_blocks(query, key, context_length=47, positions=at, topk=topk, **sizes(64, 8, 8))
    assert got.dtype == torch.int32
    assert got.shape == (1, 1, 1, topk)
    assert got[0, 0, 0].tolist() == expected + [-1] * (topk - len(expected))


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.25 + 2**-20, 1.0, 7.5]), min_size=1, max_size=40),
    st.integers(1, 18),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_ranking_is_forced_then_score_then_the_lower_block(scores, topk, data):
    position = data.draw(st.integers(0, 4 * len(scores) - 1))
    config = NSAConfig(
        dim=1, num_heads=1, num_kv_heads=1, head_dim=2, topk=topk, kernel_size=4, kernel_stride=4, block_size=4
    )
    got = rank_blocks(torch.tensor(scores).view(1, 1, 1, -1), torch.tensor([[position]]), 4, topk)
    assert chosen(got, (0, 0, 0)) == pick_blocks(scores, position, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_stride", [SMALL, sizes(4, 2, 8), sizes(16, 4, 4), sizes(6, 3, 9)])
def test_scores_and_blocks_equal_plain_loops(per_stride, dtype):
    query, key = random_rows(61, per_stride, dtype)
    scores, blocks = loop_blocks(query, key, per_stride, 5)
    got = choose_blocks(query, key, context_length=61, topk=5, **per_stride)
    total = -(-61 // per_stride["block_size"])
    mine = block_scores(query, key, positions=torch.arange(61)[None], blocks=total, **per_stride)
    for row, expected in scores.items():
        assert mine[row][: len(expected)].tolist() == pytest.approx(expected, rel=1e-13, abs=1e-300)
        assert chosen(got, row) == blocks[row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distinct", [0, 3])
def test_the_choice_does_not_depend_on_how_the_context_is_split(dtype, distinct, monkeypatch):
    """``distinct`` 3: compressed keys repeat, so that most scores tie and rounding in a matrix product could flip."""
    query, key = random_rows(61, SMALL, dtype)
    if distinct:
        key = key[:, :, torch.arange(key.shape[2]) % distinct]
        query = query[:, :1].expand_as(query).contiguous()
    arguments = {"topk": 4, **SMALL}
    whole = choose_blocks(query, key, context_length=61, **arguments)
    single = [choose_blocks(query[:, t : t + 1], key, context_length=t + 1, **arguments) for t in range(61)]
    assert torch.equal(whole, torch.cat(single, 1))
    middle = choose_blocks(query[:, 20:33], key, context_length=33, **arguments)
    assert torch.equal(whole[:, 20:33], middle)
    at = torch.arange(61).flip(0)
    placed = choose_blocks(query.flip(1), key, context_length=61, positions=at.expand(2, -1), **arguments)
    assert torch.equal(whole, placed.flip(1))
    for elements in (1, 5000):
        monkeypatch.setitem(nsa.scoring.CHUNK_ELEMENTS, "cpu", elements)
        assert torch.equal(whole, choose_blocks(query, key, context_length=61, **arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rows_differ_only_where_scores_are_within_the_bound(dtype):
    query, key = random_rows(61, SMALL, dtype)
    scores, blocks = loop_blocks(query, key, SMALL, 4)
    got = choose_blocks(query, key, context_length=61, topk=4, **SMALL)
    mine = block_scores(query, key, positions=torch.arange(61)[None], blocks=8, **SMALL)
    assert mine.dtype == torch.float32
    error = max(
        abs(float(mine[row][block]) - score) for row, expected in scores.items() for block, score in enumerate(expected)
    )
    assert error <= 4 * torch.finfo(torch.float32).eps * 2 * 3  # scores are at most strides per block x heads
    different = [row for row in blocks if chosen(got, row) != blocks[row]]
    for row in different:
        swapped = [scores[row][block] for block in set(chosen(got, row)) ^ set(blocks[row])]
        assert max(swapped) - min(swapped) <= 2 * error
    assert len(different) <= 0.01 * len(blocks)


def test_a_future_token_changes_no_score_and_no_choice_bit_for_bit():
    query, key = random_rows(61, SMALL, torch.float32)
    arguments = {"context_length": 61, "topk": 4, **SMALL}
    scored = {"positions": torch.arange(61)[None], "blocks": 8, **SMALL}
    for t in (7, 20, 40):
        exist = max(0, (t + 1 - 8) // 4 + 1)
        other_key, other_query = key.clone(), query.clone()
        other_key[:, :, exist:] = 1e4
        other_query[:, t + 1 :] = -50.0
        before, after = choose_blocks(query, key, **arguments), choose_blocks(other_query, other_key, **arguments)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before, after)
        mine, other = block_scores(query, key, **scored), block_scores(other_query, other_key, **scored)
        assert torch.equal(mine[:, : t + 1], other[:, : t + 1])


class Count(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_loop_over_tokens_and_nothing_read_on_the_host():
    counts = []
    for length in (24, 96):
        query, key = random_rows(length, SMALL, torch.float32)
        with Count() as count:
            choose_blocks(query, key, context_length=length, topk=4, **SMALL)
        counts.append(len(count.operators))
        assert not [name for name in count.operators if "_local_scalar_dense" in name or "nonzero" in name]
    assert counts[0] == counts[1]


def test_autocast_does_not_score_in_sixteen_bits():
    query, key = random_rows(61, SMALL, torch.float32)
    plain = choose_blocks(query, key, context_length=61, topk=4, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, choose_blocks(query, key, context_length=61, topk=4, **SMALL))


def test_nothing_is_differentiated():
    query, key = random_rows(24, SMALL, torch.float32)
    scored = {"positions": torch.arange(24)[None], "blocks": 3, **SMALL}
    assert not block_scores(query.requires_grad_(), key, **scored).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_stride": 3}, "kernel_stride 3 does not divide kernel_size 8"),
        ({"block_size": 6}, "kernel_stride 4 does not divide block_size 6"),
        ({"topk": 0}, "topk is 0"),
        ({"context_length": 200}, r"compressed_key has shape .* at least 49"),
        ({"context_length": 20}, "61 queries cannot be the last of a context of 20"),
        ({"positions": torch.arange(60)}, r"positions must be \(S,\) = \(61,\)"),
        ({"query": torch.zeros(2, 61, 6, 8)}, "expected query"),
        ({"query": torch.zeros(2, 61, 3, 2, 8)}, "compressed_key has shape"),
    ],
)
def test_sizes_that_disagree_are_named(change, message):
    query, key = random_rows(61, SMALL, torch.float32)
    arguments = {"query": query, "context_length": 61, "topk": 4, **SMALL, **change}
    with pytest.raises(ArgumentError, match=message):
        choose_blocks(arguments.pop("query"), key, **arguments)
