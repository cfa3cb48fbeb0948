"""The Triton kernels for intervals of keys, window and compressed, are the oracle; interpreted where no GPU is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreter import prepare

INTERPRETED = prepare()

import nsa  # noqa: E402  kernels load Triton, which asks for its mode once
from nsa.errors import UnsupportedPathError  # noqa: E402
from nsa.kernels import interval_gradient, interval_support  # noqa: E402
from nsa.kernels.interval import Interval  # noqa: E402
from nsa.paths import PATHS  # noqa: E402
from nsa.problem import SelectionProblem  # noqa: E402
from nsa.selection import LogSums, Selection  # noqa: E402
from nsa.trace import record_paths  # noqa: E402
from nsa.workspace import Workspace  # noqa: E402
from tuner.gradient_oracle import GradientOracle  # noqa: E402
from tuner.inputs import Inputs  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SMALL = {"tokens": 4, "keys": 16, "warps": 4, "stages": 2}
BACKWARD = {"query_tokens": 4, "query_keys": 16, "key_tokens": 4, "key_keys": 16, "backward_warps": 4}
KERNEL, STRIDE, WINDOW = 8, 4, 9


class Case:
    """Queries at positions ``first`` .. of a context, and keys that end in NaN behind what any of them reads."""

    def __init__(self, operation: str, *, B: int = 1, S: int = 33, first: int = 0, G: int = 2, h: int = 4, Dk: int = 16,
                 Dv: int = 16, window: int = WINDOW, dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(S + first)
        self.operation, rows = operation, (B, S, G)
        if operation == "window":
            self.selection = Selection.window(window, rows=rows, context_length=first + S, device=DEVICE)
        else:
            self.selection = Selection.compressed(
                KERNEL, STRIDE, rows=rows, first_position=first, device=DEVICE, sums=LogSums()
            )
        self.there = self.selection.structured(operation).keys

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(DEVICE, dtype)

        self.query, self.weight = draw(B, S, G, h, Dk), draw(B, S, G, h, Dv)
        self.key, self.value = draw(B, self.there + 5, G, Dk).transpose(1, 2), draw(B, G, self.there + 5, Dv)

    @property
    def path(self) -> str:
        """The Triton path of the operation."""
        return "triton_window" if self.operation == "window" else "triton_compressed"

    def run(self, path: str, tensors: tuple[Tensor, ...] | None = None, **parameters: Any) -> Tensor:
        """Output of a path; the oracle sees the keys that exist, the Triton path has NaN behind them."""
        query, key, value = tensors or (self.query, self.key, self.value)
        key, value = key[:, :, : self.there], value[:, :, : self.there]
        if path != "reference":
            key, value = (poisoned_behind(tensor) for tensor in (key, value))
        options = {"scale": 0.4, "workspace": None, **parameters}
        return PATHS[path].function()(query, key, value, self.selection, **options)

    def gradients(self, path: str, **parameters: Any) -> tuple[Tensor, ...]:
        """Gradients of query, key and value."""
        leaves = tuple(t.detach().requires_grad_() for t in (self.query, self.key, self.value))
        out = self.run(path, leaves, **parameters)
        return torch.autograd.grad(out, leaves, self.weight.to(out.dtype))


def poisoned_behind(tensor: Tensor) -> Tensor:
    """The tensor as a view of one that goes on in NaN."""
    long = torch.cat((tensor, torch.full_like(tensor[:, :, :3], float("nan"))), 2)
    return long[:, :, : tensor.shape[2]]


def assert_close(found: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype, largest: float) -> None:
    """Within the larger of twice the eager formula's error and 4 * eps * ``largest``; NaN never passes."""
    bound = max(2 * float((eager.double() - exact).abs().max()), 4 * torch.finfo(dtype).eps * largest)
    assert float((found.double() - exact).abs().max()) <= bound


def assert_matches(case: Case, **parameters: Any) -> Tensor:
    """The path's output is the oracle's, and the path says that it ran."""
    with record_paths() as seen:
        found = case.run(case.path, **{**SMALL, **parameters})
    assert [(record.operation, record.path) for record in seen.executed] == [(case.operation, case.path)]
    dtype = case.value.dtype
    eager = case.run("reference", compute_dtype=str(dtype).removeprefix("torch."))
    assert found.dtype == dtype
    assert_close(found, case.run("reference"), eager, dtype, float(case.value[:, :, : case.there].abs().max()))
    return found


