"""Lanes: one scenario's calls on both sides of every lane, and how a pair of them is timed. Worker side.

A pair is a few short samples of either side in turn (A B, B A, ...), each side's lower quartile being its time: a core
that a neighbour takes away for a moment slows samples, never speeds them. Measured on two shared cores under full load,
decode by varlen on one thread: sd of a pair's log ratio 3.6 % by the mean of 8, 3.8 % by the median, 1.6 % by this. The
price: what strikes fewer than three of four samples is not seen in the time.

The injected lanes do extra work of the same kind (products over the scenario's own keys, on its device), calibrated in
place.
"""

from __future__ import annotations

import random
import statistics
from typing import Any, Protocol

import torch
from torch import Tensor

from tuner.compare_record import INJECTED, Lane, Scenario, Side
from tuner.inputs import make_inputs
from tuner.sides import Call, LoadedSide, leaves_of

CALIBRATIONS = 9
UNITS_AT_LEAST = {"cpu": 2, "cuda": 1}
"""In the 1 % lane, so that the 4 % lane is within half a per cent of what it says; on a GPU a unit must outlast its own
launch, or a few of them cost less than the many by which they are calibrated."""
LARGEST_UNIT = 2**16
LEAST_SHARE = 0.05
"""Of a sample, that units worth half a sample may read on a machine too loud to calibrate on."""
WARM_UP_CALLS, WARM_UP_US = 8, 4000.0
"""Untimed calls of either side before a pair, at most for so long. What ran less of late starts slower: the same code
as head read +2 % in the first sample and +0.1 % from the eighth on, since base runs in every lane and head in one."""
SAMPLE_US = {"cpu": 500.0, "cuda": 3000.0}
"""Length of a sample: on a GPU the least extra work is a launch, and 1 % of a sample must hold a few of them."""
REPEATS = {"cpu": 16, "cuda": 6}
"""Samples of one side in a pair; fewer, 2 at least, where a single call takes longer than a sample should."""


class Watch(Protocol):
    """``tuner.measure.Stopwatch``, or a scripted one."""

    def sample_us(self, call: Call, calls: int) -> float:
        """Mean microseconds per call over ``calls`` calls."""

    def calls_for(self, call: Call, target_us: float) -> int:
        """Calls per sample of about ``target_us``."""


class Padded:
    """A call, and units of extra work after the last of each sample's calls: one everywhere, more in injected lanes.

    The first unit also pays for leaving and entering the caches; as every sample has it, that cancels in a ratio.
    """

    def __init__(self, side: LoadedSide, path: str, call: Call, unit: Call, calls: int, extra: int) -> None:
        self.side, self.path, self.call = side, path, call
        self.unit, self.calls, self.extra, self.turn = unit, calls, extra, 0

    def __call__(self) -> None:
        """One call of ``calls``."""
        self.call()
        self.turn += 1
        if self.turn == self.calls:
            self.turn = 0
            for _ in range(1 + self.extra):
                self.unit()


