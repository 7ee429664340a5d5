"""CUSUM on the log-likelihood ratio: the optimum when both laws are known with their densities (Page 1954; Moustakides 1986)."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from detection.design import SimulatedPromise, designed_threshold, knows_exactly, simulated_promise
from detection.detector import ReflectedSum
from detection.expectations import DRAWS
from detection.increment import Increment, likelihood_increment, rows_of, streams_of
from detection.laws import Array, Gaussian, Law, NormalisedLaw
from detection.multiplier import CONFIDENCE, multiplier_for
from detection.promise import Promise, promise_of
from detection.uncertainty import UncertaintySet


@dataclass(frozen=True, kw_only=True)
class LikelihoodDifference:
    """``multiplier * (log p_post(x) - log p_pre(x))`` of two laws with densities."""

    pre: NormalisedLaw
    post: NormalisedLaw
    multiplier: float = 1.0
    clip: float | None = None

    def __call__(self, x: Array) -> Array:
        """Increments of ``x`` (n,) or (n, d)."""
        if self.clip is not None:
            x = np.clip(x, -self.clip, self.clip)
        return self.multiplier * (self.post.log_density(x) - self.pre.log_density(x))

    def scaled(self, multiplier: float) -> "LikelihoodDifference":
        """``multiplier * z``."""
        return replace(self, multiplier=multiplier * self.multiplier)

    @property
    def streams(self) -> int | None:
        """Number of streams that have a law of their own; ``None`` where all share one."""
        return streams_of(self.pre, self.post)

    def at(self, rows: slice) -> "LikelihoodDifference":
        """The laws of the streams ``rows``, where a law has ``rows`` (one law for each stream)."""
        pre, post = rows_of(self.pre, rows), rows_of(self.post, rows)
        return self if pre is self.pre and post is self.post else replace(self, pre=pre, post=post)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class CUSUM(ReflectedSum):
    """``z(x) = multiplier log(p_post(x) / p_pre(x))``. Unclipped, the multiplier is 1; a clip moves it slightly, so that ``E exp z = 1``."""

    pre: NormalisedLaw
    post: NormalisedLaw
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
        method: str | None = None,
        rng: np.random.Generator | None = None,
        num: int = DRAWS,
        confidence: float = CONFIDENCE,
    ) -> Self:
        """Design for the *centres* of the two sets, with ``arl`` ticks between false alarms at the centre of ``pre``: no promise elsewhere.

        Arguments and errors as for :meth:`detection.ScoreCUSUM.fit`; laws without a density are refused.
        """
        before, after = _normalised(pre.centre()), _normalised(post.centre())
        plain = _ratio(before, after, clip)
        multiplier = multiplier_for(plain, (before,), rng=rng, num=num, confidence=confidence) if clip is not None else 1.0
        threshold = designed_threshold(plain.scaled(multiplier), (before,), arl, method=method, rng=rng)
        return cls(pre=before, post=after, multiplier=multiplier, threshold=threshold, clip=clip)

    def _increment(self) -> Increment:
        return _ratio(self.pre, self.post, self.clip).scaled(self.multiplier)

    def promise(self, rng: np.random.Generator | None = None) -> Promise | SimulatedPromise:
        """Run length and delay under the two design laws: exact where the distribution of the increment is known, else from runs
        simulated with ``rng``."""
        if knows_exactly(self.increment, (self.pre, self.post)):
            return promise_of(self, (self.pre,), (self.post,), (self.pre, self.post))
        return simulated_promise(self, (self.pre,), (self.post,), rng)


def _ratio(pre: NormalisedLaw, post: NormalisedLaw, clip: float | None) -> Increment:
    if isinstance(pre, Gaussian) and isinstance(post, Gaussian):
        return likelihood_increment(pre, post, clip)
    return LikelihoodDifference(pre=pre, post=post, clip=clip)


def _normalised(law: Law) -> NormalisedLaw:
    if not isinstance(law, NormalisedLaw):
        raise ValueError(f"CUSUM needs laws with a log_density, got {law!r}; use ScoreCUSUM")
    return law
