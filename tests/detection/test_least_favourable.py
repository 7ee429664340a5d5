import numpy as np
import pytest
from scipy import optimize

from detection import (
    FiniteSet,
    Gaussian,
    GaussianBox,
    Singleton,
    confidence_box,
    default_post,
    fisher_divergence,
    least_favourable,
    score_increment,
)
from detection.gaussian_means import GaussianEllipsoid, GaussianMeanBox, closest_means
from detection.least_favourable import closest, members


def _divergence(m1, v1, m0, v0):
    return 0.5 * (v1 * (1 / v0 - 1 / v1) ** 2 + (m1 - m0) ** 2 / v0**2)


def _random_boxes(rng):
    low, width = np.sort(rng.uniform(0.3, 3.0, (2, 2)), axis=1), rng.uniform(0.0, 1.0, 2)
    pre = GaussianBox(mean=(-width[0], width[0]), variance=tuple(low[0]))
    start = width[0] + rng.uniform(0.1, 2.0)
    return pre, GaussianBox(mean=(start, start + width[1]), variance=tuple(low[1]))


def test_no_pair_of_a_fine_grid_is_closer_than_the_closed_form():
    rng = np.random.default_rng(0)
    for _ in range(100):
        pre, post = _random_boxes(rng)
        q0, q1 = closest(pre, post)
        v0, v1 = np.meshgrid(np.linspace(*pre.variance, 201), np.linspace(*post.variance, 201))
        grid = _divergence(post.mean[0], v1, pre.mean[1], v0)
        assert fisher_divergence(q1, q0) <= grid.min() + 1e-12


def test_the_closest_means_of_boxes_are_the_facing_ends():
    grid = [(m0, m1) for m0 in np.linspace(-1, 0, 21) for m1 in np.linspace(0.5, 2, 21)]
    best = min(grid, key=lambda pair: _divergence(pair[1], 1.3, pair[0], 1.1))
    q0, q1 = closest(GaussianBox(mean=(-1, 0), variance=(1.1, 1.1)), GaussianBox(mean=(0.5, 2), variance=(1.3, 1.3)))
    assert (q0.mean, q1.mean) == best
    mirrored = closest(GaussianBox(mean=(0, 1), variance=(1.1, 1.1)), GaussianBox(mean=(-2, -0.5), variance=(1.3, 1.3)))
    assert (mirrored[0].mean, mirrored[1].mean) == (0.0, -0.5)


def test_the_pair_of_two_uncertain_sets_and_its_worst_drifts():
    pair = least_favourable(GaussianBox(mean=(-0.2, 0.2), variance=(0.8, 1.25)), GaussianBox(mean=(0.8, 3.0), variance=(0.8, 3.0)))
    assert (pair.pre, pair.post) == (Gaussian(0.2, 1.25), Gaussian(0.8, 1.25))
    assert pair.divergence == pytest.approx(0.1152, rel=1e-9)
    assert pair.margins == pytest.approx((-0.1152, 0.1152), rel=1e-9)


def test_a_closest_pair_that_alarms_for_ever_in_control_is_refused_by_name():
    with pytest.raises(ValueError, match=r"pre-change law Gaussian\(mean=0\.0, variance=0\.4\) drifts by \+0\.0188"):
        least_favourable(GaussianBox(mean=(0.0, 0.0), variance=(0.4, 2.7)), GaussianBox(mean=(0.8, 0.8), variance=(1.6, 1.8)))


def test_margins_hold_over_a_fine_grid_of_both_boxes():
    rng, verified = np.random.default_rng(1), 0
    while verified < 30:
        pre, post = _random_boxes(rng)
        clip = rng.choice([None, 3.0, 4.0])
        try:
            pair = least_favourable(pre, post, clip=clip)
        except ValueError:
            continue
        verified += 1
        drift = score_increment(pair.pre, pair.post, clip).mean
        for box, sign, margin in ((pre, -1, pair.margins[0]), (post, 1, pair.margins[1])):
            inside = [drift(Gaussian(m, v)) for m in np.linspace(*box.mean, 14) for v in np.linspace(*box.variance, 14)]
            assert min(sign * z for z in inside) >= sign * margin - 1e-3 * abs(margin)
            assert sign * margin > 0


