"""Claims about the checks: every kind of wrong result is caught and named, right ones pass within the derived bound."""

from typing import Any

import msgspec
import pytest
import torch

from nsa.paths import PATHS as REAL
from nsa.paths import reference
from nsa.problem import SelectionProblem
from nsa.selection import Selection
from nsa.workspace import Workspace
from tests.tuner.misbehaving import PATHS
from tuner import gradient_oracle
from tuner import oracle as oracles
from tuner.awkward import WITH_GRADIENTS, awkward_inputs, other_contents, problem_of
from tuner.check import Checked, Checker
from tuner.gradient_oracle import GradientOracle
from tuner.inputs import make_inputs
from tuner.oracle import Oracle, WrongResult, selected_rows

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
@pytest.mark.parametrize("batch", [1, 2])  # half of a batch's queries are no longer contiguous
def test_right_paths_pass_in_every_dtype(name: str, dtype: str, mode: str, batch: int) -> None:
    found = checked(REAL[name], problem(dtype=dtype, mode=mode, S=1 if mode == "decode" else 40, B=batch))
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
    "keeps_state": "the same tensors with other contents: off by",
    "keeps_blocks_by_address": "the same tensors with other contents: off by",
    "keeps_keys_by_address": "the same tensors with other contents: off by",
    "returns_its_workspace": "the first call's output, after another call: off by",
    "changes_the_process": "the path leaves torch's precision of float32 products at medium, it was highest",
    "sorts_in_place": "the call changed its indices",
    "cleans_the_cache": "NaN beyond them: the call changed its value",
    "without_a_maximum": "scores beyond the exponential's range: .* not finite",
    "forgets_the_last_tile": "an odd ragged context at once: off by",
    "minds_strided_queries": "strided queries, strided blocks of 64 bits: off by",
    "minds_strided_blocks": "strided queries, strided blocks of 64 bits: off by",
    "minds_positions": "positions of the caller's, .* off by",
    "minds_a_small_reserve": "reserve below the need .* first call: off by",
    "minds_a_large_reserve": "reserve above the need .* first call: off by",
    "grows_with_every_change": "grew .* while shapes alternated",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_result_is_caught_and_named(name: str) -> None:
    with pytest.raises(WrongResult, match=BROKEN[name]):
        checked(PATHS[name], problem(topk=2))
    assert torch.get_float32_matmul_precision() == "highest"


def test_in_bfloat16_one_block_of_sixteen_that_is_not_read_is_caught() -> None:
    posed = problem(dtype="bfloat16", S=1024, T=1024, block_size=64, topk=16, G=1, Dk=64, Dv=64)
    checked(REAL["dense"], posed, thorough=False)
    with pytest.raises(WrongResult, match="the same tensors with other contents: off by"):
        checked(PATHS["drops_a_block"], posed, thorough=False)


@pytest.mark.parametrize("operation", ["selection", "window", "compression"])
def test_other_contents_are_another_call_and_leave_the_first_as_it_was(operation: str) -> None:
    posed = problem(topk=2) if operation == "selection" else branch_problem(operation)
    inputs = make_inputs(posed, "scored", 0, CPU)
    tensors = [inputs.query, inputs.key, inputs.value, inputs.selection.indices]
    before = [tensor.clone() for tensor in tensors]
    with other_contents(posed, inputs):
        changed = [not torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True)]
        assert changed == [True, True, True, operation == "selection"]
        if operation == "selection":
            assert torch.equal((tensors[3] >= 0).sum(-1), (before[3] >= 0).sum(-1)), "as many blocks a row"
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        *("off_by_a_percent", "nan_in_one_place", "leaves_rows_unwritten", "keeps_state", "keeps_keys_by_address"),
        *("minds_strided_queries", "minds_strided_blocks", "minds_positions", "without_a_maximum"),
    ],
)
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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("counts_duplicates_in_its_gradient", "an odd ragged context at once, first step: gradient of k off by"),
        ("minds_a_strided_gradient", "first step: gradient of q off by"),
        ("asks_the_query_alone", "an odd ragged context at once, queries frozen: gradient of k off by"),
    ],
)
def test_a_gradient_that_is_wrong_for_awkward_selections_or_callers_is_caught(name: str, said: str) -> None:
    with pytest.raises(WrongResult, match=said):
        checked(PATHS[name], problem(mode="train"))


