"""Statistics over seeds: worked numbers, invariances, and coverage and power on synthetic scores with known truth."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from polopt.evidence.compare.statistics import (
    area,
    at_level,
    band,
    difference,
    estimate,
    holm,
    improvement,
    interval,
    iqm,
    power,
    reached,
    seeds_needed,
)

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
SCORES: dict[str, Draw] = {
    "normal": lambda g, shape: g.standard_normal(shape),
    "heavy tails": lambda g, shape: g.standard_t(3, shape),
    "lognormal": lambda g, shape: np.exp(g.standard_normal(shape)),
    "near a ceiling": lambda g, shape: g.beta(8, 1, shape),
}
TRUTH = {"normal": 0.0, "heavy tails": 0.0}


def truth(name: str) -> float:
    """Mean of the quantiles between 25 and 75 %."""
    if name in TRUTH:
        return TRUTH[name]
    inverse = scipy.stats.lognorm(1.0).ppf if name == "lognormal" else scipy.stats.beta(8, 1).ppf
    return 2 * float(scipy.integrate.quad(inverse, 0.25, 0.75)[0])


finite = st.floats(-1e3, 1e3, allow_nan=False)
rows = hnp.arrays(np.float64, st.integers(2, 12), elements=finite.map(lambda x: round(x, 3)))


def test_iqm_drops_a_quarter_on_either_side_rounded_down() -> None:
    assert iqm(np.array([9.0, 1, 2, 3, 100])) == pytest.approx((2 + 3 + 9) / 3)
    assert iqm(np.array([0.0, 1, 2, 3, 4, 5, 6, 700])) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert iqm(np.array([1.0, 2, 30])) == pytest.approx(11)
    np.testing.assert_allclose(iqm(np.array([[1.0, 2, 3, 4], [0, 0, 8, 8]])), [2.5, 4])


def test_interval_of_few_seeds_is_the_bootstraps_standard_error_times_t() -> None:
    x = np.array([0.31, 0.35, 0.5, 0.42, 0.44])
    rng = np.random.default_rng(0)
    drawn = np.sort(x[rng.integers(0, 5, (200_000, 5))], 1)[:, 1:4].mean(1)
    half = scipy.stats.t.ppf(0.975, 4) * drawn.std()
    e = estimate(x)
    assert e.value == pytest.approx((0.35 + 0.42 + 0.44) / 3)
    assert e.low == pytest.approx(e.value - half, abs=0.06 * half)
    assert e.high == pytest.approx(e.value + half, abs=0.06 * half)


def test_interval_of_two_and_three_seeds_is_students() -> None:
    for x in (np.array([1.0, 2.0]), np.array([0.0, 1.0, 5.0])):
        mean, error = x.mean(), x.std(ddof=1) / math.sqrt(x.size)
        bounds = scipy.stats.t.interval(0.95, x.size - 1, mean, error)
        low, high = interval(x[None, :, None], draws=40_000)
        assert (low[0], high[0]) == pytest.approx(bounds, rel=0.03)


def test_interval_of_many_seeds_is_made_of_expanded_percentiles() -> None:
    x = np.random.default_rng(3).gamma(2, 1, 12)
    drawn = scipy.stats.trim_mean(x[np.random.default_rng(4).integers(0, 12, (200_000, 12))], 0.25, axis=1)
    tail = scipy.stats.norm.cdf(scipy.stats.t.ppf(0.025, 11))
    low, high = interval(x[None, :, None], draws=40_000)
    assert tail < 0.025
    assert (low[0], high[0]) == pytest.approx(np.quantile(drawn, [tail, 1 - tail]), rel=0.02)


def test_strata_are_resampled_by_themselves() -> None:
    """Tasks on different scales: what lies between tasks is not uncertain, only what lies between seeds."""
    seeds = np.random.default_rng(0).standard_normal((3, 10))
    apart = estimate(seeds + np.array([[0.0], [100], [200]]))
    together = estimate((seeds + np.array([[0.0], [100], [200]])).reshape(-1))
    assert apart.low is not None
    assert apart.high is not None
    assert together.low is not None
    assert together.high is not None
    assert apart.value == together.value
    assert apart.high - apart.low < 0.2 * (together.high - together.low)


def test_one_seed_has_no_interval() -> None:
    e = estimate(np.array([0.3]))
    assert (e.value, e.low, e.high, e.n) == (0.3, None, None, 1)
    assert estimate(np.array([[0.3], [0.5]])).low is None
    d = difference(np.array([0.3]), np.array([0.1]))
    assert (d.low, d.high, d.p) == (None, None, None)
    with pytest.raises(ValueError, match="at least 2"):
        interval(np.zeros((1, 1, 1)))


def test_equal_scores_have_an_interval_without_width() -> None:
    e = estimate(np.full(5, 0.1) + 0.2)
    assert e.constant
    assert e.low == e.high == e.value
    d = difference(np.full(5, 0.7), np.full(5, 0.7))
    assert d.constant
    assert (d.value, d.low, d.high, d.p) == (0, 0, 0, 1)
    sure = difference(np.array([0.1, 0.2, 0.3]) + 0.4, np.array([0.1, 0.2, 0.3]))
    assert sure.constant
    assert sure.p == 0
    assert difference(np.array([0.3, 0.5]), np.array([0.1, 0.3])).p is None  # two are too few to tell
    middle, low, high = band(np.full((4, 3), 0.25))
    np.testing.assert_array_equal(middle, low)
    np.testing.assert_array_equal(middle, high)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    x = np.array([0.1, bad, 0.3])
    for call in (lambda: estimate(x), lambda: difference(x, x), lambda: improvement(x, x)):
        with pytest.raises(ValueError, match="finite"):
            call()
    with pytest.raises(ValueError, match="paired"):
        difference(np.zeros(3), np.zeros(4))


def test_difference_is_scipys_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    for n in (2, 3, 5, 9):
        a, b = rng.standard_normal((2, n))
        test = scipy.stats.ttest_rel(a, b)
        e = difference(a, b)
        bounds = test.confidence_interval(0.95)
        assert (e.value, e.low, e.high, e.p) == pytest.approx((np.mean(a - b), bounds.low, bounds.high, test.pvalue), rel=1e-9)
        wide, bounds = at_level(e, 0.99), test.confidence_interval(0.99)
        assert (wide.low, wide.high, wide.level) == pytest.approx((bounds.low, bounds.high, 0.99), rel=1e-9)


def test_improvement_counts_wins_and_half_ties_on_the_same_seed() -> None:
    a, b = np.array([1.0, 2, 3, 4, 5]), np.array([0.0, 2, 4, 3, 4])
    e = improvement(a, b)  # win, tie, loss, win, win
    assert e.value == pytest.approx(0.7)
    assert e.low == pytest.approx(scipy.stats.beta.ppf(0.025, 3, 3))  # three wins
    assert e.high == pytest.approx(scipy.stats.beta.ppf(0.975, 5, 1))  # four wins
    assert improvement(a, b, higher_is_better=False).value == pytest.approx(0.3)
    unpaired = np.mean([(x > y) + (x == y) / 2 for x in a for y in b])
    assert e.value != pytest.approx(unpaired)


def test_area_is_the_mean_of_the_curve_over_the_budget() -> None:
    assert area(np.array([0.0, 1, 2]), np.array([0.0, 1, 1]), 0, 2) == pytest.approx(0.75)
    assert area(np.array([0.0, 4]), np.array([0.0, 4]), 0, 2) == pytest.approx(1)  # what lies beyond the budget is cut
    assert area(np.array([1.0, 2]), np.array([3.0, 5]), 0, 3) == pytest.approx((3 + 4 + 5) / 3)  # level at both ends
    assert area(np.array([5.0]), np.array([0.4]), 5, 5) == 0.4
    coarse, fine = np.linspace(0, 1, 5), np.linspace(0, 1, 101)
    assert area(coarse, 2 * coarse, 0, 1) == pytest.approx(area(fine, 2 * fine, 0, 1))


def test_where_a_curve_meets_the_target() -> None:
    x, y = np.array([0.0, 10, 20, 30]), np.array([0.0, 0.4, 0.8, 0.5])
    assert reached(x, y, 0.6) == pytest.approx(15)
    assert reached(x, y, 0.0) == 0
    assert reached(x, y, 0.9) == math.inf
    assert reached(x, -y, -0.6, higher_is_better=False) == pytest.approx(15)


def test_holm_on_a_worked_example() -> None:
    adjusted, level = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(1 - level, [0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])
    adjusted, level = holm(np.array([0.04]))
    assert (adjusted[0], level[0]) == pytest.approx((0.04, 0.95))
    assert holm(np.array([]))[0].size == 0


@settings(deadline=None)
@given(p=hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1)))
def test_holm_decides_as_the_levels_say(p: np.ndarray) -> None:
    adjusted, level = holm(p)
    clear = np.abs(adjusted - 0.05) > 1e-9
    np.testing.assert_array_equal((adjusted <= 0.05)[clear], (p <= 1 - level)[clear])
    assert (adjusted >= p).all()


@settings(max_examples=60, deadline=None)
@given(x=rows, shift=finite, scale=st.floats(0.01, 100))
def test_estimates_shift_and_scale_with_the_scores(x: np.ndarray, shift: float, scale: float) -> None:
    e, moved = estimate(x), estimate(scale * x + shift)
    if e.constant or moved.constant:  # rounding may swallow a spread beside a large shift
        return
    tolerance = 1e-9 * (abs(shift) + scale * np.abs(x).max())
    assert e.low is not None
    assert e.high is not None
    expected = [scale * v + shift for v in (e.value, e.low, e.high)]
    assert [moved.value, moved.low, moved.high] == pytest.approx(expected, rel=1e-9, abs=tolerance)
    assert e.low <= e.value + tolerance
    assert e.high >= e.value - tolerance


@settings(max_examples=60, deadline=None)
@given(x=rows, order=st.randoms(use_true_random=False))
def test_neither_the_order_of_seeds_nor_repetition_changes_an_interval(x: np.ndarray, order: np.random.Generator) -> None:
    shuffled = list(x)
    order.shuffle(shuffled)
    assert estimate(np.array(shuffled)) == estimate(x) == estimate(x)


@settings(max_examples=60, deadline=None)
@given(x=rows)
def test_scores_of_opposite_sign_have_the_opposite_interval(x: np.ndarray) -> None:
    e, negative = estimate(x), estimate(-x)
    assert negative.value == pytest.approx(-e.value, abs=1e-9)
    assert e.low is not None
    assert e.high is not None
    assert (negative.low, negative.high) == pytest.approx((-e.high, -e.low), abs=1e-9 * (1 + np.abs(x).max()))
    a, b = difference(x, np.roll(x, 1)), difference(np.roll(x, 1), x)
    assert a.value == -b.value
    assert a.p == b.p


def test_a_band_is_the_interval_at_every_point() -> None:
    curves = np.random.default_rng(0).standard_normal((6, 7)).cumsum(1)
    middle, low, high = band(curves)
    assert low is not None
    assert high is not None
    for p in range(7):
        e = estimate(curves[:, p])
        assert (middle[p], low[p], high[p]) == pytest.approx((e.value, e.low, e.high))
    assert band(curves[:1])[1] is None


REPETITIONS = 4000


def covered(bounds: tuple[np.ndarray, np.ndarray], value: float) -> float:
    return float(np.mean((bounds[0] <= value) & (value <= bounds[1])))


def percentile(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The usual percentile bootstrap of the IQM: what the library does not do."""
    n = len(scores)
    index = np.random.default_rng(1).integers(0, n, (600, n))
    drawn = np.sort(scores[index], 1)[:, n // 4 : n - n // 4].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return low, high


def least(nominal: float) -> float:
    """Smallest share that is within sampling error (three standard errors) of a coverage."""
    return nominal - 3 * math.sqrt(nominal * (1 - nominal) / REPETITIONS)


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("name", SCORES)
def test_intervals_cover_at_95_percent(name: str, n: int) -> None:
    scores = SCORES[name](np.random.default_rng(7), (n, REPETITIONS))
    share = covered(interval(scores[None], draws=1000), truth(name))
    skewed = n == 5 and name not in TRUTH
    assert least(0.94 if skewed else 0.95) <= share <= 0.985


def test_the_percentile_bootstrap_would_not_cover() -> None:
    """Negative control: the test above tells a narrow interval from one that covers."""
    for name in SCORES:
        scores = SCORES[name](np.random.default_rng(7), (5, REPETITIONS))
        assert covered(percentile(scores), truth(name)) < least(0.94)


def test_intervals_over_strata_cover() -> None:
    """Three tasks with five seeds each: seeds are resampled within tasks."""
    scores = np.random.default_rng(2).standard_normal((3, 5, 1000))
    share = covered(interval(scores, draws=600), 0.0)
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 1000) <= share <= 0.985


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("name", SCORES)
def test_differences_of_equal_contestants_cover_zero(name: str, n: int) -> None:
    a, b = SCORES[name](np.random.default_rng(11), (2, REPETITIONS, n))
    found = [difference(x, y) for x, y in zip(a, b, strict=True)]
    share = covered((np.array([e.low for e in found]), np.array([e.high for e in found])), 0.0)
    assert least(0.95) <= share <= 0.99


