"""The layer equals the loop reference, forward and backward, and prefill, sequential and decode are one function."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nsa.attention
from nsa.attention import NSAAttention, NSAConfig, shared_workspace
from nsa.device import device_identity, software_identity
from nsa.dispatch import use_dispatch_table
from nsa.dispatch_table import DispatchTable
from nsa.errors import ArgumentError, NSAError, UnsupportedPathError
from nsa.flags import Flags
from nsa.trace import record_paths
from nsa.workspace import Workspace

from .reference_layer import bound, cast, reference_layer

SMALL = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "topk": 4, "window_size": 9}
SHAPES = {
    "h1": {"dim": 12, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8},
    "h4": {"dim": 12, "num_heads": 8, "num_kv_heads": 2, "head_dim": 8},
    "Dv": {"dim": 10, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "value_head_dim": 6},
    "mlp": {"dim": 10, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "value_head_dim": 4, "compression": "mlp"},
}


class Operators(TorchDispatchMode):
    """Names of all operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_table():
    """Whatever tables this machine has, these tests dispatch by defaults."""
    with use_dispatch_table(DispatchTable(device=device_identity("cpu"), software=software_identity())):
        yield


def layer_of(name: str, dtype: torch.dtype = torch.float32, flags: Flags | None = None, **sizes) -> NSAAttention:
    torch.manual_seed(3)
    config = NSAConfig(**{**SMALL, **SHAPES[name], **sizes})
    return NSAAttention(config, dtype=dtype, flags=flags or Flags(), workspace=Workspace())


def tokens(batch: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(batch + length)).to(dtype)


def one_by_one(layer: NSAAttention, x: Tensor, start: int) -> Tensor:
    """Prefill of the first ``start`` tokens, then decode; the cache's unwritten room is NaN throughout."""
    y, cache = layer.prefill(x[:, :start])
    parts = [y]
    for t in range(start, x.shape[1]):
        cache.poison()
        same = cache
        y, cache = layer.decode(x[:, t : t + 1], cache)
        assert cache is same
        parts.append(y)
    assert cache.length == x.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_gradients_match_the_loop_reference(name):
    layer = layer_of(name)
    x = tokens(2, 27, layer.config.dim)
    pull = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results, gradients = {}, {}
    for dtype in (torch.float64, torch.float32):
        weights = cast(layer.state_dict(), dtype, grad=True)
        inputs = x.to(dtype).clone().requires_grad_()
        results[dtype] = reference_layer(layer.config, weights, inputs).y
        (results[dtype] * pull.to(dtype)).sum().backward()
        gradients[dtype] = {"x": inputs.grad, **{name: weight.grad for name, weight in weights.items()}}
    inputs = x.clone().requires_grad_()
    y = layer(inputs)
    (y * pull).sum().backward()
    mine = {"x": inputs.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
    assert_within(y, results[torch.float32], results[torch.float64], "y")
    assert mine.keys() == gradients[torch.float64].keys()
    assert_gradients_within(mine, gradients[torch.float32], gradients[torch.float64])


def assert_within(got: Tensor, eager: Tensor, oracle: Tensor, what: str) -> None:
    """The design's bound. For float64 the eager error is float32's, scaled: the oracle itself is float64."""
    error = float((eager.detach().double() - oracle.detach()).abs().max())
    if got.dtype == torch.float64:
        error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    limit = bound(error, got.dtype, float(oracle.detach().abs().max()))
    mine = float((got.detach().double() - oracle.detach()).abs().max())
    assert mine <= limit, f"{what}: error {mine}, bound {limit}"


def assert_gradients_within(mine: dict[str, Tensor], eager: dict[str, Tensor], oracle: dict[str, Tensor]) -> None:
    """The bound relative to each tensor's largest entry, over all tensors of the pass: of one small tensor the eager
    error is too few samples (2.06 times it was seen on one of 80 entries, whose sums merely ran in another order).
    """
    scales = {name: float(gradient.abs().max()) for name, gradient in oracle.items()}
    errors = {name: float((eager[name].double() - oracle[name]).abs().max()) / scales[name] for name in oracle}
    limit = bound(max(errors.values()), torch.float32, 1.0)
    for name, gradient in mine.items():
        error = float((gradient.double() - oracle[name]).abs().max()) / scales[name]
        assert 0 < error <= limit, f"{name}: error {error}, bound {limit}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["Dv", "mlp"])
def test_prefill_sequential_and_decode_choose_the_references_blocks_and_match_its_output(name, dtype, monkeypatch):
    layer = layer_of(name, dtype)
    length = 2 * layer.config.window_size + 3
    x = tokens(2, length, layer.config.dim, dtype)
    eager = reference_layer(layer.config, cast(layer.state_dict(), torch.float32), x.float())
    oracle = reference_layer(layer.config, cast(layer.state_dict(), torch.float64), x.double())
    chosen = []
    original = nsa.attention.choose_blocks
    monkeypatch.setattr(
        nsa.attention, "choose_blocks", lambda *args, **sizes: chosen.append(original(*args, **sizes)) or chosen[-1]
    )
    for start in (length, 1, 7, 8, 10):  # one call; token by token; around kernel_size; across the window's edge
        chosen.clear()
        assert_within(one_by_one(layer, x, start), eager.y, oracle.y, f"start {start}")
        blocks = torch.cat(chosen, 1)
        for (b, t, g), expected in oracle.blocks.items():
            assert [j for j in blocks[b, t, g].tolist() if j >= 0] == expected, (start, b, t, g)


def agreement_bound(layer: NSAAttention, x: Tensor) -> float:
    """Two calls that are each within the bound of the oracle differ by twice the bound; the eager error is taken
    from a float64 twin of the layer, which other tests hold against the loops."""
    twin = NSAAttention(layer.config, dtype=torch.float64, flags=Flags(), device=x.device)
    twin.load_state_dict(cast(layer.state_dict(), torch.float64))
    oracle = twin(x.double()).detach()
    eager = layer(x).detach()
    return 2 * bound(float((eager.double() - oracle).abs().max()), x.dtype, float(oracle.abs().max()))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 11, 12, 16, 17, 21])
