from math import gamma, lgamma, log, pi

import numpy as np
import pytest
from scipy import integrate, stats

from detection.exponential import ExponentialFamily, Polynomial, Quartic, QuarticFeature, fit_exponential
from detection.laws import Gaussian


def _energy(x: np.ndarray) -> np.ndarray:
    """The quartic exponent as the paper writes it, pair by pair."""
    size = x.shape[-1]
    return (x**4).sum(-1) + sum(x[..., i] ** 2 * x[..., j] ** 2 for i in range(size) for j in range(i))


def test_score_matching_on_quadratic_features_gives_the_sample_mean_and_covariance():
    data = np.random.default_rng(0).multivariate_normal([0.5, -1.0, 20.0], [[2, 0.3, 0.1], [0.3, 1, -0.4], [0.1, -0.4, 1.5]], 500)
    law, reference = fit_exponential(Polynomial(degree=2, dimension=3), data), Gaussian(data.mean(axis=0), np.cov(data.T, bias=True))
    np.testing.assert_allclose(law.score(data), reference.score(data), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(law.laplacian(data), reference.laplacian(data), rtol=1e-8)
    line = fit_exponential(Polynomial(degree=2), data[:, 0])
    assert line.theta == pytest.approx((data[:, 0].mean() / data[:, 0].var(), -0.5 / data[:, 0].var()))


def test_the_fitted_parameters_have_the_least_mean_hyvarinen_score():
    data, features = np.random.default_rng(1).normal(size=(400, 2)), Polynomial(degree=4, dimension=2)
    law = fit_exponential(features, data)
    for _ in range(20):
        other = np.asarray(law.theta) + 1e-3 * np.random.default_rng(2).normal(size=len(law.theta))
        assert ExponentialFamily(features, other).hyvarinen(data).mean() > law.hyvarinen(data).mean()


@pytest.mark.parametrize(("dimension", "tau"), [(0, 2.5), (2, 0.7), (10, 1.5)])
def test_score_matching_recovers_the_quartic_from_its_draws(dimension, tau):
    rng = np.random.default_rng(3)
    estimates = [Quartic.fit(Quartic(tau, dimension).sample(rng, 4000)).tau for _ in range(20)]
    assert abs(np.mean(estimates) - tau) < 4 * np.std(estimates) / np.sqrt(20)
    assert np.std(estimates) < 0.1 * tau


def test_fits_do_not_depend_on_blocks():
    data = Quartic(1.0, 2).sample(np.random.default_rng(4), 20_000)
    half = fit_exponential(QuarticFeature(2), data[:10_000]).theta[0], fit_exponential(QuarticFeature(2), data[10_000:]).theta[0]
    whole = fit_exponential(QuarticFeature(2), data).theta[0]
    assert min(half) < whole < max(half)
    gradients, laplacians = QuarticFeature(2).gradients(data), QuarticFeature(2).laplacians(data)
    assert whole == pytest.approx(-laplacians.mean() / (gradients**2).sum(axis=-1).mean(), rel=1e-12)


@pytest.mark.parametrize("dimension", [0, 1, 2, 5])
def test_the_quartic_is_the_exponential_family_of_its_feature(dimension):
    law, family = Quartic(1.7, dimension), ExponentialFamily(QuarticFeature(dimension), (1.7,))
    x = law.sample(np.random.default_rng(5), 9)
    for name in ("score", "laplacian", "hyvarinen"):
        np.testing.assert_allclose(getattr(law, name)(x), getattr(family, name)(x), rtol=1e-14)
    np.testing.assert_allclose(family.unnormalised_log_density(x), -1.7 * (_energy(x) if dimension else x**4), rtol=1e-13)


def test_the_hyvarinen_score_of_the_quartic_moves_as_tau_and_its_square():
    x = np.random.default_rng(6).normal(size=(7, 3))
    one, two, three = (Quartic(tau, 3).hyvarinen(x) for tau in (1.0, 2.0, 3.0))
    np.testing.assert_allclose(three, 3 * two - 3 * one, rtol=1e-12)


def test_the_constant_of_the_quartic_is_the_integral():
    assert Quartic(2.0).log_density(np.array(0.0)) == pytest.approx(-log(2 * gamma(1.25) * 2.0**-0.25), rel=1e-14)
    plane = integrate.dblquad(lambda y, x: np.exp(-(x**4 + y**4 + x * x * y * y)), -4, 4, -4, 4, epsabs=1e-12)[0]
    assert Quartic(1.0, 2).log_density(np.zeros(2)) == pytest.approx(-log(plane), abs=1e-9)
    assert Quartic(16.0, 3).log_density(np.zeros(3)) == pytest.approx(Quartic(1.0, 3).log_density(np.zeros(3)) + 3 * log(2.0), rel=1e-13)


@pytest.mark.parametrize("size", [3, 10, 50, 200])
def test_the_constant_of_the_quartic_is_a_mean_over_directions(size):
    directions = np.random.default_rng(7).normal(size=(20_000, size))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    parts = -size / 4 * np.log(_energy(directions) if size < 20 else 0.5 * (1 + (directions**4).sum(axis=1)))
    weight = np.exp(parts - parts.max())
    outer = log(2) + size / 2 * log(pi) - lgamma(size / 2) + lgamma(size / 4) - log(4)
    estimate, error = log(weight.mean()) + parts.max() + outer, weight.std() / weight.mean() / np.sqrt(len(weight))
    assert abs(estimate + Quartic(1.0, size).log_density(np.zeros(size))) < 4 * error


@pytest.mark.parametrize("dimension", [0, 1])
def test_quartic_numbers_are_drawn_from_their_distribution(dimension):
    law = Quartic(0.8, dimension)
    draws = law.sample(np.random.default_rng(8), 20_000).ravel()
    half = stats.gamma(0.25, scale=1 / 0.8)  # of x^4
    assert stats.kstest(draws, lambda x: 0.5 + 0.5 * np.sign(x) * half.cdf(x**4)).pvalue > 1e-3


def test_quartic_vectors_have_the_moments_of_quadrature_and_of_scaling():
    law = Quartic(0.7, 2)
    draws, grid = law.sample(np.random.default_rng(9), 100_000), np.linspace(-4, 4, 801)
    x = np.stack(np.meshgrid(grid, grid), axis=-1)
    mass = np.exp(law.log_density(x)) * (grid[1] - grid[0]) ** 2
    for moment in (
        lambda z: z[..., 0] ** 2,
        lambda z: z[..., 0] ** 4,
        lambda z: (z[..., 0] * z[..., 1]) ** 2,
        lambda z: z[..., 0] * z[..., 1],
    ):
        values = moment(draws)
        assert abs(values.mean() - (mass * moment(x)).sum()) < 4 * values.std() / np.sqrt(len(draws))
    energy = 1.3 * _energy(Quartic(1.3, 10).sample(np.random.default_rng(10), 50_000))
    assert stats.kstest(energy, stats.gamma(2.5).cdf).pvalue > 1e-3


@pytest.mark.slow
def test_langevin_chains_have_the_moments_of_quadrature():
    wells = ExponentialFamily(Polynomial(degree=4), (0.3, 2.0, 0.0, -1.0))
    draws, grid = wells.sample(np.random.default_rng(11), 4000), np.linspace(-4, 4, 2001)
    mass = np.exp(wells.unnormalised_log_density(grid))
    mass /= mass.sum()
    for power in (1, 2, 4):
        values = draws**power
        assert abs(values.mean() - mass @ grid**power) < 4 * values.std() / np.sqrt(4000)
    assert stats.kstest(draws, lambda x: np.interp(x, grid, np.cumsum(mass))).pvalue > 1e-3


@pytest.mark.slow
def test_langevin_chains_of_vectors_agree_with_exact_draws_from_a_distant_start():
    law = Quartic(0.7, 2)
    start = np.array([[30.0, -30.0]])
    chains = ExponentialFamily(QuarticFeature(2), (0.7,)).sample(np.random.default_rng(12), 4000, start=start)
    exact = law.sample(np.random.default_rng(13), 4000)
    for k in range(2):
        assert stats.ks_2samp(chains[:, k], exact[:, k]).pvalue > 1e-3
    assert stats.ks_2samp(_energy(chains), _energy(exact)).pvalue > 1e-3


def test_chains_of_no_law_run_away_and_are_refused():
    with pytest.raises(ValueError, match="no finite integral"):
        ExponentialFamily(Polynomial(degree=2), (0.0, 0.5)).sample(np.random.default_rng(0), 10)


@pytest.mark.parametrize("features", [Polynomial(degree=4), Polynomial(degree=3, dimension=3), QuarticFeature(), QuarticFeature(3)])
def test_features_have_the_derivatives_they_claim(features):
    x, h = np.random.default_rng(14).normal(size=(5, *([features.dimension] * bool(features.dimension)))), 1e-4
    steps = h * np.eye(features.dimension) if features.dimension else [h]
    gradients = np.stack([(features.values(x + e) - features.values(x - e)) / (2 * h) for e in steps], axis=-1)
    np.testing.assert_allclose(features.gradients(x), gradients if features.dimension else gradients[..., 0], atol=1e-6)
    bends = sum((features.values(x + e) - 2 * features.values(x) + features.values(x - e)) / h**2 for e in steps)
    np.testing.assert_allclose(features.laplacians(x), bends, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Quartic(0.0), "tau must be positive"),
        (lambda: Quartic(float("nan")), "tau must be positive"),
        (lambda: Quartic(1.0, -1), "dimension"),
        (lambda: Polynomial(degree=0), "degree"),
        (lambda: ExponentialFamily(Polynomial(degree=2), (1.0,)), r"shape \(2,\)"),
        (lambda: ExponentialFamily(Polynomial(degree=2), (1.0, float("nan"))), "finite"),
        (lambda: fit_exponential(Polynomial(degree=2), np.ones(50)), "tell the 2 features apart"),
        (lambda: fit_exponential(Polynomial(degree=2, dimension=2), np.random.default_rng(0).normal(size=(2, 2))), "2 observations"),
        (lambda: fit_exponential(Polynomial(degree=2), [0.0, np.nan]), "finite observations"),
        (lambda: fit_exponential(Polynomial(degree=2), np.zeros((5, 2))), "finite observations"),
        (lambda: Quartic.fit(np.empty(0)), "finite observations"),
    ],
)
def test_impossible_families_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
