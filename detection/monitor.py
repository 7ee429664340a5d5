"""The live face of a detector: feed observations as they come, get alarms; state to bytes and back.

``Monitor`` owns what a detector leaves to its user: the current state, restarts after alarms, and a learning phase, which streams whose
model was replaced go through again.
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.detector import Detector, Mask, checked_mask, shaped
from detection.fingerprint import differences, fingerprint
from detection.glr import one_number
from detection.learning_phase import LearningPhase, LearningState
from detection.normal_scores import NormalScores
from detection.states import from_bytes, to_bytes

_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Stream ``stream`` is thought to have changed at its observation ``changed_at``, noticed at its observation ``tick``.

    Both count the stream's own observations from 1, those it learned from included.
    """

    tick: int
    stream: int
    changed_at: int
    statistic: float


class Monitor:
    """Watches one stream or ``N`` streams with ``detector``, and restarts a stream when it alarms.

    With ``calibration = n`` the first ``n`` updates are taken to be in control: ``transform`` (normal scores by default) learns each
    stream's law from them, and everything later is transformed by it. Without, observations go to the detector as they are. A stream that
    :meth:`relearn` names learns its law again from its next ``relearning`` observations.

    >>> from detection import CUSUM, Gaussian
    >>> monitor = Monitor(CUSUM(pre=Gaussian(0, 1), post=Gaussian(2, 1), threshold=4.0))
    >>> [monitor.update(x) for x in (0.1, -0.4, 2.0, 3.0)]
    [None, None, None, Alarm(tick=4, stream=0, changed_at=3, statistic=6.0)]
    """

    def __init__(
        self, detector: Detector[Any], *, calibration: int = 0, relearning: int = 30, transform: NormalScores | None = None
    ) -> None:
        if transform is not None and calibration == 0:
            raise ValueError("transform needs a learning phase: pass calibration, the number of updates it may learn from")
        self.detector = detector
        self.calibration = calibration
        self.relearning = relearning
        self.transform = (transform or NormalScores()) if calibration else None
        self._phase = LearningPhase(transform=self.transform, calibration=calibration, relearning=relearning) if self.transform else None
        self._law: LearningState | None = None  # there with the first update, where there is a learning phase
        self._state: Any = None
        self._seen: NDArray[np.int64] = np.empty(0, np.int64)
        self._before: NDArray[np.int64] = np.empty(0, np.int64)  # observations before the stream's latest (re)start

    @property
    def streams(self) -> int | None:
        """Number of streams; ``None`` before the first update."""
        return None if self._state is None else len(self._seen)

    @property
    def learning(self) -> bool:
        """Whether the next update still belongs to the first learning phase."""
        return self._phase is not None and (self._law is None or self._law.scores is None)

    @property
    def watched(self) -> Mask | None:
        """Streams (N,) that the next update can find changed: those that are not learning; ``None`` before the first update."""
        if self._law is not None:
            return self._law.watched
        return None if self._state is None else np.ones(len(self._seen), np.bool_)

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

    def relearn(self, mask: Mask) -> None:
        """Let the streams of ``mask`` (N,), whose model was replaced, learn their law again from their next ``relearning`` observations.

        They are not watched meanwhile, then from a restarted statistic; one that is learning already begins anew. Location and scale are
        learned, shrunk towards the fleet's, see :meth:`detection.FittedScores.refit`; all other streams go on untouched. Raises
        ``ValueError`` without a learning phase, before it has ended, and for a mask that does not fit.
        """
        if self._phase is None:
            raise ValueError("relearn needs a monitor that learns: pass calibration, the number of updates of its learning phase")
        if self._law is None or self._law.scores is None:
            done = 0 if self._law is None else self._law.first.shape[1]
            raise ValueError(f"relearn comes after the first learning phase, of which {done} of {self.calibration} updates are done")
        mask = checked_mask(mask, len(self._seen), "mask")
        self._law = self._phase.relearn(self._law, mask)
        self._state = self.detector.restart(self._state, mask)
        self._before = np.where(mask, self._seen, self._before)

    def to_bytes(self) -> bytes:
        """All that was learned and counted, without pickle; of the detector only what it takes to recognise it."""
        if self._state is None:
            raise ValueError("the monitor has seen nothing yet: there is no state to store")
        arrays: dict[str, Any] = {"seen": self._seen, "before": self._before, "state": _bytes(to_bytes(self._state))}
        if self._phase is not None:
            assert self._law is not None
            arrays |= self._phase.arrays(self._law)
        header: dict[str, Any] = {"format": _FORMAT, "detector": fingerprint(self.detector)}
        header |= {"calibration": self.calibration, "relearning": self.relearning}
        header |= {"transform": asdict(self.transform) if self.transform else None}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, header=_bytes(json.dumps(header).encode()))
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, detector: Detector[Any]) -> Self:
        """The monitor that wrote ``data``, with ``detector`` equal to its own: continues bit for bit.

        Raises ``ValueError`` for damaged bytes, and for a detector that differs in any field, arrays included, with the field's name.
        """
        header, arrays = _stored(data)
        differs = differences(header["detector"], fingerprint(detector))
        if differs:
            raise ValueError(f"detector must be the one that was stored, but differs in {differs}")
        transform = header["transform"] and NormalScores(**header["transform"])
        monitor = cls(detector, calibration=header["calibration"], relearning=header["relearning"], transform=transform)
        monitor._state = from_bytes(arrays["state"].tobytes(), detector.init(1))
        monitor._seen, monitor._before = arrays["seen"], arrays["before"]
        if monitor._phase is not None:
            monitor._law = monitor._phase.from_arrays(arrays)
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
            self._state = self._law = None
            raise

    def _advance(self, x: NDArray[Any], active: Mask | None, seen_now: Mask) -> tuple[Alarm, ...]:
        if self._phase is None or self._law is None:
            self._state = self.detector.step(self._state, x, active)
            self._seen = self._seen + seen_now
            return self._alarms(seen_now)
        watched = self._law.watched
        law, state = self._phase.step(self._law, x, seen_now), self._state
        if self._law.scores is not None:
            now = seen_now & watched
            scores = self._law.scores.transform(np.where(now, one_number(x), np.nan))
            state = self.detector.step(state, scores, None if now.all() else now)
        self._law, self._state, self._seen = law, state, self._seen + seen_now
        self._before = np.where(watched, self._before, self._seen)
        return self._alarms(seen_now & watched)

    def _begin(self, streams: int) -> None:
        self._state = self.detector.init(streams)
        self._law = None if self._phase is None else self._phase.init(streams)
        self._seen = self._before = np.zeros(streams, np.int64)

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


def _stored(data: bytes) -> tuple[dict[str, Any], Mapping[str, NDArray[Any]]]:
    """Header and arrays of a stored monitor. Raises ``ValueError`` for damaged bytes and for those of another format."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        header = json.loads(arrays["header"].tobytes())
    except (ValueError, RuntimeError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"data must hold the bytes of a stored monitor, but they are damaged: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"data must hold a monitor of format {_FORMAT}, got {header.get('format', 'an older one')!r}")
    return header, arrays
