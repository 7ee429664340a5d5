import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import stats

from detection import CUSUM, Gaussian, Singleton
from detection.self_starting import SelfStarted, SelfStarting
from detection.states import take

KNOWN = CUSUM.fit(pre=Singleton(Gaussian(0.0, 1.0)), post=Singleton(Gaussian(1.0, 1.0)), arl=1000, clip=None)


def scores_of(scores, x):
    state, u = scores.init(len(x)), np.empty_like(x)
    for tick, column in enumerate(x.T):
        u[:, tick] = scores.score(state, column)
        state = scores.update(state, column)
    return u


def run_lengths(detector, rng, streams, horizon, mean_at=lambda tick: 0.0):
    """First alarms, ``inf`` for none, of streams watched until they alarm."""
    state, ticks, watched = detector.init(streams), np.full(streams, np.inf), np.arange(streams)
    for tick in range(1, horizon + 1):
        state = detector.step(state, mean_at(tick) + rng.standard_normal(len(watched)))
        alarmed = detector.alarms(state)
        ticks[watched[alarmed]] = tick
        watched, state = watched[~alarmed], take(state, ~alarmed)
        if not len(watched):
            break
    return ticks


def test_gaussian_streams_of_any_scale_give_independent_standard_normal_scores_from_the_third_value_on():
    rng = np.random.default_rng(0)
    location, scale = rng.normal(0, 50, (20_000, 1)), rng.lognormal(0, 2, (20_000, 1))
    u = scores_of(SelfStarting(clip=12.0), location + scale * rng.standard_normal((20_000, 30)))
    assert_array_equal(u[:, :2], 0.0)
    for tick in (2, 3, 4, 5, 10, 29):
        assert stats.kstest(u[:, tick], "norm").pvalue > 1e-3
    for lag in (1, 2, 5):
        assert abs(np.corrcoef(u[:, 2:-lag].ravel(), u[:, 2 + lag :].ravel())[0, 1]) < 4 / np.sqrt(u[:, 2:-lag].size)
    squares = u[:, 2:] ** 2  # dependence that correlation does not see
    assert abs(np.corrcoef(squares[:, :-1].ravel(), squares[:, 1:].ravel())[0, 1]) < 4 / np.sqrt(squares[:, 1:].size)


def test_a_score_is_the_normal_quantile_of_the_two_sample_t_test_on_one_new_value():
    past, new = np.array([3.1, 2.4, 5.0, 4.2, 3.3]), 6.5
    scores = SelfStarting()
    u = scores.score(scores.learned(scores.init(1), past[None]), [new])
    test = stats.ttest_ind([new], past, alternative="less", equal_var=True)  # pooled over one and five values: five values' deviation
    assert u[0] == pytest.approx(stats.norm.ppf(test.pvalue), rel=1e-12)


@pytest.mark.parametrize("past", [2, 5, 16, 17, 18, 31, 101, 1000])
def test_scores_agree_with_students_law_to_a_ten_millionth(past):
    scores = SelfStarting(clip=9.0)
    values = np.random.default_rng(past).standard_normal(past)
    x = values.mean() + values.std(ddof=1) * np.linspace(-5, 5, 101)
    state = scores.learned(scores.init(101), np.tile(values, (101, 1)))
    t = np.sqrt(past / (past + 1)) * (x - values.mean()) / values.std(ddof=1)
    expected = -np.sign(t) * stats.norm.ppf(stats.t.sf(np.abs(t), past - 1))
    np.testing.assert_allclose(scores.score(state, x), expected, atol=1e-7 if past > 16 else 1e-12)


def test_moments_are_those_of_the_values_learned_even_far_from_zero():
    x = 1e9 + np.random.default_rng(1).standard_normal((4, 300))
    learn = np.random.default_rng(2).random(x.shape) < 0.5
    scores = SelfStarting()
    state = scores.init(4)
    for tick in range(300):
        state = scores.update(state, np.where(learn[:, tick], x[:, tick], np.nan), learn[:, tick])
    for row in range(4):
        kept = x[row, learn[row]]
        assert state.count[row] == len(kept)
        assert state.mean[row] == pytest.approx(kept.mean(), rel=1e-14)
        assert state.square[row] / (len(kept) - 1) == pytest.approx((kept - 1e9).var(ddof=1), rel=1e-5)


def test_both_tails_keep_their_digits():
    scores = SelfStarting(clip=30.0)
    state = scores.learned(scores.init(2), np.tile(np.random.default_rng(3).standard_normal(200), (2, 1)))
    far = state.mean + np.array([12.0, -12.0]) * np.sqrt(state.square / 199)
    u = scores.score(state, far)
    assert u[0] == pytest.approx(-u[1], rel=1e-9)
    assert 8 < u[0] < 12


