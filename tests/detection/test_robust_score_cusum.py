import numpy as np
import pytest

from detection import CUSUM, Gaussian, GaussianBox, RobustScoreCUSUM, ScoreCUSUM, Singleton, confidence_box, exact_run_length
from detection.gaussian_means import GaussianEllipsoid

NULL, CENTRE = Gaussian(0.0, 1.0), Gaussian(1.9, 1.9)
PRE = GaussianBox(mean=(-0.2, 0.2), variance=(0.8, 1.25))
POST = GaussianBox(mean=(0.8, 3.0), variance=(0.8, 3.0))
TRUE_SHIFTS = (0.5, 0.6, 0.75, 1.0, 1.5, 2.0)


def delay(detector, law):
    return exact_run_length(detector.increment, law, detector.threshold)


def with_worst_case_arl(detector, pre, arl):
    """`detector` with the threshold that gives `arl` under the worst corner of `pre`, by bisection on the exact chain."""
    low, high = 0.1, 20.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        worst = min(exact_run_length(detector.increment, law, middle) for law in pre.extreme()[:4])
        low, high = (low, middle) if worst >= arl else (middle, high)
    return ScoreCUSUM(pre=detector.pre, post=detector.post, multiplier=detector.multiplier, threshold=high)


@pytest.mark.parametrize(
    ("design", "delays"),
    [
        (0.5, (48.8, 36.3, 26.7, 18.2, 11.2, 8.2)),
        (1.0, (73.1, 44.5, 26.1, 15.1, 8.1, 5.6)),
        (1.5, (144.0, 80.1, 39.3, 17.9, 7.5, 4.8)),
    ],
)
def test_delays_under_misspecified_shifts_are_the_known_ones(design, delays):
    detector = ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(design, 1.0)), arl=10_000, clip=None)
    assert [delay(detector, Gaussian(shift, 1.0)) for shift in TRUE_SHIFTS] == pytest.approx(delays, rel=0.04)  # figures of 2,000 runs


def test_the_robust_design_has_the_least_worst_delay_and_pays_at_strong_shifts():
    box = GaussianBox(mean=(0.5, 2.0), variance=(1.0, 1.0))
    robust = RobustScoreCUSUM.fit(pre=Singleton(NULL), post=box, arl=10_000, clip=None)
    others = [ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(m, 1.0)), arl=10_000, clip=None) for m in (1.0, 1.5)]
    worst = [max(delay(d, Gaussian(m, 1.0)) for m in TRUE_SHIFTS) for d in (robust, *others)]
    assert robust.pair.post == Gaussian(0.5, 1.0)
    assert worst[0] <= 0.7 * min(worst[1:])
    assert robust.promise().delay == pytest.approx(worst[0])
    assert delay(robust, Gaussian(2.0, 1.0)) > 1.4 * delay(others[0], Gaussian(2.0, 1.0))


def test_with_both_sets_uncertain_the_pair_of_centres_is_slow_at_the_worst_law():
    robust = RobustScoreCUSUM.fit(pre=PRE, post=POST, arl=1000, clip=None)
    centres = with_worst_case_arl(ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(CENTRE), arl=1000, clip=None), PRE, 1000)
    worst, middle = Gaussian(0.8, 0.8), CENTRE
    assert centres.increment.mean(worst) / centres.multiplier == pytest.approx(-0.032, abs=0.0005)
    assert delay(robust, worst) == pytest.approx(29.2, rel=0.02)
    assert delay(centres, worst) == pytest.approx(107.6, rel=0.02)
    assert (delay(robust, middle), delay(centres, middle)) == pytest.approx((7.2, 5.4), rel=0.03)


def test_at_the_safe_threshold_only_the_robust_pair_keeps_the_promise_at_the_edge():
    edge = Gaussian(0.2, 1.25)
    robust = RobustScoreCUSUM.fit(pre=PRE, post=POST, arl=1000, clip=None, method="floor")
    centres = ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(CENTRE), arl=1000, clip=None, method="floor")
    assert delay(robust, edge) == pytest.approx(12_454, rel=0.05)  # a figure of runs; the refined chain gives 12,905
    assert delay(centres, edge) == pytest.approx(521, rel=0.03)


@pytest.mark.parametrize(
    ("pre", "post"),
    [
        (PRE, POST),
        (confidence_box(30), GaussianBox(mean=(0.75, 4.0), variance=(1.0, 1.5))),
        (confidence_box(100), GaussianBox(mean=(0.75, 4.0), variance=(1.0, 1.5))),
        (GaussianBox(mean=(-0.1, 0.1), variance=(0.9, 1.0)), GaussianBox(mean=(-0.1, 0.1), variance=(2.0, 3.0))),
        (GaussianBox(mean=(-0.1, 0.1), variance=(0.95, 1.05)), GaussianBox(mean=(1.0, 2.0), variance=(0.6, 0.8))),
    ],
)
def test_the_promise_holds_over_a_fine_grid_of_the_sets_with_clipped_observations(pre, post):
    detector = RobustScoreCUSUM.fit(pre=pre, post=post, arl=1000)
    promise = detector.promise()
    members = [[Gaussian(m, v) for m in np.linspace(*box.mean, 12) for v in np.linspace(*box.variance, 12)] for box in (pre, post)]
    run_lengths = [exact_run_length(detector.increment, law, detector.threshold, states=100) for law in members[0]]
    delays = [exact_run_length(detector.increment, law, detector.threshold, states=100) for law in members[1]]
    assert promise.arl == pytest.approx(1000, rel=1e-3)
    assert promise.floor <= promise.arl
    assert min(run_lengths) >= 0.99 * promise.arl
    assert max(delays) <= 1.01 * promise.delay
    assert all(detector.increment.log_moment(law) <= 1e-9 for law in members[0])


