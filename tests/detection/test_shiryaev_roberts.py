from math import exp, log

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import CUSUM, Gaussian, Singleton, likelihood_increment, score_increment
from detection.shiryaev_roberts import ShiryaevRoberts, shiryaev_run_length
from detection.states import take
from detection.uncertainty import GaussianBox

NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
RATIO = likelihood_increment(NULL, SHIFTED)


def run_lengths(detector, rng, streams, mean=0.0):
    """Observations until the alarm of each of ``streams`` streams."""
    state, ticks, watched, tick = detector.init(streams), np.zeros(streams), np.arange(streams), 0
    while len(watched):
        tick += 1
        state = detector.step(state, mean + rng.standard_normal(len(watched)))
        alarmed = detector.alarms(state)
        if alarmed.any():
            ticks[watched[alarmed]] = tick
            watched, state = watched[~alarmed], take(state, ~alarmed)
    return ticks


@pytest.mark.parametrize("head_start", [0.0, 5.0])
def test_the_statistic_is_the_sum_over_all_starts_of_products_of_likelihood_ratios(head_start):
    x = np.random.default_rng(0).standard_normal((20, 60)) + np.where(np.arange(60) < 30, 0.0, 1.0)
    detector = ShiryaevRoberts(increment=RATIO, threshold=100.0, head_start=head_start)
    state = detector.init(20)
    for t, column in enumerate(x.T, start=1):
        state = detector.step(state, column)
        ratios = np.exp(x[:, :t] - 0.5)
        expected = sum(ratios[:, k:].prod(axis=1) for k in range(t)) + head_start * ratios.prod(axis=1)
        assert_allclose(detector.statistic(state), np.log(expected), rtol=1e-9, atol=1e-12)


def test_the_change_is_placed_where_cusum_places_it():
    x = np.random.default_rng(1).standard_normal((50, 80)) + np.where(np.arange(80) < 60, 0.0, 1.0)
    detector, cusum = ShiryaevRoberts(increment=RATIO, threshold=100.0), CUSUM(pre=NULL, post=SHIFTED, threshold=100.0)
    state, other = detector.init(50), cusum.init(50)
    for column in x.T:
        state, other = detector.step(state, column), cusum.step(other, column)
        assert_array_equal(detector.changed_at(state), cusum.changed_at(other))
        best = cusum.statistic(other)
        assert (detector.statistic(state) >= best - 1e-12)[best > 0].all()  # the sum over starts is more than its largest term


def test_evidence_of_ten_thousand_ticks_does_not_overflow():
    detector = ShiryaevRoberts(increment=RATIO, threshold=7.0)
    state = detector.init(2)
    for _ in range(1000):
        state = detector.step(state, [30.0, -30.0])
    assert_allclose(detector.statistic(state), [29_500.0, -30.5], rtol=1e-12)


def test_in_control_the_statistic_less_the_clock_has_mean_zero():
    rng, detector = np.random.default_rng(2), ShiryaevRoberts(increment=likelihood_increment(NULL, Gaussian(0.2, 1.0)), threshold=50.0)
    state = detector.init(200_000)
    for _ in range(20):
        state = detector.step(state, rng.standard_normal(200_000))
    evidence = np.exp(detector.statistic(state))
    assert evidence.mean() == pytest.approx(20.0, abs=4 * evidence.std() / np.sqrt(200_000))


@pytest.mark.parametrize(("clip", "head_start"), [(None, 0.0), (None, 20.0), (1.5, 0.0)])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_run_length_of_the_chain_is_that_of_simulated_streams(clip, head_start, mean):
    detector = ShiryaevRoberts(increment=likelihood_increment(NULL, SHIFTED, clip), threshold=log(100.0), head_start=head_start)
    ticks = run_lengths(detector, np.random.default_rng(3), 3_000, mean)
    exact = shiryaev_run_length(detector.increment, Gaussian(mean, 1.0), log(100.0), head_start=head_start)
    assert exact == pytest.approx(ticks.mean(), abs=4 * ticks.std() / np.sqrt(len(ticks)))


