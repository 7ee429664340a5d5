"""The statistic that rises on evidence of a change and is reflected at 0: its state as a value, batched over streams."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import exp
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.increment import Increment, Quadratic
from detection.laws import Array, Gaussian, Law
from detection.run_length import worst_delay, worst_null

Mask = NDArray[np.bool_]
Ticks = NDArray[np.int64]
_BLOCK = 16_384  # streams whose temporaries stay in cache


@dataclass(frozen=True, eq=False)
class DetectorState:
    """``N`` streams: ``statistic`` (f64), ``since`` = the stream's tick at which it was last 0 (i64), ``clock`` = observations seen since
    the stream's (re)start (i64), ``peak`` = highest statistic (f64). All zero at the start."""

    statistic: Array
    since: Ticks
    clock: Ticks
    peak: Array

    def __len__(self) -> int:
        return len(self.statistic)


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


@dataclass(frozen=True, kw_only=True)
class ReflectedSum(ABC):
    """``Z_0 = 0``, ``Z_t = max(Z_{t-1} + z(x_t), 0)``; alarm while ``Z_t >= threshold``. Subclasses say what ``z`` is.

    Observations are clipped to ``[-clip, clip]`` first (``None``: not at all).
    """

    threshold: float
    clip: float | None = None

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive or None, got {self.clip!r}")

    @abstractmethod
    def _increment(self) -> Increment: ...

    @cached_property
    def increment(self) -> Increment:
        """``z``, multiplier included."""
        return self._increment()

    def init(self, streams: int) -> DetectorState:
        """State of ``streams`` fresh streams."""
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams!r}")
        return DetectorState(np.zeros(streams), np.zeros(streams, np.int64), np.zeros(streams, np.int64), np.zeros(streams))

    def step(self, state: DetectorState, x: ArrayLike, active: Mask | None = None) -> DetectorState:
        """State after one observation ``x`` (N,) or (N, d) of each ``active`` stream (all by default); the other rows keep their bits.

        ``+inf`` is the top clip. Raises ``ValueError`` with the count and the first stream for ``nan``, ``-inf``, and for ``inf`` where
        nothing is clipped.
        """
        x, active = self._checked(state, x, active)
        after = _mapped(state, np.empty_like)
        for rows in _blocks(len(state)):
            self._advance(state, after, x, active, rows)
        return after

    def alarms(self, state: DetectorState) -> Mask:
        """Streams at or above the threshold."""
        return state.statistic >= self.threshold

    def changed_at(self, state: DetectorState) -> Ticks:
        """Estimated first changed observation of each stream, counted from 1 at its (re)start: one after the statistic was last 0."""
        return state.since + 1

    def restart(self, state: DetectorState, mask: Mask) -> DetectorState:
        """The streams of ``mask`` (N,) as new; the others keep their bits."""
        mask = _mask(mask, len(state), "mask")
        return _mapped(state, lambda column: np.where(mask, column.dtype.type(0), column))

    def _advance(self, state: DetectorState, after: DetectorState, x: Array, active: Mask | None, rows: slice) -> None:
        statistic = self.increment(x[rows])
        statistic += state.statistic[rows]
        clock = np.add(state.clock[rows], 1, out=after.clock[rows])
        after.since[rows] = np.where(statistic <= 0.0, clock, state.since[rows])
        np.maximum(statistic, 0.0, out=statistic)  # reflected, so that evidence against a change cannot mask one later
        np.add(statistic, 0.0, out=after.statistic[rows])  # -0.0 becomes 0.0, whatever maximum chose
        np.maximum(state.peak[rows], after.statistic[rows], out=after.peak[rows])
        if active is not None:
            idle = ~active[rows]
            for new, old in zip(_columns(after), _columns(state), strict=True):
                np.copyto(new[rows], old[rows], where=idle)

    def _checked(self, state: DetectorState, x: ArrayLike, active: Mask | None) -> tuple[Array, Mask | None]:
        x = np.asarray(x)
        if x.ndim not in (1, 2) or len(x) != len(state):
            raise ValueError(f"x must hold one observation for each of {len(state)} streams, got shape {x.shape}")
        bad = ~(x > -np.inf) if self.clip is not None else ~np.isfinite(x)
        bad = bad.any(axis=1) if bad.ndim == 2 else bad
        if active is not None:
            active = _mask(active, len(state), "active")
            x = np.where(active if x.ndim == 1 else active[:, None], x, 0.0)
            bad = bad & active
        if bad.any():
            allowed = "numbers or +inf" if self.clip is not None else "finite numbers (set a clip to allow +inf)"
            raise ValueError(
                f"{int(bad.sum())} active streams have an observation that is not allowed, the first is stream {int(bad.argmax())}; give {allowed}, or mark them inactive"
            )
        return x, active


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


def _mapped(state: DetectorState, change: Callable[[NDArray[Any]], NDArray[Any]]) -> DetectorState:
    return DetectorState(statistic=change(state.statistic), since=change(state.since), clock=change(state.clock), peak=change(state.peak))


def _columns(state: DetectorState) -> tuple[NDArray[np.float64] | NDArray[np.int64], ...]:
    return state.statistic, state.since, state.clock, state.peak


def _blocks(num: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, num)) for start in range(0, num, _BLOCK))


def _mask(mask: ArrayLike, num: int, name: str) -> Mask:
    mask = np.asarray(mask)
    if mask.dtype != np.bool_ or mask.shape != (num,):
        raise ValueError(f"{name} must be booleans of shape ({num},), got {mask.dtype} of shape {mask.shape}")
    return mask
