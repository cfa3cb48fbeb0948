"""How often the deciding rules are wrong, on simulated noise: the figures of "How we decide" in docs/measurement.md.

`python benchmarks/deciding.py` prints three parts, in two minutes on one core; `--quick` is a smoke run of seconds.
Searches: a default and 20 equal candidates, measured in shared rounds; how often is something else than the default
picked? Gate: pairs under white noise, clock drift, heavy tails, hiccups, autocorrelation and all of them: false alarms,
slowdowns found, speed-ups called slower; beside it "old block, new block, Mann-Whitney" on the same series. Limits:
what the rule costs and what it rests on. It measures nothing: noise here is what we could think of, and it is
`nsa-tune selftest` that asks the machine.

The series of samples is made first, in the order in which a machine would take them; then a coin (or, in a search, a
shuffle) says whose sample each is. So drift hits whichever side comes second, as it does in life.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter
from scipy.stats import mannwhitneyu

from tuner import stats, verdict

ALPHA = 0.001
CONFIDENCE = 0.999
CANDIDATES = 20
WITHIN = 40  # pairs in which +4 % must be found
EFFECT = float(np.log(1.01))  # the gate's "slower" asks for more than +1 %
Series = Callable[[np.random.Generator, int, int, float], stats.Floats]


def white(generator: np.random.Generator, runs: int, length: int, noise: float) -> stats.Floats:
    """Normal log times, sd `noise`; shape (runs, length), as all of these."""
    return np.multiply(noise, generator.standard_normal((runs, length)))


def drift(generator: np.random.Generator, runs: int, length: int, noise: float) -> stats.Floats:
    """White noise on a clock that slides by 2 % from the first sample to the last, up or down."""
    slope = np.where(generator.random((runs, 1)) < 0.5, -0.02, 0.02)
    return np.add(white(generator, runs, length, noise), slope * np.linspace(0.0, 1.0, length))


def heavy(generator: np.random.Generator, runs: int, length: int, noise: float) -> stats.Floats:
    """Student t with 3 degrees of freedom, scaled to sd `noise`."""
    return np.asarray(noise / 3.0**0.5 * generator.standard_t(3.0, (runs, length)))


def hiccups(generator: np.random.Generator, runs: int, length: int, noise: float) -> stats.Floats:
    """White noise, and 2 % of the samples take up to twice as long: one-sided, with an sd of 6 % of their own."""
    extra = np.log1p(generator.random((runs, length)))
    return np.asarray(white(generator, runs, length, noise) + extra * (generator.random((runs, length)) < 0.02))


def correlated(generator: np.random.Generator, runs: int, length: int, noise: float) -> stats.Floats:
    """First-order autoregression: neighbours correlate by 0.9, stationary sd `noise`."""
    shocks = generator.normal(0.0, noise * np.sqrt(1.0 - 0.9**2), (runs, length))
    shocks[:, 0] = generator.normal(0.0, noise, runs)
    return np.asarray(lfilter([1.0], [1.0, -0.9], shocks, axis=1))


def together(generator: np.random.Generator, runs: int, length: int, noise: float) -> stats.Floats:
    """Drift, hiccups, and autocorrelated plus t2 noise (no variance) whose size wanders by a factor of about 2."""
    wander = np.exp(0.7 * correlated(generator, runs, length, 1.0))
    rough = 0.5 * noise * generator.standard_t(2.0, (runs, length)) + correlated(generator, runs, length, 0.5 * noise)
    return drift(generator, runs, length, 0.0) + hiccups(generator, runs, length, 0.0) + wander * rough


SERIES: dict[str, Series] = {
    "white": white,
    "drift": drift,
    "heavy tails": heavy,
    "hiccups": hiccups,
    "autocorrelated": correlated,
    "all together": together,
}
NOISES = (0.002, 0.005, 0.01, 0.02, 0.05)
FOUND_KINDS = ("white", "drift", "heavy tails", "autocorrelated")  # where the sd of a sample is `noise`


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Counts over the runs of one kind of noise; pairs_median to find +4 %, inf where fewer than half the runs did."""

    slower: int
    faster: int
    slower_than_effect: int
    blocks: int
    speed_ups: int
    found: int
    found_beyond_effect: int
    pairs_median: float


def paired(generator: np.random.Generator, series: stats.Floats) -> stats.Floats:
    """Log ratios head / base, shape (runs, pairs): samples 2i and 2i + 1 are a pair and a coin says which is head."""
    second_over_first: stats.Floats = series[:, 1::2] - series[:, ::2]
    return np.where(generator.random(second_over_first.shape) < 0.5, second_over_first, -second_over_first)


