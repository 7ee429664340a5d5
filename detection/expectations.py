"""Expectations under a law: closed for quadratics of Gaussians, by quadrature for laws of numbers with a density, else from draws.

Exports ``Nodes``, ``nodes_of``, ``Estimate``, ``Moments`` and ``moments``: drift and exponential moment of an increment, with their errors.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from detection.increment import Increment, Quadratic, QuadraticForm
from detection.laws import Array, Gaussian, Law, NormalisedLaw

DRAWS = 100_000
_REACH, _PANEL, _POINTS = 17.0, 0.1, 12  # the line as c + s sinh(t), |t| <= 17: to 1e7 s, in panels of 12 nodes
_MASS = 1e-6  # probability that quadrature may miss


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An expectation and the standard error of its estimate, 0 where it is exact."""

    value: float
    standard_error: float = 0.0


@dataclass(frozen=True, eq=False)
class Nodes:
    """``points`` (n,) or (n, d) and ``log_weights`` (n,) whose weighted sums are expectations; ``drawn`` where they are a sample."""

    points: Array
    log_weights: Array
    drawn: bool

    @classmethod
    def of_draws(cls, points: Array) -> "Nodes":
        """A sample, equally weighted."""
        return cls(points, np.full(len(points), -np.log(len(points))), True)

    def with_mass(self) -> "Nodes":
        """Without the nodes of a weight below ``exp(-80)``, which matter to exponential moments alone."""
        held = self.log_weights > -80.0
        return Nodes(self.points[held], self.log_weights[held], self.drawn)

    def mean(self, values: Array) -> Estimate:
        """Expectation of the ``values`` (n,) at the points."""
        if self.drawn:
            return Estimate(value=float(values.mean()), standard_error=float(values.std() / np.sqrt(len(values))))
        return Estimate(value=float(np.exp(self.log_weights) @ values))


@runtime_checkable
class Observed(Protocol):
    """A law known by observations only: ``draws`` (n,) or (n, d), which stand for it in every expectation."""

    @property
    def draws(self) -> Array: ...


class Moments(Protocol):
    """Drift and exponential moment of an increment under one law; ``num`` draws are behind them, 0 where they are exact."""

    @property
    def num(self) -> int: ...

    def drift(self) -> Estimate:
        """``E z``."""
        ...

    def log_moment(self, multiplier: float) -> float:
        """``log E exp(multiplier z)``."""
        ...


@dataclass(frozen=True)
class ClosedMoments:
    """Of a quadratic under a Gaussian."""

    increment: Quadratic | QuadraticForm
    law: Gaussian
    num: int = 0

    def drift(self) -> Estimate:
        """``E z``."""
        return Estimate(value=self.increment.mean(self.law))

    def log_moment(self, multiplier: float) -> float:
        """``log E exp(multiplier z)``; infinite where the moment is."""
        return self.increment.log_moment(self.law, multiplier)


@dataclass(frozen=True, eq=False)
class NodeMoments:
    """Of the increments ``z`` (n,) at ``nodes``."""

    z: Array
    nodes: Nodes

    @property
    def num(self) -> int:
        """Draws behind the moments; 0 for quadrature."""
        return len(self.z) if self.nodes.drawn else 0

    def drift(self) -> Estimate:
        """``E z``."""
        return self.nodes.mean(self.z)

    def log_moment(self, multiplier: float) -> float:
        """``log E exp(multiplier z)``."""
        parts = multiplier * self.z + self.nodes.log_weights
        top = parts.max()
        return float(top + np.log(np.exp(parts - top).sum()))

    def relative_error(self, multiplier: float) -> float:
        """Standard error of the moment over the moment; 0 for quadrature."""
        if not self.num:
            return 0.0
        excess = np.exp(multiplier * (self.z - self._sorted[-1]))
        return float(excess.std() / excess.mean() / np.sqrt(len(excess)))

    def upper_log_moment(self, multiplier: float, quantile: float) -> float:
        """Upper confidence end of :meth:`log_moment` from draws, ``quantile`` standard errors up; infinite where the moment may be.

        The ``sqrt(n)`` largest increments, which decide the moment and say least about it, count as an exponential tail with the upper end of
        their mean excess; that is generous to every tail that is not heavier than exponential.
        """
        num, most = len(self.z), max(50, int(len(self.z) ** 0.5))
        body, start = self._sorted[:-most], float(self._sorted[-most - 1])
        excess = float((self._sorted[-most:] - start).mean()) * (1.0 + quantile / np.sqrt(most))
        if multiplier * excess >= 1.0:
            return np.inf
        terms = np.exp(multiplier * (body - start))
        mean = float(terms.sum()) / num
        error = np.sqrt(max(float((terms**2).sum()) / num - mean**2, 0.0) / num)
        return float(multiplier * start + np.log(mean + quantile * error + most / num / (1.0 - multiplier * excess)))

    def concentration(self, multiplier: float, points: int = 10) -> float:
        """Share of ``sum (exp(z) - 1 - z)``, ``z`` multiplied, that the ``points`` largest terms hold (draws), or the far ends (quadrature).

        At a root of the moment that sum balances the drift, so it is what places the root.
        """
        z = multiplier * self.z
        if self.nodes.drawn:
            excess = np.sort(np.expm1(z) - z)
            return float(excess[-points:].sum() / excess.sum())
        parts = z + self.nodes.log_weights
        mass = np.exp(parts - parts.max())
        return float((mass[:_POINTS].sum() + mass[-_POINTS:].sum()) / mass.sum())

    @cached_property
    def _sorted(self) -> Array:
        return np.sort(self.z)


