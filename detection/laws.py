"""Laws seen through their score ``grad log p``: all that a score-based detector needs, with no normalising constant.

Exports ``Law`` (the contract), ``NormalisedLaw``, ``Gaussian``, ``GaussianStreams`` (one law per stream) and ``hyvarinen_score``. A user's own
law derives from ``ScoredLaw`` and writes ``_terms`` and ``sample``, or writes the four methods of ``Law``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
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


@runtime_checkable
class NormalisedLaw(Law, Protocol):
    """A law whose normalising constant is known too; ``dimension`` is 0 for a law of numbers, else ``d``."""

    @property
    def dimension(self) -> int: ...

    def log_density(self, x: Array) -> Array:
        """Natural logarithm of the density, one number for each observation."""
        ...


class ScoredLaw(ABC):
    """A law that computes its score and its Laplacian together: subclasses write ``dimension``, ``_terms`` and ``sample``."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """0 for a law of numbers, else ``d``."""

    @abstractmethod
    def _terms(self, x: Array) -> tuple[Array, Array]:
        """Score and Laplacian at float64 observations of the right shape."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``(num,)`` or ``(num, d)`` draws."""

    def score(self, x: ArrayLike) -> Array:
        """``grad log p``, shaped like ``x``."""
        return self._terms(observations(x, self.dimension))[0]

    def laplacian(self, x: ArrayLike) -> Array:
        """Trace of the score's Jacobian; one number for each observation."""
        return self._terms(observations(x, self.dimension))[1]

    def hyvarinen(self, x: ArrayLike) -> Array:
        """``0.5 |s|^2 + tr J``; one number for each observation."""
        return hyvarinen_score(*self._terms(observations(x, self.dimension)))


