"""Attest: did the candidate really execute? A profiler watches one call, and the path's Evidence is held against it.

Labels that Python code gives itself (``record_function``) are left out: own labels prove nothing.
It runs in the worker.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # re-exported without __all__
from torch.profiler import ProfilerActivity, profile

from nsa.paths import Evidence
from tuner.oracle import WrongResult

COMMONPLACE = ("aten::empty", "aten::view", "aten::copy_", "Memcpy DtoD (Device -> Device)")
"""What hardly any call does without."""
KEEPING_CALLS = 3
"""Calls that must all leave memory behind before it is called a leak."""


class FellBack(Exception):
    """What executed is not what was declared. Says which pattern, how often expected, how often seen."""


class Attestation(msgspec.Struct, frozen=True):
    """Launch counts of the names that the evidence required, and of all GPU kernels; the allocator's peak in bytes."""

    kernels: dict[str, int]
    peak_bytes: int
    gpu_kernels: tuple[str, ...] = ()


class Seen(msgspec.Struct, frozen=True):
    """Operators (CPU side) in order with their input shapes, and GPU kernel names."""

    operators: list[tuple[str, list[list[int]]]]
    kernels: list[str]


def attest(call: Callable[[], Any], evidence: Evidence, *, cuda: bool) -> Attestation:
    """Run ``call`` under a profiler and hold the evidence against what it saw. Raises FellBack, and WrongResult where
    every call leaves memory behind."""
    call()  # loads modules and compiles, so that the profiled call shows one call's launches only
    profiler, peak, kept = profiled(call, cuda=cuda)
    seen = read_events(profiler)
    hold_against(evidence, seen)
    for _ in range(KEEPING_CALLS - 1):  # one may set up what later ones reuse
        kept = min(kept, profiled(call, cuda=cuda)[2]) if kept > 0 else 0
    if kept > 0:
        raise WrongResult(f"every call leaves {kept} bytes or more behind")
    counts = Counter(name for name, _ in seen.operators if any(re.search(p, name) for p in evidence.required))
    counts.update(seen.kernels)
    return Attestation(dict(counts), peak, tuple(sorted(set(seen.kernels))))


def profiled(call: Callable[[], Any], *, cuda: bool) -> tuple[profile, int, int]:
    """One call's profile, the most bytes that the allocator held for it, and the bytes that it still holds after it."""
    gc.collect()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(activities=activities, record_shapes=True, profile_memory=not cuda) as profiler:
        call()
        gc.collect()
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        return profiler, torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    return profiler, *allocator_peak(profiler)


def attest_replay(replay: Callable[[], Any], kernels: set[str]) -> None:
    """Hold one replay of a CUDA graph against the kernels that the attested eager call launched. Raises FellBack."""
    replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    seen = read_events(profiler).kernels
    missing = {name for name in kernels if not name.startswith("Mem")} - set(seen)
    if missing:
        raise FellBack(f"the graph's replay does not launch {sorted(missing)[:3]}; saw {summary(seen)}")


def read_events(profiler: profile) -> Seen:
    """Operators and kernels of a finished profile, user annotations left out."""
    operators, kernels = [], []
    events = profiler.events() or []  # type: ignore[no-untyped-call]
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.is_user_annotation:
            continue
        if event.device_type == DeviceType.CUDA:
            kernels.append(event.name)
        elif event.device_type == DeviceType.CPU:
            operators.append((event.name, event.input_shapes or []))
    return Seen(operators, kernels)


def hold_against(evidence: Evidence, seen: Seen) -> None:
    """Raise FellBack unless every required pattern was seen as often as declared and no forbidden one was."""
    if not evidence.required:
        raise FellBack("the path declares nothing that must be seen, so nothing proves that it ran")
    if all(any(re.search(pattern, name) for name in COMMONPLACE) for pattern in evidence.required):
        raise FellBack(f"what must be seen, {list(evidence.required)}, any call shows, so nothing proves that it ran")
    names = [name for name, _ in seen.operators] + seen.kernels
    for pattern, expected in evidence.required.items():
        count = sum(1 for name in names if re.search(pattern, name))
        if count == 0 or (expected and count != expected):
            want = f"{expected} launches" if expected else "at least one launch"
            raise FellBack(f"declared {want} of {pattern!r}, saw {count}; saw {summary(names)}")
    for pattern in evidence.forbidden:
        found = sorted({name for name in names if re.search(pattern, name)})
        if found:
            count = sum(1 for name in names if re.search(pattern, name))
            raise FellBack(f"declared that {pattern!r} never runs, saw {count} of {found}")
    for pattern, calls in evidence.shapes.items():
        shapes = [shapes for name, shapes in seen.operators if re.search(pattern, name)]
        _hold_shapes(pattern, calls, shapes)


def _hold_shapes(
    pattern: str, calls: tuple[tuple[int, tuple[int | None, ...]], ...], shapes: list[list[list[int]]]
) -> None:
    for number, (place, declared) in enumerate(calls):
        got = shapes[number][place] if number < len(shapes) and place < len(shapes[number]) else None
        if (
            got is None
            or len(got) != len(declared)
            or any(want is not None and want != have for want, have in zip(declared, got, strict=True))
        ):
            raise FellBack(f"call {number} of {pattern!r}: declared input {place} of shape {declared}, saw {got}")


def summary(names: list[str]) -> str:
    """The most frequent names, for a message."""
    common = Counter(name for name in names if "::" in name or "kernel" in name).most_common(6)
    return ", ".join(f"{name} x{count}" for name, count in common) or "nothing"


def allocator_peak(profiler: profile) -> tuple[int, int]:
    """Most bytes that torch's CPU allocator held for the profiled call above what it held at its start, and the bytes
    that it held at its end."""
    result = profiler.profiler.kineto_results if profiler.profiler else None
    held = peak = 0
    for event in sorted(result.events() if result else [], key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, held)
    return peak, held
