"""Claims about a trial's inputs: reproducible, causal, with the forced blocks, overlapping as the pattern says."""

from typing import Any

import pytest
import torch

from nsa.paths import reference
from nsa.problem import SelectionProblem
from tuner.inputs import CORRELATION, Inputs, make_inputs, turned_inputs, walk
from tuner.oracle import Oracle, WrongResult

CPU = torch.device("cpu")
PATTERNS = ("scored", "smooth", "random")


def problem(**changes: Any) -> SelectionProblem:
    """A prefill of 100 tokens, so with a tail block, in blocks of 16."""
    fields = {
        "mode": "prefill", "dtype": "float32", "B": 2, "S": 100, "T": 100, "G": 2, "h": 2, "Dk": 8, "Dv": 4,
        "block_size": 16, "topk": 4,
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


CALLS = {
    "whole prefill": problem(),
    "later chunk": problem(S=37),
    "decode": problem(mode="decode", S=1),
    "fewer blocks than topk": problem(S=20, T=20, topk=8),
    "no compressed token yet": problem(S=16, T=16),
    "blocks larger than the smooth span": problem(S=300, T=300, block_size=128, topk=3),
}


@pytest.mark.parametrize(
    ("sizes", "keys"), [({"window": 9}, 100), ({"kernel_size": 32, "kernel_stride": 16}, (100 - 32) // 16 + 1)]
)
def test_inputs_of_the_branches_have_their_keys_and_their_selection(sizes: dict[str, int], keys: int) -> None:
    operation = "window" if "window" in sizes else "compression"
    posed = problem(S=37, block_size=0, topk=1, form="ranges", operation=operation, **sizes)
    found = make_inputs(posed, "fixed", 0, CPU)
    assert found.key.shape == (2, 2, keys, 8)
    assert found.value.shape == (2, 2, keys, 4)
    assert found.selection.operation == operation
    assert found.selection.rows == (2, 37, 2)
    assert found.union is None


def tensors(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """All that a call gets."""
    return inputs.query, inputs.key, inputs.value, inputs.selection.indices


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_seed_gives_the_same_inputs_and_another_seed_others(pattern: str) -> None:
    once, again, other = (make_inputs(problem(), pattern, seed, CPU) for seed in (3, 3, 4))
    for mine, same in zip(tensors(once), tensors(again), strict=True):
        assert torch.equal(mine, same)
    for mine, theirs in zip(tensors(once), tensors(other), strict=True):
        assert not torch.equal(mine, theirs)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", CALLS)
def test_inputs_have_the_problems_shapes(pattern: str, name: str) -> None:
    p = CALLS[name]
    found = make_inputs(p, pattern, 0, CPU)
    assert found.query.shape == (p.B, p.S, p.G, p.h, p.Dk)
    assert found.key.shape == (p.B, p.G, p.T, p.Dk)
    assert found.value.shape == (p.B, p.G, p.T, p.Dv)
    assert found.selection.indices.shape == (p.B, p.S, p.G, p.topk)
    assert found.selection.indices.dtype == torch.int32
    assert found.selection.overlap_hint == p.overlap
    assert (found.union is None) == (p.S < 4)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_inputs_have_the_problems_dtype(dtype: str) -> None:
    found = make_inputs(problem(dtype=dtype), "scored", 0, CPU)
    assert {str(tensor.dtype) for tensor in (found.query, found.key, found.value)} == {f"torch.{dtype}"}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", CALLS)
def test_every_row_holds_block_0_its_own_and_the_one_before(pattern: str, name: str) -> None:
    p = CALLS[name]
    blocks = make_inputs(p, pattern, 0, CPU).selection.indices
    own = torch.arange(p.T - p.S, p.T) // p.block_size
    for wanted in (torch.zeros_like(own), own, (own - 1).clamp_min(0)):
        assert (blocks == wanted[None, :, None, None]).any(-1).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", CALLS)
def test_rows_hold_distinct_blocks_as_many_as_are_eligible_up_to_topk(pattern: str, name: str) -> None:
    p = CALLS[name]
    blocks = make_inputs(p, pattern, 0, CPU).selection.indices
    own = torch.arange(p.T - p.S, p.T) // p.block_size
    assert torch.equal((blocks >= 0).sum(-1), (own + 1).clamp_max(p.topk)[None, :, None].expand(p.B, p.S, p.G))
    ordered = blocks.sort(-1).values
    assert not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", CALLS)
def test_no_row_sees_beyond_its_own_position(pattern: str, name: str) -> None:
    p = CALLS[name]
    selection = make_inputs(p, pattern, 0, CPU).selection
    position = torch.arange(p.T - p.S, p.T)[None, :, None, None]
    assert (selection.indices * p.block_size <= position).all()
    assert (selection.ranges[..., 1] <= position + 1).all()
    assert selection.lengths.min() >= 1


# The union of 4 neighbouring rows over 4*topk, measured on the last 512 queries of 16384 (seeds 0 to 2):
# scored 0.357 to 0.366 at h = 1 (0.397 at h = 16), smooth 0.250, random 0.796 to 0.803.


@pytest.mark.parametrize(
    ("pattern", "low", "high"), [("scored", 0.35, 0.55), ("smooth", 0.0, 0.35), ("random", 0.75, 1.0)]
)
def test_neighbouring_rows_overlap_as_the_pattern_says_at_16k(pattern: str, low: float, high: float) -> None:
    posed = problem(B=1, S=512, T=16384, G=1, h=1, Dk=64, Dv=64, block_size=64, topk=16)
    for seed in range(3):
        union = make_inputs(posed, pattern, seed, CPU).union
        assert union is not None
        assert low <= union <= high, seed


def test_smooth_rows_agree_within_a_span_and_random_ones_do_not() -> None:
    posed = problem(B=1, S=128, T=2048, topk=8)
    unions = {pattern: make_inputs(posed, pattern, 0, CPU).union for pattern in ("smooth", "random")}
    assert unions["smooth"] == pytest.approx(0.25, abs=0.03)
    assert unions["random"] > 0.6


@pytest.mark.parametrize("queries", [1, 5, 128, 300])
def test_the_walk_is_the_recursion_it_stands_for(queries: int) -> None:
    noise = torch.randn(2, queries, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    state, expected = noise[:, 0], []
    for step in range(queries):
        state = CORRELATION * state + (1 - CORRELATION**2) ** 0.5 * noise[:, step]
        expected.append(state)
    torch.testing.assert_close(walk(noise, CORRELATION), torch.stack(expected, 1), atol=1e-5, rtol=1e-4)


def test_the_walk_is_stationary_and_correlated_as_stated() -> None:
    moved = walk(torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(0)), CORRELATION)
    assert float(moved[:, 128:].var()) == pytest.approx(1.0, abs=0.05)
    lagged = (moved[:, 129:] * moved[:, 128:-1]).mean() / moved[:, 128:].square().mean()
    assert float(lagged) == pytest.approx(CORRELATION, abs=0.01)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("context", [1, 16, 50, 100])
def test_the_same_call_at_a_shorter_context_is_causal_too(mode: str, context: int) -> None:
    whole = make_inputs(problem(mode=mode, S=1 if mode == "decode" else 100), "scored", 0, CPU)
    part = whole.at(context)
    queries = 1 if mode == "decode" else context
    assert part.query.shape[1] == part.selection.indices.shape[1] == queries
    assert part.key.shape[2] == part.value.shape[2] == part.selection.context_length == context
    position = torch.arange(context - queries, context)[None, :, None]
    assert (part.selection.lengths <= position + 1).all()
    assert (part.selection.ranges[..., 1] <= context).all()
    assert part.selection.lengths.min() >= 1


# Turned inputs

CALLS_IN_A_GRAPH = 8


def decode(**changes: Any) -> SelectionProblem:
    """A cold decode call by graph; 8 calls of 3 blocks need 384 keys."""
    fields = {"mode": "decode", "S": 1, "topk": 3, "execution": "graph", "cache": "cold"}
    return problem(**{**fields, **changes})


BRANCH = {"block_size": 0, "topk": 1, "form": "ranges"}
SHARED = {
    "as many blocks as the calls need": decode(T=384),
    "a tail block": decode(T=405),
    "many more blocks": decode(T=2048, B=3),
    "a window": decode(T=120, **BRANCH, operation="window", window=15),
}
OWN = {
    "a block too few": decode(T=383),
    "every block selected": decode(T=48),
    "fewer blocks than topk": decode(T=32),
    "a window": decode(T=119, **BRANCH, operation="window", window=15),
    "compressed tokens": decode(T=400, **BRANCH, operation="compression", kernel_size=8, kernel_stride=4),
}


def turned(posed: SelectionProblem, pattern: str = "random") -> list[Inputs]:
    """Eight calls' inputs."""
    given = make_inputs(posed, pattern if posed.operation == "selection" else "fixed", 0, CPU)
    found = turned_inputs(posed, given, CALLS_IN_A_GRAPH)
    assert found[0] is given
    assert len(found) == CALLS_IN_A_GRAPH
    return found


def read_keys(posed: SelectionProblem, case: Inputs) -> torch.Tensor:
    """Which keys each row reads, (B, G, T), from the selection's ranges."""
    key = torch.arange(posed.keys)
    start, end = case.selection.ranges[:, 0].unbind(-1)
    return ((key >= start[..., None]) & (key < end[..., None])).any(2)


@pytest.mark.parametrize("pattern", ["random", "scored"])
@pytest.mark.parametrize("name", SHARED)
def test_turned_calls_share_a_cache_that_holds_keys_for_all_and_no_row_reads_a_key_twice(
    name: str, pattern: str
) -> None:
    posed = SHARED[name]
    found = turned(posed, pattern)
    assert {(case.key.data_ptr(), case.value.data_ptr()) for case in found} == {
        (found[0].key.data_ptr(), found[0].value.data_ptr())
    }
    reads = torch.stack([read_keys(posed, case) for case in found])
    assert reads.sum(0).max() == 1
    assert (reads[1:].sum(-1) == posed.row_width).all()


@pytest.mark.parametrize("name", [name for name in SHARED if name != "a window"])
def test_turned_rows_hold_distinct_eligible_blocks_of_the_same_type_and_layout(name: str) -> None:
    posed = SHARED[name]
    given, *others = (case.selection for case in turned(posed))
    for selection in others:
        blocks = selection.indices
        assert blocks.shape == given.indices.shape
        assert blocks.dtype == torch.int32
        assert blocks.is_contiguous()
        assert ((blocks >= 0) & (blocks * posed.block_size < posed.T)).all()
        assert (blocks.sort(-1).values.diff() > 0).all()
        assert (selection.overlap_hint, selection.complete) == (given.overlap_hint, given.complete)


@pytest.mark.parametrize("name", OWN)
def test_turned_calls_have_caches_of_their_own_where_the_context_is_short(name: str) -> None:
    found = turned(OWN[name])
    for part in ("key", "value"):
        tensors = [getattr(case, part) for case in found]
        assert len({tensor.data_ptr() for tensor in tensors}) == CALLS_IN_A_GRAPH
        assert {(tensor.shape, tensor.stride()) for tensor in tensors} == {(tensors[0].shape, tensors[0].stride())}
    assert all(case.selection is found[0].selection for case in found)


@pytest.mark.parametrize("posed", [*SHARED.values(), *OWN.values()])
def test_each_turned_call_has_a_result_of_its_own_for_the_same_query(posed: SelectionProblem) -> None:
    found = turned(posed)
    assert all(case.query is found[0].query for case in found)
    known = [Oracle(case, posed.Dk**-0.5) for case in found]
    outs = [oracle.truth.float() for oracle in known]
    for one, oracle in enumerate(known):
        for other, out in enumerate(outs):
            if one == other:
                oracle.compare(out, "its own")
            else:
                with pytest.raises(WrongResult, match="off by"):
                    oracle.compare(out, "another's")


def test_a_turned_calls_oracle_is_that_of_the_reference_on_its_inputs() -> None:
    for case in turned(SHARED["a tail block"]):
        truth = reference.run(case.query, case.key, case.value, case.selection, scale=0.5)
        assert torch.equal(Oracle(case, 0.5).truth, truth)


@pytest.mark.parametrize("posed", [decode(T=405, cache="hot"), decode(T=48, cache="hot")])
def test_hot_calls_all_read_the_same(posed: SelectionProblem) -> None:
    found = turned(posed)
    assert all(case is found[0] for case in found)
