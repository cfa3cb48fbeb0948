"""What the figures of a run show, computed from records and table entries; ``tuner.plot`` draws it.

Pure functions from records to frozen values: medians and bands per path, the floor that the problem sets, picks with
their certainty; ``tuner.reserves`` has the reserves. It draws nothing and reads no file. Quantiles are measured
samples (the smallest with at least that share at or below), never interpolated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from nsa.dispatch_entry import DispatchEntry
from nsa.paths import Candidate
from nsa.problem import SelectionProblem
from tuner.layer import LAYER
from tuner.record import Outcome, Record, Stage

Family = tuple[str, ...]
"""All that two problems share when only their context differs, part by part, in words; the first part is the mode."""
Certainty = Literal["certified", "tie", "unopposed"]


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a device reaches at most, measured: floating-point operations and bytes per second."""

    flops_per_s: float
    bytes_per_s: float


KNOWN_RATES = {"nvidia-h200": Rates(flops_per_s=790e12, bytes_per_s=4.3e12)}  # bf16 matmul and copy, measured 2026-11


class LatencyPoint(msgspec.Struct, frozen=True, kw_only=True):
    """The best candidate of a path at context ``T``: microseconds per call, 10 to 90 % band, and whose samples."""

    T: int
    candidate: str
    median_us: float
    low_us: float
    high_us: float
    samples: int
    stage: Stage


class Untimed(msgspec.Struct, frozen=True, kw_only=True):
    """A path that has no time at these contexts, and the outcome that says why."""

    path: str
    outcome: Outcome
    contexts: tuple[int, ...]


class LatencyPanel(msgspec.Struct, frozen=True, kw_only=True):
    """One family: path -> points by context; floor as (context, microseconds), empty where rates are not known."""

    family: Family
    lines: dict[str, tuple[LatencyPoint, ...]]
    untimed: tuple[Untimed, ...]
    floor: tuple[tuple[int, float], ...]


class PickInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A table entry: the pick, what ``ratio`` compares it with (the default; its runner-up where it is the default).

    ``certainty``: "certified" where a stated error rate backs the pick, "tie" where the default stays because nothing
    is certified against it, "unopposed" where no pair exists. ``base``: "stand-in" where the default failed and the
    first right candidate is compared with instead. ``ratio_low`` 0.0 and ``ratio_high`` None: not bounded.
    """

    family: Family
    T: int
    pick: Candidate
    against: Candidate | None
    stays: bool
    base: Literal["default", "stand-in"]
    certainty: Certainty
    ratio: float | None
    ratio_low: float
    ratio_high: float | None
    pairs: int
    e_value: float | None


def family_of(problem: SelectionProblem, pattern: str) -> Family:
    """The family of a problem whose selections were made by ``pattern``; "64/4 heads": 64 query on 4 KV heads."""
    p = problem
    return (
        p.mode if p.mode == "decode" or p.S == p.T else f"{p.mode} of a chunk of {p.S}",
        f"batch {p.B}",
        f"{p.G * p.h}/{p.G} heads",
        f"head dim {p.Dk}" if p.Dk == p.Dv else f"head dims {p.Dk} and {p.Dv}",
        reads(p),
        p.dtype,
        p.execution,
        f"{p.cache} cache",
        kept_by(p, pattern),
    )


def kept_by(problem: SelectionProblem, pattern: str) -> str:
    """How the keys of a row were chosen, in a few words; of a layer its sizes."""
    if problem.operation != "selection":
        return "ranges by position"
    return pattern if pattern.startswith(LAYER) else f"{pattern} selection, {problem.overlap} overlap"


def reads(problem: SelectionProblem) -> str:
    """Which keys a row reads, in a few words."""
    p = problem
    if p.operation == "window":
        return f"window of {p.window}"
    if p.operation == "compression":
        return f"compressed by {p.kernel_stride}, blocks of {p.kernel_size}"
    return f"block {p.block_size}, top {p.topk}" if p.form == "blocks" else f"{p.topk} ranges"


def family_labels(families: Iterable[Family]) -> tuple[str, dict[Family, str]]:
    """What all families have in common, in words, and a label for each: its mode and what sets it apart."""
    distinct = list(dict.fromkeys(families))
    differs = [index == 0 or len(set(column)) > 1 for index, column in enumerate(zip(*distinct, strict=True))]

    def words(family: Family, which: bool) -> str:
        return ", ".join(part for part, differing in zip(family, differs, strict=True) if differing is which)

    return words(distinct[0], False) if distinct else "", {family: words(family, True) for family in distinct}


def floor_us(problem: SelectionProblem, rates: Rates) -> float | None:
    """Microseconds that no implementation can beat at these rates; None for ranges, whose width is not known here.

    The larger of 2·rows·h·width·(Dk + Dv) operations and of the bytes of query, output, and keys and values read once.
    ``width`` is exact for every row: topk blocks, the own one up to the row; the window; the compressed tokens that
    exist. Of a selection's keys at least the widest row's and the rows' own blocks are read. ``train`` adds the
    backward pass: 3·Dk + 2·Dv in place of Dk + Dv (the scores again and four gradients), and reading query, key, value,
    output and its gradient and writing three gradients.
    """
    p = problem
    positions = np.arange(p.T - p.S, p.T, dtype=np.int64)
    if p.operation == "window":
        widths, read = np.minimum(positions + 1, p.window), min(p.T, p.S + p.window - 1)
    elif p.operation == "compression":
        widths, read = np.maximum((positions + 1 - p.kernel_size) // p.kernel_stride + 1, 0), p.keys
    elif p.form == "blocks":
        widths = np.minimum(positions + 1, (p.topk - 1) * p.block_size + positions % p.block_size + 1)
        read = max(int(widths.max()), p.T - (p.T - p.S) // p.block_size * p.block_size)
    else:
        return None
    per_key, query, out = p.Dk + p.Dv, p.rows * p.h * p.Dk, p.rows * p.h * p.Dv
    keys = p.B * p.G * read * (p.Dk + p.Dv)
    elements = query + keys + out
    if p.mode == "train":
        per_key += 3 * p.Dk + 2 * p.Dv
        elements += 2 * (query + keys + out)
    flops = 2 * p.B * p.G * p.h * int(widths.sum()) * per_key
    return 1e6 * max(flops / rates.flops_per_s, elements * p.item_bytes / rates.bytes_per_s)


def latency_panels(records: Iterable[Record], rates: Rates | None) -> tuple[LatencyPanel, ...]:
    """A panel per family that was screened or shot out, in order of first appearance."""
    families: dict[Family, dict[int, list[Record]]] = {}
    problems: dict[tuple[Family, int], SelectionProblem] = {}
    for record in records:
        if record.stage != "reserve":
            problem = msgspec.convert(record.problem, SelectionProblem)
            family = family_of(problem, record.pattern)
            families.setdefault(family, {}).setdefault(problem.T, []).append(record)
            problems[family, problem.T] = problem
    panels = []
    for family, by_context in families.items():
        contexts = sorted(by_context)
        points = [item for T in contexts for item in best_points(T, by_context[T]).items()]
        known = rates and not family[-1].startswith(LAYER)
        floors = [(T, floor_us(problems[family, T], rates)) for T in contexts] if rates and known else []
        panels.append(
            LatencyPanel(
                family=family,
                lines={path: tuple(p for name, p in points if name == path) for path in sorted({n for n, _ in points})},
                untimed=untimed(by_context),
                floor=tuple((T, us) for T, us in floors if us is not None),
            )
        )
    return tuple(panels)


def best_points(T: int, records: Iterable[Record]) -> dict[str, LatencyPoint]:
    """Path -> its candidate of the smallest median on one problem; of those in the shoot-out where there are any."""
    found: dict[str, LatencyPoint] = {}
    for record in records:
        if record.outcome != "ok" or not record.samples or record.stage == "reserve":
            continue
        us = [sample.us for sample in record.samples]
        point = LatencyPoint(
            T=T, candidate=record.candidate, median_us=statistics.median(us), low_us=quantile(us, 0.1),
            high_us=quantile(us, 0.9), samples=len(us), stage=record.stage,
        )  # fmt: skip
        held = found.get(record.path)
        if held is None or _rank(point) < _rank(held):
            found[record.path] = point
    return found


def _rank(point: LatencyPoint) -> tuple[bool, float]:
    return point.stage != "shootout", point.median_us


def untimed(by_context: Mapping[int, Sequence[Record]]) -> tuple[Untimed, ...]:
    """Paths without a single time at some contexts, by path and first outcome there."""
    found: dict[tuple[str, Outcome], list[int]] = {}
    for T in sorted(by_context):
        timed = best_points(T, by_context[T])
        for path in dict.fromkeys(record.path for record in by_context[T] if record.path not in timed):
            outcomes = [r.outcome for r in by_context[T] if r.path == path and r.outcome != "ok"]
            for outcome in outcomes[:1]:
                found.setdefault((path, outcome), []).append(T)
    return tuple(Untimed(path=path, outcome=why, contexts=tuple(at)) for (path, why), at in sorted(found.items()))


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value with at least ``share`` of all at or below it: always one that was measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def pick_infos(entries: Iterable[DispatchEntry], records: Iterable[Record]) -> tuple[PickInfo, ...]:
    """A table's entries, by family and context; what each is compared with is its records' baseline.

    An entry for calls without the hint that comes from rounds with it (``table.incomplete_entry``) is left out.
    """
    defaults: dict[tuple[SelectionProblem, str], Candidate] = {}
    measured, failing = set(), set()
    for record in records:
        key = msgspec.convert(record.problem, SelectionProblem), record.pattern
        measured.add(key)
        if record.baseline and record.outcome == "ok":
            defaults[key] = Candidate(path=record.path, parameters=record.parameters)
        elif record.baseline and record.stage == "screen":
            failing.add(key)
    found = []
    for entry in entries:
        key = entry.problem(), entry.pattern
        hinted = msgspec.structs.replace(entry.problem(), complete=True), entry.pattern
        if key in measured or hinted not in measured:
            found.append(_pick_info(entry, defaults.get(key), "stand-in" if key in failing else "default"))
    order = list(dict.fromkeys(info.family for info in found))
    return tuple(sorted(found, key=lambda info: (order.index(info.family), info.T)))


def _pick_info(entry: DispatchEntry, default: Candidate | None, base: Literal["default", "stand-in"]) -> PickInfo:
    pick = Candidate(path=entry.path, parameters=entry.parameters)
    stays = pick == default
    compared = entry.ratio is not None and entry.pairs > 0
    certainty: Certainty = "unopposed" if not compared else "tie" if stays and entry.tied else "certified"
    return PickInfo(
        family=family_of(entry.problem(), entry.pattern), T=entry.T, pick=pick,
        against=entry.runner_up if stays else default, stays=stays, base=base, certainty=certainty,
        ratio=entry.ratio if compared else None, ratio_low=entry.ratio_low or 0.0, ratio_high=entry.ratio_high,
        pairs=entry.pairs, e_value=entry.e_value if compared else None,
    )  # fmt: skip
