"""Claims about the checks: every kind of wrong result is caught and named, right ones pass within the derived bound."""

from typing import Any

import msgspec
import pytest
import torch

from nsa.paths import PATHS as REAL
from nsa.paths import reference
from nsa.problem import SelectionProblem
from tests.tuner.misbehaving import PATHS
from tuner import check
from tuner.check import Checked, Checker, Oracle, WrongResult, awkward_inputs, problem_of, selected_rows
from tuner.inputs import make_inputs

CPU = torch.device("cpu")
EAGER = ("dense", "gather", "packed", "varlen")


def problem(**changes: Any) -> SelectionProblem:
    """A prefill of 40 tokens with a tail block. At these sizes right paths stay below 0.65 of the bound."""
    fields = {
        "mode": "prefill", "dtype": "float32", "B": 1, "S": 40, "T": 40, "G": 2, "h": 2, "Dk": 8, "Dv": 8,
        "block_size": 16, "topk": 4,
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


def checked(path: Any, posed: SelectionProblem, *, thorough: bool = True) -> Checked:
    """A path at its defaults."""
    checker = Checker(posed, make_inputs(posed, "scored", 0, CPU))
    return checker.check(path, path.defaults(posed, CPU), thorough=thorough)


def oracle_of(posed: SelectionProblem) -> tuple[Oracle, torch.Tensor]:
    """The oracle of a problem's inputs, and its truth in the working dtype on all rows."""
    inputs = make_inputs(posed, "scored", 0, CPU)
    tensors = inputs.query, inputs.key, inputs.value
    truth = reference.run(*tensors, inputs.selection, scale=posed.Dk**-0.5)
    return Oracle(inputs, posed.Dk**-0.5), truth.to(inputs.value.dtype)


# Right paths


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "float16"])
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_right_paths_pass_in_every_dtype(name: str, dtype: str, mode: str) -> None:
    found = checked(REAL[name], problem(dtype=dtype, mode=mode, S=1 if mode == "decode" else 40))
    assert 0 <= found.error <= found.bound
    assert found.bound < 0.2


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_paths_pass_with_gradients(name: str, dtype: str) -> None:
    assert checked(REAL[name], problem(mode="train", dtype=dtype)).bound > 0


def test_the_oracle_itself_passes() -> None:
    assert checked(REAL["reference"], problem(dtype="float64")).error == 0.0


@pytest.mark.parametrize("name", EAGER)
def test_every_rung_of_every_ladder_passes(name: str) -> None:
    posed = problem(S=80, T=80)
    checker = Checker(posed, make_inputs(posed, "random", 0, CPU))
    for item in REAL[name].tunables(posed, CPU):
        for rung in item.ladder:
            checker.check(REAL[name], {**REAL[name].defaults(posed, CPU), item.name: rung}, thorough=False)


# Wrong paths

BROKEN = {
    "off_by_a_percent": "first call, outputs poisoned: off by .* derived bound",
    "nan_in_one_place": r"first call, outputs poisoned: 1 of \d+ output elements are not finite",
    "leaves_rows_unwritten": r"first call, outputs poisoned: \d+ of \d+ output elements are not finite",
    "returns_another_dtype": r"output is torch\.float64 .*, expected torch\.float32",
    "returns_another_shape": r"output is torch\.float32 .*, expected torch\.float32 \(1, 40, 2, 2, 8\)",
    "keeps_state": "second call, workspace poisoned: .* not finite",
    "minds_a_small_reserve": "reserve below the need .* first call: off by",
    "minds_a_large_reserve": "reserve above the need .* first call: off by",
    "grows_with_every_change": "grew .* while shapes alternated",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_result_is_caught_and_named(name: str) -> None:
    with pytest.raises(WrongResult, match=BROKEN[name]):
        checked(PATHS[name], problem())


@pytest.mark.parametrize("name", ["off_by_a_percent", "nan_in_one_place", "leaves_rows_unwritten", "keeps_state"])
def test_a_wrong_result_is_caught_in_decode(name: str) -> None:
    with pytest.raises(WrongResult):
        checked(PATHS[name], problem(mode="decode", S=1))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrong_gradient", "first step: gradient of v off by"),
        ("wrong_gradient_in_the_second_step", "second step: gradient of q off by nan"),
    ],
)
def test_a_wrong_gradient_is_caught_in_train_and_only_there(name: str, said: str) -> None:
    with pytest.raises(WrongResult, match=said):
        checked(PATHS[name], problem(mode="train"))
    checked(PATHS[name], problem())


def test_what_does_not_depend_on_the_context_is_left_out_unless_thorough() -> None:
    checked(PATHS["minds_a_large_reserve"], problem(), thorough=False)


def test_what_a_path_raises_passes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        checked(PATHS["raises"], problem())


def test_the_process_that_is_timed_is_held_against_the_oracle_once() -> None:
    posed = problem()
    checker = Checker(posed, make_inputs(posed, "scored", 0, CPU))
    found = checker.check_once(REAL["gather"], REAL["gather"].defaults(posed, CPU))
    assert found.error <= found.bound
    with pytest.raises(WrongResult, match="the process that is timed: off by"):
        checker.check_once(PATHS["off_by_a_percent"], PATHS["off_by_a_percent"].defaults(posed, CPU))


