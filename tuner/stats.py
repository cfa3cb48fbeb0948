"""Evidence from paired measurements: sign-flip e-processes, the intervals they invert to, exact binomial bounds.

Leaf module of the tuner: numbers in, numbers out; `verdict` turns them into words. It measures nothing, reads no file
and knows no scenario or candidate by name. A *pair* is one base and one head time taken in the same round, in an order
that a coin decided; its log ratio is d = log(head / base), so d > 0 means that head is slower.

Why it is valid (Ville 1939; Ramdas et al. 2023, doi:10.1214/23-STS894): where nothing but the coin tells the sides
apart, the sign of d is a fair coin given |d| and the past, so E[exp(lambda y) / cosh(lambda y)] = 1 for any y scaled by
past pairs only. That factor rises with y, so for a head faster than the null the product is a supermartingale. Hence
P(E_n >= K / alpha at any look n) <= alpha / K, without normality, stationarity or a fixed number of pairs. For delta
other than 0 and a head that really differs, it also needs d to be symmetric about one constant.

Everything works on log E. "Ever" is the running maximum over looks: that is what Ville's inequality bounds, so a
rejection, once made, stands. One over the largest E is an anytime-valid p-value; it is no e-value: do not average it.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, betaincinv

Direction = Literal["slower", "faster"]
Floats = npt.NDArray[np.float64]

BETS = (0.25, 0.5, 1.0, 2.0)  # lambda: small ones win at small effects, 2 decides in the fewest pairs
CLIP = 2.5  # in median distances: a hiccup counts as one pair
WARM_UP_PAIRS = 3  # a median of fewer distances is a poor scale
WARM_UP_SCALE = 100.0  # 1 / (1 %), the noise of an ordinary machine
SCALE_FLOOR = 1e-6  # relative timer resolution: more than half exact ties must not divide by zero
GRID_REACH = 1e4  # outermost delta of the interval's grid, in median distances from the median
GRID_HALF = 64  # grid points on either side of the median
REFINEMENTS = (16, 16, 16)  # an interval's end is found to 1/4096 of a grid step


def log_e_path(log_ratios: npt.ArrayLike, *, delta: float = 0.0, direction: Direction) -> Floats:
    """Log of E after every pair.

    Args:
        log_ratios: d, shape (pairs,) in the order measured, or (runs, pairs) for many independent runs.
        delta: log of the ratio at the edge of the null hypothesis.
        direction: "slower" gathers evidence against d <= delta, "faster" against d >= delta.

    Returns:
        Array of the same shape; entry i uses pairs 0..i only.

    Raises:
        ValueError: a log ratio is NaN or infinite, or the shape is neither of the two.
    """
    array = _checked(log_ratios)
    moves = _scaled_moves(np.atleast_2d(array) - delta)
    return _log_mixture(moves if direction == "slower" else -moves).reshape(array.shape)


def log_e(log_ratios: npt.ArrayLike, *, delta: float = 0.0, direction: Direction) -> float:
    """Log of E after the last pair of one run, shape (pairs,); 0.0 where there is no pair yet (E_0 = 1)."""
    path = log_e_path(log_ratios, delta=delta, direction=direction)
    return float(path[-1]) if path.size else 0.0


def log_e_ever(log_ratios: npt.ArrayLike, *, delta: float = 0.0, direction: Direction) -> float:
    """Log of the largest E at any look of one run, E_0 = 1 included, so never below 0.0. Verdicts report this."""
    return float(np.max(log_e_path(log_ratios, delta=delta, direction=direction), initial=0.0))


def log_threshold(*, alpha: float, scenarios: int = 1) -> float:
    """log(K / alpha): what log E must reach when K scenarios or candidates share the false-alarm rate alpha."""
    if not 0.0 < alpha < 1.0 or scenarios < 1:
        raise ValueError(f"expected 0 < alpha < 1 and scenarios >= 1, got alpha={alpha}, scenarios={scenarios}")
    return float(np.log(scenarios / alpha))


def rejected(
    log_ratios: npt.ArrayLike, *, delta: float = 0.0, direction: Direction, alpha: float, scenarios: int = 1
) -> bool:
    """Whether one run rejects the null at level alpha / K at its last look or at any before it."""
    threshold = log_threshold(alpha=alpha, scenarios=scenarios)
    return log_e_ever(log_ratios, delta=delta, direction=direction) >= threshold


def ratio(log_ratios: npt.ArrayLike) -> float:
    """Typical head / base: exp of the median log ratio. Raises ValueError where there is no pair."""
    array = _checked(log_ratios)
    if not array.size:
        raise ValueError("a ratio needs one pair or more, got none: measure a round first")
    return float(np.exp(np.median(array)))


def interval(log_ratios: npt.ArrayLike, *, alpha: float) -> tuple[float, float]:
    """Ratios that neither direction has rejected at alpha / 2 at any look: a confidence interval valid at every look.

    The set need not be connected, since the scale of y depends on delta: this is its hull on a grid, each end moved
    out to the nearest rejected point. Where the looks together reject the whole grid (the ratio moved during the run),
    only the last look counts. Its set is never empty: a direction's E passes 1 only where the sum of y has its sign.

    Args:
        log_ratios: d, shape (pairs,).
        alpha: one minus the coverage, over all looks together.

    Returns:
        (low, high) as head / base; 0.0 or inf where that side cannot be bounded yet.
    """
    array = _checked(log_ratios)
    if array.size < pairs_needed(alpha=alpha / 2):
        return 0.0, np.inf
    threshold = log_threshold(alpha=alpha / 2)
    grid, ever = _grid(array), True
    evidence = _strongest(array, grid, ever=ever)
    if (evidence >= threshold).all():
        ever = False
        evidence = _strongest(array, grid, ever=ever)
    kept = np.flatnonzero(evidence < max(threshold, float(evidence.min()) + 1e-9))
    first, last, end = int(kept[0]), int(kept[-1]), len(grid) - 1
    low = -np.inf if first == 0 else _edge(array, grid[first - 1], grid[first], threshold, ever=ever)
    high = np.inf if last == end else _edge(array, grid[last + 1], grid[last], threshold, ever=ever)
    return float(np.exp(low)), float(np.exp(high))


def pairs_needed(*, alpha: float, scenarios: int = 1) -> int:
    """Fewest pairs with which E can reach K / alpha: every y at the clip. A clear effect takes one or two more."""
    threshold = log_threshold(alpha=alpha, scenarios=scenarios)
    enough = int((threshold + np.log(len(BETS))) / np.log(1.999)) + 2  # the largest bet gains log(1.9999) a pair
    return int(np.argmax(_log_mixture(np.full((1, enough), CLIP))[0] >= threshold)) + 1


def binomial_upper(count: int, trials: int, confidence: float) -> float:
    """One-sided exact upper bound of a rate after `count` events in `trials` (Clopper and Pearson 1934)."""
    if trials < 1 or not 0 <= count <= trials:
        raise ValueError(f"expected trials >= 1 and 0 <= count <= trials, got count={count}, trials={trials}")
    return 1.0 if count == trials else float(betaincinv(count + 1, trials - count, confidence))


def binomial_limit(trials: int, rate: float, confidence: float) -> int:
    """Largest count that a true rate of `rate` explains: the smallest c with P(count <= c) >= confidence."""
    return int(np.argmax(bdtr(np.arange(trials + 1.0), trials, rate) >= confidence))


def smallest_detectable_effect(
    aa_log_ratios: npt.ArrayLike,
    *,
    alpha: float,
    scenarios: int,
    resamples: int,
    seed: int,
    power: float = 0.95,
    delta: float = 0.0,
) -> float | None:
    """Smallest slowdown that, added to the A/A lane's own pairs, is found in the share `power` of resamples.

    Args:
        aa_log_ratios: log ratios of base against base, shape (pairs,).
        alpha, scenarios: as in the gate, which finds an effect when E reaches K / alpha at any look in the lane.
        resamples: lanes drawn from the pairs with replacement. Bursts of noise are broken up: a little optimistic.
        seed: of the resampling.
        delta: log(1 + effect) where the gate asks for more than that effect; 0.0 for any slowdown.

    Returns:
        The effect as a fraction of time (0.012 is +1.2 %), or None where not even +100 % is found (too few pairs).
    """
    array, threshold = _checked(aa_log_ratios), log_threshold(alpha=alpha, scenarios=scenarios)
    if array.size < pairs_needed(alpha=alpha, scenarios=scenarios):
        return None
    lanes = array[np.random.default_rng(seed).integers(array.size, size=(resamples, array.size))]

    def found(shift: float) -> bool:
        path = log_e_path(lanes + shift, delta=delta, direction="slower")
        return float(np.mean(path.max(axis=1) >= threshold)) >= power

    low, high, most = 0.0, 1e-4, float(np.log(2.0))
    while not found(high):
        if high >= most:
            return None
        low, high = high, min(high * 2.0, most)
    for _ in range(8):
        middle = (low + high) / 2.0
        low, high = (low, middle) if found(middle) else (middle, high)
    return float(np.expm1(high))


def _checked(log_ratios: npt.ArrayLike) -> Floats:
    array = np.asarray(log_ratios, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"log ratios must have shape (pairs,) or (runs, pairs), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("log ratios must be finite, got NaN or inf: leave the round out of both arms")
    return array


def _scaled_moves(distances: Floats) -> Floats:
    """y, shape (rows, pairs), from d - delta: each pair over the median distance of the pairs before it, clipped."""
    rows, pairs = distances.shape
    scale = np.full((pairs, rows), WARM_UP_SCALE)
    ordered = np.empty((pairs, rows))  # rows 0..i-1: distances so far, ascending
    for i, new in enumerate(np.ascontiguousarray(np.abs(distances).T)):
        if i >= WARM_UP_PAIRS:
            half = i // 2
            median = ordered[half] if i % 2 else 0.5 * (ordered[half - 1] + ordered[half])
            scale[i] = 1.0 / np.maximum(median, SCALE_FLOOR)
        ordered[i] = np.inf
        # Insertion without a search: each entry becomes the middle one of its left neighbour, itself and the new value.
        ordered[1 : i + 1] = np.minimum(ordered[1 : i + 1], np.maximum(ordered[:i], new))
        ordered[0] = np.minimum(ordered[0], new)
    clipped: Floats = np.clip(distances * scale.T, -CLIP, CLIP)
    return clipped


def _log_mixture(moves: Floats) -> Floats:
    """Log E: mean over bets of the running product of exp(lambda y) / cosh(lambda y) = 2 / (1 + exp(-2 lambda y))."""
    logs = [np.cumsum(np.log(2.0) - np.log1p(np.exp(-2.0 * bet * moves)), axis=1) for bet in BETS]
    top = np.maximum.reduce(logs)
    mixture: Floats = top + np.log(sum(np.exp(log - top) for log in logs) / len(BETS))
    return mixture


def _grid(log_ratios: Floats) -> Floats:
    """Deltas, dense near the median and sparse far out."""
    centre = float(np.median(log_ratios))
    unit = max(float(np.median(np.abs(log_ratios - centre))), SCALE_FLOOR)
    offsets = unit * np.sinh(np.linspace(0.0, np.arcsinh(GRID_REACH), GRID_HALF + 1))
    return centre + np.concatenate([-offsets[:0:-1], offsets])


def _strongest(log_ratios: Floats, deltas: Floats, *, ever: bool) -> Floats:
    """Log evidence against each delta, the stronger direction's, at the look where it was largest or at the last."""
    moves = _scaled_moves(log_ratios[None, :] - deltas[:, None])
    paths = np.maximum(_log_mixture(moves), _log_mixture(-moves))
    strongest: Floats = paths.max(axis=1) if ever else paths[:, -1]
    return strongest


def _edge(log_ratios: Floats, outside: float, inside: float, threshold: float, *, ever: bool) -> float:
    """End of the kept set between a rejected delta and a kept one; errs to the outside."""
    for parts in REFINEMENTS:
        points = np.linspace(outside, inside, parts + 1)
        kept = _strongest(log_ratios, points, ever=ever) < threshold
        kept[-1] = True
        step = max(int(np.argmax(kept)), 1)
        outside, inside = float(points[step - 1]), float(points[step])
    return outside
