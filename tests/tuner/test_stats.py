"""Claims of `tuner.stats`: e-values by hand, exactness under the coin, error rates, intervals, binomial bounds."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner import stats

ALPHA = 0.001
moves = st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=12)


def by_hand(log_ratios: list[float], delta: float) -> float:
    """The formula of the design, written as it is read."""
    products = [1.0, 1.0, 1.0, 1.0]
    past: list[float] = []
    for d in log_ratios:
        scale = 100.0 if len(past) < 3 else 1.0 / max(float(np.median(past)), 1e-6)
        y = min(max((d - delta) * scale, -2.5), 2.5)
        products = [p * math.exp(b * y) / math.cosh(b * y) for p, b in zip(products, (0.25, 0.5, 1, 2), strict=True)]
        past.append(abs(d - delta))
    return sum(products) / 4.0


def pairs_of(generator: np.random.Generator, runs: int, pairs: int, noise: float) -> stats.Floats:
    """Log ratios of identical sides with `noise` per sample, so sqrt(2) times that per pair."""
    return generator.normal(0.0, noise * math.sqrt(2.0), (runs, pairs))


def detectable(lane: stats.Floats, delta: float = 0.0) -> float | None:
    """The smallest detectable effect of a lane at ALPHA for one scenario."""
    return stats.smallest_detectable_effect(lane, alpha=ALPHA, scenarios=1, resamples=200, seed=0, delta=delta)


def test_one_pair_of_one_percent_has_the_e_value_of_the_formula() -> None:
    expected = (1.2449187 + 1.4621172 + 1.7615942 + 1.9640276) / 4.0  # 2 / (1 + exp(-2 lambda)) at y = 1
    assert math.exp(stats.log_e([0.01], direction="slower")) == pytest.approx(expected, rel=1e-6)


def test_the_fourth_pair_is_scaled_by_the_median_of_the_first_three() -> None:
    path = stats.log_e_path([0.01, 0.02, 0.04, 0.01], direction="slower")
    factors = [2.0 / (1.0 + np.exp(-2.0 * np.array([0.25, 0.5, 1.0, 2.0]) * y)) for y in (1.0, 2.0, 2.5, 0.5)]
    assert math.exp(path[2]) == pytest.approx(np.mean(factors[0] * factors[1] * factors[2]))
    assert math.exp(path[3]) == pytest.approx(np.mean(np.prod(factors, axis=0)))


@given(moves, st.floats(-0.1, 0.1))
def test_log_e_is_the_formula(log_ratios: list[float], delta: float) -> None:
    assert stats.log_e(log_ratios, delta=delta, direction="slower") == pytest.approx(
        math.log(by_hand(log_ratios, delta)), abs=1e-9
    )


@given(moves, st.floats(-0.1, 0.1))
def test_flipping_signs_mirrors_the_direction(log_ratios: list[float], delta: float) -> None:
    flipped = stats.log_e_path(-np.array(log_ratios), delta=-delta, direction="faster")
    np.testing.assert_array_equal(flipped, stats.log_e_path(log_ratios, delta=delta, direction="slower"))


@given(st.lists(st.floats(0.001, 0.5) | st.floats(-0.5, -0.001), max_size=12), st.floats(1.0, 10.0))
def test_beyond_the_warm_up_only_relative_size_counts(log_ratios: list[float], factor: float) -> None:
    ratios = np.array([0.03, -0.03, 0.05, *log_ratios])  # the first three are clipped at any larger scale
    np.testing.assert_allclose(
        stats.log_e_path(ratios * factor, direction="slower"), stats.log_e_path(ratios, direction="slower"), atol=1e-6
    )


@given(moves)
def test_later_pairs_do_not_change_earlier_looks(log_ratios: list[float]) -> None:
    path = stats.log_e_path([*log_ratios, 0.3], direction="slower")
    np.testing.assert_array_equal(path[:-1], stats.log_e_path(log_ratios, direction="slower"))


def test_many_runs_at_once_equal_one_at_a_time() -> None:
    runs = pairs_of(np.random.default_rng(0), 5, 30, 0.01)
    together = stats.log_e_path(runs, delta=0.01, direction="faster")
    for run, path in zip(runs, together, strict=True):
        np.testing.assert_array_equal(stats.log_e_path(run, delta=0.01, direction="faster"), path)


def test_the_mean_e_value_over_all_coin_flips_is_exactly_one() -> None:
    sizes = np.array([0.004, 0.03, 0.011, 0.0, 0.2, 0.013, 0.001, 0.02, 0.02, 0.007])
    flips = np.array(list(itertools.product([-1.0, 1.0], repeat=len(sizes))))
    e_values = np.exp(stats.log_e_path(flips * sizes, direction="slower"))
    np.testing.assert_allclose(e_values.mean(axis=0), 1.0, rtol=1e-9)


def test_the_share_of_coin_flips_that_ever_pass_a_level_is_below_ville() -> None:
    sizes = np.array([0.004, 0.03, 0.011, 0.02, 0.2, 0.013, 0.001, 0.02, 0.02, 0.007, 0.01, 0.01, 0.02])
    flips = np.array(list(itertools.product([-1.0, 1.0], repeat=len(sizes))))
    highest = stats.log_e_path(flips * sizes, direction="slower").max(axis=1)
    for level in (2.0, 5.0, 20.0, 100.0):
        assert 0.0 < np.mean(highest >= math.log(level)) <= 1.0 / level


def test_thousands_of_pairs_and_exact_ties_stay_finite() -> None:
    assert np.isfinite(stats.log_e_path(np.full(5000, 0.04), direction="slower")).all()
    ties = np.zeros(60)
    ties[::3] = 0.01
    assert np.isfinite(stats.log_e_path(ties, direction="slower")).all()
    assert stats.log_e(np.zeros(60), direction="slower") == pytest.approx(0.0)


def test_no_pair_is_no_evidence() -> None:
    assert stats.log_e([], direction="slower") == 0.0
    assert stats.log_e_ever([], direction="faster") == 0.0
    assert not stats.rejected([], direction="slower", alpha=0.5)


@pytest.mark.parametrize("bad", [[0.01, math.nan], [math.inf], [[[0.01]]]])
def test_a_pair_that_is_no_number_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="log ratios must"):
        stats.log_e_path(bad, direction="slower")


def test_identical_sides_under_drift_alarm_at_most_at_alpha_over_all_looks() -> None:
    generator = np.random.default_rng(1)
    runs, pairs, alpha = 6000, 60, 0.01
    samples = generator.normal(0.0, 0.01, (runs, 2 * pairs)) + np.linspace(0.0, 0.3, 2 * pairs)
    ratios = (samples[:, 1::2] - samples[:, ::2]) * generator.choice([-1.0, 1.0], (runs, pairs))
    alarms = (stats.log_e_path(ratios, direction="slower") >= math.log(1.0 / alpha)).any(axis=1).sum()
    assert 0 < alarms <= stats.binomial_limit(runs, alpha, 0.999)


@pytest.mark.parametrize(("effect", "fewest", "most"), [(0.04, 12, 12), (0.01, 36, 40)])
def test_slowdowns_at_one_percent_noise_are_found_in_the_pairs_that_the_design_states(
    effect: float, fewest: int, most: int
) -> None:
    ratios = math.log1p(effect) + pairs_of(np.random.default_rng(2), 2000, 150, 0.01)
    hits = stats.log_e_path(ratios, direction="slower") >= math.log(1.0 / ALPHA)
    assert fewest <= np.median(np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, np.inf)) <= most


def test_a_speed_up_is_no_slowdown() -> None:
    ratios = math.log(0.96) + pairs_of(np.random.default_rng(3), 2000, 60, 0.01)
    assert not (stats.log_e_path(ratios, direction="slower") >= math.log(1.0 / ALPHA)).any()


def test_a_rejection_stands_whatever_comes_later() -> None:
    ratios = np.array([0.04] * 15 + [-0.04] * 15)
    assert stats.log_e(ratios, direction="slower") < math.log(1.0 / ALPHA)
    assert stats.rejected(ratios, direction="slower", alpha=ALPHA)
    assert not stats.rejected(ratios, direction="slower", alpha=ALPHA, scenarios=1000)


@pytest.mark.parametrize(("alpha", "scenarios"), [(0.0, 1), (1.0, 1), (0.001, 0)])
def test_an_alpha_that_is_no_rate_is_refused(alpha: float, scenarios: int) -> None:
    with pytest.raises(ValueError, match="expected 0 < alpha < 1"):
        stats.log_threshold(alpha=alpha, scenarios=scenarios)


def test_ratio_is_the_exponential_of_the_median() -> None:
    assert stats.ratio(np.log([1.0, 1.04, 9.0])) == pytest.approx(1.04)
    with pytest.raises(ValueError, match="one pair or more"):
        stats.ratio([])


def test_the_interval_covers_the_true_ratio_at_its_level() -> None:
    runs, alpha = 250, 0.1
    ratios = math.log(1.04) + pairs_of(np.random.default_rng(4), runs, 50, 0.01)
    misses = sum(not low <= 1.04 <= high for low, high in (stats.interval(run, alpha=alpha) for run in ratios))
    assert misses <= stats.binomial_limit(runs, alpha, 0.999)


def test_the_interval_leaves_one_out_where_a_direction_rejects_it() -> None:
    generator = np.random.default_rng(5)
    for effect in (0.0, 0.01, -0.01, 0.03):
        for run in effect + pairs_of(generator, 15, 40, 0.01):
            low, high = stats.interval(run, alpha=0.02)
            outside = [stats.rejected(run, direction=side, alpha=0.01) for side in ("slower", "faster")]
            assert [low > 1.0, high < 1.0] == outside


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-0.5, 0.5), min_size=8, max_size=30))
def test_the_interval_is_ordered_and_mirrors(log_ratios: list[float]) -> None:
    low, high = stats.interval(log_ratios, alpha=0.1)
    assert 0.0 <= low <= high
    back, forth = stats.interval([-d for d in log_ratios], alpha=0.1)
    assert (1.0 / forth, back) == pytest.approx((low, 1.0 / high), rel=1e-6)


def test_the_interval_narrows_with_pairs_and_is_unbounded_without() -> None:
    run = math.log(1.04) + pairs_of(np.random.default_rng(6), 1, 200, 0.01)[0]
    widths = [np.subtract(*stats.interval(run[:pairs], alpha=0.002)[::-1]) for pairs in (20, 60, 200)]
    assert widths[0] > widths[1] > widths[2]
    assert widths[2] < 0.01
    assert stats.interval(run[: stats.pairs_needed(alpha=0.001) - 1], alpha=0.002) == (0.0, math.inf)
    assert stats.interval([], alpha=0.002) == (0.0, math.inf)


def test_the_interval_of_identical_pairs_is_narrow_and_holds_them() -> None:
    low, high = stats.interval(np.zeros(40), alpha=0.002)
    assert 0.999999 < low <= 1.0 <= high < 1.000001


def test_a_ratio_that_moved_during_the_run_still_has_an_interval() -> None:
    noise = pairs_of(np.random.default_rng(7), 1, 90, 0.003)[0]
    low, high = stats.interval(noise + np.repeat([0.1, -0.1], [30, 60]), alpha=0.002)
    assert math.exp(-0.1) < high
    assert 0.9 < low < high < 1.0 / 0.9


def test_fewer_pairs_than_needed_never_reject_and_that_many_can() -> None:
    growing = 0.03 * 3.0 ** np.arange(30)  # every y at the clip: nothing gains faster
    for scenarios, fewest in ((1, 11), (3, 13), (20, 16)):
        assert stats.pairs_needed(alpha=ALPHA, scenarios=scenarios) == fewest
        can, cannot = (
            stats.rejected(growing[:pairs], direction="slower", alpha=ALPHA, scenarios=scenarios)
            for pairs in (fewest, fewest - 1)
        )
        assert (can, cannot) == (True, False)


def test_binomial_bounds_are_exact() -> None:
    assert stats.binomial_upper(0, 100, 0.95) == pytest.approx(1.0 - 0.05 ** (1.0 / 100.0))
    assert stats.binomial_upper(5, 5, 0.95) == 1.0
    upper = stats.binomial_upper(2, 50, 0.99)
    assert sum(math.comb(50, k) * upper**k * (1.0 - upper) ** (50 - k) for k in range(3)) == pytest.approx(0.01)
    tail = [sum(math.comb(20, k) * 0.1**k * 0.9 ** (20 - k) for k in range(c + 1)) for c in range(21)]
    assert stats.binomial_limit(20, 0.1, 0.999) == next(c for c, share in enumerate(tail) if share >= 0.999)
    with pytest.raises(ValueError, match="0 <= count <= trials"):
        stats.binomial_upper(3, 2, 0.95)


def test_the_smallest_detectable_effect_is_found_in_fresh_lanes() -> None:
    generator = np.random.default_rng(8)
    small, large = (detectable(pairs_of(generator, 1, 60, noise)[0]) for noise in (0.002, 0.02))
    assert small is not None
    assert large is not None
    assert 0.0 < small < 0.005 < large < 0.06
    lane = pairs_of(generator, 1, 60, 0.01)[0]
    effect = detectable(lane)
    assert effect is not None
    assert effect == detectable(lane)
    fresh = math.log1p(effect) + pairs_of(generator, 1000, 60, 0.01)
    found = (stats.log_e_path(fresh, direction="slower") >= math.log(1.0 / ALPHA)).any(axis=1).mean()
    assert found > 0.8  # the lane's own spread is uncertain by sqrt(1 / 120), about 9 %


def test_an_effect_below_the_gates_own_is_not_detectable() -> None:
    lane = pairs_of(np.random.default_rng(9), 1, 60, 0.002)[0]
    effect = detectable(lane, delta=math.log(1.01))
    assert effect is not None
    assert effect > 0.01


def test_too_few_pairs_detect_nothing() -> None:
    assert detectable(np.zeros(10)) is None
    assert detectable(np.zeros(11)) is None  # 11 suffice only for growing effects