def test_boxes_that_differ_in_variance_alone_are_checked_between_their_corners():
    pre, post = GaussianBox(mean=(-0.5, 0.5), variance=(0.8, 1.0)), GaussianBox(mean=(-0.5, 0.5), variance=(2.5, 3.0))
    pair = least_favourable(pre, post)
    assert (pair.pre, pair.post) == (Gaussian(0.0, 1.0), Gaussian(0.0, 2.5))
    assert pair.margins[1] == pytest.approx(fisher_divergence(pair.post, pair.pre))


def test_sets_that_meet_are_refused_with_the_common_point():
    with pytest.raises(ValueError, match=r"both hold Gaussian\(mean=0\.75, variance=1\.0\)"):
        least_favourable(GaussianBox(mean=(0, 1), variance=(1, 1)), GaussianBox(mean=(0.5, 2), variance=(1, 1)))
    with pytest.raises(ValueError, match="must be apart"):
        least_favourable(Singleton(Gaussian(0.0, 1.0)), Singleton(Gaussian(0.0, 1.0)))


def test_finite_sets_are_searched_pair_by_pair():
    pre = FiniteSet((Gaussian(0.0, 1.0), Gaussian(-0.2, 1.0)))
    pair = least_favourable(pre, FiniteSet((Gaussian(1.5, 1.0), Gaussian(0.9, 1.0))))
    assert (pair.pre, pair.post) == (Gaussian(0.0, 1.0), Gaussian(0.9, 1.0))
    vectors = least_favourable(Singleton(Gaussian((0.0, 0.0), 1.0)), FiniteSet((Gaussian((1.0, 1.0), 1.0), Gaussian((1.0, 0.0), 1.0))))
    assert vectors.post == Gaussian((1.0, 0.0), 1.0)
    assert vectors.divergence == pytest.approx(0.5)


def _random_covariance(rng, size, spread=1.0):
    axes = np.linalg.qr(rng.standard_normal((size, size)))[0]
    covariance = axes @ np.diag(np.exp(rng.uniform(-spread, spread, size))) @ axes.T
    return (covariance + covariance.T) / 2


def _random_sets(rng, size):
    covariance, middle = _random_covariance(rng, size), rng.standard_normal(size)
    pre = GaussianEllipsoid(mean=np.zeros(size), shape=0.1 * _random_covariance(rng, size, 2.0), covariance=covariance)
    middle *= 4.0 / np.linalg.norm(middle)
    if rng.random() < 0.5:
        return pre, GaussianMeanBox(low=middle - 0.3, high=middle + 0.2, covariance=covariance)
    return pre, GaussianEllipsoid(mean=middle, shape=0.1 * _random_covariance(rng, size, 2.0), covariance=covariance)


@pytest.mark.slow
def test_the_closest_means_are_those_of_a_general_solver():
    rng = np.random.default_rng(0)
    for _ in range(20):
        size = int(rng.integers(2, 6))
        pre, post = _random_sets(rng, size)
        first, second, gap = closest_means(pre, post)
        precision, cube = first.precision, isinstance(post, GaussianMeanBox)

        def distance(z, pre=pre, post=post, precision=precision, size=size):
            away = precision @ (np.array(post.at(z[size:]).mean) - np.array(pre.at(z[:size]).mean))
            return 0.5 * away @ away

        balls = [{"type": "ineq", "fun": lambda z, size=size: 1 - z[:size] @ z[:size]}]
        balls += [] if cube else [{"type": "ineq", "fun": lambda z, size=size: 1 - z[size:] @ z[size:]}]
        solved = optimize.minimize(distance, np.zeros(2 * size), bounds=[(-1, 1)] * (2 * size), constraints=balls, options={"ftol": 1e-13})
        found = fisher_divergence(second, first)
        assert found == pytest.approx(solved.fun, rel=1e-6)
        assert 0 <= gap <= 1e-9 * found


