"""From pairs to verdicts: whether head is slower than base, and which candidate the table should name.

Pure functions on frozen values, between `stats` (evidence) and `search`, `table`, `report` and the gate, which act on
it. It measures nothing, reads no file, and makes no number of absence: what cannot be known yet is `undecided`, with
the reason. Every threshold is E >= K / alpha at the last look or any before it; `stats` says what that promises.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from tuner import stats

Verdict = Literal["slower", "faster", "same", "undecided"]
PICK_ALPHA = 0.001  # chance that one table entry names something no faster than the default
LARGEST_LOG_E = 690.0  # e_value saturates at 1e299: JSON has no infinity


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What the pairs of one scenario say about head against base.

    verdict: "slower" rejects ratio <= 1 + effect, "faster" ratio >= 1 / (1 + effect), "same" rejects both outsides.
    ratio: head / base, exp of the median log ratio; None without a pair.
    ratio_low, ratio_high: ratios that neither direction rejected at alpha / scenarios, as the verdict does; 0.0, None
        where a side is not bounded yet. Coverage is 1 - 2 alpha over all scenarios and looks.
    e_value: largest evidence for the verdict at any look (undecided: of the verdict nearest to its threshold).
    pairs: rounds in which both sides have a time.
    reason: why undecided; None for any other verdict.
    spread_needed: with one run per arm, the sd of a single log ratio at which it would have been decided; else None.
    """

    verdict: Verdict
    ratio: float | None
    ratio_low: float
    ratio_high: float | None
    e_value: float
    pairs: int
    alpha: float
    scenarios: int
    effect: float
    reason: str | None = None
    spread_needed: float | None = None


class Pick(msgspec.Struct, frozen=True, kw_only=True):
    """What the table should name for one problem, and the evidence.

    ratio, ratio_low, ratio_high, e_value, pairs: winner / default; default / runner-up where the default wins. Below 1
        the pick is faster. As in `Comparison`; without a candidate ratio is None and e_value 1 (E before any pair).
    runner_up: smallest mean log ratio among the others, default included; None without a candidate.
    tied: names, sorted, that the best is not certified faster than, without the winner.
    comparisons: candidate name -> candidate (head) against default (base), effect 0, scenarios = number of candidates.
    """

    winner: str
    runner_up: str | None
    pairs: int
    ratio: float | None
    ratio_low: float
    ratio_high: float | None
    e_value: float
    tied: tuple[str, ...]
    comparisons: dict[str, Comparison]


def log_ratios(base_us: npt.ArrayLike, head_us: npt.ArrayLike) -> stats.Floats:
    """d = log(head / base) of the rounds in which both sides have a time, in order; shape (pairs,).

    Args:
        base_us, head_us: microseconds, shape (rounds,); the same index is the same round, NaN a dropped sample.

    Raises:
        ValueError: shapes differ, or a time is zero, negative or infinite.
    """
    base, head = np.asarray(base_us, dtype=np.float64), np.asarray(head_us, dtype=np.float64)
    if base.ndim != 1 or base.shape != head.shape:
        raise ValueError(f"both sides need shape (rounds,) with the same rounds, got {base.shape} and {head.shape}")
    for side in (base, head):
        bad = side[~np.isnan(side) & ~((side > 0) & np.isfinite(side))]
        if bad.size:
            raise ValueError(f"times must be finite and above 0 microseconds (NaN = dropped), got {bad[0]}")
    kept = ~np.isnan(base) & ~np.isnan(head)
    ratios: stats.Floats = np.log(head[kept] / base[kept])
    return ratios


