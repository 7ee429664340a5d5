"""What one observation adds to the statistic: for two Gaussians a quadratic of the (clipped) observation.

Clipping acts on the observation, ``x -> min(max(x, -clip), clip)``, before anything else, as in normal scores: the clipped law has atoms at
``+-clip``, and drift, exponential moment and distribution of an increment are those of the clipped observation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Protocol

import numpy as np
import scipy
from numpy.typing import NDArray

from detection.laws import Array, Gaussian, Law

Quadratics = tuple[Any, Any, Any]


class Increment(Protocol):
    """``z(x)``, one number for each observation."""

    def __call__(self, x: Array) -> Array:
        """Increments (n,) of ``x`` (n,) or (n, d)."""
        ...

    def scaled(self, multiplier: float) -> "Increment":
        """``multiplier * z``."""
        ...

    def at(self, rows: slice) -> "Increment":
        """The increment of the streams ``rows``: itself, unless it holds one law for each stream."""
        ...


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """``z(x) = curvature x^2 + slope x + offset`` of a number ``x`` clipped to ``[-clip, clip]`` (``None``: not clipped)."""

    curvature: float
    slope: float
    offset: float
    clip: float | None = None

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        x = np.asarray(x, dtype=np.float64)
        if self.clip is not None:
            x = np.clip(x, -self.clip, self.clip)
        if self.curvature == 0.0:
            z = self.slope * x
        else:
            z = self.curvature * x
            z += self.slope
            z *= x
        z += self.offset
        return z

    def scaled(self, multiplier: float) -> "Quadratic":
        """``multiplier * z``."""
        return replace(self, curvature=multiplier * self.curvature, slope=multiplier * self.slope, offset=multiplier * self.offset)

    def at(self, rows: slice) -> "Quadratic":
        """Itself: all streams share it."""
        return self

    def mean(self, law: Gaussian) -> float:
        """Drift ``E z(X)`` under ``law``."""
        if self.clip is not None:
            x, weight = clipped_nodes(law, self.clip)
            return float(weight @ self(x))
        m, v = scalar_moments(law)
        return self.curvature * (v + m * m) + self.slope * m + self.offset

    def log_moment(self, law: Gaussian, multiplier: float = 1.0) -> float:
        """``log E exp(multiplier z(X))`` under ``law``; infinite where the moment is. Closed form, or quadrature of the clipped law."""
        if self.clip is not None:
            x, weight = clipped_nodes(law, self.clip)
            z = multiplier * self(x)
            return float(z.max() + np.log(weight @ np.exp(z - z.max())))
        m, v = scalar_moments(law)
        a, b, c = (multiplier * k for k in (self.curvature, self.slope, self.offset))
        left = 1.0 - 2.0 * a * v
        return c - 0.5 * float(np.log(left)) + (a * m * m + b * m + 0.5 * b * b * v) / left if left > 0 else np.inf

    def cumulative(self, law: Gaussian, z: Array) -> Array:
        """``P(z(X) <= z)`` of the part of ``law`` strictly inside the clip; :meth:`atoms` holds the rest."""
        mass = _mass_between(law, self.clip)
        if self.curvature == 0.0 and self.slope == 0.0:
            return np.where(self.offset <= z, mass(-np.inf, np.inf), 0.0)
        if self.curvature < 0.0:
            low, high = _between_roots(-self.curvature, -self.slope, z - self.offset)
            return mass(-np.inf, np.inf) - mass(low, high)
        low, high = _between_roots(self.curvature, self.slope, self.offset - z)
        return mass(low, high)

    def atoms(self, law: Gaussian) -> tuple[Array, Array]:
        """Values and probabilities of ``z`` at the two ends of the clip; empty without a clip."""
        if self.clip is None:
            return np.empty(0), np.empty(0)
        m, v = scalar_moments(law)
        ends = np.array([-self.clip, self.clip])
        return self(ends), scipy.special.ndtr((np.array([1.0, -1.0]) * (ends - m)) / np.sqrt(v))


@dataclass(frozen=True, kw_only=True)
class QuadraticForm:
    """``z(x) = x' A x + b' x + offset`` of ``x`` (d,), with ``curvature`` ``A`` (d, d) symmetric and ``slope`` ``b`` (d,) as tuples."""

    curvature: tuple[tuple[float, ...], ...]
    slope: tuple[float, ...]
    offset: float

    def __call__(self, x: Array) -> Array:
        """``(n, d) -> (n,)``. Sums run over columns in a fixed order, so a row's bits do not depend on its neighbours."""
        x = np.asarray(x, dtype=np.float64)
        if x.ndim == 0 or x.shape[-1] != len(self.slope):
            raise ValueError(f"observations must have shape (streams, {len(self.slope)}), got {x.shape}")
        z = np.full(x.shape[:-1], self.offset)
        for row, slope, column in zip(self.curvature, self.slope, np.moveaxis(x, -1, 0), strict=True):
            inner = np.full(z.shape, slope)
            for weight, other in zip(row, np.moveaxis(x, -1, 0), strict=True):
                inner += weight * other
            z += inner * column
        return z

    def scaled(self, multiplier: float) -> "QuadraticForm":
        """``multiplier * z``."""
        rows = tuple(tuple(multiplier * k for k in row) for row in self.curvature)
        return QuadraticForm(curvature=rows, slope=tuple(multiplier * k for k in self.slope), offset=multiplier * self.offset)

    def at(self, rows: slice) -> "QuadraticForm":
        """Itself: all streams share it."""
        return self

    def mean(self, law: Gaussian) -> float:
        """Drift ``E z(X)`` under ``law``."""
        a, b, m = np.asarray(self.curvature), np.asarray(self.slope), np.asarray(law.mean)
        return float(np.trace(a @ law.covariance) + m @ a @ m + b @ m + self.offset)

    def log_moment(self, law: Gaussian, multiplier: float = 1.0) -> float:
        """``log E exp(multiplier z(X))``; infinite where the moment is."""
        a, b, m = multiplier * np.asarray(self.curvature), multiplier * np.asarray(self.slope), np.asarray(law.mean)
        left = law.precision - 2.0 * a
        if np.linalg.eigvalsh(left)[0] <= 0:
            return float(np.inf)
        tilt = b + 2.0 * a @ m
        log_volume = np.linalg.slogdet(left @ law.covariance)[1]
        return float(m @ a @ m + b @ m + multiplier * self.offset + 0.5 * tilt @ np.linalg.solve(left, tilt) - 0.5 * log_volume)


