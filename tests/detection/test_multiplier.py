import numpy as np
import pytest
from scipy import integrate, stats

from detection import Gaussian, ScoreCUSUM, exact_run_length, likelihood_increment, multiplier_for, positive_root, score_increment
from detection.increment import QuadraticForm

NULL = Gaussian(0.0, 1.0)


@pytest.mark.parametrize("v", [0.3, 1.0, 2.7])
def test_equal_variances_have_their_variance_as_multiplier(v):
    assert positive_root(score_increment(Gaussian(0.0, v), Gaussian(1.0, v)), Gaussian(0.0, v)) == pytest.approx(v, rel=1e-12)


@pytest.mark.parametrize(("v", "root"), [(2.0, 0.605860), (1.5, 0.564657), (4.0, 0.684780)])
def test_variance_changes_have_the_known_multipliers(v, root):
    increment = score_increment(NULL, Gaussian(0.0, v))
    lam = positive_root(increment, NULL)
    a, c = 0.5 * (1 - 1 / v**2), 1 / v - 1
    assert lam == pytest.approx(root, abs=5e-7)
    assert np.exp(lam * c) / np.sqrt(1 - 2 * a * lam) == pytest.approx(1.0, abs=1e-9)


def test_a_million_samples_agree_with_the_closed_form():
    increment = score_increment(NULL, Gaussian(0.5, 1.3))
    lam = positive_root(increment, NULL)
    assert np.exp(lam * increment(NULL.sample(np.random.default_rng(0), 10**6))).mean() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("clip", [None, 1.5, 4.0])
@pytest.mark.parametrize(("null", "post"), [(Gaussian(0.2, 1.4), Gaussian(1.0, 2.0)), (Gaussian(0.0, 1.0), Gaussian(0.8, 0.7))])
def test_drift_and_exponential_moment_are_those_of_the_clipped_observation(null, post, clip):
    increment = score_increment(null, post, clip)
    unit = stats.norm(null.mean, np.sqrt(null.variance))

    def expectation(f):
        low, high = (-clip, clip) if clip else (-12.0, 12.0)
        inside, _ = integrate.quad(lambda x: f(float(increment(np.array([x]))[0])) * unit.pdf(x), low, high, epsabs=1e-13)
        ends = increment(np.array([low, high]))
        return inside + (f(ends[0]) * unit.cdf(low) + f(ends[1]) * unit.sf(high) if clip else 0.0)

    lam = positive_root(increment, null)
    assert increment.mean(null) == pytest.approx(expectation(lambda z: z), rel=1e-8)
    assert expectation(lambda z: np.exp(lam * z)) == pytest.approx(1.0, abs=1e-9)


def test_the_multiplier_of_several_laws_is_the_least_of_their_roots():
    increment, laws = score_increment(NULL, Gaussian(1.0, 1.0)), [Gaussian(m, v) for m in (-0.2, 0.0, 0.2) for v in (0.8, 1.0, 1.25)]
    lam = multiplier_for(increment, laws)
    assert lam == min(positive_root(increment, law) for law in laws)
    assert max(increment.log_moment(law, lam) for law in laws) == pytest.approx(0.0, abs=1e-12)


def test_a_clipped_likelihood_ratio_keeps_a_unit_exponential_moment_only_with_its_own_multiplier():
    increment = likelihood_increment(NULL, Gaussian(0.0, 0.5), clip=1.5)
    assert increment.log_moment(NULL) != pytest.approx(0.0, abs=1e-3)
    assert increment.log_moment(NULL, positive_root(increment, NULL)) == pytest.approx(0.0, abs=1e-12)


def test_vector_laws_have_the_closed_multiplier_of_a_linear_statistic():
    covariance = np.array([[2.0, 0.5], [0.5, 1.0]])
    pre, post = Gaussian((0.0, 0.0), covariance), Gaussian((1.0, -0.5), covariance)
    d, inverse = np.array([1.0, -0.5]), np.linalg.inv(covariance)
    expected = (d @ inverse @ inverse @ d) / (d @ inverse @ inverse @ inverse @ d)
    assert positive_root(score_increment(pre, post), pre) == pytest.approx(expected, rel=1e-10)


def test_moments_of_vector_quadratics_agree_with_samples_and_with_the_scalar_form():
    law = Gaussian((0.3, -0.2), ((1.0, 0.4), (0.4, 2.0)))
    increment = QuadraticForm(curvature=((0.05, 0.02), (0.02, -0.1)), slope=(0.3, -0.1), offset=0.2)
    z = increment(law.sample(np.random.default_rng(0), 10**6))
    assert increment.mean(law) == pytest.approx(z.mean(), rel=0.01)
    assert increment.log_moment(law) == pytest.approx(np.log(np.exp(z).mean()), rel=0.01)
    scalar, pre, post = Gaussian(0.3, 1.4), Gaussian(0.0, 1.0), Gaussian(1.0, 2.0)
    vector = [Gaussian((g.mean,), (g.variance,)) for g in (pre, post, scalar)]
    assert score_increment(vector[0], vector[1]).log_moment(vector[2], 0.4) == pytest.approx(
        score_increment(pre, post).log_moment(scalar, 0.4)
    )


@pytest.mark.parametrize("post", [Gaussian(1.0, 1.0), Gaussian(0.0, 2.0), Gaussian(0.7, 0.8)])
def test_false_alarms_are_rarer_than_the_exponential_of_the_threshold(post):
    lam = positive_root(score_increment(NULL, post, 4.0), NULL)
    for threshold in (2.0, 4.0, 6.0):
        detector = ScoreCUSUM(pre=NULL, post=post, multiplier=lam, threshold=threshold, clip=4.0)
        assert exact_run_length(detector.increment, NULL, threshold) >= np.exp(threshold)


def test_a_statistic_that_drifts_up_in_control_has_no_multiplier():
    with pytest.raises(ValueError, match=r"drifts by \+0\.5 under Gaussian\(mean=1\.0"):
        positive_root(score_increment(NULL, Gaussian(1.0, 1.0)), Gaussian(1.0, 1.0))


def test_a_statistic_that_never_rises_has_no_multiplier():
    increment = QuadraticForm(curvature=((-1.0,),), slope=(0.0,), offset=-0.1)
    with pytest.raises(ValueError, match="never alarms in control"):
        positive_root(increment, Gaussian((0.0,), (1.0,)))
