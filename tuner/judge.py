"""Judge: from a comparison's lines to its result: a verdict per scenario, what changed, and whether to believe the run.

Pure: reads lines of ``tuner.compare_record``, decides by ``tuner.verdict``. Where the run's own audit fails (the A/A
lane alarms, the 4 % lane is missed), every verdict on time becomes ``undecided`` with that reason, never green.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Literal

import msgspec

from tuner import stats
from tuner.attribution import Change, ChangeKind, changes_of
from tuner.compare_record import INJECTED, Facts, Lane, Line, Question, Scenario
from tuner.evidence import Evidence, compared, disagreement, ratio_text
from tuner.record import Outcome
from tuner.trees import Tree
from tuner.verdict import Comparison, Verdict

RESAMPLED_PAIRS, RESAMPLES = 500, 200
"""Of the A/A lane, for the smallest detectable effect: a second of work at most."""


class ScenarioResult(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario. ``verdict``: on time, or the outcome of the side that has none. ``reason``: why it is undecided or
    failed. ``comparison``: what the pairs alone say, whatever the audit; None without facts that allow one."""

    scenario: str
    verdict: Verdict | Outcome
    reason: str = ""
    comparison: Comparison | None = None
    base: Facts | None = None
    head: Facts | None = None
    changes: tuple[Change, ...] = ()

    @property
    def regressed(self) -> bool:
        """Slower, wrong, not executing, failing, or taking more memory than base."""
        worse = any(change.kind in ("more memory", "more growths", "no longer executes") for change in self.changes)
        failed = self.verdict not in ("faster", "same", "undecided", "unsupported")
        return failed or worse


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What the run says of itself. ``passed`` False makes every verdict on time undecided, for ``reason``.

    ``injected``: lane -> mean calibrated share of extra work. ``smallest_effect``: found in 95 % of resamples of the
    A/A lane, as a fraction; None where even +100 % would not be (too few pairs).
    """

    passed: bool
    reason: str
    alarm: bool
    lanes: dict[str, Comparison]
    injected: dict[str, float]
    smallest_effect: float | None


class CompareResult(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison's result; ``exit_code`` is what the command returns."""

    verdict: Literal["regressed", "undecided", "passed"]
    base: Tree
    head: Tree
    device: str
    alpha: float
    effect: float
    scenarios: tuple[ScenarioResult, ...]
    audit: Audit
    launches: int
    rounds: int
    dropped: int
    seconds: float
    notes: tuple[str, ...] = ()
    run: str = ""

    @property
    def exit_code(self) -> int:
        """3 regressed, 4 undecided, 0 passed."""
        return {"regressed": 3, "undecided": 4, "passed": 0}[self.verdict]


def judge(question: Question, lines: Iterable[Line], *, run: str = "") -> CompareResult:
    """The result of all lines."""
    evidence = Evidence(lines)
    audit = audit_of(question, evidence)
    results = tuple(judge_scenario(question, evidence, scenario, audit) for scenario in question.scenarios)
    worst: Literal["regressed", "undecided", "passed"] = "passed"
    if any(result.regressed for result in results):
        worst = "regressed"
    elif any(result.verdict == "undecided" for result in results) or not any(result.comparison for result in results):
        worst = "undecided"
    return CompareResult(
        verdict=worst, base=question.base, head=question.head,
        device=", ".join(dict.fromkeys(launch.device for launch in evidence.launches)) or question.device,
        alpha=question.alpha, effect=question.effect, scenarios=results, audit=audit,
        launches=len(evidence.launches), rounds=evidence.rounds, dropped=evidence.dropped, seconds=evidence.seconds,
        notes=tuple(notes_of(question)), run=run,
    )  # fmt: skip


def notes_of(question: Question) -> Iterable[str]:
    """What a reader must know of the two trees."""
    if question.base.digest and question.base.digest == question.head.digest:
        yield "base and head hold the same code"
    for name, tree in (("base", question.base), ("head", question.head)):
        if tree.dirty:
            yield f"{name} is {tree.commit[:10]} with uncommitted changes below nsa/ (digest {tree.digest[:8]})"


