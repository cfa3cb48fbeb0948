"""Every Triton path is the reference, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from tests.interpreter import prepare

INTERPRETED = prepare()

import nsa  # noqa: E402  kernels load Triton, which asks for its mode once
from nsa.errors import ArgumentError, UnsupportedPathError  # noqa: E402
from nsa.kernels import decode, gradient, invert, support  # noqa: E402
from nsa.kernels.launch import call_key  # noqa: E402
from nsa.paths import PATHS  # noqa: E402
from nsa.paths.reference import selected_keys  # noqa: E402
from nsa.problem import SelectionProblem  # noqa: E402
from nsa.selection import Selection  # noqa: E402
from nsa.trace import Notes, noted, record_paths  # noqa: E402
from nsa.workspace import Workspace  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SMALL_BLOCK = {"span": 2048, "rows": 16, "item_rows": 32}
CANDIDATES: list[tuple[str, dict[str, Any]]] = [
    ("triton_token", {}),
    ("triton_token", {"order": "token", "loads": "descriptor"}),
    ("triton_token", {"tokens": 2, "loads": "descriptor"}),
    ("triton_token", {"tokens": 4, "order": "token"}),
    ("triton_union", {"tokens": 4}),
    ("triton_union", {"tokens": 16, "loads": "descriptor"}),
    ("triton_block", SMALL_BLOCK),
    ("triton_block", {**SMALL_BLOCK, "loads": "descriptor", "partial": "float32"}),
    ("triton_decode", {"splits": 1}),
    ("triton_decode", {"splits": 4}),
    ("triton_decode", {"splits": 2, "combine": "launch"}),
]
NAMES = [f"{name}-{'-'.join(map(str, parameters.values()))}" for name, parameters in CANDIDATES]
every_candidate = pytest.mark.parametrize(("path", "parameters"), CANDIDATES, ids=NAMES)
every_path = pytest.mark.parametrize(
    ("path", "parameters"), [CANDIDATES[i] for i in (0, 3, 4, 6, 9)], ids=[NAMES[i] for i in (0, 3, 4, 6, 9)]
)


class Case:
    """Random inputs and an untidy selection: unsorted, with repetitions, -1, blocks past the limit, one empty row."""

    def __init__(self, *, B: int = 1, S: int = 7, T: int = 39, G: int = 1, h: int = 4, Dk: int = 16, Dv: int = 16,
                 n: int = 4, block_size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0,
                 lengths: tuple[int, ...] | None = None, **options: Any) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(DEVICE, dtype)

        self.query, self.key, self.value = draw(B, S, G, h, Dk), draw(B, G, T, Dk), draw(B, G, T, Dv)
        self.weight = draw(B, S, G, h, Dv)
        blocks = torch.randint(-1, -(-T // block_size) + 1, (B, S, G, n), generator=generator, dtype=torch.int32)
        blocks[:, S // 2] = -1
        context = T if lengths is None else torch.tensor(lengths, device=DEVICE)
        self.selection = Selection.from_blocks(
            blocks.to(DEVICE), block_size=block_size, context_length=context, **options
        )

    def run(self, path: str, parameters: dict[str, Any], *, scale: float = 0.4, **more: Any) -> Tensor:
        """Output of a path."""
        options = {"workspace": None, **more}
        return PATHS[path].function()(
            self.query, self.key, self.value, self.selection, scale=scale, **options, **parameters
        )

    def gradients(self, path: str, parameters: dict[str, Any]) -> tuple[Tensor, ...]:
        """Gradients of query, key and value."""
        leaves = tuple(t.detach().requires_grad_() for t in (self.query, self.key, self.value))
        out = PATHS[path].function()(*leaves, self.selection, scale=0.4, workspace=None, **parameters)
        return torch.autograd.grad(out, leaves, self.weight.to(out.dtype))


def assert_close(found: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype, largest: float) -> None:
    """Within the larger of twice the eager formula's error and 4 * eps * ``largest``; NaN never passes."""
    bound = max(2 * float((eager.double() - exact).abs().max()), 4 * torch.finfo(dtype).eps * largest)
    assert float((found.double() - exact).abs().max()) <= bound


