"""Robust SCUSUM: one statistic for every law before and after the change that two uncertainty sets allow; arXiv:2407.11094."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from detection.calibration import threshold_for
from detection.detector import ReflectedSum
from detection.increment import Increment, score_increment
from detection.least_favourable import LeastFavourablePair, least_favourable, members
from detection.multiplier import multiplier_for
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
        method: str = "exact",
        rng: np.random.Generator | None = None,
    ) -> Self:
        """Least favourable pair, multiplier and threshold with ``arl`` ticks between false alarms under the worst law of ``pre``.

        ``clip`` suits observations standardised to about ``N(0, 1)`` in control; pass ``None`` for others. ``method`` is one of
        :func:`detection.threshold_for` (``"simulate"`` draws from ``rng``). Raises ``ValueError`` for sets that meet and for sets whose closest pair does
        not separate them, naming the law and its drift.
        """
        pair = least_favourable(pre, post, clip=clip)
        plain = score_increment(pair.pre, pair.post, clip)
        nulls = members(pre, pair.pre, plain)
        multiplier = multiplier_for(plain, nulls)
        threshold = threshold_for(plain.scaled(multiplier), nulls, arl, method=method, rng=rng)
        return cls(pre=pre, post=post, pair=pair, multiplier=multiplier, threshold=threshold, clip=clip)

    def _increment(self) -> Increment:
        return score_increment(self.pair.pre, self.pair.post, self.clip).scaled(self.multiplier)

    def promise(self) -> Promise:
        """Exact run length under the worst law of ``pre``, exact delay under the worst law of ``post``."""
        nulls = members(self.pre, self.pair.pre, self.increment)
        changes = members(self.post, self.pair.post, self.increment)
        return promise_of(self, tuple(nulls), tuple(changes), (self.pair.pre, self.pair.post))
