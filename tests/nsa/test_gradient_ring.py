"""The backward's kernel for compute capability 9.0 is the oracle; where it cannot run is said before."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreter import prepare

INTERPRETED = prepare()

from nsa.kernels import gradient_ring, launch, support  # noqa: E402  they load Triton, which asks for its mode once
from nsa.paths import PATHS  # noqa: E402
from nsa.problem import SelectionProblem  # noqa: E402
from nsa.selection import Selection  # noqa: E402
from nsa.workspace import Workspace  # noqa: E402
from tuner.gradient_oracle import GradientOracle  # noqa: E402
from tuner.inputs import Inputs, make_inputs  # noqa: E402

CUDA = torch.device("cuda")
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
RING: dict[str, Any] = {"backward_loads": "ring", "backward_stages": 4}


def problem(**changes: Any) -> SelectionProblem:
    fields = {"B": 1, "S": 333, "T": 333, "G": 2, "h": 16, "Dk": 128, "Dv": 128, "block_size": 64, "topk": 4,
              "dtype": "bfloat16", "mode": "train"}  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


class TorchRing:
    """``gradient_ring.nsa_gradient_ring`` by torch: the same partials in the same places, for contiguous inputs."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.run, grid[0])

    def run(
        self, programs: int, queries: Any, k: Tensor, v: Tensor, grads: Any, known: Any, _: int, pairs: Tensor,
        items: Tensor, count: Tensor, part_q: Tensor, part_kv: Tensor, S: int, T: int, G: int, spans: int, span: int,
        units: int, item_slots: int, scale2: float, *__: int, **constants: Any,
    ) -> None:  # fmt: skip
        """As the kernel."""
        H, DK, DV, BS, NP = (constants[name] for name in ("H", "DK", "DV", "BS", "NP"))
        pairs, items = pairs.view(-1, constants["SPAN"] * NP), items.view(-1, item_slots, 3)
        q, grad, known = queries.base, grads.base, known.base
        known, part_kv = known.view(-1, H, 4), part_kv.view(-1, BS, DK + DV)
        part_q = part_q.view(-1, constants["SPAN"] * constants["N"], H * DK)
        for program in range(programs):
            held, i = divmod(program, item_slots)
            of_bg = span + held % units
            unit, (b, g) = held // units * spans + of_bg, divmod(held // units, G)
            if of_bg >= spans or i >= int(count[unit]):
                continue
            block, low, high = items[unit, i].tolist()
            tokens = pairs[unit, low:high].long() // NP
            keys, values = (torch.zeros(BS, t.shape[3]) for t in (k, v))
            left = min(BS, T - block * BS)
            keys[:left], values[:left] = k[b, g, block * BS :][:BS], v[b, g, block * BS :][:BS]
            rows, out = q[b, tokens, g], grad.view(-1, S, G, H, DV)[b, tokens, g]
            logsum, delta, limit, _ = known[(b * S + tokens) * G + g].unbind(2)
            score = torch.einsum("rhd,kd->rhk", rows, keys) * scale2 - logsum[..., None]
            seen = block * BS + torch.arange(BS) < limit.contiguous().view(torch.int32)[..., None]
            weight = torch.exp2(score.masked_fill(~seen, float("-inf")))
            slope = weight * (torch.einsum("rhd,kd->rhk", out, values) - delta[..., None])
            part_kv[program, :, :DK] = torch.einsum("rhk,rhd->kd", slope, rows)
            part_kv[program, :, DK:] = torch.einsum("rhk,rhd->kd", weight, out)
            part_q[held, low:high] = self.as_threads_hold_it(slope @ keys, constants)

    def as_threads_hold_it(self, part: Tensor, constants: dict[str, Any]) -> Tensor:
        """(rows, H, DK) -> (rows, H * DK): each piece by warp, column of eight, head of two, tile and half."""
        heads = 2 if constants["PAIRED"] else 1
        return part.reshape(len(part), -1, heads, part.shape[2] // 64, 4, 2, 8).permute(0, 1, 4, 6, 2, 3, 5).flatten(1)


@pytest.mark.skipif(not INTERPRETED, reason="stands in for a kernel that a GPU has")
@pytest.mark.parametrize("sizes", [{}, {"h": 5}, {"h": 8, "Dv": 64}, {"Dk": 64, "B": 2}, {"h": 6, "G": 2}], ids=str)
def test_partials_that_the_kernel_leaves_add_up_to_the_oracle(sizes: dict[str, Any], monkeypatch) -> None:
    monkeypatch.setattr(gradient_ring, "nsa_gradient_ring", TorchRing())
    monkeypatch.setattr(launch, "_plans", {})
    inputs = make_inputs(problem(**{"S": 9, "T": 150, "G": 1, "dtype": "float32", **sizes}), "random", 0, DEVICE)

    def call(case: Inputs, workspace: Workspace | None) -> Tensor:
        return PATHS["triton_token"].function()(
            case.query, case.key, case.value, inputs.selection, scale=0.1, workspace=None, **RING, backward_item_rows=64
        )

    GradientOracle(inputs, 0.1).compare(call, Workspace())


def gradients(inputs: Inputs, parameters: dict[str, Any]) -> tuple[Tensor, ...]:
    """Gradients of query, key and value for a fixed gradient of the output."""
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    out = PATHS["triton_token"].function()(*leaves, inputs.selection, scale=0.1, workspace=None, **parameters)
    return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel(), device=CUDA).view_as(out).to(out.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "pattern", "parameters"),
    [
        ({"S": 1003, "T": 1003, "G": 4, "topk": 16}, "scored", {"backward_rows": 32}),
        ({"h": 12, "B": 2}, "random", {"backward_rows": 32, "backward_item_rows": 64}),
        ({"h": 8, "S": 777, "T": 777}, "smooth", {"backward_rows": 32, "backward_item_rows": 64}),
        ({"h": 5, "G": 1}, "random", {"backward_rows": 16}),
        ({"h": 32, "S": 65, "T": 65, "topk": 1}, "random", {"backward_rows": 16}),
        ({"topk": 8}, "scored", {"backward_rows": 16}),
        ({"Dk": 64, "Dv": 64, "dtype": "float16"}, "scored", {"backward_rows": 32, "backward_stages": 3}),
        ({"Dk": 128, "Dv": 64, "S": 700, "T": 900}, "random", {"backward_rows": 32, "backward_partial": "float32"}),
    ],
    ids=str,
)
def test_gradients_of_the_kernel_for_capability_nine_are_the_oracle(
    changes: dict[str, Any], pattern: str, parameters: dict[str, Any]
) -> None:
    inputs = make_inputs(problem(**changes), pattern, 0, CUDA)

    def call(case: Inputs, workspace: Workspace | None) -> Tensor:
        return PATHS["triton_token"].function()(
            case.query, case.key, case.value, inputs.selection, scale=0.1, workspace=None, **RING | parameters
        )

    GradientOracle(inputs, 0.1).compare(call, Workspace())


