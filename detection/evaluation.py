"""Scores of detectors over many runs. Delays count observations used, ``T - nu + 1``: 1 is an alarm on the first changed value.

``average_run_length`` and ``detection_delay`` score alarms that are given; ``evaluate``, ``operating_curve`` and ``location_errors`` simulate
any detector. The first alarm of a run is where the running maximum of its statistic reaches the threshold, so one simulation serves all.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from detection.calibration import RunLengths, block_bootstrap
from detection.detector import Detector
from detection.laws import Array, Law

Interval = tuple[float, float]
_NORMAL = 1.959963984540054  # two-sided 95 %


def average_run_length(ticks: ArrayLike, censored: ArrayLike | None = None) -> float:
    """Mean ticks to a false alarm: all ticks watched, (R,), over the runs that ended in an alarm; ``nan`` when none did.

    ``censored`` (R,) marks runs that ended without an alarm; their ticks count, they do not.

    >>> average_run_length([100, 300, 500], censored=[False, False, True])
    450.0
    """
    watched = np.asarray(ticks, dtype=np.float64)
    ended = np.ones(watched.shape, dtype=bool) if censored is None else ~np.asarray(censored, dtype=bool)
    if ended.shape != watched.shape:
        raise ValueError(f"censored must have the shape of ticks {watched.shape}, got {ended.shape}")
    return float(watched.sum() / ended.sum()) if ended.any() else float("nan")


@dataclass(frozen=True, kw_only=True)
class Delay:
    """``mean`` delay in observations used over the ``detected`` runs (``nan`` for none), with runs ``missed`` and ``false_alarms`` apart."""

    mean: float
    detected: int
    missed: int
    false_alarms: int


def detection_delay(ticks: ArrayLike, nu: ArrayLike) -> Delay:
    """Delays ``T - nu + 1`` of first alarms ``ticks`` (R,) after changes ``nu`` (R,) or one number; ``nan`` is "none" in both.

    An alarm before the change, or where there is none, is a false alarm: excluded from the mean, and counted. Run scores of a fleet
    count elapsed ticks ``T - nu`` instead, one less.

    >>> detection_delay([12.0, 5.0, float("nan")], nu=10)
    Delay(mean=3.0, detected=1, missed=1, false_alarms=1)
    """
    alarm, change = np.broadcast_arrays(np.asarray(ticks, dtype=np.float64), np.asarray(nu, dtype=np.float64))
    detected = alarm >= change
    false = ~np.isnan(alarm) & ~detected
    missed = np.isnan(alarm) & ~np.isnan(change)
    mean = float((alarm - change + 1)[detected].mean()) if detected.any() else float("nan")
    return Delay(mean=mean, detected=int(detected.sum()), missed=int(missed.sum()), false_alarms=int(false.sum()))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A ``value`` (``nan`` where no run showed it, ``inf`` for a run length without alarms) and its two-sided 95 % ``interval``."""

    value: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What simulated runs say of a detector at ``threshold``; delays are in observations used.

    ``arl``: mean ticks to a false alarm. ``false_alarm``: probability of one within the horizon. ``delay``: mean after a change at ``nu``,
    given no alarm before it. ``worst_delay``: mean from a fresh start, the worst case (Lorden's) of a statistic reflected at 0.
    ``miss``: share of the runs quiet up to ``nu`` that stay so for a horizon more. Both delays are means of the runs caught: too
    small where many are missed. ``counts`` are the runs at ``nu``.
    """

    threshold: float
    arl: Measured
    false_alarm: Measured
    delay: Measured
    worst_delay: Measured
    miss: Measured
    counts: Delay


def evaluate(
    detector: Detector[Any],
    null: Law | ArrayLike,
    change: Law | ArrayLike,
    *,
    rng: np.random.Generator,
    nu: int = 100,
    runs: int = 2000,
    horizon: int = 1000,
) -> Evaluation:
    """Score ``detector`` at its threshold: ``runs`` runs of at most ``horizon`` ticks in control, as many with a change from the first
    observation on, and as many with observation ``nu`` (counted from 1) the first changed.

    ``null`` and ``change`` are laws, or streams (S, L) or (S, L, d) that are resampled in blocks. Raises ``ValueError`` for a ``nu``, ``runs`` or
    ``horizon`` below 1.

    >>> from detection import CUSUM, Gaussian
    >>> cusum = CUSUM(pre=Gaussian(0, 1), post=Gaussian(1, 1), threshold=4.0)
    >>> found = evaluate(cusum, cusum.pre, cusum.post, nu=50, rng=np.random.default_rng(0), runs=500)
    >>> found.counts.missed, bool(7 < found.delay.value < found.worst_delay.value < 9)
    (0, True)
    """
    return operating_curve(detector, null, change, thresholds=[detector.threshold], rng=rng, nu=nu, runs=runs, horizon=horizon)[0]


def operating_curve(
    detector: Detector[Any],
    null: Law | ArrayLike,
    change: Law | ArrayLike,
    *,
    rng: np.random.Generator,
    thresholds: Sequence[float] | None = None,
    arls: Sequence[float] | None = None,
    nu: int = 100,
    runs: int = 2000,
    horizon: int = 1000,
) -> tuple[Evaluation, ...]:
    """:func:`evaluate` at each of ``thresholds``, or at the thresholds whose estimated run lengths are ``arls``, from one simulation.

    The points share their runs, so their errors go together. Raises ``ValueError`` as :func:`evaluate` does, unless exactly one of
    ``thresholds`` and ``arls`` is given, and where the runs are too short for an ``arl``.
    """
    if (thresholds is None) == (arls is None):
        raise ValueError(f"give one of thresholds and arls, got thresholds={thresholds!r} and arls={arls!r}")
    _check(nu, runs, horizon)
    top = np.inf if thresholds is None else max(thresholds)
    control = RunLengths(_maxima(detector, _ticks(null, runs, horizon, rng), runs, top))
    if thresholds is None:
        assert arls is not None
        thresholds = [control.threshold(arl, certified=False) for arl in arls]
        top = max(thresholds)
    fresh = _maxima(detector, _ticks(change, runs, horizon, rng), runs, top)
    late = _maxima(detector, chain(_ticks(null, runs, nu - 1, rng), _ticks(change, runs, horizon, rng)), runs, top)
    return tuple(
        _point(threshold, control, _first_alarms(fresh, threshold), _first_alarms(late, threshold), nu) for threshold in thresholds
    )


def location_errors(
    detector: Detector[Any],
    null: Law | ArrayLike,
    change: Law | ArrayLike,
    *,
    rng: np.random.Generator,
    nu: int = 100,
    runs: int = 2000,
    horizon: int = 1000,
) -> Array:
    """Errors ``changed_at - nu`` of the estimated change at the alarm, in ticks, of the runs that caught a change at ``nu``.

    Arguments and errors as for :func:`evaluate`.
    """
    _check(nu, runs, horizon)
    state, going, caught = detector.init(runs), np.ones(runs, dtype=bool), np.zeros(runs, dtype=bool)
    for tick, x in enumerate(chain(_ticks(null, runs, nu - 1, rng), _ticks(change, runs, horizon, rng)), start=1):
        state = detector.step(state, x, going)
        alarms = detector.alarms(state) & going
        caught |= alarms & (tick >= nu)
        going &= ~alarms
        if not going.any():
            break
    return (detector.changed_at(state)[caught] - nu).astype(np.float64)


def _check(nu: int, runs: int, horizon: int) -> None:
    for name, value in (("nu", nu), ("runs", runs), ("horizon", horizon)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")


def _ticks(source: Law | ArrayLike, runs: int, ticks: int, rng: np.random.Generator) -> Iterator[Array]:
    """One observation of each run a tick, (runs,) or (runs, d)."""
    if isinstance(source, Law):
        return (source.sample(rng, runs) for _ in range(ticks))
    streams = block_bootstrap(np.asarray(source), runs, max(ticks, 1), rng)
    return islice((streams[:, tick] for tick in range(streams.shape[1])), ticks)


def _maxima(detector: Detector[Any], ticks: Iterable[Array], runs: int, top: float) -> Array:
    """Running maximum of each statistic (runs, ticks), cut after the tick at which all have reached ``top``."""
    detector = detector.without_alarms()
    state, peak, columns = detector.init(runs), np.full(runs, -np.inf), []
    for x in ticks:
        state = detector.step(state, x)
        peak = np.maximum(peak, detector.statistic(state))
        columns.append(peak)
        if (peak >= top).all():
            break
    return np.stack(columns, axis=1)


def _first_alarms(maxima: Array, threshold: float) -> Array:
    """Tick of the first alarm of each run, counted from 1; ``nan`` for none."""
    quiet = (maxima < threshold).sum(axis=1)
    return np.where(quiet < maxima.shape[1], quiet + 1.0, np.nan)


def _point(threshold: float, control: RunLengths, fresh: Array, late: Array, nu: int) -> Evaluation:
    ticks, alarms = control.counts(threshold)
    counts = detection_delay(late, nu)
    return Evaluation(
        threshold=float(threshold),
        arl=Measured(value=ticks / alarms if alarms else np.inf, interval=control.interval(threshold)),
        false_alarm=_share(alarms, len(control.maxima)),
        delay=_mean(late[late >= nu] - nu + 1),
        worst_delay=_mean(fresh[~np.isnan(fresh)]),
        miss=_share(counts.missed, counts.missed + counts.detected),
        counts=counts,
    )


def _mean(values: Array) -> Measured:
    if len(values) < 2:
        value = float(values[0]) if len(values) else float("nan")
        return Measured(value=value, interval=(float("nan"), float("nan")))
    value, error = float(values.mean()), _NORMAL * float(values.std(ddof=1)) / float(np.sqrt(len(values)))
    return Measured(value=value, interval=(value - error, value + error))


def _share(count: int, num: int) -> Measured:
    """With its Clopper-Pearson interval; ``nan`` of no runs, about which the interval says nothing."""
    low = float(scipy.special.betaincinv(count, num - count + 1, 0.025)) if count else 0.0
    high = float(scipy.special.betaincinv(count + 1, num - count, 0.975)) if count < num else 1.0
    return Measured(value=count / num if num else float("nan"), interval=(low, high))
