"""Run lengths and paths of detectors, simulated with the detectors themselves."""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from detection import Gaussian, Law, ReflectedSum, average_run_length
from detection.states import take
from fedsim.randomness import rng_for


@dataclass(frozen=True, eq=False)
class Runs:
    """First alarms ``ticks`` (R,) of independent runs; ``censored`` (R,) ones ended there without an alarm."""

    ticks: NDArray[np.int64]
    censored: NDArray[np.bool_]

    @property
    def mean(self) -> float:
        """Mean run length, or mean delay where the change is there from the start."""
        return average_run_length(self.ticks, self.censored)

    @property
    def error(self) -> float:
        """Standard error of :attr:`mean`: of the plain mean, or of the exponential mean where runs are censored."""
        if self.censored.any():
            return self.mean / sqrt(int((~self.censored).sum()))
        return float(self.ticks.std(ddof=1) / sqrt(len(self.ticks)))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A design's delays under several laws: by the exact chain and by simulation."""

    name: str
    exact: tuple[float, ...]
    simulated: tuple[Runs, ...]

    @property
    def deviations(self) -> list[float]:
        """Simulated minus exact, in standard errors."""
        return [(runs.mean - exact) / runs.error for exact, runs in zip(self.exact, self.simulated, strict=True)]


def simulated(detector: ReflectedSum, law: Law, num: int, horizon: int, purpose: str) -> Runs:
    """``num`` runs of the detector itself on ``law`` from its start, watched until the first alarm or for ``horizon`` ticks."""
    rng = rng_for(0, "detection study", purpose)
    ticks, censored, watched = np.full(num, horizon), np.ones(num, np.bool_), np.arange(num)
    state = detector.init(num)
    for tick in range(1, horizon + 1):
        state = detector.step(state, law.sample(rng, len(watched)))
        alarmed = detector.alarms(state)
        if alarmed.any():
            ticks[watched[alarmed]], censored[watched[alarmed]] = tick, False
            watched, state = watched[~alarmed], take(state, ~alarmed)
            if not len(watched):
                break
    return Runs(ticks, censored)


def path_of(detector: ReflectedSum, stream: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """The statistic at every sample, and how many alarms restarted it."""
    state, path, alarms = detector.init(1), np.empty(len(stream)), 0
    for tick, x in enumerate(stream[:, None]):
        state = detector.step(state, x)
        path[tick] = state.statistic[0]
        if path[tick] >= detector.threshold:
            alarms += 1
            state = detector.init(1)
    return path, alarms


def short(law: Law) -> str:
    """``N(mean, variance)``."""
    assert isinstance(law, Gaussian)
    return f"N({law.mean:g}, {law.variance:g})"
