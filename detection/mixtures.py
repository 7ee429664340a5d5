"""Mixtures of laws, and the kernel density of a sample: densities are mixed, so scores are weighted by *posterior* probabilities.

With ``r_k(x)`` the posterior probability of component ``k``: ``s = sum r_k s_k``, ``tr J = sum r_k (tr J_k + |s_k|^2) - |s|^2``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from detection.laws import Array, ByValue, NormalisedLaw, ScoredLaw, observations, read_only

_CELLS = 1 << 17  # observations x points held at once: 1 MiB an array


@dataclass(frozen=True)
class Mixture(ScoredLaw):
    """``p = sum_k weights_k p_k`` of normalised ``laws`` of one dimension; mixtures nest.

    Raises ``ValueError`` for weights that are not probabilities, and for a law without a density or of another dimension.

    >>> from detection.laws import Gaussian
    >>> Mixture([Gaussian(-1.0, 1.0), Gaussian(1.0, 1.0)], [0.5, 0.5]).score(np.array([0.0]))
    array([0.])
    """

    laws: Sequence[NormalisedLaw]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        laws, weights = tuple(self.laws), np.asarray(self.weights, dtype=np.float64)
        if not laws or weights.shape != (len(laws),):
            raise ValueError(f"weights must be one number for each of the {len(laws)} laws (at least one), got shape {weights.shape}")
        if not (weights >= 0).all() or abs(weights.sum() - 1.0) > 1e-9:
            raise ValueError(f"weights must be non-negative and sum to 1, got {self.weights!r} with sum {weights.sum()!r}")
        for law in laws:
            if not isinstance(law, NormalisedLaw):
                raise ValueError(f"laws must have a log_density, for a mixture weighs densities; got {law!r}")
            if law.dimension != laws[0].dimension:
                raise ValueError(f"laws must share one dimension, got {laws[0].dimension} and {law.dimension}")
        object.__setattr__(self, "laws", laws)
        object.__setattr__(self, "weights", tuple((weights / weights.sum()).tolist()))

    @property
    def dimension(self) -> int:
        """0 for a law of numbers, else ``d``."""
        return self.laws[0].dimension

    def posterior(self, x: ArrayLike) -> Array:
        """Probability of each component given ``x``, (..., K)."""
        joint = self._joint(observations(x, self.dimension))
        return np.asarray(np.exp(joint - _log_sum_exp(joint)[..., None]))

    def log_density(self, x: ArrayLike) -> Array:
        """Natural logarithm of the density."""
        return _log_sum_exp(self._joint(observations(x, self.dimension)))

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``(num,)`` or ``(num, d)`` draws, in random order."""
        counts = rng.multinomial(num, self.weights)
        draws = [law.sample(rng, int(count)) for law, count in zip(self.laws, counts, strict=True) if count]
        return np.asarray(rng.permutation(np.concatenate(draws))) if draws else np.empty((0, self.dimension) if self.dimension else 0)

    def _joint(self, x: Array) -> Array:
        with np.errstate(divide="ignore"):
            log_weights = np.log(np.asarray(self.weights))
        joint: Array = np.stack([law.log_density(x) for law in self.laws], axis=-1) + log_weights
        return joint

    def _terms(self, x: Array) -> tuple[Array, Array]:
        posterior = self.posterior(x)
        score, bend = np.zeros(x.shape), np.zeros(posterior.shape[:-1])
        for k, law in enumerate(self.laws):
            own, weight = law.score(x), posterior[..., k]
            score += own * (weight[..., None] if self.dimension else weight)
            bend += weight * (law.laplacian(x) + _squared(own, self.dimension))
        return score, bend - _squared(score, self.dimension)