def test_prefill_equals_forward_equals_decode_at_every_length(length):
    layer = layer_of("Dv")
    x = tokens(2, length, layer.config.dim)
    limit = agreement_bound(layer, x)
    whole, cache = layer.prefill(x)
    assert cache.length == length
    assert cache.compressed_length == max(0, (length - 8) // 4 + 1)
    for other in (layer(x).detach(), one_by_one(layer, x, 1), one_by_one(layer, x, max(1, length - 3))):
        assert float((other - whole).abs().max()) <= limit


def test_the_default_sizes_agree_beyond_twice_the_window():
    config = NSAConfig(dim=8, num_heads=2, num_kv_heads=1, head_dim=4)
    torch.manual_seed(0)
    layer = NSAAttention(config, flags=Flags())
    x = tokens(1, 2 * config.window_size + 3, 8)
    limit = agreement_bound(layer, x)
    whole, _ = layer.prefill(x)
    for start in (1, 31, 32, 63, 511, 513, 1020):
        y, cache = layer.prefill(x[:, :start], capacity=start + 4)
        parts = [y]
        for t in range(start, start + 4):
            y, cache = layer.decode(x[:, t : t + 1], cache)
            parts.append(y)
        assert float((torch.cat(parts, 1) - whole[:, : start + 4]).abs().max()) <= limit


def test_before_the_first_complete_kernel_the_compression_branch_is_exactly_zero(monkeypatch):
    layer = layer_of("h4")
    seen = []
    original = nsa.attention.compressed_attention
    monkeypatch.setattr(
        nsa.attention, "compressed_attention", lambda *args, **sizes: seen.append(original(*args, **sizes)) or seen[-1]
    )
    layer.prefill(tokens(1, 20, 12))
    assert (seen[0][:, :7] == 0).all()
    assert (seen[0][:, 7:] != 0).any(-1).all()


def test_the_three_branches_have_their_own_keys_and_values():
    layer = layer_of("h4")
    x = tokens(1, 20, 12)
    before = layer(x)
    for weight in layer.project.weight.detach().split(layer.widths)[1:7]:
        weight.mul_(2)
        assert not torch.equal(layer(x), before)
        weight.div_(2)
    assert torch.equal(layer(x), before)


def test_a_gate_is_one_number_per_head_and_branch():
    layer = layer_of("h4")
    x = tokens(1, 20, 12)
    assert layer.gate_bias.shape == (8 * 3,)
    with torch.no_grad():
        layer.project.weight[-8 * 3 :] = 0.0
        layer.gate_bias.fill_(-1e4)
        assert (layer(x) == 0).all()
        layer.gate_bias[3 * 5 + 2] = 1e4  # head 5, window
        layer.output.weight.copy_(torch.zeros_like(layer.output.weight))
        layer.output.weight[0, 5 * 8 : 6 * 8] = 1.0
        assert (layer(x)[..., 0] != 0).all()


@pytest.mark.parametrize("mode", ["forward", "prefill", "decode"])
def test_every_branch_reports_what_ran(mode):
    layer = layer_of("h4")
    x = tokens(1, 12, 12)
    _, cache = layer.prefill(x)
    with record_paths() as recorder:
        if mode == "forward":
            layer(x)
        elif mode == "prefill":
            layer.prefill(x)
        else:
            layer.decode(x[:, :1], cache)
    assert [(record.operation, record.path) for record in recorder.executed] == [
        ("window", "sdpa_window"),
        ("compression", "sdpa_compressed"),
        ("selection", "gather" if mode == "decode" else "dense"),
        *([("decode", "branches")] if mode == "decode" else []),
    ]
    assert all(record.status == "default" and record.reason for record in recorder.executed)


def test_layers_share_one_workspace_per_device_unless_given_one():
    torch.manual_seed(0)
    config = NSAConfig(**SMALL, **SHAPES["h4"])
    flags = Flags(path="varlen", reserves={"varlen": {"reserve_rows": 64, "reserve_keys": 4096}})
    first, second = (NSAAttention(config, flags=flags) for _ in range(2))
    first.prefill(tokens(1, 12, 12))
    shared = shared_workspace(torch.device("cpu"))
    growths, held = shared.growths, shared.bytes
    assert held >= 4096 * 8 * 4 * 2
    second.prefill(tokens(1, 12, 12))
    assert (shared.growths, shared.bytes) == (growths, held)
    own = Workspace()
    NSAAttention(config, flags=flags, workspace=own).prefill(tokens(1, 12, 12))
    assert own.bytes > 0
    assert shared.growths == growths


def test_a_reserve_never_changes_the_output():
    x = tokens(2, 21, 12)
    plain, _ = layer_of("h4", flags=Flags(path="packed")).prefill(x)
    for rows, length in ((1, 1), (1000, 64)):
        flags = Flags(path="packed", reserves={"packed": {"reserve_rows": rows, "reserve_length": length}})
        assert torch.equal(layer_of("h4", flags=flags).prefill(x)[0], plain)


def test_a_failed_decode_leaves_the_cache_as_it_was():
    layer = layer_of("h4")
    x = tokens(1, 12, 12)
    whole, _ = layer.prefill(x)
    _, cache = layer.prefill(x[:, :11])
    layer.flags = Flags(path="flex", ranges_v2=False)
    with pytest.raises(UnsupportedPathError, match="needs blocks"):
        layer.decode(x[:, 11:], cache)
    assert (cache.length, cache.compressed_length) == (11, 1)
    layer.flags = Flags()
    y, _ = layer.decode(x[:, 11:], cache)
    assert float((y - whole[:, 11:]).abs().max()) <= agreement_bound(layer, x)


def test_neither_prefill_nor_decode_reads_a_tensor_on_the_host():
    layer = layer_of("mlp", flags=Flags(path="gather"))
    with Operators() as seen:
        _, cache = layer.prefill(tokens(1, 12, 10))
        layer.decode(tokens(1, 1, 10), cache)
    assert "aten.topk.default" in seen.names
    assert not {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"} & set(seen.names)


def test_prefill_and_decode_keep_no_graph():
    layer = layer_of("mlp")
    y, cache = layer.prefill(tokens(1, 9, 10))
    z, _ = layer.decode(tokens(1, 1, 10), cache)
    assert not y.requires_grad
    assert not z.requires_grad
    assert not cache.key("selection").requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_layers_stay_within_the_bound_of_float64(dtype):
    """topk covers every block here: in 16 bits the choice itself may differ, which tests of scoring count."""
    layer = layer_of("h4", dtype, topk=8)
    x = tokens(2, 27, 12, dtype)
    oracle = reference_layer(layer.config, cast(layer.state_dict(), torch.float64), x.double()).y
    eager = reference_layer(layer.config, cast(layer.state_dict(), dtype), x).y
    assert_within(layer(x).detach(), eager.detach(), oracle, "forward")
    assert_within(one_by_one(layer, x, 5), eager.detach(), oracle, "decode")


def test_autocast_runs_the_layer_and_its_cache_in_the_autocast_dtype():
    layer = layer_of("mlp")
    with torch.autocast("cpu", torch.bfloat16):
        layer(tokens(1, 12, 10)).sum().backward()
        y, cache = layer.prefill(tokens(1, 12, 10))
        y, cache = layer.decode(tokens(1, 1, 10), cache)
    assert y.dtype == cache.key("window").dtype == torch.bfloat16
    assert layer.project.weight.grad is not None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kernel_stride": 3}, "kernel_stride 3 does not divide kernel_size 8"),
        ({"kernel_size": 12, "kernel_stride": 12}, "kernel_stride 12 does not divide block_size 8"),
        ({"num_heads": 3}, "num_heads 3 is no multiple of num_kv_heads 2"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"topk": 0}, "topk is 0, expected at least 1"),
        ({"window_size": 0}, "window_size is 0, expected at least 1"),
        ({"value_head_dim": -1}, "value_width is -1, expected at least 1"),
        ({"compression": "max"}, "compression is 'max', expected 'mean' or 'mlp'"),
        ({"rotary_base": 0.0}, "rotary_base is 0.0"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sizes, message):
    with pytest.raises(ArgumentError, match=message):
        NSAConfig(**{**SMALL, **SHAPES["h4"], **sizes})


def test_any_sizes_with_the_stride_dividing_run():
    for kernel_size, stride, block_size in ((4, 4, 4), (16, 4, 8), (4, 2, 16), (32, 8, 8), (6, 3, 9), (1, 1, 1)):
        sizes = {"kernel_size": kernel_size, "kernel_stride": stride, "block_size": block_size, "topk": 2}
        layer = layer_of("h4", **sizes)
        x = tokens(1, 37, 12)
        assert float((one_by_one(layer, x, 3) - layer(x).detach()).abs().max()) <= agreement_bound(layer, x)


def test_bad_input_is_named():
    layer = layer_of("h4")
    _, cache = layer.prefill(tokens(1, 4, 12))
    for call, message in (
        (lambda: layer(torch.zeros(4, 12)), r"x has shape \(4, 12\), expected \(B, S, 12\)"),
        (lambda: layer(torch.zeros(1, 4, 11)), r"expected \(B, S, 12\)"),
        (lambda: layer.prefill(torch.zeros(1, 0, 12)), "at least 1"),
        (lambda: layer.decode(torch.zeros(1, 2, 12), cache), "decode takes one token"),
        (lambda: layer.decode(torch.zeros(2, 1, 12), cache), "cannot append"),
    ):
        with pytest.raises(NSAError, match=message):
            call()
    assert cache.length == 4


def test_two_threads_do_not_share_a_workspace(monkeypatch):
    monkeypatch.setenv("NSA_USE_SEL_VARLEN", "1")
    layer = NSAAttention(
        NSAConfig(dim=32, num_heads=4, num_kv_heads=2, head_dim=8, kernel_size=4, kernel_stride=2, block_size=8, topk=4)
    )
    inputs = [torch.randn(1, 70 + 10 * i, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    alone = [layer.prefill(x)[0] for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(8):
            together = list(pool.map(lambda x: layer.prefill(x)[0], inputs))
            assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_misspelt_branch_or_route_is_an_error_that_lists_the_right_ones_and_appends_nothing():
    layer, x = layer_of("h1"), tokens(1, 3, 12)
    cache = layer.empty_cache(1, capacity=3, device=torch.device("cpu"))
    calls = (lambda: layer(x, branch="windows"), lambda: layer.prefill(x, branch="windows"))
    for call in (*calls, lambda: layer.decode(x[:, :1], cache, branch="windows")):
        with pytest.raises(ArgumentError, match=r"unknown branch 'windows'; expected None or one of \['compression'"):
            call()
    with pytest.raises(ArgumentError, match=r"unknown route 'fusde'; expected one of \['auto', 'fused', 'branches'\]"):
        layer.decode(x[:, :1], cache, route="fusde")
    assert cache.length == 0
