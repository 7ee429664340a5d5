from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from detection.laws import Gaussian
from detection.mixtures import Mixture
from detection.rbm import GaussBernoulliRBM


def _machine(visible: int, hidden: int, seed: int = 0, scale: float = 1.0) -> GaussBernoulliRBM:
    rng = np.random.default_rng(seed)
    return GaussBernoulliRBM(scale * rng.normal(size=(visible, hidden)), rng.normal(size=visible), rng.normal(size=hidden))


def _as_mixture(law: GaussBernoulliRBM) -> Mixture:
    """The sum over hidden states, state by state."""
    states = [np.array(h) for h in product((0.0, 1.0), repeat=law.hidden)]
    means = [law.visible_bias + law.weights @ h for h in states]
    masses = [np.exp(law.hidden_bias @ h + 0.5 * (m @ m - law.visible_bias @ law.visible_bias)) for h, m in zip(states, means, strict=True)]
    return Mixture([Gaussian(m, 1.0) for m in means], np.array(masses) / sum(masses))


def test_score_and_laplacian_are_those_of_automatic_differentiation():
    law = _machine(50, 40, scale=0.3)
    x = np.random.default_rng(1).normal(size=(6, 50))
    weights, visible, hidden = (torch.tensor(np.array(part)) for part in (law.weights, law.visible_bias, law.hidden_bias))

    rows = torch.tensor(x, requires_grad=True)
    log_density = torch.nn.functional.softplus(hidden + rows @ weights).sum(dim=1) - 0.5 * ((rows - visible) ** 2).sum(dim=1)
    (gradients,) = torch.autograd.grad(log_density.sum(), rows, create_graph=True)
    traces = sum(torch.autograd.grad(gradients[:, k].sum(), rows, retain_graph=True)[0][:, k] for k in range(50))
    assert np.abs(law.score(x) - gradients.detach().numpy()).max() <= 1e-14 * np.abs(gradients.detach().numpy()).max()
    np.testing.assert_allclose(law.laplacian(x), traces, rtol=1e-13)
    np.testing.assert_allclose(law.unnormalised_log_density(x), log_density.detach(), rtol=1e-13)


@pytest.mark.parametrize("hidden", [1, 4])
def test_a_machine_is_a_mixture_of_gaussians_over_its_hidden_states(hidden):
    law = _machine(3, hidden)
    mixture, x = _as_mixture(law), np.random.default_rng(2).normal(size=(40, 3)) * 3
    for name in ("score", "laplacian", "log_density"):
        np.testing.assert_allclose(getattr(law, name)(x), getattr(mixture, name)(x), rtol=1e-11, atol=1e-12)


def test_exact_draws_and_gibbs_chains_have_the_law_of_the_mixture():
    law = _machine(2, 4, seed=3, scale=0.8)
    reference = _as_mixture(law).sample(np.random.default_rng(4), 20_000)
    for draws in (law.sample(np.random.default_rng(5), 20_000), law.gibbs(np.random.default_rng(6), 20_000, burn_in=100)):
        for direction in np.array([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]]):
            assert stats.ks_2samp(draws @ direction, reference @ direction).pvalue > 1e-3


def test_gibbs_chains_of_a_large_machine_obey_the_identities_of_its_score():
    law = _machine(50, 40, scale=0.2)
    draws = law.gibbs(np.random.default_rng(7), 2000, burn_in=300)
    score = law.score(draws)
    stein = (score**2).sum(axis=1) + law.laplacian(draws)
    assert abs(stein.mean()) < 4 * stein.std() / np.sqrt(2000)
    assert (np.abs(score.mean(axis=0)) < 4.5 * score.std(axis=0) / np.sqrt(2000)).all()


def test_chains_go_on_from_where_they_were():
    law = _machine(3, 2)
    at_once = law.gibbs(np.random.default_rng(8), 5, burn_in=7)
    rng = np.random.default_rng(8)
    first = law.gibbs(rng, 5, burn_in=3)
    np.testing.assert_array_equal(law.gibbs(rng, 5, burn_in=4, start=first), at_once)
    with pytest.raises(ValueError, match=r"start must have shape \(5, 3\)"):
        law.gibbs(rng, 5, start=first[:4])


def test_a_machine_too_large_to_sum_is_drawn_by_gibbs_and_has_no_density():
    large = _machine(2, 17, scale=0.1)
    assert large.sample(np.random.default_rng(9), 3).shape == (3, 2)
    np.testing.assert_array_equal(large.sample(np.random.default_rng(9), 3), large.gibbs(np.random.default_rng(9), 3, burn_in=1000))
    with pytest.raises(ValueError, match="at most 16 hidden units"):
        large.log_density(np.zeros(2))
    assert np.isfinite(_machine(2, 16, scale=0.1).log_density(np.zeros(2)))


def test_strong_fields_neither_overflow_nor_warn():
    law = _machine(3, 4, scale=100.0)
    x = 100.0 * np.random.default_rng(10).normal(size=(50, 3))
    for values in (law.score(x), law.laplacian(x), law.log_density(x), law.sample(np.random.default_rng(11), 5)):
        assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([[1.0, 2.0]], [0.0], [0.0]), r"\(d, k\), \(d,\), \(k,\), got \(1, 2\), \(1,\), \(1,\)"),
        (([1.0], [0.0], [0.0]), "got"),
        ((np.empty((2, 0)), [0.0, 0.0], []), "got"),
        (([[float("nan")]], [0.0], [0.0]), "weights must be finite"),
        (([[1.0]], [0.0], [float("inf")]), "hidden_bias must be finite"),
    ],
)
def test_impossible_machines_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        GaussBernoulliRBM(*parts)