def compare(pairs: npt.ArrayLike, *, alpha: float, scenarios: int = 1, effect: float = 0.01) -> Comparison:
    """Verdict on one scenario.

    Args:
        pairs: log ratios d = log(head / base), shape (pairs,), in the order measured.
        alpha: false-alarm rate of one kind of verdict over all scenarios and looks together.
        scenarios: K, how many scenarios share alpha.
        effect: smallest change that matters, as a fraction; 0.0 asks for any change, and then nothing is "same".

    Raises:
        ValueError: alpha, scenarios or effect out of range, or a pair that is not finite.
    """
    if not 0.0 <= effect < 1.0:
        raise ValueError(f"effect is a fraction, expected 0 <= effect < 1, got {effect} (1 % is 0.01)")
    array = np.asarray(pairs, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"one scenario has log ratios of shape (pairs,), got {array.shape}")
    threshold = stats.log_threshold(alpha=alpha, scenarios=scenarios)
    evidence = _evidence(array, math.log1p(effect))
    reached = [name for name, value in evidence.items() if value >= threshold]
    verdict: Verdict = reached[0] if len(reached) == 1 else "undecided"
    low, high = stats.interval(array, alpha=2.0 * alpha / scenarios)
    return Comparison(
        verdict=verdict,
        ratio=stats.ratio(array) if array.size else None,
        ratio_low=low,
        ratio_high=high if math.isfinite(high) else None,
        e_value=_e_value(evidence.get(verdict, max(evidence.values()))),
        pairs=int(array.size),
        alpha=alpha,
        scenarios=scenarios,
        effect=effect,
        reason=_why_undecided(array, evidence, alpha, scenarios, effect) if verdict == "undecided" else None,
        spread_needed=spread_needed(float(array[0]), alpha, scenarios, effect) if array.size == 1 else None,
    )


def spread_needed(log_ratio: float, alpha: float, scenarios: int = 1, effect: float = 0.01) -> float:
    """Largest sd (one, of the log ratio between single runs) at which one pair would have been decided at alpha / K.

    It takes normal noise, which one run cannot show: for the reader, never for a verdict. Zero at the effect itself.
    """
    return abs(abs(log_ratio) - math.log1p(effect)) / NormalDist().inv_cdf(1.0 - alpha / scenarios)


def pick(default: str, samples: Mapping[str, npt.ArrayLike], peaks: Mapping[str, int], alpha: float) -> Pick:
    """Choose what the table names: the default unless a candidate is certified faster.

    Candidates with E >= K / alpha for "faster than the default" are eligible (K = number of candidates), unless another
    eligible one is certified faster than they are. The best of them has the smallest mean log ratio to the default; the
    tied set is what it is not certified faster than, at the same threshold. Among tied eligible ones the smaller peak
    wins, then the smaller `stats.ratio`, then the name. With probability 1 - alpha or more, whatever wins over the
    default is faster than it.

    Args:
        default: name of the default path; a key of `samples`.
        samples: name -> median microseconds per round, shape (rounds,); same index = same round, NaN = dropped.
        peaks: name -> peak bytes; every name of `samples`.
        alpha: chance that something no faster than the default is picked, over all candidates and looks.

    Raises:
        ValueError: default without samples, a name without a peak, or samples that `log_ratios` refuses.
    """
    _, eligible, tied = _standing(default, samples, alpha)
    if missing := sorted(samples.keys() - peaks.keys()):
        raise ValueError(f"every candidate needs its peak bytes, missing: {missing}")
    others = [name for name in sorted(samples) if name != default]
    moves = {name: log_ratios(samples[default], samples[name]) for name in others}
    centres = {default: 0.0} | {name: _mean(move) for name, move in moves.items()}
    winner = min(tied & eligible, key=lambda name: (peaks[name], stats.ratio(moves[name]), name), default=default)
    runner_up = min(sorted(samples.keys() - {winner}), key=centres.__getitem__, default=None)
    against = default if winner != default else runner_up
    pairs = np.empty(0) if against is None else log_ratios(samples[against], samples[winner])
    shown = compare(pairs, alpha=alpha, scenarios=max(len(others), 1), effect=0.0)
    return Pick(
        winner=winner,
        runner_up=runner_up,
        pairs=shown.pairs,
        ratio=shown.ratio,
        ratio_low=shown.ratio_low,
        ratio_high=shown.ratio_high,
        e_value=_e_value(stats.log_e_ever(pairs, direction="faster")),
        tied=tuple(sorted(tied - {winner})),
        comparisons={name: compare(moves[name], alpha=alpha, scenarios=len(others), effect=0.0) for name in others},
    )


