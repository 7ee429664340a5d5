"""What every detector is: a statistic batched over streams, its state a value, an alarm while it is at its threshold or above.

Exports ``Detector`` (the base), ``ReflectedSum`` (statistics that add increments and are reflected at 0) and ``DetectorState``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.increment import Increment
from detection.laws import Array
from detection.states import columns, merged

Mask = NDArray[np.bool_]
Ticks = NDArray[np.int64]
S = TypeVar("S")
_OUT_OF_REACH = 1e300
_BLOCK = 65_536  # streams at once: few enough for the cache, many enough that Python costs nothing


@dataclass(frozen=True, kw_only=True)
class Detector(ABC, Generic[S]):
    """A sequential statistic of ``N`` streams. ``step`` returns a new state and leaves the old one untouched; streams do not interact.

    A subclass writes ``_fresh``, ``_next``, ``statistic`` and ``changed_at``. The detector raises alarms, whoever uses it restarts streams.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold!r}")

    @abstractmethod
    def statistic(self, state: S) -> Array:
        """Evidence for a change in each stream (N,)."""

    @abstractmethod
    def changed_at(self, state: S) -> Ticks:
        """Estimated first changed observation of each stream (N,), counted from 1 at its (re)start."""

    @abstractmethod
    def _fresh(self, streams: int) -> S:
        """State of ``streams`` >= 1 streams that have seen nothing."""

    @abstractmethod
    def _next(self, state: S, x: Array) -> S:
        """State after one checked observation (N,) or (N, d) of every stream."""

    @property
    def takes_infinity(self) -> bool:
        """Whether ``+inf`` is an observation; ``-inf`` and ``nan`` never are."""
        return False

    def init(self, streams: int) -> S:
        """State of ``streams`` fresh streams. Raises ``ValueError`` for none."""
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams!r}")
        return self._fresh(streams)

    def step(self, state: S, x: ArrayLike, active: Mask | None = None) -> S:
        """State after one observation ``x`` (N,) or (N, d) of each ``active`` stream (all by default); the other rows keep their bits.

        Raises ``ValueError`` with the count and the first stream for observations that are not allowed, see :attr:`takes_infinity`.
        """
        x, active = self._checked(state, x, active)
        after = self._next(state, x)
        return after if active is None else merged(active, after, state)

    def without_alarms(self) -> Self:
        """This detector with a threshold out of reach: up to the first alarm at *any* threshold, its statistics are those it would have there."""
        return replace(self, threshold=_OUT_OF_REACH)

    def alarms(self, state: S) -> Mask:
        """Streams at or above the threshold."""
        return self.statistic(state) >= self.threshold

    def restart(self, state: S, mask: Mask) -> S:
        """The streams of ``mask`` (N,) as new; the others keep their bits."""
        num = streams_of(state)
        return merged(checked_mask(mask, num, "mask"), self._fresh(num), state)

    def _checked(self, state: S, x: ArrayLike, active: Mask | None) -> tuple[Array, Mask | None]:
        seen: NDArray[Any] = shaped(x, streams_of(state))
        if active is not None:
            active = checked_mask(active, len(seen), "active")
            seen = np.where(active if seen.ndim == 1 else active[:, None], seen, 0.0)
        if not _all_allowed(seen, self.takes_infinity):
            raise refused(seen, self.takes_infinity)
        return seen.astype(np.float64, copy=False), active


@dataclass(frozen=True, eq=False)
class DetectorState:
    """``N`` streams: ``statistic`` (f64), ``rising`` = observations since it was last 0 and ``clock`` = observations since the stream's
    (re)start (both i32). All zero at the start."""

    statistic: Array
    rising: NDArray[np.int32]
    clock: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.statistic)


