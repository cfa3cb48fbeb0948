"""A call that dispatch has bound is the call it was: same result, same records, and nobody else's layout."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter import prepare

prepare()

import nsa  # noqa: E402  kernels load Triton, which asks for its mode once
from nsa import dispatch  # noqa: E402
from nsa.trace import record_paths  # noqa: E402

from .test_triton_paths import Case, assert_close  # noqa: E402

PARAMETERS = {"splits": 2, "step": 16}


@pytest.fixture(autouse=True)
def _fresh_dispatch(monkeypatch):
    monkeypatch.setattr(dispatch, "_forced_plans", {})


def run(case: Case, scale: float = 0.4):
    inputs = case.query, case.key, case.value, case.selection
    return nsa.selection_attention(*inputs, path="triton_decode", parameters=PARAMETERS, scale=scale)


def assert_right(found: torch.Tensor, case: Case) -> None:
    eager = case.run("reference", {"compute_dtype": "float32"})
    assert_close(found, case.run("reference", {}), eager, torch.float32, float(case.value.abs().max()))


def bound() -> int:
    return sum(known.bound is not None for known in dispatch._forced_plans.values())


def test_every_call_of_a_kind_is_the_reference_and_the_third_is_bound():
    for seed in range(4):
        case = Case(S=2, B=2, T=39, seed=seed)
        assert bound() == (seed >= 2)
        with record_paths() as seen:
            found = run(case)
        assert_right(found, case)
        assert [(record.path, record.status) for record in seen.executed] == [("triton_decode", "forced")]
        assert seen.executed[0].parameters["splits"] == 2
    assert len(dispatch._forced_plans) == 1


def test_a_call_that_differs_in_layout_or_scale_is_not_served_by_another_kinds_binding():
    usual = Case(S=2, B=2, T=39)
    for _ in range(3):
        run(usual)
    other = Case(S=2, B=2, T=39, seed=1)
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


def test_keys_behind_the_context_are_not_read_by_a_bound_call():
    case = Case(S=2, B=1, T=39)
    expected = run(case)
    for name in ("key", "value"):
        tensor = getattr(case, name)
        room = torch.full((*tensor.shape[:2], 64, tensor.shape[3]), float("nan"), device=tensor.device)
        room[:, :, :39] = tensor
        setattr(case, name, room)
    for _ in range(3):
        assert torch.equal(run(case), expected)
    assert bound() == 1


def test_calls_with_gradients_stay_unbound_and_keep_them():
    case = Case(S=2, B=1, T=39)
    case.query.requires_grad_()
    for _ in range(3):
        run(case).sum().backward()
    assert bound() == 0
    with torch.no_grad():
        first = [run(case) for _ in range(3)]
    assert bound() == 1
    assert all(torch.equal(first[0], other) for other in first)
    assert case.query.grad is not None