def gate(generator: np.random.Generator, make: Series, noise: float, *, runs: int, pairs: int) -> Gate:
    """Identical sides and a head 4 % faster over `pairs` pairs, a head 4 % slower over the first 40; at every look."""
    series = make(generator, runs, 2 * pairs, noise)
    ratios = paired(generator, series)
    slowed = ratios[:, :WITHIN] + np.log(1.04)
    hits = reached(slowed)
    blocks = mannwhitneyu(series[:, pairs:], series[:, :pairs], axis=1, alternative="greater").pvalue
    return Gate(
        slower=count(reached(ratios)),
        faster=count(reached(-ratios)),
        slower_than_effect=count(reached(ratios, EFFECT)),
        blocks=int((blocks <= ALPHA).sum()),
        speed_ups=count(reached(ratios + np.log(0.96))),
        found=count(hits),
        found_beyond_effect=count(reached(slowed, EFFECT)),
        pairs_median=median_first(hits),
    )


def print_gate(generator: np.random.Generator, *, runs: int, pairs: int) -> bool:
    """The gate's table; whether every promise held."""
    limit = stats.binomial_limit(runs, ALPHA, CONFIDENCE)
    print(f"\nGate: {runs} runs a line, a look after every pair. At alpha {ALPHA:g} at most {limit} alarms (99.9 %)")
    print(f"A/A over {pairs} pairs, called: slower | faster | slower than +1 % | by Mann-Whitney on two blocks")
    print(f"-4 % called slower | +4 % called slower within {WITHIN} pairs, median pairs | +4 % called slower than +1 %")
    held = True
    for name, make in SERIES.items():
        for noise in NOISES:
            g = gate(generator, make, noise, runs=runs, pairs=pairs)
            held &= max(g.slower, g.faster, g.slower_than_effect) <= limit and g.speed_ups == 0
            held &= name not in FOUND_KINDS or noise > 0.01 or g.found >= 0.99 * runs
            median = f"{g.pairs_median:.0f}" if np.isfinite(g.pairs_median) else f">{WITHIN}"
            print(
                f"{name:15s} {noise:5.1%}  {g.slower:4d} | {g.faster:4d} | {g.slower_than_effect:4d} "
                f"| {g.blocks / runs:6.1%}   {g.speed_ups:4d} | {g.found / runs:7.2%} {median:>4s} "
                f"| {g.found_beyond_effect / runs:7.2%}",
                flush=True,
            )
    return held


def rounds_of(
    generator: np.random.Generator, make: Series, noise: float, *, searches: int, rounds: int
) -> stats.Floats:
    """Log times of the default and its candidates, shape (searches, rounds, 1 + CANDIDATES), each round shuffled."""
    series = make(generator, searches, rounds * (1 + CANDIDATES), noise).reshape(searches, rounds, -1)
    return generator.permuted(series, axis=2)


def print_searches(generator: np.random.Generator, *, searches: int, evidence_only: int, rounds: int) -> bool:
    """How often a search over equal candidates leaves the default; whether at most once per 1 / alpha searches."""
    kinds = [(make, noise) for make in SERIES.values() for noise in NOISES]
    names = ["default", *(f"candidate_{i:02d}" for i in range(CANDIDATES))]
    peaks = dict.fromkeys(names, 1) | {"default": 2}
    picked = 0
    for (make, noise), share in zip(kinds, shares(searches, len(kinds)), strict=True):
        logs = rounds_of(generator, make, noise, searches=share, rounds=rounds)
        for search in 100.0 * np.exp(logs):
            samples = {name: search[:, i] for i, name in enumerate(names)}
            picked += verdict.pick("default", samples, peaks, ALPHA).winner != "default"
    print(f"Searches: {CANDIDATES} candidates equal to the default, {rounds} rounds, all kinds and sizes of noise")
    print(f"something else picked: {picked} of {searches} (verdict.pick)", flush=True)
    alarms = 0
    for (make, noise), share in zip(kinds, shares(evidence_only, len(kinds)), strict=True):
        alarms += int(certified(rounds_of(generator, make, noise, searches=share, rounds=rounds))[0].sum())
    upper = stats.binomial_upper(alarms, evidence_only, CONFIDENCE)
    print(f"the same, evidence only: {alarms} of {evidence_only}; rate at most {upper:.1e} (99.9 %), alpha {ALPHA:g}")
    for gain in (0.01, 0.04):
        logs = rounds_of(generator, white, 0.01, searches=200, rounds=100)
        logs[:, :, 1] += np.log1p(-gain)
        found, after = certified(logs[:, :, :2])
        print(f"one of them {gain:.0%} faster at 1 % noise: certified in {found.mean():.1%}, median {after:.0f} rounds")
    return picked <= 1 and alarms <= stats.binomial_limit(evidence_only, ALPHA, CONFIDENCE)


