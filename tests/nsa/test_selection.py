"""Claims about Selection: its derived forms equal the definition, and bad input is refused by name."""

import pytest
import torch
from hypothesis import given, settings

from nsa.errors import ArgumentError, UnsupportedSelection
from nsa.paths import reference
from nsa.ranges import blocks_to_ranges_v1, blocks_to_ranges_v2
from nsa.selection import Selection
from tests.nsa.cases import keys_of, selections


def covered(ranges):
    """Keys of one row's ranges, as a list: a key in two ranges stands twice."""
    return [key for start, end in ranges.tolist() for key in range(start, end)]


@given(selections())
def test_ranges_cover_the_keys_of_the_definition(case):
    selection, context = case
    for row, keys in keys_of(selection, context).items():
        assert set(covered(selection.ranges[row])) == keys


@given(selections())
def test_disjoint_ranges_hold_each_key_once_and_lengths_count_them(case):
    selection, context = case
    for row, keys in keys_of(selection, context).items():
        assert sorted(covered(selection.disjoint_ranges[row])) == sorted(keys)
        assert int(selection.lengths[row]) == len(keys)


@given(selections())
def test_the_oracles_mask_is_the_definition(case):
    selection, context = case
    mask = reference.selected_keys(selection, context, 0, selection.indices.shape[1])
    for row, keys in keys_of(selection, context).items():
        assert set(mask[row].nonzero().flatten().tolist()) == keys


@pytest.mark.parametrize("block_size", [1, 2, 5, 8, 64])
@pytest.mark.parametrize("queries", [1, 2, 9])
@pytest.mark.parametrize("topk", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ranges_v1_equals_v2(block_size, queries, topk, dtype):
    generator = torch.Generator().manual_seed(block_size * 100 + queries * 10 + topk)
    context = 3 * block_size + block_size // 2 + queries
    blocks = torch.randint(-1, -(-context // block_size) + 2, (2, queries, 2, topk), generator=generator).to(dtype)
    limits = torch.randint(0, context + 1, (2, queries), generator=generator)
    loop, vectorised = (make(blocks, block_size, limits) for make in (blocks_to_ranges_v1, blocks_to_ranges_v2))
    assert torch.equal(loop, vectorised)
    assert loop.any() == bool(((blocks >= 0) & (blocks * block_size < limits[:, :, None, None])).any())


def test_an_overlap_that_no_table_knows_is_refused():
    with pytest.raises(ArgumentError, match="'mid', expected 'low' or 'high'"):
        Selection.from_blocks(torch.zeros(1, 1, 1, 2, dtype=torch.int32), block_size=4, context_length=8, overlap="mid")


def test_huge_block_indices_do_not_overflow_into_keys():
    blocks = torch.tensor([[[[2**31 - 1, 0]]]], dtype=torch.int32)
    selection = Selection.from_blocks(blocks, block_size=64, context_length=100)
    assert selection.ranges.tolist() == [[[[[0, 0], [0, 64]]]]]


def test_an_inverted_range_selects_nothing_and_cancels_nothing():
    ranges = torch.tensor([[[[[2, 6], [5, 3], [4, 4]]]]])
    selection = Selection.from_ranges(ranges, context_length=10)
    assert selection.lengths.tolist() == [[[4]]]


def test_positions_default_to_the_last_of_the_context():
    blocks = torch.zeros(2, 3, 1, 1, dtype=torch.int32)
    whole = Selection.from_blocks(blocks, block_size=4, context_length=10)
    assert whole.positions.tolist() == [[7, 8, 9]] * 2
    ragged = Selection.from_blocks(blocks, block_size=4, context_length=torch.tensor([5, 10]))
    assert ragged.positions.tolist() == [[2, 3, 4], [7, 8, 9]]
    assert ragged.lengths.flatten().tolist() == [3, 4, 4, 4, 4, 4]


def test_blocks_of_a_ranges_selection_are_refused():
    selection = Selection.from_ranges(torch.zeros(1, 1, 1, 1, 2, dtype=torch.int64), context_length=4)
    with pytest.raises(UnsupportedSelection, match="made from ranges"):
        _ = selection.blocks


@settings(max_examples=30)
@given(selections("blocks"))
def test_order_and_padding_of_blocks_do_not_change_the_rows(case):
    selection, context = case
    indices = selection.indices.flip(-1)
    padded = torch.cat((torch.full_like(indices[..., :2], -1), indices), -1)
    same = Selection(padded, selection.block_size, selection.context_length, selection.query_positions)
    assert keys_of(same, context) == keys_of(selection, context)
    assert torch.equal(same.lengths, selection.lengths)


def test_overlap_is_a_quarter_where_neighbours_agree_and_one_where_they_share_nothing():
    same = torch.arange(4).expand(1, 8, 1, 4).to(torch.int32)
    apart = torch.arange(32).view(1, 8, 1, 4).to(torch.int32)
    overlaps = [Selection.from_blocks(x, block_size=1, context_length=64).overlap() for x in (same, apart)]
    assert overlaps == [0.25, 1.0]


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        (torch.zeros(1, 2, 3), {}, r"must be \(B, S, G, n\), got shape \(1, 2, 3\)"),
        (torch.zeros(1, 1, 1, 1), {}, "must be int32 or int64, got torch.float32"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.int32), {"block_size": 0}, "block_size must be at least 1"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.int32), {"context_length": 0}, "context_length must be at least 1"),
        (torch.zeros(1, 5, 1, 1, dtype=torch.int32), {}, "5 queries cannot be the last of a context of 4 keys"),
        (torch.zeros(2, 1, 1, 1, dtype=torch.int32), {"context_length": torch.tensor([1])}, r"must be \(B,\) = \(2,\)"),
        (
            torch.zeros(1, 2, 1, 1, dtype=torch.int32),
            {"query_positions": torch.tensor([1])},
            r"query_positions must be \(S,\) = \(2,\) or \(B, S\) = \(1, 2\), got \(1,\)",
        ),
    ],
)
def test_bad_input_is_refused_with_what_was_got_and_expected(indices, options, message):
    with pytest.raises(ArgumentError, match=message):
        Selection.from_blocks(indices, **{"block_size": 4, "context_length": 4, **options})
