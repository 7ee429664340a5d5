"""Exponential families ``log p = theta . phi(x) - A(theta)``: the score needs ``theta`` and the features, never ``A``.

The Hyvarinen score is quadratic in ``theta``, so score matching is one linear solve (Hyvarinen 2007). Exports ``ExponentialFamily``,
``fit_exponential``, the contract ``Features``, ``Polynomial`` features, and ``Quartic``, the graph model of arXiv:2407.11094.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations_with_replacement
from math import lgamma, log, pi
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from detection.laws import Array, ScoredLaw, observations

_BLOCK = 8192  # observations whose feature gradients are held at once


class Features(Protocol):
    """``p`` features of an observation, with their first two derivatives; ``dimension`` is 0 for numbers, else ``d``."""

    @property
    def dimension(self) -> int: ...

    def values(self, x: Array) -> Array:
        """``phi(x)``, (..., p)."""
        ...

    def gradients(self, x: Array) -> Array:
        """Derivatives (..., p) of numbers, gradients (..., p, d) of vectors."""
        ...

    def laplacians(self, x: Array) -> Array:
        """Sums of second derivatives, (..., p)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """All monomials of degree 1 to ``degree`` in the coordinates, by degree: degree 2 gives the Gaussians.

    >>> Polynomial(degree=2, dimension=2).values(np.array([2.0, 3.0]))
    array([2., 3., 4., 6., 9.])
    """

    degree: int
    dimension: int = 0

    def __post_init__(self) -> None:
        if self.degree < 1 or self.dimension < 0:
            raise ValueError(f"degree must be at least 1 and dimension at least 0, got {self.degree!r} and {self.dimension!r}")

    @cached_property
    def exponents(self) -> Any:
        """Powers of the coordinates, (p, d); (p, 1) on the line."""
        size = max(self.dimension, 1)
        chosen = [c for k in range(1, self.degree + 1) for c in combinations_with_replacement(range(size), k)]
        return np.array([[c.count(i) for i in range(size)] for c in chosen])

    def values(self, x: Array) -> Array:
        """``phi(x)``, (..., p)."""
        return self._monomials(x, self.exponents)

    def gradients(self, x: Array) -> Array:
        """Derivatives (..., p) of numbers, gradients (..., p, d) of vectors."""
        columns = [self.exponents[:, i] * self._monomials(x, self._lowered(i, 1)) for i in range(self.exponents.shape[1])]
        return np.stack(columns, axis=-1) if self.dimension else columns[0]

    def laplacians(self, x: Array) -> Array:
        """Sums of second derivatives, (..., p)."""
        powers = self.exponents
        terms = (powers[:, i] * (powers[:, i] - 1) * self._monomials(x, self._lowered(i, 2)) for i in range(powers.shape[1]))
        return np.asarray(sum(terms), dtype=np.float64)

    def _monomials(self, x: Array, exponents: Any) -> Array:
        x = observations(x, self.dimension)
        columns = np.moveaxis(x, -1, 0) if self.dimension else x[None]
        product = np.ones((*columns[0].shape, len(exponents)))
        for column, powers in zip(columns, exponents.T, strict=True):
            table = np.cumprod(np.stack([np.ones_like(column), *[column] * self.degree], axis=-1), axis=-1)
            product *= table[..., powers]
        return product

    def _lowered(self, coordinate: int, by: int) -> Any:
        lowered = self.exponents.copy()
        lowered[:, coordinate] = np.maximum(lowered[:, coordinate] - by, 0)
        return lowered


