"""The fused decode step is the layer; where there is no GPU in Triton's interpreter, half a second a step."""

from __future__ import annotations

import copy
import pickle

import msgspec
import pytest
import torch
from torch import Tensor

from tests.interpreter import prepare

INTERPRETED = prepare()

import nsa.attention  # noqa: E402  kernels load Triton, which asks for its mode once
from nsa import step  # noqa: E402
from nsa.attention import NSAAttention, NSAConfig  # noqa: E402
from nsa.cache import BRANCHES, NSACache  # noqa: E402
from nsa.decode import DecodeGraph, graph_key  # noqa: E402
from nsa.errors import ArgumentError, FlagError, ReserveError, UnsupportedPathError  # noqa: E402
from nsa.flags import Flags, read_flags  # noqa: E402
from nsa.scoring import block_scores  # noqa: E402
from nsa.step import FusedStep, StepParameters, step_of  # noqa: E402
from nsa.trace import record_paths  # noqa: E402

from .reference_layer import Reference, bound, cast, reference_layer  # noqa: E402
from .test_attention import Operators, agreement_bound, assert_within  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SMALL = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "topk": 3, "window_size": 9}
SHAPES = {
    "mean": {"dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "mlp": {"dim": 10, "num_heads": 3, "num_kv_heads": 1, "head_dim": 8, "value_head_dim": 6, "compression": "mlp"},
}


def layer_of(name: str, dtype: torch.dtype = torch.float32, flags: Flags | None = None, **sizes) -> NSAAttention:
    torch.manual_seed(3)
    layer = NSAAttention(NSAConfig(**{**SMALL, **SHAPES[name], **sizes}), flags=flags or Flags(), dtype=dtype)
    with torch.no_grad():
        layer.gate_bias.uniform_(-1, 1)
    return layer.to(DEVICE)


def tokens(batch: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(batch + length)).to(DEVICE, dtype)


def chosen(cache: NSACache) -> list[set[int]]:
    """The blocks of each row (b, g) that the last fused step read."""
    assert isinstance(cache.plan, FusedStep)
    return [set(row) - {-1} for row in cache.plan.picks.tolist()]


def reference(layer: NSAAttention, x: Tensor, dtype: torch.dtype) -> Reference:
    """The loop reference, on the CPU."""
    weights = {name: weight.cpu() for name, weight in layer.state_dict().items()}
    return reference_layer(layer.config, cast(weights, dtype), x.cpu().to(dtype))


def fused(layer: NSAAttention, x: Tensor, cache: NSACache, **options) -> Tensor:
    """Steps over x; unwritten room is NaN throughout, and so is the scratch memory of every step."""
    outs = []
    for t in range(x.shape[1]):
        cache.poison()
        if isinstance(cache.plan, FusedStep):
            for scratch in (cache.plan.part, cache.plan.top, cache.plan.total, cache.plan.scores, cache.plan.mixed):
                scratch.fill_(float("nan"))
        outs.append(layer.decode(x[:, t : t + 1], cache, route="fused", **options)[0])
    return torch.cat(outs, 1)


@pytest.mark.parametrize("page_size", [0, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_steps_from_an_empty_cache_choose_the_references_blocks_and_match_its_output(name, page_size):
    layer = layer_of(name)
    x = tokens(1, 37, layer.config.dim)
    eager, oracle = (reference(layer, x, dtype) for dtype in (torch.float32, torch.float64))
    cache = layer.empty_cache(1, capacity=4, device=DEVICE, page_size=page_size)
    outs = []
    for t in range(x.shape[1]):
        outs.append(fused(layer, x[:, t : t + 1], cache))
        for g, blocks in enumerate(chosen(cache)):
            assert blocks == set(oracle.blocks[0, t, g]), (t, g)
    assert_within(torch.cat(outs, 1).cpu(), eager.y, oracle.y, "y")
    assert (cache.length, cache.compressed_length, cache.lengths.tolist()) == (37, 8, [37])
    assert cache.generation >= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_steps_stay_within_the_bound_of_float64(dtype):
    """topk covers every block here: in 16 bits the choice itself may differ, which tests of scoring count."""
    layer = layer_of("mean", dtype, topk=8)
    x = tokens(1, 22, 12, dtype)
    got = fused(layer, x, layer.empty_cache(1, capacity=22, device=DEVICE)).cpu()
    assert_within(got, reference(layer, x, dtype).y, reference(layer, x, torch.float64).y, "decode")


def test_steps_behind_a_prefill_equal_the_prefill_of_all_and_choose_the_branches_blocks(monkeypatch):
    layer = layer_of("mean")
    x = tokens(2, 70, 12)
    whole, _ = layer.prefill(x)
    wanted = []
    original = nsa.attention.choose_blocks
    monkeypatch.setattr(
        nsa.attention, "choose_blocks", lambda *args, **sizes: wanted.append(original(*args, **sizes)) or wanted[-1]
    )
    for start in (31, 66):
        y, cache = layer.prefill(x[:, :start])
        other = layer.prefill(x[:, :start])[1]
        parts = [y]
        for t in range(start, start + 4):
            parts.append(fused(layer, x[:, t : t + 1], cache))
            layer.decode(x[:, t : t + 1], other, route="branches")
            assert chosen(cache) == [set(row) - {-1} for row in wanted[-1].flatten(0, 2).tolist()]
        for branch in BRANCHES:
            key, expected = cache.key(branch), other.key(branch)
            assert float((key - expected).abs().max()) <= 4 * torch.finfo(key.dtype).eps * float(expected.abs().max())
        difference = (torch.cat(parts, 1) - whole[:, : start + 4]).abs().max()
        assert float(difference) <= agreement_bound(layer, x)


@pytest.mark.parametrize(
    ("kernel_size", "kernel_stride", "block_size"),
    [(8, 4, 16), (12, 4, 8), (8, 4, 4), (4, 4, 8), (4, 2, 32), (3, 1, 2), (32, 16, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if INTERPRETED else [torch.float32])
def test_sizes_of_kernel_stride_and_block_choose_what_choose_blocks_chooses(
    kernel_size, kernel_stride, block_size, dtype, monkeypatch
):
    sizes = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "block_size": block_size, "topk": 5}
    layer = layer_of("mean", dtype, **sizes)
    wanted = []
    original = nsa.attention.choose_blocks
    monkeypatch.setattr(
        nsa.attention, "choose_blocks", lambda *args, **sizes: wanted.append(original(*args, **sizes)) or wanted[-1]
    )
    for length in (1, kernel_size, 9 * block_size - 1, 12 * block_size + 1):
        x = tokens(1, length + 1, 12, dtype)
        cache, other = (layer.prefill(x[:, :length])[1] for _ in range(2))
        fused(layer, x[:, length:], cache)
        layer.decode(x[:, length:], other, route="branches")
        assert chosen(cache) == [set(row) - {-1} for row in wanted[-1].flatten(0, 2).tolist()], length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_block_left_out_scores_more_than_a_chosen_one_beyond_the_bound(dtype):
    """Of the stored queries and keys, against float64 scores; the eager error is that of ``block_scores``."""
    layer = layer_of("mean", dtype, block_size=16, topk=6)
    length, config = 500, layer.config
    cache = layer.empty_cache(2, capacity=length, device=DEVICE)
    for storage in (cache.keys, cache.values, cache.compressed_keys, cache.compressed_values):
        storage.copy_(torch.randn(storage.shape, generator=torch.Generator().manual_seed(1)))
    cache.advance(length - 1)
    cache.lengths.fill_(length - 1)
    fused(layer, tokens(2, 1, 12, dtype), cache)
    query = torch.unflatten(cache.plan.query, 0, (2, 1, config.num_kv_heads))
    sizes = {"kernel_size": config.kernel_size, "kernel_stride": config.kernel_stride, "block_size": 16}
    places = torch.full((2, 1), length - 1, device=DEVICE)
    exact, eager = (
        block_scores(query.to(wide), cache.compressed_key.to(wide), positions=places, blocks=32, **sizes)[:, 0].flatten(
            0, 1
        )
        for wide in (torch.float64, dtype)
    )
    limit = bound(float((eager - exact).abs().max()), torch.float32, float(exact.max()))
    for scores, blocks in zip(exact.tolist(), chosen(cache), strict=True):
        assert {0, 30, 31} <= blocks
        least = min(scores[block] for block in blocks - {0, 30, 31})
        assert max(score for block, score in enumerate(scores) if block not in blocks) <= least + 2 * limit
    assert limit < 1e-5 * float(exact.max())


def test_any_number_of_splits_and_any_tile_is_the_same_function():
    layer = layer_of("mean", block_size=16, topk=5)
    x = tokens(1, 150, 12)
    _, cache = layer.prefill(x[:, :149], capacity=160)
    expected = layer.prefill(x)[0][:, -1]
    for splits, selected, window, tile, choice, counted in (
        *((1, 1, 1, 16, 1, 0), (4, 8, 2, 16, 4, 0), (2, 2, 4, 32, 2, 4)),
        *((1, 1, 1, 16, 1, 16), (4, 8, 2, 16, 4, 64), (2, 2, 4, 32, 2, 256)),
    ):
        sizes = StepParameters(
            compressed_splits=splits, selected_splits=selected, window_splits=window, tile=tile, blocks_at_once=2,
            compressed_tile=16, choice_splits=choice, counted_blocks=counted,
        )  # fmt: skip
        cache.plan = None
        got = step_of(layer, cache, None, sizes).run(x[:, 149:])
        cache.lengths.fill_(149)
        assert float((got[:, 0] - expected).abs().max()) <= agreement_bound(layer, x)


@pytest.mark.parametrize("counted", [0, 256])
def test_ties_go_to_the_lower_block_and_forced_blocks_count_once(counted, monkeypatch):
    usual = step.default_parameters
    monkeypatch.setattr(
        step, "default_parameters", lambda *given: msgspec.structs.replace(usual(*given), counted_blocks=counted)
    )
    layer = layer_of("mean", topk=4)
    with torch.no_grad():
        layer.project.weight[: layer.widths[0]] = 0.0  # every score equal
    _, cache = layer.prefill(tokens(1, 71, 12))
    fused(layer, tokens(1, 1, 12), cache)
    assert chosen(cache) == [{0, 1, 7, 8}] * 2


def test_entries_of_different_lengths_equal_each_alone():
    layer = layer_of("mean")
    x = tokens(2, 40, 12)
    _, cache = layer.prefill(x[:, :30], capacity=40)
    cache.trim([30, 19])
    y = fused(layer, torch.stack((x[0, 30:33], x[1, 19:22])), cache)
    for entry, start in enumerate((30, 19)):
        _, alone = layer.prefill(x[entry : entry + 1, :start])
        expected = fused(layer, x[entry : entry + 1, start : start + 3], alone)
        assert float((y[entry : entry + 1] - expected).abs().max()) <= agreement_bound(layer, x)
    assert cache.lengths.tolist() == [33, 22]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache_takes_steps_of_its_own(copied):
    layer, x = layer_of("mean"), tokens(1, 14, 12)
    _, cache = layer.prefill(x[:, :12], capacity=16)
    fused(layer, x[:, 12:13], cache)
    other = copied(cache)
    assert other.plan is None
    expected = fused(layer, x[:, 13:], cache)
    assert torch.equal(fused(layer, x[:, 13:], other), expected)
    assert (other.length, cache.length) == (14, 14)


def test_a_step_that_the_branches_refuse_leaves_entries_of_different_lengths_as_they_were():
    layer = layer_of("mean")
    _, cache = layer.prefill(tokens(2, 30, 12))
    cache.trim([30, 19])
    with pytest.raises(ArgumentError, match="different lengths"):
        layer.decode(tokens(2, 1, 12), cache, route="branches")
    assert (cache.ragged, cache.length, cache.lengths.tolist()) == (True, 30, [30, 19])


@pytest.mark.parametrize("branch", BRANCHES)
def test_gates_forced_to_a_branch_run_that_branch_alone(branch):
    layer = layer_of("mean")
    x = tokens(1, 30, 12)
    _, cache = layer.prefill(x[:, :28])
    _, other = layer.prefill(x[:, :28])
    got = fused(layer, x[:, 28:], cache, branch=branch)
    with record_paths() as recorder:
        expected = torch.cat(
            [layer.decode(x[:, t : t + 1], other, route="branches", branch=branch)[0] for t in (28, 29)], 1
        )
    assert [record.operation for record in recorder.executed] == [branch, "decode"] * 2
    assert float((got - expected).abs().max()) <= agreement_bound(layer, x)
    names = [launch.kernel.fn.__name__ for launch in cache.plan.after]
    scored = ["nsa_step_compressed"] if branch != "window" else []
    read = {"compression": [], "selection": ["nsa_step_choose", "nsa_step_attend"], "window": ["nsa_step_attend"]}
    assert names == [*scored, *read[branch], "nsa_step_combine"]
    with torch.no_grad():
        layer.gate_bias.fill_(-1e4)
        layer.gate_bias[BRANCHES.index(branch) :: 3] = 1e4
    _, gated = layer.prefill(x[:, :28])
    assert float((fused(layer, x[:, 28:], gated) - got).abs().max()) <= agreement_bound(layer, x)


def test_a_distinctive_key_far_back_is_found_and_read():
    layer = layer_of("mean", topk=4)
    x = tokens(1, 131, 12)
    with torch.no_grad():
        layer.project.weight[layer.widths[0] :].mul_(0.1)
    _, cache = layer.prefill(x[:, :130], capacity=131)
    query = layer._split(layer.project(x[:, 130:]), 130)[0].mean(3)[0, 0].detach()  # (G, Dk)
    for needle in (4, 9):
        cache.trim([130])
        held = cache.compressed_keys.clone()
        cache.compressed_keys[0, :, 2 * needle] = 50 * query
        far = fused(layer, x[:, 130:], cache, branch="selection")
        assert all(needle in blocks for blocks in chosen(cache))
        cache.trim([130])
        cache.values[1, :, :, 8 * needle : 8 * needle + 8] += 100.0
        assert float((fused(layer, x[:, 130:], cache, branch="selection") - far).abs().max()) > 1.0
        cache.compressed_keys.copy_(held)


def test_a_token_changes_no_earlier_output_and_nothing_behind_the_end_is_read():
    layer = layer_of("mean")
    x = tokens(1, 20, 12)
    changed = x.clone()
    changed[:, 11] += 1.0
    first, second = (fused(layer, one, layer.empty_cache(1, capacity=20, device=DEVICE)) for one in (x, changed))
    assert torch.equal(first[:, :11], second[:, :11])
    assert (first[:, 11:] != second[:, 11:]).any(2).all()


def test_no_step_reads_a_tensor_on_the_host():
    layer = layer_of("mlp")
    cache = layer.empty_cache(1, capacity=16, device=DEVICE)
    x = tokens(1, 3, 10)
    step = step_of(layer, cache)
    step.before, step.after = [], []  # the interpreter itself reads pointers on the host
    with torch.no_grad(), Operators() as seen:
        step.run(x[:, :1])
        cache.advance()
    assert "aten.mm.default" in seen.names
    assert not {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"} & set(seen.names)


def test_a_route_is_a_choice_with_a_reason_and_a_forced_one_never_falls_back():
    x = tokens(1, 1, 12)
    layer = layer_of("mean")
    usual = "branches" if INTERPRETED else "fused"
    routes = (("auto", usual, "default"), ("fused", "fused", "forced"), ("branches", "branches", "forced"))
    for route, path, status in routes:
        with record_paths() as recorder:
            layer.decode(x, layer.empty_cache(1, capacity=1, device=DEVICE), route=route)
        record = recorder.executed[-1]
        assert (record.operation, record.path, record.status) == ("decode", path, status)
        assert record.reason
        assert len(recorder.executed) == (1 if path == "fused" else 4)
    double = layer.double()
    cache = double.empty_cache(1, capacity=1, device=DEVICE)
    with pytest.raises(UnsupportedPathError, match=r"fused has no torch\.float64"):
        double.decode(x.double(), cache, route="fused")


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"block_size": 12}, "block_size / kernel_stride to be 1, 2, 4, 8 or 16"),
        ({"kernel_size": 16}, "kernel_size up to block_size \\+ kernel_stride, got 8, 4, 16"),
        ({"topk": 65}, "topk and query heads per group up to 64, got 65 and 2"),
        ({"head_dim": 258}, "head dims up to 256, got 258"),
    ],
)
def test_sizes_that_the_fused_step_has_not_are_named_and_taken_by_the_branches(sizes, reason):
    layer = layer_of("mean", **sizes)
    cache = layer.empty_cache(1, capacity=4, device=DEVICE)
    with pytest.raises(UnsupportedPathError, match=reason):
        layer.decode(tokens(1, 1, 12), cache, route="fused")
    layer.decode(tokens(1, 1, 12), cache)
    assert cache.length == 1


@pytest.mark.parametrize("page_size", [0, 4])
def test_a_cache_that_grows_beyond_the_blocks_that_a_step_ranks_goes_on_by_branches(page_size, monkeypatch):
    monkeypatch.setattr("nsa.decode.MOST_BLOCKS", 2)
    layer, x = layer_of("mean"), tokens(1, 17, 12)
    _, cache = layer.prefill(x[:, :15], capacity=16, page_size=page_size)
    fused(layer, x[:, 15:16], cache)
    with pytest.raises(UnsupportedPathError, match="ranks up to 2 blocks, the cache has room for 32 tokens"):
        layer.decode(x[:, 16:], cache, route="fused")
    y, _ = layer.decode(x[:, 16:], cache)
    assert float((y - layer(x)[:, 16:].detach()).abs().max()) <= agreement_bound(layer, x)


def test_autocast_decodes_by_branches():
    layer = layer_of("mean")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cache = layer.empty_cache(1, capacity=4, device=DEVICE)
        with pytest.raises(UnsupportedPathError, match="under autocast"):
            layer.decode(tokens(1, 1, 12), cache, route="fused")
        layer.decode(tokens(1, 1, 12), cache)
    assert cache.key("window").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("environ", "path", "reason"),
    [
        ({"NSA_USE_FUSED_DECODE": "1"}, "fused", "asked for by flag"),
        ({"NSA_USE_FUSED_DECODE": "0"}, "branches", "asked for by flag"),
        ({"NSA_USE_SEL_PACK": "1"}, "branches", "flags force selection path packed"),
        ({"NSA_USE_FA2_WIN": "0"}, "branches", "NSA_USE_FA2_WIN steers the branches"),
        ({"NSA_SEL_RANGES_V2": "0"}, "branches", "NSA_SEL_RANGES_V2=0"),
    ],
)
def test_flags_steer_the_route(environ, path, reason):
    layer = layer_of("mean", flags=read_flags(environ))
    with record_paths() as recorder:
        layer.decode(tokens(1, 1, 12), layer.empty_cache(1, capacity=1, device=DEVICE))
    assert recorder.executed[-1].path == path
    assert reason in recorder.executed[-1].reason


