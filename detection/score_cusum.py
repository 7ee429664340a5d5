"""SCUSUM: CUSUM on Hyvarinen scores, for laws known by their score alone; arXiv:2302.00250."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from detection.calibration import threshold_for
from detection.detector import ReflectedSum
from detection.increment import Increment, score_increment
from detection.laws import Law
from detection.multiplier import gaussian, multiplier_for
from detection.promise import Promise, promise_of
from detection.uncertainty import UncertaintySet


@dataclass(frozen=True, kw_only=True)
class ScoreCUSUM(ReflectedSum):
    """``z(x) = multiplier (S_H(x, pre) - S_H(x, post))`` for one law before and one after the change.

    With equal isotropic variances ``v`` and ``multiplier = v`` it is CUSUM. The laws may be any with a score; :meth:`fit` needs Gaussians.
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
        method: str = "exact",
        rng: np.random.Generator | None = None,
    ) -> Self:
        """Design for the *centres* of the two sets, with ``arl`` ticks between false alarms at the centre of ``pre``: no promise elsewhere.

        ``clip`` suits observations standardised to about ``N(0, 1)`` in control; pass ``None`` for others. ``method`` is one of
        :func:`detection.threshold_for` (``"simulate"`` draws from ``rng``). Raises ``ValueError`` where the centres coincide or cannot be told apart.
        """
        before, after = pre.centre(), post.centre()
        plain = score_increment(before, after, clip)
        multiplier = multiplier_for(plain, (before,))
        threshold = threshold_for(plain.scaled(multiplier), (before,), arl, method=method, rng=rng)
        return cls(pre=before, post=after, multiplier=multiplier, threshold=threshold, clip=clip)

    def _increment(self) -> Increment:
        return score_increment(self.pre, self.post, self.clip).scaled(self.multiplier)

    def promise(self) -> Promise:
        """Exact run length and delay under the two design laws."""
        return promise_of(self, (gaussian(self.pre),), (gaussian(self.post),), (self.pre, self.post))
