"""Robust SCUSUM: one statistic for every law before and after the change that two uncertainty sets allow; arXiv:2407.11094."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from detection.design import SimulatedPromise, designed_threshold, knows_exactly, simulated_promise
from detection.detector import ReflectedSum
from detection.expectations import DRAWS
from detection.gaussian_means import GaussianMeans
from detection.increment import Increment, QuadraticForm, score_increment
from detection.laws import Array, Gaussian, Law
from detection.least_favourable import LeastFavourablePair, least_favourable, members
from detection.multiplier import CONFIDENCE, multiplier_for
from detection.promise import Promise, promise_of
from detection.uncertainty import UncertaintySet


@dataclass(frozen=True, kw_only=True)
class RobustScoreCUSUM(ReflectedSum):
    """SCUSUM of the least favourable pair of ``pre`` and ``post``: it drifts down under every law of ``pre``, up under every law of ``post``.

    >>> from detection import GaussianBox, confidence_box
    >>> detector = RobustScoreCUSUM.fit(pre=confidence_box(n=100), post=GaussianBox(mean=(0.75, 4.0), variance=(1.0, 1.5)), arl=1000)
    >>> bool(detector.promise().arl >= 1000)
    True
    """

    pre: UncertaintySet
    post: UncertaintySet
    pair: LeastFavourablePair
    multiplier: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.multiplier > 0:
            raise ValueError(f"multiplier must be positive, got {self.multiplier!r}")

    @classmethod
    def fit(
        cls,
        *,
        pre: UncertaintySet,
        post: UncertaintySet,
        arl: float = 10_000.0,
        clip: float | None = 4.0,
        method: str | None = None,
        rng: np.random.Generator | None = None,
        num: int = DRAWS,
        confidence: float = CONFIDENCE,
    ) -> Self:
        """Least favourable pair, multiplier and threshold with ``arl`` ticks between false alarms under the worst law of ``pre``.

        ``clip`` suits observations standardised to about ``N(0, 1)`` in control; pass ``None`` for others. ``method`` is one of
        :func:`detection.threshold_for`, by default ``"exact"`` for Gaussian sets of numbers and linear statistics of Gaussian vectors, else
        ``"simulate"``. What has no closed form is estimated from ``num`` draws of ``rng`` a law, and holds with ``confidence``. Raises
        ``ValueError`` for sets that meet and for sets whose closest pair does not separate them, naming the law and its drift.
        """
        pair = least_favourable(pre, post, clip=clip, rng=rng, num=num, confidence=confidence)
        plain = score_increment(pair.pre, pair.post, clip)
        nulls, multiplier = covered(pre, plain, members(pre, pair.pre, plain), rng, num, confidence)
        threshold = designed_threshold(plain.scaled(multiplier), nulls, arl, method=method, rng=rng)
        return cls(pre=pre, post=post, pair=pair, multiplier=multiplier, threshold=threshold, clip=clip)

    def _increment(self) -> Increment:
        return score_increment(self.pair.pre, self.pair.post, self.clip).scaled(self.multiplier)

    def promise(self, rng: np.random.Generator | None = None) -> Promise | SimulatedPromise:
        """Run length under the worst law of ``pre``, delay under the worst law of ``post``: exact where the distribution of the increment
        is known, else from runs simulated with ``rng``."""
        nulls = members(self.pre, self.pair.pre, self.increment)
        changes = members(self.post, self.pair.post, self.increment)
        if knows_exactly(self.increment, (*nulls, *changes)):
            return promise_of(self, tuple(nulls), tuple(changes), (self.pair.pre, self.pair.post))
        return simulated_promise(self, nulls, changes, rng)


def covered(
    pre: UncertaintySet, increment: Increment, nulls: Sequence[Law], rng: np.random.Generator | None, num: int, confidence: float
) -> tuple[Sequence[Law], float]:
    """The multiplier that is safe under all of ``pre``, and the ``nulls`` with the members added that decide it.

    Of a set of means, the member with the largest moment depends on the multiplier: members are added until none has a moment above 1.
    """
    while True:
        multiplier = multiplier_for(increment, nulls, rng=rng, num=num, confidence=confidence)
        if not (isinstance(pre, GaussianMeans) and isinstance(increment, QuadraticForm)):
            return nulls, multiplier
        scaled = increment.scaled(multiplier)
        worst = pre.highest(*_moment_in_mean(scaled, pre.centre()))
        if worst in nulls or scaled.log_moment(worst) <= 1e-12:
            return nulls, multiplier
        nulls = (*nulls, worst)


def _moment_in_mean(increment: QuadraticForm, law: Gaussian) -> tuple[Array, Array]:
    """``A`` and ``b`` of ``log E exp z = m' A m + b' m + constant``, as the mean of ``law`` moves."""
    curvature, slope = np.asarray(increment.curvature), np.asarray(increment.slope)
    tilt = 2.0 * curvature @ np.linalg.inv(law.precision - 2.0 * curvature)
    return curvature + tilt @ curvature, slope + tilt @ slope
