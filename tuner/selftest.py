"""Selftest: what this machine can and cannot detect. The first thing to run on a new one.

Three parts: the timer on work of known ratios; the gate on this very nsa against itself, with its injected slowdowns;
and every item of the drill, each of which must get its named outcome. It compares no commits and writes no table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

import nsa
from tuner import verdict
from tuner.compare import Comparing, Listener
from tuner.compare_record import Question, Scenario, scenarios_of
from tuner.compare_report import audit_text
from tuner.drill import ITEMS, Item
from tuner.hiring import TIMEOUT_S, Asks, Hire, hire_for
from tuner.judge import CompareResult
from tuner.measure import KNOWN
from tuner.record import Outcome
from tuner.rounds import aligned, by_round
from tuner.sweep import read_sweep
from tuner.trees import Tree, tree_of
from tuner.trial import Timing
from tuner.verdict import Comparison
from tuner.worker import CandidateFailed, Worker, WorkerDied

TIMER_ROUNDS, LAUNCHES = 60, 3
TIMER_WITHIN = 0.005
"""How far the timer's ratio may be from a known one."""


class DrillAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A broken path, the outcome it must get, and the one it got."""

    item: str
    expected: Outcome
    got: Outcome
    reason: str


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """``timer``: known ratio -> what was read. ``gate``: this nsa against itself. ``drill``: an answer per item."""

    device: str
    timer: dict[str, Comparison]
    gate: CompareResult
    drill: tuple[DrillAnswer, ...]

    @property
    def timer_right(self) -> bool:
        """Whether every known ratio was read to half a per cent."""
        return all(
            found.ratio is not None and abs(found.ratio - float(name)) <= TIMER_WITHIN
            for name, found in self.timer.items()
        )

    @property
    def enough_time(self) -> bool:
        """Whether the budget sufficed to start the gate's process as often as it wants."""
        return self.gate.launches >= LAUNCHES

    @property
    def drill_right(self) -> bool:
        """Whether every broken path got its outcome."""
        return all(answer.got == answer.expected for answer in self.drill)

    @property
    def exit_code(self) -> int:
        """1 where a broken path passed, 4 where this machine cannot see a 4 % slowdown now, 0 otherwise."""
        if not self.drill_right:
            return 1
        return 0 if self.gate.audit.passed and self.timer_right else 4


def selftest(
    *,
    out: Path,
    device: str = "cpu",
    budget_s: float = 60.0,
    hire: Hire | None = None,
    hire_limited: Callable[[int], Asks] | None = None,
    clock: Callable[[], float] = time.monotonic,
    listener: Listener | None = None,
    watch: str = "tuner.measure:Stopwatch",
) -> SelfTest:
    """Run all three. ``budget_s`` is the gate's; timer and drill take a minute on a CPU."""
    tree = installed_tree()
    question = Question(
        base=tree, head=tree, scenarios=decode_scenario(device), device=device, budget_s=budget_s, watch=watch,
        launches=LAUNCHES,
    )  # fmt: skip
    hire, tell = hire or hire_for(question), listener or Listener()
    tell.working("timer on known ratios", budget_s)
    timer = timer_test(hire)
    gate = Comparing(question, out=out, hire=hire, clock=clock, listener=tell).run()
    limited = hire_limited or (lambda limit: Worker(device, memory_limit_bytes=limit))
    return SelfTest(device=gate.device, timer=timer, gate=gate, drill=drill(device, limited, tell))


def installed_tree() -> Tree:
    """The nsa that this tool itself runs with."""
    if nsa.__file__ is None:
        raise ImportError("nsa has no file: it is not installed as a package")
    folder = Path(nsa.__file__).parent.parent
    return tree_of(folder, "installed")


def decode_scenario(device: str) -> tuple[Scenario, ...]:
    """The quick sweep's decode at a context of 1024, as dispatched."""
    sweep = read_sweep("quick", ["modes=decode", "contexts=1024"])
    return scenarios_of(sweep, device.partition(":")[0], ("auto",))


