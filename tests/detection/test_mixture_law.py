import tracemalloc

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import detection.mixtures
from detection.exponential import ExponentialFamily, Polynomial
from detection.laws import Gaussian
from detection.mixtures import KernelDensity, Mixture

HULL = Mixture([Gaussian(1.0, 0.5), Gaussian(2.0, 1.5), Gaussian(3.0, 1.0)], [0.2, 0.3, 0.5])


def test_scores_of_a_mixture_are_those_of_automatic_differentiation():
    x = np.linspace(-6, 9, 61)
    t = torch.tensor(x, requires_grad=True)
    parts = [
        np.log(w) - 0.5 * (t - g.mean) ** 2 / g.variance - 0.5 * np.log(g.variance) for g, w in zip(HULL.laws, HULL.weights, strict=True)
    ]
    (score,) = torch.autograd.grad(torch.logsumexp(torch.stack(parts), dim=0).sum(), t, create_graph=True)
    (bend,) = torch.autograd.grad(score.sum(), t)
    np.testing.assert_allclose(HULL.score(x), score.detach(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(HULL.laplacian(x), bend, rtol=1e-11, atol=1e-12)


def test_mixing_scores_instead_of_densities_is_far_off():
    apart = Mixture([Gaussian(-2.0, 0.25), Gaussian(2.0, 1.0)], [0.5, 0.5])
    x = np.linspace(-4, 4, 81)
    mixed_scores = sum(w * law.score(x) for law, w in zip(apart.laws, apart.weights, strict=True))
    assert np.abs(mixed_scores - apart.score(x)).max() > 10.0


def test_the_mixture_closest_to_a_standard_normal_has_the_published_divergence():
    closest = Mixture(HULL.laws, [0.9822, 0.0178, 0.0])

    def half_square(x: float) -> float:
        return 0.5 * float(closest.score(x) + x) ** 2 * np.exp(float(closest.log_density(x)))

    assert integrate.quad(half_square, -12, 16, points=(0, 1, 2), limit=200)[0] == pytest.approx(0.743973, abs=2e-6)


def test_posterior_probabilities_follow_bayes():
    x = np.array([0.0, 1.5, 40.0])
    joint = np.stack([w * np.exp(law.log_density(x[:2])) for law, w in zip(HULL.laws, HULL.weights, strict=True)], axis=-1)
    np.testing.assert_allclose(HULL.posterior(x[:2]), joint / joint.sum(axis=-1, keepdims=True), rtol=1e-13)
    np.testing.assert_allclose(HULL.posterior(x).sum(axis=-1), 1.0, rtol=1e-14)


def test_far_observations_neither_overflow_nor_vanish():
    x = np.array([-1e4, 1e4])
    np.testing.assert_allclose(HULL.score(x), HULL.laws[1].score(x), rtol=1e-10)
    assert np.isfinite(HULL.hyvarinen(x)).all()
    far = KernelDensity([0.0, 1.0], 0.1)
    np.testing.assert_allclose(far.score(x), [(0 + 1e4) / 0.01, (1 - 1e4) / 0.01], rtol=1e-12)


def test_mixtures_nest_and_weights_of_zero_do_nothing():
    x = np.linspace(-3, 5, 9)
    nested = Mixture([Mixture(HULL.laws[:2], [0.4, 0.6]), HULL.laws[2]], [0.5, 0.5])
    with_nothing = Mixture([*HULL.laws, Gaussian(0.0, 1.0)], [*HULL.weights, 0.0])
    for name in ("score", "laplacian", "log_density"):
        np.testing.assert_allclose(getattr(nested, name)(x), getattr(HULL, name)(x), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(getattr(with_nothing, name)(x), getattr(HULL, name)(x), rtol=1e-12, atol=1e-13)
    assert Mixture([HULL.laws[0]], [1.0]).sample(np.random.default_rng(0), 0).shape == (0,)


def test_draws_of_a_mixture_follow_its_distribution_in_random_order():
    draws = HULL.sample(np.random.default_rng(1), 20_000)

    def cumulative(x: np.ndarray) -> np.ndarray:
        return sum(w * stats.norm(g.mean, np.sqrt(g.variance)).cdf(x) for g, w in zip(HULL.laws, HULL.weights, strict=True))

    assert stats.kstest(draws, cumulative).pvalue > 1e-3
    assert stats.ks_2samp(draws[:10_000], draws[10_000:]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("laws", "weights", "message"),
    [
        (HULL.laws, [0.5, 0.6, 0.1], "sum to 1"),
        (HULL.laws, [1.5, -0.5, 0.0], "non-negative"),
        (HULL.laws, [float("nan"), 0.5, 0.5], "non-negative"),
        (HULL.laws, [0.5, 0.5], "each of the 3 laws"),
        ([], [], "at least one"),
        ([Gaussian(0.0, 1.0), Gaussian((0.0, 0.0), 1.0)], [0.5, 0.5], "one dimension"),
        ([ExponentialFamily(Polynomial(degree=2), (0.0, -0.5))], [1.0], "log_density"),
    ],
)
def test_impossible_mixtures_are_refused(laws, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(laws, weights)


@pytest.mark.parametrize("rule", ["scott", "silverman"])
def test_a_kernel_density_of_numbers_is_that_of_scipy(rule):
    points, x = np.random.default_rng(2).gamma(2.0, size=200), np.linspace(-1, 8, 50)
    np.testing.assert_allclose(KernelDensity(points, rule).log_density(x), stats.gaussian_kde(points, rule).logpdf(x), rtol=1e-10)
    assert KernelDensity(points) == KernelDensity(points, "scott")


@pytest.mark.parametrize("size", [1, 3])
def test_a_kernel_density_of_vectors_is_a_mixture_of_gaussians(size):
    rng = np.random.default_rng(3)
    points, x, width = rng.normal(size=(12, size)), rng.normal(size=(7, size)), rng.uniform(0.3, 1.0, size)
    reference = Mixture([Gaussian(point, width**2) for point in points], [1 / 12] * 12)
    for name in ("score", "laplacian", "hyvarinen", "log_density"):
        np.testing.assert_allclose(getattr(KernelDensity(points, width), name)(x), getattr(reference, name)(x), rtol=1e-11, atol=1e-12)


def test_each_coordinate_has_a_bandwidth_of_its_own_by_default():
    points = np.random.default_rng(4).normal(size=(500, 2)) * (1.0, 100.0)
    np.testing.assert_allclose(KernelDensity(points).bandwidth, points.std(axis=0, ddof=1) * 500 ** (-1 / 6))
    np.testing.assert_allclose(KernelDensity(points, "silverman").bandwidth, points.std(axis=0, ddof=1) * 500 ** (-1 / 6))


def test_blocks_change_no_bits_and_bound_the_memory(monkeypatch):
    rng = np.random.default_rng(5)
    law, x = KernelDensity(rng.normal(size=(5000, 2))), rng.normal(size=(400, 2))
    tracemalloc.start()
    whole = law.score(x), law.laplacian(x), law.log_density(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20  # all pairs at once would take 15 MiB an array
    monkeypatch.setattr(detection.mixtures, "_CELLS", 1)
    for block, one in zip(whole, (law.score(x), law.laplacian(x), law.log_density(x)), strict=True):
        np.testing.assert_array_equal(block, one)


def test_points_are_copied_and_cannot_be_written_to():
    points = np.array([0.0, 1.0, 4.0])
    law = KernelDensity(points, 1.0)
    points[0] = 9.0
    assert law.points[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        law.points[0] = 9.0


@pytest.mark.parametrize(
    ("points", "bandwidth", "message"),
    [
        ([0.0, 1.0], -1.0, "bandwidth must be positive"),
        ([0.0, 1.0], float("nan"), "bandwidth must be positive"),
        ([0.0, 1.0], "normal", "'scott' or 'silverman'"),
        ([0.0, 1.0], [1.0, 1.0], "shape"),
        ([1.0, 1.0], None, "pass a number"),
        ([1.0], None, "pass a number"),
        ([0.0, float("inf")], 1.0, "points must be finite"),
        ([], 1.0, "points must be finite"),
    ],
)
def test_impossible_kernel_densities_are_refused(points, bandwidth, message):
    with pytest.raises(ValueError, match=message):
        KernelDensity(points, bandwidth)
