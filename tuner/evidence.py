"""Evidence: a comparison's lines by what they are about, and what pairs say at the comparison's alpha. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from tuner import verdict
from tuner.compare_record import INJECTED, Checked, Facts, Lane, Launched, Line, Measured, Question, Side
from tuner.verdict import Comparison

PAIRS_OF_A_LAUNCH = 12


class Evidence:
    """All lines so far, by what they are about."""

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self.facts: dict[tuple[str, Side], Facts] = {}
        self.launches: list[Launched] = []
        self.ratios: dict[tuple[str, Lane], list[float]] = {}
        self.audit: dict[Lane, list[float]] = {lane: [] for lane in INJECTED}
        self.clocks: dict[int, list[int]] = {}
        self.injected: dict[Lane, list[float]] = {lane: [] for lane in INJECTED}
        self.by_launch: dict[str, dict[int, list[float]]] = {}
        self.itself: dict[tuple[int, str], list[float]] = {}
        self.rounds, self.dropped, self.seconds = 0, 0, 0.0
        for line in lines:
            self.add(line)

    def add(self, line: Line) -> None:
        """Take a line in."""
        if isinstance(line, Checked):
            self.facts[line.scenario, line.side] = line.facts
        elif isinstance(line, Launched):
            self.launches.append(line)
        else:
            self._measured(line)

    def _measured(self, line: Measured) -> None:
        self.dropped += line.dropped
        self.seconds += line.seconds
        self.clocks.setdefault(line.launch, []).append(line.clock_mhz)
        for shares in line.injected.values():
            for lane in INJECTED:
                self.injected[lane].append(shares[lane])
        for pair in line.pairs:
            self.rounds = max(self.rounds, pair.round + 1)
            ratio = math.log(pair.other_us / pair.base_us)
            self.ratios.setdefault((pair.scenario, pair.lane), []).append(ratio)
            if pair.lane == "head":
                self.by_launch.setdefault(pair.scenario, {}).setdefault(line.launch, []).append(ratio)
            if pair.lane in INJECTED:
                self.audit[pair.lane].append(ratio)
            if pair.lane == "aa":
                for about in (pair.scenario, ""):
                    self.itself.setdefault((line.launch, about), []).append(ratio)

    def of(self, scenario: str, lane: Lane) -> list[float]:
        """Log ratios of a lane in a scenario, in order."""
        return self.ratios.get((scenario, lane), [])

    def of_itself(self, scenario: str) -> float:
        """The largest log ratio, either way, that a launch of some size read of base against itself: in this scenario,
        or in all. 0.0 where none is of that size."""
        sized = [
            ratios
            for (_, about), ratios in self.itself.items()
            if about in (scenario, "") and len(ratios) >= PAIRS_OF_A_LAUNCH
        ]
        return max((abs(statistics.median(ratios)) for ratios in sized), default=0.0)

    def timed(self, scenario: str) -> bool:
        """Whether both sides passed their checks, or nothing is known against either."""
        return all(
            facts is None or facts.outcome == "ok"
            for facts in (self.facts.get((scenario, "base")), self.facts.get((scenario, "head")))
        )


def disagreement(evidence: Evidence, scenario: str, found: Comparison) -> str:
    """Why launches contradict a verdict of slower or faster, '' where they do not.

    The coin makes the two sides of a pair alike but for what a process draws once, such as where its buffers lie. That
    a relaunch draws anew. So the median of every launch of some size must lie on the verdict's side of 1, and further
    from it than any launch's of base against itself. Where head is base but for such draws, all L launches do so by
    chance in one run of C(2L, L) * 2**L a direction, however large the draws: 160 for three, 1120 for four.
    """
    medians = [
        statistics.median(ratios)
        for ratios in evidence.by_launch.get(scenario, {}).values()
        if len(ratios) >= PAIRS_OF_A_LAUNCH
    ]
    sign = {"slower": 1.0, "faster": -1.0}.get(found.verdict)
    if sign is None or not medians:
        return ""
    each, itself = ", ".join(f"{math.exp(median):.3f}" for median in medians), evidence.of_itself(scenario)
    if min(sign * median for median in medians) <= 0:
        return f"launches disagree: {each}"
    if min(sign * median for median in medians) <= itself:
        return f"launches read {each}, and one of base against itself is off by {math.expm1(itself):.1%}"
    return ""


def compared(question: Question, ratios: Sequence[float], effect: float | None = None) -> Comparison:
    """What pairs say, at this question's alpha, shared by its scenarios."""
    wanted = question.effect if effect is None else effect
    return verdict.compare(ratios, alpha=question.alpha, scenarios=len(question.scenarios), effect=wanted)


def ratio_text(found: Comparison) -> str:
    """``1.041 [1.032, 1.050] in 40 pairs``."""
    if found.ratio is None:
        return "no pairs"
    high = "inf" if found.ratio_high is None else f"{found.ratio_high:.3f}"
    return f"{found.ratio:.3f} [{found.ratio_low:.3f}, {high}] in {found.pairs} pairs"