def moments(increment: Increment, law: Law, *, rng: np.random.Generator | None = None, num: int = DRAWS) -> Moments:
    """Drift and exponential moment of ``increment`` under ``law``; ``num`` draws from ``rng`` where neither is known otherwise.

    Raises ``ValueError`` where draws are needed and ``rng`` is missing, and for increments that are not finite.
    """
    if isinstance(increment, Quadratic | QuadraticForm) and isinstance(law, Gaussian):
        return ClosedMoments(increment, law)
    nodes = nodes_of(law, clip=getattr(increment, "clip", None), rng=rng, num=num)
    z = increment(nodes.points)
    if not np.isfinite(z).all():
        raise ValueError(
            f"increments must be finite under {law!r}, got {int((~np.isfinite(z)).sum())} of {z.size} that are not; clip the stream"
        )
    return NodeMoments(z, nodes)


def nodes_of(law: Law, *, clip: float | None = None, rng: np.random.Generator | None = None, num: int = DRAWS) -> Nodes:
    """Nodes for expectations under ``law``: its observations, quadrature (with breaks at ``+-clip``), or ``num`` draws from ``rng``."""
    if isinstance(law, Observed):
        return Nodes.of_draws(law.draws)
    if on_the_line(law):
        return _quadrature(law, clip)
    if rng is None:
        raise ValueError(f"expectations under {law!r} are estimated from draws: pass rng")
    if num < 100:
        raise ValueError(f"num must be at least 100 draws, got {num!r}")
    return Nodes.of_draws(law.sample(rng, num))


def on_the_line(law: Law) -> bool:
    """Whether expectations under ``law`` are sums over a grid: numbers, and a density that is known."""
    return isinstance(law, NormalisedLaw) and law.dimension == 0 and not isinstance(law, Observed)


def _quadrature(law: Law, clip: float | None) -> Nodes:
    """Gauss-Legendre panels in ``t`` of ``x = c + s sinh(t)``: fine where the mass is, and far enough out for heavy tails."""
    assert isinstance(law, NormalisedLaw)
    centre, scale = _location(law)
    breaks = [] if clip is None else [float(np.arcsinh((end - centre) / scale)) for end in (-clip, clip)]
    grid = np.linspace(-_REACH, _REACH, round(2 * _REACH / _PANEL) + 1)
    edges = np.unique(np.concatenate((grid, np.clip(breaks, -_REACH, _REACH))))
    points, weights = np.polynomial.legendre.leggauss(_POINTS)
    half = 0.5 * np.diff(edges)[:, None]
    t = (edges[:-1, None] + half + half * points).ravel()
    x = centre + scale * np.sinh(t)
    log_weights = np.maximum(law.log_density(x) + np.log(scale * np.cosh(t)) + np.log(half * weights).ravel(), -1e300)
    missed = abs(float(np.exp(log_weights).sum()) - 1.0)
    if not missed <= _MASS:
        raise ValueError(
            f"log_density must integrate to 1 over the line, but that of {law!r} is off by {missed:.2g}; is it too spiky, or not normalised?"
        )
    return Nodes(x, log_weights, False)


def _location(law: Law) -> tuple[float, float]:
    """Middle and spread of a fixed sample: where the quadrature is finest, which moves its results by rounding only."""
    low, middle, high = np.quantile(law.sample(np.random.default_rng(0), 1001), [0.1, 0.5, 0.9])
    if not high > low:
        raise ValueError(f"a law with a density must draw values that differ, but 80 % of those of {law!r} are {middle}")
    return float(middle), float((high - low) / 2.0)


def stacked(score: Array, laplacian: NDArray[np.float64]) -> Array:
    """``score`` as (n, d), for laws of numbers too."""
    return score[:, None] if score.shape == laplacian.shape else score
