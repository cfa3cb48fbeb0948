"""What only the union kernel does: no maximum, tiles of tokens that agree, no list where whole contexts are read."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch

from tests.interpreter import prepare

prepare()

import triton  # noqa: E402  asks for its mode once

from nsa.kernels import union  # noqa: E402
from nsa.kernels.order import CHUNK_TOKENS, nsa_union_order  # noqa: E402
from nsa.paths import PATHS  # noqa: E402
from nsa.selection import Selection  # noqa: E402
from tests.nsa.test_triton_paths import DEVICE, Case, assert_matches, problem_of  # noqa: E402


def complete_case(tokens: int, topk: int, **options: int) -> Case:
    """A whole prompt whose rows select as many random blocks as there are and topk allows."""
    case = Case(S=tokens, T=tokens, n=topk, dtype=torch.bfloat16, **options)
    own = torch.arange(tokens, device=DEVICE) // case.selection.block_size
    score = torch.rand(*case.selection.indices.shape[:3], int(own[-1]) + 1, generator=torch.Generator().manual_seed(1))
    score = score.to(DEVICE).masked_fill(torch.arange(score.shape[3], device=DEVICE) > own[:, None, None], -1.0)
    best = score.topk(min(topk, score.shape[3]), -1)
    case.selection = Selection.from_blocks(
        torch.where(best.values < 0, -1, best.indices).int(), block_size=16, context_length=tokens, complete=True
    )
    return case


@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_scores_of_any_size_give_what_a_maximum_gives(size: float, loads: str) -> None:
    case = Case(S=6, dtype=torch.bfloat16)
    case.query = case.query * size
    assert case.run("triton_union", {"tokens": 4, "loads": loads}).isfinite().all()
    assert_matches(case, "triton_union", {"tokens": 4, "loads": loads})


def test_sums_that_float32_holds_but_not_times_the_values_are_taken_again() -> None:
    case = Case(S=6, dtype=torch.bfloat16)
    case.query = case.query.abs() * 2
    case.key = case.key.abs() + 1
    case.value = case.value * 2.0**90
    raw = torch.einsum("bsghd,bgtd->bsght", case.query.float(), case.key.float()) * 0.4 * 1.4427
    assert 40 < float(raw.max()) < 100
    assert_matches(case, "triton_union", {"tokens": 4})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [4, 16])
def test_tiles_of_tokens_that_agree_change_nothing(tokens: int, dtype: torch.dtype) -> None:
    case = Case(B=2, S=70, T=75, G=2, h=2, n=3, dtype=dtype)
    assert_matches(case, "triton_union", {"tokens": tokens, "order": "overlap"})


def test_an_order_holds_each_token_once_and_brings_together_those_that_share_blocks() -> None:
    queries, tokens = 100, 4
    pair = torch.arange(queries) * 37 % 25
    blocks = torch.stack((pair * 3, pair * 3 + 1, torch.randint(200, 300, (queries,))), -1).to(DEVICE, torch.int32)
    blocks = blocks.view(1, queries, 1, 3)
    order = torch.full((2 * CHUNK_TOKENS,), -1, dtype=torch.int32, device=DEVICE)
    nsa_union_order[(triton.cdiv(queries, CHUNK_TOKENS),)](
        blocks, order, queries, 1, *blocks.stride(), N=3, TOKENS=tokens, WORDS=8, num_warps=1
    )
    chunks = order.view(2, CHUNK_TOKENS).cpu()
    assert chunks.sort(-1).values.tolist() == [list(range(CHUNK_TOKENS))] * 2
    assert chunks[1, 36:].tolist() == list(range(36, CHUNK_TOKENS))  # tokens that do not exist come last
    groups = pair[:CHUNK_TOKENS][chunks[0].long()].view(-1, tokens)
    neighbours = pair[:CHUNK_TOKENS].view(-1, tokens)
    assert sum(len(set(row.tolist())) for row in groups) < sum(len(set(row.tolist())) for row in neighbours) / 1.5


@pytest.mark.parametrize(("tokens", "slots"), [(2, 16), (4, 3), (16, 5)])
def test_a_list_holds_each_chosen_block_once_ascending_with_the_tokens_that_chose_it(tokens: int, slots: int) -> None:
    case = Case(S=2 * tokens + 1, T=70, n=slots)
    blocks = case.selection.indices
    tiles, places = 3, tokens * triton.next_power_of_2(slots)
    entries = torch.empty(tiles * (places + 1), dtype=torch.int32, device=DEVICE)
    union.nsa_union_entries[(tiles,)](
        blocks, 70, None, None, entries, blocks.shape[1], 70, 1, 0, 0, *blocks.stride(),
        N=slots, NP=places // tokens, BS=16, TENSOR_LENGTH=False, TOKENS=tokens, num_warps=1,
    )  # fmt: skip
    for tile in range(tiles):
        bits: dict[int, int] = {}
        for member, row in enumerate(blocks[0, tile * tokens : (tile + 1) * tokens, 0].tolist()):
            limit = 70 - blocks.shape[1] + tile * tokens + member + 1
            for block in row:
                if 0 <= block * 16 < limit:
                    bits[block] = bits.get(block, 0) | 1 << member
        found = entries[tile * places : (tile + 1) * places].tolist()
        assert found[: len(bits)] == [block << tokens | bits[block] for block in sorted(bits)]
        assert entries[tiles * places + tile] == len(bits)


@pytest.mark.parametrize("tokens", [48, 41])
def test_a_complete_prompt_of_no_more_blocks_than_slots_needs_no_indices(tokens: int) -> None:
    case = complete_case(tokens, 3)
    exact = assert_matches(case, "triton_union", {"tokens": 4})
    indices = case.selection.indices
    case.selection = replace(case.selection, indices=torch.full_like(indices, 10**6))
    assert torch.equal(case.run("triton_union", {"tokens": 4}), exact)


def test_more_blocks_than_slots_or_an_incomplete_selection_are_read() -> None:
    assert_matches(complete_case(49, 3), "triton_union", {"tokens": 4})
    case = complete_case(48, 3)
    case.selection = replace(case.selection, indices=case.selection.indices[..., 2:3].repeat(1, 1, 1, 3))
    case.selection = replace(case.selection, complete=False)
    assert_matches(case, "triton_union", {"tokens": 4})


def test_evidence_asks_for_the_launches_that_there_are() -> None:
    cuda, path = torch.device("cuda"), PATHS["triton_union"]
    problem = problem_of(complete_case(48, 3), "prefill")

    def launches(complete: bool, **parameters: str) -> set[str]:
        declared = msgspec.structs.replace(problem, complete=complete)
        return set(path.evidence(declared, cuda, parameters, ()).required)

    assert len(launches(True)) == 1
    assert len(launches(False)) == 2
    assert launches(False, order="overlap") - launches(False) == {r"^nsa_union_order$"}
