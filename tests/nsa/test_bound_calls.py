"""A call that dispatch has bound is the call it was: same result, same records, and nobody else's layout."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from tests.interpreter import prepare

prepare()

import nsa  # noqa: E402  kernels load Triton, which asks for its mode once
from nsa import dispatch  # noqa: E402
from nsa.kernels.launch import Plan  # noqa: E402
from nsa.trace import record_paths  # noqa: E402

from .test_triton_paths import DEVICE, Case, assert_close, poisoned  # noqa: E402, F401  a fixture

CANDIDATES = [
    ("triton_decode", {"splits": 2, "step": 16}),
    ("triton_decode", {"splits": 2, "combine": "launch"}),
    ("triton_token", {"tokens": 2, "step": 16, "loads": "pointer"}),  # calls by tensor maps are not bound
    ("triton_union", {"tokens": 4, "step": 16, "loads": "pointer"}),
]


@pytest.fixture(params=CANDIDATES, ids=["decode", "decode-launch", "token", "union"])
def candidate(request):
    """A path and its parameters."""
    return request.param


@pytest.fixture(autouse=True)
def _fresh_dispatch(monkeypatch):
    monkeypatch.setattr(dispatch, "_forced_plans", {})


@pytest.fixture
def run(candidate):
    """A call by that path."""
    path, parameters = candidate

    def call(case: Case, scale: float = 0.4):
        inputs = case.query, case.key, case.value, case.selection
        return nsa.selection_attention(*inputs, path=path, parameters=parameters, scale=scale)

    return call


def assert_right(found: torch.Tensor, case: Case) -> None:
    eager = case.run("reference", {"compute_dtype": "float32"})
    assert_close(found, case.run("reference", {}), eager, torch.float32, float(case.value.abs().max()))


def bound() -> int:
    return sum(known.bound is not None for known in dispatch._forced_plans.values())


def test_every_call_of_a_kind_is_the_reference_and_the_third_is_bound(run, candidate, poisoned):  # noqa: F811
    for seed in range(4):
        case = Case(S=5, B=2, T=39, seed=seed)
        assert bound() == (seed >= 2)
        with record_paths() as seen:
            found = run(case)
        assert_right(found, case)
        assert [(record.path, record.status) for record in seen.executed] == [(candidate[0], "forced")]
        assert candidate[1].items() <= seen.executed[0].parameters.items()
    assert len(dispatch._forced_plans) == 1


def test_a_call_that_differs_in_layout_or_scale_is_not_served_by_another_kinds_binding(run):
    usual = Case(S=5, B=2, T=39)
    for _ in range(3):
        run(usual)
    other = Case(S=5, B=2, T=39, seed=1)
    for name, change in (
        ("key", lambda key: torch.cat((key, key), -1)[..., : key.shape[-1]]),
        ("value", lambda value: torch.cat((value, value), 2)[:, :, ::2]),
        ("query", lambda query: query.transpose(0, 2).contiguous().transpose(0, 2)),
    ):
        setattr(other, name, change(getattr(other, name)))
        assert_right(run(other), other)
    assert bound() == 1
    assert len(dispatch._forced_plans) == 4
    assert not torch.equal(run(usual, scale=0.5), run(usual))
    assert not torch.equal(run(usual, scale=-0.5), run(usual, scale=0.5))


def test_keys_behind_the_context_are_not_read_by_a_bound_call(run):
    case = Case(S=5, B=1, T=39)
    expected = run(case)
    for name in ("key", "value"):
        tensor = getattr(case, name)
        room = torch.full((*tensor.shape[:2], 64, tensor.shape[3]), float("nan"), device=tensor.device)
        room[:, :, :39] = tensor
        setattr(case, name, room)
    for _ in range(3):
        assert torch.equal(run(case), expected)
    assert bound() == 1


def test_calls_with_gradients_stay_unbound_and_keep_them(run):
    case = Case(S=5, B=1, T=39)
    case.query.requires_grad_()
    for _ in range(3):
        run(case).sum().backward()
    assert bound() == 0
    with torch.no_grad():
        first = [run(case) for _ in range(3)]
    assert bound() == 1
    assert all(torch.equal(first[0], other) for other in first)
    assert case.query.grad is not None


def test_inputs_that_share_memory_do_not_bind_their_pair_apart(run, candidate):
    case = Case(S=5, B=1, T=39)
    kept, case.value = case.value, case.key
    for _ in range(3):
        run(case)
    case.value = kept
    assert_right(run(case), case)


def test_a_bound_call_reads_its_own_lengths_and_positions(run):
    for seed in range(4):
        options = {"lengths": (30 + seed, 20), "query_positions": torch.arange(5, device=DEVICE) + 15 + seed}
        case = Case(S=5, B=2, T=39, seed=seed, **options)
        assert_right(run(case), case)
    assert bound() == 1


def test_a_kind_that_cannot_be_bound_is_tried_once(monkeypatch):
    case = Case(S=5, B=1, T=39)
    tried = []
    path = replace(nsa.PATHS["triton_union"], bound=f"{__name__}:never")
    monkeypatch.setattr(f"{__name__}.never", lambda *given: tried.append(given))
    monkeypatch.setitem(nsa.PATHS, "triton_union", path)
    for _ in range(5):
        nsa.selection_attention(case.query, case.key, case.value, case.selection, path="triton_union")
    assert len(tried) == 1


def never(*given):
    """Stands in for a path's bind."""


def test_no_call_of_a_kind_launches_more_than_another(run, monkeypatch):
    counts, plain = [], Plan.__call__

    def counted(self, grid, *arguments):
        counts[-1] += 1
        plain(self, grid, *arguments)

    monkeypatch.setattr(Plan, "__call__", counted)
    case = Case(S=5, B=1, T=39)
    for _ in range(4):
        counts.append(0)
        run(case)
    assert counts[0] > 0
    assert len(set(counts)) == 1
