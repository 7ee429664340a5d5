import numpy as np
import pytest

from detection import Gaussian, exact_run_length, exact_threshold, likelihood_increment, score_increment
from detection.increment import Quadratic

NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
REFERENCE = likelihood_increment(NULL, SHIFTED)  # z = x - 0.5: the textbook's CUSUM with k = 0.5


def simulated_run_length(increment, law, threshold, streams=2000, seed=0):
    """Mean ticks to the first alarm of `streams` paths, each watched to its end."""
    rng = np.random.default_rng(seed)
    statistic, lengths = np.zeros(streams), []
    tick = 0
    while len(statistic):
        tick += 1
        statistic = np.maximum(statistic + increment(law.sample(rng, len(statistic))), 0.0)
        lengths += [tick] * int((statistic >= threshold).sum())
        statistic = statistic[statistic < threshold]
    return np.mean(lengths), np.std(lengths) / np.sqrt(streams)


@pytest.mark.parametrize(("law", "h", "run_length"), [(NULL, 4, 335.4), (NULL, 5, 930.9), (SHIFTED, 4, 8.38), (SHIFTED, 5, 10.4)])
def test_the_chain_reproduces_the_textbook_table_of_cusum(law, h, run_length):
    assert exact_run_length(REFERENCE, law, h) == pytest.approx(run_length, rel=0.003 if run_length == 10.4 else 0.001)


@pytest.mark.parametrize("h", [4.0, 5.0])
def test_the_chain_is_close_to_siegmunds_approximation(h):
    d, b = -0.5, h + 1.166
    assert exact_run_length(REFERENCE, NULL, h) == pytest.approx((np.exp(-2 * d * b) - 1 + 2 * d * b) / (2 * d * d), rel=0.01)


@pytest.mark.parametrize("clip", [1.5, 2.0, 4.0])
@pytest.mark.parametrize(("pre", "post"), [(NULL, SHIFTED), (NULL, Gaussian(0.3, 2.0)), (Gaussian(0.2, 1.5), Gaussian(0.8, 0.9))])
def test_run_lengths_of_clipped_increments_agree_with_simulation(pre, post, clip):
    increment = score_increment(pre, post, clip)
    for law, threshold in ((pre, 1.7), (post, 1.7)):
        mean, error = simulated_run_length(increment, law, threshold)
        assert exact_run_length(increment, law, threshold) == pytest.approx(mean, abs=4 * error + 0.005 * mean)


def test_the_distribution_of_an_increment_agrees_with_samples():
    law = Gaussian(0.2, 1.3)
    x = law.sample(np.random.default_rng(0), 200_000)
    for a, b in ((0.0, 0.7), (0.0, -0.7), (0.4, 0.1), (-0.4, 0.5), (1e-9, 1.0), (0.0, 0.0)):
        increment = Quadratic(curvature=a, slope=b, offset=-0.1, clip=1.5)
        values, masses = increment.atoms(law)
        for t in (-0.6, -0.12, 0.2, 0.9):
            exact = increment.cumulative(law, np.array([t]))[0] + masses[values <= t].sum()
            assert exact == pytest.approx((increment(x) <= t).mean(), abs=0.005)


def test_the_run_length_of_a_linear_vector_statistic_is_that_of_its_projection():
    pre, post = Gaussian((0.0, 0.0), 1.0), Gaussian((0.6, 0.8), 1.0)
    assert exact_run_length(score_increment(pre, post), pre, 4.0) == pytest.approx(exact_run_length(REFERENCE, NULL, 4.0), rel=1e-9)


@pytest.mark.parametrize("arl", [2.0, 100.0, 1e4, 1e8])
def test_the_exact_threshold_gives_the_run_length_asked_for(arl):
    threshold = exact_threshold(REFERENCE, [NULL], arl)
    assert threshold <= np.log(arl)
    assert exact_run_length(REFERENCE, NULL, threshold) == pytest.approx(
        max(arl, exact_run_length(REFERENCE, NULL, 1e-3 * np.log(arl))), rel=1e-5
    )


def test_the_exact_threshold_serves_the_worst_of_several_laws():
    laws = [Gaussian(m, v) for m in (-0.2, 0.2) for v in (0.8, 1.25)]
    increment = score_increment(Gaussian(0.2, 1.25), Gaussian(0.8, 1.25)).scaled(1.25)
    threshold = exact_threshold(increment, laws, 1000)
    assert min(exact_run_length(increment, law, threshold) for law in laws) == pytest.approx(1000, rel=1e-5)


def test_promises_beyond_the_chain_fall_back_to_the_floor_with_a_warning():
    with pytest.warns(RuntimeWarning, match="safe threshold"):
        assert exact_threshold(REFERENCE, [NULL], 1e13) == pytest.approx(np.log(1e13))


def test_a_promise_below_two_ticks_is_refused():
    with pytest.raises(ValueError, match="arl must be at least 2"):
        exact_threshold(REFERENCE, [NULL], 1.5)


def test_unknown_distributions_are_refused():
    increment = score_increment(Gaussian((0.0, 0.0), 1.0), Gaussian((0.0, 0.0), 2.0))
    with pytest.raises(ValueError, match="method='simulate'"):
        exact_run_length(increment, Gaussian((0.0, 0.0), 1.0), 3.0)
