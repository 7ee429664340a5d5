import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import Gaussian, ScoreCUSUM, Singleton, exact_run_length, exact_threshold, likelihood_increment, score_increment
from detection.increment import QuadraticForm
from detection.mixtures import KernelDensity, Mixture
from detection.rbm import GaussBernoulliRBM
from detection.whitening import PreconditionedDifference, Whitening, jacobian_of, preconditioned_increment

CORRELATED = np.array([[2.0, 0.7], [0.7, 1.0]])


def delays(covariance, shift):
    """Exact delays at ARL 1,000: raw stream, whitened stream, preconditioned score."""
    pre, post, whitening = Gaussian((0.0, 0.0), covariance), Gaussian(shift, covariance), Whitening.of(covariance)
    found = []
    for before, after in ((pre, post), (whitening.law(pre), whitening.law(post))):
        detector = ScoreCUSUM.fit(pre=Singleton(before), post=Singleton(after), arl=1000, clip=None)
        found.append(exact_run_length(detector.increment, after, detector.threshold))
    increment = preconditioned_increment(pre, post, whitening.precondition)
    return *found, exact_run_length(increment, post, exact_threshold(increment, (pre,), 1000))


@pytest.mark.parametrize(
    ("covariance", "shift", "raw", "whitened"),
    [
        (np.diag([1.0, 25.0]), (0.5, 5.0), 24.9, 8.78),
        (np.array([[1.0, 0.9], [0.9, 1.0]]), (0.5, 0.0), 8.75, 8.43),
        (2.0 * np.eye(2), (0.8, 0.3), None, None),
    ],
)
def test_whitening_and_preconditioning_give_the_known_delays(covariance, shift, raw, whitened):
    found = delays(covariance, shift)
    if raw is None:
        assert found[0] == pytest.approx(found[1], rel=1e-6)
    else:
        assert found[:2] == pytest.approx((raw, whitened), abs=0.05)
    assert found[2] == pytest.approx(found[1], rel=1e-6)


def test_a_preconditioned_score_is_the_score_of_the_whitened_stream():
    rng, whitening = np.random.default_rng(0), Whitening.of(CORRELATED)
    pre, post = Gaussian((0.1, -0.2), CORRELATED), Gaussian((1.0, 0.5), ((1.0, -0.3), (-0.3, 2.0)))
    x = rng.standard_normal((200, 2)) * 2
    plain = score_increment(whitening.law(pre), whitening.law(post))(whitening(x))
    assert_allclose(preconditioned_increment(pre, post, whitening.precondition)(x), plain, atol=1e-10)
    mixed = Mixture((pre, post), (0.4, 0.6))
    white = Mixture((whitening.law(pre), whitening.law(post)), (0.4, 0.6))
    assert_allclose(
        preconditioned_increment(pre, mixed, whitening.precondition)(x),
        score_increment(whitening.law(pre), white)(whitening(x)),
        atol=1e-9,
    )


def test_the_covariance_as_matrix_makes_the_log_likelihood_ratio():
    pre, post = Gaussian((0.0, 0.0), CORRELATED), Gaussian((0.4, -1.0), CORRELATED)
    increment, ratio = preconditioned_increment(pre, post, CORRELATED), likelihood_increment(pre, post)
    x = np.random.default_rng(0).standard_normal((100, 2)) * 3
    assert_allclose(increment(x), ratio(x), atol=1e-12)
    assert increment.log_moment(pre) == pytest.approx(0.0, abs=1e-12)


def test_the_quadratic_of_two_gaussians_equals_the_general_increment():
    pre, post = Gaussian((0.0, 0.3), CORRELATED), Gaussian((0.4, -1.0), (1.0, 3.0))
    matrix = np.array([[1.0, 0.2], [0.2, -0.5]])
    exact = preconditioned_increment(pre, post, matrix, offset=0.3)
    general = PreconditionedDifference(pre=pre, post=post, matrix=exact_matrix(matrix), offset=0.3)
    x = np.random.default_rng(0).standard_normal((50, 2))
    assert isinstance(exact, QuadraticForm)
    assert_allclose(general.scaled(0.7)(x), exact.scaled(0.7)(x), atol=1e-12)
    number = preconditioned_increment(Gaussian(0.0, 1.0), Gaussian(1.0, 2.0), [[1.5]], offset=0.1, clip=4.0)
    y = np.linspace(-6, 6, 25)
    assert_allclose(number(y), 1.5 * score_increment(Gaussian(0.0, 1.0), Gaussian(1.0, 2.0), 4.0)(y) + 0.1, atol=1e-12)


