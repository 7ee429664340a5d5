import pickle

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from detection import (
    CUSUM,
    Gaussian,
    GaussianBox,
    RobustScoreCUSUM,
    ScoreCUSUM,
    Singleton,
    confidence_box,
    fisher_divergence,
)
from detection.mixtures import Mixture
from detection.states import mapped, take, to_bytes

NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
DETECTORS = [
    ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(0.5, 1.8)), arl=200),
    RobustScoreCUSUM.fit(pre=confidence_box(100), post=GaussianBox(mean=(0.75, 4.0), variance=(1.0, 1.5)), arl=200),
    CUSUM.fit(pre=Singleton(NULL), post=Singleton(SHIFTED), arl=200, clip=None),
    ScoreCUSUM(pre=Gaussian((0.0, 0.0), 1.0), post=Gaussian((0.7, -0.4), (1.0, 2.0)), multiplier=0.6, threshold=4.0),
]
every_detector = pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: type(d).__name__)


class Quartic:
    """`log p = -tau x^4`, never normalised."""

    def __init__(self, tau):
        self.tau = tau

    def score(self, x):
        return -4 * self.tau * x**3

    def laplacian(self, x):
        return -12 * self.tau * x**2

    def hyvarinen(self, x):
        return 0.5 * self.score(x) ** 2 + self.laplacian(x)

    def sample(self, rng, num):
        return np.abs(rng.gamma(0.25, 1 / self.tau, num)) ** 0.25 * rng.choice([-1, 1], num)