@pytest.mark.slow
def test_every_member_of_ellipsoids_and_boxes_of_means_drifts_by_the_certified_margin():
    rng = np.random.default_rng(1)
    for _ in range(10):
        size = int(rng.integers(2, 5))
        pre, post = _random_sets(rng, size)
        pair = least_favourable(pre, post)
        drift = score_increment(pair.pre, pair.post).mean
        assert pair.margins == pytest.approx((-pair.divergence, pair.divergence), rel=1e-6)
        for laws, sign in ((pre, -1), (post, 1)):
            inside = [laws.at(laws.nearest(rng.uniform(-1.5, 1.5, size))) for _ in range(200)]
            assert min(sign * drift(law) for law in inside) >= pair.divergence - pair.gap - 1e-9


def test_an_ellipsoid_of_another_covariance_is_verified_at_its_worst_member():
    pre = GaussianEllipsoid(mean=(0.0, 0.0), shape=((0.3, 0.1), (0.1, 0.2)), covariance=((1.0, 0.2), (0.2, 1.0)))
    post = GaussianEllipsoid(mean=(3.0, 1.0), shape=((0.2, 0.0), (0.0, 0.4)), covariance=((1.3, 0.0), (0.0, 0.9)))
    pair = least_favourable(pre, post)
    increment = score_increment(pair.pre, pair.post)
    angles = np.linspace(0, 2 * np.pi, 721)
    circle = [np.array([r * np.cos(a), r * np.sin(a)]) for a in angles for r in (0.5, 1.0)]
    assert pair.margins[0] == pytest.approx(max(increment.mean(pre.at(a)) for a in circle), abs=1e-4)
    assert pair.margins[1] == pytest.approx(min(increment.mean(post.at(a)) for a in circle), abs=1e-4)
    assert pair.margins[0] >= max(increment.mean(pre.at(a)) for a in circle) - 1e-12
    assert pair.pre in members(pre, pair.pre, increment)