def assert_matches(case: Case, path: str, parameters: dict[str, Any], **more: Any) -> Tensor:
    """The path's output is the oracle's, and the path says that it ran."""
    with record_paths() as seen:
        found = case.run(path, parameters, **more)
    assert [record.path for record in seen.executed] == [path]
    dtype = case.value.dtype
    eager = case.run("reference", {"compute_dtype": str(dtype).removeprefix("torch.")})
    assert found.dtype == dtype
    assert_close(found, case.run("reference", {}), eager, dtype, float(case.value.abs().max()))
    return found


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory asked for with ``torch.empty`` comes full of NaN or -1."""
    plain, plain_like = torch.empty, torch.empty_like

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: fill(plain(*sizes, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *sizes, **options: fill(plain_like(*sizes, **options)))


@every_candidate
def test_untidy_selections_match_the_oracle_and_every_output_is_written(
    path: str, parameters: dict[str, Any], poisoned: None
) -> None:
    found = assert_matches(Case(), path, parameters)
    assert not found[:, 3].any()


@every_candidate
def test_entries_of_a_batch_see_their_own_context_and_nothing_behind_it(path: str, parameters: dict[str, Any]) -> None:
    case = Case(B=2, T=48, G=2, Dk=24, Dv=40, lengths=(21, 44))
    for entry, length in enumerate((21, 44)):
        case.key[entry, :, length:] = float("nan")
        case.value[entry, :, length:] = float("nan")
    clean = Case(B=2, T=48, G=2, Dk=24, Dv=40, lengths=(21, 44))
    found = case.run(path, parameters)
    eager = clean.run("reference", {"compute_dtype": "float32"})
    assert_close(found, clean.run("reference", {}), eager, torch.float32, float(clean.value.abs().max()))


@pytest.mark.parametrize("heads", [1, 2, 3, 16])
@every_path
def test_any_number_of_heads_per_group(path: str, parameters: dict[str, Any], heads: int) -> None:
    if path == "triton_union":
        parameters = {"tokens": max(4, 16 // heads) if heads < 3 else 4}
    case = Case(h=heads, S=4, n=3)
    problem = problem_of(case, "prefill")
    assert PATHS[path].unsupported_reason(problem, DEVICE, parameters) is None
    assert_matches(case, path, parameters)


@every_path
def test_strided_views_positions_and_wide_indices(path: str, parameters: dict[str, Any]) -> None:
    case = Case(S=5, T=37, G=2, B=2, n=3, query_positions=torch.tensor([3, 36, 0, 20, 11], device=DEVICE))
    case.query = case.query.transpose(1, 3).contiguous().transpose(1, 3)
    case.key = case.key.transpose(1, 2).contiguous().transpose(1, 2)
    case.value = torch.cat((case.value, case.value), -1)[..., :16]
    indices = case.selection.indices.to(torch.int64)
    indices[indices == -1] = 2**40  # outside any context, and outside int32
    case.selection = replace(case.selection, indices=indices.transpose(1, 2).contiguous().transpose(1, 2))
    found = case.run(path, parameters)
    case.selection = replace(case.selection, indices=indices.clamp_max(10**6))
    eager = case.run("reference", {"compute_dtype": "float32"})
    assert_close(found, case.run("reference", {}), eager, torch.float32, float(case.value.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_path
def test_half_precision_stays_within_the_derived_bound(
    path: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    assert_matches(Case(S=4, dtype=dtype, Dk=48), path, parameters)


@every_path
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_that_is_not_above_0_is_no_special_case(path: str, parameters: dict[str, Any], scale: float) -> None:
    case = Case(S=4)
    exact, eager = (case.run("reference", {"compute_dtype": name}, scale=scale) for name in ("float64", "float32"))
    found = nsa.selection_attention(
        case.query, case.key, case.value, case.selection, path=path, parameters=parameters, scale=scale
    )
    assert_close(found, exact, eager, torch.float32, float(case.value.abs().max()))


def largest_terms(case: Case) -> tuple[float, float, float]:
    """Size of the largest product that each gradient (query, key, value) adds up: what its rounding scales with."""
    query, key, value, weight = (t.double() for t in (case.query, case.key, case.value, case.weight))
    mask = selected_keys(case.selection, key.shape[2], 0, query.shape[1])[:, :, :, None]
    score = (torch.einsum("bsghd,bgtd->bsght", query, key) * 0.4).masked_fill(~mask, float("-inf"))
    share = score.softmax(-1).nan_to_num()
    slope = torch.einsum("bsghd,bgtd->bsght", weight, value)
    largest = float((share * slope).abs().max()) * 0.4
    return (
        largest * float(key.abs().max()), largest * float(query.abs().max()), float(share.max() * weight.abs().max())
    )  # fmt: skip


def assert_gradients(case: Case, found: tuple[Tensor, ...]) -> None:
    """Each within its bound of the oracle's."""
    exact = case.gradients("reference", {})
    eager = case.gradients("reference", {"compute_dtype": "float32"})
    for one, wanted, near, largest in zip(found, exact, eager, largest_terms(case), strict=True):
        assert_close(one, wanted.double(), near, torch.float32, largest)