def observations(detector, streams, ticks, seed=0):
    shape = (ticks, streams, 2) if isinstance(detector.pre, Gaussian) and detector.pre.dimension else (ticks, streams)
    x = np.random.default_rng(seed).standard_normal(shape)
    x[ticks // 2 :] += 0.8
    return x


def run(detector, x, active=None, state=None):
    state = detector.init(x.shape[1]) if state is None else state
    for t, row in enumerate(x):
        state = detector.step(state, row, None if active is None else active[t])
    return state


def assert_equal_bits(first, second):
    assert to_bytes(first) == to_bytes(second)


@pytest.mark.parametrize("v", [0.3, 1.0, 2.7])
def test_equal_variances_make_score_cusum_equal_cusum_over_a_hundred_thousand_samples(v):
    pre, post = Gaussian(0.0, v), Gaussian(1.0, v)
    score = ScoreCUSUM(pre=pre, post=post, multiplier=v, threshold=5.0)
    likelihood = CUSUM(pre=pre, post=post, threshold=5.0)
    x = observations(score, 100, 1000, seed=1)
    a, b, furthest = score.init(100), likelihood.init(100), 0.0
    for row in x:
        a, b = score.step(a, row), likelihood.step(b, row)
        furthest = max(furthest, float(np.abs(a.statistic - b.statistic).max()))
    assert furthest < 1e-9
    assert a.statistic.max() > 5


def test_the_wrong_multiplier_is_not_cusum():
    x = observations(DETECTORS[2], 10, 200)
    wrong = ScoreCUSUM(pre=NULL, post=SHIFTED, multiplier=1.1, threshold=5.0)
    assert np.abs(run(wrong, x).statistic - run(CUSUM(pre=NULL, post=SHIFTED, threshold=5.0), x).statistic).max() > 1


def test_the_state_is_the_recursion_written_as_a_loop():
    detector, x = DETECTORS[1], observations(DETECTORS[1], 3, 300)
    z = detector.increment(x)
    state = run(detector, x)
    for stream in range(3):
        statistic, since = 0.0, 0
        for t in range(300):
            statistic = max(statistic + z[t, stream], 0.0)
            since = t + 1 if statistic == 0 else since
        assert (state.statistic[stream], state.clock[stream], detector.changed_at(state)[stream]) == (statistic, 300, since + 1)


@every_detector
def test_splitting_a_stream_changes_nothing(detector):
    x = observations(detector, 7, 60)
    halfway = run(detector, x[:25])
    assert_equal_bits(run(detector, x[25:], state=pickle.loads(pickle.dumps(halfway))), run(detector, x))


@every_detector
def test_a_batch_is_bit_equal_to_its_streams_one_by_one(detector):
    x = observations(detector, 9, 60)
    together = run(detector, x)
    for stream in range(9):
        assert_equal_bits(run(detector, x[:, [stream]]), take(together, [stream]))


def test_streams_beyond_one_block_are_bit_equal_to_their_own_batch():
    detector, x = DETECTORS[0], observations(DETECTORS[0], 40_000, 4)
    part = slice(16_000, 33_333)
    assert_equal_bits(run(detector, x[:, part]), take(run(detector, x), part))


@every_detector
def test_permuting_streams_permutes_the_state(detector):
    x = observations(detector, 9, 60)
    order = np.random.default_rng(0).permutation(9)
    assert_equal_bits(run(detector, x[:, order]), take(run(detector, x), order))


@every_detector
def test_inactive_rows_keep_their_bits_and_are_never_read(detector):
    x = observations(detector, 8, 60)
    active = np.random.default_rng(1).random((60, 8)) < 0.6
    unread = x.copy()
    unread[~active] = np.nan
    state = run(detector, unread, active)
    for stream in range(8):
        alone = run(detector, x[active[:, stream]][:, [stream]])
        assert_equal_bits(alone, take(state, [stream]))


@every_detector
def test_step_and_restart_leave_their_input_untouched(detector):
    x = observations(detector, 6, 30)
    state = run(detector, x)
    before, row = mapped(state, np.copy), x[0].copy()
    detector.step(state, row, np.arange(6) % 2 == 0)
    detector.restart(state, np.ones(6, dtype=bool))
    assert_equal_bits(state, before)
    assert_array_equal(row, x[0])


def test_restart_makes_rows_as_new_and_keeps_the_others():
    detector = DETECTORS[0]
    state = run(detector, observations(detector, 6, 30))
    mask = np.array([True, False, False, True, False, False])
    restarted = detector.restart(state, mask)
    assert_equal_bits(take(restarted, mask), detector.init(2))
    assert_equal_bits(take(restarted, ~mask), take(state, ~mask))


def test_alarms_are_reported_together_and_may_come_at_the_first_tick():
    detector = CUSUM(pre=NULL, post=SHIFTED, threshold=2.0)
    state = detector.step(detector.init(3), [9.0, 0.0, 2.5])
    assert_array_equal(detector.alarms(state), [True, False, True])
    assert_array_equal(detector.changed_at(state), [1, 2, 1])


def test_the_change_is_placed_after_the_last_zero_with_the_known_accuracy():
    detector = CUSUM.fit(pre=Singleton(NULL), post=Singleton(SHIFTED), arl=1000, clip=None)
    streams, nu = 3000, 101
    rng, state = np.random.default_rng(2), detector.init(streams)
    errors, delays, done = [], [], np.zeros(streams, dtype=bool)
    for tick in range(1, 200):
        state = detector.step(state, rng.standard_normal(streams) + (tick >= nu))
        fresh = detector.alarms(state) & ~done
        if tick >= nu:
            errors += list(detector.changed_at(state)[fresh] - nu)
            delays += [tick - nu + 1] * int(fresh.sum())
        done |= fresh
    assert np.mean(delays) == pytest.approx(9.8, abs=0.3)
    assert np.mean(np.abs(errors) <= 3) == pytest.approx(0.73, abs=0.03)
    assert list(np.quantile(errors, [0.25, 0.5, 0.75])) == [-1, 0, 2]


def test_laws_known_by_their_scores_alone_drift_by_their_fisher_divergence():
    rng, pre, post = np.random.default_rng(0), Quartic(0.5), Quartic(2.0)
    detector = ScoreCUSUM(pre=pre, post=post, multiplier=0.1, threshold=5.0)
    before, after = pre.sample(rng, 200_000), post.sample(rng, 200_000)
    divergence = 0.5 * np.mean((pre.score(after) - post.score(after)) ** 2)
    assert detector.increment(before).mean() < 0
    assert detector.increment(after).mean() == pytest.approx(0.1 * divergence, rel=0.05)
    state = run(detector, after[:4000].reshape(400, 10))
    assert detector.alarms(state).all()


def test_laws_known_by_their_scores_alone_have_a_fitted_detector_that_keeps_its_promise():
    rng, pre, post = np.random.default_rng(0), Quartic(0.5), Quartic(2.0)
    detector = ScoreCUSUM.fit(pre=Singleton(pre), post=Singleton(post), arl=200, clip=None, rng=rng)
    z = detector.increment(pre.sample(rng, 10**6))
    assert np.exp(z).mean() <= 1.0
    promise = detector.promise(rng)
    assert promise.arl_interval[1] >= 200
    assert promise.arl_interval[0] >= promise.floor == np.exp(detector.threshold)
    assert promise.arl == pytest.approx(200, rel=0.1)
    assert promise.delay == pytest.approx(promise.delay_interval[0], rel=0.1)


def test_gaussian_vectors_of_one_covariance_are_fitted_exactly_and_without_draws():
    covariance = ((1.0, 0.5), (0.5, 2.0))
    pre, post = Gaussian((0.0, 0.0), covariance), Gaussian((1.0, -0.5), covariance)
    for kind in (ScoreCUSUM, CUSUM):
        detector = kind.fit(pre=Singleton(pre), post=Singleton(post), arl=500, clip=None)
        assert detector.promise().arl == pytest.approx(500, rel=1e-3)


def test_a_quadratic_statistic_of_gaussian_vectors_is_simulated_with_an_exact_multiplier():
    pre, post, rng = Gaussian((0.0, 0.0), 1.0), Gaussian((0.8, 0.0), (1.0, 2.0)), np.random.default_rng(0)
    with pytest.raises(ValueError, match="pass rng"):
        ScoreCUSUM.fit(pre=Singleton(pre), post=Singleton(post), arl=200, clip=None)
    detector = ScoreCUSUM.fit(pre=Singleton(pre), post=Singleton(post), arl=200, clip=None, rng=rng)
    assert detector.increment.log_moment(pre) == pytest.approx(0.0, abs=1e-9)
    promise = detector.promise(rng)
    assert promise.floor < promise.arl_interval[0] < promise.arl < 230
    assert promise.arl_interval[1] > 200


@pytest.mark.slow
def test_the_likelihood_ratio_of_mixtures_is_the_optimum_that_scores_approach():
    rng = np.random.default_rng(0)
    pre = Singleton(Mixture((Gaussian(-1.0, 1.0), Gaussian(1.0, 1.0)), (0.5, 0.5)))
    post = Singleton(Mixture((Gaussian(0.0, 1.0), Gaussian(2.0, 1.0)), (0.5, 0.5)))
    delays = {}
    for kind in (CUSUM, ScoreCUSUM):
        detector = kind.fit(pre=pre, post=post, arl=300, clip=None, rng=rng)
        promise = detector.promise(rng)
        assert promise.arl_interval[1] >= 300
        delays[kind] = promise.delay_interval
    assert delays[CUSUM][0] <= delays[ScoreCUSUM][1]


def test_drift_is_a_difference_of_divergences():
    truth, pre, post = Gaussian(0.6, 1.4), Gaussian(0.0, 1.0), Gaussian(1.0, 2.0)
    drift = ScoreCUSUM(pre=pre, post=post, multiplier=1.0, threshold=1.0).increment.mean(truth)
    assert drift == pytest.approx(fisher_divergence(truth, pre) - fisher_divergence(truth, post), rel=1e-12)


@pytest.mark.parametrize("missing", [np.nan, -np.inf])
def test_a_missing_observation_of_an_active_stream_is_an_error_that_counts(missing):
    detector = DETECTORS[1]
    x = np.zeros(10)
    x[[4, 7]] = missing
    with pytest.raises(ValueError, match=r"2 active streams.*stream 4"):
        detector.step(detector.init(10), x)
    detector.step(detector.init(10), x, active=~np.isin(np.arange(10), [4, 7]))


def test_an_infinite_loss_is_the_top_clip_and_an_error_without_a_clip():
    clipped, free = DETECTORS[1], DETECTORS[2]
    infinite, top = (clipped.step(clipped.init(1), [value]) for value in (np.inf, 4.0))
    assert_equal_bits(infinite, top)
    with pytest.raises(ValueError, match="set a clip"):
        free.step(free.init(1), [np.inf])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda d: d.init(0), "streams must be at least 1"),
        (lambda d: d.step(d.init(3), np.zeros(4)), "3 streams"),
        (lambda d: d.step(d.init(3), np.zeros(3), np.ones(3)), "active must be booleans"),
        (lambda d: d.restart(d.init(3), np.ones(2, dtype=bool)), "mask must be booleans"),
        (lambda d: DETECTORS[3].step(d.init(3), np.zeros((3, 5))), r"\(streams, 2\)"),
        (lambda d: DETECTORS[3].step(d.init(3), np.zeros(3)), r"\(streams, 2\)"),
        (lambda d: CUSUM(pre=NULL, post=SHIFTED, threshold=0.0), "threshold must be positive"),
        (lambda d: CUSUM(pre=NULL, post=SHIFTED, threshold=1.0, clip=-1.0), "clip must be positive"),
        (lambda d: ScoreCUSUM(pre=NULL, post=SHIFTED, threshold=1.0, multiplier=0.0), "multiplier must be positive"),
        (lambda d: ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(NULL)), "must drift down"),
        (lambda d: ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(SHIFTED), arl=1), "arl must be at least 2"),
        (lambda d: CUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian((1.0, 1.0), 1.0))), "one dimension"),
        (lambda d: ScoreCUSUM.fit(pre=Singleton(DETECTORS[3].pre), post=Singleton(DETECTORS[3].post)), "clip needs a stream of numbers"),
        (lambda d: ScoreCUSUM.fit(pre=Singleton(Quartic(1.0)), post=Singleton(Quartic(2.0))), "pass rng"),
    ],
)
def test_bad_input_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(DETECTORS[0])