def test_improvement_covers_at_least_at_95_percent_also_with_ties() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 3, (2, REPETITIONS, 8)).astype(float)
    a = a + 1.0 * (rng.random(a.shape) < 0.3)
    real = float(np.mean((a > b) + (a == b) / 2))
    found = [improvement(x, y) for x, y in zip(a, b, strict=True)]
    assert covered((np.array([e.low for e in found]), np.array([e.high for e in found])), real) >= 0.95


def test_family_of_equal_contestants_is_rarely_decided() -> None:
    """Four contestants, six pairs: at least one wrong decision in at most 5 % of comparisons; many more without the correction."""
    rng, corrected, naive, times = np.random.default_rng(13), 0, 0, 1500
    for _ in range(times):
        scores = rng.standard_t(4, (4, 5))
        p = np.array([difference(scores[i], scores[j]).p for i in range(4) for j in range(i)], dtype=np.float64)
        corrected += bool((holm(p)[0] <= 0.05).any())
        naive += bool((p <= 0.05).any())
    assert corrected / times <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / times)
    assert naive / times > 0.1


@pytest.mark.parametrize(("effect", "level"), [(1.0, 0.95), (0.6, 0.95), (1.5, 0.99), (0.5, 0.99)])
def test_seeds_needed_give_the_power_that_was_asked_for(effect: float, level: float) -> None:
    n = int(seeds_needed(np.array([effect]), np.array([level]))[0])
    gaps = np.random.default_rng(n).standard_normal((20_000, n)) + effect
    p = scipy.stats.ttest_1samp(gaps, 0, axis=1).pvalue
    assert np.mean(p <= 1 - level) == pytest.approx(0.8, abs=0.06) or n < 6
    assert np.mean(p <= 1 - level) >= 0.8 - 0.01
    fewer = scipy.stats.ttest_1samp(gaps[:, : n - 1], 0, axis=1).pvalue
    assert np.mean(fewer <= 1 - level) <= 0.8 + 0.01


