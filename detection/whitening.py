"""Invariance to linear maps: score-based detectors are not invariant, so whiten the stream first, or precondition the score.

The preconditioned score ``S_M(x, P) = 0.5 s' M s + tr(M J)`` with ``M = W^-1 W^-T`` is the plain score of the stream ``W x``: exactly the same
statistic. Exports ``Whitening``, ``preconditioned_increment``, ``PreconditionedDifference`` and ``jacobian_of``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from detection.increment import Increment, Quadratic, QuadraticForm, score_increment
from detection.laws import Array, Gaussian, Law, observations, rows_times
from detection.mixtures import Mixture

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Whitening:
    """``x -> W x`` with ``W`` (d, d) symmetric and ``W covariance W = I``: the map closest to doing nothing.

    >>> Whitening.of([[4.0, 0.0], [0.0, 1.0]])(np.array([2.0, 1.0]))
    array([1., 1.])
    """

    matrix: Matrix

    def __post_init__(self) -> None:
        matrix = np.asarray(self.matrix, dtype=np.float64)
        if (
            matrix.ndim != 2
            or matrix.shape[0] != matrix.shape[1]
            or not np.isfinite(matrix).all()
            or np.linalg.matrix_rank(matrix) < len(matrix)
        ):
            raise ValueError(f"matrix must be an invertible (d, d) matrix of finite numbers, got {self.matrix!r}")
        object.__setattr__(self, "matrix", as_matrix(matrix))

    @classmethod
    def of(cls, covariance: ArrayLike) -> Self:
        """The whitening of a ``covariance`` (d, d). Raises ``ValueError`` where it is singular: drop the constant or repeated coordinates."""
        covariance = np.asarray(covariance, dtype=np.float64)
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
            raise ValueError(f"covariance must be (d, d), got shape {covariance.shape}; for observations use Whitening.of_data")
        if not np.isfinite(covariance).all() or not np.allclose(covariance, covariance.T, rtol=1e-10, atol=0):
            raise ValueError(f"covariance must be symmetric and finite, got {covariance!r}")
        values, vectors = np.linalg.eigh(covariance)
        if not values[0] > 1e-12 * values[-1]:
            raise ValueError(
                f"covariance must be positive definite, but its eigenvalues are {values!r}; drop constant or repeated coordinates"
            )
        return cls(as_matrix((vectors / np.sqrt(values)) @ vectors.T))

    @classmethod
    def of_data(cls, x: ArrayLike) -> Self:
        """The whitening of the covariance of in-control observations ``x`` (n, d), n > d."""
        x = np.asarray(x, dtype=np.float64)
        if x.ndim != 2 or len(x) <= x.shape[1] or not np.isfinite(x).all():
            raise ValueError(f"x must be finite observations (n, d) with n > d, got shape {x.shape}")
        return cls.of(np.atleast_2d(np.cov(x.T)))

    @property
    def precondition(self) -> Matrix:
        """``M = W^-1 W^-T``, the covariance: scores preconditioned by it need no whitening."""
        inverse = np.linalg.inv(np.asarray(self.matrix))
        return as_matrix(inverse @ inverse.T)

    def __call__(self, x: ArrayLike) -> Array:
        """Whitened observations (..., d)."""
        return rows_times(observations(x, len(self.matrix)), np.asarray(self.matrix).T)

    def law(self, law: Gaussian) -> Gaussian:
        """The law of ``W x`` where ``x`` follows ``law``."""
        matrix = np.asarray(self.matrix)
        covariance = matrix @ law.covariance @ matrix.T
        return Gaussian(tuple((matrix @ np.asarray(law.mean)).tolist()), as_matrix(0.5 * (covariance + covariance.T)))


@dataclass(frozen=True, kw_only=True)
class PreconditionedDifference:
    """``multiplier (S_M(x, pre) - S_M(x, post) + offset)`` for ``matrix`` (d, d) symmetric, ``S_M = 0.5 s' M s + tr(M J)``."""

    pre: Law
    post: Law
    matrix: Matrix
    offset: float = 0.0
    multiplier: float = 1.0
    clip: float | None = None

    def __call__(self, x: Array) -> Array:
        """Increments of ``x`` (n,) or (n, d)."""
        x = np.asarray(x, dtype=np.float64) if self.clip is None else np.clip(np.asarray(x, dtype=np.float64), -self.clip, self.clip)
        weights = np.asarray(self.matrix).ravel()
        shape = x.shape[:-1] if getattr(self.pre, "dimension", 0) else x.shape
        rows = x.reshape(-1, x.shape[-1]) if getattr(self.pre, "dimension", 0) else x.reshape(-1)
        z: Array = (score_matrices(self.pre, self.post, rows).reshape(len(rows), -1) * weights).sum(axis=-1)
        return self.multiplier * (z.reshape(shape) + self.offset)

    def scaled(self, multiplier: float) -> "PreconditionedDifference":
        """``multiplier * z``."""
        return replace(self, multiplier=multiplier * self.multiplier)

    def at(self, rows: slice) -> "PreconditionedDifference":
        """Itself: all streams share it."""
        return self


