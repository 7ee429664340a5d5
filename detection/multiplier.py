"""The multiplier: the largest ``lam`` with ``E exp(lam h) <= 1`` under every pre-change law; it buys ``ARL >= exp(threshold)``.

Exports ``multiplier_for`` (the number detectors use), ``certified_multiplier`` (with its error) and ``positive_root``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy

from detection.expectations import DRAWS, ClosedMoments, Moments, NodeMoments, moments
from detection.increment import Increment, Quadratic, QuadraticForm
from detection.laws import Gaussian, Law

CONFIDENCE = 0.99
_HANDFUL = (
    0.5  # share of the convex excess in the ten largest draws: at most 0.17 for light tails at 10^4 draws, 0.55-0.99 for infinite moments
)
_FAR = 1e-6  # share of the moment beyond ten million standard deviations


class HasMoments(Protocol):
    """An increment whose drift and exponential moment under a Gaussian are known."""

    def mean(self, law: Gaussian) -> float:
        """``E z``."""
        ...

    def log_moment(self, law: Gaussian, multiplier: float = 1.0) -> float:
        """``log E exp(multiplier z)``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """``value``, safe under every law with the stated ``confidence`` (certain where ``num`` is 0), at most the estimated ``root``.

    ``law`` is where the root is least; ``error = root - value``; ``moment`` estimates ``E exp(value h)`` there, from other draws where the
    law gives more, with ``standard_error``; ``num`` draws placed the root.
    """

    value: float
    root: float
    law: Law
    moment: float
    standard_error: float
    num: int
    confidence: float

    @property
    def error(self) -> float:
        """How far the root may lie above the value."""
        return self.root - self.value


def gaussian(law: Law) -> Gaussian:
    """``law`` itself where it is Gaussian, else ``ValueError``."""
    if not isinstance(law, Gaussian):
        raise ValueError(
            f"designs are computed for Gaussian laws, got {law!r}; construct the detector with a multiplier and a threshold of your own"
        )
    return law


def moments_of(increment: Increment) -> HasMoments:
    """``increment`` itself where its moments are known; ``ValueError`` where only samples could tell."""
    if isinstance(increment, Quadratic | QuadraticForm):
        return increment
    raise ValueError(f"moments are known for Gaussian pairs only, got {increment!r}; construct the detector with a multiplier of your own")


def multiplier_for(
    increment: Increment,
    laws: Sequence[Law],
    *,
    rng: np.random.Generator | None = None,
    num: int = DRAWS,
    confidence: float = CONFIDENCE,
) -> float:
    """Least of the positive roots of ``log E_P exp(lam z) = 0`` over the ``laws``; arXiv:2407.11094. From draws, the safe end of each.

    The exponential moment is linear in the law, so what holds for ``laws`` holds for their mixtures. Arguments and errors as for
    :func:`certified_multiplier`.
    """
    return certified_multiplier(increment, laws, rng=rng, num=num, confidence=confidence).value


def certified_multiplier(
    increment: Increment,
    laws: Sequence[Law],
    *,
    rng: np.random.Generator | None = None,
    num: int = DRAWS,
    confidence: float = CONFIDENCE,
) -> Multiplier:
    """The multiplier of ``increment`` with its error: closed or by quadrature where the moment is known, else from ``num`` draws of each law.

    From draws, ``value`` is where the upper confidence end of the moment reaches 1 (:meth:`NodeMoments.upper_log_moment`: normal for the bulk,
    with an exponential tail); ``confidence`` is for all laws together. Raises ``ValueError`` naming the law under which the
    statistic does not drift down, or can never alarm, and where the moment is infinite: where ten draws hold half of the sum
    ``sum (exp(z) - 1 - z)`` that places the root, or quadrature finds mass beyond 1e7 standard deviations.
    """
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must lie in (0.5, 1), got {confidence!r}")
    if not laws:
        raise ValueError("laws must hold at least one law, got none")
    quantile = float(scipy.special.ndtri(1 - (1 - confidence) / len(laws)))
    found = [_multiplier(increment, law, rng, num, quantile, confidence) for law in laws]
    return min(found, key=lambda one: one.value)