def test_a_flag_that_forces_the_fused_step_contradicts_one_that_forces_a_path():
    with pytest.raises(FlagError, match="NSA_USE_FUSED_DECODE=1 contradicts NSA_USE_SEL_VARLEN=1"):
        read_flags({"NSA_USE_FUSED_DECODE": "1", "NSA_USE_SEL_VARLEN": "1"})


def test_a_failed_step_leaves_the_cache_as_it_was(monkeypatch):
    layer = layer_of("mean")
    _, cache = layer.prefill(tokens(1, 12, 12))
    x = tokens(1, 1, 12)
    monkeypatch.setattr(FusedStep, "run", lambda self, x: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        layer.decode(x, cache, route="fused")
    assert (cache.length, cache.compressed_length, cache.lengths.tolist()) == (12, 2, [12])


def test_a_step_that_fails_behind_its_kernels_counts_no_token_on_the_device(monkeypatch):
    layer, x, plain = layer_of("mean"), tokens(2, 1, 12), torch.mm
    _, cache = layer.prefill(tokens(2, 12, 12), capacity=16)
    cache.trim([12, 9])

    def fails(left: Tensor, right: Tensor, **options) -> Tensor:
        if not options:  # the last product
            raise RuntimeError("no memory")
        return plain(left, right, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            layer.decode(x, cache, route="fused")
    assert (cache.length, cache.lengths.tolist(), cache.ragged) == (12, [12, 9], True)


@pytest.mark.parametrize("name", ["project.weight", "gate_bias", "output.weight", "compress_value.hidden.bias"])
def test_what_a_graph_is_captured_for_changes_where_a_weight_moves(name):
    layer = layer_of("mlp")
    _, cache = layer.prefill(tokens(1, 12, 10))
    before = graph_key(layer, cache, None, None)
    assert graph_key(layer, cache, None, None) == before
    weight = layer.get_parameter(name)
    weight.data = weight.data.clone()
    assert graph_key(layer, cache, None, None) != before


@pytest.mark.parametrize("name", ["project", "output"])
def test_an_adapter_around_a_projection_is_never_left_out(name):
    class Adapted(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    layer, x = layer_of("mean"), tokens(1, 13, 12)
    plain = getattr(layer, name)
    _, cache = layer.prefill(x[:, :11], capacity=16)
    fused(layer, x[:, 11:12], cache)
    adapted = Adapted(plain.in_features, plain.out_features, bias=False, device=DEVICE)
    adapted.weight = plain.weight
    setattr(layer, name, adapted)
    with pytest.raises(UnsupportedPathError, match=r"nn\.Linear, got .*Adapted"):
        layer.decode(x[:, 12:], cache, route="fused")


def test_a_graph_without_cuda_is_refused():
    if INTERPRETED:
        layer = layer_of("mean")
        with pytest.raises(UnsupportedPathError, match="needs a CUDA device"):
            DecodeGraph(layer, layer.empty_cache(1, capacity=4, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_replays_equal_eager_steps_bit_for_bit_through_growth(name, page_size):
    layer = layer_of(name)
    x = tokens(2, 60, layer.config.dim)
    eager, replayed = (layer.empty_cache(2, capacity=8, device=DEVICE, page_size=page_size) for _ in range(2))
    graph = DecodeGraph(layer, replayed)
    for t in range(x.shape[1]):
        expected, _ = layer.decode(x[:, t : t + 1], eager, route="fused")
        with record_paths() as recorder:
            got = graph.step(x[:, t : t + 1])
        assert torch.equal(got, expected)
        assert recorder.executed[0].parameters["graph"] is True
    assert 2 <= graph.captures <= 8
    assert (replayed.length, replayed.lengths.tolist()) == (60, [60, 60])


@pytest.mark.gpu
def test_many_steps_fit_one_graph():
    layer = layer_of("mean", torch.bfloat16)
    x = tokens(1, 12, 12, torch.bfloat16)
    expected = fused(layer, x, layer.empty_cache(1, capacity=16, device=DEVICE))
    cache = layer.empty_cache(1, capacity=16, device=DEVICE)
    step = step_of(layer, cache)
    step.run(x[:, :1])
    cache.lengths.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outs = [step.run(x[:, t : t + 1]) for t in range(12)]
    graph.replay()
    cache.advance(12)
    assert torch.equal(torch.cat(outs, 1), expected)
    with pytest.raises(ReserveError):
        cache.advance(5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_never_synchronises(name):
    layer = layer_of(name)
    x = tokens(1, 1, layer.config.dim)
    cache = layer.empty_cache(1, capacity=32, device=DEVICE)
    graph = DecodeGraph(layer, layer.empty_cache(1, capacity=32, device=DEVICE))
    layer.decode(x, cache, route="fused")
    graph.step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            layer.decode(x, cache, route="fused")
            graph.step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_growth_under_capture_is_refused():
    layer = layer_of("mean")
    x = tokens(1, 1, 12)
    cache = layer.empty_cache(1, capacity=1, device=DEVICE)
    layer.decode(x, cache, route="fused")
    with pytest.raises(ReserveError, match="while a CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer.decode(x, cache, route="fused")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_64k_a_needle_is_found_at_the_default_sizes(dtype):
    torch.manual_seed(0)
    config = NSAConfig(dim=256, num_heads=8, num_kv_heads=2, head_dim=32)
    layer = NSAAttention(config, flags=Flags(), dtype=dtype, device=DEVICE)
    cache = layer.empty_cache(1, capacity=65537, device=DEVICE)
    for storage in (cache.keys, cache.values, cache.compressed_keys, cache.compressed_values):
        storage.normal_()
    cache.advance(65536)
    x = torch.randn(1, 1, 256, device=DEVICE, dtype=dtype)
    query = layer._split(layer.project(x), 65536)[0].mean(3)[0, 0]
    for needle in (1, 500, 1020):
        cache.compressed_keys[0, :, 4 * needle] = 40 * query
        cache.lengths.fill_(65536)
        step_of(layer, cache).run(x)
        assert all(needle in blocks for blocks in chosen(cache))
