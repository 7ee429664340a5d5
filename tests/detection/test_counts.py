import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from detection.counts import BernoulliCUSUM, CountsCUSUM, class_bank, smoothed
from detection.states import take

PRE, POST = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])


def run_lengths(detector, draw, streams, horizon):
    state, ticks, watched = detector.init(streams), np.full(streams, horizon), np.arange(streams)
    ended = np.zeros(streams, dtype=bool)
    for tick in range(1, horizon + 1):
        state = detector.step(state, draw(len(watched)))
        alarmed = detector.alarms(state)
        ticks[watched[alarmed]], ended[watched[alarmed]] = tick, True
        watched, state = watched[~alarmed], take(state, ~alarmed)
        if not len(watched):
            break
    return ticks.sum() / ended.sum(), 1 / np.sqrt(ended.sum())


def test_the_increment_is_the_log_ratio_of_multinomial_probabilities():
    x = np.random.default_rng(0).multinomial(9, PRE, size=40)
    expected = stats.multinomial.logpmf(x, 9, POST) - stats.multinomial.logpmf(x, 9, PRE)
    assert_allclose(CountsCUSUM(pre=PRE, post=POST, threshold=3.0).increment(x), expected, atol=1e-12)


def test_the_statistic_is_the_best_likelihood_ratio_over_all_change_points():
    rng, detector = np.random.default_rng(1), CountsCUSUM(pre=PRE, post=POST, threshold=3.0)
    x = rng.multinomial(4, PRE, size=60)
    state = detector.init(1)
    z = detector.increment(x)
    for tick in range(60):
        state = detector.step(state, x[tick : tick + 1])
        best = max(0.0, max(z[k : tick + 1].sum() for k in range(tick + 1)))
        assert detector.statistic(state)[0] == pytest.approx(best, abs=1e-10)


def test_two_classes_of_one_trial_are_the_bernoulli_detector():
    hits = np.random.default_rng(2).random((100, 3)) < 0.2
    two = CountsCUSUM(pre=[0.9, 0.1], post=[0.8, 0.2], threshold=2.0)
    one = BernoulliCUSUM(pre=0.1, post=0.2, threshold=2.0)
    a, b = two.init(3), one.init(3)
    for row in hits:
        a, b = two.step(a, np.stack([~row, row], axis=1)), one.step(b, row)
    assert_allclose(two.statistic(a), one.statistic(b), atol=1e-12)
    assert_array_equal(two.changed_at(a), one.changed_at(b))


def test_the_run_length_of_consecutive_hits_is_its_closed_form():
    detector = BernoulliCUSUM(pre=0.8, post=0.9, threshold=3 * np.log(0.9 / 0.8) - 1e-9)  # a miss outweighs any two hits
    for p in (0.3, 0.8, 0.95):
        assert detector.run_length(p) == pytest.approx((1 - p**3) / ((1 - p) * p**3), rel=1e-12)
    first = BernoulliCUSUM(pre=0.1, post=0.4, threshold=1.0)  # one hit is enough
    assert first.run_length(0.25) == pytest.approx(4.0, rel=1e-12)


def test_the_run_length_on_a_lattice_is_that_of_the_markov_chain():
    from scipy.optimize import brentq

    pre, steps, states = 0.05, 6, 40  # hit = 6 |miss|
    post = brentq(lambda q: np.log(q / pre) + steps * np.log((1 - q) / (1 - pre)), 0.06, 0.9)
    unit = -np.log((1 - post) / (1 - pre))
    detector = BernoulliCUSUM(pre=pre, post=post, threshold=(states - 0.5) * unit)
    for rate in (0.03, pre, post, 0.3):
        chain = np.zeros((states, states))
        for state in range(states):
            chain[state, max(state - 1, 0)] += 1 - rate
            if state + steps < states:
                chain[state, state + steps] += rate
        expected = np.linalg.solve(np.eye(states) - chain, np.ones(states))[0]
        assert detector.run_length(rate) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("pre", "post"), [(0.1, 0.2), (0.5, 0.3), (0.02, 0.06), (0.3, 0.35)])
@pytest.mark.slow
def test_the_fitted_threshold_is_the_least_that_keeps_the_run_length(pre, post):
    detector = BernoulliCUSUM.fit(pre=pre, post=post, arl=500)
    assert detector.run_length(pre) >= 500
    lower = BernoulliCUSUM(pre=pre, post=post, threshold=detector.threshold - 1e-8)
    assert lower.run_length(pre) < 500
    assert detector.threshold < np.log(500)


@pytest.mark.slow
def test_the_exact_run_length_and_delay_are_those_of_the_detector_itself():
    rng, detector = np.random.default_rng(3), BernoulliCUSUM.fit(pre=0.1, post=0.25, arl=1000)
    for rate in (0.1, 0.25):
        mean, error = run_lengths(detector, lambda n, rate=rate: rng.random(n) < rate, 2000, 6000)
        assert abs(mean / detector.run_length(rate) - 1) < 4 * error
    assert detector.run_length(0.25) < 40


def test_extreme_rates_have_the_run_lengths_they_must():
    detector = BernoulliCUSUM(pre=0.1, post=0.25, threshold=4.0)
    assert detector.run_length(0.0) == np.inf
    assert detector.run_length(1.0) == np.ceil(4.0 / np.log(2.5))
    falls = BernoulliCUSUM(pre=0.5, post=0.25, threshold=2.0)
    assert falls.run_length(0.0) == np.ceil(2.0 / np.log(1.5))