def timer_test(hire: Hire) -> dict[str, Comparison]:
    """Known ratio -> what this machine's timer reads."""
    worker = hire()
    try:
        timings: dict[str, Timing] = worker.ask("self_test", TIMER_ROUNDS, timeout_s=TIMEOUT_S)
    finally:
        worker.close()
    samples = aligned({name: by_round(timing.samples) for name, timing in timings.items()})
    return {
        name: verdict.compare(verdict.log_ratios(samples["base"], samples[name]), alpha=0.001, effect=0.0)
        for name in KNOWN
    }


def drill(device: str, hire_limited: Callable[[int], Asks], listener: Listener) -> tuple[DrillAnswer, ...]:
    """Every item through a worker; one that dies is replaced."""
    answers: list[DrillAnswer] = []
    workers: dict[int, Asks] = {}
    try:
        for name, item in ITEMS.items():
            listener.working(f"drill: {name}", 0.0)
            limit = item.memory_limit_bytes
            if limit not in workers or not workers[limit].alive:
                workers[limit] = hire_limited(limit)
            got, reason = answer_to(workers[limit], item, device)
            answers.append(DrillAnswer(item=name, expected=item.expected, got=got, reason=reason))
    finally:
        for worker in workers.values():
            worker.close()
    return tuple(answers)


def answer_to(worker: Asks, item: Item, device: str) -> tuple[Outcome, str]:
    """(outcome, reason) of a broken path."""
    try:
        worker.ask("prepare", item.trial(device), timeout_s=TIMEOUT_S)
        found = worker.ask("assess", (item.candidate(device), True), timeout_s=TIMEOUT_S)
    except (CandidateFailed, WorkerDied) as error:
        return error.outcome, error.reason
    return found.outcome, found.reason


def as_text(found: SelfTest) -> str:
    """What this machine can and cannot detect, for a terminal."""
    lines = [f"device {found.device}", "", "timer, on work of known ratios:"]
    for name, figures in found.timer.items():
        ratio = 0.0 if figures.ratio is None else figures.ratio
        high = "inf" if figures.ratio_high is None else f"{figures.ratio_high:.4f}"
        lines.append(f"  {name} reads {ratio:.4f} [{figures.ratio_low:.4f}, {high}] in {figures.pairs} pairs")
    lines += ["", f"gate, {found.gate.scenarios[0].scenario} against itself, {found.gate.seconds:.0f} s:"]
    lines += [f"  {line}" for line in audit_text(found.gate)]
    lines += ["", "drill, broken paths and what they got:"]
    for answer in found.drill:
        sign = "ok  " if answer.got == answer.expected else "MISS"
        lines.append(f"  {sign} {answer.item}: {answer.got} (expected {answer.expected}); {answer.reason[:90]}")
    return "\n".join([*lines, "", *conclusion(found)]) + "\n"


def conclusion(found: SelfTest) -> list[str]:
    """The last lines: can, cannot, what to do."""
    least, lines = found.gate.audit.smallest_effect, []
    if least is not None and found.gate.audit.passed:
        lines.append(f"CAN detect a slowdown of {100 * least:.1f} % in decode within {found.gate.seconds:.0f} s")
        lines.append(f"CANNOT promise to detect less than {100 * least:.1f} % in that time; give it a larger --budget")
    else:
        why = found.gate.audit.reason or "too few pairs"
        advice = "stop other work and try again" if found.enough_time else "give it a larger --budget"
        lines.append(f"CANNOT gate here and now: {why}; {advice}")
    if not found.timer_right:
        lines.append("CANNOT time to half a per cent: the timer misread work of known ratios")
    caught = sum(answer.got == answer.expected for answer in found.drill)
    lines.append(f"{'CAN' if found.drill_right else 'CANNOT'} tell broken paths: {caught} of {len(found.drill)} caught")
    return lines
