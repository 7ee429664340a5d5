import numpy as np
import pytest

from detection import FOCuS, Gaussian, ReflectedSum, ScoreCUSUM, Singleton, exact_run_length, run_length_distribution
from detection.rare_events import split_run_length, tilted_run_length

NULL = Gaussian(0.0, 1.0)


class Sampled:
    """A standard normal law that nobody knows to be one."""

    score, laplacian, hyvarinen, sample = NULL.score, NULL.laplacian, NULL.hyvarinen, NULL.sample


def designed(post, arl, clip=None) -> ReflectedSum:
    return ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(post), arl=arl, clip=clip)


@pytest.mark.parametrize("arl", [1e2, 1e4, 1e6, 1e9])
@pytest.mark.parametrize(("post", "clip"), [(Gaussian(1.0, 1.0), None), (Gaussian(1.0, 1.0), 4.0), (Gaussian(0.5, 1.8), 4.0)])
def test_importance_sampling_finds_the_exact_run_length_within_five_percent(post, clip, arl):
    detector = designed(post, arl, clip)
    found = tilted_run_length(detector, NULL, np.random.default_rng(0))
    exact = exact_run_length(detector.increment, NULL, detector.threshold)
    assert found.arl == pytest.approx(exact, rel=0.05 if arl <= 1e6 else 0.1)
    assert abs(found.arl - exact) < 4 * found.standard_error
    assert found.standard_error < 0.03 * exact


def test_a_law_known_by_draws_alone_gives_the_same_run_length():
    detector = designed(Gaussian(1.0, 1.0), 1e6)
    found = tilted_run_length(detector, Sampled(), np.random.default_rng(1), excursions=10_000)
    assert found.arl == pytest.approx(1e6, rel=0.1)
    assert abs(found.arl - 1e6) < 4 * found.standard_error


def test_another_threshold_needs_no_other_detector():
    detector = designed(Gaussian(1.0, 1.0), 1e3)
    found = tilted_run_length(detector, NULL, np.random.default_rng(2), threshold=10.0)
    assert found.arl == pytest.approx(exact_run_length(detector.increment, NULL, 10.0), rel=0.05)


@pytest.mark.slow
def test_splitting_agrees_with_the_exact_chain_at_a_million_ticks():
    detector = designed(Gaussian(1.0, 1.0), 1e6)
    found = split_run_length(detector, NULL, np.random.default_rng(3), particles=2000, horizon=300)
    assert abs(found.arl - 1e6) < 4 * found.standard_error
    assert found.standard_error < 0.1e6


@pytest.mark.slow
def test_splitting_over_a_short_horizon_is_not_fooled_by_the_rise_from_the_start():
    detector, horizon = designed(Gaussian(1.0, 1.0), 1e4), 100
    found = split_run_length(detector, NULL, np.random.default_rng(6), particles=1500, horizon=horizon, repeats=24)
    naive = -horizon / np.log1p(-run_length_distribution(detector.increment, NULL, detector.threshold, horizon)[-1])
    assert naive > 1e4 + 3.5 * found.standard_error, "an alarm rate that counts the rise is visibly too low"
    assert abs(found.arl - 1e4) < 3.5 * found.standard_error


@pytest.mark.parametrize("wrong", [{"horizon": 3}, {"repeats": 1}])
def test_splitting_without_a_spread_or_a_tail_is_refused(wrong):
    with pytest.raises(ValueError, match="horizon must be at least 4 ticks and repeats at least 2"):
        split_run_length(designed(Gaussian(1.0, 1.0), 1e3), NULL, np.random.default_rng(0), **wrong)


@pytest.mark.slow
def test_splitting_serves_a_detector_without_a_tilt():
    focus = FOCuS(threshold=6.0)
    found = split_run_length(focus, NULL, np.random.default_rng(4), particles=400, horizon=200, repeats=6)
    state, rng, alarms, streams, ticks = focus.init(2000), np.random.default_rng(5), 0, 2000, 800
    for _ in range(ticks):
        state = focus.step(state, rng.standard_normal(streams))
        fired = focus.alarms(state)
        alarms += int(fired.sum())
        state = focus.restart(state, fired)
    plain = streams * ticks / alarms
    assert found.arl == pytest.approx(plain, abs=4 * found.standard_error + 0.1 * plain)


def test_a_statistic_that_drifts_up_in_control_is_refused():
    with pytest.raises(ValueError, match="must drift down"):
        tilted_run_length(designed(Gaussian(1.0, 1.0), 1e3), Gaussian(1.0, 1.0), np.random.default_rng(0))
