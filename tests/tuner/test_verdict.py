"""Claims of `tuner.verdict`: what is called slower, same or undecided, and which candidate is picked."""

import math

import msgspec
import numpy as np
import pytest

from tuner import stats, verdict

ALPHA = 0.001
PR31 = {512: (5.75, 6.00), 1024: (5.98, 6.29), 2048: (6.46, 6.71)}  # ms per decode step: packed, "varlen"


def pairs_of(seed: int, pairs: int, noise: float = 0.01) -> stats.Floats:
    """Log ratios of identical sides with `noise` per sample."""
    return np.random.default_rng(seed).normal(0.0, noise * math.sqrt(2.0), pairs)


def rounds_of(factors: dict[str, float], rounds: int = 40) -> dict[str, stats.Floats]:
    """Microseconds per round: 100 times a factor, with noise of 0.5 % and a drift of 10 % that a round shares."""
    generator = np.random.default_rng(0)
    drift = np.linspace(0.0, 0.1, rounds)
    noise = {name: np.exp(generator.normal(0.0, 0.005, rounds)) for name in factors}
    return {name: 100.0 * factor * np.exp(drift) * noise[name] for name, factor in factors.items()}


def picked(samples: dict[str, stats.Floats], **peaks: int) -> verdict.Pick:
    """The pick with `default` as default and equal peaks unless given."""
    return verdict.pick("default", samples, dict.fromkeys(samples, 100) | peaks, ALPHA)


@pytest.mark.parametrize(("effect", "word"), [(0.04, "slower"), (-0.04, "faster"), (0.0, "same")])
def test_a_clear_case_gets_its_word_and_an_interval_that_agrees(effect: float, word: str) -> None:
    found = verdict.compare(math.log1p(effect) + pairs_of(1, 100), alpha=ALPHA)
    assert found.verdict == word
    assert found.reason is None
    assert found.e_value >= 1.0 / ALPHA
    assert found.ratio_high is not None
    assert found.ratio_low < 1.0 + effect < found.ratio_high
    bounds = {"slower": (1.01, math.inf), "faster": (0.0, 1.0 / 1.01), "same": (1.0 / 1.01, 1.01)}[word]
    assert bounds[0] <= found.ratio_low < found.ratio_high <= bounds[1]


def test_swapping_the_sides_mirrors_the_verdict() -> None:
    pairs = 0.04 + pairs_of(2, 60)
    there, back = verdict.compare(pairs, alpha=ALPHA), verdict.compare(-pairs, alpha=ALPHA)
    assert (there.verdict, back.verdict) == ("slower", "faster")
    assert back.e_value == pytest.approx(there.e_value)
    assert there.ratio_high is not None
    assert back.ratio_low == pytest.approx(1.0 / there.ratio_high)


def test_a_slowdown_below_the_effect_is_not_slower() -> None:
    assert verdict.compare(math.log1p(0.005) + pairs_of(3, 400), alpha=ALPHA, effect=0.01).verdict == "same"
    assert verdict.compare(math.log1p(0.005) + pairs_of(3, 400), alpha=ALPHA, effect=0.0).verdict == "slower"


def test_more_scenarios_ask_for_more_evidence() -> None:
    pairs = np.full(13, 0.04)
    assert verdict.compare(pairs, alpha=ALPHA, scenarios=1).verdict == "slower"
    crowded = verdict.compare(pairs, alpha=ALPHA, scenarios=100)
    assert crowded.verdict == "undecided"
    assert crowded.reason == "13 pairs, at least 18 needed"
    assert (crowded.ratio_low, crowded.ratio_high) == (0.0, None)


def test_not_enough_evidence_is_undecided_and_says_how_much_there_is() -> None:
    found = verdict.compare(pairs_of(4, 20), alpha=ALPHA)
    assert found.verdict == "undecided"
    assert found.reason is not None
    assert found.reason.endswith("of 1000 needed, after 20 pairs")
    assert 1.0 <= found.e_value < 1000.0


@pytest.mark.parametrize("context", PR31)
def test_the_figures_of_pr31_are_undecided_because_of_one_run_per_arm(context: int) -> None:
    packed_ms, varlen_ms = PR31[context]
    pairs = verdict.log_ratios([packed_ms * 1e3], [varlen_ms * 1e3])
    found = verdict.compare(pairs, alpha=ALPHA, scenarios=len(PR31))
    assert found.verdict == "undecided"
    assert found.reason is not None
    assert found.reason.startswith("one run per arm")
    assert found.ratio == pytest.approx(varlen_ms / packed_ms)
    assert (found.ratio_low, found.ratio_high, found.pairs) == (0.0, None, 1)
    assert found.spread_needed is not None
    observed_spread = {512: 0.038, 1024: 0.019, 2048: 0.027}[context]  # of nine nominally neutral runs
    assert 0.008 < found.spread_needed < 0.012 < observed_spread


