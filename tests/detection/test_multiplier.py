import numpy as np
import pytest
from scipy import integrate, stats

from detection import Gaussian, ScoreCUSUM, exact_run_length, likelihood_increment, multiplier_for, positive_root, score_increment
from detection.hulls import ObservedLaw
from detection.increment import Quadratic, QuadraticForm, ScoreDifference
from detection.mixtures import Mixture
from detection.multiplier import certified_multiplier

NULL = Gaussian(0.0, 1.0)


class Student:
    """Student's t scaled to unit variance, with or without its density."""

    def __init__(self, freedom):
        self.law = stats.t(freedom, scale=np.sqrt((freedom - 2) / freedom))
        self.freedom, self.dimension = freedom, 0

    def score(self, x):
        scaled = x / self.law.kwds["scale"]
        return -(self.freedom + 1) * scaled / (self.freedom + scaled**2) / self.law.kwds["scale"]

    def laplacian(self, x):
        return np.gradient(self.score(x), x)

    def hyvarinen(self, x):
        return 0.5 * self.score(x) ** 2 + self.laplacian(x)

    def sample(self, rng, num):
        return self.law.rvs(num, random_state=rng)


class DenseStudent(Student):
    def log_density(self, x):
        return self.law.logpdf(x)


def drawn(law, num, seed=0):
    return ObservedLaw(law, law.sample(np.random.default_rng(seed), num))


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


@pytest.mark.parametrize(("v", "root"), [(2.0, 0.605860), (1.5, 0.564657), (4.0, 0.684780)])
def test_quadrature_finds_the_known_multipliers(v, root):
    generic = ScoreDifference(pre=NULL, post=Gaussian(0.0, v))
    found = certified_multiplier(generic, [NULL])
    assert found.value == pytest.approx(root, abs=5e-7)
    assert (found.num, found.error, found.standard_error) == (0, 0.0, 0.0)
    assert found.moment == pytest.approx(1.0, abs=1e-9)


def test_a_mixture_has_a_multiplier_whose_moment_is_one_by_an_independent_integral():
    null, post = Mixture((Gaussian(-1.0, 0.5), Gaussian(1.0, 2.0)), (0.3, 0.7)), Gaussian(3.0, 2.0)
    for clip in (None, 2.0):
        increment = ScoreDifference(pre=null, post=post, clip=clip)
        lam = multiplier_for(increment, [null])

        def integrand(x, increment=increment, lam=lam):
            return float(np.exp(lam * increment(np.array([x])) + null.log_density(np.array([x])))[0])

        pieces = [integrate.quad(integrand, a, b, epsabs=1e-13, limit=200)[0] for a, b in ((-25, -2), (-2, 0), (0, 2), (2, 8), (8, 25))]
        assert sum(pieces) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("post", [Gaussian(0.0, 2.0), Gaussian(0.0, 4.0), Gaussian(3.0, 1.0)])
def test_the_multiplier_from_draws_is_below_the_true_one_as_often_as_stated(post):
    true, generic = positive_root(score_increment(NULL, post), NULL), ScoreDifference(pre=NULL, post=post)
    found = [certified_multiplier(generic, [drawn(NULL, 10_000, seed)]) for seed in range(150)]
    assert np.mean([one.value <= true for one in found]) >= 0.97
    assert all(one.value <= one.root for one in found)
    assert np.mean([one.value for one in found]) >= 0.7 * true


def test_the_moment_is_checked_on_draws_that_did_not_place_the_root():
    law = Gaussian((0.0, 0.0), 1.0)
    increment = ScoreDifference(pre=law, post=Gaussian((1.0, 0.0), 1.0))
    found = certified_multiplier(increment, [law], rng=np.random.default_rng(0), num=50_000)
    assert 0.9 < found.value < found.root
    assert found.error == found.root - found.value
    assert abs(found.root - 1.0) < 0.05
    true = np.exp(0.5 * (found.value**2 - found.value))
    assert abs(found.moment - true) < 4 * found.standard_error


def test_heavy_tails_have_a_sample_root_that_falls_with_more_data_and_is_refused():
    increment, law = score_increment(NULL, Gaussian(0.0, 2.0)), Student(3)
    x = law.sample(np.random.default_rng(0), 10**6)
    roots = []
    for num in (10**4, 10**5, 10**6):
        z = increment(x[:num])

        def moment(lam, z=z):
            return (lam * z).max() + np.log(np.exp(lam * z - (lam * z).max()).mean())

        low, high = 1e-9, 1.0
        while high - low > 1e-6:
            low, high = ((low + high) / 2, high) if moment((low + high) / 2) < 0 else (low, (low + high) / 2)
        roots.append(low)
        with pytest.raises(ValueError, match=r"clip or transform the stream: .* ten hold"):
            certified_multiplier(increment, [ObservedLaw(law, x[:num])])
    assert roots[0] < 0.05
    assert roots[2] < roots[0] / 3


def test_clipped_heavy_tails_have_a_stable_multiplier():
    clipped, law = score_increment(NULL, Gaussian(0.0, 2.0), clip=4.0), Student(3)
    roots = [certified_multiplier(clipped, [drawn(law, num)]).root for num in (10**4, 10**5, 10**6)]
    true = certified_multiplier(clipped, [DenseStudent(3)]).value
    assert true == pytest.approx(0.4155, abs=1e-3)
    for root, tolerance in zip(roots, (0.04, 0.013, 0.004), strict=True):  # three standard errors of each
        assert root == pytest.approx(true, abs=tolerance)


def test_an_infinite_moment_is_recognised_by_quadrature():
    with pytest.raises(ValueError, match="E exp\\(lam z\\) is infinite"):
        certified_multiplier(score_increment(NULL, Gaussian(0.0, 2.0)), [DenseStudent(3)])
    with pytest.raises(ValueError, match="E exp\\(lam z\\) is infinite"):
        certified_multiplier(score_increment(NULL, Gaussian(1.0, 1.0)), [DenseStudent(5)])


@pytest.mark.parametrize("post", [Gaussian(1.0, 1.0), Gaussian(2.0, 1.0), Gaussian(0.0, 1.5), Gaussian(0.0, 4.0), Gaussian(0.0, 0.5)])
def test_light_tails_are_never_refused(post):
    increment = ScoreDifference(pre=NULL, post=post)
    for seed in range(20):
        assert certified_multiplier(increment, [drawn(NULL, 10_000, seed)]).value > 0


def test_a_density_that_is_not_normalised_is_an_error():
    class Half(DenseStudent):
        def log_density(self, x):
            return super().log_density(x) - np.log(2.0)

    with pytest.raises(ValueError, match=r"log_density must integrate to 1 .* off by 0\.5"):
        certified_multiplier(score_increment(NULL, Gaussian(1.0, 1.0)), [Half(5)])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: certified_multiplier(score_increment(NULL, Gaussian(1.0, 1.0)), []), "at least one law"),
        (lambda: certified_multiplier(score_increment(NULL, Gaussian(1.0, 1.0)), [NULL], confidence=1.0), "confidence must lie"),
        (lambda: certified_multiplier(score_increment(NULL, Gaussian(1.0, 1.0)), [Student(5)]), "pass rng"),
        (lambda: certified_multiplier(score_increment(NULL, Gaussian(0.02, 1.0)), [drawn(NULL, 200)]), "drift"),
        (lambda: multiplier_for(Quadratic(curvature=-1.0, slope=0.0, offset=-0.1), [drawn(NULL, 500)]), "never alarms in control"),
    ],
)
def test_what_has_no_multiplier_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
