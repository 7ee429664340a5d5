"""river's drift detectors (ADWIN, KSWIN, DDM, HDDM, ...) under the contract of this package, for comparisons on equal terms.

river keeps one mutable Python object for one stream. ``RiverDetector`` makes a state a value by copying each object before it learns,
10 to 200 microseconds a stream and tick; ``river_first_alarms`` runs the objects in place where only alarms matter, at river's own speed.
"""

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from river import base

from detection.detector import Detector, Mask, Ticks
from detection.glr import one_number
from detection.laws import Array
from detection.states import mapped

DriftDetector: TypeAlias = base.DriftDetector | base.BinaryDriftDetector


@dataclass(frozen=True, eq=False)
class RiverState:
    """``N`` streams: river's objects ``detectors``, their ``verdict`` (1 drift, 0.5 warning, 0 neither), the observation ``since`` (N,) which
    the change is estimated to start after, and ``clock`` (N,). The objects are never changed, and may be shared. Pickles; has no npz form."""

    detectors: NDArray[np.object_]
    verdict: Array
    since: NDArray[np.int64]
    clock: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class RiverDetector(Detector[RiverState]):
    """Any detector of ``river.drift``, one copy of ``prototype`` for each stream.

    Its verdicts are those of river's own loop, whose objects start anew (DDM) or go on (ADWIN) by themselves after a drift; ``restart``
    replaces an object by a new copy of ``prototype``.
    The statistic is 1 where river detects drift and 0.5 where it warns: alarms are tuned by river's own parameters, not by ``threshold``.
    The change estimate is the start of river's shortened window where there is one (ADWIN), or of the latest unbroken warning, or the
    alarm itself. Copies of a randomised detector (KSWIN) share their draws. Detectors of ``river.drift.binary`` take 0 and 1 only.
    """

    prototype: DriftDetector
    threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.prototype, DriftDetector):
            raise ValueError(f"prototype must be a detector of river.drift, such as ADWIN(), got {self.prototype!r}")
        if self.threshold not in (0.5, 1.0):
            raise ValueError(f"threshold must be 1.0 (river detects drift) or 0.5 (or warns), got {self.threshold!r}")

    def without_alarms(self) -> Self:
        """Itself: river's verdict does not depend on a threshold."""
        return self

    def statistic(self, state: RiverState) -> Array:
        """1 for drift, 0.5 for a warning, else 0 (N,)."""
        return state.verdict

    def changed_at(self, state: RiverState) -> Ticks:
        """One after ``since``."""
        return state.since + 1

    def step(self, state: RiverState, x: ArrayLike, active: Mask | None = None) -> RiverState:
        """As :meth:`Detector.step`; only the objects of active streams are copied."""
        x, active = self._checked(state, x, active)
        _check_binary(self.prototype, one_number(x))
        after = mapped(state, np.copy)
        for row in range(len(x)) if active is None else np.flatnonzero(active):
            detector = pickle.loads(pickle.dumps(state.detectors[row], pickle.HIGHEST_PROTOCOL))
            _learn(detector, float(x[row]))
            clock, verdict = int(state.clock[row]) + 1, _verdict(detector)
            after.detectors[row], after.verdict[row], after.clock[row] = detector, verdict, clock
            after.since[row] = _since(detector, verdict, clock, state.verdict[row] == 0.5, int(state.since[row]))
        return after

    def _fresh(self, streams: int) -> RiverState:
        detectors = np.full(streams, self.prototype, dtype=np.object_)
        return RiverState(detectors, np.zeros(streams), np.zeros(streams, np.int64), np.zeros(streams, np.int64))

    def _next(self, state: RiverState, x: Array) -> RiverState:
        return self.step(state, x)


def river_first_alarms(prototype: DriftDetector, x: ArrayLike) -> Array:
    """First drift, counted from 1, that copies of ``prototype`` detect in each stream of ``x`` (T, N); ``nan`` for none. Runs in place."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"x must be finite, of shape (ticks, streams), got shape {x.shape}")
    _check_binary(prototype, x)
    data = pickle.dumps(prototype)
    return np.array([_first_alarm(pickle.loads(data), stream) for stream in x.T.tolist()])


def _first_alarm(detector: Any, stream: Iterable[float]) -> float:
    for tick, value in enumerate(stream, start=1):
        _learn(detector, value)
        if detector.drift_detected:
            return float(tick)
    return float("nan")


def _learn(detector: Any, value: float) -> None:
    detector.update(bool(value) if isinstance(detector, base.BinaryDriftDetector) else value)


def _verdict(detector: Any) -> float:
    return 1.0 if detector.drift_detected else 0.5 * float(getattr(detector, "warning_detected", False))


def _since(detector: Any, verdict: float, clock: int, warned: bool, since: int) -> int:
    if verdict == 0:
        return clock
    if verdict == 1 and hasattr(detector, "width"):
        return clock - int(detector.width)
    return since if warned else clock - 1


def _check_binary(prototype: DriftDetector, x: Array) -> None:
    """Raises ``ValueError`` for values of ``x`` (..., N) other than 0 and 1 where ``prototype`` watches hits and misses."""
    if isinstance(prototype, base.BinaryDriftDetector):
        wrong = (x != 0) & (x != 1)
        if wrong.any():
            first = int(np.flatnonzero(wrong.reshape(-1, x.shape[-1]).any(axis=0))[0])
            raise ValueError(
                f"{type(prototype).__name__} takes 0 and 1 only, got {int(wrong.sum())} other values, the first in stream {first}"
            )