def test_the_spread_needed_puts_the_difference_at_the_quantile_of_alpha() -> None:
    spread = verdict.spread_needed(math.log(1.05), ALPHA, effect=0.0)
    assert 0.5 * math.erfc(math.log(1.05) / spread / math.sqrt(2.0)) == pytest.approx(ALPHA)
    assert verdict.spread_needed(-math.log(1.05), ALPHA, 3) == verdict.spread_needed(math.log(1.05), ALPHA, 3)


def test_no_pair_is_undecided_without_a_ratio() -> None:
    found = verdict.compare([], alpha=ALPHA)
    assert (found.verdict, found.reason, found.ratio, found.e_value) == ("undecided", "no pairs", None, 1.0)


def test_slower_at_one_look_and_faster_at_another_is_undecided() -> None:
    found = verdict.compare(pairs_of(5, 80, 0.001) + np.repeat([0.05, -0.05], [15, 65]), alpha=ALPHA)
    assert found.verdict == "undecided"
    assert found.reason == "slower, faster, same at different looks: the ratio moved during the run"


def test_a_comparison_survives_json() -> None:
    for pairs in ([], [0.04], np.full(12, 0.04), np.full(1200, 0.04)):
        found = verdict.compare(pairs, alpha=ALPHA)
        assert msgspec.json.decode(msgspec.json.encode(found), type=verdict.Comparison) == found


@pytest.mark.parametrize("effect", [-0.01, 1.0, math.nan])
def test_an_effect_that_is_no_fraction_is_refused(effect: float) -> None:
    with pytest.raises(ValueError, match="effect is a fraction"):
        verdict.compare([0.01], alpha=ALPHA, effect=effect)


def test_many_scenarios_in_one_array_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(pairs,\), got \(2, 3\)"):
        verdict.compare(np.zeros((2, 3)), alpha=ALPHA)


def test_log_ratios_leave_out_rounds_that_either_side_lacks() -> None:
    pairs = verdict.log_ratios([100.0, math.nan, 100.0, 100.0], [104.0, 100.0, math.nan, 96.0])
    np.testing.assert_allclose(pairs, np.log([1.04, 0.96]))


@pytest.mark.parametrize(("base", "head"), [([1.0, 2.0], [1.0]), ([0.0], [1.0]), ([1.0], [-1.0]), ([math.inf], [1.0])])
def test_times_that_cannot_be_are_refused(base: list[float], head: list[float]) -> None:
    with pytest.raises(ValueError, match="got"):
        verdict.log_ratios(base, head)


def test_equal_candidates_keep_the_default_even_with_smaller_peaks() -> None:
    found = picked(rounds_of({"default": 1.0, "a": 1.0, "b": 1.0}), a=1, b=1)
    assert found.winner == "default"
    assert found.tied == ("a", "b")
    assert {c.verdict for c in found.comparisons.values()} == {"undecided"}


def test_a_faster_candidate_wins_with_its_ratio_to_the_default() -> None:
    found = picked(rounds_of({"default": 1.0, "a": 0.9, "b": 1.1, "c": 1.0}))
    assert (found.winner, found.tied, found.pairs) == ("a", (), 40)
    assert found.runner_up in ("c", "default")
    assert found.ratio == pytest.approx(0.9, rel=0.01)
    assert found.ratio_high is not None
    assert found.ratio_low < 0.9 < found.ratio_high < 1.0
    assert found.e_value >= 3 / ALPHA
    assert [found.comparisons[name].verdict for name in "abc"] == ["faster", "slower", "undecided"]


def test_the_default_wins_with_its_ratio_to_the_runner_up() -> None:
    found = picked(rounds_of({"default": 1.0, "a": 1.3, "b": 1.1}))
    assert (found.winner, found.runner_up, found.tied) == ("default", "b", ())
    assert found.ratio == pytest.approx(1.0 / 1.1, rel=0.01)
    assert found.ratio_high is not None
    assert found.ratio_high < 1.0
    assert found.e_value >= 2 / ALPHA


def test_an_uncertified_lead_of_a_candidate_is_no_evidence_for_the_default() -> None:
    samples = rounds_of({"default": 1.0, "a": 0.9}, rounds=9)
    found = picked(samples)
    assert (found.winner, found.runner_up, found.tied) == ("default", "a", ("a",))
    assert found.ratio is not None
    assert found.ratio > 1.0
    assert found.e_value == pytest.approx(1.0, abs=0.1)