@dataclass(frozen=True, kw_only=True)
class ReflectedSum(Detector[DetectorState]):
    """``Z_0 = 0``, ``Z_t = max(Z_{t-1} + z(x_t), 0)``. Subclasses say what ``z`` is.

    Observations are clipped to ``[-clip, clip]`` first (``None``: not at all); ``+inf`` is then the top clip.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive or None, got {self.clip!r}")

    @abstractmethod
    def _increment(self) -> Increment: ...

    @cached_property
    def increment(self) -> Increment:
        """``z``, multiplier included."""
        return self._increment()

    @property
    def takes_infinity(self) -> bool:
        """With a clip."""
        return self.clip is not None

    def statistic(self, state: DetectorState) -> Array:
        """``Z`` (N,)."""
        return state.statistic

    def changed_at(self, state: DetectorState) -> Ticks:
        """One after the observation at which the statistic was last 0."""
        return (state.clock - state.rising + 1).astype(np.int64)

    def step(self, state: DetectorState, x: ArrayLike, active: Mask | None = None, *, out: DetectorState | None = None) -> DetectorState:
        """As :meth:`Detector.step`, in blocks that stay in cache.

        ``out``, a state no longer needed, is overwritten and returned, which spares the pages of a new one: a loop over a million streams
        that swaps two states runs about twice as fast. It must not be ``state``; after an error its content is undefined.
        """
        values = shaped(x, len(state))
        own = getattr(self.increment, "streams", None)
        if own not in (None, len(state)):
            raise ValueError(f"this detector has one law for each of {own} streams, got a state of {len(state)}")
        active = None if active is None else checked_mask(active, len(state), "active")
        after = _empty(len(state)) if out is None else _room(out, state)
        for rows in _blocks(len(state)):
            self._advance(state, after, values, active, rows)
        return after

    def _fresh(self, streams: int) -> DetectorState:
        return DetectorState(np.zeros(streams), np.zeros(streams, np.int32), np.zeros(streams, np.int32))

    def _next(self, state: DetectorState, x: Array) -> DetectorState:
        return self.step(state, x)

    def _advance(self, state: DetectorState, after: DetectorState, x: Array, active: Mask | None, rows: slice) -> None:
        seen = x[rows]
        if active is not None:
            seen = np.where(active[rows] if x.ndim == 1 else active[rows, None], seen, 0.0)
        if not _allowed(seen, self.takes_infinity).all():
            raise refused(x if active is None else np.where(active if x.ndim == 1 else active[:, None], x, 0.0), self.takes_infinity)
        statistic = np.asarray(self.increment.at(rows)(seen))
        if statistic.shape != seen.shape[:1]:
            raise ValueError(
                f"the laws of this detector do not take observations of shape {x.shape}: got increments of shape {statistic.shape}"
            )
        statistic += state.statistic[rows]
        if not getattr(self.increment, "bounded", False) and np.isnan(statistic.sum()):
            _refuse_overflow(statistic, rows.start)
        rising = np.add(state.rising[rows], 1, out=after.rising[rows])
        rising *= statistic > 0.0
        # reflected, so that evidence against a change cannot mask one later; a sum of 0.0 and anything is never -0.0
        np.fmax(statistic, 0.0, out=after.statistic[rows])
        np.add(state.clock[rows], 1, out=after.clock[rows])
        if active is not None:
            idle = ~active[rows]
            for (_, new), (_, old) in zip(columns(after), columns(state), strict=True):
                np.copyto(new[rows], old[rows], where=idle)


def streams_of(state: object) -> int:
    """Number of streams of any state."""
    return len(next(columns(state))[1])


def shaped(x: ArrayLike, streams: int) -> NDArray[Any]:
    """``x`` as an array of one number or vector a stream. Raises ``ValueError`` for another shape."""
    x = np.asarray(x)
    if x.ndim not in (1, 2) or len(x) != streams:
        raise ValueError(f"x must hold one observation for each of {streams} streams, got shape {x.shape}")
    return x


def checked_mask(mask: ArrayLike, num: int, name: str) -> Mask:
    """``mask`` as booleans (num,), or ``ValueError``."""
    mask = np.asarray(mask)
    if mask.dtype != np.bool_ or mask.shape != (num,):
        raise ValueError(f"{name} must be booleans of shape ({num},), got {mask.dtype} of shape {mask.shape}")
    return mask


def refused(x: Array, takes_infinity: bool) -> ValueError:
    """The error for ``x`` (N,) or (N, d), which holds an observation that is not allowed."""
    bad: Mask = ~_allowed(x, takes_infinity)
    bad = np.asarray(bad.any(axis=1)) if bad.ndim == 2 else bad
    allowed = "numbers or +inf" if takes_infinity else "finite numbers (set a clip to allow +inf)"
    return ValueError(
        f"{int(bad.sum())} active streams have an observation that is not allowed, the first is stream {int(bad.argmax())}; give {allowed}, or mark them inactive"
    )


def _all_allowed(x: Array, takes_infinity: bool) -> bool:
    """Whether every observation is allowed; the minimum is nan where one is, and spares an array of answers."""
    return bool(np.min(x, initial=0.0) > -np.inf) if takes_infinity else bool(np.isfinite(x).all())


def _allowed(x: Array, takes_infinity: bool) -> Mask:
    return np.asarray(x > -np.inf) if takes_infinity else np.isfinite(x)


def _empty(streams: int) -> DetectorState:
    """A state of one piece of memory: its pages come cheaper than those of three arrays, huge where the system has such."""
    piece = np.empty(16 * streams, np.uint8)
    floats, ints = piece[: 8 * streams].view(np.float64), piece[8 * streams :].view(np.int32)
    return DetectorState(floats, ints[:streams], ints[streams:])


def _refuse_overflow(statistic: Array, first: int) -> None:
    """Raises ``ValueError`` where a finite observation has no finite score, so that no broken model passes for a quiet one."""
    lost = np.isnan(statistic)
    if lost.any():
        raise ValueError(
            f"{int(lost.sum())} streams have an observation so far out that its scores overflow, the first is stream {first + int(lost.argmax())}; set a clip"
        )


def _room(out: DetectorState, state: DetectorState) -> DetectorState:
    if out is state or len(out) != len(state):
        raise ValueError(f"out must be another state of {len(state)} streams, got {'the state itself' if out is state else len(out)}")
    return out


def _blocks(num: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, num)) for start in range(0, num, _BLOCK))