both = pytest.mark.parametrize("operation", ["window", "compression"])


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory asked for with ``torch.empty`` comes full of NaN."""
    plain, plain_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: plain(*sizes, **options).fill_(float("nan")))
    monkeypatch.setattr(
        torch, "empty_like", lambda *sizes, **options: plain_like(*sizes, **options).fill_(float("nan"))
    )


@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"S": 33},
        {"S": 13, "first": 30, "B": 2},
        {"S": 8, "h": 3, "Dk": 24, "Dv": 40},
        {"S": 1, "first": 20, "h": 16},
        {"S": 21, "h": 1, "G": 1},
    ],
    ids=str,
)
@both
def test_forward_is_the_oracle_and_every_output_is_written(operation, sizes, loads, poisoned) -> None:
    case = Case(operation, **sizes)
    found = assert_matches(case, loads=loads)
    if operation == "compression":
        assert not found[:, : max(0, KERNEL - 1 - sizes.get("first", 0))].any()


@pytest.mark.parametrize("window", [1, 16, 100])
def test_any_window(window: int) -> None:
    assert_matches(Case("window", S=35, window=window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_half_precision_stays_within_the_derived_bound(operation: str, dtype: torch.dtype) -> None:
    assert_matches(Case(operation, S=19, dtype=dtype))


@both
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_that_is_not_above_0_is_no_special_case(operation: str, scale: float) -> None:
    case = Case(operation, S=11)
    key, value = case.key[:, :, : case.there], case.value[:, :, : case.there]
    found = nsa.selection_attention(case.query, key, value, case.selection, path=case.path, scale=scale)
    exact, eager = (case.run("reference", scale=scale, compute_dtype=dtype) for dtype in ("float64", "float32"))
    assert_close(found, exact, eager, torch.float32, float(value.abs().max()))


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("sizes", [{"S": 33, "Dk": 24}, {"S": 13, "first": 30, "B": 2, "h": 3, "Dv": 24}], ids=str)
@both
def test_gradients_are_the_oracles_and_every_element_is_written(operation, sizes, splits, poisoned) -> None:
    case = Case(operation, **sizes)
    key, value = case.key[:, :, : case.there], case.value[:, :, : case.there]

    def call(given: Inputs, _workspace: Workspace | None) -> Tensor:
        return case.run(case.path, (given.query, given.key, given.value), **SMALL, **BACKWARD, splits=splits)

    GradientOracle(Inputs(case.query, key, value, case.selection, None), 0.4).compare(call, Workspace())


@both
def test_two_calls_give_the_same_bits(operation: str) -> None:
    case = Case(operation, S=17)
    assert torch.equal(case.run(case.path, **SMALL), case.run(case.path, **SMALL))
    one, two = (case.gradients(case.path, **SMALL, **BACKWARD, splits=2) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(one, two, strict=True))


def test_explicit_positions_in_any_order_serve_forward_and_gradients() -> None:
    places = torch.tensor([[3, 40, 9, 22, 0], [31, 7, 8, 11, 12]], device=DEVICE)
    for interval in (Interval(KERNEL, STRIDE, positions=places), Interval(width=7, positions=places)):
        generator = torch.Generator().manual_seed(1)
        shapes = ((2, 5, 2, 4, 16), (2, 2, 41, 16), (2, 2, 41, 16))
        leaves = [torch.randn(s, generator=generator).to(DEVICE).requires_grad_() for s in shapes]
        end = (places + 1 - interval.kernel_size).div(interval.kernel_stride, rounding_mode="floor") + 1
        end = end.clamp_min(0)
        start = (end - interval.width).clamp_min(0) if interval.width else 0 * end
        ranges = torch.stack((start, end), -1)[:, :, None, None].expand(-1, -1, 2, 1, 2)
        selection = Selection.from_ranges(ranges, context_length=41, query_positions=end - 1)
        oracle = PATHS["reference"].function()
        launch = {**SMALL, "loads": "pointer", "registers": 0}
        found, _ = interval_gradient.attention(*leaves, interval, 0.4, launch, BACKWARD)
        exact = oracle(*leaves, selection, scale=0.4, workspace=None)
        eager = oracle(*leaves, selection, scale=0.4, workspace=None, compute_dtype="float32")
        assert_close(found, exact, eager, torch.float32, float(leaves[2].detach().abs().max()))
        pull = torch.ones_like(found)
        results = [torch.autograd.grad(out, leaves, pull.to(out.dtype)) for out in (found, exact, eager)]
        for one, wanted, near in zip(*results, strict=True):
            assert_close(one, wanted.double(), near, torch.float32, float(wanted.abs().max()))


def test_log_sums_are_left_for_scoring() -> None:
    case = Case("compression", S=21)
    case.run("triton_compressed", **SMALL)
    sums = case.selection.sums.tensor
    scores = torch.einsum("bsghd,bgtd->bsght", case.query.double(), case.key[:, :, : case.there].double()) * 0.4
    exist = (torch.arange(21, device=DEVICE) + 1 - KERNEL).div(STRIDE, rounding_mode="floor") + 1
    there = torch.arange(case.there, device=DEVICE) < exist[:, None]
    exact = scores.masked_fill(~there[None, :, None, None], float("-inf")).logsumexp(-1) / torch.log(torch.tensor(2.0))
    assert torch.equal(sums.isinf(), exact.isinf())
    assert (sums[:, : KERNEL - 1] == float("inf")).all()
    finite = exact.isfinite()
    assert float((sums[finite] - exact[finite]).abs().max()) <= 8 * torch.finfo(torch.float32).eps * 8


@pytest.mark.gpu
@pytest.mark.parametrize("registers", [0, 128])
@pytest.mark.parametrize(
    "sizes",
    [
        {"S": 1, "first": 20, "h": 16, "Dk": 64, "Dv": 64},
        {"S": 40, "h": 16, "Dk": 128, "Dv": 128},
        {"S": 333, "first": 77, "B": 2, "h": 6, "Dk": 64, "Dv": 128},
        {"S": 1003, "h": 16, "Dk": 128, "Dv": 128, "window": 200},
    ],
    ids=str,
)
@both
def test_the_kernel_for_capability_nine_is_the_oracle(operation, sizes, registers, poisoned) -> None:
    case = Case(operation, **sizes, dtype=torch.bfloat16)
    tokens = 128 // (16 if sizes["h"] == 16 else 8)
    assert_matches(
        case, loads="ring", tokens=tokens, keys=64, warps=8, stages=2, registers=registers
    )  # fmt: skip


@both
def test_on_a_gpu_no_kernel_but_the_ring_is_held_to_128_registers(operation: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(interval_support, "device_reason", lambda path, device: None)
    own = {"window": 512} if operation == "window" else {"kernel_size": 32, "kernel_stride": 16}
    fields = {"B": 1, "S": 4096, "T": 4096, "G": 4, "h": 16, "dtype": "bfloat16", "mode": "prefill",
              "operation": operation, "form": "ranges", "block_size": 0, "topk": 1, **own}  # fmt: skip
    for width, loads, registers in ((128, "ring", 128), (96, "descriptor", 0)):
        posed, device = SelectionProblem(**fields, Dk=width, Dv=width), torch.device("cuda")
        defaults = {item["name"]: item["default"] for item in interval_support.ladders("it", posed, device)}
        assert (defaults["loads"], defaults["registers"]) == (loads, registers)
        assert interval_support.reason("it", posed, device, {}) is None
        reason = interval_support.reason("it", posed, device, {"loads": "descriptor", "registers": 128})
        assert reason == "it with loads='descriptor' does not compile for 128 registers"


@both
def test_what_cannot_run_is_said_before_and_defaults_stand_on_their_ladders(operation: str) -> None:
    path = PATHS["triton_window" if operation == "window" else "triton_compressed"]
    own = {"window": 9} if operation == "window" else {"kernel_size": KERNEL, "kernel_stride": STRIDE}
    fields = {"B": 1, "S": 33, "T": 33, "G": 2, "h": 4, "Dk": 16, "Dv": 16, "dtype": "float32", "mode": "train",
              "operation": operation, "form": "ranges", "block_size": 0, "topk": 1, **own}  # fmt: skip

    def problem(**changes: Any) -> SelectionProblem:
        return SelectionProblem(**{**fields, **changes})

    for changes, word in (
        ({"dtype": "float64"}, "float64"),
        ({"Dk": 288}, "256"),
        ({"h": 65}, "heads"),
    ):
        reason = path.unsupported_reason(problem(**changes), DEVICE, {})
        assert reason is not None
        assert word in reason
    wide = problem(Dk=256, Dv=256, h=16)
    assert "shared memory" in path.unsupported_reason(wide, DEVICE, {"tokens": 16, "keys": 128, "stages": 3})
    for device, changes, word in (
        ("cpu", {}, "CUDA"),
        ("cuda", {"Dk": 96}, "head dims"),
        ("cuda", {"dtype": "float32"}, "bfloat16"),
    ):
        one = problem(**{"Dk": 128, "Dv": 128, "dtype": "bfloat16", **changes})
        reason = interval_support.ring_reason("path", one, torch.device(device))
        assert reason is not None
        assert word in reason
    for heads in (1, 3, 16, 64):
        for dtype in ("float32", "bfloat16"):
            one = problem(h=heads, dtype=dtype, Dk=128, Dv=128)
            assert all(parameter.default in parameter.ladder for parameter in path.tunables(one, DEVICE))
            assert path.unsupported_reason(one, DEVICE, path.defaults(one, DEVICE)) is None


def test_a_layout_that_cannot_be_loaded_by_descriptor_is_refused_not_copied() -> None:
    case = Case("window", S=9)
    case.key = torch.cat((case.key, case.key[..., :1]), -1)[..., :16]
    query, value = case.query, case.value[:, :, : case.there]
    key = torch.cat((case.key, case.key[..., :1]), -1)[:, :, : case.there, :16]
    run = PATHS["triton_window"].function()
    run(query, key, value, case.selection, scale=0.4, workspace=None, **SMALL)
    with pytest.raises(UnsupportedPathError, match="16 bytes"):
        run(query, key, value, case.selection, scale=0.4, workspace=None, **SMALL, loads="descriptor")
