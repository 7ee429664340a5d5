import pickle

import numpy as np
import pytest
from scipy import integrate, stats

from detection import Gaussian, Law, fisher_divergence, hyvarinen_score
from detection.exponential import ExponentialFamily, Polynomial, Quartic
from detection.laws import GaussianStreams, NormalisedLaw, ScoredLaw
from detection.mixtures import KernelDensity, Mixture
from detection.rbm import GaussBernoulliRBM

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


def _family() -> dict[str, object]:
    rng = np.random.default_rng(11)
    return {
        "numbers": LAWS[0],
        "diagonal": LAWS[1],
        "full": LAWS[2],
        "exponential family of numbers": ExponentialFamily(Polynomial(degree=4), (0.3, 1.0, 0.0, -1.0)),
        "exponential family of vectors": ExponentialFamily(Polynomial(degree=2, dimension=2), (0.2, 0.0, -0.7, 0.3, -0.5)),
        "quartic numbers": Quartic(0.7),
        "quartic vectors": Quartic(1.3, 4),
        "mixture of numbers": Mixture([Gaussian(-2.0, 0.5), Gaussian(1.0, 2.0), Quartic(1.0)], [0.3, 0.5, 0.2]),
        "mixture of vectors": Mixture([LAWS[2], Gaussian((0.0, 1.0, -2.0), 0.5)], [0.6, 0.4]),
        "kernel density of numbers": KernelDensity(rng.normal(size=30)),
        "kernel density of vectors": KernelDensity(rng.normal(size=(30, 2)) * (1.0, 5.0), (0.5, 2.0)),
        "small machine": GaussBernoulliRBM(rng.normal(size=(3, 4)), rng.normal(size=3), rng.normal(size=4)),
    }


FAMILY = _family()
every_law = pytest.mark.parametrize("law", FAMILY.values(), ids=FAMILY.keys())


def _log_density(law, x: np.ndarray) -> np.ndarray:
    return (getattr(law, "unnormalised_log_density", None) or law.log_density)(x)


def _derivative(function, x: np.ndarray, dimension: int, h: float = 1e-4) -> np.ndarray:
    """Central differences: the last axis counts coordinates."""
    steps = h * np.eye(dimension) if dimension else np.array([h])
    return np.stack([(function(x + e) - function(x - e)) / (2 * h) for e in steps], axis=-1)


@every_law
def test_the_score_of_every_law_is_a_gradient_and_its_laplacian_a_divergence(law):
    x = _points(law)
    gradient = _derivative(lambda y: _log_density(law, y), x, law.dimension)
    np.testing.assert_allclose(law.score(x), gradient if law.dimension else gradient[:, 0], rtol=1e-6, atol=1e-6)
    jacobian = _derivative(law.score, x, law.dimension)
    divergence = np.trace(jacobian, axis1=1, axis2=2) if law.dimension else jacobian[:, 0]
    np.testing.assert_allclose(law.laplacian(x), divergence, rtol=1e-6, atol=1e-6)
    square = law.score(x) ** 2
    np.testing.assert_allclose(law.hyvarinen(x), 0.5 * (square.sum(-1) if law.dimension else square) + law.laplacian(x), rtol=1e-12)
    assert isinstance(law, Law)


@every_law
def test_draws_of_every_law_obey_the_identities_of_its_score(law):
    draws = law.sample(np.random.default_rng(4), 3000 if isinstance(law, ExponentialFamily) else 40_000)
    score = law.score(draws).reshape(len(draws), -1)
    stein = (score**2).sum(axis=1) + law.laplacian(draws)
    for values in (*score.T, stein):
        assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(draws)) + 1e-12


@every_law
def test_a_row_has_the_same_bits_alone_in_company_and_in_another_order(law):
    x = _points(law, 37)
    order = np.random.default_rng(5).permutation(37)
    for function in (law.score, law.laplacian, law.hyvarinen, lambda y: _log_density(law, y)):
        whole = function(x)
        np.testing.assert_array_equal(np.concatenate([function(x[i : i + 1]) for i in range(37)]), whole)
        np.testing.assert_array_equal(function(x[order]), whole[order])
        np.testing.assert_array_equal(function(np.asfortranarray(x)), whole)


@every_law
def test_every_law_takes_single_observations_and_leading_axes(law):
    x = _points(law, 6)
    shaped = x.reshape(2, 3, *x.shape[1:])
    assert law.score(shaped).shape == shaped.shape
    assert law.laplacian(shaped).shape == law.hyvarinen(shaped).shape == _log_density(law, shaped).shape == (2, 3)
    np.testing.assert_allclose(law.score(x[0]), law.score(x)[0], rtol=1e-12)
    assert np.shape(law.hyvarinen(x[0])) == np.shape(law.laplacian(x[0])) == np.shape(_log_density(law, x[0])) == ()
    assert law.score(x[:0]).shape == x[:0].shape
    assert law.sample(np.random.default_rng(0), 5).shape == x[:5].shape
    if law.dimension:
        with pytest.raises(ValueError, match=rf"\(\.\.\., {law.dimension}\)"):
            law.score(np.zeros((5, law.dimension + 1)))


