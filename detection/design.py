"""What the fits of detectors share: a threshold for a target run length, exact where the increment's law is known, else from simulated runs.

Exports ``designed_threshold``, ``knows_exactly``, ``SimulatedPromise`` and ``simulated_promise``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, inf, log

import numpy as np
import scipy

from detection.calibration import RunLengths, threshold_for
from detection.detector import ReflectedSum
from detection.expectations import Observed, moments
from detection.increment import Increment, Quadratic, QuadraticForm
from detection.laws import Array, Gaussian, Law

PATHS = 2000
_EXPOSED = 8  # laws that are simulated, where a set has more
_MOST = 20_000  # draws to find them
_BLOCK = 64
_LONGEST = 2e6  # ticks of a run length whose simulation still fits in memory


@dataclass(frozen=True, kw_only=True)
class SimulatedPromise:
    """What a detector is worth, from simulated runs, with two-sided 95 % intervals.

    ``arl`` ticks between false alarms under the worst law simulated, ``worst_pre`` (``inf`` where no run ended in an alarm), at least ``floor``,
    which needs no simulation; mean ``delay`` (observations used, from a statistic at 0) under ``worst_post``. Where a set has more than 8
    laws, the 8 of the highest ``E exp z`` or the least drift are simulated.
    """

    arl: float
    arl_interval: tuple[float, float]
    floor: float
    worst_pre: Law
    delay: float
    delay_interval: tuple[float, float]
    worst_post: Law


def knows_exactly(increment: Increment, laws: Sequence[Law]) -> bool:
    """Whether the distribution of ``increment`` is known under all ``laws``: a quadratic of a Gaussian number, or linear in a Gaussian vector."""
    linear = isinstance(increment, QuadraticForm) and not np.any(increment.curvature)
    gaussians = [law for law in laws if isinstance(law, Gaussian)]
    if len(gaussians) < len(laws):
        return False
    return linear or (isinstance(increment, Quadratic) and not any(law.dimension for law in gaussians))


def designed_threshold(
    increment: Increment,
    laws: Sequence[Law],
    arl: float,
    *,
    method: str | None = None,
    rng: np.random.Generator | None = None,
    paths: int = PATHS,
    horizon: int | None = None,
) -> float:
    """Threshold with an average run length of ``arl`` ticks under every one of ``laws``; ``E exp(z) <= 1`` under each is taken for granted.

    ``method`` is one of :func:`detection.threshold_for`; by default ``"exact"`` where :func:`knows_exactly`, else ``"simulate"``: ``paths`` x
    ``horizon`` observations (by default enough to certify ``arl``) from each law, or from the 8 with the highest ``E exp z``. It is then
    the certified end of the estimate, or the floor ``log(arl)`` if that is less; up to an ``arl`` of 2e6. Errors as for :func:`detection.threshold_for`.
    """
    if method is None:
        method = "exact" if knows_exactly(increment, laws) else "simulate"
    if method != "simulate" or not arl >= 2:
        return threshold_for(increment, laws, arl, method=method, rng=rng)
    if rng is None:
        raise ValueError("runs are simulated, for the distribution of the increment is not known: pass rng, or method='floor'")
    if arl > _LONGEST:
        raise ValueError(f"runs are simulated for an arl of up to {_LONGEST:g} ticks, got {arl:g}; use method='floor'")
    horizon = max(1000, ceil(5 * arl / paths)) if horizon is None else horizon
    runs = (RunLengths.of(_increments(increment, law, rng, paths, horizon)) for law in _exposed(increment, laws, rng))
    return min(log(arl), max(found.threshold(arl) for found in runs))


def simulated_promise(
    detector: ReflectedSum,
    nulls: Sequence[Law],
    changes: Sequence[Law],
    rng: np.random.Generator | None,
    paths: int = 1000,
    horizon: int = 4000,
) -> SimulatedPromise:
    """Run lengths from ``paths`` x ``horizon`` observations of each law, delays from ``paths`` runs. Raises ``ValueError`` without ``rng``."""
    if rng is None:
        raise ValueError("the promise of this detector is simulated, for the distribution of its increment is not known: pass rng")
    increment, threshold = detector.increment, detector.threshold
    counts = [
        (law, *RunLengths.of(_increments(increment, law, rng, paths, horizon)).counts(threshold)) for law in _exposed(increment, nulls, rng)
    ]
    worst_pre, ticks, alarms = min(counts, key=lambda found: found[1] / max(found[2], 0.5))
    delays = [(law, simulated_delays(detector, law, rng, paths)) for law in _exposed(increment, changes, rng, least_drift=True)]
    worst_post, found = max(delays, key=lambda pair: float(pair[1].mean()))
    delay, error = float(found.mean()), 1.96 * float(found.std(ddof=1)) / np.sqrt(len(found))
    return SimulatedPromise(
        arl=ticks / alarms if alarms else inf,
        arl_interval=run_length_interval(ticks, alarms),
        floor=exp(threshold),
        worst_pre=worst_pre,
        delay=delay,
        delay_interval=(delay - error, delay + error),
        worst_post=worst_post,
    )


def run_length_interval(ticks: int, alarms: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of a mean run length after ``alarms`` in ``ticks``, for run lengths that are nearly exponential."""
    tail = (1 - confidence) / 2
    low = ticks / float(scipy.special.gammaincinv(alarms + 1, 1 - tail))
    return low, ticks / float(scipy.special.gammaincinv(alarms, tail)) if alarms else inf


def simulated_delays(detector: ReflectedSum, law: Law, rng: np.random.Generator, runs: int, most: int = 100_000) -> Array:
    """Observations from ``law`` until the alarm, in each of ``runs`` that start at 0. Raises ``ValueError`` for runs longer than ``most``."""
    statistic, delays, tick = np.zeros(runs), np.zeros(runs), 0
    while (open_runs := np.flatnonzero(delays == 0)).size:
        if tick >= most:
            raise ValueError(
                f"{open_runs.size} of {runs} runs under {law!r} raise no alarm within {most} observations: it is hardly detected"
            )
        z = _increments(detector.increment, law, rng, open_runs.size, _BLOCK)
        value = statistic[open_runs]
        for step in range(_BLOCK):
            value = np.maximum(value + z[:, step], 0.0)
            ended = (value >= detector.threshold) & (delays[open_runs] == 0)
            delays[open_runs[ended]] = tick + step + 1
        statistic[open_runs] = value
        tick += _BLOCK
    return delays


def _increments(increment: Increment, law: Law, rng: np.random.Generator, paths: int, horizon: int) -> Array:
    """``(paths, horizon)`` independent increments; those of a law known by observations are picked among theirs."""
    if isinstance(law, Observed):
        return increment(law.draws)[rng.integers(len(law.draws), size=(paths, horizon))]
    return increment(law.sample(rng, paths * horizon)).reshape(paths, horizon)


def _exposed(increment: Increment, laws: Sequence[Law], rng: np.random.Generator, *, least_drift: bool = False) -> Sequence[Law]:
    if len(laws) <= _EXPOSED:
        return laws
    known = [moments(increment, law, rng=rng, num=_MOST) for law in laws]
    order = np.argsort([own.drift().value if least_drift else -own.log_moment(1.0) for own in known], kind="stable")
    return [laws[k] for k in order[:_EXPOSED]]
