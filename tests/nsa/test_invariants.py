"""Core invariants of the whole layer: six sentences of the design that must hold whatever the routes are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsa.attention
from nsa.attention import NSAAttention, NSAConfig
from nsa.device import device_identity, software_identity
from nsa.dispatch import use_dispatch_table
from nsa.dispatch_table import DispatchTable
from nsa.flags import Flags
from nsa.paths.reference import selected_keys
from nsa.workspace import Workspace

SIZES = {"dim": 10, "num_heads": 8, "num_kv_heads": 2, "head_dim": 6, "value_head_dim": 4}
BLOCKS = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "topk": 4, "window_size": 9}
LENGTH = 2 * BLOCKS["window_size"] + 3 + 20


@pytest.fixture(autouse=True)
def no_table():
    """Whatever tables this machine has, these tests dispatch by defaults."""
    with use_dispatch_table(DispatchTable(device=device_identity("cpu"), software=software_identity())):
        yield


@pytest.fixture
def selections(monkeypatch):
    """Every Selection that a layer passes to selection_attention, with the block scores behind it."""
    seen: list[tuple] = []
    attend, score = nsa.attention.selection_attention, nsa.scoring.block_scores
    scores: list[Tensor] = []

    def spy_scores(*args, **rest):
        scores.append(score(*args, **rest))
        return scores[-1]

    def spy(query, key, value, selection, **rest):
        seen.append((selection, scores[-1]))
        return attend(query, key, value, selection, **rest)

    monkeypatch.setattr(nsa.scoring, "block_scores", spy_scores)
    monkeypatch.setattr(nsa.attention, "selection_attention", spy)
    return seen


def layer_of(dtype: torch.dtype = torch.float32, path: str | None = None, **sizes) -> NSAAttention:
    torch.manual_seed(7)
    config = NSAConfig(**{**SIZES, **BLOCKS, **sizes})
    return NSAAttention(config, dtype=dtype, flags=Flags(path=path), workspace=Workspace())


def tokens(length: int = LENGTH, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 10, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize("path", [None, "gather", "packed", "varlen", "dense"])
def test_1_changing_any_later_token_changes_nothing_at_or_before(path, selections):
    """Outputs, scores and blocks. Bit for bit where the path runs each row by itself; a path that pads or packs rows
    together may sum a row's keys in another order, so outputs get 4 eps of the largest output there."""
    layer = layer_of(path=path)
    x = tokens()
    before = layer(x).detach()
    exact = path in (None, "gather", "dense")
    limit = 0.0 if exact else 4 * torch.finfo(torch.float32).eps * float(before.abs().max())
    for t in (0, 6, 7, 8, 15, 16, 30, LENGTH - 2):
        other = x.clone()
        other[:, t + 1 :] = 30.0 * torch.randn(2, LENGTH - t - 1, 10, generator=torch.Generator().manual_seed(t))
        after = layer(other).detach()
        assert float((after[:, : t + 1] - before[:, : t + 1]).abs().max()) <= limit
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])
        (first, first_scores), (last, last_scores) = selections[0], selections[-1]
        assert torch.equal(first.blocks[:, : t + 1], last.blocks[:, : t + 1])
        assert torch.equal(first_scores[:, : t + 1], last_scores[:, : t + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_2_prefill_sequential_and_decode_read_the_same_keys(dtype, selections):
    layer = layer_of(dtype)
    x = tokens(dtype=dtype)
    layer.prefill(x)
    whole = key_sets(selections[0][0])
    for start in (1, 7, 8, 9, 19, 24):
        selections.clear()
        _, cache = layer.prefill(x[:, :start])
        for t in range(start, LENGTH):
            layer.decode(x[:, t : t + 1], cache)
        assert torch.cat([key_sets(selection) for selection, _ in selections], 1).equal(whole)


def key_sets(selection) -> Tensor:
    """(B, S, G, LENGTH): the keys that each row reads, by the oracle's own reading of a selection."""
    return selected_keys(selection, LENGTH, 0, selection.indices.shape[1])


def test_3_every_row_reads_its_forced_blocks_once_and_min_topk_eligible_in_all(selections):
    layer_of().prefill(tokens())
    blocks = selections[0][0].blocks
    for t in range(LENGTH):
        own = t // 8
        for row in blocks[:, t].flatten(0, 1).tolist():
            real = [block for block in row if block >= 0]
            assert len(real) == len(set(real)) == min(4, own + 1)
            assert {0, own, max(0, own - 1)} <= set(real)
            assert max(real) == own


def test_4_sequences_of_a_batch_do_not_meet():
    layer = layer_of()
    x = tokens(batch=3)
    limit = 4 * torch.finfo(torch.float32).eps * float(layer(x).abs().max())
    for own in range(3):
        other = tokens(batch=3) * -3.0
        other[own] = x[own]
        assert float((layer(other)[own] - layer(x)[own]).abs().max()) <= limit
        y, cache = layer.prefill(x[:, :-1])
        z, other_cache = layer.prefill(other[:, :-1])
        assert float((y[own] - z[own]).abs().max()) <= limit
        y, _ = layer.decode(x[:, -1:], cache)
        z, _ = layer.decode(other[:, -1:], other_cache)
        assert float((y[own] - z[own]).abs().max()) <= limit


def test_5_with_topk_for_all_blocks_selection_is_causal_attention(monkeypatch):
    layer = layer_of(topk=8)
    pairs = []
    attend = nsa.attention.selection_attention

    def spy(query, key, value, selection, **rest):
        out = attend(query, key, value, selection, **rest)
        scores = torch.einsum("bsghd,bgtd->bghst", query.double(), key.double()) * query.shape[-1] ** -0.5
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        pairs.append((out, torch.einsum("bghst,bgtd->bsghd", weights, value.double()), value.abs().max()))
        return out

    monkeypatch.setattr(nsa.attention, "selection_attention", spy)
    layer.prefill(tokens())
    ((out, causal, largest),) = pairs
    assert float((out - causal).abs().max()) <= 4 * torch.finfo(torch.float32).eps * float(largest)


def test_6_only_the_distance_between_tokens_counts_for_rotary():
    """The window branch alone: moving a context as a whole by 1000 positions changes no output beyond rounding."""
    from nsa.rotary import rotate, rotation
    from nsa.window import window_attention

    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 12, 2, 2, 6, generator=generator), torch.randn(1, 12, 2, 6, generator=generator)
    value = torch.randn(1, 2, 12, 6, generator=generator)
    outs = []
    for first in (0, 1000, 2**20):
        turn = rotation(first, 12, 6, 10000.0, dtype=torch.float32, device=torch.device("cpu"))
        turned = rotate(key, turn).transpose(1, 2)
        outs.append(window_attention(rotate(query, turn), turned, value, window=5))
    # a turned entry is off by 3 roundings of 0.5 eps, a score by twice that per entry of 6, times |q||k| / sqrt(6)
    scores = 6 * 3 * torch.finfo(torch.float32).eps * float(query.abs().max() * key.abs().max()) / 6**0.5
    for other in outs[1:]:
        assert 0 < float((other - outs[0]).abs().max()) <= 2 * scores * float(value.abs().max())
