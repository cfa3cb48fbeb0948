"""The cache keeps what was appended, grows by doubling, and never shows unwritten room."""

from __future__ import annotations

import pytest
import torch

from nsa.cache import BRANCHES, NSACache
from nsa.errors import ArgumentError, ReserveError

CPU = torch.device("cpu")


def cache_of(capacity: int = 0, page_size: int = 0) -> NSACache:
    sizes = {"kernel_size": 4, "kernel_stride": 2, "capacity": capacity, "page_size": page_size}
    return NSACache(2, 3, 4, 5, dtype=torch.float32, device=CPU, **sizes)


def rows(tokens: int, seed: int, batch: int = 2):
    generator = torch.Generator().manual_seed(seed)
    keys = {branch: torch.randn(batch, 3, tokens, 4, generator=generator) for branch in BRANCHES}
    return keys, {branch: torch.randn(batch, 3, tokens, 5, generator=generator) for branch in BRANCHES}


@pytest.mark.parametrize("page_size", [0, 2, 6])
def test_what_was_appended_is_kept_per_branch_in_order_through_growth(page_size):
    cache = cache_of(page_size=page_size)
    pieces = [rows(tokens, tokens) for tokens in (1, 2, 1, 9, 3)]
    for keys, values in pieces:
        cache.append(keys, values)
        cache.poison()
    assert cache.length == 16
    assert cache.lengths.tolist() == [16, 16]
    for branch in BRANCHES:
        assert torch.equal(cache.key(branch), torch.cat([keys[branch] for keys, _ in pieces], 2))
        assert torch.equal(cache.value(branch), torch.cat([values[branch] for _, values in pieces], 2))


def test_capacity_doubles_so_growths_are_logarithmic():
    cache = cache_of(capacity=4)
    capacities = set()
    for step in range(1000):
        cache.append(*rows(1, step))
        capacities.add(cache.capacity)
    assert capacities == {4, 8, 16, 32, 64, 128, 256, 512, 1024}
    assert cache.growths == cache.generation == 8


def test_a_reserved_cache_is_filled_in_place():
    cache = cache_of(capacity=8)
    cache.append(*rows(3, 0))
    storage = cache.key("window").data_ptr()
    cache.append(*rows(5, 1))
    assert cache.key("window").data_ptr() == storage
    assert cache.growths == 0
    cache.append(*rows(1, 2))
    assert cache.growths == 1


def test_a_jump_beyond_the_double_grows_to_the_need():
    cache = cache_of(capacity=2)
    cache.append(*rows(50, 0))
    assert cache.capacity == 50


def test_compressed_tokens_are_kept_apart_and_may_be_none():
    cache = cache_of()
    cache.append_compressed(torch.ones(2, 3, 0, 4), torch.ones(2, 3, 0, 5))
    assert cache.compressed_length == 0
    cache.append_compressed(torch.ones(2, 3, 2, 4), torch.ones(2, 3, 2, 5))
    assert (cache.length, cache.compressed_length) == (0, 2)
    assert cache.compressed_key.shape == (2, 3, 2, 4)
    assert (cache.compressed_value == 1).all()


def test_truncating_forgets_the_last_tokens_only():
    cache = cache_of()
    first, second = rows(3, 0), rows(2, 1)
    cache.append(*first)
    cache.append(*second)
    cache.truncate(3)
    assert cache.length == 3
    assert torch.equal(cache.key("selection"), first[0]["selection"])
    cache.append(*second)
    assert torch.equal(cache.value("compression")[:, :, 3:], second[1]["compression"])


def test_truncating_keeps_entries_that_are_shorter_as_long_as_they_are():
    cache = cache_of()
    cache.append(*rows(8, 0))
    cache.trim([7, 4])
    for length, held in ((7, [7, 4]), (6, [6, 4]), (4, [4, 4])):
        cache.truncate(length)
        assert (cache.length, cache.lengths.tolist(), cache.ragged) == (length, held, held[0] != held[1])