@dataclass(frozen=True)
class ExponentialFamily(ScoredLaw):
    """The law ``log p = theta . phi(x) - A(theta)`` with ``theta`` (p,), kept as a tuple; ``A`` stays unknown.

    >>> ExponentialFamily(Polynomial(degree=2), (0.0, -0.5)).hyvarinen(np.array([2.0]))
    array([1.])
    """

    features: Features
    theta: Sequence[float]

    def __post_init__(self) -> None:
        theta = np.asarray(self.theta, dtype=np.float64)
        expected = self.features.values(np.zeros(self.dimension or ())).shape
        if theta.shape != expected or not np.isfinite(theta).all():
            raise ValueError(f"theta must be finite numbers of shape {expected}, one for each feature, got {self.theta!r}")
        object.__setattr__(self, "theta", tuple(theta.tolist()))

    @property
    def dimension(self) -> int:
        """0 for a law of numbers, else ``d``."""
        return self.features.dimension

    def unnormalised_log_density(self, x: ArrayLike) -> Array:
        """``theta . phi(x)``: the log density up to a constant."""
        return np.asarray(np.einsum("...p,p->...", self.features.values(observations(x, self.dimension)), np.asarray(self.theta)))

    def sample(self, rng: np.random.Generator, num: int, *, start: ArrayLike | None = None, steps: int = 1000) -> Array:
        """``num`` independent chains of the truncated Langevin algorithm (MALTA, Roberts and Tweedie 1996) after ``steps`` steps each.

        The first half of the steps tunes a common step size; chains begin at ``num`` rows drawn from ``start`` (standard normal draws by
        default), which should cover every mode and have the law's scale. Raises ``ValueError`` where chains run away: no such law.
        """
        shape = (num, self.dimension) if self.dimension else (num,)
        begin = rng.standard_normal(shape) if start is None else rng.choice(observations(start, self.dimension), num)
        return _langevin(self, begin, rng, steps)

    def score(self, x: ArrayLike) -> Array:
        """``J_phi' theta``, shaped like ``x``."""
        pattern = "...pd,p->...d" if self.dimension else "...p,p->..."
        return np.asarray(np.einsum(pattern, self.features.gradients(observations(x, self.dimension)), np.asarray(self.theta)))

    def _terms(self, x: Array) -> tuple[Array, Array]:
        return self.score(x), np.asarray(np.einsum("...p,p->...", self.features.laplacians(x), np.asarray(self.theta)))


def fit_exponential(features: Features, data: ArrayLike) -> ExponentialFamily:
    """Score matching: ``theta = -(mean J J')^-1 mean lap phi`` over ``data`` (n,) or (n, d), the least mean Hyvarinen score.

    With the features of degree 2 it is the Gaussian of the sample's mean and covariance. Nothing keeps ``theta`` where ``exp(theta . phi)``
    has a finite integral. Raises ``ValueError`` for data that are not finite and for features that the data do not tell apart.
    """
    x = observations(data, features.dimension)
    if x.ndim != (2 if features.dimension else 1) or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"data must be finite observations (n,) or (n, d), got shape {x.shape}")
    blocks = [x[i : i + _BLOCK] for i in range(0, len(x), _BLOCK)]
    square = np.asarray(sum(_squares(features.gradients(block)) for block in blocks)) / len(x)
    bend = np.asarray(sum(features.laplacians(block).sum(axis=0) for block in blocks)) / len(x)
    scale = np.sqrt(np.diag(square))
    scaled = square / np.where(scale > 0, np.outer(scale, scale), 1.0)
    if not np.linalg.eigvalsh(scaled)[0] > 1e-13:
        raise ValueError(f"data ({len(x)} observations) must tell the {len(scale)} features apart; use more data or fewer features")
    return ExponentialFamily(features, tuple((-np.linalg.solve(scaled, bend / scale) / scale).tolist()))