@every_path
def test_gradients_match_the_oracle_and_every_element_is_written(
    path: str, parameters: dict[str, Any], poisoned: None
) -> None:
    case = Case(S=9, T=41, G=2, Dk=24, Dv=16)
    assert_gradients(case, case.gradients(path, {**parameters, "backward_rows": 16, "backward_item_rows": 16}))


@pytest.mark.parametrize("positions", [None, (3, 36, 0, 20, 11)])
def test_gradients_end_where_a_rows_limit_does(positions: tuple[int, ...] | None, poisoned: None) -> None:
    given = None if positions is None else torch.tensor(positions, device=DEVICE)
    case = Case(B=2, S=5, T=37, G=2, n=3, lengths=(21, 37), query_positions=given)
    assert_gradients(case, case.gradients("triton_token", {"order": "group", "backward_rows": 16}))


@pytest.mark.parametrize("changed", ["indices", "context_length", "query_positions"])
def test_a_selection_that_changed_in_place_since_the_forward_has_no_gradients(changed: str) -> None:
    positions = torch.tensor((3, 8, 20), device=DEVICE)
    case = Case(B=2, S=3, T=37, lengths=(21, 37), query_positions=positions)
    leaf = case.query.requires_grad_()
    out = case.run("triton_token", {})
    getattr(case.selection, changed).sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaf)


def test_derivatives_in_forward_mode_are_refused_by_torch_and_not_lost() -> None:
    case = Case(S=3)
    window = Selection.window(5, rows=(1, 3, 1), context_length=39, device=DEVICE)
    for path, selection in (("triton_token", case.selection), ("triton_window", window)):
        call = partial(nsa.selection_attention, key=case.key, value=case.value, selection=selection, path=path)
        for _ in range(3):  # until the call is bound
            call(case.query)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            call(forward_ad.make_dual(case.query, torch.ones_like(case.query)))


@pytest.mark.parametrize(
    ("heads", "width", "rows"),
    [(16, 64, 64), (3, 96, 64), (1, 32, 128), (4, 192, 16), (2, 112, 32), (2, 24, 64), (4, 176, 64)],
)
def test_partials_as_the_tensor_core_holds_them_add_up(heads: int, width: int, rows: int, poisoned: None) -> None:
    case = Case(S=21, T=41, G=2, h=heads, Dk=width, Dv=16)
    case.key = case.key * 0.25  # scores as at a usual scale
    parameters = {"order": "group", "backward_rows": rows, "backward_item_rows": 64}
    assert_gradients(case, case.gradients("triton_token", parameters))


@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
@pytest.mark.parametrize(("path", "more"), [("triton_union", {"tokens": 4}), ("triton_token", {})])
def test_steps_of_part_of_a_block_change_nothing(path: str, more: dict[str, Any], loads: str) -> None:
    case = Case(S=6, T=75, block_size=32, n=3)
    assert_matches(case, path, {**more, "step": 16, "loads": loads})


def test_a_program_takes_as_many_tokens_as_there_are_at_most_and_one_by_default() -> None:
    for queries, ladder in ((1, (1,)), (2, (1, 2)), (7, (1, 2, 4))):
        problem = problem_of(Case(S=queries), "decode" if queries == 1 else "prefill")
        tokens = next(item for item in PATHS["triton_token"].tunables(problem, DEVICE) if item.name == "tokens")
        assert (tokens.ladder, tokens.default) == (ladder, 1)


@pytest.mark.parametrize(("queries", "tokens", "programs"), [(7, 1, 28), (7, 2, 16), (7, 4, 8), (8, 4, 8)])
def test_a_grid_has_a_program_for_every_few_tokens(queries: int, tokens: int, programs: int) -> None:
    case = Case(S=queries, B=2, G=2)
    before = noted.set(notes := Notes())
    case.run("triton_token", {"tokens": tokens})
    noted.reset(before)
    assert [grid for _, grid, _ in notes.launches] == [programs]


def test_a_call_is_known_by_what_kernels_are_compiled_for() -> None:
    case, other = Case(S=4, T=40), Case(S=4, T=40, Dk=24)
    inputs = [(c.query, c.key, c.value, c.selection) for c in (case, other)]
    shifted = torch.cat((case.query.flatten(), case.query.flatten()[:1]))[1:].view(case.query.shape)
    assert call_key(*inputs[0]) == call_key(*inputs[0])
    assert call_key(*inputs[0]) != call_key(*inputs[1])
    assert call_key(*inputs[0]) != call_key(shifted, *inputs[0][1:])
    assert call_key(*inputs[0], 2) != call_key(*inputs[0], 4)