def test_the_promise_names_the_smallest_harm_that_is_noticed():
    detector = RobustScoreCUSUM.fit(pre=confidence_box(100), post=GaussianBox(mean=(0.75, 4.0), variance=(1.0, 1.5)), arl=1000, clip=None)
    assert detector.promise().smallest_harm == pytest.approx((detector.pair.pre.mean + 0.75) / 2)
    assert np.isnan(ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(0.0, 2.0)), arl=100).promise().smallest_harm)


@pytest.mark.parametrize(("n", "broken"), [(30, (0.38, 0.03)), (100, (0.27, 0.01))])
def test_only_a_confidence_set_keeps_the_promise_when_the_null_was_estimated(n, broken):
    rng, runs = np.random.default_rng(n), 300
    x = rng.standard_normal((runs, n))
    truths = [Gaussian(-m / s, 1 / s**2) for m, s in zip(x.mean(axis=1), x.std(axis=1, ddof=1), strict=True)]
    plain = CUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(1.0, 1.0)), arl=1000, clip=None)
    pre = confidence_box(n)
    robust = RobustScoreCUSUM.fit(pre=pre, post=GaussianBox(mean=(1.0, 4.0), variance=(1.0, 1.5)), arl=1000, clip=None)

    def share_below(detector, arl):
        return np.mean([exact_run_length(detector.increment, law, detector.threshold, states=100) < arl for law in truths])

    assert share_below(plain, 500) == pytest.approx(broken[0], abs=0.08)
    assert share_below(robust, 1000) == pytest.approx(broken[1], abs=0.03)


@pytest.mark.parametrize("kind", [RobustScoreCUSUM, ScoreCUSUM, CUSUM])
def test_every_detector_is_fitted_the_same_way_and_keeps_its_promise(kind):
    detector = kind.fit(pre=confidence_box(100), post=GaussianBox(mean=(0.75, 4.0), variance=(1.0, 1.5)), arl=500)
    assert detector.promise().arl == pytest.approx(500, rel=1e-3)
    assert detector.clip == 4.0
    assert detector == kind.fit(pre=confidence_box(100), post=GaussianBox(mean=(0.75, 4.0), variance=(1.0, 1.5)), arl=500)


def test_ellipsoids_of_means_have_an_exact_promise_over_all_of_their_members():
    covariance = ((1.0, 0.4), (0.4, 2.0))
    pre = GaussianEllipsoid(mean=(0.0, 0.0), shape=((0.02, 0.0), (0.0, 0.04)), covariance=covariance)
    post = GaussianEllipsoid(mean=(1.5, 1.0), shape=((0.3, 0.1), (0.1, 0.2)), covariance=covariance)
    detector = RobustScoreCUSUM.fit(pre=pre, post=post, arl=500, clip=None)
    promise = detector.promise()
    circle = [np.array([np.cos(a), np.sin(a)]) for a in np.linspace(0, 2 * np.pi, 40)]
    run_lengths = [exact_run_length(detector.increment, pre.at(a), detector.threshold) for a in circle]
    delays = [exact_run_length(detector.increment, post.at(a), detector.threshold) for a in circle]
    assert promise.arl == pytest.approx(500, rel=1e-3)
    assert promise.floor <= promise.arl <= min(run_lengths) * (1 + 1e-6)
    assert max(delays) <= promise.delay * (1 + 1e-6)
    assert max(detector.increment.log_moment(pre.at(a)) for a in circle) <= 1e-9


def test_the_multiplier_is_safe_at_the_worst_member_of_an_ellipsoid_whose_increment_is_curved():
    pre = GaussianEllipsoid(mean=(0.0, 0.0), shape=((0.05, 0.0), (0.0, 0.2)), covariance=((1.0, 0.3), (0.3, 1.0)))
    post = Singleton(Gaussian((1.5, 1.0), ((2.0, 0.0), (0.0, 1.2))))
    detector = RobustScoreCUSUM.fit(pre=pre, post=post, arl=100, clip=None, method="floor")
    circle = [np.array([np.cos(a), np.sin(a)]) for a in np.linspace(0, 2 * np.pi, 721)]
    worst = max(detector.increment.log_moment(pre.at(a)) for a in circle)
    assert -1e-5 <= worst <= 1e-9


def test_sets_that_the_clip_hides_are_refused():
    with pytest.raises(ValueError, match="observations are clipped at 4"):
        RobustScoreCUSUM.fit(
            pre=GaussianBox(mean=(9.0, 9.5), variance=(1.0, 1.0)), post=GaussianBox(mean=(11.0, 12.0), variance=(1.0, 1.0))
        )