def print_limits(generator: np.random.Generator, *, runs: int) -> None:
    """What the rule costs and what it rests on: pairs for "same", the coin, symmetry; and blocks of growing length."""
    print(f"\nLimits: {runs} runs a figure, A/A, 1 % white noise and 100 pairs unless stated")
    for noise in (0.002, 0.005, 0.01):
        ratios = paired(generator, white(generator, runs, 400, noise))
        above = np.maximum.accumulate(stats.log_e_path(ratios, delta=-EFFECT, direction="slower"), axis=1)
        below = np.maximum.accumulate(stats.log_e_path(ratios, delta=EFFECT, direction="faster"), axis=1)
        same = np.minimum(above, below) >= stats.log_threshold(alpha=ALPHA)
        print(f"called same within 1 % at {noise:.1%} noise after a median of {median_first(same):.0f} pairs")
    series = white(generator, runs, 200, 0.01)
    series[:, 1::2] += 0.005
    for order, ratios in (("coin", paired(generator, series)), ("base first", series[:, 1::2] - series[:, ::2])):
        print(f"a second place that costs 0.5 %, {order}: called slower in {count(reached(ratios)) / runs:.2%}")
    for share in (0.02, 0.05, 0.2):
        hit = np.log1p(generator.random((runs, 100))) * (generator.random((runs, 100)) < share)
        ratios = paired(generator, white(generator, runs, 200, 0.01)) + hit
        slower, beyond = count(reached(ratios)) / runs, count(reached(ratios, EFFECT)) / runs
        print(f"hiccups in {share:.0%} of head's samples alone: called slower in {slower:.2%}, than +1 % {beyond:.2%}")
    for pairs in (12, 30, 40, 100):
        blocks = drift(generator, runs, 2 * pairs, 0.01)
        p_values = mannwhitneyu(blocks[:, pairs:], blocks[:, :pairs], axis=1, alternative="greater").pvalue
        print(f"2 % clock drift, Mann-Whitney on {pairs} + {pairs}: called slower in {np.mean(p_values <= ALPHA):.1%}")


def reached(ratios: stats.Floats, delta: float = 0.0) -> npt.NDArray[np.bool_]:
    """Where "slower than delta" has its evidence, shape (runs, pairs)."""
    return np.asarray(stats.log_e_path(ratios, delta=delta, direction="slower") >= stats.log_threshold(alpha=ALPHA))


def count(hits: npt.NDArray[np.bool_]) -> int:
    """Runs that hit at any look."""
    return int(hits.any(axis=1).sum())


def median_first(hits: npt.NDArray[np.bool_]) -> float:
    """Median over runs of the first look that hit, from 1; inf where most runs never did."""
    return float(np.median(np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, np.inf)))


def shares(total: int, parts: int) -> list[int]:
    """`total` dealt to `parts` as evenly as it goes."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def certified(logs: stats.Floats) -> tuple[npt.NDArray[np.bool_], float]:
    """(which searches certify a candidate as faster than the default, median rounds to the first) of CANDIDATES."""
    rounds = logs.shape[1]
    ratios = (logs[:, :, 1:] - logs[:, :, :1]).transpose(0, 2, 1)
    path = stats.log_e_path(ratios.reshape(-1, rounds), direction="faster").reshape(ratios.shape).max(axis=1)
    hits = path >= stats.log_threshold(alpha=ALPHA, scenarios=CANDIDATES)
    return hits.any(axis=1), median_first(hits)


def main() -> int:
    """Print the figures; 0 where every promise held, 1 otherwise."""
    parser = argparse.ArgumentParser(description="error rates of the deciding rules on simulated noise")
    parser.add_argument("--quick", action="store_true", help="a smoke run: a tenth of the runs or less")
    parser.add_argument("--seed", type=int, default=2025)
    arguments = parser.parse_args()
    share = 20 if arguments.quick else 1
    generator, began = np.random.default_rng(arguments.seed), time.monotonic()
    held = print_searches(generator, searches=1000 // share, evidence_only=20_000 // share, rounds=40)
    held &= print_gate(generator, runs=10_000 // share, pairs=100)
    print_limits(generator, runs=5000 // share)
    print(f"\n{'every promise held' if held else 'A PROMISE WAS BROKEN'}, seed {arguments.seed}")
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