def test_block_spans_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invert, "BITMAP_TOKENS", 32)
    assert_matches(Case(S=131, T=131, h=1, n=3), "triton_block", {"span": 32, "rows": 16, "item_rows": 16})


def test_block_partials_live_in_the_workspace() -> None:
    case, workspace = Case(), Workspace()
    first = case.run("triton_block", SMALL_BLOCK, workspace=workspace)
    growths = workspace.growths
    workspace.poison()
    assert torch.equal(first, case.run("triton_block", SMALL_BLOCK, workspace=workspace))
    assert workspace.growths == growths
    assert set(workspace.report().buffers) == {"triton_block.part", "triton_block.stat"}


def test_gradients_of_several_spans_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invert, "BITMAP_TOKENS", 32)
    case = Case(S=70, T=70, h=1, n=3)
    rest = {"order": "group", "backward_rows": 16, "backward_item_rows": 32}
    for span, walk_bytes in ((0, 2**25), (32, 1), (0, 1), (64, 1)):
        monkeypatch.setattr(gradient, "WALK_BYTES", walk_bytes)
        assert_gradients(case, case.gradients("triton_token", {**rest, "backward_span": span}))


@every_path
def test_two_calls_give_the_same_bits(path: str, parameters: dict[str, Any]) -> None:
    case = Case(S=4)
    assert torch.equal(case.run(path, parameters), case.run(path, parameters))
    for one, two in zip(case.gradients(path, parameters), case.gradients(path, parameters), strict=True):
        assert torch.equal(one, two)


@pytest.mark.gpu
@every_path
def test_graph_replays_read_what_stands_there_then(path: str, parameters: dict[str, Any]) -> None:
    case, other = Case(), Case(seed=1)
    for _ in range(2):
        case.run(path, parameters)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(path, parameters)
    for source in (case, other, case):
        for name in ("query", "key", "value"):
            getattr(case, name).copy_(getattr(source, name).clone())
        case.selection.indices.copy_(source.selection.indices.clone())
        graph.replay()
        assert torch.equal(out, case.run(path, parameters))


@pytest.mark.gpu
@every_path
def test_offsets_beyond_32_bits_are_followed(path: str, parameters: dict[str, Any]) -> None:
    """Queries spread over 6.4 GB: the last one lies 3.2e9 elements behind the first."""
    case = Case(S=96, T=96, h=4, dtype=torch.bfloat16)
    memory = torch.empty(96 * 2**25, dtype=torch.bfloat16, device=DEVICE)
    far = memory.as_strided(case.query.shape, (0, 2**25, *case.query.stride()[2:]))
    far.copy_(case.query)
    plain = case.run(path, parameters), case.gradients(path, parameters)
    case.query = far
    spread = case.run(path, parameters), case.gradients(path, parameters)
    assert torch.equal(plain[0], spread[0])
    for one, two in zip(plain[1], spread[1], strict=True):
        assert torch.equal(one, two)


def test_a_stream_keeps_its_counters_however_large_the_partial_rows_are() -> None:
    large = decode.KEPT_BYTES // 4 + 1
    (part, counters), held = decode.grown(None, 2000, large, DEVICE)
    assert (part.numel(), counters.numel(), counters.any()) == (large, 2000, False)
    assert held[1] is counters
    assert held[0].numel() == 0
    counters[0] = 7  # whatever a launch left: nobody zeroes them again
    for elements, kept in ((large, 0), (40, 40), (30, 40)):
        (part, again), held = decode.grown(held, 10, elements, DEVICE)
        assert again is counters
        assert held[1] is counters
        assert part.numel() >= elements
        assert held[0].numel() == kept
    assert counters[0] == 7


def test_decode_leaves_its_counters_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    parts = torch.empty(2**16, device=DEVICE)
    monkeypatch.setattr(decode, "scratch", lambda rows, elements, like: (parts[:elements], held))
    case = Case(S=1, B=3, lengths=(39, 5, 17))
    for _ in range(2):
        assert_matches(case, "triton_decode", {"splits": 4})
        assert not held.any()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 5), st.sampled_from([0, 32, 64]), st.integers(0, 1000))