class Stand:
    """One scenario in this process: lane -> (base, other), each with buffers of its own, and calls per sample.

    No two lanes share a call: what ran a moment ago is warm, and base would always be the warmer side.
    """

    def __init__(
        self,
        scenario: Scenario,
        sides: dict[Side, LoadedSide],
        watch: Watch,
        *,
        sample_us: float,
        kernel: tuple[str, dict[str, Any]] | None,
    ) -> None:
        self.watch, self.scenario, self.sides, self.kernel = watch, scenario, sides, kernel
        case = make_inputs(scenario.problem, scenario.pattern, 0, sides["base"].device)
        self.case = leaves_of(case) if scenario.problem.mode == "train" else case
        self.unit: Call = Unit(case.key, 1)
        self.calls, self.extra = 1, dict.fromkeys(INJECTED, 0)
        self.deal(random.Random(0))
        some = self.lanes["aa"][0]
        self.calls = watch.calls_for(some, sample_us)
        once_us = self.sample(some)
        most = REPEATS[sides["base"].device.type]
        self.repeats = min(most, max(2, round(most * sample_us / max(once_us * self.calls, 1e-3))))
        self.warm_up_calls = min(WARM_UP_CALLS, max(1, round(WARM_UP_US / max(once_us, 1e-3))))
        for call in (call for pair in self.lanes.values() for call in pair):
            call.calls = self.calls
        self.shares: list[float] = []
        self.many = self._size_unit()
        self.deal(random.Random(0))
        self.calibrate()

    def deal(self, coin: random.Random) -> None:
        """Make every lane's calls anew, in a coin's order: where buffers lie can cost 1 %, so that is drawn often."""
        others: dict[Lane, Side] = {"head": "head", **dict.fromkeys(INJECTED, "twin")}
        if self.kernel and all(self.kernel[0] in self.sides[side].package.PATHS for side in ("base", "head")):
            others["kernel"] = "head"
        self.lanes: dict[Lane, tuple[Padded, Padded]] = {}
        for lane in coin.sample(list(others), len(others)):
            made: dict[Side, Padded] = {}
            for side in coin.sample(["base", others[lane]], 2):
                made[side] = self._call(side, lane, self.extra.get(lane, 0) if side != "base" else 0)
            self.lanes[lane] = (made["base"], made[others[lane]])
        for call in [call for pair in self.lanes.values() for call in pair] * 2:
            call()  # the first call of each allocates

    def _call(self, side: Side, lane: Lane, extra: int) -> Padded:
        loaded = self.sides[side]
        path, parameters = self.scenario.path, loaded.defaults(self.scenario)
        if lane == "kernel" and self.kernel:
            path, parameters = self.kernel
        call = loaded.call(self.scenario, self.case, path, parameters)
        return Padded(loaded, path, call, self.unit, self.calls, extra)

    def _size_unit(self) -> int:
        """Choose the unit of work, fine enough for the 1 % lane; how many of it make about half a sample."""
        sample_us = min(self.sample(self.lanes["aa"][0]) for _ in range(CALIBRATIONS)) * self.calls
        finest_us = INJECTED["slow_1"] * sample_us / UNITS_AT_LEAST[self.case.key.device.type]
        size = 1
        while size < LARGEST_UNIT and self._alone_us(Unit(self.case.key, 2 * size)) < finest_us:
            size *= 2
        self.unit = Unit(self.case.key, size)
        return max(1, round(0.5 * sample_us / self._alone_us(self.unit)))

    def calibrate(self) -> None:
        """Measure in pairs which share of a sample one unit takes; the median over the whole launch is what counts.

        A launch may begin while a neighbour holds the cores, and a single calibration then was off by a factor of 14.
        """
        loaded = self.lanes["aa"][1]
        loaded.extra = self.many
        for turn in range(CALIBRATIONS - 6 * bool(self.shares)):
            base_us, other_us = self.pair("aa", base_first=turn % 2 == 0)
            self.shares.append((other_us / base_us - 1.0) / self.many)
        share = max(statistics.median(self.shares), LEAST_SHARE / self.many)  # `many` were meant as half a sample
        self.extra = {lane: max(wanted > 0, round(wanted / share)) for lane, wanted in INJECTED.items()}
        self.injected = {lane: extra * share for lane, extra in self.extra.items()}
        for lane in INJECTED:
            self.lanes[lane][1].extra = self.extra[lane]

    def _alone_us(self, unit: Call) -> float:
        return max(min(self.watch.sample_us(unit, 20) for _ in range(CALIBRATIONS)), 1e-3)

    def sample(self, call: Padded) -> float:
        """Microseconds per call over one sample."""
        return self.watch.sample_us(call, self.calls)

    def pair(self, lane: Lane, *, base_first: bool) -> tuple[float, float]:
        """(base, other): lower quartile of either side's samples, taken in turn."""
        base, other = self.lanes[lane]
        sides: list[tuple[Padded, list[float]]] = [(base, []), (other, [])]
        for call, _ in sides * self.warm_up_calls:
            call.call()
        for turn in range(self.repeats):
            for call, taken in sides if (turn % 2 == 0) == base_first else reversed(sides):
                taken.append(self.sample(call))
        quartile = (self.repeats - 1) // 4
        return sorted(sides[0][1])[quartile], sorted(sides[1][1])[quartile]


class Unit:
    """A little work of selection's own kind: products over the scenario's keys, ``size`` of them in one launch."""

    def __init__(self, key: Tensor, size: int) -> None:
        flat = key.detach().flatten(0, 2)
        self.keys = flat[:size].contiguous()
        self.query = self.keys[:1].t().repeat(1, -(-size // len(flat)))

    def __call__(self) -> None:
        """Do it once."""
        with torch.no_grad():
            torch.mm(self.keys, self.query)
