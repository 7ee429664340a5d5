"""Our detectors behind river's ``DriftDetector`` interface, to drop into river's pipelines."""

from typing import Any

from river import base

from detection.detector import Detector
from detection.monitor import Alarm, Monitor
from detection.normal_scores import NormalScores


class ScoreDriftDetector(base.DriftDetector):  # type: ignore[misc]
    """``detector`` on one stream, as river's own detectors work: ``update(x)``, then ask ``drift_detected``; it starts anew after a drift.

    ``calibration`` and ``transform`` are those of :class:`detection.Monitor`; the learning phase begins again after every drift, for the
    level has changed. ``calibration=0`` is for streams that are standardised already.

    >>> from detection import CUSUM, Gaussian
    >>> drift = ScoreDriftDetector(CUSUM(pre=Gaussian(0, 1), post=Gaussian(1, 1), threshold=5.0))
    >>> for i, x in enumerate([0.0] * 5 + [3.0] * 3):
    ...     drift.update(x)
    ...     if drift.drift_detected:
    ...         print(f"drift at index {i}, changed at index {drift.changed_at}")
    drift at index 6, changed at index 5
    """

    def __init__(self, detector: Detector[Any], calibration: int = 0, transform: NormalScores | None = None) -> None:
        super().__init__()
        self.detector = detector
        self.calibration = calibration
        self.transform = transform
        self._before = 0  # observations of earlier epochs
        self._alarm: Alarm | None = None
        self._monitor = self._new_monitor()

    @property
    def changed_at(self) -> int | None:
        """Index (from 0) of the estimated first changed observation; ``None`` unless the latest update detected drift."""
        return None if self._alarm is None else self._before + self._alarm.changed_at - 1

    def update(self, x: int | float) -> None:
        """One observation. Raises ``ValueError`` for ``nan`` and what else the detector refuses."""
        if self.drift_detected:
            assert self._alarm is not None
            self._before += self._alarm.tick
            self._reset()
            self._monitor = self._new_monitor()
        self._alarm = self._monitor.update(float(x))
        self._drift_detected = self._alarm is not None

    def _new_monitor(self) -> Monitor:
        return Monitor(self.detector, calibration=self.calibration, transform=self.transform)