def test_inverted_lists_hold_every_pair_once_sorted_by_block(tokens: int, slots: int, span: int, seed: int) -> None:
    case = Case(S=tokens, T=max(tokens, 20), n=slots, seed=seed, h=1)
    usual, invert.BITMAP_TOKENS = invert.BITMAP_TOKENS, 32
    try:
        lists = invert.invert(case.selection, case.key.shape[2], span=span, item_tokens=4, placed=True)
    finally:
        invert.BITMAP_TOKENS = usual
    padded = support.padded(slots)
    wanted = set()
    limits, blocks = case.selection.limits[0].tolist(), case.selection.blocks[0, :, 0].tolist()
    for s, row in enumerate(blocks):
        for i, block in enumerate(row):
            if block >= 0 and block * 16 < limits[s] and block not in row[:i]:
                wanted.add((block, s, i))
    found = []
    pairs, items = lists.pairs.view(lists.spans, -1), lists.items.view(lists.spans, -1, 3)
    assert lists.places is not None
    places = lists.places.tolist()
    for unit in range(lists.spans):
        members = []
        for block, first, end in items[unit, : int(lists.item_count[unit])].tolist():
            assert 0 < end - first <= 4
            assert [places[pair] for pair in pairs[unit, first:end].tolist()] == list(range(first, end))
            members += [(block, int(p) // padded, int(p) % padded) for p in pairs[unit, first:end]]
        assert members == sorted(members)
        found += members
    assert len(found) == len(wanted)
    assert set(found) == wanted


def problem_of(case: Case, mode: Any, **changes: Any) -> SelectionProblem:
    """The dispatch problem of a case."""
    batch, queries, groups, heads, width = case.query.shape
    fields = {
        "B": batch, "S": queries, "T": case.key.shape[2], "G": groups, "h": heads, "Dk": width,
        "Dv": case.value.shape[3], "block_size": case.selection.block_size, "topk": case.selection.indices.shape[3],
        "dtype": "float32", "mode": mode,
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


@pytest.mark.parametrize("path", ["triton_token", "triton_union", "triton_block", "triton_decode"])
def test_what_cannot_run_is_said_before_and_defaults_stand_on_their_ladders(path: str) -> None:
    case = Case(h=16)
    wide = {"dtype": "float32", "Dk": 256, "Dv": 256, "block_size": 128}
    for changes, word in (
        ({"form": "ranges", "block_size": 0}, "blocks"),
        ({"dtype": "float64"}, "float64"),
        ({"block_size": 48}, "block_size"),
        ({"Dk": 288}, "256"),
        ({"topk": 65}, "topk"),
        (wide, "shared memory"),
    ):
        most = {"stages": 4, "step": 128} if path == "triton_union" else {"stages": 4}
        reason = PATHS[path].unsupported_reason(problem_of(case, "prefill", **changes), DEVICE, most)
        assert reason is not None
        assert word in reason
    if DEVICE.type == "cpu":
        assert PATHS[path].unsupported_reason(problem_of(case, "prefill"), torch.device("meta"), {}) is not None
    for parameter in PATHS[path].tunables(problem_of(case, "train"), DEVICE):
        assert parameter.default in parameter.ladder
    assert PATHS[path].unsupported_reason(
        problem_of(case, "train"), DEVICE, PATHS[path].defaults(problem_of(case, "train"), DEVICE)
    ) is None  # fmt: skip


@pytest.mark.parametrize("path", ["triton_token", "triton_union", "triton_block", "triton_decode"])
def test_in_train_and_only_there_a_path_declares_the_kernels_of_its_backward(path: str) -> None:
    case, cuda = Case(h=16), torch.device("cuda")
    for mode in ("prefill", "train"):
        problem = problem_of(case, mode)
        declared = PATHS[path].evidence(problem, cuda, PATHS[path].defaults(problem, DEVICE), [39]).required
        assert support.KERNELS[path] in declared
        for name in support.BACKWARD:
            assert callable(getattr(gradient, name))
            assert (rf"^{name}$" in declared) == (mode == "train")


def test_a_layout_that_cannot_be_loaded_is_refused_not_copied() -> None:
    case = Case(S=2)
    case.key = torch.cat((case.key, case.key[..., :1]), -1)[..., :16]
    assert_matches(case, "triton_token", {})
    with pytest.raises(UnsupportedPathError, match="16 bytes"):
        case.run("triton_token", {"loads": "descriptor"})
    case.query = case.query.transpose(3, 4).contiguous().transpose(3, 4)
    with pytest.raises(ArgumentError, match="contiguous"):
        case.run("triton_token", {})