def test_truncating_keeps_no_compressed_token_of_what_it_forgets():
    cache = cache_of()
    cache.append(*rows(8, 0))
    cache.append_compressed(torch.ones(2, 3, 3, 4), torch.ones(2, 3, 3, 5))
    cache.truncate(7)
    assert (cache.length, cache.compressed_length) == (7, 2)


@pytest.mark.parametrize("page_size", [0, 8])
def test_unwritten_room_is_never_in_a_view(page_size):
    cache = cache_of(capacity=64, page_size=page_size)
    cache.append(*rows(4, 0))
    cache.append_compressed(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 5))
    cache.poison()
    views = [cache.compressed_key, cache.compressed_value]
    views += [view(branch) for branch in BRANCHES for view in (cache.key, cache.value)]
    assert all(view.isfinite().all() for view in views)


def test_bytes_count_the_room_of_all_buffers():
    assert cache_of(capacity=10).bytes == 4 * 2 * 3 * (3 * 10 + 5) * (4 + 5)


def test_the_cache_keeps_no_graph():
    cache = cache_of()
    keys, values = rows(2, 0)
    cache.append({branch: key.requires_grad_() for branch, key in keys.items()}, values)
    assert not cache.key("selection").requires_grad


@pytest.mark.parametrize("change", ["batch", "dtype", "width"])
def test_tokens_of_another_layer_or_batch_are_refused_and_nothing_is_written(change):
    cache = cache_of(capacity=4)
    cache.append(*rows(1, 0))
    keys, values = rows(1, 1, batch=3 if change == "batch" else 2)
    if change == "dtype":
        keys = {branch: key.double() for branch, key in keys.items()}
    if change == "width":
        keys = {branch: key[..., :3] for branch, key in keys.items()}
    with pytest.raises(ArgumentError, match="cannot append"):
        cache.append(keys, values)
    assert cache.length == 1
    assert all(cache.key(branch).shape[2] == 1 for branch in BRANCHES)


def test_pages_are_added_without_moving_what_is_written_until_the_pool_is_full():
    cache = cache_of(capacity=8, page_size=4)
    cache.reserve(9)
    moved = cache.generation, cache.keys.data_ptr()
    assert cache.keys.shape[1] == 8
    cache.reserve(16)
    assert (cache.generation, cache.keys.data_ptr()) == moved
    assert (cache.capacity, cache.reach) == (16, 16)
    assert sorted(cache.table.flatten().tolist()) == list(range(8))


def test_tokens_are_found_through_the_table_whatever_pages_it_names():
    cache = cache_of(capacity=8, page_size=4)
    keys, values = rows(8, 0)
    cache.append(keys, values)
    order = torch.tensor([3, 0, 1, 2])
    cache.keys = cache.keys[:, order.argsort()]
    cache.table.copy_(order[cache.table.long()])
    assert torch.equal(cache.key("window"), keys["window"])


def test_a_page_that_a_stride_does_not_divide_is_refused():
    with pytest.raises(ArgumentError, match="page_size is 3, expected a multiple of kernel_stride 2"):
        cache_of(page_size=3)


def test_entries_trimmed_to_their_own_lengths_take_no_tokens_by_append():
    cache = cache_of(capacity=8)
    cache.append(*rows(8, 0))
    cache.trim([7, 5])
    assert (cache.length, cache.compressed_length, cache.lengths.tolist(), cache.ragged) == (7, 2, [7, 5], True)
    with pytest.raises(ArgumentError, match="different lengths"):
        cache.append(*rows(1, 1))
    with pytest.raises(ArgumentError, match="cannot trim entries of \\[7, 5\\] tokens to \\[7, 6\\]"):
        cache.trim([7, 6])
    cache.poison()
    assert cache.key("selection")[0].isfinite().all()
    assert cache.key("selection")[1, :, 5:].isnan().all()
    cache.trim([4, 4])
    assert not cache.ragged


def test_steps_beyond_the_capacity_are_refused_on_the_host():
    cache = cache_of(capacity=5)
    cache.advance(5)
    assert (cache.length, cache.compressed_length) == (5, 1)
    with pytest.raises(ReserveError, match="5 tokens and 1 more do not fit a capacity of 5"):
        cache.advance()
