"""The live face of a detector: feed observations as they come, get alarms; state to bytes and back.

``Monitor`` owns what a detector leaves to its user: the current state, restarts after alarms, and a learning phase.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.detector import Detector, Mask, checked_mask, shaped
from detection.glr import one_number
from detection.laws import Array
from detection.normal_scores import FittedScores, NormalScores, Prior, check_sign
from detection.states import from_bytes, to_bytes

_SCORES = ("location", "deviation", "counts", "down_weighted", "pool")


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Stream ``stream`` is thought to have changed at its observation ``changed_at``, noticed at its observation ``tick``.

    Both count the stream's own observations from 1, those of the learning phase included.
    """

    tick: int
    stream: int
    changed_at: int
    statistic: float


class Monitor:
    """Watches one stream or ``N`` streams with ``detector``, and restarts a stream when it alarms.

    With ``calibration = n`` the first ``n`` updates are taken to be in control: ``transform`` (normal scores by default) learns each
    stream's law from them, and everything later is transformed by it. Without, observations go to the detector as they are.

    >>> from detection import CUSUM, Gaussian
    >>> monitor = Monitor(CUSUM(pre=Gaussian(0, 1), post=Gaussian(2, 1), threshold=4.0))
    >>> [monitor.update(x) for x in (0.1, -0.4, 2.0, 3.0)]
    [None, None, None, Alarm(tick=4, stream=0, changed_at=3, statistic=6.0)]
    """

    def __init__(self, detector: Detector[Any], *, calibration: int = 0, transform: NormalScores | None = None) -> None:
        if calibration < 0 or calibration == 1:
            raise ValueError(f"calibration must be a number of updates, 0 for none or at least 2, got {calibration!r}")
        if transform is not None and calibration == 0:
            raise ValueError("transform needs a learning phase: pass calibration, the number of updates it may learn from")
        self.detector = detector
        self.calibration = calibration
        self.transform = (transform or NormalScores()) if calibration else None
        self._state: Any = None
        self._scores: FittedScores | None = None
        self._learned: Array = np.empty((0, 0))  # (N, updates so far) while learning, nan where a stream was not active
        self._seen: NDArray[np.int64] = np.empty(0, np.int64)
        self._before: NDArray[np.int64] = np.empty(0, np.int64)  # observations before the stream's latest (re)start

    @property
    def streams(self) -> int | None:
        """Number of streams; ``None`` before the first update."""
        return None if self._state is None else len(self._seen)

    @property
    def learning(self) -> bool:
        """Whether the next update still belongs to the learning phase."""
        return self._learned.shape[1] < self.calibration and self._scores is None

    @overload
    def update(self, x: float, active: None = None) -> Alarm | None: ...

    @overload
    def update(self, x: Sequence[Any] | NDArray[Any], active: Mask | None = None) -> tuple[Alarm, ...]: ...

    def update(self, x: ArrayLike, active: Mask | None = None) -> Alarm | tuple[Alarm, ...] | None:
        """One observation of a single stream (a number), or one of each ``active`` stream (N,) or (N, d); alarms in the order of streams.

        The first update fixes the number of streams. Raises ``ValueError`` for another number later, and for what the detector or the
        transform refuses; the monitor has then learned nothing from it.
        """
        if np.ndim(x) == 0:
            if active is not None:
                raise ValueError("active goes with one observation for each stream; a single stream that is not active needs no update")
            alarms = self._update(np.reshape(np.asarray(x), 1), None)
            return alarms[0] if alarms else None
        return self._update(np.asarray(x), active)

    def to_bytes(self) -> bytes:
        """All that was learned and counted, without pickle; the detector itself is not part of it."""
        if self._state is None:
            raise ValueError("the monitor has seen nothing yet: there is no state to store")
        header: dict[str, Any] = {
            "detector": type(self.detector).__name__,
            "threshold": self.detector.threshold,
            "calibration": self.calibration,
        }
        header |= {"transform": asdict(self.transform) if self.transform else None}
        arrays: dict[str, Any] = {
            "learned": self._learned,
            "seen": self._seen,
            "before": self._before,
            "state": _bytes(to_bytes(self._state)),
        }
        if self._scores is not None:
            arrays |= {name: getattr(self._scores, name) for name in _SCORES}
            arrays["prior"] = np.array([*astuple(self._scores.prior), self._scores.floor])
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, header=_bytes(json.dumps(header).encode()))
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, detector: Detector[Any]) -> Self:
        """The monitor that wrote ``data``, with ``detector`` equal to its own: continues bit for bit.

        Raises ``ValueError`` for damaged bytes and for a detector of another class or threshold.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            header = json.loads(arrays["header"].tobytes())
        except (ValueError, RuntimeError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"data must hold the bytes of a stored monitor, but they are damaged: {error}") from error
        given = {"detector": type(detector).__name__, "threshold": detector.threshold}
        wrong = {name: (header[name], value) for name, value in given.items() if header[name] != value}
        if wrong:
            raise ValueError(f"detector must be the one that was stored, but (stored, given) differ: {wrong}")
        monitor = cls(detector, calibration=header["calibration"], transform=header["transform"] and NormalScores(**header["transform"]))
        monitor._state = from_bytes(arrays["state"].tobytes(), detector.init(1))
        monitor._learned, monitor._seen, monitor._before = arrays["learned"], arrays["seen"], arrays["before"]
        if "prior" in arrays:
            assert monitor.transform is not None
            *prior, floor = arrays["prior"].tolist()
            columns = {name: arrays[name] for name in _SCORES}
            monitor._scores = FittedScores(config=monitor.transform, prior=Prior(*prior), floor=floor, **columns)
        return monitor

    def _update(self, x: NDArray[Any], active: Mask | None) -> tuple[Alarm, ...]:
        streams = len(x) if self._state is None else len(self._seen)
        if len(x) != streams:
            raise ValueError(f"x must hold one observation for each of the {streams} streams of this monitor, got {len(x)}")
        x = shaped(x, streams)
        seen_now = np.ones(streams, dtype=bool) if active is None else checked_mask(active, streams, "active")
        if self._state is not None:
            return self._advance(x, active, seen_now)
        self._begin(streams)
        try:
            return self._advance(x, active, seen_now)
        except ValueError:
            self._state = None
            raise

    def _advance(self, x: NDArray[Any], active: Mask | None, seen_now: Mask) -> tuple[Alarm, ...]:
        if self.learning:
            self._learn(x, seen_now)
            self._seen = self._before = self._seen + seen_now
            return ()
        self._state = self.detector.step(self._state, self._transformed(x, seen_now), active)
        self._seen = self._seen + seen_now
        return self._alarms(seen_now)

    def _begin(self, streams: int) -> None:
        self._state = self.detector.init(streams)
        self._learned = np.empty((streams, 0))
        self._seen = self._before = np.zeros(streams, np.int64)

    def _learn(self, x: NDArray[Any], active: Mask) -> None:
        assert self.transform is not None
        bad = active & ~np.isfinite(one_number(x))
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} active streams have a nan or infinite value in the learning phase, the first is stream {int(bad.argmax())}"
            )
        seen = np.where(active, x, np.nan)
        check_sign(seen, self.transform.scale)
        learned = np.column_stack((self._learned, seen))
        if learned.shape[1] == self.calibration:
            self._scores = self.transform.fit(learned, ~np.isnan(learned))
            learned = learned[:, :0]
        self._learned = learned

    def _transformed(self, x: NDArray[Any], active: Mask) -> NDArray[Any]:
        return x if self._scores is None else self._scores.transform(np.where(active, one_number(x), np.nan))

    def _alarms(self, active: Mask) -> tuple[Alarm, ...]:
        alarmed = self.detector.alarms(self._state) & active
        if not alarmed.any():
            return ()
        changed, statistic = self.detector.changed_at(self._state) + self._before, self.detector.statistic(self._state)
        alarms = tuple(
            Alarm(tick=int(self._seen[row]), stream=int(row), changed_at=int(changed[row]), statistic=float(statistic[row]))
            for row in np.flatnonzero(alarmed)
        )
        self._state = self.detector.restart(self._state, alarmed)
        self._before = np.where(alarmed, self._seen, self._before)
        return alarms


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)
