import numpy as np
import pytest
from scipy import stats

from detection import (
    Gaussian,
    ScoreCUSUM,
    Singleton,
    exact_run_length,
    exact_threshold,
    exact_threshold_for_probability,
    late_delay,
    likelihood_increment,
    run_length_distribution,
    score_increment,
    siegmund_run_length,
)
from detection.increment import Quadratic
from detection.run_length import _chain

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


def excursions(height, mean, nodes=120):
    """Run length of z ~ N(mean, 1) as excursion length over the chance to get up, both by Nystrom's method on Gauss-Legendre nodes."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    x, w = 0.5 * height * (x + 1), 0.5 * height * w
    kernel = stats.norm.pdf(x[None, :] - x[:, None] - mean) * w
    ticks, up = np.linalg.solve(np.eye(nodes) - kernel, np.stack([np.ones(nodes), stats.norm.sf(height - x - mean)], axis=1)).T
    first = stats.norm.pdf(x - mean) * w
    return (1 + first @ ticks) / (stats.norm.sf(height - mean) + first @ up)


@pytest.mark.parametrize(
    ("law", "h", "measured"), [(NULL, 4.0, 335.36), (NULL, 5.0, 930.84), (SHIFTED, 4.0, 8.383), (SHIFTED, 5.0, 10.376)]
)
def test_the_chain_agrees_with_an_integral_equation_to_a_hundredth_of_a_percent(law, h, measured):
    found = exact_run_length(REFERENCE, law, h)
    assert found == pytest.approx(excursions(h, law.mean - 0.5), rel=1e-4)
    assert found == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize(("arl", "tolerance"), [(1e4, 2e-4), (1e6, 1e-3), (1e9, 4e-3), (9e11, 1e-2)])
def test_long_run_lengths_are_safe_and_close_to_those_of_the_integral_equation(arl, tolerance):
    true = excursions(exact_threshold(REFERENCE, [NULL], arl), -0.5)
    assert arl <= true <= arl * (1 + tolerance)


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


@pytest.mark.parametrize(("law", "threshold"), [(NULL, 3.0), (SHIFTED, 5.0)])
def test_the_distribution_of_the_run_length_has_the_mean_of_the_chain_and_the_steps_of_simulation(law, threshold):
    share = run_length_distribution(REFERENCE, law, threshold, 4_000)
    assert (np.diff(share) >= -1e-12).all()
    assert 1 + (1 - share).sum() == pytest.approx(exact_run_length(REFERENCE, law, threshold), rel=1e-3)
    rng, statistic, ended = np.random.default_rng(0), np.zeros(20_000), np.zeros(20_000, bool)
    for t in range(60):
        statistic = np.maximum(statistic + REFERENCE(law.sample(rng, 20_000)), 0.0)
        ended |= statistic >= threshold
        assert ended.mean() == pytest.approx(share[t], abs=4 * np.sqrt(0.25 / 20_000))


def test_a_settled_chain_gives_the_same_distribution_as_one_stepped_to_the_end():
    chain = _chain(REFERENCE, NULL, 4.0, 400)
    place, quiet = np.eye(1, 400)[0], []
    for _ in range(3_000):
        place = place @ chain
        quiet.append(place.sum())
    share = run_length_distribution(REFERENCE, NULL, 4.0, 3_000)
    np.testing.assert_allclose(share, 1 - np.array(quiet), rtol=1e-7, atol=1e-12)


def test_probabilities_too_small_for_a_difference_from_one_keep_their_digits():
    share = run_length_distribution(REFERENCE, NULL, 27.0, 2_000)
    rates = np.diff(share)[500:]
    assert 0 < share[-1] < 1e-8
    assert 1 / rates.mean() == pytest.approx(siegmund_run_length(REFERENCE, NULL, 27.0), rel=0.02)


def test_an_alarm_at_every_tick_is_certain_from_the_first():
    certain = Quadratic(curvature=0.0, slope=0.0, offset=2.0)
    np.testing.assert_array_equal(run_length_distribution(certain, NULL, 1.0, 5), np.ones(5))


def test_a_threshold_for_a_probability_over_a_long_horizon_takes_few_steps():
    threshold = exact_threshold_for_probability(REFERENCE, [NULL], 0.01, 1_000_000)
    assert run_length_distribution(REFERENCE, NULL, threshold, 1_000_000)[-1] == pytest.approx(0.01, rel=1e-5)
    assert 1e6 / -np.log(0.99) == pytest.approx(exact_run_length(REFERENCE, NULL, threshold), rel=1e-4)


def test_a_threshold_for_a_probability_gives_that_probability_under_the_worst_law():
    laws = (NULL, Gaussian(0.1, 1.0))
    increment = score_increment(NULL, SHIFTED).scaled(0.8)
    threshold = exact_threshold_for_probability(increment, laws, 0.05, 500)
    shares = [run_length_distribution(increment, law, threshold, 500)[-1] for law in laws]
    assert max(shares) == pytest.approx(0.05, abs=1e-5)
    assert np.argmax(shares) == 1
    with pytest.raises(ValueError, match="probability must lie"):
        exact_threshold_for_probability(increment, laws, 0.0, 500)


def test_a_late_change_is_caught_sooner_than_one_at_a_fresh_start_as_simulation_says():
    fresh, late = exact_run_length(REFERENCE, SHIFTED, 5.0), late_delay(REFERENCE, NULL, SHIFTED, 5.0)
    assert 8.5 < late < fresh == pytest.approx(10.376, abs=0.01)
    rng, num = np.random.default_rng(0), 20_000
    statistic = np.zeros(num)
    for _ in range(200):
        after = np.maximum(statistic + REFERENCE(rng.standard_normal(num)), 0.0)
        alive = np.flatnonzero(after < 5.0)
        statistic = after[rng.choice(alive, num)]  # those that alarmed are replaced: the quasi-stationary law
    delays, going = np.zeros(num), np.ones(num, bool)
    while going.any():
        statistic[going] = np.maximum(statistic[going] + REFERENCE(1 + rng.standard_normal(going.sum())), 0.0)
        delays[going] += 1
        going &= statistic < 5.0
    assert late == pytest.approx(delays.mean(), abs=4 * delays.std() / np.sqrt(num))


@pytest.mark.parametrize(("law", "h", "figure"), [(NULL, 4.0, 338.1), (NULL, 5.0, 938.2)])
def test_siegmunds_formula_gives_its_published_figures_within_two_percent_of_the_chain(law, h, figure):
    assert siegmund_run_length(REFERENCE, law, h) == pytest.approx(figure, abs=0.1)
    assert siegmund_run_length(REFERENCE, law, h) == pytest.approx(exact_run_length(REFERENCE, law, h), rel=0.02)
    assert siegmund_run_length(REFERENCE, SHIFTED, h) == pytest.approx(exact_run_length(REFERENCE, SHIFTED, h), rel=0.02)
    with pytest.raises(ValueError, match="linear increments"):
        siegmund_run_length(score_increment(NULL, Gaussian(0.0, 2.0)), NULL, h)


@pytest.mark.parametrize(("drift", "scale"), [(0.5, 1.0), (0.25, 1.0), (0.7, 2.0)])
def test_siegmunds_formula_holds_for_other_shifts_at_a_run_length_of_a_thousand(drift, scale):
    increment = likelihood_increment(Gaussian(0.0, scale), Gaussian(drift * scale, scale))
    threshold = exact_threshold(increment, (Gaussian(0.0, scale),), 1_000.0)
    assert siegmund_run_length(increment, Gaussian(0.0, scale), threshold) == pytest.approx(1_000, rel=0.02)


@pytest.mark.parametrize("post", [Gaussian(0.0, 2.0), Gaussian(0.3, 2.0), Gaussian(0.0, 0.5)])
@pytest.mark.parametrize("clip", [None, 4.0])
def test_the_chain_of_a_curved_increment_hardly_depends_on_its_number_of_states(post, clip):
    increment = ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(post), arl=100, clip=clip).increment
    for arl, tolerance in ((1e2, 0.001), (1e4, 0.004), (1e6, 0.02)):
        threshold = exact_threshold(increment, [NULL], arl)
        assert exact_run_length(increment, NULL, threshold, states=1600) == pytest.approx(arl, rel=tolerance)
        assert exact_run_length(increment, NULL, threshold, states=403) == pytest.approx(arl, rel=0.4 * tolerance)


def test_a_whole_threshold_takes_few_solves_of_the_fine_chain(monkeypatch):
    solved, solve = [], np.linalg.solve
    monkeypatch.setattr(np.linalg, "solve", lambda a, b: solved.append(len(a)) or solve(a, b))
    exact_threshold(REFERENCE, [NULL], 10_000)
    assert solved.count(400) <= 6


@pytest.mark.parametrize("arl", [100, 1_000, 10_000])
def test_exact_thresholds_keep_their_run_length_within_five_percent_when_simulated_afresh(arl):
    threshold = exact_threshold(REFERENCE, [NULL], arl)
    rng, statistic, alarms, streams, ticks = np.random.default_rng(0), np.zeros(10_000), 0, 10_000, max(1000, arl // 4)
    for _ in range(ticks):
        statistic = np.maximum(statistic + REFERENCE(rng.standard_normal(streams)), 0.0)
        fired = statistic >= threshold
        alarms += int(fired.sum())
        statistic[fired] = 0.0
    assert streams * ticks / alarms == pytest.approx(arl, rel=0.05)


@pytest.mark.parametrize(("shift", "arl"), [(0.25, 1e9), (0.1, 1e6), (0.05, 1e4)])
def test_small_shifts_keep_their_run_length_on_a_lattice_four_times_as_fine(shift, arl):
    increment = likelihood_increment(NULL, Gaussian(shift, 1.0))
    threshold = exact_threshold(increment, (NULL,), arl)
    assert exact_run_length(increment, NULL, threshold, states=2400) == pytest.approx(arl, rel=0.03)


def test_an_infinite_target_is_refused():
    with pytest.raises(ValueError, match="finite"):
        exact_threshold(REFERENCE, (NULL,), float("inf"))
