"""Detectors of this package and of river on equal terms: a level for one false alarm in ``arl`` ticks, first alarms at it, and cost."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import exp, inf, nan
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

try:
    from river.drift import ADWIN, KSWIN
    from river.drift import PageHinkley as RiverPageHinkley
    from river.drift.binary import DDM, HDDMA, HDDMW
except ImportError as error:
    from experiments.study import Skipped

    raise Skipped("river is not installed: pip install 'fedsim[streams]'") from error

from detection import CUSUM, Gaussian, RobustScoreCUSUM, ScoreCUSUM, Singleton, average_run_length, confidence_box, default_post
from detection.bank import Bank
from detection.counts import BernoulliCUSUM
from detection.detector import Detector
from detection.focus import FOCuS
from detection.glr import WindowGLR
from detection.page_hinkley import PageHinkley
from detection.river_detectors import DriftDetector, river_first_alarms
from detection.scan_b import ScanB
from detection.self_starting import SelfStarted, SelfStarting
from detection.shiryaev_roberts import ShiryaevRoberts
from fedsim.randomness import rng_for

Array = NDArray[np.float64]
TIMED = 10_000  # streams side by side when ours are timed


@dataclass(frozen=True, eq=False)
class Sample:
    """Streams of one source by signal: what is watched, ``signals`` (T, R), and the in-control ``history`` (C, R) before it."""

    history: Mapping[str, Array]
    signals: Mapping[str, Array]

    @classmethod
    def split(cls, whole: Mapping[str, Array], history: int) -> "Sample":
        """The first ``history`` ticks apart from the rest."""
        return cls({name: x[:history] for name, x in whole.items()}, {name: x[history:] for name, x in whole.items()})

    def __len__(self) -> int:
        return int(next(iter(self.signals.values())).shape[1])

    def first(self, streams: int) -> "Sample":
        """The first ``streams`` of them."""
        return Sample(*({name: x[:, :streams] for name, x in part.items()} for part in (self.history, self.signals)))


class Contestant(Protocol):
    """One line of the table."""

    @property
    def name(self) -> str: ...
    @property
    def signal(self) -> str:
        """What it watches: ``scores``, ``treated`` (dependence and tails removed) or ``errors`` (0 and 1)."""
        ...

    @property
    def ours(self) -> bool: ...
    @property
    def streams(self) -> float:
        """The most it is given: river works one object and one observation at a time."""
        ...

    def level(self, calm: Sample, arl: float) -> float:
        """With one false alarm in ``arl`` ticks of the in-control ``calm``."""
        ...

    def alarms(self, sample: Sample, level: float) -> Array:
        """First alarms (R,), counted from 1; ``nan`` for none."""
        ...

    def seconds(self) -> float:
        """For a million observations."""
        ...


@dataclass(frozen=True, kw_only=True)
class Batched:
    """A ``detector`` of ours, its level read off one pass. ``learns`` ones meet the history first."""

    name: str
    detector: Detector[Any]
    signal: str = "scores"
    learns: bool = False
    ours: bool = True
    streams: float = inf

    def level(self, calm: Sample, arl: float) -> float:
        peaks = self._peaks(calm)
        low, high = 0.0, max(float(peaks.max()), 1e-300)
        while high - low > 1e-6 * max(high, 1e-6):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if run_length(_crossings(peaks, middle), len(peaks)) >= arl else (middle, high)
        return high

    def alarms(self, sample: Sample, level: float) -> Array:
        return _crossings(self._peaks(sample), level)

    def seconds(self) -> float:
        draws = rng_for(0, "timing")
        x = draws.standard_normal((12, TIMED)) if self.signal != "errors" else 1.0 * (draws.random((12, TIMED)) < 0.2)
        state = self.detector.init(TIMED)
        for row in x[:2]:
            state = self.detector.step(state, row)
        start = time.thread_time()
        for row in x[2:]:
            state = self.detector.step(state, row)
        return (time.thread_time() - start) * 1e6 / x[2:].size

    def restarted(self, sample: Sample, level: float) -> int:
        """Alarms in the first stream, the detector restarted at each."""
        sample, count = sample.first(1), 0
        detector = replace(self._for(sample), threshold=level)
        state = self._met(sample, detector)
        for x in sample.signals[self.signal]:
            state = detector.step(state, x)
            if detector.alarms(state)[0]:
                count, state = count + 1, detector.init(1)
        return count

    def _for(self, sample: Sample) -> Detector[Any]:
        return self.detector

    def _met(self, sample: Sample, detector: Detector[Any]) -> Any:
        state = detector.init(len(sample))
        for x in sample.history[self.signal] if self.learns else ():
            state = detector.step(state, x)
        return state

    def _peaks(self, sample: Sample) -> Array:
        detector = replace(self._for(sample), threshold=1e300)  # up to the first alarm no statistic depends on the threshold
        state, peaks = self._met(sample, detector), np.empty_like(sample.signals[self.signal])
        for tick, x in enumerate(sample.signals[self.signal]):
            state = detector.step(state, x)
            np.maximum(detector.statistic(state), peaks[tick - 1] if tick else 0.0, out=peaks[tick])
        return peaks


@dataclass(frozen=True, kw_only=True)
class Errors(Batched):
    """Bernoulli CUSUM for ``factor`` times the error rate of the fleet's history."""

    factor: float = 1.5
    detector: Detector[Any] = field(default_factory=lambda: BernoulliCUSUM(pre=0.2, post=0.3, threshold=5.0))
    signal: str = "errors"

    def _for(self, sample: Sample) -> Detector[Any]:
        rate = float(sample.history["errors"].mean())
        return BernoulliCUSUM(pre=rate, post=self.factor * rate, threshold=5.0)


