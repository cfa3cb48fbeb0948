"""Times of ``benchmarks/selection.py``: one call by events, the host's share, replays of a graph."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import nsa
from tuner.inputs import Inputs

READS = 20
"""Of the flush before a timed call: about 1.5 ms, in which the host launches the call, so that its share is not in the
events. A flush that writes would leave its lines for the timed call to write back."""


class Clock:
    """Times calls, on a GPU by events or by the host, on a CPU by the host."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flush = torch.zeros(2**26 if self.cuda else 1, dtype=torch.int32, device=device)

    def event_us(self, call: Callable[[], object]) -> float:
        """One call with L2 flushed, launched while the device still reads the flush."""
        if not self.cuda:
            return self.host_us(call, 1)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(READS):
            torch.sum(self.flush)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def replay_us(self, graph: torch.cuda.CUDAGraph, calls: int) -> float:
        """One of the ``calls`` in a graph."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / calls

    def host_us(self, call: Callable[[], object], calls: int = 100) -> float:
        """The host's time for one of ``calls`` in a row, the device's where that is longer."""
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls * 1e6


class Replay:
    """A graph of one call per entry of ``inputs``, and all that it reads and writes, kept as long as itself.

    ``captured``: path and parameters that ran in the capture, if they are ours.
    """

    def __init__(self, run: Callable[[Inputs], Tensor], inputs: list[Inputs], clock: Clock) -> None:
        self.inputs, self.clock = inputs, clock
        for _ in range(2):
            run(inputs[0])
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with nsa.record_paths() as seen, torch.cuda.graph(self.graph):
            self.outputs = [run(case) for case in inputs]
        self.captured = {"path": seen.executed[-1].path, **seen.executed[-1].parameters} if seen.executed else {}
        self()

    def __call__(self) -> float:
        """Microseconds of one of the calls."""
        return self.clock.replay_us(self.graph, len(self.inputs))
