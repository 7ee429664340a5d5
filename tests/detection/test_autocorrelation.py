import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from detection.autocorrelation import Advice, correlations, discoveries, ljung_box, pooled_autocorrelation, suggest
from detection.residuals import block_means


def autoregressive(rng, streams, values, phi):
    noise = rng.standard_normal((streams, values))
    x = noise.copy()
    for tick in range(1, values):
        x[:, tick] = phi * x[:, tick - 1] + np.sqrt(1 - phi**2) * noise[:, tick]
    return x


def test_correlations_and_ljung_box_are_their_formulas():
    x = np.random.default_rng(0).standard_normal((3, 50)).cumsum(axis=1)
    for row in range(3):
        d = x[row] - x[row].mean()
        r = [sum(d[t] * d[t - k] for t in range(k, 50)) / sum(v * v for v in d) for k in (1, 2, 3, 4)]
        q = 50 * 52 * sum(r[k - 1] ** 2 / (50 - k) for k in (1, 2, 3, 4))
        assert_allclose(correlations(x, 4)[row], r, rtol=1e-10)
        assert_allclose(ljung_box(x, 4)[row], stats.chi2.sf(q, 4), rtol=1e-9)
        assert_allclose(ljung_box(x, 4, fitted=1)[row], stats.chi2.sf(q, 3), rtol=1e-9)


def test_independence_is_rejected_as_often_as_it_should_be():
    p = ljung_box(np.random.default_rng(1).standard_normal((4000, 200)), 5)
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.015)
    assert (p < 0.5).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("phi", [0.0, 0.2, 0.6])
def test_the_pooled_interval_covers_the_truth_about_as_often_as_it_says(phi):
    rng = np.random.default_rng(2)
    intervals = [pooled_autocorrelation(autoregressive(rng, 20, 100, phi)) for _ in range(200)]
    assert np.mean([i.low <= phi <= i.high for i in intervals]) > 0.9
    assert np.mean([i.value for i in intervals]) == pytest.approx(phi, abs=0.012)


def test_missing_values_leave_the_estimate_where_it_was():
    rng = np.random.default_rng(3)
    x = autoregressive(rng, 400, 300, 0.5)
    observed = rng.random(x.shape) < 0.6
    assert pooled_autocorrelation(np.where(observed, x, np.nan), observed).value == pytest.approx(0.5, abs=0.02)


def test_a_constant_stream_has_no_correlation():
    x = np.random.default_rng(4).standard_normal((3, 60))
    x[1] = 2.0
    assert_array_equal(np.isnan(correlations(x, 2)[:, 0]), [False, True, False])
    assert np.isnan(ljung_box(x, 5)[1])
    assert not discoveries(ljung_box(x, 5))[1]


def test_discoveries_are_those_of_the_step_up_procedure():
    p = np.random.default_rng(5).random(50) ** 3
    rejected = discoveries(p, 0.1)
    assert_array_equal(rejected, stats.false_discovery_control(p) <= 0.1)
    assert not discoveries(np.array([0.5, np.nan])).any()
    assert not discoveries(np.array([np.nan])).any()


def test_independent_streams_need_nothing():
    advice = suggest(np.random.default_rng(6).standard_normal((50, 100)))
    assert isinstance(advice, Advice)
    assert advice.action == "none"
    assert "no harmful dependence" in advice.reason


def test_negative_correlation_is_left_alone():
    assert suggest(autoregressive(np.random.default_rng(7), 50, 200, -0.4)).action == "none"


def test_an_autoregressive_fleet_is_given_residuals():
    advice = suggest(autoregressive(np.random.default_rng(8), 60, 300, 0.4))
    assert advice.action == "residuals"
    assert advice.pooled.low > 0.3
    assert advice.flagged > 0.9
    assert advice.left < 0.1


def test_dependence_that_an_autoregression_misses_is_given_blocks_that_remove_it():
    rng = np.random.default_rng(9)
    noise = rng.standard_normal((60, 2008))
    x = sum(noise[:, k : k + 2000] for k in range(8)) / np.sqrt(8)  # a moving average of eight
    advice = suggest(x)
    assert advice.action == "blocks"
    assert advice.block >= 16
    assert f"means of {advice.block}" in advice.reason
    assert pooled_autocorrelation(block_means(x, advice.block)).value < 0.12


def test_streams_too_short_for_blocks_are_told_so():
    rng = np.random.default_rng(10)
    noise = rng.standard_normal((60, 108))
    x = sum(noise[:, k : k + 100] for k in range(8)) / np.sqrt(8)
    assert "block bootstrap" in suggest(x).reason


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: correlations(np.ones((2, 5)), 5), "between 1 and 4"),
        (lambda: ljung_box(np.ones((2, 50)), 5, fitted=5), "between 0 and 4"),
        (lambda: pooled_autocorrelation(np.ones((2, 50))), "not all equal"),
        (lambda: suggest(np.ones((2, 10))), "at least 20 values"),
        (lambda: correlations(np.ones(5), 1), r"\(streams, values\)"),
        (lambda: correlations(np.ones((2, 5)), 1, np.ones((2, 4), dtype=bool)), "shape of x"),
        (lambda: correlations(np.r_[np.ones((1, 5)), np.full((1, 5), np.inf)], 1), "first in stream 1"),
    ],
)
def test_bad_streams_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
