"""Gaussians of ``R^d`` with one covariance and a mean known up to a convex set: ellipsoids, boxes, and the closest pair of two of them.

In ``D_F(N(m1, S1) || N(m0, S0))`` the means enter as ``0.5 |P0 (m1 - m0)|^2`` alone, so the closest pair is a convex problem in the means.
Exports ``GaussianEllipsoid``, ``GaussianMeanBox`` and ``closest_means``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from detection.laws import Array, Gaussian

_STEPS, _GAP = 200_000, 1e-10


class GaussianMeans(ABC):
    """``N(centre + factor a, covariance)`` for ``a`` in a unit ball or cube."""

    covariance: Any

    @cached_property
    @abstractmethod
    def factor(self) -> Array:
        """``(d, d)``."""

    @abstractmethod
    def centre(self) -> Gaussian:
        """The member in the middle."""

    @abstractmethod
    def extreme(self) -> Sequence[Gaussian]:
        """Members on which promises are verified, besides those of :meth:`highest`."""

    @abstractmethod
    def nearest(self, a: Array) -> Array:
        """Projection of ``a`` (d,) onto the ball or cube."""

    @abstractmethod
    def furthest(self, direction: Array) -> Array:
        """Point ``a`` of the ball or cube with the largest ``direction . a``."""

    @abstractmethod
    def highest(self, curvature: Array, slope: Array) -> Gaussian:
        """The member whose mean maximises ``m' A m + b' m``."""

    def at(self, a: Array) -> Gaussian:
        """The member of coordinates ``a`` (d,)."""
        return Gaussian(tuple(np.asarray(self.centre().mean) + self.factor @ a), self.covariance)

    def closest_to(self, mean: Array) -> Gaussian:
        """The member with the least ``D_F`` from any Gaussian of ``mean`` (d,); the one of that very mean where it belongs."""
        other = _set(Gaussian(tuple(mean), self.covariance))
        return self.at(_nearest_pair(self, other, *_distances(self, other))[0])


@dataclass(frozen=True, kw_only=True)
class GaussianEllipsoid(GaussianMeans):
    """All ``N(m, covariance)`` with ``(m - mean)' shape^-1 (m - mean) <= 1``: ``mean`` (d,), ``shape`` (d, d) positive semi-definite.

    ``shape = q S / n`` is the confidence set of a mean estimated from ``n`` draws of covariance ``S``, ``q`` the chi-square quantile.
    Raises ``ValueError`` for shapes that do not fit or are not positive semi-definite.

    >>> set = GaussianEllipsoid(mean=(0.0, 0.0), shape=((4.0, 0.0), (0.0, 1.0)), covariance=1.0)
    >>> set.highest(np.zeros((2, 2)), np.array([1.0, 0.0])).mean
    (2.0, 0.0)
    """

    mean: Sequence[float]
    shape: Sequence[Sequence[float]]
    covariance: float | Sequence[float] | Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        middle = _vector_law(self.mean, self.covariance)
        shape = np.asarray(self.shape, dtype=np.float64)
        size = middle.dimension
        if shape.shape != (size, size) or not np.isfinite(shape).all() or not np.allclose(shape, shape.T, rtol=1e-10, atol=0):
            raise ValueError(f"shape must be a symmetric ({size}, {size}) matrix of finite numbers, got {self.shape!r}")
        if np.linalg.eigvalsh(shape)[0] < -1e-12 * max(1.0, float(np.abs(shape).max())):
            raise ValueError(f"shape must be positive semi-definite, got {self.shape!r}")
        object.__setattr__(self, "mean", middle.mean)
        object.__setattr__(self, "covariance", middle.variance)
        object.__setattr__(self, "shape", tuple(map(tuple, shape.tolist())))

    @cached_property
    def factor(self) -> Array:
        """Axes of the ellipsoid, as columns."""
        values, vectors = np.linalg.eigh(np.asarray(self.shape))
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))

    def centre(self) -> Gaussian:
        """``N(mean, covariance)``."""
        return Gaussian(self.mean, self.covariance)

    def extreme(self) -> tuple[Gaussian, ...]:
        """Both ends of every axis."""
        axes = np.eye(len(self.mean))
        return tuple(dict.fromkeys(self.at(sign * axis) for axis in axes for sign in (-1.0, 1.0)))

    def nearest(self, a: Array) -> Array:
        """Onto the ball."""
        return a / max(1.0, float(np.linalg.norm(a)))

    def furthest(self, direction: Array) -> Array:
        """On the sphere."""
        length = float(np.linalg.norm(direction))
        return direction / length if length else np.zeros_like(direction)

    def highest(self, curvature: Array, slope: Array) -> Gaussian:
        """Exact for any symmetric ``curvature``: a trust-region problem, solved in its eigenbasis (More and Sorensen 1983)."""
        middle, axes = np.asarray(self.mean), self.factor
        return self.at(_highest_in_ball(axes.T @ curvature @ axes, axes.T @ (slope + 2.0 * curvature @ middle)))


@dataclass(frozen=True, kw_only=True)
class GaussianMeanBox(GaussianMeans):
    """All ``N(m, covariance)`` with ``low <= m <= high`` in every coordinate; both (d,)."""

    low: Sequence[float]
    high: Sequence[float]
    covariance: float | Sequence[float] | Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        low, high = _vector_law(self.low, self.covariance), _vector_law(self.high, self.covariance)
        if low.dimension != high.dimension or not np.all(np.asarray(low.mean) <= np.asarray(high.mean)):
            raise ValueError(f"low must not exceed high in any of the same coordinates, got {self.low!r} and {self.high!r}")
        for name, value in (("low", low.mean), ("high", high.mean), ("covariance", low.variance)):
            object.__setattr__(self, name, value)

    @cached_property
    def factor(self) -> Array:
        """Half widths on the diagonal."""
        return np.diag((np.asarray(self.high) - np.asarray(self.low)) / 2.0)

    def centre(self) -> Gaussian:
        """Middle of every interval."""
        return Gaussian(tuple((np.asarray(self.high) + np.asarray(self.low)) / 2.0), self.covariance)

    def extreme(self) -> tuple[Gaussian, ...]:
        """The corners up to 8 dimensions, else the middles of the faces."""
        size = len(self.low)
        places = np.array(list(product((-1.0, 1.0), repeat=size))) if size <= 8 else np.concatenate((np.eye(size), -np.eye(size)))
        return tuple(dict.fromkeys(self.at(a) for a in places))

    def nearest(self, a: Array) -> Array:
        """Onto the cube."""
        return np.asarray(np.clip(a, -1.0, 1.0))

    def furthest(self, direction: Array) -> Array:
        """A corner."""
        return np.sign(direction)

    def highest(self, curvature: Array, slope: Array) -> Gaussian:
        """A corner. Raises ``ValueError`` for a curvature: covariances then differ, and the maximum over a box is a hard problem."""
        if np.abs(curvature).max() > 1e-12 * max(1.0, float(np.abs(slope).max())):
            raise ValueError("a box of means needs the covariance of the other set, so that increments are linear; use a GaussianEllipsoid")
        return self.at(self.furthest(self.factor.T @ slope))


def closest_means(pre: GaussianMeans | Gaussian, post: GaussianMeans | Gaussian) -> tuple[Gaussian, Gaussian, float]:
    """The members of ``pre`` and ``post`` with the least ``D_F(post || pre)``, and a bound on how far from the least they are.

    Accelerated projected gradients in the coordinates of both sets; the bound is the duality gap from their support functions. Raises
    ``ValueError`` for sets of different dimensions and for sets that meet, naming the common law.
    """
    before, after = _set(pre), _set(post)
    sizes = len(before.factor), len(after.factor)
    if sizes[0] != sizes[1]:
        raise ValueError(f"sets must share one dimension, got {sizes[0]} and {sizes[1]}")
    apart, maps, scale = _distances(before, after)
    a, b, away, gap = _nearest_pair(before, after, apart, maps, scale)
    first, second = before.at(a), after.at(b)
    if float(away @ away) <= 1e-14 * scale and np.allclose(first.covariance, second.covariance, rtol=1e-12, atol=0):
        raise ValueError(f"pre- and post-change sets must be apart, but both hold {first!r}")
    return first, second, gap


def _distances(before: GaussianMeans, after: GaussianMeans) -> tuple[Array, tuple[Array, Array], float]:
    """``P0 (m1 - m0)`` between the middles, how the coordinates of both sets move it, and its scale."""
    precision = before.centre().precision
    apart = precision @ (np.asarray(after.centre().mean) - np.asarray(before.centre().mean))
    maps = -precision @ before.factor, precision @ after.factor
    return apart, maps, float(apart @ apart) + sum(float((part**2).sum()) for part in maps)


def _nearest_pair(
    before: GaussianMeans, after: GaussianMeans, apart: Array, maps: tuple[Array, Array], scale: float
) -> tuple[Array, Array, Array, float]:
    """Minimises ``0.5 |apart + maps[0] a + maps[1] b|^2``: FISTA, restarted where it overshoots (O'Donoghue and Candes 2015)."""
    step = 1.0 / max(float(np.linalg.norm(np.hstack(maps), 2)) ** 2, 1e-300)
    a, b = np.zeros(len(apart)), np.zeros(len(apart))
    ahead_a, ahead_b, pace = a, b, 1.0
    for _ in range(_STEPS):
        residual = apart + maps[0] @ ahead_a + maps[1] @ ahead_b
        new_a, new_b = before.nearest(ahead_a - step * maps[0].T @ residual), after.nearest(ahead_b - step * maps[1].T @ residual)
        if (ahead_a - new_a) @ (new_a - a) + (ahead_b - new_b) @ (new_b - b) > 0:
            pace = 1.0
        following = 0.5 * (1.0 + np.sqrt(1.0 + 4.0 * pace**2))
        push = (pace - 1.0) / following
        ahead_a, ahead_b, pace = new_a + push * (new_a - a), new_b + push * (new_b - b), following
        a, b = new_a, new_b
        away = apart + maps[0] @ a + maps[1] @ b
        slopes = maps[0].T @ away, maps[1].T @ away
        gap = float(slopes[0] @ (a - before.furthest(-slopes[0])) + slopes[1] @ (b - after.furthest(-slopes[1])))
        if gap <= _GAP * 0.5 * float(away @ away) or float(away @ away) <= 1e-15 * scale:
            return a, b, away, max(gap, 0.0)
    raise ValueError(
        f"the closest pair of {before!r} and {after!r} was not found to {_GAP}: the sets nearly meet, or are very flat; rescale the stream"
    )


def _highest_in_ball(curvature: Array, slope: Array) -> Array:
    """Maximiser of ``a' A a + g' a`` over ``|a| <= 1``."""
    values, vectors = np.linalg.eigh(curvature)
    tilt = vectors.T @ slope
    top = max(float(values[-1]), 0.0)
    free = 2.0 * (top - values) > 1e-12 * max(1.0, float(np.abs(values).max()))

    def place(multiplier: float) -> Array:
        return np.divide(tilt, 2.0 * (multiplier - values), out=np.zeros_like(tilt), where=2.0 * (multiplier - values) > 0)

    size = float(np.linalg.norm(tilt))
    stuck = np.abs(tilt[~free]).max(initial=0.0) <= 1e-14 * max(size, 1e-300)
    inside = np.where(free, place(top), 0.0)
    if stuck and float(np.linalg.norm(inside)) <= 1.0:
        if top > 0.0 and values[-1] > 0.0:
            inside[-1] += np.sqrt(1.0 - float(inside @ inside))
        return np.asarray(vectors @ inside)
    from scipy.optimize import brentq

    low, high = top + (0.5 - 1e-12) * float(np.linalg.norm(tilt[~free])), top + size
    multiplier = brentq(lambda mu: float(np.linalg.norm(place(mu))) - 1.0, low, high, xtol=1e-15 * high, rtol=1e-14, maxiter=500)
    found = place(float(multiplier))
    return np.asarray(vectors @ (found / max(1.0, float(np.linalg.norm(found)))))


def _set(laws: GaussianMeans | Gaussian) -> GaussianMeans:
    if isinstance(laws, GaussianMeans):
        return laws
    middle = _vector_law(laws.mean, laws.variance)
    return GaussianMeanBox(low=middle.mean, high=middle.mean, covariance=middle.variance)  # type: ignore[arg-type]


def _vector_law(mean: Any, covariance: Any) -> Gaussian:
    law = Gaussian(tuple(mean) if np.ndim(mean) else mean, covariance)
    if law.dimension == 0:
        raise ValueError(f"means must be vectors (d,); for laws of numbers use GaussianBox, got mean {mean!r}")
    return law