@pytest.mark.gpu
def test_gradients_end_where_a_rows_limit_does_whatever_lies_behind_it() -> None:
    whole = make_inputs(problem(B=2), "random", 0, CUDA)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(-1, 7, whole.selection.indices.shape, generator=generator, dtype=torch.int32)
    lengths = torch.tensor((201, 333), device=CUDA)
    positions = torch.randperm(333, generator=generator).to(CUDA)
    selection = Selection.from_blocks(blocks.to(CUDA), block_size=64, context_length=lengths, query_positions=positions)
    inputs = replace_selection(whole, selection)
    inputs.key[0, :, 201:], inputs.value[0, :, 201:] = float("nan"), float("nan")
    found, plain = gradients(inputs, RING), gradients(inputs, {})
    for one, other in zip(found, plain, strict=True):
        assert bool(one.isfinite().all())
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 2**-8
    assert not found[1][0, :, 201:].any()
    assert not found[2][0, :, 201:].any()


def replace_selection(inputs: Inputs, selection: Selection) -> Inputs:
    """The same tensors, copied, under another selection."""
    return Inputs(inputs.query.clone(), inputs.key.clone(), inputs.value.clone(), selection, None)


@pytest.mark.gpu
def test_spans_change_nothing_that_rounding_does_not_and_a_replay_nothing_at_all() -> None:
    inputs = make_inputs(problem(S=1400, T=1400, topk=8), "scored", 0, CUDA)
    whole = gradients(inputs, RING)
    spans = gradients(inputs, RING | {"backward_span": 512})
    assert torch.equal(whole[0], spans[0])
    for one, other in zip(whole, spans, strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 2**-8
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(inputs, RING)
    for _ in range(3):
        graph.replay()
        for one, other in zip(captured, whole, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "parameters", "word"),
    [
        ({"dtype": "float32"}, {}, "float16 or bfloat16"),
        ({"Dk": 96}, {}, "head dims"),
        ({"Dk": 192}, {}, "head dims"),
        ({"Dv": 192}, {}, "head dims"),
        ({"block_size": 32}, {}, "block_size of 64"),
        ({"h": 4}, {}, "query heads"),
        ({"h": 64}, {}, "query heads"),
        ({}, {"backward_rows": 64}, "32 rows"),
        ({"h": 8}, {"backward_rows": 8}, "32 rows"),
        ({"h": 8}, {"backward_rows": 24}, "32 rows"),
        ({}, {"backward_warps": 8}, "4 warps"),
        ({}, {"backward_stages": 2}, "3 stages"),
        ({}, {"backward_registers": 168}, "its own"),
    ],
    ids=str,
)
def test_where_the_kernel_cannot_run_is_said_before(
    changes: dict[str, Any], parameters: dict[str, Any], word: str
) -> None:
    reason = support.backward_reason("it", problem(**changes), CUDA, RING | parameters)
    assert reason is not None
    assert word in reason
    assert "ring" in reason


