"""Claims about measuring, by a scripted clock: fair orders, calls per sample, cold samples, dropped ones."""

from collections.abc import Callable, Iterator
from itertools import chain, pairwise, repeat
from typing import Any

import pytest
import torch

from tuner import measure
from tuner.measure import RoundTimer, Stopwatch, sm_clock_reader

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when a call says so, in nanoseconds."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def monotonic(self) -> float:
        return self.now_ns / 1e9

    def spend(self, us: float) -> None:
        self.now_ns += round(us * 1e3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that ``tuner.measure`` reads."""
    found = Clock()
    monkeypatch.setattr(measure, "time", found)
    return found


def rounds(timer: RoundTimer, calls: dict[str, Any], **changes: Any) -> dict[str, measure.Measured]:
    """Ten rounds unless told."""
    options = {"count": 10, "first": 0, "seed": 0, "sample_us": 100.0, "budget_s": 1e9, "about": lambda name: None}
    return timer.rounds(calls, **{**options, **changes})


def costing(clock: Clock, **us: float) -> dict[str, Callable[[], None]]:
    """Calls that take so many microseconds each."""
    return {name: lambda cost=cost: clock.spend(cost) for name, cost in us.items()}


def timer_of(clocks: Iterator[int] | None = None) -> RoundTimer:
    """A timer on the CPU; ``clocks`` scripts what the SM clock reads."""
    return RoundTimer(Stopwatch(CPU, cold=False), lambda: None if clocks is None else next(clocks))


def orders(found: dict[str, measure.Measured]) -> list[list[str]]:
    """The candidates of each round in the order they were timed in."""
    places = {(s.round, s.position): name for name, measured in found.items() for s in measured.samples}
    numbers = sorted({number for number, _ in places})
    return [[places[number, position] for position in range(len(found))] for number in numbers]


# Stopwatch


def test_a_sample_is_the_mean_of_its_calls(clock: Clock) -> None:
    costs = iter((10.0, 20.0, 60.0))
    assert Stopwatch(CPU, cold=False).sample_us(lambda: clock.spend(next(costs)), 3) == pytest.approx(30.0)


def test_a_cold_sample_flushes_before_each_call_outside_the_timed_span(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, steps = Stopwatch(CPU, cold=False), []

    def flush(read: object) -> None:
        assert read is watch.flush
        steps.append("flush")
        clock.spend(1000.0)

    def call() -> None:
        steps.append("call")
        clock.spend(7.0)

    watch.flush = torch.zeros(1)
    monkeypatch.setattr(measure.torch, "sum", flush)
    assert watch.sample_us(call, 3) == pytest.approx(7.0)
    assert steps == ["flush", "call"] * 3


def test_a_cold_stopwatch_flushes_more_than_any_cache_and_a_hot_one_nothing() -> None:
    flush = Stopwatch(CPU, cold=True).flush
    assert flush is not None
    assert flush.nbytes >= 4 * 60 * 2**20
    assert Stopwatch(CPU, cold=False).flush is None


@pytest.mark.parametrize(
    ("us", "target_us", "calls"), [(10, 1000, 100), (300, 1000, 3), (5000, 1000, 1), (0.5, 2000, 1000), (0, 2000, 1000)]
)
def test_calls_per_sample_fill_the_aimed_length_between_1_and_1000(
    clock: Clock, us: float, target_us: float, calls: int
) -> None:
    assert Stopwatch(CPU, cold=False).calls_for(lambda: clock.spend(us), target_us) == calls


def test_a_slow_first_call_does_not_count_for_calls_per_sample(clock: Clock) -> None:
    costs = chain((1e6, 50.0), repeat(10.0))
    assert Stopwatch(CPU, cold=False).calls_for(lambda: clock.spend(next(costs)), 1000.0) == 100


def test_a_hiccup_of_a_few_calls_does_not_decide_how_many_make_a_sample(clock: Clock) -> None:
    costs = chain([10.0, 300.0, 300.0, 300.0], repeat(10.0))
    assert Stopwatch(CPU, cold=False).calls_for(lambda: clock.spend(next(costs)), 1000.0) == 100


# Rounds


def test_every_round_times_every_candidate_once_in_a_fresh_order(clock: Clock) -> None:
    names = ("a", "b", "c", "d")
    found = orders(rounds(timer_of(), costing(clock, **dict.fromkeys(names, 10.0)), count=200))
    assert len(found) == 200
    assert all(sorted(order) == list(names) for order in found)
    assert len({tuple(order) for order in found}) == 24
    for place in range(4):
        seen = [order[place] for order in found]
        assert all(20 <= seen.count(name) <= 80 for name in names)  # 50 expected, sd 6: more than 4 sd to either side


def test_which_of_two_goes_first_is_a_fair_coin(clock: Clock) -> None:
    found = orders(rounds(timer_of(), costing(clock, a=10.0, b=10.0), count=400))
    heads = [order[0] == "a" for order in found]
    assert 140 <= sum(heads) <= 260
    repeats = sum(one == two for one, two in pairwise(heads))
    assert 140 <= repeats <= 260


def test_the_order_is_the_seeds(clock: Clock) -> None:
    calls = costing(clock, a=10.0, b=10.0, c=10.0)
    once, again, other = (orders(rounds(timer_of(), calls, seed=seed)) for seed in (1, 1, 2))
    assert once == again != other


def test_samples_carry_their_round_and_their_microseconds(clock: Clock) -> None:
    found = rounds(timer_of(), costing(clock, a=10.0, b=40.0), first=7, count=3)
    assert [sample.round for sample in found["a"].samples] == [7, 8, 9]
    assert {sample.us for sample in found["a"].samples} == {10.0}
    assert {sample.us for sample in found["b"].samples} == {40.0}
    assert (found["a"].calls, found["b"].calls) == (10, 2)


def test_calls_per_sample_are_settled_once_and_kept(clock: Clock) -> None:
    timer, us = timer_of(), {"a": 10.0}
    calls = {"a": lambda: clock.spend(us["a"])}
    assert rounds(timer, calls)["a"].calls == 10
    us["a"] = 50.0
    assert rounds(timer, calls)["a"].calls == 10


def test_rounds_end_with_the_budget_but_one_is_always_taken_whole(clock: Clock) -> None:
    calls = costing(clock, a=100.0, b=100.0)
    assert len(orders(rounds(timer_of(), calls, budget_s=0.0))) == 1
    assert len(orders(rounds(timer_of(), calls, budget_s=5 * 200e-6 + 1e-9))) == 6
    assert len(orders(rounds(timer_of(), calls, count=4))) == 4


def test_whoever_runs_next_is_announced_first(clock: Clock) -> None:
    told: list[str] = []
    ran: list[str] = []

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            assert told[-1] == name
            ran.append(name)
            clock.spend(200.0)

        return run

    found = rounds(timer_of(), {name: call(name) for name in "abc"}, about=told.append)
    assert ran[-30:] == [name for order in orders(found) for name in order]


# Throttling


def test_samples_under_throttling_are_dropped_and_counted(clock: Clock) -> None:
    speeds = iter([1000] * 5 + [700, 749, 750] + [1000] * 12)
    found = rounds(timer_of(speeds), costing(clock, a=10.0), count=20)["a"]
    assert found.dropped == 2
    assert [sample.round for sample in found.samples] == [*range(5), *range(7, 20)]


def test_throttling_is_judged_by_the_clocks_of_the_whole_run(clock: Clock) -> None:
    timer, calls = timer_of(iter([1000] * 10 + [600] * 4)), costing(clock, a=10.0)
    assert rounds(timer, calls)["a"].dropped == 0
    later = rounds(timer, calls, count=4, first=10)["a"]
    assert (later.dropped, later.samples) == (4, [])


def test_a_slow_machine_that_is_steady_drops_nothing(clock: Clock) -> None:
    found = rounds(timer_of(iter([300] * 20)), costing(clock, a=10.0, b=10.0))
    assert {measured.dropped for measured in found.values()} == {0}
    assert {len(measured.samples) for measured in found.values()} == {10}


def test_a_cpu_has_no_clock_to_judge_by(clock: Clock) -> None:
    assert sm_clock_reader(CPU)() is None
    found = rounds(timer_of(), costing(clock, a=10.0))["a"]
    assert (found.dropped, len(found.samples)) == (0, 10)


def test_the_self_tests_work_has_the_ratios_it_is_named_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(measure.torch, "mm", lambda *_: done.append(1))
    counts = {}
    for name, call in measure.self_test_calls(CPU).items():
        done.clear()
        call()
        counts[name] = len(done)
    for name in ("1.00", "1.01", "1.04"):
        assert counts[name] == round(float(name) * counts["base"])
