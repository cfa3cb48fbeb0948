"""Worker: a spawned process that builds, checks, attests and measures candidates, and the handle the tool drives it by.

It serves many requests and is replaced after a crash, a hang or an out-of-memory. This is the only place that catches
every exception: what a candidate raises becomes an Outcome with its reason, and the sweep goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa.device import DeviceIdentity, SoftwareIdentity, device_identity, software_identity
from nsa.errors import ReserveError, UnsupportedPathError
from nsa.paths import Candidate, SelectionPath
from nsa.workspace import Workspace
from tuner.attest import FellBack, attest, attest_replay
from tuner.check import Checker, WrongResult
from tuner.inputs import make_inputs
from tuner.measure import RoundTimer, Stopwatch, machine_clocks, self_test_calls, sm_clock_reader
from tuner.record import Outcome, SequenceSample
from tuner.trial import Assessment, Rounds, Sequence, SequenceResult, Timing, Trial

COMPILE_ERRORS = ("triton.compiler", "triton.runtime.errors", "torch._inductor", "torch._dynamo")
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


class WorkerDied(Exception):
    """The worker process ended or stopped answering; ``outcome`` is crash, hang or oom, ``about`` what it was doing."""

    def __init__(self, outcome: Outcome, reason: str, about: str) -> None:
        super().__init__(f"{outcome}: {reason}")
        self.outcome, self.reason, self.about = outcome, reason, about


def classify(error: BaseException) -> tuple[Outcome, str]:
    """The outcome an exception means, and its reason with the innermost frame."""
    text = f"{type(error).__name__}: {str(error).strip()[:500]}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, UnsupportedPathError):
        return "unsupported", str(error).removeprefix("unsupported: ")
    if isinstance(error, WrongResult):
        return "wrong", str(error)
    if isinstance(error, FellBack):
        return "fell_back", str(error)
    if isinstance(error, (ReserveError, MemoryError, torch.OutOfMemoryError)):
        return "oom", text
    if isinstance(error, RuntimeError) and any(word in str(error) for word in OUT_OF_MEMORY):
        return "oom", text
    if any(type(error).__module__.startswith(module) for module in COMPILE_ERRORS):
        return "compile_error", text + where
    return "crash", text + where


class Bench:
    """What the worker holds for the current trial. Runs inside the worker process."""

    def __init__(self, trial: Trial, about: Callable[[str], None], memory_limit_bytes: int = 0) -> None:
        self.trial, self.about, self.memory_limit_bytes = trial, about, memory_limit_bytes
        self.device = torch.device(trial.device)
        module, _, name = trial.registry.partition(":")
        self.paths: dict[str, SelectionPath] = getattr(importlib.import_module(module), name)
        self.inputs = make_inputs(trial.problem, trial.pattern, trial.seed, self.device)
        self.lengths = self.inputs.selection.lengths.flatten().tolist()
        self.checker: Checker | None = None
        self.calls: dict[str, Callable[[], Any]] = {}
        watch = Stopwatch(self.device, cold=trial.problem.cache == "cold")
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
        once = attest(lambda: self._call(candidate, self._workspace())(), evidence, cuda=cuda)
        workspace = self._workspace()
        call = self._call(candidate, workspace)
        call()
        if problem.execution == "graph":
            attest_replay(captured(call), set(once.gpu_kernels))
        report = workspace.report()
        return Assessment(
            outcome="ok",
            oracle_error=checked.error,
            oracle_bound=checked.bound,
            kernels=once.kernels,
            peak_bytes=once.peak_bytes,
            workspace_bytes=report.bytes,
            growths=report.growths,
        )

    def build(self, candidate: Candidate) -> float:
        """Make an assessed candidate ready to be timed here: one call held against the oracle, no profiler.

        A process that was profiled once launches kernels 1.5 times slower ever after (seen on an H200, docs/log.md),
        so what is timed lives in another process than what was attested. Returns microseconds of one call.
        """
        self.about(candidate.name)
        if self.checker is None:
            self.checker = Checker(self.trial.problem, self.inputs, self._workspace)
        self.checker.check_once(self.paths[candidate.path], candidate.parameters)
        call = self._call(candidate, self._workspace())
        call()
        if self.trial.problem.execution == "graph":
            call = captured(call)
        self.calls[candidate.name] = call
        self.recheck(candidate)
        began = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e6

    def _workspace(self) -> Workspace:
        return Workspace(memory_limit_bytes=self.memory_limit_bytes or None)

    def _call(self, candidate: Candidate, workspace: Workspace) -> Callable[[], Any]:
        case, parameters = self.inputs, candidate.parameters
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
        """Shared rounds over built candidates."""
        calls = {candidate.name: self.calls[candidate.name] for candidate in request.candidates}
        measured = self.timer.rounds(
            calls, count=request.count, first=request.first, seed=request.seed,
            sample_us=request.sample_us, budget_s=request.budget_s, about=self.about,
        )  # fmt: skip
        return {
            name: Timing(samples=found.samples, dropped=found.dropped, calls_per_sample=found.calls)
            for name, found in measured.items()
        }

    def recheck(self, candidate: Candidate) -> float:
        """Hold what the timed call itself gives, replays included, against the oracle. Raises WrongResult."""
        assert self.checker is not None, "build comes first"
        out = self.calls[candidate.name]()
        return self.checker.oracle.compare(out, "the very call that is timed")

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
    """The call as a CUDA graph's replay, captured after three warm-up calls on a side stream; it gives the output.

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
    if isinstance(out, Tensor):
        out.fill_(float("nan"))  # what a replay does not write must not be left over from the capture

    def replay(_reads: Callable[[], Any] = call) -> Any:
        graph.replay()
        return out

    return replay


