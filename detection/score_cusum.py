"""SCUSUM: CUSUM on Hyvarinen scores, for laws known by their score alone; arXiv:2302.00250."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from detection.design import SimulatedPromise, designed_threshold, knows_exactly, simulated_promise
from detection.detector import ReflectedSum
from detection.expectations import DRAWS
from detection.hulls import ObservedLaw
from detection.increment import Increment, score_increment
from detection.laws import Law
from detection.multiplier import CONFIDENCE, multiplier_for
from detection.promise import Promise, promise_of
from detection.uncertainty import UncertaintySet


@dataclass(frozen=True, kw_only=True)
class ScoreCUSUM(ReflectedSum):
    """``z(x) = multiplier (S_H(x, pre) - S_H(x, post))`` for one law before and one after the change, any laws with a score.

    With equal isotropic variances ``v`` and ``multiplier = v`` it is CUSUM.
    """

    pre: Law
    post: Law
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
        """Design for the *centres* of the two sets, with ``arl`` ticks between false alarms at the centre of ``pre``: no promise elsewhere.

        ``clip`` suits observations standardised to about ``N(0, 1)`` in control; pass ``None`` for others. ``method`` is one of
        :func:`detection.threshold_for`, by default ``"exact"`` for Gaussian numbers and linear statistics of Gaussian vectors, else
        ``"simulate"``. What has no closed form is estimated from ``num`` draws of ``rng``, and the multiplier is then safe with ``confidence``.
        Raises ``ValueError`` where the centres coincide or cannot be told apart.
        """
        before, after = pre.centre(), post.centre()
        plain = score_increment(bare(before), bare(after), clip)
        multiplier = multiplier_for(plain, (before,), rng=rng, num=num, confidence=confidence)
        threshold = designed_threshold(plain.scaled(multiplier), (before,), arl, method=method, rng=rng)
        return cls(pre=bare(before), post=bare(after), multiplier=multiplier, threshold=threshold, clip=clip)

    def _increment(self) -> Increment:
        return score_increment(self.pre, self.post, self.clip).scaled(self.multiplier)

    def promise(self, rng: np.random.Generator | None = None) -> Promise | SimulatedPromise:
        """Run length and delay under the two design laws: exact where the distribution of the increment is known, else from runs
        simulated with ``rng``."""
        if knows_exactly(self.increment, (self.pre, self.post)):
            return promise_of(self, (self.pre,), (self.post,), (self.pre, self.post))
        return simulated_promise(self, (self.pre,), (self.post,), rng)


def bare(law: Law) -> Law:
    """The law behind observations, which increments need no more than its score of."""
    return law.law if isinstance(law, ObservedLaw) else law