def test_the_highest_member_of_an_ellipsoid_is_that_of_a_dense_sample():
    rng = np.random.default_rng(2)
    for turn in range(40):
        curvature, slope = rng.standard_normal((3, 3)), rng.standard_normal(3) * (turn % 4 > 0)
        curvature = (curvature + curvature.T) * (turn % 5 > 0)
        laws = GaussianEllipsoid(mean=rng.standard_normal(3), shape=_random_covariance(rng, 3), covariance=1.0)

        def value(m, curvature=curvature, slope=slope):
            return np.einsum("...i,ij,...j", m, curvature, m) + m @ slope

        directions = rng.standard_normal((20_000, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        sampled = np.array(laws.mean) + np.concatenate((directions, directions * rng.random((20_000, 1)))) @ laws.factor.T
        best = np.array(laws.highest(curvature, slope).mean)
        away = best - np.array(laws.mean)
        assert away @ np.linalg.solve(np.array(laws.shape), away) <= 1 + 1e-9
        assert value(best) >= value(sampled).max() - 1e-9


def test_ellipsoids_that_meet_are_refused_with_a_common_mean():
    first = GaussianEllipsoid(mean=(0.0, 0.0), shape=np.eye(2), covariance=1.0)
    second = GaussianEllipsoid(mean=(1.5, 0.0), shape=np.eye(2), covariance=1.0)
    with pytest.raises(ValueError, match=r"must be apart, but both hold Gaussian\(mean=\(0\."):
        least_favourable(first, second)
    with pytest.raises(ValueError, match="must be apart"):
        least_favourable(Singleton(Gaussian((0.5, 0.0), 1.0)), first)


@pytest.mark.parametrize("n", [8, 10, 20, 30, 100, 300, 10_000])
def test_the_default_harm_leaves_margins_for_any_number_of_calibration_values(n):
    pre = confidence_box(n)
    pair = least_favourable(pre, default_post(pre), clip=4.0)
    assert pair.margins[0] < 0 < pair.margins[1]


@pytest.mark.parametrize("n", [30, 100])
def test_a_plain_post_change_box_suits_the_usual_calibration_sizes(n):
    pair = least_favourable(confidence_box(n), GaussianBox(mean=(0.75, 4.0), variance=(1.0, 1.5)), clip=4.0)
    assert pair.pre.variance == pair.post.variance


def test_the_confidence_box_holds_the_errors_of_calibration():
    rng, n = np.random.default_rng(0), 1000
    x = rng.standard_normal((5_000, n))
    mean, variance = -x.mean(axis=1) / x.std(axis=1, ddof=1), 1 / x.var(axis=1, ddof=1)
    box = confidence_box(n)
    assert np.mean(mean <= box.mean[1]) == pytest.approx(0.95, abs=0.015)
    assert np.mean(variance <= box.variance[1]) == pytest.approx(0.95, abs=0.02)
    assert box.variance[1] == pytest.approx((1 + 1.6448536 / np.sqrt(2000)) ** 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianBox(mean=(1, 0), variance=(1, 1)), "low <= high"),
        (lambda: GaussianBox(mean=(0, 1), variance=(0, 1)), "above 0"),
        (lambda: confidence_box(1), "at least 2 calibration values"),
        (lambda: confidence_box(30, confidence=1.0), "confidence must lie"),
        (lambda: FiniteSet(()), "at least one law"),
        (lambda: FiniteSet((Gaussian(0, 1), Gaussian(1, 1))).centre(), "no centre"),
        (lambda: default_post(confidence_box(4)), "harm must exceed"),
        (lambda: least_favourable(confidence_box(30), Singleton(Gaussian((0.0, 1.0), 1.0))), "one dimension"),
        (lambda: GaussianEllipsoid(mean=(0.0, 0.0), shape=np.eye(3), covariance=1.0), r"symmetric \(2, 2\)"),
        (lambda: GaussianEllipsoid(mean=(0.0, 0.0), shape=-np.eye(2), covariance=1.0), "positive semi-definite"),
        (lambda: GaussianEllipsoid(mean=(0.0, 0.0), shape=np.eye(2), covariance=np.zeros((2, 2))), "positive"),
        (lambda: GaussianEllipsoid(mean=0.0, shape=np.eye(1), covariance=1.0), "use GaussianBox"),
        (lambda: GaussianMeanBox(low=(0.0, 1.0), high=(1.0, 0.0), covariance=1.0), "must not exceed high"),
        (lambda: closest_means(Gaussian((0.0,), 1.0), Gaussian((1.0, 1.0), 1.0)), "one dimension"),
        (
            lambda: least_favourable(
                GaussianMeanBox(low=(0.0, 0.0), high=(0.1, 0.1), covariance=1.0), Singleton(Gaussian((2.0, 0.0), (1.0, 2.0)))
            ),
            "use a GaussianEllipsoid",
        ),
    ],
)
def test_impossible_sets_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_member_of_a_random_box_drifts_by_less_than_the_certificate_says():
    rng, fitted = np.random.default_rng(5), 0
    while fitted < 40:
        low, high = np.sort(rng.uniform(0.2, 3.0, (2, 2)), axis=1)
        pre = GaussianBox(mean=(-0.1, 0.1), variance=(low[0], low[1]))
        post = GaussianBox(mean=(1.2, 1.2 + rng.uniform(0, 1)), variance=(high[0], high[1]))
        try:
            pair = least_favourable(pre, post)
        except ValueError:
            continue
        fitted += 1
        drift = score_increment(pair.pre, pair.post).mean
        drifts = [drift(Gaussian(m, v)) for m in np.linspace(*post.mean, 7) for v in np.linspace(*post.variance, 7)]
        assert min(drifts) >= pair.divergence - pair.gap - 1e-9