def positive_root(increment: HasMoments, law: Gaussian) -> float:
    """The one positive root of the convex ``lam -> log E exp(lam z)``. Raises ``ValueError`` where there is none."""
    return _root(lambda lam: increment.log_moment(law, lam), increment.mean(law), law)


def _multiplier(
    increment: Increment, law: Law, rng: np.random.Generator | None, num: int, quantile: float, confidence: float
) -> Multiplier:
    own = moments(increment, law, rng=rng, num=num)
    if isinstance(own, ClosedMoments):
        root = value = positive_root(own.increment, own.law)
        return Multiplier(value=value, root=root, law=law, moment=1.0, standard_error=0.0, num=0, confidence=confidence)
    assert isinstance(own, NodeMoments)
    root = value = _root(own.log_moment, own.drift().value, law, own)
    _refuse_heavy(own, root, law)
    if own.num:
        value = min(root, _safe_end(own, quantile, law))
    check = own if own.num == 0 or rng is None else moments(increment, law, rng=rng, num=num)
    assert isinstance(check, NodeMoments)
    moment = float(np.exp(check.log_moment(value)))
    error = moment * check.relative_error(value)
    return Multiplier(value=value, root=root, law=law, moment=moment, standard_error=error, num=own.num, confidence=confidence)


def _safe_end(own: NodeMoments, quantile: float, law: Law) -> float:
    """Where the upper confidence end of the moment reaches 1."""
    drift = own.drift()
    if not drift.value + quantile * drift.standard_error < 0:
        raise ValueError(
            f"the statistic must drift down before the change, but its drift under {law!r}, {drift.value:+.4g} with standard error "
            f"{drift.standard_error:.2g} from {own.num} draws, is not established below 0; take more draws or move the laws apart"
        )
    return _root(lambda lam: own.upper_log_moment(lam, quantile), drift.value, law)


def _refuse_heavy(own: NodeMoments, root: float, law: Law) -> None:
    share = own.concentration(root)
    if own.num and share > _HANDFUL:
        raise ValueError(
            f"clip or transform the stream: of the {own.num} draws from {law!r}, ten hold {share:.0%} of what places the multiplier, so that "
            "E exp(z) looks infinite (for lighter tails, take more draws)"
        )
    if own.num == 0 and share > _FAR:
        raise _infinite(law)


def _infinite(law: Law) -> ValueError:
    return ValueError(f"clip or transform the stream: E exp(lam z) is infinite under {law!r} for every lam > 0")


def _root(log_moment: Callable[[float], float], drift: float, law: Law, own: Moments | None = None) -> float:
    if not drift < 0:
        raise ValueError(f"the statistic must drift down before the change, but drifts by {drift:+.4g} under {law!r}")

    def slope(lam: float) -> float:
        # log-moment over lam increases from the drift, so its sign change is unique; infinity is any large number to the search
        return min(log_moment(lam) / lam, 1e300)

    low, high = _bracket(slope, law, own)
    from scipy.optimize import brentq

    return float(brentq(slope, low, high, xtol=1e-15 * high, rtol=1e-15, maxiter=500))


def _bracket(slope: Callable[[float], float], law: Law, own: Moments | None) -> tuple[float, float]:
    low, high = 1.0, 1.0
    while slope(low) >= 0:
        low /= 2.0
        if low < 1e-12:
            if isinstance(own, NodeMoments) and own.concentration(low) > _FAR and not own.num:
                raise _infinite(law)
            raise ValueError(f"the statistic must drift down before the change, but its drift under {law!r} cannot be told from 0")
    while slope(high) < 0:
        high *= 2.0
        if high > 1e12:
            raise ValueError(
                f"the increment never rises under {law!r}: the detector never alarms in control, so no finite multiplier exists"
            )
    return low, high