@dataclass(frozen=True, kw_only=True)
class Objects:
    """A detector of river; ``make`` turns a level in ``span`` into one, the higher the level the rarer its alarms.

    ``fixed`` is the level it is shipped with, kept whatever the run length.
    """

    name: str
    make: Callable[[float], DriftDetector]
    span: tuple[float, float]
    signal: str = "scores"
    fixed: float | None = None
    learns: bool = False
    ours: bool = False
    streams: float = 60

    def level(self, calm: Sample, arl: float) -> float:
        if self.fixed is not None:
            return self.fixed
        low, high = self.span
        for _ in range(10):
            middle = 0.5 * (low + high)
            enough = run_length(self.alarms(calm, middle), len(calm.signals[self.signal])) >= arl
            low, high = (low, middle) if enough else (middle, high)
        return high

    def alarms(self, sample: Sample, level: float) -> Array:
        if not self.learns:
            return river_first_alarms(self.make(level), sample.signals[self.signal])
        pairs = zip(sample.history[self.signal].T.tolist(), sample.signals[self.signal].T.tolist(), strict=True)
        return np.array([_first_after(self.make(level), history, values) for history, values in pairs])

    def seconds(self) -> float:
        rng, detector, num = rng_for(0, "timing"), self.make(self.span[1]), 3_000
        x: list[Any] = (rng.random(num) < 0.2).tolist() if self.signal == "errors" else rng.standard_normal(num).tolist()
        start = time.thread_time()
        for value in x:
            detector.update(value)
        return (time.thread_time() - start) * 1e6 / num

    def restarted(self, sample: Sample, level: float) -> int:
        """Alarms in the first stream; river's objects start anew by themselves."""
        detector, count = self.make(level), 0
        for x in sample.signals[self.signal][:, 0].tolist():
            detector.update(bool(x) if self.signal == "errors" else x)
            count += bool(detector.drift_detected)
        return count


@dataclass(frozen=True, kw_only=True)
class KolmogorovSmirnov(Batched):
    """river's KSWIN, whose p-value does not depend on its ``alpha`` before the first alarm: one pass serves every level ``-log alpha``."""

    name: str = "river KSWIN"
    detector: Any = None
    ours: bool = False
    streams: float = 60
    fixed: float | None = None

    def level(self, calm: Sample, arl: float) -> float:
        return super().level(calm, arl) if self.fixed is None else self.fixed

    def seconds(self) -> float:
        return Objects(name="", make=lambda level: KSWIN(alpha=exp(-level), seed=0), span=(0.0, 9.0)).seconds()

    def restarted(self, sample: Sample, level: float) -> int:
        return Objects(name="", make=lambda level: KSWIN(alpha=exp(-level), seed=0), span=(0.0, 9.0)).restarted(sample, level)

    def _peaks(self, sample: Sample) -> Array:
        return np.maximum.accumulate(kolmogorov_smirnov(sample.signals[self.signal]), axis=0)


def _first_after(detector: DriftDetector, history: list[float], values: list[float]) -> float:
    """First alarm among ``values``, after a history whose alarms do not count."""
    for value in history:
        detector.update(value)
    for tick, value in enumerate(values, start=1):
        detector.update(value)
        if detector.drift_detected:
            return float(tick)
    return nan


def kolmogorov_smirnov(x: Array, window: int = 100, recent: int = 30) -> Array:
    """``-log`` of the p-values (T, R) of river's ``KSWIN(seed=0)`` before its first alarm, all streams ``x`` (T, R) at once: the newest
    ``recent`` of ``window`` values against as many drawn from the others; 0 until the window is full, and where one rank apart is all they differ by."""
    from scipy.stats import ks_2samp

    grid = np.arange(recent)
    levels = np.array([-np.log(ks_2samp(grid, grid + shift).pvalue) if shift > 1 else 0.0 for shift in range(recent + 1)])
    draws, found = random.Random(0), np.zeros(x.shape)
    for end in range(window, len(x) + 1):
        older = x[[end - window + k for k in draws.sample(range(window - recent), recent)]].T
        newer = x[end - recent : end].T
        points = np.concatenate((older, newer), axis=1)[:, :, None]
        gap = (older[:, None] <= points).sum(axis=2) - (newer[:, None] <= points).sum(axis=2)
        found[end - 1] = levels[np.abs(gap).max(axis=1)]
    return found


