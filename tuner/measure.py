"""Measure: time candidates of one problem in shared rounds, each in fresh random order. Worker side.

A sample is the mean of several calls, by CUDA events on a GPU and ``perf_counter`` on a CPU, with a cache flush before
each call where the problem says ``cold``. A call may be the replay of a graph that holds several calls of a path:
``tuner.bench`` divides by them. It compares nothing and decides nothing; samples come back raw.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from nsa.problem import SelectionProblem
from tuner.record import Sample

FLUSH_BYTES = 256 * 2**20
"""More than four times the largest L2 we know (60 MB on an H200)."""
THROTTLED_BELOW = 0.75
"""Of the run's median SM clock."""
CALIBRATIONS = 20
KNOWN = ("1.00", "1.01", "1.04")
"""Ratios of work that the timer's self-test has to read."""
CALLS_PER_GRAPH = 8
"""Of a path, in the graph that a sweep times in decode. A decode step's graph holds dozens of kernels; with one call in
it the start of a graph is in the time, and what launching a kernel before the last one ended gains is not."""

Call = Callable[[], Any]


class Stopwatch:
    """Times calls on one device; ``cold`` flushes the cache before each call, outside the timed span.

    ``waits``: a cold call on a GPU begins when the flush has ended, so that the host's share is in the span whole; else
    the call is queued behind the flush, which hides as much of the host as the flush happens to take.
    """

    def __init__(self, device: torch.device, *, cold: bool, waits: bool = False) -> None:
        self.device, self.waits = device, waits
        self.flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if cold else None

    def sample_us(self, call: Call, calls: int) -> float:
        """Mean microseconds per call over ``calls`` calls."""
        return self._cuda(call, calls) if self.device.type == "cuda" else self._cpu(call, calls)

    def _cpu(self, call: Call, calls: int) -> float:
        if self.flush is None:
            began = time.perf_counter_ns()
            for _ in range(calls):
                call()
            return (time.perf_counter_ns() - began) / 1e3 / calls
        spent = 0
        for _ in range(calls):
            torch.sum(self.flush)
            began = time.perf_counter_ns()
            call()
            spent += time.perf_counter_ns() - began
        return spent / 1e3 / calls

    def _cuda(self, call: Call, calls: int) -> float:
        if self.flush is None:
            first, last = timing_event(), timing_event()
            first.record()
            for _ in range(calls):
                call()
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) * 1e3 / calls
        spans = []
        for _ in range(calls):
            torch.sum(self.flush)  # read, not written: lines to be written back would be the timed call's to write
            first, last = timing_event(), timing_event()
            if self.waits:
                torch.cuda.synchronize()
            first.record()
            call()
            last.record()
            spans.append((first, last))
        torch.cuda.synchronize()
        return float(sum(first.elapsed_time(last) for first, last in spans)) * 1e3 / calls

    def calls_for(self, call: Call, target_us: float) -> int:
        """Calls per sample so that one sample takes about ``target_us``; at least 1, at most 1000.

        By the shortest of CALIBRATIONS calls, of fewer where they take longer than a sample, 2 at least. Who is given
        fewer calls than its twin by a hiccup pays for its first call in each sample, and is slower by the evidence.
        """
        self.sample_us(call, 1)
        tried = [self.sample_us(call, 1), self.sample_us(call, 1)]
        while len(tried) < CALIBRATIONS and sum(tried) < target_us:
            tried.append(self.sample_us(call, 1))
        return max(1, min(1000, round(target_us / max(min(tried), 0.1))))


def watch_settings(problem: SelectionProblem) -> dict[str, bool]:
    """How a problem is timed. The host belongs to an eager decode step; in longer calls and replays it runs ahead."""
    return {"cold": problem.cache == "cold", "waits": problem.mode == "decode" and problem.execution == "eager"}


def calls_per_replay(problem: SelectionProblem) -> int:
    """Calls of a path in the graph that a sweep times; 1 where it times no graph, and beyond decode: calls are long."""
    return CALLS_PER_GRAPH if problem.mode == "decode" and problem.execution == "graph" else 1


def timing_event() -> torch.cuda.Event:
    """A CUDA event that keeps time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Measured(msgspec.Struct, frozen=True):
    """Samples of one candidate, how many were dropped for throttling, and calls per sample."""

    samples: list[Sample]
    dropped: int
    calls: int


class RoundTimer:
    """Shared rounds over named calls. Remembers calls per sample and the run's clocks between requests."""

    def __init__(self, watch: Stopwatch, clock: Callable[[], int | None]) -> None:
        self.watch, self.clock = watch, clock
        self.calls: dict[str, int] = {}
        self.clocks: list[int] = []

    def rounds(
        self,
        calls: dict[str, Call],
        *,
        count: int,
        first: int,
        seed: int,
        sample_us: float,
        budget_s: float,
        about: Callable[[str], None],
    ) -> dict[str, Measured]:
        """Up to ``count`` rounds within ``budget_s``, at least one. ``about(name)`` is told what runs next."""
        for name, call in calls.items():
            if name not in self.calls:
                about(name)
                self.calls[name] = self.watch.calls_for(call, sample_us)
        order = list(calls)
        coin = random.Random(seed)
        taken: dict[str, list[tuple[Sample, int | None]]] = {name: [] for name in order}
        deadline = time.monotonic() + budget_s
        for number in range(first, first + count):
            coin.shuffle(order)
            for position, name in enumerate(order):
                about(name)
                us = self.watch.sample_us(calls[name], self.calls[name])
                clock = self.clock()
                if clock is not None:
                    self.clocks.append(clock)
                taken[name].append((Sample(number, position, us), clock))
            if time.monotonic() > deadline:
                break
        return {name: self._kept(name, samples) for name, samples in taken.items()}

    def _kept(self, name: str, samples: Sequence[tuple[Sample, int | None]]) -> Measured:
        floor = THROTTLED_BELOW * statistics.median(self.clocks) if self.clocks else 0
        kept = [sample for sample, clock in samples if clock is None or clock >= floor]
        return Measured(kept, len(samples) - len(kept), self.calls[name])


def sm_clock_reader(device: torch.device) -> Callable[[], int | None]:
    """A function that reads the GPU's SM clock in MHz; None on a CPU."""
    if device.type != "cuda":
        return lambda: None
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    return lambda: int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))


def machine_clocks(device: torch.device) -> dict[str, int | float | str | bool]:
    """Clocks, power limit and driver of a GPU; threads of a CPU. For the run's environment."""
    if device.type != "cuda":
        return {"threads": torch.get_num_threads()}
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    return {
        "sm_mhz": int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "max_sm_mhz": int(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "memory_mhz": int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "temperature_c": int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    }


def self_test_calls(device: torch.device) -> dict[str, Call]:
    """Known work: ``1.00``, ``1.01`` and ``1.04`` times that of ``base``, by counting equal matrix products."""
    size = 128 if device.type == "cpu" else 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)

    def products(count: int) -> Call:
        def call() -> None:
            for _ in range(count):
                torch.mm(a, b)

        return call

    return {"base": products(100), **{known: products(round(100 * float(known))) for known in KNOWN}}
