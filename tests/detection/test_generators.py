from functools import partial

import numpy as np
import pytest
from scipy import stats

from detection import CUSUM, Gaussian, RunLengths, detection_delay, exact_threshold, likelihood_increment
from detection.generators import (
    ChangingStreams,
    abrupt,
    autoregressive,
    easy_hard_losses,
    gamma_losses,
    gaussian,
    gradual,
    lognormal_losses,
    recurring,
    student,
)

EVERY = [gaussian, student, autoregressive, gamma_losses, lognormal_losses, easy_hard_losses]


def rng(seed=0):
    return np.random.default_rng(seed)


def test_streams_know_their_own_change_points():
    nu = np.array([1.0, 40.0, np.nan, 100.0])
    for share in (abrupt(4, 100, nu), gradual(4, 100, nu, length=20), recurring(4, 100, nu, period=7)):
        assert np.array_equal(gaussian(share, rng()).nu, nu, equal_nan=True)
    assert np.isnan(gaussian(abrupt(1, 100, nu=101), rng()).nu).all(), "a change after the end is none"


@pytest.mark.parametrize("draw", [gaussian, student, partial(autoregressive, phi=0.0), gamma_losses, lognormal_losses, easy_hard_losses])
def test_the_law_differs_from_the_change_point_on_and_not_before(draw):
    streams = draw(abrupt(1, 40_000, nu=20_001), rng())
    quiet, changed = streams.values[0, :20_000], streams.values[0, 20_000:]
    assert stats.ks_2samp(quiet[:10_000], quiet[10_000:]).pvalue > 1e-3
    assert stats.ks_2samp(quiet, changed).pvalue < 1e-20


@pytest.mark.parametrize("draw", EVERY)
def test_streams_of_one_seed_are_equal_and_differ_from_unchanged_ones_exactly_where_they_changed(draw):
    share = abrupt(3, 50, nu=[10, 20, np.nan])
    values = draw(share, rng(1)).values
    assert np.array_equal(values, draw(share, rng(1)).values)
    assert np.array_equal(values != draw(np.zeros((3, 50)), rng(1)).values, share > 0)
    assert not np.array_equal(values, draw(share, rng(2)).values)


def test_gaussian_streams_have_the_moments_asked_for():
    streams = gaussian(abrupt(2, 60_000, nu=30_001), rng(), mean=(1.0, -2.0), variance=(4.0, 0.25))
    assert streams.values.shape == (2, 60_000, 2)
    assert streams.values[:, :30_000].mean(axis=(0, 1)) == pytest.approx([0, 0], abs=0.02)
    assert streams.values[:, 30_000:].mean(axis=(0, 1)) == pytest.approx([1, -2], abs=0.04)
    assert streams.values[:, 30_000:].var(axis=(0, 1)) == pytest.approx([4, 0.25], rel=0.03)


def easy_hard_cdf(x):
    return 0.15 * stats.gamma(4, scale=0.6).cdf(x) + 0.85 * stats.gamma(1.5, scale=0.1).cdf(x)


def test_values_are_of_their_named_laws_in_control():
    quiet = abrupt(1, 20_000, nu=np.nan)
    for values, cdf in (
        (student(quiet, rng(), degrees=3.0), stats.t(3).cdf),
        (gamma_losses(quiet, rng(), spread=0.0), stats.gamma(0.7).cdf),
        (lognormal_losses(quiet, rng(), spread=0.0), stats.lognorm(1.0).cdf),
        (easy_hard_losses(quiet, rng(), spread=0.0), easy_hard_cdf),
    ):
        assert stats.kstest(values.values[0], cdf).pvalue > 1e-3


def test_autoregressive_noise_is_stationary_with_the_dependence_asked_for():
    values = autoregressive(abrupt(4000, 60, nu=np.nan), rng(), phi=0.6).values
    assert values.var(axis=0) == pytest.approx(np.ones(60), abs=0.12)
    assert (values[:, 1:] * values[:, :-1]).mean() == pytest.approx(0.6, abs=0.02)
    assert (values[:, 3:] * values[:, :-3]).mean() == pytest.approx(0.6**3, abs=0.02)


