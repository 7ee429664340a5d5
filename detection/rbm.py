"""Gauss-Bernoulli restricted Boltzmann machines: a law whose constant is a sum over ``2^k`` hidden states, and whose score is one product.

``log p(x) = -0.5 |x - b|^2 + sum_j softplus(c_j + (x W)_j) - log Z``, unit visible variance; the model of arXiv:2302.00250 and 2407.11094.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from detection.laws import Array, ByValue, ScoredLaw, observations, read_only, rows_times

_ENUMERABLE = 16  # hidden units whose states are summed one by one
_BURN_IN = 1000  # Gibbs steps, as in the authors' studies


@dataclass(frozen=True, eq=False)
class GaussBernoulliRBM(ScoredLaw, ByValue):
    """``weights`` (d, k), ``visible_bias`` (d,), ``hidden_bias`` (k,).

    Given the hidden state ``h`` the observation is ``N(b + W h, I)``, so the law is a mixture of ``2^k`` Gaussians: with up to 16 hidden
    units its constant and its draws are exact. Raises ``ValueError`` for shapes that do not fit and numbers that are not finite.

    >>> GaussBernoulliRBM([[2.0]], [0.0], [0.0]).score([[0.0]])
    array([[1.]])
    """

    weights: Array
    visible_bias: Array
    hidden_bias: Array

    def __post_init__(self) -> None:
        for name in ("weights", "visible_bias", "hidden_bias"):
            object.__setattr__(self, name, read_only(getattr(self, name)))
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} must be finite, got {getattr(self, name)!r}")
        shapes = self.weights.shape, self.visible_bias.shape, self.hidden_bias.shape
        if self.weights.ndim != 2 or self.weights.size == 0 or shapes[1:] != (shapes[0][:1], shapes[0][1:]):
            raise ValueError("weights, visible_bias, hidden_bias must be (d, k), (d,), (k,), got " + ", ".join(map(str, shapes)))

    @property
    def dimension(self) -> int:
        """Number ``d`` of visible units."""
        return int(self.weights.shape[0])

    @property
    def hidden(self) -> int:
        """Number ``k`` of hidden units."""
        return int(self.weights.shape[1])

    def unnormalised_log_density(self, x: ArrayLike) -> Array:
        """``log p(x) + log Z``."""
        x = observations(x, self.dimension)
        field = self._field(x)
        return np.asarray(np.logaddexp(0.0, field).sum(axis=-1) - 0.5 * ((x - self.visible_bias) ** 2).sum(axis=-1))

    def log_density(self, x: ArrayLike) -> Array:
        """Natural logarithm of the density. Raises ``ValueError`` beyond 16 hidden units."""
        return self.unnormalised_log_density(x) - self.log_constant

    @cached_property
    def log_constant(self) -> float:
        """``log Z``, summed over the hidden states. Raises ``ValueError`` beyond 16 hidden units."""
        masses = self._hidden_masses[1]
        return float(masses.max() + np.log(np.exp(masses - masses.max()).sum()))

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``(num, d)`` independent draws: exact with up to 16 hidden units, else one Gibbs chain of 1000 steps for each."""
        if self.hidden > _ENUMERABLE:
            return self.gibbs(rng, num)
        states, masses = self._hidden_masses
        chosen = states[rng.choice(len(states), size=num, p=np.exp(masses - self.log_constant))]
        return self._visible(chosen, rng)

    def gibbs(self, rng: np.random.Generator, chains: int, *, burn_in: int = _BURN_IN, start: ArrayLike | None = None) -> Array:
        """States ``(chains, d)`` of independent block Gibbs chains after ``burn_in`` steps.

        Chains begin at ``start`` (chains, d), so that one call continues another; by default at ``N(b, I)``.
        """
        x = self._visible(np.zeros((chains, self.hidden)), rng) if start is None else observations(start, self.dimension)
        if x.shape != (chains, self.dimension):
            raise ValueError(f"start must have shape {(chains, self.dimension)}, got {x.shape}")
        for _ in range(burn_in):
            on = rng.random((chains, self.hidden)) < scipy.special.expit(x @ self.weights + self.hidden_bias)
            x = self._visible(on, rng)
        return x

    def _terms(self, x: Array) -> tuple[Array, Array]:
        on = scipy.special.expit(self._field(x))
        score = self.visible_bias - x + rows_times(on, self.weights.T)
        return score, (on * (1.0 - on) * (self.weights**2).sum(axis=0)).sum(axis=-1) - self.dimension

    def _field(self, x: Array) -> Array:
        return rows_times(x, self.weights) + self.hidden_bias

    def _visible(self, hidden: Any, rng: np.random.Generator) -> Array:
        mean: Array = self.visible_bias + hidden.astype(np.float64) @ self.weights.T
        mean += rng.standard_normal(mean.shape)
        return mean

    @cached_property
    def _hidden_masses(self) -> tuple[Array, Array]:
        """All hidden states (2^k, k) and the logarithms of their unnormalised masses: each is a Gaussian integral over the visible units."""
        if self.hidden > _ENUMERABLE:
            raise ValueError(f"log Z is a sum over 2^{self.hidden} hidden states; it is computed for at most {_ENUMERABLE} hidden units")
        states = ((np.arange(2**self.hidden)[:, None] >> np.arange(self.hidden)) & 1).astype(np.float64)
        pull = states @ self.weights.T
        masses = states @ self.hidden_bias + pull @ self.visible_bias + 0.5 * (pull**2).sum(axis=1)
        return states, masses + 0.5 * self.dimension * np.log(2.0 * np.pi)