def test_seeds_needed_from_the_tables() -> None:
    """A paired t-test needs 34 pairs for an effect of 0.5 and 199 for 0.2 (Cohen; G*Power)."""
    found = seeds_needed(np.array([0.5, 0.2, 1e-5, 1e9]), np.full(4, 0.95))
    assert found.tolist() == [34, 199, 10_001, 2]
    assert power(np.array([0.5]), np.array([34.0]), np.array([0.95]))[0] == pytest.approx(0.8078, abs=1e-3)


# -------------------------------------------------------------------- SciPy's distributions without scipy.stats
def test_numbers_are_those_of_scipy_stats() -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 3, 4, 5, 8, 13):
        x = rng.standard_normal((50, n))
        assert (iqm(x) == scipy.stats.trim_mean(x, 0.25, axis=-1)).all()
        exact = scipy.stats.binomtest(n // 2, n).proportion_ci(0.95, "exact")
        half = improvement(np.arange(n) < n // 2, np.full(n, 0.5))
        assert (half.low, half.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    for n, effect, level in ((2.0, 3.0, 0.95), (5.0, 1.2, 0.99), (30.0, 0.5, 0.995), (10_000.0, 0.03, 0.95)):
        at = scipy.stats.t.isf((1 - level) / 2, n - 1)
        expected = scipy.stats.nct.sf(at, n - 1, effect * np.sqrt(n))
        assert power(np.array([effect]), np.array([n]), np.array([level])) == pytest.approx([expected], abs=1e-12)


def test_a_comparison_loads_no_more_of_scipy_than_it_needs() -> None:
    words = "import sys; import polopt.evidence.compare.analysis as a, polopt.evidence.compare.page; "
    words += "from polopt.evidence.compare.statistics import estimate, difference, power; import numpy as np; "
    words += "estimate(np.arange(9.0)), difference(np.arange(5.0), np.arange(5.0) ** 2); "
    words += "print([m for m in ('scipy.stats', 'scipy.integrate', 'scipy.optimize') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
