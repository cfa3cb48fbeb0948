"""Bench: what a worker holds for one trial: inputs, oracles, and the calls that are proven or timed. Worker side.

It catches nothing; ``tuner.worker`` turns what it raises into outcomes.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor

from nsa.paths import Candidate, SelectionPath
from nsa.workspace import Workspace
from tuner.attest import attest, attest_replay
from tuner.check import Checker
from tuner.inputs import Inputs, make_inputs, turned_inputs
from tuner.measure import RoundTimer, Stopwatch, calls_per_replay, sm_clock_reader, watch_settings
from tuner.oracle import Oracle
from tuner.record import SequenceSample
from tuner.trial import Assessment, Rounds, Sequence, SequenceResult, Timing, Trial


class Bench:
    """What the worker holds for the current trial. Runs inside the worker process."""

    def __init__(self, trial: Trial, about: Callable[[str], None], memory_limit_bytes: int = 0) -> None:
        self.trial, self.about, self.memory_limit_bytes = trial, about, memory_limit_bytes
        self.device = torch.device(trial.device)
        module, _, name = trial.registry.partition(":")
        self.paths: dict[str, SelectionPath] = getattr(importlib.import_module(module), name)
        # first: what it flushes L2 with would settle in the memory that inputs were made in, and keep it from others
        watch = Stopwatch(self.device, **watch_settings(trial.problem))
        self.inputs = make_inputs(trial.problem, trial.pattern, trial.seed, self.device)
        self.lengths = self.inputs.selection.lengths.flatten().tolist()
        self.checker: Checker | None = None
        self.turns: list[tuple[Inputs, Oracle]] = []
        self.per_replay = calls_per_replay(trial.problem)
        self.calls: dict[str, Callable[[], Any]] = {}
        self.timer = RoundTimer(watch, sm_clock_reader(self.device))

    def prepared(self) -> Any:
        """What the tool is told when the inputs are there: the measured overlap of the selections."""
        return self.inputs.union

    def assess(self, candidate: Candidate, thorough: bool) -> Assessment:
        """Build, check, attest: everything that must hold before a clock is read."""
        problem = self.trial.problem
        path = self.paths[candidate.path]
        reason = path.unsupported_reason(problem, self.device, candidate.parameters)
        if reason is not None:
            return Assessment(outcome="unsupported", reason=reason)
        self.about(candidate.name)
        if self.checker is None:
            self.checker = Checker(problem, self.inputs, self._workspace)
        checked = self.checker.check(path, candidate.parameters, thorough=thorough)
        evidence = path.evidence(problem, self.device, candidate.parameters, self.lengths)
        cuda = self.device.type == "cuda"
        once = attest(lambda: self._call(candidate, self._workspace(), self.inputs)(), evidence, cuda=cuda)
        workspace = self._workspace()
        call = self._call(candidate, workspace, self.inputs)
        call()
        if problem.execution == "graph":  # the first call may also fill what it allocates; a replay does not
            warm = attest(call, evidence, cuda=cuda)
            attest_replay(captured(call), set(warm.gpu_kernels))
        report = workspace.report()
        return Assessment(
            outcome="ok",
            oracle_error=checked.error,
            oracle_bound=checked.bound,
            kernels=once.kernels,
            gpu_kernels=once.gpu_kernels,
            peak_bytes=once.peak_bytes,
            workspace_bytes=report.bytes,
            growths=report.growths,
        )

    def build(self, candidate: Candidate) -> float:
        """Make an assessed candidate ready to be timed here: one call held against the oracle, no profiler.

        A process that was profiled once launches kernels 1.5 times slower ever after (seen on an H200, docs/log.md),
        so what is timed lives in another process than what was attested. A graph holds a call for each of the turned
        inputs, in turn. Returns microseconds of one call.
        """
        self.about(candidate.name)
        if self.checker is None:
            self.checker = Checker(self.trial.problem, self.inputs, self._workspace)
        self.checker.check_once(self.paths[candidate.path], candidate.parameters)
        self.turns = self.turns or self._turned(self.checker)
        workspace = self._workspace()
        call = self._call(candidate, workspace, self.inputs)
        call()
        if self.trial.problem.execution == "graph":
            calls = [self._call(candidate, workspace, case) for case, _ in self.turns]
            call = captured(lambda: tuple(one() for one in calls))
        self.calls[candidate.name] = call
        self.recheck(candidate)
        began = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e6 / self.per_replay

    def _turned(self, checker: Checker) -> list[tuple[Inputs, Oracle]]:
        """The inputs of the calls that are timed together, each with its oracle; these are made one at a time."""
        cases = turned_inputs(self.trial.problem, self.inputs, self.per_replay)
        return [(case, checker.oracle if case is self.inputs else Oracle(case, checker.scale)) for case in cases]

    def _workspace(self) -> Workspace:
        return Workspace(memory_limit_bytes=self.memory_limit_bytes or None)

    def _call(self, candidate: Candidate, workspace: Workspace, case: Inputs) -> Callable[[], Any]:
        parameters = candidate.parameters
        run = self.paths[candidate.path].function()
        scale = case.query.shape[-1] ** -0.5
        if self.trial.problem.mode == "train":
            leaves = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
            query, key, value = leaves
            ones = torch.ones((*case.query.shape[:4], case.value.shape[3]), dtype=case.value.dtype, device=self.device)

            def step() -> Tensor:
                out = run(query, key, value, case.selection, scale=scale, workspace=workspace, **parameters)
                torch.autograd.grad(out, leaves, ones)
                return out.detach()

            return step

        def forward() -> Tensor:
            with torch.no_grad():
                return run(
                    case.query, case.key, case.value, case.selection, scale=scale, workspace=workspace, **parameters
                )

        return forward

    def rounds(self, request: Rounds) -> dict[str, Timing]:
        """Shared rounds over built candidates. A sample is the time of a call: that of a replay over its calls."""
        calls = {candidate.name: self.calls[candidate.name] for candidate in request.candidates}
        measured = self.timer.rounds(
            calls, count=request.count, first=request.first, seed=request.seed,
            sample_us=request.sample_us, budget_s=request.budget_s, about=self.about,
        )  # fmt: skip
        return {
            name: Timing(
                samples=[msgspec.structs.replace(sample, us=sample.us / self.per_replay) for sample in found.samples],
                dropped=found.dropped,
                calls_per_sample=found.calls * self.per_replay,
            )
            for name, found in measured.items()
        }

    def recheck(self, candidate: Candidate) -> float:
        """Hold all that the timed call itself gives, replays included, against the oracles. Raises WrongResult."""
        given = self.calls[candidate.name]()
        outs = given if isinstance(given, tuple) else (given,)
        return max(
            oracle.compare(out, f"the very call that is timed, {number} of {len(outs)}")
            for number, ((_, oracle), out) in enumerate(zip(self.turns, outs, strict=True), 1)
        )

    def release(self, names: tuple[str, ...]) -> None:
        """Forget built candidates and the memory that their calls hold."""
        for name in names:
            self.calls.pop(name, None)

    def sequence(self, request: Sequence) -> SequenceResult:
        """Latency and growths of each call along a sequence of contexts, one workspace throughout."""
        candidate, workspace = request.candidate, self._workspace()
        run = self.paths[candidate.path].function()
        cases = {context: self.inputs.at(context) for context in set(request.contexts)}
        watch = Stopwatch(self.device, cold=False)
        samples = []
        for step, context in enumerate(request.contexts):
            self.about(f"{candidate.name} at {context}")
            case = cases[context]

            def call(case: Any = case) -> None:
                run(
                    case.query, case.key, case.value, case.selection,
                    scale=case.query.shape[-1] ** -0.5, workspace=workspace, **candidate.parameters,
                )  # fmt: skip

            with torch.no_grad():
                us = watch.sample_us(call, 1)
            samples.append(SequenceSample(step, context, us, workspace.growths))
        return SequenceResult(samples=samples, workspace_bytes=workspace.bytes, growths=workspace.growths)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph's replay, captured after three warm-up calls on a side stream; it gives what the call
    gave: an output, or a tuple of outputs.

    What is returned keeps the call, and so the inputs and workspace buffers that the graph reads, alive.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for tensor in out if isinstance(out, tuple) else (out,):
        tensor.fill_(float("nan"))  # what a replay does not write must not be left over from the capture

    def replay(_reads: Callable[[], Any] = call) -> Any:
        graph.replay()
        return out

    return replay