def settled(default: str, samples: Mapping[str, npt.ArrayLike], *, alpha: float, effect: float = 0.01) -> bool:
    """Whether the shoot-out can stop: nothing is tied with the best, or all that is tied is the same within `effect`.

    Without an eligible candidate the best is the default: then everybody else must be slower or the same. Looking after
    every round is free. Exact twins settle only through `effect` (0.0: never); the caller's budget ends those.
    """
    best, _, tied = _standing(default, samples, alpha)
    threshold = stats.log_threshold(alpha=alpha, scenarios=max(len(samples) - 1, 1))
    open_pairs = (log_ratios(samples[best], samples[name]) for name in tied - {best})
    return all(_evidence(pairs, math.log1p(effect)).get("same", 0.0) >= threshold for pairs in open_pairs)


def _standing(default: str, samples: Mapping[str, npt.ArrayLike], alpha: float) -> tuple[str, set[str], set[str]]:
    """(best, eligible, tied): the first stages of the pick rule; `tied` holds the best itself."""
    if default not in samples:
        raise ValueError(f"the default {default!r} must be measured in the same rounds, got only {sorted(samples)}")
    others = [name for name in sorted(samples) if name != default]
    threshold = stats.log_threshold(alpha=alpha, scenarios=max(len(others), 1))
    faster = {name for name in others if _beats(samples, name, default, threshold)}
    # A mean follows one hiccup: without this line a pick could lose to a rival by the evidence itself.
    beaten = {name for name in faster for rival in faster if _beats(samples, rival, name, threshold)}
    eligible = faster - beaten or faster
    best = min(sorted(eligible), key=lambda name: _mean(log_ratios(samples[default], samples[name])), default=default)
    # An eligible best is certified faster than the default, so the default ties only where it is the best itself.
    return best, eligible, {best} | {name for name in others if not _beats(samples, best, name, threshold)}


def _beats(samples: Mapping[str, npt.ArrayLike], name: str, rival: str, threshold: float) -> bool:
    """Whether `name` is certified faster than `rival` (and was not, at another look, certified slower)."""
    evidence = _evidence(log_ratios(samples[rival], samples[name]), 0.0)
    return evidence["faster"] >= threshold > evidence["slower"]


def _evidence(pairs: stats.Floats, margin: float) -> dict[Verdict, float]:
    """Largest log evidence at any look for each verdict; margin = log(1 + effect), without one nothing is the same."""
    evidence: dict[Verdict, float] = {
        "slower": stats.log_e_ever(pairs, delta=margin, direction="slower"),
        "faster": stats.log_e_ever(pairs, delta=-margin, direction="faster"),
    }
    if margin > 0.0:
        evidence["same"] = min(
            stats.log_e_ever(pairs, delta=-margin, direction="slower"),
            stats.log_e_ever(pairs, delta=margin, direction="faster"),
        )
    return evidence


def _why_undecided(
    pairs: stats.Floats, evidence: dict[Verdict, float], alpha: float, scenarios: int, effect: float
) -> str:
    """The reason in words, for a person who has to decide what to do next."""
    threshold = stats.log_threshold(alpha=alpha, scenarios=scenarios)
    reached = [name for name, value in evidence.items() if value >= threshold]
    fewest = stats.pairs_needed(alpha=alpha, scenarios=scenarios)
    if reached:
        return f"{', '.join(reached)} at different looks: the ratio moved during the run"
    if not pairs.size:
        return "no pairs"
    if pairs.size == 1:
        spread = spread_needed(float(pairs[0]), alpha, scenarios, effect)
        change = math.expm1(float(pairs[0]))
        return f"one run per arm: {change:+.1%} says something if runs spread by {spread:.2%} (one sd) at most"
    if pairs.size < fewest:
        return f"{pairs.size} pairs, at least {fewest} needed"
    return f"E = {_e_value(max(evidence.values())):.3g} of {scenarios / alpha:.0f} needed, after {pairs.size} pairs"


def _e_value(log_e: float) -> float:
    return math.exp(min(log_e, LARGEST_LOG_E))


def _mean(pairs: stats.Floats) -> float:
    return float(np.mean(pairs)) if pairs.size else math.inf