def exact_matrix(matrix):
    return tuple(map(tuple, matrix.tolist()))


@pytest.mark.parametrize(
    "law",
    [
        Gaussian((0.0, 1.0, -1.0), ((1.0, 0.3, 0.0), (0.3, 2.0, 0.1), (0.0, 0.1, 0.5))),
        Mixture((Gaussian((0.0, 0.0, 0.0), 1.0), Gaussian((1.0, 2.0, 0.0), (1.0, 2.0, 0.5))), (0.3, 0.7)),
        GaussBernoulliRBM(np.random.default_rng(0).standard_normal((3, 4)), np.zeros(3), np.ones(4)),
        KernelDensity(np.random.default_rng(1).standard_normal((20, 3)), 0.8),
    ],
    ids=lambda law: type(law).__name__,
)
def test_jacobians_have_the_laplacian_as_trace_and_agree_with_differences_of_the_score(law):
    x = np.random.default_rng(2).standard_normal((30, 3))
    jacobian = jacobian_of(law, x)
    assert_allclose(np.trace(jacobian, axis1=1, axis2=2), law.laplacian(x), rtol=1e-6, atol=1e-7)
    step = 1e-4
    for j in range(3):
        ahead, behind = x + step * np.eye(3)[j], x - step * np.eye(3)[j]
        assert_allclose(jacobian[:, :, j], (law.score(ahead) - law.score(behind)) / (2 * step), rtol=1e-5, atol=1e-6)


def test_a_law_may_bring_its_own_jacobian():
    class Own:
        def jacobian(self, x):
            return np.full((len(x), 2, 2), 7.0)

    assert_array_equal(jacobian_of(Own(), np.zeros((3, 2))), np.full((3, 2, 2), 7.0))


def test_a_batch_is_bit_equal_to_its_rows():
    laws = Mixture((Gaussian((0.0, 0.0), 1.0), Gaussian((1.0, 2.0), 1.5)), (0.3, 0.7)), GaussBernoulliRBM(np.eye(2), np.ones(2), np.ones(2))
    increment = preconditioned_increment(*laws, [[1.0, 0.3], [0.3, 2.0]])
    x = np.random.default_rng(0).standard_normal((40, 2))
    assert_array_equal(increment(x), np.concatenate([increment(x[[k]]) for k in range(40)]))


def test_data_are_whitened_to_unit_covariance():
    x = Gaussian((3.0, 1.0), CORRELATED).sample(np.random.default_rng(0), 5_000)
    whitening = Whitening.of_data(x)
    assert_allclose(np.cov(whitening(x).T), np.eye(2), atol=1e-10)
    assert_allclose(whitening.precondition, np.cov(x.T), atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Whitening.of([[1.0, 1.0], [1.0, 1.0]]), "positive definite"),
        (lambda: Whitening.of([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (lambda: Whitening.of(np.zeros((5, 2))), r"use Whitening\.of_data"),
        (lambda: Whitening.of_data(np.zeros((2, 2))), "n > d"),
        (lambda: Whitening.of_data(np.ones((20, 2))), "drop constant"),
        (lambda: Whitening(((1.0, 0.0), (0.0, 0.0))), "invertible"),
        (lambda: preconditioned_increment(Gaussian((0.0, 0.0), 1.0), Gaussian((1.0, 0.0), 1.0), np.eye(3)), r"shape \(2, 2\)"),
        (lambda: preconditioned_increment(Gaussian((0.0, 0.0), 1.0), Gaussian((1.0,), 1.0), np.eye(2)), "one dimension"),
    ],
)
def test_impossible_maps_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