def test_among_tied_winners_the_smaller_peak_wins_then_the_name() -> None:
    samples = rounds_of({"default": 1.0, "c": 0.9, "d": 0.95})
    samples |= {"a": samples["c"].copy(), "b": samples["c"].copy()}
    assert picked(samples).winner == "a"
    assert picked(samples, c=99).winner == "c"
    found = picked(samples, d=1, default=1)
    assert found.winner == "a"  # d is smaller but certified slower than the best
    assert found.tied == ("b", "c")


def test_among_tied_winners_of_one_peak_the_smaller_median_wins_whatever_its_name() -> None:
    samples = rounds_of({"default": 1.0, "a": 0.9, "b": 0.88})
    samples["b"][::3] *= 1.05  # slow in a third of the rounds: not certified faster than a
    found = picked(samples)
    assert found.winner == "b"
    assert found.tied == ("a",)
    assert picked(samples, a=99).winner == "a"


def test_a_hiccup_in_one_round_does_not_lose_the_pick() -> None:
    samples = rounds_of({"default": 1.0, "a": 0.9, "b": 0.92})
    samples["a"][20] *= 4.0  # its mean log ratio is now worse than b's
    found = picked(samples, b=1)
    assert found.winner == "a"


def test_dropped_rounds_are_left_out_pairwise() -> None:
    samples = rounds_of({"default": 1.0, "a": 0.9, "b": 1.1})
    samples["a"][::4] = math.nan
    samples["default"][1::4] = math.nan
    found = picked(samples)
    assert found.winner == "a"
    assert found.pairs == found.comparisons["a"].pairs == 20
    assert found.comparisons["b"].pairs == 30


def test_a_candidate_whose_rounds_were_all_dropped_is_undecided_and_loses_nothing_for_others() -> None:
    samples = rounds_of({"default": 1.0, "a": 0.9, "b": 0.5})
    samples["b"][:] = math.nan
    found = picked(samples)
    assert (found.winner, found.runner_up, found.tied) == ("a", "default", ("b",))
    assert found.comparisons["b"].reason == "no pairs"


def test_a_default_alone_is_picked_without_a_ratio() -> None:
    found = picked(rounds_of({"default": 1.0}))
    assert (found.winner, found.runner_up, found.ratio, found.ratio_high) == ("default", None, None, None)
    assert (found.pairs, found.e_value) == (0, 1.0)
    assert msgspec.json.decode(msgspec.json.encode(found), type=verdict.Pick) == found


def test_order_of_the_candidates_does_not_matter() -> None:
    samples = rounds_of({"default": 1.0, "c": 0.9, "b": 0.9, "a": 0.95})
    assert picked(dict(reversed(samples.items()))) == picked(samples)


def test_equal_candidates_are_rarely_picked_at_a_generous_alpha() -> None:
    generator = np.random.default_rng(6)
    searches, alpha = 150, 0.05
    wrong = 0
    for _ in range(searches):
        times = 100.0 * np.exp(generator.normal(0.0, 0.01, (6, 20)))
        samples = {f"c{i}": row for i, row in enumerate(times)}
        wrong += verdict.pick("c0", samples, dict.fromkeys(samples, 1), alpha).winner != "c0"
    assert wrong <= stats.binomial_limit(searches, alpha, 0.999)


def test_names_without_samples_or_peaks_are_refused() -> None:
    samples = rounds_of({"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match=r"'default' must be measured.*\['a', 'b'\]"):
        verdict.pick("default", samples, {"a": 1, "b": 1}, ALPHA)
    with pytest.raises(ValueError, match=r"missing: \['b'\]"):
        verdict.pick("a", samples, {"a": 1}, ALPHA)


def test_a_shoot_out_settles_when_the_best_beats_all_or_all_lose_to_the_default() -> None:
    assert verdict.settled("default", rounds_of({"default": 1.0, "a": 0.9, "b": 1.1}), alpha=ALPHA)
    assert verdict.settled("default", rounds_of({"default": 1.0, "a": 1.2, "b": 1.1}), alpha=ALPHA)
    assert verdict.settled("default", rounds_of({"default": 1.0}), alpha=ALPHA)
    assert not verdict.settled("default", rounds_of({"default": 1.0, "a": 0.9}, rounds=10), alpha=ALPHA)


def test_twins_settle_only_once_they_are_the_same_within_the_effect() -> None:
    twins = {"default": 1.0, "a": 0.9, "b": 0.9}
    assert not verdict.settled("default", rounds_of(twins, rounds=16), alpha=ALPHA)
    assert verdict.settled("default", rounds_of(twins, rounds=80), alpha=ALPHA)
    assert not verdict.settled("default", rounds_of(twins, rounds=80), alpha=ALPHA, effect=0.0)
