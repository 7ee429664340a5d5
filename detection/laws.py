"""Laws seen through their score ``grad log p``: all that a score-based detector needs, with no normalising constant.

Exports ``Law`` (the contract), ``Gaussian`` and ``hyvarinen_score``. A user's own law writes ``score``, ``laplacian`` and ``sample``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@runtime_checkable
class Law(Protocol):
    """A law on ``R`` (``x`` of any shape) or on ``R^d`` (``x`` of shape ``(..., d)``), known by its score."""

    def score(self, x: Array) -> Array:
        """``grad log p``, shaped like ``x``."""
        ...

    def laplacian(self, x: Array) -> Array:
        """Trace of the score's Jacobian; one number for each observation."""
        ...

    def hyvarinen(self, x: Array) -> Array:
        """Hyvarinen score ``0.5 |s|^2 + tr J``, one number for each observation; lower is better."""
        ...

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``num`` independent observations."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """``N(mean, variance)``; a number and a number on the line, else ``mean`` (d,) and ``variance`` a number, (d,) or (d, d).

    Arrays are kept as tuples, so laws compare, hash and print. Raises ``ValueError`` for a covariance that is not positive definite.

    >>> Gaussian(0.0, 4.0).score(np.array([2.0]))
    array([-0.5])
    """

    mean: float | Sequence[float]
    variance: float | Sequence[float] | Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        mean = np.asarray(self.mean, dtype=np.float64)
        variance = np.asarray(self.variance, dtype=np.float64)
        fits = mean.ndim <= 1 and mean.size > 0 and variance.shape in {(), mean.shape, mean.shape * 2}
        if not fits:
            raise ValueError(
                f"variance of a Gaussian with mean of shape {mean.shape} must be a number, (d,) or (d, d), got shape {variance.shape}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            raise ValueError(f"mean and variance must be finite, got {self.mean!r} and {self.variance!r}")
        if not _is_positive(variance):
            raise ValueError(f"variance must be positive (a covariance symmetric positive definite), got {self.variance!r}")
        object.__setattr__(self, "mean", _frozen(mean))
        object.__setattr__(self, "variance", _frozen(variance))

    @property
    def dimension(self) -> int:
        """0 for a law of numbers, else ``d``."""
        return 0 if isinstance(self.mean, float) else len(self.mean)

    @cached_property
    def covariance(self) -> Array:
        """``(d, d)``; ``(1, 1)`` on the line."""
        size = max(self.dimension, 1)
        variance = np.asarray(self.variance)
        return variance.copy() if variance.ndim == 2 else np.diag(np.broadcast_to(variance, (size,)).astype(np.float64))

    @cached_property
    def precision(self) -> Array:
        """Inverse covariance."""
        inverse = np.linalg.inv(self.covariance)
        return np.asarray(0.5 * (inverse + inverse.T), dtype=np.float64)

    def score(self, x: ArrayLike) -> Array:
        """``-P (x - mean)``."""
        away = self._centred(x)
        return away / -float(self.covariance[0, 0]) if self.dimension == 0 else -away @ self.precision

    def laplacian(self, x: ArrayLike) -> Array:
        """``-tr P`` for every observation."""
        away = self._centred(x)
        return np.full(away.shape if self.dimension == 0 else away.shape[:-1], -np.trace(self.precision))

    def hyvarinen(self, x: ArrayLike) -> Array:
        """``0.5 |P (x - mean)|^2 - tr P``."""
        return hyvarinen_score(self.score(x), self.laplacian(x))

    def log_density(self, x: ArrayLike) -> Array:
        """Natural logarithm of the density."""
        away = self._centred(x)
        size = max(self.dimension, 1)
        far: Array = away**2 * self.precision[0, 0] if self.dimension == 0 else ((away @ self.precision) * away).sum(axis=-1)
        density: Array = -0.5 * (far + size * np.log(2.0 * np.pi) + np.linalg.slogdet(self.covariance)[1])
        return density

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``(num,)`` or ``(num, d)`` draws."""
        mean = np.atleast_1d(np.asarray(self.mean))
        draws = mean + rng.standard_normal((num, mean.size)) @ np.linalg.cholesky(self.covariance).T
        return draws[:, 0] if self.dimension == 0 else draws

    def _centred(self, x: ArrayLike) -> Array:
        x = np.asarray(x, dtype=np.float64)
        if self.dimension and (x.ndim == 0 or x.shape[-1] != self.dimension):
            raise ValueError(f"observations must have shape (..., {self.dimension}) for this law, got {x.shape}")
        away: Array = x - np.asarray(self.mean)
        return away


def hyvarinen_score(score: Array, laplacian: Array) -> Array:
    """``0.5 |s|^2 + tr J`` of ``score`` (n,) or (n, d) and ``laplacian`` (n,); Hyvarinen (2005)."""
    square: Array = score**2
    return 0.5 * (square if square.ndim == laplacian.ndim else square.sum(axis=-1)) + laplacian


def _is_positive(variance: Array) -> bool:
    if variance.ndim < 2:
        return bool((variance > 0).all())
    return np.allclose(variance, variance.T, rtol=1e-10, atol=0) and bool(np.linalg.eigvalsh(variance)[0] > 0)


def _frozen(value: Array) -> Any:
    return float(value) if value.ndim == 0 else tuple(_frozen(part) for part in value)
