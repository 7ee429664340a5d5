import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import Gaussian, exact_run_length, exact_threshold, likelihood_increment
from detection.page_hinkley import PageHinkley

NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)


def history(detector, x):
    state, statistic, changed = detector.init(len(x)), np.empty_like(x), np.empty(x.shape, np.int64)
    for tick, column in enumerate(x.T):
        state = detector.step(state, column)
        statistic[:, tick], changed[:, tick] = detector.statistic(state), detector.changed_at(state)
    return statistic, changed


@pytest.mark.parametrize("side", ["up", "down", "both"])
@pytest.mark.parametrize("alpha", [1.0, 0.99])
def test_the_statistic_is_the_height_of_the_faded_sum_above_its_lowest_point(side, alpha):
    x = np.random.default_rng(0).standard_normal((10, 60)) + np.linspace(-1, 1, 10)[:, None] * (np.arange(60) > 40)
    statistic, changed = history(PageHinkley(threshold=5.0, side=side, alpha=alpha, delta=0.1, min_instances=1), x)
    for row, stream in enumerate(x):
        deviations = stream - np.cumsum(stream) / np.arange(1, 61)
        for t in range(1, 61):
            fading = alpha ** np.arange(60)
            sums = [[fading[: k + 1][::-1] @ (sign * deviations[: k + 1] - 0.1) for k in range(t)] for sign in (1, -1)]
            heights = [way[-1] - min(way) for way in sums]
            best = {"up": 0, "down": 1, "both": int(heights[1] > heights[0])}[side]
            assert_allclose(statistic[row, t - 1], heights[best], atol=1e-10)
            assert changed[row, t - 1] == np.argmin(sums[best]) + 2


def test_nothing_is_said_before_enough_observations_are_there():
    statistic, _ = history(PageHinkley(threshold=5.0, min_instances=10), np.arange(20.0)[None])
    assert_array_equal(statistic[0, :9], 0.0)
    assert (statistic[0, 9:] > 0.0).all()


def test_the_level_of_a_stream_does_not_matter():
    x = np.random.default_rng(1).standard_normal((5, 100))
    assert_allclose(history(PageHinkley(), x + 100.0)[0], history(PageHinkley(), x)[0], atol=1e-9)


@pytest.mark.parametrize("setting", [{"delta": -0.1}, {"alpha": 0.0}, {"alpha": 1.1}, {"min_instances": 0}, {"side": "left"}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        PageHinkley(**setting)


@pytest.mark.parametrize("side", ["up", "down", "both"])
@pytest.mark.parametrize("setting", [{}, {"threshold": 8.0, "delta": 0.1, "alpha": 0.99, "min_instances": 5}])
def test_alarms_and_restarts_fall_on_the_ticks_of_rivers_own(side, setting):
    drift = pytest.importorskip("river.drift")
    rng = np.random.default_rng(2)
    x = rng.standard_normal((6, 1500)) + 1.5 * (np.arange(1500) // 300 % 2) * rng.choice([-1, 1], (6, 1))
    ours, theirs = PageHinkley(side=side, **setting), [drift.PageHinkley(mode=side, **setting) for _ in range(6)]
    state, alarms = ours.init(6), 0
    for column in x.T:
        for detector, value in zip(theirs, column.tolist(), strict=True):
            detector.update(value)
        state = ours.step(state, column)
        alarmed = ours.alarms(state)
        assert_array_equal(alarmed, [detector.drift_detected for detector in theirs])
        state, alarms = ours.restart(state, alarmed), alarms + int(alarmed.sum())
    assert alarms >= 6


def test_at_its_defaults_it_alarms_every_six_thousand_ticks_of_noise_and_is_slower_than_cusum():
    # 200 standard normal streams whose mean rises by 1 after 1,000 ticks
    detector, rng = PageHinkley(side="up"), np.random.default_rng(3)
    state, false, first = detector.init(200), 0, np.full(200, np.nan)
    for tick in range(1, 1501):
        state = detector.step(state, rng.standard_normal(200) + (tick > 1000))
        alarmed = detector.alarms(state)
        false += int(alarmed.sum()) if tick <= 1000 else 0
        first[alarmed & np.isnan(first) & (tick > 1000)] = tick
        state = detector.restart(state, alarmed)
    assert false == pytest.approx(35, abs=15)
    assert np.isnan(first).mean() <= 0.03  # restarted just before the change, a stream takes the new mean for the normal one
    assert np.nanmean(first - 1000) == pytest.approx(38.2, abs=3.0)
    ratio = likelihood_increment(NULL, SHIFTED)
    at_the_same_run_length = exact_run_length(ratio, SHIFTED, exact_threshold(ratio, [NULL], 5_000.0))
    assert at_the_same_run_length == pytest.approx(13.7, abs=0.1)
