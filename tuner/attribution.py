"""Attribution: what changed between base and head: kernel, choice, dispatch, memory, or the machine. Pure.

A slower "auto" scenario has a second lane that calls base's choice directly on both sides; it tells a slower kernel
from dearer dispatch. Nothing here decides whether something is slower: ``tuner.judge`` does.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Literal

import msgspec

from tuner.compare_record import AUTO, Facts, Question, Scenario
from tuner.evidence import Evidence, compared, ratio_text
from tuner.verdict import Comparison

ChangeKind = Literal[
    "kernel slower", "choice worse", "dispatch dearer", "slower", "more memory", "more growths", "no longer executes",
    "wrong now", "fails now", "machine changed",
]  # fmt: skip
MORE_MEMORY = (0.01, 64 * 2**10)
"""More than this share and more than this many bytes above base: allocators round, and profiles differ by little."""
CLOCK_MOVED = 0.05


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not as it was, and the figures."""

    kind: ChangeKind
    detail: str


def changes_of(
    question: Question, evidence: Evidence, scenario: Scenario, found: Comparison, alarm: str
) -> Iterable[Change]:
    """What changed, with the figures: why it is slower, what memory it takes, whether the machine moved (``alarm``)."""
    base, head = evidence.facts.get((scenario.name, "base")), evidence.facts.get((scenario.name, "head"))
    if found.verdict == "slower":
        yield why_slower(question, evidence, scenario, found)
    if base is not None and head is not None:
        yield from memory_changes(base, head)
    moved = [statistics.median(clocks) for clocks in evidence.clocks.values() if any(clocks)]
    if alarm:
        yield Change(kind="machine changed", detail=alarm)
    elif moved and min(moved) < (1 - CLOCK_MOVED) * max(moved):
        yield Change(kind="machine changed", detail=f"SM clock between {min(moved):.0f} and {max(moved):.0f} MHz")


def why_slower(question: Question, evidence: Evidence, scenario: Scenario, found: Comparison) -> Change:
    """Kernel, choice or dispatch: told apart by the lane that calls base's choice directly on both sides."""
    base, head = evidence.facts.get((scenario.name, "base")), evidence.facts.get((scenario.name, "head"))
    if base is None or head is None:
        return Change(kind="slower", detail=ratio_text(found))
    kernel = compared(question, evidence.of(scenario.name, "kernel"))
    if base.choice != head.choice:
        return Change(kind="choice worse", detail=f"{base.choice} before, {head.choice} now: {ratio_text(found)}")
    if scenario.path != AUTO:
        return Change(kind="kernel slower", detail=f"{base.choice} {ratio_text(found)}")
    if kernel.verdict == "slower":
        return Change(kind="kernel slower", detail=f"called directly, {base.choice} reads {ratio_text(kernel)}")
    if kernel.verdict in ("same", "faster"):
        detail = f"called directly, {base.choice} reads {ratio_text(kernel)}; through dispatch {ratio_text(found)}"
        return Change(kind="dispatch dearer", detail=detail)
    detail = f"{base.choice} {ratio_text(found)}; kernel or dispatch, not told apart in {kernel.pairs} pairs"
    return Change(kind="slower", detail=detail)


def memory_changes(base: Facts, head: Facts) -> Iterable[Change]:
    """Peak of one call, workspace, growths."""
    share, least = MORE_MEMORY
    for name, before, now in (
        ("peak of a call", base.peak_bytes, head.peak_bytes),
        ("workspace", base.workspace_bytes, head.workspace_bytes),
    ):
        if before is not None and now is not None and now > before * (1 + share) and now > before + least:
            yield Change(kind="more memory", detail=f"{name} {before} bytes before, {now} now")
    if base.growths is not None and head.growths is not None and head.growths > base.growths:
        yield Change(kind="more growths", detail=f"workspace grew {base.growths} times before, {head.growths} now")
