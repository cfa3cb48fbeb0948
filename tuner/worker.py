"""Worker: a spawned process that builds, checks, attests and measures candidates, and the handle the tool drives it by.

It serves many requests and is replaced after a crash, a hang or an out-of-memory. This is the only place that catches
every exception: what a candidate raises becomes an Outcome with its reason, and the sweep goes on.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.resource_tracker
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

from nsa.device import DeviceIdentity, SoftwareIdentity, device_identity, software_identity
from nsa.errors import ReserveError, UnsupportedPathError
from tuner.attest import FellBack
from tuner.bench import Bench
from tuner.measure import RoundTimer, Stopwatch, machine_clocks, self_test_calls, sm_clock_reader
from tuner.oracle import WrongResult
from tuner.record import Outcome
from tuner.trial import Timing, Trial

COMPILE_ERRORS = ("triton.compiler", "triton.runtime.errors", "torch._inductor", "torch._dynamo")
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


class WorkerDied(Exception):
    """The worker process ended or stopped answering; ``outcome`` is crash, hang or oom, ``about`` what it was doing."""

    def __init__(self, outcome: Outcome, reason: str, about: str) -> None:
        super().__init__(f"{outcome}: {reason}")
        self.outcome, self.reason, self.about = outcome, reason, about


def classify(error: BaseException) -> tuple[Outcome, str]:
    """The outcome an exception means, and its reason with the innermost frame."""
    said, _, _ = " ".join(str(error).split()).partition(" Repro command:")  # ptxas' would name paths of this machine
    text = f"{type(error).__name__}: {said[:500]}"
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


def open_bench(argument: Any, about: Callable[[str], None], memory_limit_bytes: int) -> Any:
    """The bench for what is to be prepared: a plain Trial has ``Bench``, whatever has ``open_bench`` opens its own."""
    if type(argument) is Trial:
        return Bench(argument, about, memory_limit_bytes)
    return argument.open_bench(about, memory_limit_bytes)


def serve(connection: Connection, device: str, memory_limit_bytes: int, stderr: str) -> None:
    """The worker process: answer requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):  # what a path prints is none of the tool's results
        os.dup2(log, output)
    process = os.getpid()
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
                bench = answer = None
                release_memory(device)
                bench = open_bench(argument, about, memory_limit_bytes)
                release_memory(device)  # of what the inputs were made from, before anything small settles in it
                answer = bench.prepared()
            elif verb == "forget":
                bench = answer = None
                release_memory(device)
            else:
                assert bench is not None, "prepare comes first"
                answer = getattr(bench, verb)(*argument)
            reply: tuple[str, Any] = ("answer", answer)
        except Exception as error:  # noqa: BLE001  the worker's boundary: every failure becomes an outcome
            reply = ("raised", classify(error))
        if os.getpid() != process:  # a candidate forked: two processes would answer, one of them the next request
            os._exit(0)
        ends = reply[0] == "raised" and leaves(reply[1][0], device)
        if verb == "assess" and not ends:
            release_memory(device)  # what a proof needed may be what building it to be timed, elsewhere, wants
        connection.send(reply)
        if ends:
            return


def leaves(outcome: Outcome, device: str) -> bool:
    """Whether a worker ends after a failure: its CUDA context may be poisoned, and the tool starts a new one."""
    return outcome in ("oom", "crash") and torch.device(device).type == "cuda"


def release_memory(device: str) -> None:
    """Give memory that nothing holds any more back to the device, where other workers may need it."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


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
        multiprocessing.resource_tracker.ensure_running()  # which would unblock the signal, were it started below
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        try:
            self.process.start()  # born deaf to Ctrl-C, which ends the tool: imports take seconds before serve()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
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
