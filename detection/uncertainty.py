"""Uncertainty sets: what is known of a law, before the change and after it.

Exports ``UncertaintySet`` (the contract), ``GaussianBox``, ``FiniteSet``, ``Singleton``, ``confidence_box`` and ``default_post``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite, sqrt
from typing import Protocol, runtime_checkable

from detection.laws import Gaussian, Law

Interval = tuple[float, float]


@runtime_checkable
class UncertaintySet(Protocol):
    """A set of laws. What holds for the laws of ``extreme`` and is linear in the law holds for all of their mixtures."""

    def extreme(self) -> Sequence[Law]:
        """Laws on which a promise about the whole set is verified."""
        ...

    def centre(self) -> Law:
        """The law that a design without robustness would take for the whole set."""
        ...


@dataclass(frozen=True, kw_only=True)
class GaussianBox:
    """All ``N(m, v)`` with ``m`` in ``mean`` and ``v`` in ``variance``, both closed intervals ``(low, high)``.

    No Gaussian is a mixture of others, so every member is extreme: ``extreme`` gives the corners first, then a lattice of 9 x 9 members.

    >>> GaussianBox(mean=(0.0, 1.0), variance=(1.0, 2.0)).extreme()[3]
    Gaussian(mean=1.0, variance=2.0)
    """

    mean: Interval
    variance: Interval

    def __post_init__(self) -> None:
        for name, (low, high) in (("mean", self.mean), ("variance", self.variance)):
            if not (isfinite(low) and isfinite(high) and low <= high):
                raise ValueError(f"{name} must be a finite interval (low, high) with low <= high, got {(low, high)}")
            object.__setattr__(self, name, (float(low), float(high)))
        if self.variance[0] <= 0:
            raise ValueError(f"variance must be an interval above 0, got {self.variance}")

    def extreme(self) -> tuple[Gaussian, ...]:
        """Corners (low to high in mean, then variance), followed by the lattice between them."""
        corners = [Gaussian(m, v) for m, v in product(self.mean, self.variance)]
        lattice = [Gaussian(m, v) for m, v in product(_steps(*self.mean), _steps(*self.variance))]
        return tuple(dict.fromkeys(corners + lattice))

    def centre(self) -> Gaussian:
        """Middle of both intervals."""
        return Gaussian(sum(self.mean) / 2, sum(self.variance) / 2)


@dataclass(frozen=True)
class FiniteSet:
    """Finitely many laws of one dimension (and, for what is linear in the law, all mixtures of them)."""

    laws: tuple[Law, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "laws", tuple(self.laws))
        if not self.laws:
            raise ValueError("laws must hold at least one law, got none")

    def extreme(self) -> tuple[Law, ...]:
        """The laws themselves."""
        return self.laws

    def centre(self) -> Law:
        """The only law. Raises ``ValueError`` where there are several: finitely many laws have no centre."""
        if len(self.laws) > 1:
            raise ValueError(f"a set of {len(self.laws)} laws has no centre; design for one of them with Singleton(law)")
        return self.laws[0]


def Singleton(law: Law) -> FiniteSet:  # noqa: N802 - reads as the set it makes
    """The set that holds ``law`` alone: the law is known."""
    return FiniteSet((law,))


def confidence_box(n: int, confidence: float = 0.95) -> GaussianBox:
    """What ``n`` calibration values leave undecided about a stream that was standardised by them: the pre-change set.

    ``|m| <= q / sqrt(n)`` and ``(1 - q / sqrt(2 n))^2 <= v <= (1 + q / sqrt(2 n))^2`` with ``q`` the normal quantile of ``confidence``:
    each end holds with that probability for large ``n`` (the upper variance with 0.92 for ``n = 100`` at 0.95). Raises ``ValueError`` for ``n < 2`` and for so little data that the lower end is not above 0.
    """
    from scipy.special import ndtri

    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must lie in [0.5, 1), got {confidence!r}")
    quantile = float(ndtri(confidence))
    least = max(2, int(quantile**2 / 2) + 1)
    if n < least:
        raise ValueError(f"n must be at least {least} calibration values at confidence {confidence}, got {n!r}")
    shift, scale = quantile / sqrt(n), quantile / sqrt(2 * n)
    return GaussianBox(mean=(-shift, shift), variance=((1 - scale) ** 2, (1 + scale) ** 2))


def default_post(pre: GaussianBox, *, harm: float = 0.75, worst: float = 4.0) -> GaussianBox:
    """Every upward shift of at least ``harm`` (in units of ``x``), with a variance interval that reaches over that of ``pre``.

    The least favourable pair then has one common variance, its statistic is linear, and the drift margins hold for every ``pre`` whose
    means stay below ``harm`` (by a little more where observations are clipped). Raises ``ValueError`` when they do not: too few
    calibration values for a harm this small.
    """
    if pre.mean[1] >= harm:
        raise ValueError(
            f"harm must exceed every pre-change mean, got {harm} against {pre.mean[1]:.3f}; use more calibration values or a larger harm"
        )
    return GaussianBox(mean=(harm, max(harm, worst)), variance=(min(1.0, pre.variance[1]), max(1.5, pre.variance[1])))


def _steps(low: float, high: float, num: int = 9) -> list[float]:
    return [low + (high - low) * k / (num - 1) for k in range(num - 1)] + [high]