@dataclass(frozen=True)
class QuarticFeature:
    """The one feature ``-(sum x_i^4 + sum_{i<j} x_i^2 x_j^2)`` of :class:`Quartic`."""

    dimension: int = 0

    def values(self, x: Array) -> Array:
        """(..., 1)."""
        fourth, second = _power_sums(observations(x, self.dimension), self.dimension)
        return (-0.5 * (fourth + second**2))[..., None]

    def gradients(self, x: Array) -> Array:
        """(..., 1) of numbers, (..., 1, d) of vectors."""
        x = observations(x, self.dimension)
        second = _power_sums(x, self.dimension)[1]
        return (-4.0 * x**3)[..., None] if self.dimension == 0 else (-2.0 * x * (x**2 + second[..., None]))[..., None, :]

    def laplacians(self, x: Array) -> Array:
        """(..., 1)."""
        second = _power_sums(observations(x, self.dimension), self.dimension)[1]
        return (-(10.0 + 2.0 * max(self.dimension, 1)) * second)[..., None]


@dataclass(frozen=True)
class Quartic(ScoredLaw):
    """``log p = -tau (sum_i x_i^4 + sum_{i<j} x_i^2 x_j^2) - A``, the graph model of arXiv:2407.11094, in ``dimension`` coordinates (0: numbers).

    The exponent is ``tau r^4 (1 + sum u_i^4) / 2`` at radius ``r`` in direction ``u``. Hence exact draws (``r^4`` is a gamma variable given
    ``u``, and at least half of all uniform directions are accepted) and a constant known for every dimension.
    """

    tau: float
    dimension: int = 0

    def __post_init__(self) -> None:
        if not (self.tau > 0 and np.isfinite(self.tau)):
            raise ValueError(f"tau must be positive and finite, got {self.tau!r}")
        if self.dimension < 0:
            raise ValueError(f"dimension must be at least 0 (a law of numbers), got {self.dimension!r}")
        object.__setattr__(self, "tau", float(self.tau))

    @classmethod
    def fit(cls, data: ArrayLike) -> Self:
        """The law of least mean Hyvarinen score on ``data`` (n,) or (n, d)."""
        x = np.asarray(data, dtype=np.float64)
        dimension = x.shape[1] if x.ndim == 2 else 0
        return cls(fit_exponential(QuarticFeature(dimension), x).theta[0], dimension)

    def log_density(self, x: ArrayLike) -> Array:
        """Natural logarithm of the density."""
        size = max(self.dimension, 1)
        energy = QuarticFeature(self.dimension).values(np.asarray(x, dtype=np.float64))[..., 0]
        return np.asarray(self.tau * energy - _log_constant(size) + 0.25 * size * log(self.tau))

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``(num,)`` or ``(num, d)`` exact and independent draws."""
        directions = _quartic_directions(rng, num, max(self.dimension, 1))
        steepness = 0.5 * self.tau * (1.0 + (directions**4).sum(axis=1))
        draws: Array = directions * (rng.gamma(directions.shape[1] / 4.0, size=num) / steepness)[:, None] ** 0.25
        return draws if self.dimension else draws[:, 0]

    def _terms(self, x: Array) -> tuple[Array, Array]:
        feature = QuarticFeature(self.dimension)
        gradients = feature.gradients(x)
        return self.tau * (gradients[..., 0, :] if self.dimension else gradients[..., 0]), self.tau * feature.laplacians(x)[..., 0]


def _power_sums(x: Array, dimension: int) -> tuple[Array, Array]:
    """``sum x_i^4`` and ``sum x_i^2``."""
    square = x**2
    return (square**2, square) if dimension == 0 else ((square**2).sum(axis=-1), square.sum(axis=-1))


def _squares(gradients: Array) -> Array:
    """``sum J J'`` (p, p) over the observations."""
    columns = gradients[..., None] if gradients.ndim == 2 else gradients
    return np.asarray(np.tensordot(columns, columns, axes=([0, 2], [0, 2])))


