"""CUSUM on the log-likelihood ratio of two Gaussians: the optimum when both laws are known (Page 1954; Moustakides 1986)."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from detection.calibration import threshold_for
from detection.detector import ReflectedSum
from detection.increment import Increment, likelihood_increment
from detection.laws import Gaussian
from detection.multiplier import gaussian, multiplier_for
from detection.promise import Promise, promise_of
from detection.uncertainty import UncertaintySet


@dataclass(frozen=True, kw_only=True)
class CUSUM(ReflectedSum):
    """``z(x) = multiplier log(p_post(x) / p_pre(x))``. Unclipped, the multiplier is 1; a clip moves it slightly, so that ``E exp z = 1``."""

    pre: Gaussian
    post: Gaussian
    multiplier: float = 1.0

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

        Arguments and errors as for :meth:`detection.ScoreCUSUM.fit`.
        """
        before, after = gaussian(pre.centre()), gaussian(post.centre())
        plain = likelihood_increment(before, after, clip)
        multiplier = multiplier_for(plain, (before,)) if clip is not None else 1.0
        threshold = threshold_for(plain.scaled(multiplier), (before,), arl, method=method, rng=rng)
        return cls(pre=before, post=after, multiplier=multiplier, threshold=threshold, clip=clip)

    def _increment(self) -> Increment:
        return likelihood_increment(self.pre, self.post, self.clip).scaled(self.multiplier)

    def promise(self) -> Promise:
        """Exact run length and delay under the two design laws."""
        return promise_of(self, (self.pre,), (self.post,), (self.pre, self.post))
