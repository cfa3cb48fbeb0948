"""The recommendation on a Validation: merge, do not merge or undecided, by stated rules, reasons included. Pure.

A reason against outweighs any number of open questions; an open question outweighs any number of good results.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Literal

import msgspec

from tuner.compare_record import Facts
from tuner.judge import CompareResult, ScenarioResult
from tuner.record import Record
from tuner.validation import TrainingRun, Validation, operation_of, short

Word = Literal["merge", "do not merge", "undecided"]
FAILED = ("wrong", "fell_back", "crash", "hang", "compile_error")
RULES: dict[str, tuple[Word, str]] = {
    "failed": (
        "do not merge",
        "a path's result was wrong, another path ran than was asked for, or it crashed, hung or did not compile; "
        "a default ran out of memory or could not run",
    ),
    "slower": ("do not merge", "a scenario is slower than base, takes more memory, or grows its workspace more often"),
    "training": (
        "do not merge",
        "a training run failed, its loss did not fall, another route ran than was requested, or a step makes the host "
        "wait for the GPU",
    ),
    "history": ("do not merge", "the newest commit of the history is worse than its anchor"),
    "open": ("undecided", "a scenario is undecided, or the comparison's audit of itself failed"),
    "unproven": ("undecided", "something was timed that nobody saw execute or held against the oracle"),
    "missing": (
        "undecided",
        "there is no comparison with base, or nothing of decode, prefill or training, or a run did not reach its end",
    ),
    "commits": (
        "undecided",
        "the evidence is of other commits than the one that the report is about, or of uncommitted changes",
    ),
}
"""Rule -> what it recommends, and when. None of them applies: merge. A candidate that is unsupported or out of memory
somewhere is a limit, shown and without a vote."""

HOW: dict[str, str] = {
    "compare": "nsa-tune compare main",
    "decode": "nsa-tune sweep quick",
    "prefill": "nsa-tune sweep quick",
    "training": "python examples/train.py",
    "history": "nsa-tune history FIRST..LAST",
}
"""What makes the records of a section."""

LEAST_STEPS = 5


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why: the rule's key, and what it found."""

    rule: str
    text: str

    @property
    def word(self) -> Word:
        """What the rule recommends."""
        return RULES[self.rule][0]


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """The word, and all reasons: those for it first."""

    word: Word
    reasons: tuple[Reason, ...]

    @property
    def exit_code(self) -> int:
        """0 merge, 3 do not merge, 4 undecided."""
        return {"merge": 0, "do not merge": 3, "undecided": 4}[self.word]


def recommend(found: Validation) -> Recommendation:
    """Apply every rule."""
    reasons = [
        *failures(found), *comparison(found), *(reason for run in found.training for reason in trained(run)),
        *regressed(found), *unproven(found), *missing(found), *commits(found),
    ]  # fmt: skip
    reasons = list(dict.fromkeys(reasons))
    words = [reason.word for reason in reasons]
    word: Word = "do not merge" if "do not merge" in words else "undecided" if words else "merge"
    return Recommendation(word=word, reasons=tuple(sorted(reasons, key=lambda reason: reason.word != word)))


def failures(found: Validation) -> Iterable[Reason]:
    """Of the sweeps: each path's failures, one reason per path and outcome."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for record in (*found.records, *found.standing):
        limit = record.outcome in ("unsupported", "oom") and not record.baseline
        if record.outcome == "ok" or limit:
            continue
        place = f"{record.problem['mode']} T={record.problem['T']} {record.problem['dtype']}"
        why = " ".join(record.reason.split())
        seen.setdefault((operation_of(record), record.path, record.outcome), []).append(f"{place}: {why}")
    for (operation, path, outcome), where in seen.items():
        more = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
        yield Reason(rule="failed", text=f"{operation} by {path}: {outcome} at {where[0]}{more}")


def comparison(found: Validation) -> Iterable[Reason]:
    """Of the comparison: failures, regressions, and what it could not decide."""
    if found.compare is None:
        return
    result = found.compare.result
    for run in found.rejected:
        text = (
            f"comparison {run.environment.run_id} of the same two trees found a regression, which no later one undoes"
        )
        yield Reason(rule="slower", text=text)
    for each in result.scenarios:
        if each.verdict in FAILED or each.verdict == "oom":
            yield Reason(rule="failed", text=f"{each.scenario}: {each.verdict}: {each.reason}")
        elif each.regressed:
            yield Reason(rule="slower", text=f"{each.scenario}: {slower_text(each)}")
        elif each.verdict == "undecided":
            yield Reason(rule="open", text=f"{each.scenario}: {own_reason(each, result)}")
        elif each.verdict == "unsupported":
            yield Reason(rule="missing", text=f"{each.scenario}: unsupported, so not compared: {each.reason}")
    if not result.audit.passed:
        yield Reason(rule="open", text=f"the comparison cannot be believed: {result.audit.reason}")


def slower_text(each: ScenarioResult) -> str:
    """What is worse, with its figures."""
    changes = "; ".join(f"{change.kind}: {change.detail}" for change in each.changes)
    return changes or f"{each.verdict}: {each.reason}"


def own_reason(each: ScenarioResult, result: CompareResult) -> str:
    """A scenario's own reason; the audit's is said once for all."""
    return each.reason.replace(f"audit: {result.audit.reason}", "").strip("; ") or "see the audit"


def trained(run: TrainingRun) -> Iterable[Reason]:
    """Of one training run."""
    name = f"training {run.label}"
    for record in run.records:
        if record.outcome != "ok":
            yield Reason(
                rule="training", text=f"{name}: {record.outcome} after step {record.first_step}: {record.reason}"
            )
        if record.synchronisations:
            yield Reason(rule="training", text=f"{name}: a step makes the host wait {record.synchronisations} times")
        for route in record.executed:
            if not route.met:
                text = f"{name}: {route.operation} was to be {route.requested}, {route.path} ran: {route.reason}"
                yield Reason(rule="training", text=text)
        if not record.executed and record.losses:
            yield Reason(rule="unproven", text=f"{name}: nothing shows what ran from step {record.first_step} on")
    losses = losses_of(run)
    few = max(1, len(losses) // 5)
    if len(losses) >= LEAST_STEPS and not statistics.fmean(losses[-few:]) < losses[0]:
        text = f"{name}: the loss did not fall in {len(losses)} steps: {losses[0]:.4f}, then {losses[-1]:.4f}"
        yield Reason(rule="training", text=text)


def losses_of(run: TrainingRun) -> list[float]:
    """All losses, in order."""
    return [loss for record in run.records for loss in record.losses]


def regressed(found: Validation) -> Iterable[Reason]:
    """Of the history's last commit."""
    if found.history is None or not found.history.lines:
        return
    last = found.history.lines[-1]
    if last.verdict == "regressed":
        worse = [each.scenario for each in last.scenarios if each.verdict not in ("faster", "same", "undecided")]
        text = f"commit {short(last.commit)} is worse than {short(last.anchor)} in {', '.join(worse) or 'memory'}"
        yield Reason(rule="history", text=text)