def _quartic_directions(rng: np.random.Generator, num: int, size: int) -> Array:
    """Unit vectors with density proportional to ``(1 + sum u_i^4)^(-size/4)``, by rejection from uniform ones."""
    kept = np.empty((0, size))
    while len(kept) < num:
        proposed = rng.standard_normal((2 * (num - len(kept)) + 16, size))
        proposed /= np.sqrt((proposed**2).sum(axis=1))[:, None]
        chance = ((1.0 + 1.0 / size) / (1.0 + (proposed**4).sum(axis=1))) ** (size / 4.0)
        kept = np.concatenate((kept, proposed[rng.random(len(proposed)) < chance]))
    return kept[:num]


@cache
def _log_constant(size: int) -> float:
    """``log int exp(-(sum x_i^4 + S^2) / 2) dx``, ``S = sum x_i^2``, over ``R^size``.

    ``exp(-S^2 / 2)`` is the mean of ``exp(i g S)`` over a standard normal ``g``, which leaves a power of one integral on the line under a
    second one. Its contour runs through the saddle point ``g = i c``, where nothing cancels.
    """
    if size == 1:
        return log(2.0) + lgamma(1.25)
    nodes, weights = np.polynomial.legendre.leggauss(256)
    x2, weights = (1.5 * (nodes + 1.0)) ** 2, 3.0 * weights  # both halves of [-3, 3], beyond which exp(-x^4 / 2) < 1e-17

    def mass(c: float) -> Array:
        return np.asarray(weights * np.exp(-0.5 * x2**2 - c * x2))

    low, high = 0.0, float(size)
    for _ in range(60):
        c = 0.5 * (low + high)
        low, high = (low, c) if c * mass(c).sum() > size * (mass(c) @ x2) else (c, high)
    t, step = np.linspace(-9.0, 9.0, 601, retstep=True)
    factor = np.exp(1j * t[:, None] * x2) @ mass(c) / mass(c).sum()
    rest = (factor**size * np.exp(-0.5 * t**2 - 1j * t * c)).real.sum() * step / np.sqrt(2.0 * pi)
    return float(0.5 * c**2 + size * np.log(mass(c).sum()) + np.log(rest))


def _langevin(law: ExponentialFamily, x: Array, rng: np.random.Generator, steps: int, accept: float = 0.574) -> Array:
    """The chains ``x`` after ``steps`` Metropolis-adjusted Langevin steps; the first half tunes the step to the acceptance ``accept``."""
    log_step, bound = -2.0, 1e6 * (1.0 + np.abs(x).max())
    energy = law.unnormalised_log_density(x)
    for turn in range(steps):
        step = np.exp(log_step)
        noise = rng.standard_normal(x.shape)
        y = x + _drift(law, x, step) + np.sqrt(step) * noise
        with np.errstate(over="ignore", invalid="ignore"):
            energy_y = law.unnormalised_log_density(y)
            ratio = 0.5 * (noise**2 - (x - y - _drift(law, y, step)) ** 2 / step)
            log_odds = energy_y - energy + (ratio.sum(axis=-1) if x.ndim == 2 else ratio)
        chance = np.exp(np.minimum(np.nan_to_num(log_odds, nan=-np.inf), 0.0))
        taken = rng.random(len(x)) < chance
        x, energy = np.where(taken[:, None] if x.ndim == 2 else taken, y, x), np.where(taken, energy_y, energy)
        if np.abs(x).max() > bound:
            raise ValueError(f"chains of {law!r} run away: exp(theta . phi) has no finite integral, or start is far from the law's scale")
        if turn < steps // 2:
            log_step += (float(chance.mean()) - accept) / (1.0 + 0.02 * turn)
    return x


def _drift(law: ExponentialFamily, x: Array, step: float) -> Array:
    """``step / 2`` times the score, no longer than the noise is: an untruncated drift overshoots where tails are light, and chains stick."""
    drift = 0.5 * step * law.score(x)
    length = np.abs(drift) if x.ndim == 1 else np.sqrt((drift**2).sum(axis=-1, keepdims=True))
    return np.asarray(drift / np.maximum(1.0, length / np.sqrt(step * max(law.dimension, 1))))