def contestants(reference: Array) -> tuple[Batched | Objects, ...]:
    """All of them; ours designed for a rise by one deviation of standard streams. ``reference`` (n,) in-control values are for Scan-B."""
    null, post = Singleton(Gaussian(0.0, 1.0)), Singleton(Gaussian(1.0, 1.0))
    pre = confidence_box(n=200)
    cusum = CUSUM.fit(pre=null, post=post, arl=500)
    robust = RobustScoreCUSUM.fit(pre=pre, post=default_post(pre), arl=500)
    page_hinkley = PageHinkley(delta=0.5, side="up")
    scan = ScanB.fit(reference, threshold=1.0, rng=rng_for(0, "scan-b"))
    ours = (
        Batched(name="CUSUM", detector=cusum),
        Batched(name="SCUSUM", detector=ScoreCUSUM.fit(pre=null, post=Singleton(Gaussian(1.0, 1.5)), arl=500)),
        Batched(name="robust SCUSUM", detector=robust),
        Batched(name="robust SCUSUM, treated", detector=robust, signal="treated"),
        Batched(name="self-started robust SCUSUM", detector=SelfStarted.around(robust, SelfStarting(warm=200)), learns=True),
        Batched(name="Shiryaev-Roberts", detector=ShiryaevRoberts(increment=cusum.increment, threshold=6.0)),
        Batched(name="window GLR", detector=WindowGLR(threshold=5.0)),
        Batched(name="FOCuS", detector=FOCuS(threshold=5.0), streams=400),
        Batched(name="bank of CUSUMs", detector=Bank.of_shifts(clip=4.0)),
        Batched(name="Page-Hinkley", detector=page_hinkley),
        Batched(name="Scan-B", detector=scan, streams=200),
        Errors(name="Bernoulli CUSUM"),
    )
    return ours + _rivers()


def _rivers() -> tuple[Batched | Objects, ...]:
    def adwin(level: float) -> DriftDetector:
        return ADWIN(delta=exp(-level))

    def every_value(level: float) -> DriftDetector:
        return ADWIN(delta=exp(-level), clock=1)

    def page_hinkley(level: float) -> DriftDetector:
        return RiverPageHinkley(threshold=level)

    def rises(level: float) -> DriftDetector:
        return RiverPageHinkley(threshold=level, delta=0.5, mode="up")

    errors: dict[str, tuple[Callable[[float], DriftDetector], tuple[float, float], float]] = {
        "DDM": (lambda level: DDM(drift_threshold=level), (0.0, 12.0), 3.0),
        "HDDM-A": (lambda level: HDDMA(drift_confidence=exp(-level)), (0.0, 20.0), -float(np.log(0.001))),
        "HDDM-W": (lambda level: HDDMW(drift_confidence=exp(-level)), (0.0, 20.0), -float(np.log(0.001))),
    }
    few = {"DDM": 60, "HDDM-A": 30, "HDDM-W": 30}
    levels = {"ADWIN": -float(np.log(0.002)), "KSWIN": -float(np.log(0.005)), "Page-Hinkley": 50.0}
    return (
        Objects(name="river ADWIN", make=adwin, span=(-2.0, 12.0)),
        Objects(name="river ADWIN, at every value, after the history", make=every_value, span=(-2.0, 12.0), learns=True, streams=40),
        Objects(name="river ADWIN, as shipped", make=adwin, span=(0.0, 20.0), fixed=levels["ADWIN"]),
        KolmogorovSmirnov(),
        KolmogorovSmirnov(name="river KSWIN, as shipped", fixed=levels["KSWIN"]),
        Objects(name="river Page-Hinkley", make=page_hinkley, span=(0.0, 100.0)),
        Objects(name="river Page-Hinkley, for rises of 1", make=rises, span=(0.0, 100.0)),
        Objects(name="river Page-Hinkley, for rises of 1, treated", make=rises, span=(0.0, 100.0), signal="treated"),
        Objects(name="river Page-Hinkley, as shipped", make=page_hinkley, span=(0.0, 100.0), fixed=levels["Page-Hinkley"]),
        *(
            Objects(name=f"river {name}", make=make, span=span, signal="errors", streams=few[name])
            for name, (make, span, _) in errors.items()
        ),
        *(
            Objects(name=f"river {name}, as shipped", make=make, span=span, signal="errors", streams=few[name], fixed=level)
            for name, (make, span, level) in errors.items()
        ),
    )


def run_length(first: Array, horizon: int) -> float:
    """Average of first alarms (R,), ``nan`` for streams without one in ``horizon`` ticks; infinite without any."""
    quiet = np.isnan(first)
    average = average_run_length(np.where(quiet, horizon, first), quiet)
    return inf if np.isnan(average) else average


def _crossings(peaks: Array, level: float) -> Array:
    above = peaks >= level
    return np.where(above[-1], above.argmax(axis=0) + 1.0, nan)
