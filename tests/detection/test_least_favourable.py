import numpy as np
import pytest

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
from detection.least_favourable import closest


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
    ],
)
def test_impossible_sets_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
