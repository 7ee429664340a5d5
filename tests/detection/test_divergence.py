import numpy as np
import pytest
from scipy import integrate

from detection.divergence import fisher_divergence, sampled_divergence
from detection.exponential import ExponentialFamily, Polynomial, Quartic
from detection.laws import Gaussian
from detection.mixtures import KernelDensity, Mixture

FULL = Gaussian((0.5, -1.0), ((2.0, 0.3), (0.3, 1.0)))


@pytest.mark.parametrize(("law", "reference"), [(Gaussian(0.3, 1.7), Gaussian(-0.5, 0.8)), (FULL, Gaussian((0.0, 0.0), 1.0))])
def test_the_estimate_is_the_closed_form_within_its_error_which_is_honest(law, reference):
    rng = np.random.default_rng(0)
    estimates = [sampled_divergence(law, reference, rng, num=500) for _ in range(200)]
    off = np.array([(e.value - fisher_divergence(law, reference)) / e.standard_error for e in estimates])
    assert abs(off.mean()) < 0.35
    assert 0.85 < off.std() < 1.2
    assert estimates[0].num == 500


def test_the_estimate_for_other_laws_is_the_integral():
    law, reference = Mixture([Gaussian(-1.0, 0.5), Gaussian(2.0, 1.0)], [0.4, 0.6]), Quartic(0.1)
    exact = integrate.quad(lambda x: 0.5 * float(law.score(x) - reference.score(x)) ** 2 * np.exp(float(law.log_density(x))), -10, 12)[0]
    estimate = sampled_divergence(law, reference, np.random.default_rng(1), num=50_000)
    assert abs(estimate.value - exact) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.05 * exact


def test_the_mean_difference_of_hyvarinen_scores_is_a_difference_of_divergences():
    rng, law = np.random.default_rng(2), Quartic(1.0, 2)
    near, far = FULL, KernelDensity(rng.normal(size=(20, 2)), 1.0)
    draws = law.sample(rng, 50_000)
    drift = near.hyvarinen(draws) - far.hyvarinen(draws)
    parts = [sampled_divergence(law, other, rng, num=50_000) for other in (near, far)]
    error = np.hypot(np.hypot(*(part.standard_error for part in parts)), drift.std() / np.sqrt(len(draws)))
    assert abs(drift.mean() - (parts[0].value - parts[1].value)) < 4 * error


def test_a_law_is_at_no_distance_from_itself_however_it_is_written():
    same = ExponentialFamily(Polynomial(degree=2), (0.0, -0.5))
    assert sampled_divergence(Gaussian(0.0, 1.0), same, np.random.default_rng(3), num=10).value == pytest.approx(0.0, abs=1e-28)


def test_divergences_that_cannot_be_had_are_refused():
    rng = np.random.default_rng(4)
    with pytest.raises(ValueError, match="use sampled_divergence"):
        fisher_divergence(Gaussian(0.0, 1.0), Quartic(1.0))
    with pytest.raises(ValueError, match="one dimension"):
        sampled_divergence(FULL, Gaussian(0.0, 1.0), rng)
    with pytest.raises(ValueError, match="one dimension"):
        sampled_divergence(Quartic(1.0), Quartic(1.0, 2), rng)
    with pytest.raises(ValueError, match="num must be at least 2"):
        sampled_divergence(FULL, FULL, rng, num=1)

    class Cauchyish(Gaussian):
        def score(self, x):
            return np.full(np.shape(x), np.nan)

    with pytest.raises(ValueError, match="10 of 10"):
        sampled_divergence(FULL, Cauchyish((0.0, 0.0), 1.0), rng, num=10)