def test_a_stream_constant_so_far_scores_its_value_zero_and_any_other_the_clip():
    scores = SelfStarting(clip=3.0)
    state = scores.learned(scores.init(4), np.full((4, 5), 0.1))
    assert_array_equal(scores.score(state, state.mean + np.array([0.0, 1e-9, -1.0, np.inf])), [0.0, 3.0, -3.0, 3.0])
    assert np.isnan(scores.score(state, [np.nan, 0, 0, 0])[0])


def test_the_threshold_for_a_known_law_keeps_its_run_length_without_one():
    detector = SelfStarted.around(KNOWN)
    ticks = run_lengths(detector, np.random.default_rng(4), 4000, 6000)
    average = np.minimum(ticks, 6000).sum() / np.isfinite(ticks).sum() - 30  # the warm start teaches only
    assert average == pytest.approx(1000, rel=0.06)


def test_delay_is_near_that_of_a_known_law_after_a_long_quiet_start_and_poor_without_one():
    detector = SelfStarted.around(KNOWN)
    delays, missed = {}, {}
    for quiet in (0, 200):
        start = 30 + quiet
        ticks = run_lengths(detector, np.random.default_rng(5), 6000, start + 1000, lambda tick, start=start: float(tick > start))
        caught = ticks[(ticks > start) & np.isfinite(ticks)]
        delays[quiet], missed[quiet] = (caught - start).mean(), np.isinf(ticks).mean()
    assert delays[200] == pytest.approx(10.6, abs=0.5)
    assert delays[0] == pytest.approx(52, abs=6)  # of those caught within 1,000 values
    assert missed[0] == pytest.approx(0.03, abs=0.01)
    assert missed[200] < 1e-3


def test_a_stream_stops_learning_while_it_is_alarmed_and_starts_anew_when_restarted():
    detector = SelfStarted.around(KNOWN)
    rng = np.random.default_rng(6)
    state = detector.init(3)
    for _ in range(100):
        state = detector.step(state, rng.standard_normal(3))
    for _ in range(40):
        state = detector.step(state, rng.standard_normal(3) + np.array([0.0, 8.0, np.inf]))
    assert_array_equal(detector.alarms(state), [False, True, True])
    assert state.moments.count[0] == 140
    assert (state.moments.count[1:] < 105).all()
    assert abs(state.moments.mean[1]) < 1.0
    fresh = detector.restart(state, detector.alarms(state))
    assert_array_equal(fresh.moments.count, [140, 0, 0])
    assert_array_equal(detector.changed_at(fresh)[1:], [31, 31])


def test_streams_are_independent_rows_and_idle_rows_keep_their_bits():
    detector, rng = SelfStarted.around(KNOWN), np.random.default_rng(7)
    x, active = rng.standard_normal((60, 5)), rng.random((60, 5)) < 0.8
    together = detector.init(5)
    alone = [detector.init(1) for _ in range(5)]
    for values, on in zip(x, active, strict=True):
        together = detector.step(together, np.where(on, values, np.nan), on)
        alone = [detector.step(s, v, o) for s, v, o in zip(alone, values[:, None], on[:, None], strict=True)]
    assert_array_equal(detector.statistic(together), [detector.statistic(s)[0] for s in alone])
    assert_array_equal(together.moments.square, [s.moments.square[0] for s in alone])
    assert_array_equal(together.inner.clock + together.unscored, active.sum(axis=0))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: SelfStarting(warm=1), "warm must be at least 2"),
        (lambda: SelfStarting(clip=0), "clip must be positive"),
        (lambda: SelfStarting().init(0), "streams must be at least 1"),
        (lambda: SelfStarting().score(SelfStarting().init(3), np.ones(2)), "3 streams"),
        (lambda: SelfStarting().score(SelfStarting().init(3), np.ones((3, 2))), "one number for each of 3"),
        (lambda: SelfStarting().update(SelfStarting().init(2), [1.0, np.inf]), "the first is stream 1"),
        (lambda: SelfStarting().learned(SelfStarting().init(2), np.ones((3, 4))), r"\(2, n\)"),
        (lambda: SelfStarted.around(KNOWN).step(SelfStarted.around(KNOWN).init(2), [1.0, np.nan]), "the first is stream 1"),
    ],
)
def test_bad_values_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_values_that_warm_up_are_no_evidence_and_changes_are_counted_from_the_first_value():
    shrinking = CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(0.0, 0.25), threshold=5.0)  # a score of 0 would speak for a change
    detector = SelfStarted(threshold=5.0, detector=shrinking, scores=SelfStarting(warm=30))
    rng, state = np.random.default_rng(0), detector.init(200)
    for _ in range(30):
        state = detector.step(state, rng.standard_normal(200))
        assert (detector.statistic(state) == 0).all()
    rising = SelfStarted(
        threshold=6.0, detector=CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(2.0, 1.0), threshold=6.0), scores=SelfStarting(warm=30)
    )
    state = rising.init(200)
    for tick in range(1, 106):
        state = rising.step(state, rng.standard_normal(200) + 3.0 * (tick > 100))
    assert np.median(rising.changed_at(state)[rising.alarms(state)]) == 101