class ByValue:
    """Equality and hash of a dataclass by the values of the fields it compares, arrays included."""

    def _key(self) -> tuple[Any, ...]:
        compared = (field.name for field in fields(self) if field.compare)  # type: ignore[arg-type]
        return tuple(_hashable(getattr(self, name)) for name in compared)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, ByValue) and type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())


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
        return away / -float(self.covariance[0, 0]) if self.dimension == 0 else -rows_times(away, self.precision)

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
        far: Array = away**2 * self.precision[0, 0] if self.dimension == 0 else (rows_times(away, self.precision) * away).sum(axis=-1)
        density: Array = -0.5 * (far + size * np.log(2.0 * np.pi) + np.linalg.slogdet(self.covariance)[1])
        return density

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``(num,)`` or ``(num, d)`` draws."""
        mean = np.atleast_1d(np.asarray(self.mean))
        draws = mean + rng.standard_normal((num, mean.size)) @ np.linalg.cholesky(self.covariance).T
        return draws[:, 0] if self.dimension == 0 else draws

    def _centred(self, x: ArrayLike) -> Array:
        away: Array = observations(x, self.dimension) - np.asarray(self.mean)
        return away


@dataclass(frozen=True, eq=False)
class GaussianStreams(ByValue):
    """One Gaussian for each of ``N`` streams: ``mean`` (N,) or (N, d), and ``variance`` of the same shape, (N,) or a number.

    Observations are (N,) or (N, d), one for each stream, under any leading axes: (ticks, N) or (ticks, N, d). Coordinates are independent.
    Raises ``ValueError`` for shapes that do not fit, and for a mean or variance that no Gaussian has.

    >>> GaussianStreams([0.0, 1.0], [1.0, 2.0]).score([1.0, 2.0])
    array([-1. , -0.5])
    """

    mean: Array
    variance: Array

    def __post_init__(self) -> None:
        mean, variance = np.asarray(self.mean, dtype=np.float64), np.asarray(self.variance, dtype=np.float64)
        if mean.ndim not in (1, 2) or mean.size == 0 or variance.shape not in {(), mean.shape[:1], mean.shape}:
            raise ValueError(f"mean must be (N,) or (N, d), variance a number, (N,) or that shape, got {mean.shape} and {variance.shape}")
        if variance.ndim == 1 and mean.ndim == 2:
            variance = variance[:, None]
        for name, value, sound in (("mean", mean, np.isfinite(mean)), ("variance", variance, np.isfinite(variance) & (variance > 0))):
            if not sound.all():
                first = int(np.argwhere(~np.atleast_1d(sound))[0, 0])
                raise ValueError(
                    f"{name} must be finite{' and positive' * (name == 'variance')}, got {np.atleast_1d(value)[first]} at {first}"
                )
        object.__setattr__(self, "mean", read_only(mean))
        object.__setattr__(self, "variance", read_only(np.broadcast_to(variance, mean.shape)))

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def dimension(self) -> int:
        """0 for streams of numbers, else ``d``."""
        return 0 if self.mean.ndim == 1 else self.mean.shape[1]

    def rows(self, selection: slice | NDArray[np.intp] | NDArray[np.bool_]) -> "GaussianStreams":
        """The laws of the selected streams. Raises ``ValueError`` where none is selected."""
        return GaussianStreams(self.mean[selection], self.variance[selection])

    def score(self, x: ArrayLike) -> Array:
        """``-(x - mean) / variance``, shaped like ``x``."""
        away: Array = self._centred(x) / -self.variance
        return away

    def laplacian(self, x: ArrayLike) -> Array:
        """``-sum 1 / variance``, (..., N)."""
        shape = self._centred(x).shape
        return np.broadcast_to(self._trace, shape if self.dimension == 0 else shape[:-1]).copy()

    def hyvarinen(self, x: ArrayLike) -> Array:
        """``0.5 |s|^2 + tr J``, (..., N)."""
        square = self.score(x) ** 2
        value: Array = 0.5 * (square if self.dimension == 0 else square.sum(axis=-1)) + self._trace
        return value

    def log_density(self, x: ArrayLike) -> Array:
        """Natural logarithm of each stream's density, (..., N)."""
        parts: Array = -0.5 * (self._centred(x) ** 2 / self.variance + np.log(2.0 * np.pi * self.variance))
        return parts if self.dimension == 0 else parts.sum(axis=-1)

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``(num, N)`` or ``(num, N, d)`` draws: ``num`` ticks of all streams."""
        return self.mean + np.sqrt(self.variance) * rng.standard_normal((num, *self.mean.shape))

    @cached_property
    def _trace(self) -> Array:
        trace: Array = -1.0 / self.variance
        return trace if self.dimension == 0 else trace.sum(axis=-1)

    def _centred(self, x: ArrayLike) -> Array:
        x = np.asarray(x, dtype=np.float64, order="C")
        if x.shape[max(x.ndim - self.mean.ndim, 0) :] != self.mean.shape:
            raise ValueError(f"observations must have shape (..., {', '.join(map(str, self.mean.shape))}), got {x.shape}")
        away: Array = x - self.mean
        return away


def hyvarinen_score(score: Array, laplacian: Array) -> Array:
    """``0.5 |s|^2 + tr J`` of ``score`` (n,) or (n, d) and ``laplacian`` (n,); Hyvarinen (2005)."""
    square: Array = score**2
    return 0.5 * (square if square.ndim == laplacian.ndim else square.sum(axis=-1)) + laplacian


def observations(x: ArrayLike, dimension: int) -> Array:
    """``x`` as float64, row by row in memory. Raises ``ValueError`` unless its last axis has ``dimension`` entries (0: any shape)."""
    x = np.asarray(x, dtype=np.float64, order="C")
    if dimension and (x.ndim == 0 or x.shape[-1] != dimension):
        raise ValueError(f"observations must have shape (..., {dimension}) for this law, got {x.shape}")
    return x


def rows_times(rows: Array, matrix: Array) -> Array:
    """``rows @ matrix`` for rows (..., d), summed in one order, so that a row's bits do not depend on how many there are."""
    product: Array = np.einsum("...i,ij->...j", rows, np.ascontiguousarray(matrix))
    return product


def read_only(value: ArrayLike) -> Array:
    """A float64 copy that nobody can write to."""
    copy = np.array(value, dtype=np.float64, order="C")
    copy.setflags(write=False)
    return copy


def _hashable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    return tuple(map(_hashable, value)) if isinstance(value, tuple) else value


def _is_positive(variance: Array) -> bool:
    if variance.ndim < 2:
        return bool((variance > 0).all())
    return np.allclose(variance, variance.T, rtol=1e-10, atol=0) and _is_regular(np.asarray(np.linalg.eigvalsh(variance), dtype=np.float64))


def _frozen(value: Array) -> Any:
    return float(value) if value.ndim == 0 else tuple(_frozen(part) for part in value)


def _is_regular(eigenvalues: Array) -> bool:
    """Positive, and the least not lost in the rounding of the largest."""
    return bool(eigenvalues[0] > 1e-13 * eigenvalues[-1])
