import numpy as np
import pytest
from scipy import integrate, stats

from detection import Gaussian, Law, fisher_divergence, hyvarinen_score

LAWS = [
    Gaussian(0.4, 2.5),
    Gaussian((0.5, -1.0), (2.0, 0.7)),
    Gaussian((0.5, -1.0, 2.0), ((2.0, 0.3, 0.1), (0.3, 1.0, -0.4), (0.1, -0.4, 1.5))),
]


def _points(law: Gaussian, num: int = 7) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(num, law.dimension) if law.dimension else num)


@pytest.mark.parametrize("law", LAWS)
def test_score_and_laplacian_are_the_derivatives_of_the_log_density(law):
    x, h = _points(law), 1e-4
    if law.dimension == 0:
        score = (law.log_density(x + h) - law.log_density(x - h)) / (2 * h)
        laplacian = (law.score(x + h) - law.score(x - h)) / (2 * h)
    else:
        steps = h * np.eye(law.dimension)
        score = np.stack([(law.log_density(x + e) - law.log_density(x - e)) / (2 * h) for e in steps], axis=-1)
        laplacian = sum((law.score(x + e) - law.score(x - e))[:, k] / (2 * h) for k, e in enumerate(steps))
    np.testing.assert_allclose(law.score(x), score, atol=1e-7)
    np.testing.assert_allclose(law.laplacian(x), laplacian, atol=1e-7)


@pytest.mark.parametrize("law", LAWS)
def test_log_density_and_samples_agree_with_scipy(law):
    x = _points(law)
    reference = stats.multivariate_normal(np.atleast_1d(law.mean), law.covariance)
    np.testing.assert_allclose(law.log_density(x), reference.logpdf(x if law.dimension else x[:, None]), rtol=1e-12)
    draws = law.sample(np.random.default_rng(2), 200_000)
    np.testing.assert_allclose(draws.mean(axis=0), law.mean, atol=0.02)
    np.testing.assert_allclose(np.cov(draws.T), law.covariance if law.dimension else law.variance, atol=0.03)


@pytest.mark.parametrize("law", LAWS)
def test_hyvarinen_score_is_half_the_squared_score_plus_the_laplacian(law):
    x = _points(law)
    square = law.score(x) ** 2
    np.testing.assert_allclose(law.hyvarinen(x), 0.5 * (square.sum(-1) if law.dimension else square) + law.laplacian(x), rtol=1e-13)
    assert isinstance(law, Law)


def test_hyvarinen_score_of_a_scalar_law():
    np.testing.assert_array_equal(hyvarinen_score(np.array([2.0, 0.0]), np.array([-1.0, -1.0])), [1.0, -1.0])


def test_fisher_divergence_is_half_the_mean_squared_difference_of_scores():
    p, q = Gaussian(0.3, 1.7), Gaussian(-0.5, 0.8)
    integral, _ = integrate.quad(lambda x: 0.5 * float(p.score(x) - q.score(x)) ** 2 * np.exp(float(p.log_density(x))), -20, 20)
    assert fisher_divergence(p, q) == pytest.approx(integral, rel=1e-9)


def test_fisher_divergence_of_vectors_is_that_of_samples_and_adds_over_independent_coordinates():
    p, q = LAWS[2], Gaussian((0.0, 0.0, 0.0), 1.0)
    draws = p.sample(np.random.default_rng(3), 200_000)
    assert fisher_divergence(p, q) == pytest.approx(0.5 * ((p.score(draws) - q.score(draws)) ** 2).sum(-1).mean(), rel=0.02)
    pair = Gaussian((0.3, 1.0), (1.7, 2.0)), Gaussian((-0.5, 0.0), (0.8, 1.0))
    parts = fisher_divergence(Gaussian(0.3, 1.7), Gaussian(-0.5, 0.8)) + fisher_divergence(Gaussian(1.0, 2.0), Gaussian(0.0, 1.0))
    assert fisher_divergence(*pair) == pytest.approx(parts, rel=1e-12)


def test_laws_compare_and_hash_by_value():
    assert Gaussian(np.zeros(2), np.eye(2)) == Gaussian((0, 0), ((1, 0), (0, 1)))
    assert len({Gaussian(0, 1), Gaussian(0.0, 1.0)}) == 1


@pytest.mark.parametrize(
    ("mean", "variance", "message"),
    [
        (0.0, 0.0, "variance must be positive"),
        (0.0, (1.0, 2.0), "must be a number, "),
        ((0.0, 0.0), ((1.0, 2.0), (2.0, 1.0)), "positive definite"),
        ((0.0, 0.0), ((1.0, 0.5), (0.1, 1.0)), "symmetric"),
        (float("nan"), 1.0, "finite"),
    ],
)
def test_impossible_laws_are_refused(mean, variance, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(mean, variance)


def test_observations_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"\(\.\.\., 2\)"):
        LAWS[1].score(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="one dimension"):
        fisher_divergence(LAWS[0], LAWS[1])