# The bound


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_little_more_than_the_bound_is_too_much_and_a_little_less_is_not(dtype: str) -> None:
    posed = problem(dtype=dtype)
    oracle, right = oracle_of(posed)
    assert oracle.compare(right, "right") < oracle.bound
    flat = right.double().flatten()
    for place in (0, flat.numel() // 2, flat.numel() - 1):
        for factor, caught in ((0.8, False), (1.2, True)):
            wrong = flat.clone()
            wrong[place] += factor * oracle.bound
            out = wrong.view(right.shape).to(right.dtype)
            if caught:
                with pytest.raises(WrongResult, match="off by"):
                    oracle.compare(out, "wrong")
            else:
                oracle.compare(out, "nearly right")


def test_the_message_names_the_worst_place() -> None:
    oracle, right = oracle_of(problem())
    right[0, 7, 1, 0, 3] += 1.0
    with pytest.raises(WrongResult, match=r"here: off by 1 at \(b, row, g, head, d\) \(0, 7, 1, 0, 3\)"):
        oracle.compare(right, "here")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_caught_anywhere(value: float) -> None:
    oracle, right = oracle_of(problem())
    right.view(-1)[123] = value
    with pytest.raises(WrongResult, match="1 of 1280 output elements are not finite"):
        oracle.compare(right, "here")


def test_the_bound_is_never_below_what_one_rounding_of_the_values_needs() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        posed = problem(dtype=str(dtype).removeprefix("torch."))
        inputs = make_inputs(posed, "scored", 0, CPU)
        assert Oracle(inputs, 0.3).bound >= 4 * torch.finfo(dtype).eps * float(inputs.value.abs().max())


# Large problems


@pytest.fixture
def _few_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems count as large from 1000 scores on."""
    monkeypatch.setattr(check, "FULL_SCORES", 1000)
    monkeypatch.setattr(check, "SPOT_ROWS", 8)


@pytest.mark.usefixtures("_few_scores")
def test_of_a_large_problem_spot_rows_are_compared_first_and_last_among_them() -> None:
    oracle, right = oracle_of(problem())
    rows = oracle.rows.tolist()
    assert 2 <= len(rows) <= 8
    assert rows == sorted(set(rows))
    assert {0, 39} <= set(rows)
    assert oracle.compare(right, "right") <= oracle.bound
    for row in rows:
        wrong = right.clone()
        wrong[0, row] += 0.1
        with pytest.raises(WrongResult, match="off by"):
            oracle.compare(wrong, "wrong")


@pytest.mark.usefixtures("_few_scores")
def test_of_a_large_problem_every_row_must_be_finite() -> None:
    oracle, right = oracle_of(problem())
    row = next(row for row in range(40) if row not in oracle.rows.tolist())
    right[0, row] = float("nan")
    with pytest.raises(WrongResult, match="not finite"):
        oracle.compare(right, "here")


@pytest.mark.usefixtures("_few_scores")
@pytest.mark.parametrize("name", EAGER)
def test_right_paths_pass_on_spot_rows(name: str) -> None:
    assert checked(REAL[name], problem()).error > 0


def test_some_rows_of_a_call_are_the_same_call() -> None:
    posed = problem(B=2)
    inputs = make_inputs(posed, "scored", 0, CPU)
    rows = torch.tensor([3, 17, 39])
    whole = reference.run(inputs.query, inputs.key, inputs.value, inputs.selection, scale=1.0)
    torch.testing.assert_close(reference.run(*selected_rows(inputs, rows), scale=1.0), whole[:, rows])


# Awkward inputs


@pytest.mark.parametrize("form", ["blocks", "ranges"])
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_awkward_inputs_are_as_awkward_as_they_say(form: str, mode: str) -> None:
    posed = problem(
        mode=mode, S=1 if mode == "decode" else 40, form=form, block_size=16 if form == "blocks" else 0
    )  # fmt: skip
    cases = dict(awkward_inputs(posed, CPU))
    assert len(cases) == (5 if form == "blocks" else 1)
    for name, case in cases.items():
        lengths = case.selection.lengths
        assert problem_of(case, posed).mode == mode
        assert not case.value.is_contiguous()
        assert int(lengths.min()) == 0, name
        if name != "all rows empty":
            assert int(lengths.max()) > 0, name
    if form == "blocks":
        ragged = cases["ragged rows, duplicates, an empty row, a tail block"].selection
        assert int(ragged.context_length) % 16
        assert (ragged.indices == int(ragged.context_length) // 16).sum() >= 3


def test_awkward_inputs_keep_the_problems_heads_dims_and_dtype() -> None:
    posed = problem(dtype="bfloat16", h=3, Dk=12, Dv=4)
    for _, case in awkward_inputs(posed, CPU):
        kept = ("dtype", "h", "Dk", "Dv", "block_size", "topk", "form", "mode")
        assert msgspec.structs.asdict(problem_of(case, posed)).items() >= {n: getattr(posed, n) for n in kept}.items()
        assert case.query.shape[3:] == (3, 12)
        assert case.value.shape[3] == 4
        assert case.query.dtype == torch.bfloat16