def test_the_kernel_stands_on_the_ladder_where_it_can_run_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def ladder(device: str, **changes: Any) -> tuple[Any, ...]:
        ladders = support.backward_ladders("it", problem(**changes), torch.device(device))
        assert all(item["default"] in item["ladder"] for item in ladders)
        defaults = {item["name"]: item["default"] for item in ladders}
        assert support.backward_reason("it", problem(**changes), torch.device(device), defaults) is None
        return next(item["ladder"] for item in ladders if item["name"] == "backward_loads")

    assert ladder("cuda") == ("pointer", "ring")
    assert ladder("cuda", Dk=192) == ("pointer",)
    assert ladder("cuda", h=4) == ("pointer",)
    assert ladder("cpu") == ("pointer",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, wanted in (((8, 0), ("pointer",)), ((9, 0), ("pointer", "ring")), ((10, 0), ("pointer",))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert ladder("cuda") == wanted


@pytest.mark.parametrize("path", ["triton_token", "triton_union", "triton_block", "triton_decode"])
def test_a_path_declares_the_kernel_that_its_backward_runs(path: str) -> None:
    for loads, name, other in (("ring", "ring", "block"), ("pointer", "block", "ring")):
        parameters = {**PATHS[path].defaults(problem(), CUDA), **RING, "backward_loads": loads}
        required = PATHS[path].evidence(problem(), CUDA, parameters, [333]).required
        assert f"^nsa_gradient_{name}$" in required
        assert f"^nsa_gradient_{other}$" not in required


def strange_queries(query: Tensor) -> dict[str, Tensor]:
    """Like ``query``: a slice of a projection, heads before tokens, heads that share memory, an odd start."""
    wide = torch.cat((query, query, query), -1)
    odd = torch.empty(query.numel() + 1, dtype=query.dtype, device=query.device)[1:].view(query.shape)
    return {
        "slice": wide.chunk(3, -1)[1],
        "heads first": query.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4),
        "shared": query[:, :, :, :1].expand_as(query),
        "odd": odd.copy_(query),
    }


def test_what_cannot_be_copied_in_bulk_is_copied_first_and_nothing_else_is() -> None:
    query = torch.randn(1, 9, 2, 16, 128).bfloat16()
    for name, strange in strange_queries(query).items():
        found = gradient_ring.in_bulk(strange)
        assert torch.equal(found, strange)
        assert found.data_ptr() % 16 == 0
        assert all(stride * 2 % 16 == 0 and stride for stride in found.stride()[:4])
        assert (found is strange) == (name in ("slice", "heads first"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["slice", "heads first", "shared", "odd"])
def test_gradients_do_not_depend_on_how_the_query_lies(name: str) -> None:
    inputs = make_inputs(problem(B=2, topk=8), "random", 0, CUDA)
    strange = strange_queries(inputs.query)[name]
    plain = Inputs(strange.contiguous(), inputs.key, inputs.value, inputs.selection, None)
    lies = Inputs(strange, inputs.key, inputs.value, inputs.selection, None)
    for one, other in zip(gradients(lies, RING), gradients(plain, RING), strict=True):
        assert torch.equal(one, other)
