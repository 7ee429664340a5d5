import numpy as np
import pytest

from detection import FOCuS, Gaussian, ReflectedSum, ScoreCUSUM, Singleton, exact_run_length
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
