"""Self-starting scores (Hawkins 1987): each value judged by its own stream's past, so a stream needs no known law, only a quiet start.

For independent Gaussian values the scores are exactly independent N(0, 1) from the third value on, whatever the mean and the variance.
A change soon after the start is learned as normal: 200 quiet values are nearly as good as a known law, none lose most of the power.
"""

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from detection.detector import Detector, DetectorState, Mask, ReflectedSum, Ticks, checked_mask, refused, shaped
from detection.laws import Array

_EXPANDED = 16  # degrees of freedom from which Student's law is expanded about the normal


@dataclass(frozen=True, eq=False)
class Moments:
    """Running ``count``, ``mean`` and sum of ``square`` deviations of each stream (N,)."""

    count: NDArray[np.int64]
    mean: Array
    square: Array

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True, kw_only=True)
class SelfStarting:
    """``u = Phi^-1 T_{n-1}(sqrt(n / (n + 1)) (x - mean_n) / sd_n)`` of the ``n`` values before ``x``, in ``[-clip, clip]``.

    The Student law is expanded from 16 degrees of freedom on, within 1e-7. ``u`` is 0 while a stream has fewer than ``warm`` values. A stream that was constant so far gives 0 for the same value again, and the
    clip for any other. Score first, then learn where nothing is alarmed, so that a change is not taken for the new normal:

    >>> scores = SelfStarting()
    >>> state = scores.learned(scores.init(1), [[1.0, 2.0, 3.0]])
    >>> scores.score(state, [2.0])
    array([0.])
    """

    warm: int = 2
    clip: float = 4.0

    def __post_init__(self) -> None:
        if self.warm < 2:
            raise ValueError(f"warm must be at least 2 values, for a mean and a deviation, got {self.warm!r}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip!r}")

    def init(self, streams: int) -> Moments:
        """Streams that have seen nothing. Raises ``ValueError`` for none."""
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams!r}")
        return Moments(np.zeros(streams, np.int64), np.zeros(streams), np.zeros(streams))

    def score(self, state: Moments, x: ArrayLike) -> Array:
        """Scores (N,) of the next values ``x`` (N,), which the state does not learn. ``+inf`` gives ``clip``, ``nan`` stays ``nan``."""
        return self._scored(state, _line(x, len(state)))

    def update(self, state: Moments, x: ArrayLike, learn: Mask | None = None) -> Moments:
        """State that has learned ``x`` (N,) of the streams ``learn`` (N,) (all by default): leave out those missing or alarmed.

        Raises ``ValueError`` for values to be learned that are not finite.
        """
        values = _line(x, len(state))
        learn = np.ones(len(values), dtype=bool) if learn is None else checked_mask(learn, len(values), "learn")
        values = np.where(learn, values, 0.0)
        if not np.isfinite(values).all():
            raise refused(values, takes_infinity=False)
        return _learned(state, values, learn)

    def learned(self, state: Moments, values: ArrayLike) -> Moments:
        """State that has learned ``values`` (N, n), all at once: the warm start."""
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or len(values) != len(state) or not np.isfinite(values).all():
            raise ValueError(f"values must be finite, of shape ({len(state)}, n), got shape {values.shape}")
        for column in values.T:
            state = self.update(state, column)
        return state

    def _scored(self, state: Moments, x: Array) -> Array:
        count = np.maximum(state.count, 2)
        away, deviation = x - state.mean, np.sqrt(state.square / (count - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(away == 0.0, 0.0, np.sqrt(count / (count + 1.0)) * away / deviation)
        scores = np.copysign(np.minimum(_normal_quantile(np.abs(t), count - 1.0), self.clip), t) + 0.0
        return np.where((state.count < self.warm) & ~np.isnan(x), 0.0, scores)


@dataclass(frozen=True, eq=False)
class SelfStartedState:
    """What each stream has learned, the statistic of its scores, and how many values were ``unscored`` (N,) while it warmed up."""

    moments: Moments
    inner: DetectorState
    unscored: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.moments)


@dataclass(frozen=True, kw_only=True)
class SelfStarted(Detector[SelfStartedState]):
    """``detector`` on the scores of ``scores``, its threshold replaced by ``threshold``; a stream learns only while it raises no alarm.

    The first ``scores.warm`` values of a stream only teach. A restart forgets what was learned: the new model has a new normal.
    """

    detector: ReflectedSum
    scores: SelfStarting = SelfStarting(warm=30)

    @classmethod
    def around(cls, detector: ReflectedSum, scores: SelfStarting | None = None) -> "SelfStarted":
        """With the threshold of ``detector``, whose promise for N(0, 1) holds for Gaussian streams of any mean and variance."""
        return cls(threshold=detector.threshold, detector=detector, scores=SelfStarting(warm=30) if scores is None else scores)

    @property
    def takes_infinity(self) -> bool:
        """``+inf`` is scored as the clip, and never learned."""
        return True

    def statistic(self, state: SelfStartedState) -> Array:
        """That of ``detector`` (N,)."""
        return self.detector.statistic(state.inner)

    def changed_at(self, state: SelfStartedState) -> Ticks:
        """As for ``detector``, counted from the stream's first value; no earlier than the first scored one."""
        return np.asarray(np.maximum(self.detector.changed_at(state.inner) + state.unscored, self.scores.warm + 1))

    def _fresh(self, streams: int) -> SelfStartedState:
        return SelfStartedState(self.scores.init(streams), self.detector.init(streams), np.zeros(streams, np.int64))

    def _next(self, state: SelfStartedState, x: Array) -> SelfStartedState:
        x = _line(x, len(state))
        warm = state.moments.count >= self.scores.warm
        inner = self.detector.step(state.inner, self.scores.score(state.moments, x), warm)
        quiet = (self.detector.statistic(inner) < self.threshold) & np.isfinite(x)
        return SelfStartedState(_learned(state.moments, np.where(quiet, x, 0.0), quiet), inner, state.unscored + ~warm)


def _line(x: ArrayLike, streams: int) -> Array:
    values = shaped(x, streams)
    if values.ndim != 1:
        raise ValueError(f"x must be one number for each of {streams} streams, got shape {values.shape}")
    return values.astype(np.float64, copy=False)


def _normal_quantile(t: Array, degrees: Array) -> Array:
    """``Phi^-1 T_degrees(t)`` of ``t >= 0``: exact below 16 degrees of freedom, from there Hill's expansion (1970), within 1e-7."""
    a = degrees - 0.5
    b = 48.0 * a * a
    square = a * np.log1p(t * t / degrees)
    fourth = ((4.0 * square + 33.0) * square + 240.0) * square + 855.0
    with np.errstate(invalid="ignore"):  # an infinite t is settled below
        z = np.sqrt(square) * (1.0 + (square + 3.0) / b - fourth / (10.0 * b * (b + 0.8 * square * square + 100.0)))
    exact = (degrees < _EXPANDED) & ~np.isnan(t)
    z[exact] = -scipy.special.ndtri(scipy.special.stdtr(degrees[exact], -t[exact]))  # the small tail, which keeps its digits
    return np.where(t == np.inf, np.inf, z)


def _learned(state: Moments, x: Array, learn: Mask) -> Moments:
    """Welford's update, which does not cancel."""
    count = state.count + learn
    away = np.where(learn, x - state.mean, 0.0)
    mean = state.mean + away / np.maximum(count, 1)
    return Moments(count, mean, state.square + away * np.where(learn, x - mean, 0.0))