@pytest.mark.slow
def test_counts_keep_their_promised_run_length():
    rng = np.random.default_rng(4)
    detector = CountsCUSUM.fit(pre=PRE, post=POST, arl=300, trials=5, rng=rng)
    mean, error = run_lengths(detector, lambda n: rng.multinomial(5, PRE, size=n), 1500, 2000)
    assert 300 * (1 - 3 * error) < mean < 400
    assert run_lengths(detector, lambda n: rng.multinomial(5, POST, size=n), 1500, 2000)[0] < 15
    floor = CountsCUSUM(pre=PRE, post=POST, threshold=np.log(300))
    assert run_lengths(floor, lambda n: rng.multinomial(5, PRE, size=n), 500, 4000)[0] > 300


def test_a_bank_of_classes_names_the_class_whose_prior_grew():
    rng = np.random.default_rng(5)
    bank = class_bank(PRE, odds=3.0, arl=1000)
    shifted = np.array([0.3, 0.2, 0.5])
    state, null = bank.init(200), bank.init(200)
    for _ in range(60):
        state, null = bank.step(state, rng.multinomial(8, shifted, size=200)), bank.step(null, rng.multinomial(8, PRE, size=200))
    assert bank.alarms(state).all()
    assert (bank.leader(state) == 2).all()
    assert bank.alarms(null).mean() < 0.06


def test_streams_may_have_laws_of_their_own():
    rng = np.random.default_rng(6)
    rates = rng.uniform(0.05, 0.4, 20_000)  # more streams than one block holds
    many = BernoulliCUSUM(pre=rates, post=rates + 0.2, threshold=3.0)
    state = many.init(20_000)
    x = rng.random((5, 20_000)) < 0.5
    for row in x:
        state = many.step(state, row)
    for stream in (0, 17_000, 19_999):
        alone = BernoulliCUSUM(pre=rates[stream], post=rates[stream] + 0.2, threshold=3.0)
        own = alone.init(1)
        for row in x:
            own = alone.step(own, row[stream : stream + 1])
        assert alone.statistic(own)[0] == many.statistic(state)[stream]
    pre = np.stack([PRE, POST])
    rows = CountsCUSUM(pre=pre, post=pre[::-1].copy(), threshold=3.0)
    z = rows.statistic(rows.step(rows.init(2), np.array([[0, 0, 5], [5, 0, 0]])))
    assert_allclose(z, [5 * np.log(2.0), 5 * np.log(5 / 3)])


def test_a_tick_without_trials_and_idle_streams_change_nothing():
    detector = CountsCUSUM(pre=PRE, post=POST, threshold=3.0)
    state = detector.step(detector.init(2), np.array([[0, 0, 3], [0, 0, 3]]))
    after = detector.step(state, np.array([[0.0, 0, 0], [np.nan, 0, 0]]), np.array([True, False]))
    assert_array_equal(after.statistic, state.statistic)
    assert_array_equal(after.clock, [2, 1])


def test_detectors_are_equal_by_value():
    assert BernoulliCUSUM(pre=0.1, post=0.2, threshold=2.0) == BernoulliCUSUM(pre=0.1, post=0.2, threshold=2.0)
    assert BernoulliCUSUM(pre=0.1, post=0.2, threshold=2.0) != BernoulliCUSUM(pre=0.1, post=0.3, threshold=2.0)
    assert CountsCUSUM(pre=PRE, post=POST, threshold=2.0) == CountsCUSUM(pre=PRE.copy(), post=POST, threshold=2.0)


def test_smoothed_probabilities_are_positive_and_sum_to_one():
    p = smoothed(np.array([[0, 10, 90], [1, 1, 1]]))
    assert (p > 0).all()
    assert_allclose(p.sum(axis=1), 1.0)


def _bernoulli(x):
    detector = BernoulliCUSUM(pre=0.1, post=0.2, threshold=2.0)
    return detector.step(detector.init(2), x)


def _counts(x):
    detector = CountsCUSUM(pre=PRE, post=POST, threshold=3.0)
    return detector.step(detector.init(2), x)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: BernoulliCUSUM(pre=0.0, post=0.2, threshold=1.0), "pre must be one rate"),
        (lambda: BernoulliCUSUM(pre=0.2, post=0.2, threshold=1.0), "must differ"),
        (lambda: BernoulliCUSUM.fit(pre=0.1, post=0.2, arl=1.0), "arl must be at least 2"),
        (lambda: BernoulliCUSUM(pre=np.array([0.1, 0.2]), post=0.3, threshold=1.0).run_length(0.1), "one pre and one post"),
        (lambda: BernoulliCUSUM(pre=0.1, post=0.2, threshold=1.0).run_length(1.1), r"\[0, 1\]"),
        (lambda: _bernoulli([0.0, 0.5]), "neither 0 nor 1"),
        (lambda: _bernoulli([0.0, np.nan]), "first is stream 1"),
        (lambda: CountsCUSUM(pre=[1.0, 0.0], post=[0.5, 0.5], threshold=1.0), r"above 0 .*smoothed"),
        (lambda: CountsCUSUM(pre=[0.4, 0.4], post=[0.5, 0.5], threshold=1.0), "sum to 1"),
        (lambda: CountsCUSUM(pre=PRE, post=PRE, threshold=1.0), "must differ"),
        (lambda: CountsCUSUM(pre=PRE, post=[0.5, 0.5], threshold=1.0), "same classes"),
        (lambda: CountsCUSUM(pre=PRE, post=POST, threshold=0.0), "threshold must be positive"),
        (lambda: _counts(np.ones((2, 2))), r"\(streams, 3\)"),
        (lambda: _counts(np.array([[1, 2, 3], [1, -1, 0]])), "must not be negative"),
        (lambda: class_bank(PRE, odds=1.0), "odds must be positive"),
        (lambda: class_bank(PRE, arl=1.0), "arl must be at least 2"),
    ],
)
def test_bad_counts_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
