"""The multiplier: the largest ``lam`` with ``E exp(lam h) <= 1`` under every pre-change law; it buys ``ARL >= exp(threshold)``."""

from collections.abc import Callable, Sequence
from typing import Protocol

from detection.increment import Increment, Quadratic, QuadraticForm
from detection.laws import Gaussian, Law


class HasMoments(Protocol):
    """An increment whose drift and exponential moment under a Gaussian are known."""

    def mean(self, law: Gaussian) -> float:
        """``E z``."""
        ...

    def log_moment(self, law: Gaussian, multiplier: float = 1.0) -> float:
        """``log E exp(multiplier z)``."""
        ...


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


def multiplier_for(increment: Increment, laws: Sequence[Law]) -> float:
    """Least of the positive roots of ``log E_P exp(lam z) = 0`` over the ``laws``; arXiv:2407.11094.

    The exponential moment is linear in the law, so what holds for ``laws`` holds for their mixtures. Raises ``ValueError`` naming the law
    under which the statistic does not drift down, or under which it can never alarm.
    """
    known = moments_of(increment)
    return min(positive_root(known, gaussian(law)) for law in laws)


def positive_root(increment: HasMoments, law: Gaussian) -> float:
    """The one positive root of the convex ``lam -> log E exp(lam z)``. Raises ``ValueError`` where there is none."""
    drift = increment.mean(law)
    if not drift < 0:
        raise ValueError(f"the statistic must drift down before the change, but drifts by {drift:+.4g} under {law!r}")

    def slope(lam: float) -> float:
        # log-moment over lam increases from the drift, so its sign change is unique; infinity is any large number to the search
        return min(increment.log_moment(law, lam) / lam, 1e300)

    low, high = _bracket(slope, law)
    from scipy.optimize import brentq

    return float(brentq(slope, low, high, xtol=1e-15 * high, rtol=1e-15, maxiter=500))


def _bracket(slope: Callable[[float], float], law: Gaussian) -> tuple[float, float]:
    low, high = 1.0, 1.0
    while slope(low) >= 0:
        low /= 2.0
        if low < 1e-12:
            raise ValueError(f"the statistic must drift down before the change, but its drift under {law!r} cannot be told from 0")
    while slope(high) < 0:
        high *= 2.0
        if high > 1e12:
            raise ValueError(
                f"the increment never rises under {law!r}: the detector never alarms in control, so no finite multiplier exists"
            )
    return low, high