@pytest.mark.parametrize("draw", [gamma_losses, lognormal_losses, easy_hard_losses])
def test_losses_are_positive_double_after_the_change_and_have_scales_of_their_own(draw):
    streams = draw(abrupt(400, 2000, nu=1001), rng())
    assert (streams.values > 0).all()
    growth = streams.values[:, 1000:].mean() / streams.values[:, :1000].mean()
    assert growth == pytest.approx(2.0, rel=0.05)
    assert np.log(streams.values[:, :1000].mean(axis=1)).std() == pytest.approx(1.0, abs=0.15)


def test_a_gradual_change_grows_evenly_and_a_recurring_one_goes_and_comes_back():
    drift = gaussian(gradual(20_000, 30, nu=11, length=10), rng(), mean=1.0).values.mean(axis=0)
    assert drift == pytest.approx(np.clip((np.arange(1, 31) - 10) / 10, 0, 1), abs=0.04)
    waves = gaussian(recurring(20_000, 30, nu=11, period=5), rng(), mean=1.0).values.mean(axis=0)
    assert waves == pytest.approx([0] * 10 + [1] * 5 + [0] * 5 + [1] * 5 + [0] * 5, abs=0.04)


def test_a_detector_is_scored_against_the_truth_of_its_streams():
    streams = gaussian(abrupt(500, 300, nu=101), rng(), mean=1.0)
    detector = CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(1.0, 1.0), threshold=8.0)
    state, alarm = detector.init(500), np.full(500, np.nan)
    for tick in range(300):
        state = detector.step(state, streams.values[:, tick])
        alarm[np.isnan(alarm) & detector.alarms(state)] = tick + 1
    found = detection_delay(alarm, streams.nu)
    assert found.missed == 0
    assert found.mean == pytest.approx(16.4, abs=1.0)


@pytest.mark.parametrize(("draw", "arl"), [(gamma_losses, 224), (lognormal_losses, 165), (easy_hard_losses, 170)])
def test_z_scores_of_the_losses_break_the_promise_of_a_thousand_ticks(draw, arl):
    """Standardised by 100 values of each stream, and watched with the threshold of a standard normal law; each stream has a run length of its own."""
    losses = draw(abrupt(1000, 1100, nu=np.nan), rng()).values
    quiet, later = losses[:, :100], losses[:, 100:]
    z = (later - quiet.mean(axis=1, keepdims=True)) / quiet.std(axis=1, ddof=1, keepdims=True)
    increment = likelihood_increment(Gaussian(0.0, 1.0), Gaussian(1.0, 1.0))
    threshold = exact_threshold(increment, [Gaussian(0.0, 1.0)], 1000)
    assert RunLengths.of(increment(z)).average(threshold) == pytest.approx(arl, rel=0.2)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (partial(abrupt, 2, 10, nu=0), "nu must be whole"),
        (partial(abrupt, 2, 10, nu=1.5), "nu must be whole"),
        (partial(abrupt, 2, 10, nu=[1, 2, 3]), "one for each of 2"),
        (partial(abrupt, 0, 10, nu=1), "at least 1"),
        (partial(gradual, 2, 10, nu=1, length=0), "length"),
        (partial(recurring, 2, 10, nu=1, period=0), "period"),
        (partial(gaussian, abrupt(1, 5, nu=2), rng(), variance=0.0), "variances positive"),
        (partial(autoregressive, abrupt(1, 5, nu=2), rng(), phi=1.0), "phi must lie"),
        (partial(student, abrupt(1, 5, nu=2), rng(), degrees=0), "degrees must be positive"),
        (partial(gamma_losses, abrupt(1, 5, nu=2), rng(), factor=0), "factor must be positive"),
        (partial(gamma_losses, abrupt(1, 5, nu=2), rng(), spread=-1), "spread"),
        (partial(easy_hard_losses, abrupt(1, 5, nu=2), rng(), hard=2), "hard must lie"),
        (partial(gaussian, np.full((1, 5), 2.0), rng()), "share must be"),
        (partial(ChangingStreams, np.zeros((2, 4)), np.zeros((2, 5))), "with share"),
    ],
)
def test_what_makes_no_streams_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()
