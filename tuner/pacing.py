"""Pacing: which lanes of a comparison still need pairs, and whether it may stop. Pure, of question and evidence.

Looking after every batch is free: the evidence holds at every look.
"""

from __future__ import annotations

from typing import Any

from tuner.compare_record import AUTO, Lane, Question, Scenario
from tuner.evidence import Evidence, compared

BATCH_ROUNDS = (8, 64)
"""Rounds between two looks: a quarter of those so far, within these."""
LATER_LAUNCH_S = 60.0
"""After the wanted launches a new one is made about that often."""


def timed(question: Question, evidence: Evidence) -> tuple[Scenario, ...]:
    """The scenarios whose both sides passed their checks."""
    return tuple(scenario for scenario in question.scenarios if evidence.timed(scenario.name))


def kernels(question: Question, evidence: Evidence) -> dict[str, tuple[str, dict[str, Any]]]:
    """Scenario -> path and parameters, of the "auto" ones in which both sides choose the same."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for scenario in timed(question, evidence):
        base, head = evidence.facts.get((scenario.name, "base")), evidence.facts.get((scenario.name, "head"))
        if scenario.path == AUTO and base is not None and head is not None and base.choice == head.choice:
            found[scenario.name] = (base.path, base.parameters)
    return found


def open_lanes(question: Question, evidence: Evidence) -> tuple[tuple[str, Lane], ...]:
    """Lanes that more pairs can decide: head everywhere, and where an "auto" scenario is slower, why it is."""
    found: list[tuple[str, Lane]] = []
    explicable = kernels(question, evidence)
    for scenario in timed(question, evidence):
        verdict = compared(question, evidence.of(scenario.name, "head")).verdict
        lane: Lane = "kernel" if verdict == "slower" and scenario.name in explicable else "head"
        if lane == "kernel":
            verdict = compared(question, evidence.of(scenario.name, lane)).verdict
        if verdict == "undecided":
            found.append((scenario.name, lane))
    return tuple(found)


def audit_found(question: Question, evidence: Evidence) -> bool:
    """Whether the 4 % lane was found: without it nothing may stop early."""
    return compared(question, evidence.audit["slow_4"]).verdict == "slower"


def batch_rounds(rounds: int) -> int:
    """How many rounds to the next look."""
    return min(max(BATCH_ROUNDS[0], rounds // 4), BATCH_ROUNDS[1])


def share_s(left_s: float, launches_missing: int) -> float:
    """Seconds that the next launch may take of what is left."""
    return left_s / max(launches_missing, round(left_s / LATER_LAUNCH_S), 1)