def open_bench(argument: Any, about: Callable[[str], None], memory_limit_bytes: int) -> Any:
    """The bench for what is to be prepared: a Trial has the one above, whatever has ``open_bench`` opens its own."""
    if isinstance(argument, Trial):
        return Bench(argument, about, memory_limit_bytes)
    return argument.open_bench(about, memory_limit_bytes)


def serve(connection: Connection, device: str, memory_limit_bytes: int, stderr: str) -> None:
    """The worker process: answer requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    limit_memory(device, memory_limit_bytes)
    bench: Any = None

    def about(name: str) -> None:
        connection.send(("about", name))

    while True:
        try:
            verb, argument = connection.recv()
        except EOFError:
            return
        try:
            if verb == "identify":
                answer: Any = identify(device)
            elif verb == "self_test":
                answer = self_test(device, argument, about)
            elif verb == "prepare":
                bench = None
                bench = open_bench(argument, about, memory_limit_bytes)
                answer = bench.prepared()
            else:
                assert bench is not None, "prepare comes first"
                answer = getattr(bench, verb)(*argument)
            connection.send(("answer", answer))
        except Exception as error:  # noqa: BLE001  the worker's boundary: every failure becomes an outcome
            connection.send(("raised", classify(error)))
            if leaves(classify(error)[0], device):
                return


def leaves(outcome: Outcome, device: str) -> bool:
    """Whether a worker ends after a failure: its CUDA context may be poisoned, and the tool starts a new one."""
    return outcome in ("oom", "crash") and torch.device(device).type == "cuda"


def limit_memory(device: str, limit_bytes: int) -> None:
    """Make allocations beyond the limit fail instead of swapping or starving others. 0 = no limit."""
    if not limit_bytes:
        return
    if torch.device(device).type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
    else:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + limit_bytes, resource.RLIM_INFINITY))


def identify(device: str) -> tuple[DeviceIdentity, SoftwareIdentity, dict[str, Any]]:
    """Device, software and clocks as the worker sees them."""
    kind = torch.device(device).type
    return device_identity(kind), software_identity(), machine_clocks(torch.device(device))


def self_test(device: str, rounds: int, about: Callable[[str], None]) -> dict[str, Timing]:
    """Rounds over work of known ratios, by the same stopwatch as everything else."""
    target = torch.device(device)
    timer = RoundTimer(Stopwatch(target, cold=False), sm_clock_reader(target))
    found = timer.rounds(
        self_test_calls(target), count=rounds, first=0, seed=0, sample_us=1000.0, budget_s=10.0, about=about
    )
    return {
        name: Timing(samples=item.samples, dropped=item.dropped, calls_per_sample=item.calls)
        for name, item in found.items()
    }


class Worker:
    """The tool's handle of a worker process. ``ask`` raises WorkerDied where no answer comes."""

    def __init__(self, device: str, *, memory_limit_bytes: int = 0) -> None:
        self.device, self.memory_limit_bytes = device, memory_limit_bytes
        self.log = Path(tempfile.mkstemp(prefix="nsa-tune-worker-")[1])
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, device, memory_limit_bytes, str(self.log)), daemon=True
        )
        self.process.start()
        theirs.close()
        self.doing = "starting"

    def ask(self, verb: str, argument: Any = None, *, timeout_s: float) -> Any:
        """Send a request and wait. Raises CandidateFailed for a failure inside, WorkerDied for a process gone."""
        deadline = time.monotonic() + timeout_s
        try:
            self.connection.send((verb, argument))
            while True:
                if not self.connection.poll(max(0.0, deadline - time.monotonic())):
                    raise self._died("hang", f"no answer to {verb!r} within {timeout_s:.0f} s")
                kind, content = self.connection.recv()
                if kind == "answer":
                    return content
                if kind == "raised":
                    if leaves(content[0], self.device):
                        self.close()
                    raise CandidateFailed(*content)
                self.doing = content
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise self._death() from None

    def _death(self) -> WorkerDied:
        self.process.join(5)
        code = self.process.exitcode
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if "USDT" not in line]
        last = lines[-1][:300] if lines else ""
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            outcome: Outcome = "oom" if name == "SIGKILL" else "crash"
            return self._died(outcome, f"the worker was ended by {name}; {last}".rstrip("; "))
        return self._died("crash", f"the worker exited with {code}; {last}".rstrip("; "))

    def _died(self, outcome: Outcome, reason: str) -> WorkerDied:
        doing = self.doing
        self.close()
        return WorkerDied(outcome, reason, doing)

    @property
    def alive(self) -> bool:
        """Whether the process can still answer."""
        return self.process.is_alive()

    def close(self) -> None:
        """End the process, by force if need be."""
        self.connection.close()
        self.process.join(0.2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        with contextlib.suppress(FileNotFoundError):
            self.log.unlink()


class CandidateFailed(Exception):
    """A request failed inside the worker with a classified outcome."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(f"{outcome}: {reason}")
        self.outcome, self.reason = outcome, reason
