"""What a detector is worth, exactly: run length and delay under the worst laws of what is uncertain."""

from dataclasses import dataclass
from math import exp

from detection.detector import ReflectedSum
from detection.increment import Increment, Quadratic
from detection.laws import Gaussian, Law
from detection.run_length import worst_delay, worst_null


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a detector is worth, exactly: ``arl`` ticks between false alarms under the worst pre-change law ``worst_pre``, at least
    ``floor``; mean ``delay`` (observations used) under the worst post-change law ``worst_post``; and ``smallest_harm``, the mean above
    which the statistic drifts up at all, at the design's post-change variance."""

    arl: float
    floor: float
    worst_pre: Law
    delay: float
    worst_post: Law
    smallest_harm: float


def promise_of(detector: ReflectedSum, pre: tuple[Law, ...], post: tuple[Law, ...], design: tuple[Law, Law]) -> Promise:
    """Exact promise of ``detector`` against the laws ``pre`` and ``post``; ``design`` is the pair it was built on.

    Raises ``ValueError`` where the distribution of its increment is not known.
    """
    worst_pre, arl = worst_null(detector.increment, pre, detector.threshold)
    worst_post, delay = worst_delay(detector.increment, post, detector.threshold)
    harm = _turning_mean(detector.increment, *design)
    return Promise(arl=arl, floor=exp(detector.threshold), worst_pre=worst_pre, delay=delay, worst_post=worst_post, smallest_harm=harm)


def _turning_mean(increment: Increment, pre: Law, post: Law) -> float:
    """Mean between those of ``pre`` and ``post`` at which the drift turns up, at the variance of ``post``; ``nan`` where no mean decides."""
    if not (isinstance(increment, Quadratic) and isinstance(pre, Gaussian) and isinstance(post, Gaussian)):
        return float("nan")

    def drift(share: float) -> float:
        mean = (1 - share) * float(pre.mean) + share * float(post.mean)  # type: ignore[arg-type]
        return increment.mean(Gaussian(mean, post.variance))

    if not drift(0.0) < 0.0 < drift(1.0):
        return float("nan")
    from scipy.optimize import brentq

    share = float(brentq(drift, 0.0, 1.0))
    return (1 - share) * float(pre.mean) + share * float(post.mean)  # type: ignore[arg-type]
