"""TrainingLog: watches a training loop without making it wait, and writes its records.

Losses stay on the device and are read every few steps; what ran is asked of ``nsa.record_paths``; memory of the
allocator. One more step runs under a profiler at the very end, since a profiled process is no longer one to time.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # re-exported without __all__
from torch.profiler import ProfilerActivity, profile

from nsa.attention import shared_workspace
from nsa.device import device_identity, software_identity
from nsa.flags import Flags
from nsa.trace import ExecutionRecord, record_paths
from tuner.checkout import current_commit
from tuner.measure import machine_clocks
from tuner.record import Environment, new_run_id
from tuner.training_record import KernelTime, Route, TrainingFolder, TrainingRecord, TrainingSetup
from tuner.worker import classify

WAITS = {
    "cpu": ("aten::_local_scalar_dense", "aten::nonzero"),
    "cuda": ("cudaStreamSynchronize", "cudaEventSynchronize"),
}
"""Kind of device -> what in a profile makes the host wait for it, or would if the operator ran on one."""
NAME_LENGTH = 240
"""Of a kernel's name, which may hold all its template arguments."""


class TrainingLog:
    """Give it every step's loss; it prints and records. Use as a context manager: an exception becomes a record too.

    Args:
        model: what is called once per step; its forward pass is asked for the bytes it leaves.
        every: steps between two readings. The first step is read alone: it compiles, tunes and allocates.
    """

    def __init__(
        self, setup: TrainingSetup, flags: Flags, model: nn.Module, *, device: torch.device, out: Path, every: int = 10,
        commit: str = "",
    ) -> None:  # fmt: skip
        self.setup, self.flags, self.device, self.every = setup, flags, device, every
        self.commit = commit or current_commit()
        self.now = datetime.now(UTC)
        identity = device_identity(device.type)
        self.run_id = new_run_id(self.now, self.commit)
        self.folder = TrainingFolder(out / "records" / identity.slug / setup.name / self.run_id)
        self.folder.start(
            Environment(
                run_id=self.run_id, commit=self.commit, date=self.now.isoformat(timespec="seconds"),
                tool="examples/train.py", device=msgspec.to_builtins(identity),
                software=msgspec.to_builtins(software_identity()), clocks=machine_clocks(device), timer={},
                sweep=msgspec.to_builtins(setup),
            )
        )  # fmt: skip
        self.losses = torch.zeros(setup.steps, device=device)
        self.done = self.read = 0
        self.allocated = self.activations = 0
        self.stack = ExitStack()
        for hook in (model.register_forward_pre_hook(self._before), model.register_forward_hook(self._after)):
            self.stack.callback(hook.remove)

    def __enter__(self) -> TrainingLog:
        self.seen = self.stack.enter_context(record_paths())
        self._mark()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            outcome, reason = classify(error)
            self._write(self._record(outcome=outcome, reason=reason))
        self.stack.close()
        if error is None:
            self.folder.finish()

    def add(self, loss: Tensor) -> None:
        """One step's loss, a scalar on the device. Every few steps: wait, read, print, record."""
        self.losses[self.done] = loss.detach()
        self.done += 1
        if self.done == 1 or (self.done - 1) % self.every == 0 or self.done == self.setup.steps:
            self._reading()

    def profile(self, step: Callable[[], Any]) -> None:
        """Run one more step under a profiler and record its kernels and how often the host waited. Call it last."""
        self.seen.executed.clear()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        synchronize(self.device)
        with profile(activities=activities) as profiler:
            step()
        synchronize(self.device)
        found = self._record(
            profiled=True, kernels=kernels_of(profiler, self.device),
            synchronisations=host_waits(profiler, self.device) if self.device.type == "cuda" else None,
        )  # fmt: skip
        self._write(found)

    def _reading(self) -> None:
        synchronize(self.device)
        seconds, first = time.perf_counter() - self.began, self.read
        losses = self.losses[first : self.done].tolist()
        finite = [loss for loss in losses if math.isfinite(loss)]
        bad = next((first + place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
        steps = self.done - first
        found = self._record(
            outcome="ok" if bad is None else "wrong", reason="" if bad is None else f"loss of step {bad} is not finite",
            losses=finite, tokens=steps * self.setup.tokens, seconds=seconds,
        )  # fmt: skip
        self._write(found)
        self.read = self.done
        peak = f"{(found.peak_bytes or 0) / 2**30:.2f} GiB"
        print(f"step {self.done:4d}  loss {losses[-1]:.4f}  {found.tokens_per_s:9,.0f} tokens/s  peak {peak}")
        self._mark()

    def _record(self, **fields: Any) -> TrainingRecord:
        workspace = shared_workspace(self.device).report()
        return TrainingRecord(
            run_id=self.run_id, commit=self.commit, date=datetime.now(UTC).isoformat(timespec="seconds"),
            first_step=self.read, executed=routes_of(self.seen.executed, self.flags, self.setup.requested),
            peak_bytes=peak_bytes(self.device), activation_bytes=self.activations or None,
            workspace_bytes=workspace.bytes, growths=workspace.growths, **fields,
        )  # fmt: skip

    def _write(self, record: TrainingRecord) -> None:
        self.folder.lines.append(record)

    def _mark(self) -> None:
        self.seen.executed.clear()
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.began = time.perf_counter()

    def _before(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.allocated = torch.cuda.memory_allocated(self.device)

    def _after(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.activations = torch.cuda.memory_allocated(self.device) - self.allocated


def requested_by(flags: Flags) -> dict[str, str]:
    """Operation -> what the flags ask for."""
    words = {True: "flash_attn where it can run", False: "not flash_attn", None: "auto"}
    return {
        "selection": flags.path or "auto",
        "compression": words[flags.flash_attention_compression],
        "window": words[flags.flash_attention_window],
    }


def routes_of(executed: list[ExecutionRecord], flags: Flags, requested: dict[str, str]) -> list[Route]:
    """What ran, counted, each held against what was requested."""
    counts = Counter(
        (run.operation, run.path, tuple(run.parameters.items()), run.status, run.reason) for run in executed
    )
    return [
        Route(
            operation=operation, path=path, parameters=dict(parameters), status=status, reason=reason, calls=calls,
            requested=requested.get(operation, "auto"), met=met(operation, path, flags),
        )
        for (operation, path, parameters, status, reason), calls in counts.items()
    ]  # fmt: skip


def met(operation: str, path: str, flags: Flags) -> bool:
    """Whether a path that ran is one that the flags allow."""
    if operation == "selection":
        return flags.path in (None, path)
    allowed = {"compression": flags.flash_attention_compression, "window": flags.flash_attention_window}
    return not path.startswith("flash_attn") or allowed.get(operation) is not False


def host_waits(profiler: profile, device: torch.device) -> int:
    """How often the host waited for the device, or read from it, in a finished profile."""
    events = profiler.events() or []  # type: ignore[no-untyped-call]
    return sum(1 for event in events if event.name in WAITS[device.type])


def kernels_of(profiler: profile, device: torch.device) -> list[KernelTime]:
    """Kernels of a finished profile by time, the dearest first; operators on a CPU."""
    cuda = device.type == "cuda"
    found = [
        KernelTime(
            item.key[:NAME_LENGTH], item.count, float(item.self_device_time_total if cuda else item.self_cpu_time_total)
        )
        for item in profiler.key_averages()
        if item.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)
        if "#" not in item.key and (cuda or "::" in item.key)  # labels that Python code gives itself
    ]
    return sorted((item for item in found if item.us > 0), key=lambda item: -item.us)


def peak_bytes(device: torch.device) -> int:
    """Most bytes since the last reading on a GPU; since the process began, resident, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