@dataclass(frozen=True, eq=False)
class KernelDensity(ScoredLaw, ByValue):
    """Mean of Gaussians around ``points`` (n,) or (n, d), with standard deviation ``bandwidth``, a number or (d,), one for each coordinate.

    ``bandwidth`` may name a rule for ``n`` points: ``"scott"`` (the default, ``None``) is ``sd n^(-1/(d+4))`` in each coordinate;
    ``"silverman"`` is ``(4 / (d + 2))^(1/(d+4))`` times that. Time is proportional to observations times points; memory is not.
    Raises ``ValueError`` for points that are not finite, a bandwidth that is not positive, and a rule on constant points.

    >>> KernelDensity([0.0, 2.0], 1.0).score(1.0).item()
    0.0
    """

    points: Array
    bandwidth: float | str | Sequence[float] | Array | None = None

    def __post_init__(self) -> None:
        points = np.asarray(self.points, dtype=np.float64)
        if points.ndim not in (1, 2) or points.size == 0 or not np.isfinite(points).all():
            raise ValueError(f"points must be finite numbers of shape (n,) or (n, d), got shape {points.shape}")
        rule = "scott" if self.bandwidth is None else self.bandwidth
        bandwidth = _by_rule(points, rule) if isinstance(rule, str) else np.asarray(rule, dtype=np.float64)
        if bandwidth.shape not in {(), points.shape[1:]}:
            raise ValueError(f"bandwidth must be a number or of shape {points.shape[1:]}, got shape {bandwidth.shape}")
        if not (np.isfinite(bandwidth).all() and (bandwidth > 0).all()):
            raise ValueError(f"bandwidth must be positive and finite, got {self.bandwidth!r}")
        object.__setattr__(self, "points", read_only(points))
        object.__setattr__(self, "bandwidth", read_only(np.broadcast_to(bandwidth, points.shape[1:])))

    @property
    def dimension(self) -> int:
        """0 for a law of numbers, else ``d``."""
        return 0 if self.points.ndim == 1 else self.points.shape[1]

    def log_density(self, x: ArrayLike) -> Array:
        """Natural logarithm of the density."""
        x = observations(x, self.dimension)
        rows = x.reshape(-1, len(self._columns))
        constant = np.log(2.0 * np.pi) * 0.5 * rows.shape[1] + np.log(self._widths).sum() + np.log(len(self.points))
        blocks = [_log_sum_exp(-0.5 * self._distances(rows[block])) for block in self._blocks(len(rows))]
        density: Array = np.concatenate([np.empty(0), *blocks]) - constant
        return density.reshape(x.shape[:-1] if self.dimension else x.shape)

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``(num,)`` or ``(num, d)`` draws: points picked at random, plus the kernel's noise."""
        chosen: Array = self.points[rng.integers(len(self.points), size=num)]
        return chosen + np.asarray(self.bandwidth) * rng.standard_normal(chosen.shape)

    def _terms(self, x: Array) -> tuple[Array, Array]:
        rows = x.reshape(-1, len(self._columns))
        score, laplacian = np.empty(rows.shape), np.empty(len(rows))
        for block in self._blocks(len(rows)):
            score[block], laplacian[block] = self._block_terms(rows[block])
        return score.reshape(x.shape), laplacian.reshape(x.shape[:-1] if self.dimension else x.shape)

    def _block_terms(self, rows: Array) -> tuple[Array, Array]:
        """Mean and spread, over the posterior of the points, of the components' scores ``(point - x) / width^2``."""
        log_posterior = -0.5 * self._distances(rows)
        posterior = np.exp(log_posterior - log_posterior.max(axis=1, keepdims=True))
        posterior /= posterior.sum(axis=1, keepdims=True)
        score, laplacian = np.empty(rows.shape), np.full(len(rows), -(self._widths**-2.0).sum())
        for j, (column, width) in enumerate(zip(self._columns, self._widths, strict=True)):
            parts = (column - rows[:, j, None]) / width**2
            score[:, j] = (posterior * parts).sum(axis=1)
            laplacian += (posterior * (parts - score[:, j, None]) ** 2).sum(axis=1)
        return score, laplacian

    def _distances(self, rows: Array) -> Array:
        """Squared distances (rows, points) in bandwidths."""
        total = np.zeros((len(rows), len(self.points)))
        for j, (column, width) in enumerate(zip(self._columns, self._widths, strict=True)):
            total += ((column - rows[:, j, None]) / width) ** 2
        return total

    def _blocks(self, num: int) -> list[slice]:
        size = max(_CELLS // len(self.points), 1)
        return [slice(start, start + size) for start in range(0, num, size)]

    @cached_property
    def _columns(self) -> Array:
        return np.ascontiguousarray(np.atleast_2d(self.points.T))

    @cached_property
    def _widths(self) -> Array:
        return np.atleast_1d(np.asarray(self.bandwidth, dtype=np.float64))


def _by_rule(points: Array, rule: str) -> Array:
    if rule not in ("scott", "silverman"):
        raise ValueError(f"bandwidth must be a number, 'scott' or 'silverman', got {rule!r}")
    num, size = len(points), 1 if points.ndim == 1 else points.shape[1]
    spread = points.std(axis=0, ddof=1) if num > 1 else np.zeros(points.shape[1:])
    if not np.all(spread > 1e-12 * np.abs(points).max()):
        raise ValueError(f"bandwidth cannot follow a rule where points do not vary (standard deviations {spread}); pass a number")
    factor = 1.0 if rule == "scott" else (4.0 / (size + 2.0)) ** (1.0 / (size + 4.0))
    return np.asarray(factor * spread * num ** (-1.0 / (size + 4.0)))


def _log_sum_exp(parts: Array) -> Array:
    top = parts.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.exp(parts - top).sum(axis=-1)) + top[..., 0])


def _squared(score: Array, dimension: int) -> Array:
    square: Array = score**2
    return square.sum(axis=-1) if dimension else square
