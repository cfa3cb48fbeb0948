"""Claims about what is timed by graph: several calls on turned inputs, each against its oracle; a sample is one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa.paths import PATHS, Candidate
from nsa.problem import SelectionProblem
from tuner import bench as benches
from tuner.bench import Bench
from tuner.measure import CALLS_PER_GRAPH, Measured, calls_per_replay
from tuner.oracle import WrongResult
from tuner.record import Sample
from tuner.trial import Rounds, Trial

CANDIDATE = Candidate(path="gather", parameters={"row_chunk": 0})
ROUNDS = Rounds(candidates=(CANDIDATE,), count=2, first=0, seed=0, sample_us=1.0, budget_s=1.0)


def problem(**changes: Any) -> SelectionProblem:
    """A cold decode call by graph, with blocks for eight."""
    fields = {
        "mode": "decode", "dtype": "float32", "B": 2, "S": 1, "T": 512, "G": 2, "h": 2, "Dk": 16, "Dv": 16,
        "block_size": 16, "topk": 4, "execution": "graph", "cache": "cold",
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


def bench_of(posed: SelectionProblem, device: str = "cpu") -> Bench:
    """A worker's bench."""
    return Bench(Trial(problem=posed, pattern="random", seed=0, device=device), lambda _: None)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What was captured, without a GPU: a replay calls it."""
    seen: list[Callable[[], Any]] = []

    def captured(call: Callable[[], Any]) -> Callable[[], Any]:
        seen.append(call)
        return call

    monkeypatch.setattr(benches, "captured", captured)
    return seen


@pytest.mark.parametrize("T", [512, 64])
def test_the_graph_of_a_cold_decode_call_holds_a_call_for_each_turned_input(
    graphs: list[Callable[[], Any]], T: int
) -> None:
    bench = bench_of(problem(T=T))
    assert bench.build(CANDIDATE) > 0
    (graph,) = graphs
    outs = graph()
    assert len(outs) == len(bench.turns) == CALLS_PER_GRAPH
    for one in range(CALLS_PER_GRAPH):
        assert not any(torch.equal(outs[one], outs[other]) for other in range(one))
    assert bench.recheck(CANDIDATE) >= 0


@pytest.mark.parametrize("turn", [0, 3, CALLS_PER_GRAPH - 1])
def test_a_replay_with_one_wrong_output_has_no_time(graphs: list[Callable[[], Any]], turn: int) -> None:
    bench = bench_of(problem())
    bench.build(CANDIDATE)
    (graph,) = graphs

    def replay() -> Any:
        outs = list(graph())
        outs[turn] = outs[(turn + 1) % CALLS_PER_GRAPH]  # as if it had read its neighbour's inputs
        return tuple(outs)

    bench.calls[CANDIDATE.name] = replay
    with pytest.raises(WrongResult, match=f"timed, {turn + 1} of {CALLS_PER_GRAPH}: off by"):
        bench.recheck(CANDIDATE)


def test_a_replay_that_leaves_an_output_unwritten_has_no_time(graphs: list[Callable[[], Any]]) -> None:
    bench = bench_of(problem())
    bench.build(CANDIDATE)
    (graph,) = graphs
    bench.calls[CANDIDATE.name] = lambda: (*graph()[:-1], torch.full_like(graph()[-1], float("nan")))
    with pytest.raises(WrongResult, match=r"8 of 8: .* not finite"):
        bench.recheck(CANDIDATE)


@pytest.mark.parametrize(
    ("posed", "calls"),
    [
        (problem(), CALLS_PER_GRAPH),
        (problem(cache="hot"), CALLS_PER_GRAPH),
        (problem(execution="eager"), 1),
        (problem(mode="prefill", S=32, T=32), 1),
        (problem(mode="train", S=32, T=32), 1),
    ],
    ids=["decode, cold", "decode, hot", "decode, eager", "prefill", "train"],
)
def test_a_sample_is_the_replays_time_over_its_calls(
    graphs: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch, posed: SelectionProblem, calls: int
) -> None:
    assert calls_per_replay(posed) == calls
    bench = bench_of(posed)
    bench.build(CANDIDATE)
    taken = Measured([Sample(0, 0, 80.0), Sample(1, 0, 40.0)], 1, 25)
    monkeypatch.setattr(bench.timer, "rounds", lambda given, **_: dict.fromkeys(given, taken))
    timing = bench.rounds(ROUNDS)[CANDIDATE.name]
    assert [sample.us for sample in timing.samples] == [80.0 / calls, 40.0 / calls]
    assert [(sample.round, sample.position) for sample in timing.samples] == [(0, 0), (1, 0)]
    assert (timing.dropped, timing.calls_per_sample) == (1, 25 * calls)


def test_what_is_not_a_graph_is_timed_as_the_bare_call(graphs: list[Callable[[], Any]]) -> None:
    bench = bench_of(problem(execution="eager"))
    bench.build(CANDIDATE)
    assert graphs == []
    assert isinstance(bench.calls[CANDIDATE.name](), torch.Tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1024, 16384])
@pytest.mark.parametrize("cache", ["cold", "hot"])
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("combine", ["inside", "launch"])
def test_each_call_of_a_captured_graph_is_written_by_its_replay_and_right(
    T: int, cache: str, combine: str, dependent: bool
) -> None:
    posed = problem(B=8, T=T, G=4, h=16, Dk=128, Dv=128, block_size=64, topk=16, dtype="bfloat16", cache=cache)
    device = torch.device("cuda")
    path = PATHS["triton_decode"]
    chosen = {**path.defaults(posed, device), "splits": 4, "combine": combine, "dependent": dependent}
    assert path.unsupported_reason(posed, device, chosen) is None
    bench, one = bench_of(posed, "cuda"), Candidate(path="triton_decode", parameters=chosen)
    bench.build(one)
    first = bench.calls[one.name]()
    before = [out.clone() for out in first]
    for out in first:
        out.fill_(float("nan"))
    assert bench.recheck(one) >= 0
    assert len(first) == len({out.data_ptr() for out in first}) == CALLS_PER_GRAPH
    assert all(torch.equal(out, old) for out, old in zip(bench.calls[one.name](), before, strict=True))
    timing = bench.rounds(Rounds(candidates=(one,), count=3, first=0, seed=0, sample_us=500.0, budget_s=5.0))[one.name]
    assert all(0 < sample.us < 1000 for sample in timing.samples)
    assert timing.calls_per_sample % CALLS_PER_GRAPH == 0