def test_a_path_for_complete_selections_alone_meets_an_awkward_one() -> None:
    with pytest.raises(WrongResult, match="an odd context at once, declared complete: off by"):
        checked(PATHS["complete_alone"], problem(complete=True))


def test_in_bfloat16_a_query_gradient_that_is_off_for_rows_of_many_keys_is_caught() -> None:
    posed = problem(mode="train", dtype="bfloat16", S=1024, T=1024, G=1, Dk=64, Dv=64, block_size=64, topk=16)
    path, scale = REAL["dense"], 0.125
    found = GradientOracle(make_inputs(posed, "random", 0, CPU), scale)

    def call(case: Any, workspace: Any, kept: float) -> torch.Tensor:
        query = case.query
        late = query[:, 700:].detach() + kept * (query[:, 700:] - query[:, 700:].detach())
        tensors = torch.cat((query[:, :700], late), 1), case.key, case.value
        return path.function()(*tensors, case.selection, scale=scale, workspace=workspace, **path.defaults(posed, CPU))

    found.compare(lambda *given: call(*given, kept=1.0), Workspace())
    with pytest.raises(WrongResult, match="gradient of q off by"):
        found.compare(lambda *given: call(*given, kept=0.8), Workspace())


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
    monkeypatch.setattr(oracles, "FULL_SCORES", 1000)
    monkeypatch.setattr(oracles, "SPOT_ROWS", 8)


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
    assert len(cases) == (9 if form == "blocks" else 1)
    for name, case in cases.items():
        lengths = case.selection.lengths
        assert problem_of(case, posed).mode == mode
        assert not case.value.is_contiguous()
        assert int(lengths.min()) == 0 or name in WITH_GRADIENTS, name
        if name != "all rows empty":
            assert int(lengths.max()) > 0, name
    if form == "blocks":
        prompt, complete = (cases[name] for name in WITH_GRADIENTS)
        assert (prompt.query.shape[1], complete.selection.complete) == (1 if mode == "decode" else 129, True)
        assert mode == "decode" or int(prompt.selection.lengths.min()) == 0
        ragged = cases["ragged rows, duplicates, an empty row, a tail block"].selection
        assert int(ragged.context_length) % 16
        assert (ragged.indices == int(ragged.context_length) // 16).sum() >= 3


BRANCHES = {
    "window": {"window": 12},
    "compression": {"kernel_size": 8, "kernel_stride": 4},
}
ROUTES = {"window": "sdpa_window", "compression": "sdpa_compressed"}


def branch_problem(operation: str, **changes: Any) -> SelectionProblem:
    ranged = {"block_size": 0, "topk": 1, "form": "ranges", "operation": operation}
    return problem(**{**ranged, **BRANCHES[operation], **changes})


@pytest.mark.parametrize("operation", BRANCHES)
@pytest.mark.parametrize("mode", ["decode", "prefill", "train"])
def test_right_routes_of_the_branches_pass(operation: str, mode: str) -> None:
    posed = branch_problem(operation, mode=mode, S=1 if mode == "decode" else 40, dtype="bfloat16")
    for path in (ROUTES[operation], "dense"):
        assert checked(REAL[path], posed).error > 0


def first_key_only(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return value[:, None, :, None, 0].expand(*query.shape[:4], -1).clone()


def off_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, whole: Any, **options: Any):
    """A window of one more key, compressed tokens without the last."""
    given = whole.structure
    shifted = given._replace(window=given.window + 1) if given.window else given
    ranges = oracles.ranges_of(shifted, torch.arange(query.shape[1])).indices.clone()
    ranges[..., 1] -= int(given.window == 0)
    everywhere = torch.full((query.shape[1],), key.shape[2] - 1)
    wrong = Selection.from_ranges(ranges, context_length=key.shape[2], query_positions=everywhere)
    return reference.run(query, key, value, wrong, scale=options["scale"]).to(value.dtype)


def minds_the_width(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any):
    """Right where value and key are equally wide."""
    out = REAL["dense"].function()(query, key, value, *rest, **options)
    return out if value.shape[3] == key.shape[3] else out * 1.01


def needs_contiguous_keys(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any):
    """Reads keys and values as if they were contiguous."""
    key, value = (tensor.as_strided(tensor.shape, torch.empty(tensor.shape).stride()) for tensor in (key, value))
    return REAL["dense"].function()(query, key, value, *rest, **options)


@pytest.mark.parametrize("operation", BRANCHES)
@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("run", [first_key_only, off_by_one, minds_the_width, needs_contiguous_keys])
def test_a_wrong_route_of_a_branch_is_caught(operation: str, mode: str, run: Any, monkeypatch: Any) -> None:
    posed = branch_problem(operation, mode=mode, S=1 if mode == "decode" else 40)
    broken = msgspec.structs.replace(REAL["dense"], target=f"{__name__}:{run.__name__}")
    with pytest.raises(WrongResult):
        checked(broken, posed)


@pytest.mark.parametrize("operation", BRANCHES)
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_awkward_calls_of_the_branches_are_as_awkward_as_they_say(operation: str, mode: str) -> None:
    posed = branch_problem(operation, mode=mode, S=1 if mode == "decode" else 40)
    cases = dict(awkward_inputs(posed, CPU))
    seen = [problem_of(case, posed) for case in cases.values()]
    assert all(p.B == 2 and p.mode == mode for p in seen)
    assert {p.T % 2 for p in seen} == {0, 1}
    assert any(p.S < p.T for p in seen)
    assert {p.Dv for p in seen} == {posed.Dv, posed.Dv + 8, posed.Dv // 2}
    assert all(not case.value.is_contiguous() for case in cases.values() if case.value.shape[2] > 1)
    if mode == "prefill":
        assert any(p.S == p.T for p in seen)
        lengths = torch.cat([case.selection.lengths.flatten() for case in cases.values()])
        assert (int(lengths.min()) == 0) == (operation == "compression"), "compressed rows may be empty, windows not"


@pytest.mark.parametrize("operation", BRANCHES)
def test_the_oracles_ranges_of_a_branch_are_counted_one_key_at_a_time(operation: str) -> None:
    posed = branch_problem(operation, S=31, T=40)
    given = make_inputs(posed, "fixed", 0, CPU).selection.structure
    assert given is not None
    rows = torch.tensor([0, 3, 11, 30])
    found = oracles.ranges_of(given, rows).ranges[0, :, 0, 0].tolist()
    for (start, end), row in zip(found, rows.tolist(), strict=True):
        t = 9 + row
        if operation == "window":
            read = [j for j in range(40) if t - 12 < j <= t]
        else:
            read = [i for i in range(40) if i * 4 + 8 <= t + 1]
        assert list(range(start, end)) == read


def right(case: Any, _workspace: Any) -> torch.Tensor:
    """The reference at the scale of ``problem``."""
    return reference.run(case.query, case.key, case.value, case.selection, scale=8**-0.5).to(case.value.dtype)


@pytest.mark.parametrize("operation", BRANCHES)
def test_gradients_of_a_large_branch_are_held_at_spot_rows(operation: str, monkeypatch: Any) -> None:
    posed = branch_problem(operation, mode="train")
    for name, value in (("FULL_GRADIENT_SCORES", 100), ("GRADIENT_SCORES", 100), ("LEAST_GRADIENT_ROWS", 8)):
        monkeypatch.setattr(gradient_oracle, name, value)
    found = GradientOracle(make_inputs(posed, "fixed", 0, CPU), posed.Dk**-0.5)
    assert 2 <= len(found.rows) <= 8

    def wrong(case: Any, workspace: Any) -> torch.Tensor:
        return right(case, workspace) + 0.01 * (case.value - case.value.detach()).sum()

    found.compare(right, Workspace())
    with pytest.raises(WrongResult, match="gradient of v off by"):
        found.compare(wrong, Workspace())


def large_train_cases() -> list[Any]:
    """A problem's own inputs, and every awkward call of it with gradients."""
    posed = problem(mode="train", B=2, S=33, T=40, G=2, Dv=4)
    cases = [("random", make_inputs(posed, "random", 0, CPU)), *awkward_inputs(posed, CPU)]
    return [pytest.param(case, id=name) for name, case in cases if not case.key.isnan().any()]


@pytest.mark.parametrize("case", large_train_cases())
def test_gradients_by_pieces_are_those_of_the_whole(case: Any, monkeypatch: Any) -> None:
    whole = GradientOracle(case, 8**-0.5)
    monkeypatch.setattr(gradient_oracle, "FULL_GRADIENT_SCORES", 100)
    for gathered in (1, 2**13, 2**27):
        monkeypatch.setattr(gradient_oracle, "GATHERED", gathered)
        pieces = GradientOracle(case, 8**-0.5)
        assert pieces.rows.tolist() == list(range(case.query.shape[1]))
        for found, wanted in zip(pieces.truth, whole.truth, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * (1 + float(wanted.abs().max())))
        for found, wanted in zip(pieces.bounds, whole.bounds, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0.5, atol=0.0)  # the whole's bounds, not looser ones


def test_of_a_large_selection_one_wrong_gradient_of_one_key_is_caught(monkeypatch: Any) -> None:
    posed = problem(mode="train")
    monkeypatch.setattr(gradient_oracle, "FULL_GRADIENT_SCORES", 100)
    monkeypatch.setattr(gradient_oracle, "GATHERED", 2**12)
    found = GradientOracle(make_inputs(posed, "random", 0, CPU), posed.Dk**-0.5)
    found.compare(right, Workspace())
    for token in (0, 17, 39):

        def wrong(case: Any, workspace: Any, token: int = token) -> torch.Tensor:
            spoilt = case.value[:, :1, token, :1]
            return right(case, workspace) + 0.01 * (spoilt - spoilt.detach()).sum()

        with pytest.raises(WrongResult, match="gradient of v off by"):
            found.compare(wrong, Workspace())


def test_the_largest_gradient_error_is_told_in_units_of_its_bound() -> None:
    posed = problem(mode="train", dtype="float64")
    found = GradientOracle(make_inputs(posed, "random", 0, CPU), posed.Dk**-0.5)

    def off_by(part: float) -> float:
        def call(case: Any, workspace: Any) -> torch.Tensor:
            return right(msgspec.structs.replace(case, query=case.query + part * (case.query - case.query.detach())), 0)

        return found.compare(call, Workspace())

    of_the_bound = float((found.truth[0].abs() / found.bounds[0]).max())
    for share in (0.25, 0.5, 0.99):
        assert off_by(share / of_the_bound) == pytest.approx(share, rel=1e-3)
    with pytest.raises(WrongResult, match="gradient of q off by"):
        off_by(1.01 / of_the_bound)


@pytest.mark.parametrize("which", ["key", "value"])
def test_in_bfloat16_a_gradient_that_is_zero_for_all_keys_but_the_popular_ones_is_caught(which: str) -> None:
    posed = problem(mode="train", dtype="bfloat16", S=4096, T=4096, G=1, h=1, Dk=16, Dv=16, topk=4)
    run, parameters = REAL["gather"].function(), REAL["gather"].defaults(posed, CPU)
    found = GradientOracle(make_inputs(posed, "random", 0, CPU), 0.25)

    def right(case: Any, workspace: Any) -> torch.Tensor:
        tensors = case.query, case.key, case.value
        return run(*tensors, case.selection, scale=0.25, workspace=workspace, **parameters)

    def wrong(case: Any, workspace: Any) -> torch.Tensor:
        tensor = getattr(case, which)
        forgetful = torch.cat((tensor[:, :, :2048], tensor[:, :, 2048:].detach()), 2)
        return right(msgspec.structs.replace(case, **{which: forgetful}), workspace)

    found.compare(right, Workspace())
    with pytest.raises(WrongResult, match=f"gradient of {which[0]} off by"):
        found.compare(wrong, Workspace())


@pytest.mark.parametrize("name", ["dense", "gather", "packed", "varlen"])
def test_right_gradients_pass_whatever_the_inputs_and_a_fifth_of_a_percent_does_not(name: str) -> None:
    posed = problem(mode="train", S=256, T=256, G=2, h=4, Dk=32, Dv=32, topk=4)
    path, scale = REAL[name], posed.Dk**-0.5
    parameters = path.defaults(posed, CPU)

    def right(case: Any, workspace: Any) -> torch.Tensor:
        tensors = case.query, case.key, case.value
        return path.function()(*tensors, case.selection, scale=scale, workspace=workspace, **parameters)

    def wrong(case: Any, workspace: Any) -> torch.Tensor:
        query = case.query + 0.002 * (case.query - case.query.detach())  # its gradient alone is off
        return right(msgspec.structs.replace(case, query=query), workspace)

    for seed in range(6):
        oracle = GradientOracle(make_inputs(posed, "scored", seed, CPU), scale)
        oracle.compare(right, Workspace())
        with pytest.raises(WrongResult, match="gradient of q off by"):
            oracle.compare(wrong, Workspace())


def test_awkward_inputs_keep_the_problems_heads_dims_and_dtype() -> None:
    posed = problem(dtype="bfloat16", h=3, Dk=12, Dv=4)
    for _, case in awkward_inputs(posed, CPU):
        kept = ("dtype", "h", "Dk", "Dv", "block_size", "topk", "form", "mode")
        assert msgspec.structs.asdict(problem_of(case, posed)).items() >= {n: getattr(posed, n) for n in kept}.items()
        assert case.query.shape[3:] == (3, 12)
        assert case.value.shape[3] == 4
        assert case.query.dtype == torch.bfloat16


def test_reserves_are_tried_below_and_above_the_need_whatever_chunk_a_candidate_takes() -> None:
    """Large enough that not all rows are gathered at once by default: a candidate that does so needs more."""
    posed = problem(S=1024, T=1024, Dk=64, Dv=64, topk=64)
    path = REAL["varlen"]
    default = path.defaults(posed, CPU)
    assert 0 < int(default["row_chunk"]) < posed.rows
    inputs, held = make_inputs(posed, "scored", 0, CPU), dict[int, int]()

    def call(case: Any, workspace: Workspace, **changes: Any) -> torch.Tensor:
        parameters = {**default, "row_chunk": 0, **changes}
        out = path.function()(
            case.query, case.key, case.value, case.selection, scale=0.1, workspace=workspace, **parameters
        )
        held[int(parameters["reserve_keys"])] = workspace.report().buffers["varlen.key"]
        return out

    with torch.no_grad():
        call(inputs, Workspace(), row_chunk=default["row_chunk"], reserve_keys=0)
        checker = Checker(posed, inputs)
        checker.scale = 0.1
        checker.oracle = Oracle(inputs, 0.1)
        checker._reserves(path, call)
    need, below, above = held[0], *(held[keys] for keys in sorted(held) if keys)
    assert max(need, below) < above
