"""Claims about attestation: operators and shapes prove what executed, labels never; peaks are the allocator's."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from nsa.paths import PATHS, Candidate, Evidence
from nsa.problem import SelectionProblem
from tuner.attest import FellBack, Seen, attest, hold_against
from tuner.inputs import make_inputs
from tuner.oracle import WrongResult

CPU = torch.device("cpu")
EAGER = ("dense", "gather", "packed", "varlen", "reference")
SDPA = r"^aten::scaled_dot_product_attention$"
SCATTER = r"^aten::scatter_reduce_$"


def problem(**changes: Any) -> SelectionProblem:
    """A prefill of 100 tokens with a tail block, more queries than a rung of 64."""
    fields = {
        "mode": "prefill", "dtype": "float32", "B": 1, "S": 100, "T": 100, "G": 2, "h": 2, "Dk": 8, "Dv": 8,
        "block_size": 16, "topk": 3,
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


def candidate(name: str, posed: SelectionProblem, **parameters: Any) -> Candidate:
    """A path at its defaults but for what is given."""
    return Candidate(path=name, parameters={**PATHS[name].defaults(posed, CPU), **parameters})


def call_of(chosen: Candidate, posed: SelectionProblem) -> tuple[Callable[[], Any], Evidence]:
    """A call of a candidate, and what it declares."""
    case = make_inputs(posed, "scored", 0, CPU)
    lengths: Sequence[int] = case.selection.lengths.flatten().tolist()
    run, path = PATHS[chosen.path].function(), PATHS[chosen.path]
    parameters = {} if chosen.path == "reference" else chosen.parameters

    def call() -> None:
        run(case.query, case.key, case.value, case.selection, scale=1.0, workspace=None, **parameters)

    return call, path.evidence(posed, CPU, chosen.parameters, lengths)


def doing(**needed: int) -> Evidence:
    """Evidence of a matrix product, exactly that often."""
    return Evidence(required={r"^aten::mm$": needed.get("mm", 1)})


def multiply(times: int = 1) -> Callable[[], None]:
    """A call of that many matrix products."""
    a = torch.ones(4, 4)

    def call() -> None:
        for _ in range(times):
            torch.mm(a, a)

    return call


# Paths


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_a_path_that_runs_passes_with_its_launches_counted(name: str, mode: str) -> None:
    posed = problem(mode=mode, S=1 if mode == "decode" else 100)
    call, evidence = call_of(candidate(name, posed), posed)
    found = attest(call, evidence, cuda=False)
    assert found.kernels
    assert all(count > 0 for count in found.kernels.values())
    assert found.peak_bytes > 0


@pytest.mark.parametrize("name", ["dense", "gather", "packed", "varlen"])
def test_every_rung_shows_what_it_declares(name: str) -> None:
    posed = problem()
    for item in PATHS[name].tunables(posed, CPU):
        for rung in item.ladder:
            call, evidence = call_of(candidate(name, posed, **{item.name: rung}), posed)
            attest(call, evidence, cuda=False)


@pytest.mark.parametrize("declared", ["dense", "gather", "packed", "varlen"])
@pytest.mark.parametrize("executed", EAGER)
def test_another_path_than_the_declared_one_fell_back(declared: str, executed: str) -> None:
    posed = problem()
    _, evidence = call_of(candidate(declared, posed), posed)
    call, _ = call_of(candidate(executed, posed), posed)
    if declared == executed:
        attest(call, evidence, cuda=False)
        return
    with pytest.raises(FellBack, match=r"declared .*, saw "):
        attest(call, evidence, cuda=False)


def test_what_fell_back_names_the_pattern_and_both_counts() -> None:
    posed = problem()
    _, evidence = call_of(candidate("varlen", posed), posed)
    call, _ = call_of(candidate("packed", posed), posed)
    with pytest.raises(FellBack) as raised:
        attest(call, evidence, cuda=False)
    assert f"declared 1 launches of {SCATTER!r}, saw 0; saw aten::" in str(raised.value).replace("\\\\", "\\")


def test_another_rung_than_the_declared_one_fell_back() -> None:
    posed = problem()
    _, evidence = call_of(candidate("dense", posed, query_chunk=64), posed)
    call, _ = call_of(candidate("dense", posed, query_chunk=0), posed)
    with pytest.raises(FellBack, match=r"declared 2 launches of .*scaled_dot_product_attention.* saw 1"):
        attest(call, evidence, cuda=False)


def test_another_shape_than_the_declared_one_fell_back() -> None:
    _, evidence = call_of(candidate("dense", problem()), problem())
    shorter = problem(S=50, T=50)
    call, _ = call_of(candidate("dense", shorter), shorter)
    with pytest.raises(FellBack) as raised:
        attest(call, evidence, cuda=False)
    assert "declared input 1 of shape (1, 2, 100, 8), saw [1, 2, 50, 8]" in str(raised.value)


# Labels


def under_a_label(label: str) -> Callable[[], None]:
    """A call that does something else under a name of its own choice."""

    def call() -> None:
        with record_function(label):
            torch.ones(4).sum()

    return call


@pytest.mark.parametrize("label", ["aten::mm", "flash_attn::_flash_attn_varlen_forward"])
def test_labels_of_its_own_making_prove_nothing(label: str) -> None:
    with pytest.raises(FellBack, match=r"declared 1 launches of .*, saw 0"):
        attest(under_a_label(label), Evidence(required={f"^{label}$": 1}), cuda=False)


def test_labels_do_not_count_against_a_path_either() -> None:
    evidence = Evidence(required={r"^aten::sum$": 1}, forbidden=(r"^aten::mm$",))
    attest(under_a_label("aten::mm"), evidence, cuda=False)


# Evidence


@pytest.mark.parametrize(("declared", "done"), [(1, 0), (1, 2), (3, 2), (0, 0)])
def test_another_count_of_launches_fell_back(declared: int, done: int) -> None:
    with pytest.raises(FellBack, match=rf"declared {declared or 'at least one'} launch.*, saw {done}"):
        attest(multiply(done), doing(mm=declared), cuda=False)


@pytest.mark.parametrize(("declared", "done"), [(1, 1), (3, 3), (0, 5)])
def test_the_declared_count_passes_and_0_means_at_least_one(declared: int, done: int) -> None:
    assert attest(multiply(done), doing(mm=declared), cuda=False).kernels["aten::mm"] == done


def test_a_forbidden_operator_is_named_with_its_count() -> None:
    evidence = Evidence(required={r"^aten::mm$": 2}, forbidden=(r"^aten::addmm$", r"^aten::m+$"))
    with pytest.raises(FellBack) as raised:
        attest(multiply(2), evidence, cuda=False)
    assert str(raised.value) == "declared that '^aten::m+$' never runs, saw 2 of ['aten::mm']"


def shapes(*declared: tuple[int, tuple[int | None, ...]]) -> Evidence:
    """Evidence by input shapes of matrix products."""
    return Evidence(required={r"^aten::mm$": 0}, shapes={r"^aten::mm$": declared})


@pytest.mark.parametrize(
    "declared", [((1, (4, 4)),), ((0, (4, None)), (1, (None, 4))), ((0, (4, 4)), (0, (4, 4)))], ids=str
)
def test_declared_shapes_pass_and_none_matches_any_size(declared: Any) -> None:
    attest(multiply(2), shapes(*declared), cuda=False)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (((1, (4, 5)),), "call 0 of .* input 1 of shape (4, 5), saw [4, 4]"),
        (((0, (4, 4)), (1, (4, None, 4))), "call 1 of .* input 1 of shape (4, None, 4), saw [4, 4]"),
        (((0, (4, 4)),) * 3, "call 2 of .* input 0 of shape (4, 4), saw None"),
        (((7, (4, 4)),), "call 0 of .* input 7 of shape (4, 4), saw None"),
    ],
)
def test_other_shapes_fell_back_naming_call_and_input(declared: Any, said: str) -> None:
    with pytest.raises(FellBack) as raised:
        attest(multiply(2), shapes(*declared), cuda=False)
    for words in said.split(" .* "):
        assert words in str(raised.value)


def test_kernels_of_a_gpu_are_held_against_the_same_evidence() -> None:
    seen = Seen([("aten::mm", [[4, 4], [4, 4]])], ["selection_kernel", "selection_kernel"])
    hold_against(Evidence(required={"^selection_kernel$": 2}), seen)
    with pytest.raises(FellBack, match=r"declared 1 launches of '\^selection_kernel\$', saw 2"):
        hold_against(Evidence(required={"^selection_kernel$": 1}), seen)


@pytest.mark.parametrize("pattern", ["", "aten", ".", "aten::(empty|mm)", "e"])
def test_evidence_that_any_call_shows_proves_nothing(pattern: str) -> None:
    seen = Seen([("aten::mm", [[4, 4], [4, 4]]), ("aten::empty", [])], [])
    with pytest.raises(FellBack, match="any call shows, so nothing proves that it ran"):
        hold_against(Evidence(required={pattern: 0}), seen)
    hold_against(Evidence(required={pattern: 0, "^aten::mm$": 1}), seen)


# Memory


@pytest.mark.parametrize("count", [10_000, 1_000_000])
def test_the_peak_is_what_was_allocated(count: int) -> None:
    def call() -> None:
        torch.mm(torch.ones(4, 4), torch.ones(4, 4))
        torch.empty(count, dtype=torch.float32)

    assert attest(call, doing(), cuda=False).peak_bytes == pytest.approx(4 * count, rel=0.1)


def test_what_was_freed_does_not_add_up_and_what_is_held_does() -> None:
    def freed() -> None:
        torch.mm(torch.ones(4, 4), torch.ones(4, 4))
        for _ in range(5):
            torch.empty(250_000)

    def held() -> None:
        torch.mm(torch.ones(4, 4), torch.ones(4, 4))
        parts = [torch.empty(250_000) for _ in range(5)]
        parts.clear()
        torch.empty(250_000)

    assert attest(freed, doing(), cuda=False).peak_bytes == pytest.approx(1e6, rel=0.1)
    assert attest(held, doing(), cuda=False).peak_bytes == pytest.approx(5e6, rel=0.1)


def test_what_the_first_call_leaves_behind_is_not_the_second_ones_peak() -> None:
    kept: list[torch.Tensor] = []

    def call() -> None:
        torch.mm(torch.ones(4, 4), torch.ones(4, 4))
        if not kept:
            kept.append(torch.empty(1_000_000))
        torch.empty(250_000)

    assert attest(call, doing(), cuda=False).peak_bytes == pytest.approx(1e6, rel=0.1)


@pytest.mark.parametrize("name", [*EAGER, "flex"])
def test_a_profile_without_anything_never_satisfies_a_path(name: str) -> None:
    posed, path = problem(), PATHS[name]
    evidence = path.evidence(posed, CPU, path.defaults(posed, CPU), [16, 32] * 100)
    with pytest.raises(FellBack, match=r"saw 0; saw nothing"):
        hold_against(evidence, Seen([], []))


def test_a_call_that_keeps_memory_each_time_is_wrong_and_one_that_does_so_once_more_is_not() -> None:
    kept: list[torch.Tensor] = []

    def call(calls: int) -> None:
        torch.mm(torch.ones(4, 4), torch.ones(4, 4))
        if len(kept) < calls:
            kept.append(torch.empty(1000))

    attest(lambda: call(2), doing(), cuda=False)
    kept.clear()
    with pytest.raises(WrongResult, match="every call leaves 4000 bytes or more behind"):
        attest(lambda: call(100), doing(), cuda=False)