@every_law
def test_every_law_survives_pickling_equal_and_leaves_its_input_alone(law):
    x = _points(law)
    before = x.copy()
    values = law.hyvarinen(x)
    again = pickle.loads(pickle.dumps(law))
    assert again == law
    assert hash(again) == hash(law)
    np.testing.assert_array_equal(again.hyvarinen(x), values)
    np.testing.assert_array_equal(x, before)
    assert len({repr(other) for other in FAMILY.values()}) == len(set(FAMILY.values())) == len(FAMILY)


@pytest.mark.parametrize("law", [law for law in FAMILY.values() if isinstance(law, NormalisedLaw)])
def test_a_density_integrates_to_one(law):
    if law.dimension == 0:
        total = integrate.quad(lambda x: np.exp(float(law.log_density(np.array(x)))), -15, 15, points=(-2, 0, 2), limit=200)[0]
        assert total == pytest.approx(1.0, abs=1e-8)
        return
    broad = Gaussian(
        np.mean(law.sample(np.random.default_rng(0), 2000), axis=0), 1.5 * np.cov(law.sample(np.random.default_rng(1), 2000).T)
    )
    x = broad.sample(np.random.default_rng(6), 200_000)
    weight = np.exp(law.log_density(x) - broad.log_density(x))
    assert abs(weight.mean() - 1.0) < 4 * weight.std() / np.sqrt(len(x)) + 1e-12


def test_a_law_of_ones_own_needs_its_terms_and_a_sampler():
    class Laplace(ScoredLaw):
        dimension = 0

        def _terms(self, x):
            return -np.tanh(x), -1.0 / np.cosh(x) ** 2

        def sample(self, rng, num):
            return np.arcsinh(np.tan(np.pi * (rng.random(num) - 0.5)))

    assert isinstance(Laplace(), Law)
    np.testing.assert_allclose(Laplace().hyvarinen(np.array([0.0, 30.0])), [-1.0, 0.5])


def _streams(shape=(5,)) -> GaussianStreams:
    rng = np.random.default_rng(7)
    return GaussianStreams(rng.normal(size=shape), rng.uniform(0.5, 2.0, size=shape))


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_streams_are_as_many_gaussians(shape):
    laws = _streams(shape)
    singles = [Gaussian(m, v) for m, v in zip(laws.mean.tolist(), laws.variance.tolist(), strict=True)]
    x = laws.sample(np.random.default_rng(8), 4)
    assert x.shape == (4, *shape)
    assert len(laws) == 5
    for name in ("score", "laplacian", "hyvarinen", "log_density"):
        together = getattr(laws, name)(x)
        apart = np.stack([getattr(single, name)(x[:, i]) for i, single in enumerate(singles)], axis=1)
        np.testing.assert_allclose(together, apart, rtol=1e-12)
        np.testing.assert_array_equal(getattr(laws, name)(x[2]), together[2])
    assert isinstance(laws, Law)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_a_block_of_streams_has_the_bits_of_the_whole(shape):
    laws = _streams(shape)
    x = laws.sample(np.random.default_rng(9), 2)
    for selection in (slice(1, 4), np.array([4, 0, 2]), np.array([True, False, True, True, False])):
        np.testing.assert_array_equal(laws.rows(selection).hyvarinen(x[:, selection]), laws.hyvarinen(x)[:, selection])
    assert laws.rows(slice(None)) == laws == pickle.loads(pickle.dumps(laws))
    assert len({laws, laws.rows(slice(None)), laws.rows(slice(0, 2))}) == 2


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_draws_of_streams_obey_the_identities_of_their_scores(shape):
    laws = _streams(shape)
    draws = laws.sample(np.random.default_rng(10), 20_000)
    score = laws.score(draws)
    stein = (score**2 if len(shape) == 1 else (score**2).sum(axis=-1)) + laws.laplacian(draws)
    for values in (score, stein):
        assert (np.abs(values.mean(axis=0)) < 4 * values.std(axis=0) / np.sqrt(len(draws))).all()


def test_streams_share_a_variance_or_have_one_for_all_coordinates():
    mean = np.zeros((2, 3))
    assert GaussianStreams(mean, 2.0) == GaussianStreams(mean, np.full((2, 3), 2.0))
    assert GaussianStreams(mean, [1.0, 2.0]) == GaussianStreams(mean, [[1.0] * 3, [2.0] * 3])


@pytest.mark.parametrize(
    ("mean", "variance", "message"),
    [
        ([0.0, 0.0], [1.0, 0.0], "variance must be finite and positive, got 0.0 at 1"),
        ([0.0, np.nan], [1.0, 1.0], "mean must be finite, got nan at 1"),
        ([0.0, 0.0], [1.0, 1.0, 1.0], r"got \(2,\) and \(3,\)"),
        (0.0, 1.0, "must be"),
        ([], [], "must be"),
        ([0.0, 0.0], -1.0, "positive, got -1.0 at 0"),
    ],
)
def test_impossible_streams_are_refused(mean, variance, message):
    with pytest.raises(ValueError, match=message):
        GaussianStreams(mean, variance)


def test_streams_refuse_observations_of_other_streams():
    with pytest.raises(ValueError, match=r"\(\.\.\., 5\), got \(4,\)"):
        _streams().score(np.zeros(4))
    with pytest.raises(ValueError, match=r"\(\.\.\., 5, 3\), got \(5,\)"):
        _streams((5, 3)).score(np.zeros(5))
    with pytest.raises(ValueError, match="got"):
        _streams().rows(slice(5, 5))