def audit_of(question: Question, evidence: Evidence, *, smallest: bool = True) -> Audit:
    """Whether this run could have seen a slowdown, and saw none where there is none."""
    lanes = {lane: compared(question, evidence.audit[lane], 0.0 if lane == "slow_1" else None) for lane in INJECTED}
    alarm = lanes["aa"].verdict in ("slower", "faster")
    shares = {str(lane): evidence.injected[lane] for lane in INJECTED if INJECTED[lane]}
    faults = list(faults_of(question, evidence, lanes, alarm))
    effect = None
    if smallest:
        effect = stats.smallest_detectable_effect(
            evidence.audit["aa"][-RESAMPLED_PAIRS:], alpha=question.alpha, scenarios=len(question.scenarios),
            resamples=RESAMPLES, seed=0, delta=math.log1p(question.effect),
        )  # fmt: skip
    return Audit(
        passed=not faults, reason="; ".join(faults), alarm=alarm, lanes={str(lane): lanes[lane] for lane in lanes},
        injected={lane: statistics.fmean(found) for lane, found in shares.items() if found}, smallest_effect=effect,
    )  # fmt: skip


def faults_of(question: Question, evidence: Evidence, lanes: dict[Lane, Comparison], alarm: bool) -> Iterable[str]:
    """Every reason why no verdict on time can be given."""
    devices = list(dict.fromkeys(launch.device for launch in evidence.launches))
    if len(devices) > 1:
        yield f"pairs from two devices: {', '.join(devices)}"
    if len(evidence.launches) < question.launches:
        yield f"{len(evidence.launches)} of {question.launches} launches: more time is needed"
    if alarm:
        yield f"the A/A lane alarms: base against itself reads {ratio_text(lanes['aa'])}"
    for (launch, about), ratios in evidence.itself.items():
        found = compared(question, ratios)
        if not alarm and not about and found.verdict in ("slower", "faster"):
            yield f"launch {launch + 1} alone reads base against itself as {ratio_text(found)}"
    if lanes["slow_4"].ratio_low > 1.0 + 2 * INJECTED["slow_4"]:
        yield f"the 4 % lane reads {ratio_text(lanes['slow_4'])}, which is not what was injected"
    if lanes["slow_4"].verdict != "slower":
        yield f"the 4 % lane was missed: it reads {ratio_text(lanes['slow_4'])}; {lanes['slow_4'].reason or 'faster'}"


def judge_scenario(question: Question, evidence: Evidence, scenario: Scenario, audit: Audit) -> ScenarioResult:
    """One scenario's verdict, and what changed."""
    base, head = evidence.facts.get((scenario.name, "base")), evidence.facts.get((scenario.name, "head"))
    if base is not None and head is not None and "ok" in (base.outcome, head.outcome) and base.outcome != head.outcome:
        return one_sided(scenario, base, head)
    if head is not None and head.outcome != "ok":
        return ScenarioResult(
            scenario=scenario.name, verdict=head.outcome, base=base, head=head,
            reason=f"{head.reason}; base: {base.outcome if base else 'not known'}",
        )  # fmt: skip
    found = compared(question, evidence.of(scenario.name, "head"))
    changes = tuple(changes_of(question, evidence, scenario, found, audit.reason if audit.alarm else ""))
    doubt = disagreement(evidence, scenario.name, found)
    say: Verdict = found.verdict if audit.passed and not doubt else "undecided"
    reasons = [found.reason or "", doubt, "" if audit.passed else f"audit: {audit.reason}"]
    return ScenarioResult(
        scenario=scenario.name, verdict=say, reason="; ".join(filter(None, reasons)), comparison=found, base=base,
        head=head, changes=changes,
    )  # fmt: skip


def one_sided(scenario: Scenario, base: Facts, head: Facts) -> ScenarioResult:
    """A scenario that one side fails."""
    if head.outcome == "ok":
        reason = f"base is {base.outcome}, so there is nothing to compare with: {base.reason}"
        return ScenarioResult(scenario=scenario.name, verdict="undecided", reason=reason, base=base, head=head)
    kinds: dict[str, ChangeKind] = {
        "wrong": "wrong now", "fell_back": "no longer executes", "unsupported": "no longer executes"
    }  # fmt: skip
    change = Change(kind=kinds.get(head.outcome, "fails now"), detail=head.reason)
    return ScenarioResult(
        scenario=scenario.name, verdict=head.outcome, reason=head.reason, base=base, head=head, changes=(change,)
    )
