"""Pairing: base, head and base once more in one process, timed in pairs; a coin decides which side is first.

Each round takes one pair of every lane in random order: head against base in each scenario, and base against its twin,
plain and with 1 % and 4 % of extra work, by which a run audits itself. It compares nothing and decides nothing. Worker
side.
"""

from __future__ import annotations

import gc
import importlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from tuner.compare_record import INJECTED, Lane, Pair, Question, Scenario, Side
from tuner.lanes import SAMPLE_US, Stand, Watch
from tuner.measure import THROTTLED_BELOW, sm_clock_reader, watch_settings
from tuner.sides import LoadedSide


class PairTrial(msgspec.Struct, frozen=True, kw_only=True):
    """Load the sides in this order and make the scenarios' calls.

    ``kernels``: scenario -> path and parameters that base chose, for the lane that calls it directly.
    """

    question: Question
    order: tuple[Side, ...]
    scenarios: tuple[Scenario, ...]
    kernels: dict[str, tuple[str, dict[str, Any]]] = {}

    def open_bench(self, about: Callable[[str], None], _memory_limit_bytes: int) -> PairBench:
        """In the worker."""
        return PairBench(self, about)


class Rounds(msgspec.Struct, frozen=True, kw_only=True):
    """A request: ``count`` rounds from ``first`` on, fewer where ``budget_s`` ends.

    In each round one pair per lane of ``lanes``, and one of each audit lane on the scenarios of ``audited`` in turn, if
    any. ``coin`` seeds the order of lanes and the coin of each pair.
    """

    lanes: tuple[tuple[str, Lane], ...]
    audited: tuple[str, ...]
    first: int
    count: int
    coin: str
    budget_s: float


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Pairs in the order measured, pairs dropped for throttling, and the median SM clock (0 on a CPU).

    ``injected``: audited scenario -> lane -> share of extra work as calibrated so far in this launch.
    """

    pairs: list[Pair]
    dropped: int
    clock_mhz: int
    injected: dict[str, dict[Lane, float]] = {}


class PairBench:
    """All scenarios of a comparison in one process."""

    def __init__(self, trial: PairTrial, about: Callable[[str], None]) -> None:
        question, device = trial.question, torch.device(trial.question.device)
        trees = {"base": question.base, "twin": question.base, "head": question.head}
        sides = {side: LoadedSide(trees[side], side, device) for side in trial.order}
        module, _, name = question.watch.partition(":")
        make_watch: Callable[..., Watch] = getattr(importlib.import_module(module), name)
        self.about, self.clock, self.clocks = about, sm_clock_reader(device), list[int]()
        self.stands: dict[str, Stand] = {}
        watches: dict[tuple[bool, ...], Watch] = {}
        sample_us = question.sample_us or SAMPLE_US[device.type]
        for scenario in trial.scenarios:
            about(f"{scenario.name}|head")  # base passed the same checks in a process of its own
            settings = watch_settings(scenario.problem)
            key = tuple(settings.values())
            watch = watches[key] = watches.get(key) or make_watch(device, **settings)
            kernel = trial.kernels.get(scenario.name)
            stand = Stand(scenario, sides, watch, sample_us=sample_us, kernel=kernel)
            self.stands[scenario.name] = stand

    def prepared(self) -> dict[str, int]:
        """Scenario -> calls per sample."""
        return {name: stand.calls for name, stand in self.stands.items()}

    def rounds(self, request: Rounds) -> Answer:
        """Measure. No garbage is collected in between."""
        pairs, dropped, deadline = list[Pair](), 0, time.monotonic() + request.budget_s
        for name in {name for name, _ in request.lanes} | set(request.audited):
            self.stands[name].deal(random.Random(f"{request.coin}/{request.first}/{name}"))
        for name in request.audited:
            self.stands[name].calibrate()
        gc.disable()
        try:
            for number in range(request.first, request.first + request.count):
                coin = random.Random(f"{request.coin}/{number}")
                audited = request.audited[number % len(request.audited) :][:1] if request.audited else ()
                lanes = [*request.lanes, *((name, lane) for name in audited for lane in INJECTED)]
                coin.shuffle(lanes)
                for name, lane in lanes:
                    pair = self._pair(name, lane, number, base_first=coin.random() < 0.5)
                    dropped += pair is None
                    pairs += [pair] if pair else []
                if time.monotonic() > deadline:
                    break
        finally:
            gc.enable()
        injected = {name: self.stands[name].injected for name in request.audited}
        clock_mhz = round(statistics.median(self.clocks or [0]))
        return Answer(pairs=pairs, dropped=dropped, clock_mhz=clock_mhz, injected=injected)

    def _pair(self, name: str, lane: Lane, number: int, *, base_first: bool) -> Pair | None:
        """One pair; None where the GPU was throttled."""
        self.about(f"{name}|{'head' if lane in ('head', 'kernel') else 'base'}")
        base_us, other_us = self.stands[name].pair(lane, base_first=base_first)
        clock = self.clock()
        if clock is not None:
            self.clocks.append(clock)
            if clock < THROTTLED_BELOW * statistics.median(self.clocks):
                return None
        return Pair(name, lane, number, base_first, base_us, other_us)