def preconditioned_increment(
    pre: Law, post: Law, matrix: ArrayLike | Sequence[Sequence[float]], *, offset: float = 0.0, clip: float | None = None
) -> Increment:
    """``S_M(x, pre) - S_M(x, post) + offset``, a quadratic where both laws are Gaussian (and nothing is clipped, or ``x`` is a number).

    ``matrix`` is ``M``, (d, d) symmetric, (1, 1) for numbers. With ``M = Sigma`` and two Gaussians of covariance ``Sigma`` it is the
    log-likelihood ratio. Raises ``ValueError`` for a matrix that is not symmetric or does not fit.
    """
    weights = np.asarray(matrix, dtype=np.float64)
    size = max(int(getattr(pre, "dimension", len(weights))), 1)
    if weights.shape != (size, size) or not np.isfinite(weights).all() or not np.allclose(weights, weights.T, rtol=1e-9, atol=1e-12):
        raise ValueError(f"matrix must be symmetric of shape ({size}, {size}), got {weights!r}")
    if not (isinstance(pre, Gaussian) and isinstance(post, Gaussian)):
        return PreconditionedDifference(pre=pre, post=post, matrix=as_matrix(weights), offset=offset, clip=clip)
    if pre.dimension == 0:
        plain = score_increment(pre, post, clip).scaled(float(weights[0, 0]))
        assert isinstance(plain, Quadratic)
        return replace(plain, offset=plain.offset + offset)
    if clip is not None:
        return PreconditionedDifference(pre=pre, post=post, matrix=as_matrix(weights), offset=offset, clip=clip)
    return _quadratic_form(pre, post, weights, offset)


def score_matrices(pre: Law, post: Law, x: Array) -> Array:
    """``0.5 s s' + J`` of ``pre`` minus that of ``post``, (n, d, d): the preconditioned increment is its inner product with ``M``."""
    parts = []
    for law in (pre, post):
        score = law.score(x)
        score = score[:, None] if score.ndim == 1 else score
        parts.append(0.5 * score[:, :, None] * score[:, None, :] + jacobian_of(law, x))
    return np.asarray(parts[0] - parts[1])


def jacobian_of(law: Law, x: Array) -> Array:
    """Jacobian of the score of ``law`` at ``x`` (n,) or (n, d), as (n, d, d), d = 1 for numbers.

    Exact for numbers (the Laplacian), Gaussians, mixtures of laws whose own is exact, and laws with a method ``jacobian(x)``. For any other law
    central differences of the score, symmetrised, with steps of 1e-5 (1 + |x|): ``2 d`` scores, relative error near 1e-9 where the third
    derivatives of the log-density are moderate.
    """
    if hasattr(law, "jacobian"):
        found: Array = np.asarray(law.jacobian(x), dtype=np.float64)
        return found
    if x.ndim == 1:
        return law.laplacian(x)[:, None, None]
    if isinstance(law, Gaussian):
        return np.broadcast_to(-law.precision, (len(x), *law.precision.shape))
    if isinstance(law, Mixture):
        return _mixture_jacobian(law, x)
    return _differences(law, x)


def as_matrix(matrix: Any) -> Matrix:
    """A matrix as tuples, so that what holds it compares and prints."""
    return tuple(map(tuple, np.asarray(matrix, dtype=np.float64).tolist()))


def _mixture_jacobian(law: Mixture, x: Array) -> Array:
    """``sum r_k (J_k + s_k s_k') - s s'``."""
    shares, total, score = law.posterior(x), np.zeros((*x.shape, x.shape[1])), np.zeros(x.shape)
    for k, part in enumerate(law.laws):
        own = part.score(x)
        total += shares[:, k, None, None] * (jacobian_of(part, x) + own[:, :, None] * own[:, None, :])
        score += shares[:, k, None] * own
    return total - score[:, :, None] * score[:, None, :]


def _differences(law: Law, x: Array) -> Array:
    jacobian = np.empty((*x.shape, x.shape[1]))
    for j in range(x.shape[1]):
        step = 1e-5 * (1.0 + np.abs(x[:, j]))
        ahead, behind = x.copy(), x.copy()
        ahead[:, j] += step
        behind[:, j] -= step
        jacobian[:, :, j] = (law.score(ahead) - law.score(behind)) / (ahead[:, j] - behind[:, j])[:, None]
    return np.asarray(0.5 * (jacobian + jacobian.swapaxes(1, 2)))


def _quadratic_form(pre: Gaussian, post: Gaussian, weights: Array, offset: float) -> QuadraticForm:
    if pre.dimension != post.dimension:
        raise ValueError(f"laws must share one dimension, got {pre.dimension} and {post.dimension}")
    curvature, slope, constant = np.zeros_like(weights), np.zeros(len(weights)), offset
    for sign, law in ((1.0, pre), (-1.0, post)):
        square, mean = law.precision @ weights @ law.precision, np.asarray(law.mean)
        curvature += 0.5 * sign * square
        slope -= sign * square @ mean
        constant += sign * float(0.5 * mean @ square @ mean - np.trace(weights @ law.precision))
    tiny = 1e-13 * float(np.abs(pre.precision @ weights @ pre.precision).max())
    if np.abs(curvature).max() <= tiny:  # equal covariances: linear, which exact run lengths need to see
        curvature[:] = 0.0
    return QuadraticForm(curvature=as_matrix(0.5 * (curvature + curvature.T)), slope=tuple(slope.tolist()), offset=constant)