def unproven(found: Validation) -> Iterable[Reason]:
    """Times without an oracle's error or without kernels that were seen."""
    for record in found.records:
        if record.outcome == "ok" and record.samples and (record.oracle_error is None or not record.kernels):
            what = "was not held against the oracle" if record.oracle_error is None else "was not seen to execute"
            yield Reason(rule="unproven", text=f"{record.candidate} at {record.problem['mode']} has times and {what}")
        if record.outcome == "ok" and beyond(record):
            text = f"{record.candidate} at {record.problem['mode']} is said to be right and is beyond its bound"
            yield Reason(rule="unproven", text=text)
    if found.compare is None:
        return
    for each in found.compare.result.scenarios:
        if each.head is not None and each.head.outcome == "ok" and beyond(each.head):
            yield Reason(rule="unproven", text=f"{each.scenario}: head is said to be right and is beyond its bound")
    bare = [each.scenario for each in found.compare.result.scenarios if each.head is None]
    if bare:
        text = f"nothing shows that head executed, or was right, in {', '.join(bare)}"
        yield Reason(rule="unproven", text=text)


def beyond(facts: Record | Facts) -> bool:
    """Whether an error is larger than its bound."""
    error, bound = facts.oracle_error, facts.oracle_bound
    return error is not None and (bound is None or not error <= bound)


def missing(found: Validation) -> Iterable[Reason]:
    """Sections without records."""
    compared = {each.scenario.split()[0] for each in found.compare.result.scenarios} if found.compare else set()
    if found.compare is None:
        yield Reason(rule="missing", text=f"no comparison with base; run '{HOW['compare']}'")
    for mode in ("decode", "prefill"):
        if mode not in compared and not any(record.outcome == "ok" for record in found.of_mode(mode)):
            yield Reason(rule="missing", text=f"nothing of {mode}; run '{HOW[mode]}'")
    if not any(losses_of(run) for run in found.training):
        yield Reason(rule="missing", text=f"no training run; run '{HOW['training']}'")
    for what, runs in (("sweep", found.sweeps), ("training", found.training)):
        cut = [run.environment.run_id for run in runs if not run.complete]
        if cut:
            more = f" (and {len(cut) - 1} more)" if len(cut) > 1 else ""
            text = f"{what} {cut[0]} did not reach its end{more}; give the command again"
            yield Reason(rule="missing", text=text)
    for run in found.training:
        if 0 < len(losses_of(run)) < LEAST_STEPS:
            yield Reason(rule="missing", text=f"training {run.label}: {len(losses_of(run))} losses show no learning")


def commits(found: Validation) -> Iterable[Reason]:
    """Evidence of other commits, or of code that is in none."""
    about = short(found.subject)
    for what, runs in (("a sweep", found.sweeps), ("training", found.training)):
        of = {run.environment.commit for run in runs} | {record.commit for run in runs for record in run.records}
        others = sorted({short(commit) for commit in of} - {about})
        if others:
            yield Reason(rule="commits", text=f"{what} is of {', '.join(others)}, the report is about {about}")
    if "-dirty-" in found.subject:
        text = f"{about} has uncommitted changes, which may differ from run to run; commit them and measure again"
        yield Reason(rule="commits", text=text)