@dataclass(frozen=True, kw_only=True)
class ScoreDifference:
    """``multiplier * (S_H(x, pre) - S_H(x, post))`` of any two laws, normalised or not."""

    pre: Law
    post: Law
    multiplier: float = 1.0
    clip: float | None = None

    def __call__(self, x: Array) -> Array:
        """Increments of ``x`` (n,) or (n, d)."""
        if self.clip is not None:
            x = np.clip(x, -self.clip, self.clip)
        return self.multiplier * (self.pre.hyvarinen(x) - self.post.hyvarinen(x))

    def scaled(self, multiplier: float) -> "ScoreDifference":
        """``multiplier * z``."""
        return replace(self, multiplier=multiplier * self.multiplier)

    @property
    def streams(self) -> int | None:
        """Number of streams that have a law of their own; ``None`` where all share one."""
        return streams_of(self.pre, self.post)

    def at(self, rows: slice) -> "ScoreDifference":
        """The laws of the streams ``rows``, where a law has ``rows`` (one law for each stream)."""
        pre, post = rows_of(self.pre, rows), rows_of(self.post, rows)
        return self if pre is self.pre and post is self.post else replace(self, pre=pre, post=post)


@dataclass(frozen=True, kw_only=True, eq=False)
class Standardised:
    """``z((x - location) / deviation)`` of streams with a ``location`` and ``deviation`` (N,) each, ``z`` for standard observations.

    A linear ``z`` is folded into one gain and shift for each stream, which :meth:`of` does; this class is for the others.
    """

    increment: Increment
    location: Array
    deviation: Array

    @staticmethod
    def of(increment: Increment, location: Array, deviation: Array) -> "Standardised | StreamwiseLine":
        """``increment`` of observations standardised by ``location`` and ``deviation`` (N,). Raises ``ValueError`` for a deviation not above 0."""
        location, deviation = np.asarray(location, dtype=np.float64), np.asarray(deviation, dtype=np.float64)
        if location.ndim != 1 or location.shape != deviation.shape or not (deviation > 0).all():
            raise ValueError(
                f"location and deviation must hold one number a stream, deviations above 0, got shapes {location.shape} and {deviation.shape}"
            )
        if not isinstance(increment, Quadratic) or increment.curvature != 0.0:
            return Standardised(increment=increment, location=location, deviation=deviation)
        gain = increment.slope / deviation
        clip = np.inf if increment.clip is None else increment.clip
        low, high = sorted((increment.offset - increment.slope * clip, increment.offset + increment.slope * clip))
        return StreamwiseLine(gain=gain, shift=increment.offset - gain * location, low=low, high=high)

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        away = np.subtract(x, self.location, dtype=np.float64)
        away /= self.deviation
        return self.increment(away)

    def scaled(self, multiplier: float) -> "Standardised":
        """``multiplier * z``."""
        return replace(self, increment=self.increment.scaled(multiplier))

    @property
    def streams(self) -> int:
        """Number of streams."""
        return len(self.location)

    def at(self, rows: slice) -> "Standardised":
        """With the locations and deviations of ``rows``."""
        return replace(self, location=self.location[rows], deviation=self.deviation[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamwiseLine:
    """``z(x) = gain x + shift`` kept in ``[low, high]``, with a ``gain`` and ``shift`` (N,) for each stream."""

    gain: Array
    shift: Array
    low: float
    high: float

    bounded: ClassVar[bool] = True  # never nan, so a sum of it need not be looked at

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        z = np.multiply(x, self.gain, dtype=np.float64)
        z += self.shift
        np.fmin(z, self.high, out=z)  # fmin and fmax are faster than clip, and no observation is nan
        return np.fmax(z, self.low, out=z)

    def scaled(self, multiplier: float) -> "StreamwiseLine":
        """``multiplier * z``."""
        low, high = sorted((multiplier * self.low, multiplier * self.high))
        return StreamwiseLine(gain=multiplier * self.gain, shift=multiplier * self.shift, low=low, high=high)

    @property
    def streams(self) -> int:
        """Number of streams."""
        return len(self.gain)

    def at(self, rows: slice) -> "StreamwiseLine":
        """With the gains and shifts of ``rows``."""
        return StreamwiseLine(gain=self.gain[rows], shift=self.shift[rows], low=self.low, high=self.high)


def streams_of(*laws: Law) -> int | None:
    """How many streams the ``laws`` speak of, one law for each; ``None`` where each law serves any number."""
    return next((len(law) for law in laws if hasattr(law, "rows")), None)  # type: ignore[arg-type]


def rows_of(law: Law, rows: slice) -> Law:
    """The laws of the streams ``rows``, of a law that has one for each stream; any other law itself."""
    found: Law = law.rows(rows) if hasattr(law, "rows") else law
    return found


def score_increment(pre: Law, post: Law, clip: float | None = None) -> Increment:
    """``h(x) = S_H(x, pre) - S_H(x, post)``, the difference of Hyvarinen scores (arXiv:2407.11094), as a quadratic where both are Gaussian."""
    if not (isinstance(pre, Gaussian) and isinstance(post, Gaussian)):
        return ScoreDifference(pre=pre, post=post, clip=clip)
    return _difference(pre, post, _hyvarinen_terms, clip)


def likelihood_increment(pre: Gaussian, post: Gaussian, clip: float | None = None) -> Increment:
    """Log-likelihood ratio of ``post`` to ``pre``."""
    return _difference(pre, post, _likelihood_terms, clip)


def clipped_nodes(law: Gaussian, clip: float, num: int = 256) -> tuple[Array, Array]:
    """Points and weights whose weighted sums are expectations under ``law`` clipped to ``[-clip, clip]``, atoms included."""
    m, v = scalar_moments(law)
    sd = np.sqrt(v)
    low, high = np.clip((np.array([-clip, clip]) - m) / sd, -12.0, 12.0)
    points, weights = _legendre(num)
    t = 0.5 * (low + high) + 0.5 * (high - low) * points
    inner = 0.5 * (high - low) * weights * np.exp(-0.5 * t * t) / np.sqrt(2.0 * np.pi)
    ends = scipy.special.ndtr(np.array([-clip - m, m - clip]) / sd)
    return np.concatenate((np.clip(m + sd * t, -clip, clip), [-clip, clip])), np.concatenate((inner, ends))


def scalar_moments(law: Gaussian) -> tuple[float, float]:
    """Mean and variance of a law of numbers. Raises ``ValueError`` for any other."""
    if not isinstance(law, Gaussian) or law.dimension:
        raise ValueError(f"a Gaussian law of numbers is needed here, got {law!r}")
    return float(law.mean), float(law.variance)  # type: ignore[arg-type]


def _difference(pre: Gaussian, post: Gaussian, terms: Callable[[Gaussian], Quadratics], clip: float | None) -> Increment:
    if pre.dimension != post.dimension:
        raise ValueError(f"laws must share one dimension, got {pre.dimension} and {post.dimension}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip!r}")
    a, b, c = (np.asarray(p - q) for p, q in zip(terms(pre), terms(post), strict=True))
    if pre.dimension == 0:
        return Quadratic(curvature=float(a[0, 0]), slope=float(b[0]), offset=float(c), clip=clip)
    if clip is not None:
        raise ValueError(f"clip needs a stream of numbers; pass clip=None for laws of dimension {pre.dimension}")
    return QuadraticForm(curvature=tuple(map(tuple, a.tolist())), slope=tuple(b.tolist()), offset=float(c))


def _hyvarinen_terms(law: Gaussian) -> Quadratics:
    mean, square = np.atleast_1d(np.asarray(law.mean)), law.precision @ law.precision
    return 0.5 * square, -square @ mean, 0.5 * mean @ square @ mean - np.trace(law.precision)


def _likelihood_terms(law: Gaussian) -> Quadratics:
    mean, precision = np.atleast_1d(np.asarray(law.mean)), law.precision
    return 0.5 * precision, -precision @ mean, 0.5 * (mean @ precision @ mean + np.linalg.slogdet(law.covariance)[1])


@cache
def _legendre(num: int) -> tuple[Array, Array]:
    points, weights = np.polynomial.legendre.leggauss(num)
    return points, weights


def _mass_between(law: Gaussian, clip: float | None) -> Callable[[Any, Any], Array]:
    m, v = scalar_moments(law)
    sd, end = np.sqrt(v), np.inf if clip is None else clip

    def mass(low: Any, high: Any) -> Array:
        inside: Array = scipy.special.ndtr((np.clip(high, -end, end) - m) / sd) - scipy.special.ndtr((np.clip(low, -end, end) - m) / sd)
        return np.maximum(inside, 0.0)

    return mass


def _between_roots(a: float, b: float, c: NDArray[np.float64]) -> tuple[Array, Array]:
    """Ends of ``{x : a x^2 + b x + c <= 0}`` for ``a >= 0`` (``b`` not 0 where ``a`` is), stable for small ``a``; equal ends where empty."""
    if a == 0.0:
        root = -c / b
        unbounded = np.full_like(root, np.inf)
        return (-unbounded, root) if b > 0 else (root, unbounded)
    square = b * b - 4.0 * a * c
    q = -0.5 * (b + np.copysign(np.sqrt(np.maximum(square, 0.0)), b))
    first = q / a
    second = np.divide(c, q, out=first.copy(), where=q != 0.0)
    empty = square < 0.0
    return np.where(empty, 0.0, np.minimum(first, second)), np.where(empty, 0.0, np.maximum(first, second))