@pytest.mark.parametrize(("curved", "law"), [(Gaussian(0.0, 2.0), NULL), (Gaussian(0.0, 0.5), NULL)])
def test_the_chain_knows_a_change_of_variance(curved, law):
    increment = likelihood_increment(law, curved)
    detector = ShiryaevRoberts(increment=increment, threshold=log(60.0))
    ticks = run_lengths(detector, np.random.default_rng(4), 3_000)
    assert shiryaev_run_length(increment, law, log(60.0)) == pytest.approx(ticks.mean(), abs=4 * ticks.std() / np.sqrt(len(ticks)))


@pytest.mark.parametrize("states", [200, 400])
def test_the_number_of_states_hardly_matters(states):
    assert shiryaev_run_length(RATIO, NULL, 7.0, states=states) == pytest.approx(
        shiryaev_run_length(RATIO, NULL, 7.0, states=1000), rel=1e-3
    )


def test_without_overshoot_the_run_length_is_the_threshold():
    # tiny steps: R_t - t is a martingale, so E T = E R_T, which exceeds exp(threshold) by the overshoot alone
    small = likelihood_increment(NULL, Gaussian(0.02, 1.0))
    assert shiryaev_run_length(small, NULL, log(200.0)) == pytest.approx(200.0 * exp(0.583 * 0.02), rel=2e-3)


@pytest.mark.parametrize("post", [Gaussian(1.0, 1.0), Gaussian(0.5, 1.0), Gaussian(0.0, 2.0)])
@pytest.mark.parametrize("threshold", [log(10.0), log(1000.0)])
def test_the_run_length_in_control_is_never_below_the_exponential_of_the_threshold(post, threshold):
    assert shiryaev_run_length(likelihood_increment(NULL, post), NULL, threshold) >= 0.999 * exp(threshold)


@pytest.mark.parametrize("clip", [None, 4.0])
@pytest.mark.parametrize("head_start", [0.0, 50.0])
def test_a_fitted_detector_has_the_run_length_asked_for(clip, head_start):
    fitted = ShiryaevRoberts.fit(pre=Singleton(NULL), post=Singleton(SHIFTED), arl=1000.0, clip=clip, head_start=head_start)
    assert shiryaev_run_length(fitted.increment, NULL, fitted.threshold, head_start=head_start) == pytest.approx(1000.0, rel=1e-4)
    floor = ShiryaevRoberts.fit(pre=Singleton(NULL), post=Singleton(SHIFTED), arl=1000.0, clip=clip, head_start=head_start, method="floor")
    assert floor.threshold == log(1000.0 + head_start) > fitted.threshold
    assert shiryaev_run_length(floor.increment, NULL, floor.threshold, head_start=head_start) > 1000.0


def test_a_fitted_detector_looks_at_the_centres_of_the_sets_and_scales_scores():
    pre, post = GaussianBox(mean=(-0.2, 0.2), variance=(2.0, 2.0)), GaussianBox(mean=(0.8, 1.2), variance=(2.0, 2.0))
    fitted = ShiryaevRoberts.fit(pre=pre, post=post, arl=100.0, clip=None)
    x = np.linspace(-3.0, 3.0, 7)
    assert_allclose(fitted.increment(x), likelihood_increment(Gaussian(0.0, 2.0), Gaussian(1.0, 2.0))(x), rtol=1e-9)


def test_an_infinite_observation_is_the_clip_and_refused_without():
    clipped = ShiryaevRoberts(increment=score_increment(NULL, SHIFTED, 4.0), threshold=7.0)
    assert clipped.statistic(clipped.step(clipped.init(1), [np.inf])) == clipped.statistic(clipped.step(clipped.init(1), [4.0]))
    plain = ShiryaevRoberts(increment=RATIO, threshold=7.0)
    with pytest.raises(ValueError, match="first is stream 1"):
        plain.step(plain.init(2), [0.0, np.inf])


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"arl": 1.0}, "arl"), ({"method": "guess"}, "method"), ({"head_start": -1.0}, "head_start"), ({"post": Singleton(NULL)}, "drift")],
)
def test_impossible_designs_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        ShiryaevRoberts.fit(**{"pre": Singleton(NULL), "post": Singleton(SHIFTED)} | setting)


def test_a_head_start_at_the_threshold_is_refused():
    with pytest.raises(ValueError, match="head_start"):
        ShiryaevRoberts(increment=RATIO, threshold=1.0, head_start=3.0)
