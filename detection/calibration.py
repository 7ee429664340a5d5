"""Thresholds for a target average run length, or for a probability of a false alarm over a horizon.

Exact where the null is known, else from simulated or resampled runs: one pass gives every threshold. ``threshold_for`` serves the fits of
reflected sums; ``calibration`` and ``calibrated`` serve any detector, from a law or from in-control streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, log
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from detection.detector import Detector
from detection.increment import Increment
from detection.laws import Array, Law
from detection.run_length import exact_threshold

METHODS = ("exact", "simulate", "bootstrap", "floor")
_LONGEST_RISE = 100  # ticks
D = TypeVar("D", bound=Detector[Any])


def threshold_for(
    increment: Increment,
    laws: Sequence[Law],
    arl: float,
    *,
    method: str = "exact",
    rng: np.random.Generator | None = None,
    streams: Array | None = None,
    paths: int = 2000,
    horizon: int = 1000,
    certified: bool = True,
) -> float:
    """Threshold with an average run length of ``arl`` ticks under every one of ``laws``.

    ``"exact"`` solves a Markov chain; ``"simulate"`` draws ``paths`` x ``horizon`` observations from each law; ``"bootstrap"`` resamples
    blocks of in-control ``streams`` (S, L) or (S, L, d) instead of ``laws``; ``"floor"`` is ``log(arl)``, safe and loose where
    ``E exp(z) <= 1``. ``certified`` uses the lower 95 % end of the estimate. Raises ``ValueError`` for an unknown method, for a missing
    ``rng`` or ``streams``, and where the paths are too short for ``arl``.
    """
    if not 2 <= arl < inf:
        raise ValueError(f"arl must be at least 2 ticks, and finite, got {arl!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == "floor":
        return log(arl)
    if method == "exact":
        return exact_threshold(increment, laws, arl)
    if rng is None:
        raise ValueError(f"method={method!r} draws numbers: pass rng")
    if method == "bootstrap":
        if streams is None:
            raise ValueError("method='bootstrap' resamples in-control observations: pass streams (S, L)")
        runs = RunLengths.of(increment(block_bootstrap(streams, paths, horizon, rng)), _rise(arl, horizon))
        return runs.threshold(arl, certified=certified)
    simulated = (increment(law.sample(rng, paths * horizon)).reshape(paths, horizon) for law in laws)
    return max(RunLengths.of(z, _rise(arl, horizon)).threshold(arl, certified=certified) for z in simulated)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A ``threshold``, the ``arl`` it was measured to have (``inf`` where no run alarmed) with its two-sided 95 % ``interval``, and what
    this rests on: ``ticks`` watched in control and ``alarms`` among them."""

    threshold: float
    arl: float
    interval: tuple[float, float]
    ticks: int
    alarms: int


def calibrated(
    detector: D,
    source: Law | ArrayLike,
    *,
    rng: np.random.Generator,
    arl: float | None = None,
    false_alarm: tuple[float, int] | None = None,
    paths: int = 2000,
    horizon: int | None = None,
    block: float | None = None,
    certified: bool = True,
) -> D:
    """``detector`` with the threshold of :func:`calibration`; arguments and errors are the same.

    >>> from detection import FOCuS, Gaussian
    >>> focus = calibrated(FOCuS(threshold=1.0), Gaussian(0.0, 1.0), arl=100, rng=np.random.default_rng(0), paths=200)
    >>> bool(3.0 < focus.threshold < 6.0)
    True
    """
    found = calibration(
        detector, source, rng=rng, arl=arl, false_alarm=false_alarm, paths=paths, horizon=horizon, block=block, certified=certified
    )
    return replace(detector, threshold=found.threshold)


def calibration(
    detector: Detector[Any],
    source: Law | ArrayLike,
    *,
    rng: np.random.Generator,
    arl: float | None = None,
    false_alarm: tuple[float, int] | None = None,
    paths: int = 2000,
    horizon: int | None = None,
    block: float | None = None,
    certified: bool = True,
) -> Calibration:
    """Threshold of any ``detector`` for an average run length of ``arl`` ticks, or for ``false_alarm = (probability, ticks)``.

    ``source`` is the law in control, or in-control streams (S, L) or (S, L, d), which are resampled in blocks of mean length ``block`` (see
    :func:`block_bootstrap`), so that dependence between neighbours survives. ``paths`` runs of ``horizon`` ticks (by default 1,000, or
    what ``arl`` needs) are watched once without restart. Runs that end without an alarm are censored: the tail of a run length is taken
    to be exponential once the statistic has had time to rise from its start (100 ticks, or less where ``horizon`` or ``arl`` are short).
    ``certified`` aims the lower 95 % end of the estimate at ``arl`` (the upper end, at ``probability``), so that the promise holds with
    that confidence. Raises ``ValueError`` unless exactly one target is given, and where the runs are too short for it.
    """
    if (arl is None) == (false_alarm is None):
        raise ValueError(f"give one target, arl or false_alarm, got arl={arl!r} and false_alarm={false_alarm!r}")
    if arl is not None and not 2 <= arl < inf:
        raise ValueError(f"arl must be at least 2 ticks, and finite, got {arl!r}")
    if false_alarm is not None:
        horizon = _checked_horizon(false_alarm, horizon)
    elif horizon is None:
        assert arl is not None
        horizon = max(1000, int(np.ceil(5 * arl / paths)))
    rise = 0 if arl is None else _rise(arl, horizon)
    runs = RunLengths.of_detector(detector, _observations(source, paths, horizon, rng, block), rise)
    if arl is not None:
        threshold = runs.threshold(arl, certified=certified)
    else:
        assert false_alarm is not None
        threshold = runs.threshold_for_probability(false_alarm[0], certified=certified)
    ticks, alarms = runs.counts(threshold)
    return Calibration(
        threshold=threshold, arl=runs.average(threshold) if alarms else inf, interval=runs.interval(threshold), ticks=ticks, alarms=alarms
    )


def _checked_horizon(false_alarm: tuple[float, int], horizon: int | None) -> int:
    probability, ticks = false_alarm
    if not 0 < probability < 1 or ticks < 1:
        raise ValueError(f"false_alarm must be (probability in (0, 1), ticks >= 1), got {false_alarm!r}")
    if horizon is not None and horizon != ticks:
        raise ValueError(f"horizon is that of false_alarm, {ticks} ticks; got horizon={horizon!r}")
    return int(ticks)


def _observations(source: Law | ArrayLike, paths: int, horizon: int, rng: np.random.Generator, block: float | None) -> Array:
    """``(paths, horizon)`` or ``(paths, horizon, d)``."""
    if isinstance(source, Law):
        drawn = source.sample(rng, paths * horizon)
        return drawn.reshape(paths, horizon, *drawn.shape[1:])
    return block_bootstrap(np.asarray(source, dtype=np.float64), paths, horizon, rng, block)


@dataclass(frozen=True, eq=False)
class RunLengths:
    """Run lengths at every threshold at once: ``maxima`` (paths, horizon) holds the running maximum of each statistic.

    A path that ends without an alarm is censored, not an alarm. A statistic restarted by alarms forgets its start, so its run length is
    nearly exponential, and total ticks over alarms estimates its mean whatever the horizon. While the statistic still rises from its start
    alarms are rarer: the first ``rise`` ticks count for themselves, the tail is that of the runs quiet up to there.
    """

    maxima: Array
    rise: int = 0

    @classmethod
    def of(cls, increments: Array, rise: int = 0) -> "RunLengths":
        """From in-control increments (paths, horizon)."""
        statistic = np.zeros(len(increments))
        peak = np.zeros(len(increments))
        maxima = np.empty_like(increments)
        for tick, z in enumerate(increments.T):
            statistic = np.maximum(statistic + z, 0.0)
            peak = np.maximum(peak, statistic)
            maxima[:, tick] = peak
        return cls(maxima, rise)

    @classmethod
    def of_detector(cls, detector: Detector[Any], observations: Array, rise: int = 0) -> "RunLengths":
        """From in-control ``observations`` (paths, horizon) or (paths, horizon, d), by the steps of ``detector``.

        A statistic may be ``-inf`` while it warms up, and ``inf``, an alarm at any threshold. Raises ``ValueError`` where it is ``nan``.
        """
        paths, horizon = observations.shape[:2]
        detector = detector.without_alarms()
        state, peak, maxima = detector.init(paths), np.full(paths, -np.inf), np.empty((paths, horizon))
        for tick in range(horizon):
            state = detector.step(state, observations[:, tick])
            peak = np.maximum(peak, detector.statistic(state))
            maxima[:, tick] = peak
        if np.isnan(peak).any():
            raise ValueError(f"the statistic of {detector!r} is nan in {int(np.isnan(peak).sum())} of {paths} runs in control")
        return cls(maxima, rise)

    def counts(self, threshold: float) -> tuple[int, int]:
        """Ticks watched after the rise up to the alarm or the end, over all paths, and alarms among them."""
        quiet = (self.maxima < threshold).sum(axis=1)
        late = quiet[quiet >= self.rise]
        alarmed = int((late < self.maxima.shape[1]).sum())
        return int((late - self.rise).sum()) + alarmed, alarmed

    def average(self, threshold: float) -> float:
        """Estimated average run length; ``nan`` without an alarm."""
        ticks, alarms = self.counts(threshold)
        return self._whole(threshold, ticks / alarms) if alarms else float("nan")

    def certified(self, threshold: float, confidence: float = 0.95) -> float:
        """Lower confidence end of the average run length, ``2 ticks / chi2_{2 alarms + 2}``."""
        from scipy.special import gammaincinv

        ticks, alarms = self.counts(threshold)
        return self._whole(threshold, ticks / float(gammaincinv(alarms + 1, confidence)))

    def interval(self, threshold: float, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided interval of the average run length; its upper end is ``inf`` without an alarm."""
        from scipy.special import gammaincinv

        ticks, alarms = self.counts(threshold)
        tail = (1 - confidence) / 2
        low = self._whole(threshold, ticks / float(gammaincinv(alarms + 1, 1 - tail)))
        return low, self._whole(threshold, ticks / float(gammaincinv(alarms, tail))) if alarms else inf

    def _highest_late(self) -> float:
        """Highest threshold at which a run first alarms after the rise; 0 without one."""
        last = self.maxima[:, -1]
        late = np.isfinite(last) if self.rise == 0 else np.isfinite(last) & (last > self.maxima[:, self.rise - 1])
        return max(float(np.max(last, where=late, initial=0.0)), 0.0)

    def _whole(self, threshold: float, tail: float) -> float:
        """Mean run length from the start, ``tail`` being that after the rise."""
        if self.rise == 0:
            return tail
        quiet = (self.maxima[:, : self.rise] < threshold).sum(axis=1)
        share = float((quiet == self.rise).mean())
        return float(np.minimum(quiet + 1, self.rise).mean()) + share * tail

    def threshold_for_probability(self, probability: float, *, certified: bool = True, confidence: float = 0.95) -> float:
        """Least threshold at which a run alarms within its horizon with at most ``probability``.

        ``certified`` asks it of the upper end of the exact (Clopper-Pearson) interval. Raises ``ValueError`` where there are too few runs.
        """
        from scipy.special import betaincinv

        highest = np.sort(self.maxima[:, -1])[::-1]
        num = len(highest)
        alarms = np.arange(num)
        share = betaincinv(alarms + 1, num - alarms, confidence) if certified else alarms / num
        allowed = int((share <= probability).sum()) - 1
        if allowed < 0:
            raise ValueError(
                f"a false alarm with probability {probability:g} needs more than {num} runs: about {3 / probability:.0f} or more"
            )
        return max(float(np.nextafter(highest[allowed], np.inf)), float(np.finfo(np.float64).tiny))

    def threshold(self, arl: float, *, certified: bool = True) -> float:
        """Least threshold (to 1e-9 of the highest peak, and at least that) whose estimated run length reaches ``arl``.

        Raises ``ValueError`` where none does, and for a statistic that never rises above 0.
        """
        estimate = self.certified if certified else self.average
        highest = float(np.max(self.maxima, where=np.isfinite(self.maxima), initial=-inf))
        if not highest > 0:
            raise ValueError(
                f"a threshold needs a statistic that rises above 0, got at most {highest:g} in {self.maxima.size} ticks in control"
            )
        high = float(np.nextafter(highest, inf)) if certified else self._highest_late()
        if not estimate(high) >= arl:
            watched = self.maxima.size
            raise ValueError(
                f"arl={arl:g} needs longer watching than {watched} ticks in control (paths x horizon): about {3.5 * arl:.0f} or more"
            )
        low = 1e-9 * high
        if estimate(low) >= arl:
            return low
        while high - low > 1e-9 * high:
            middle = 0.5 * (low + high)
            low, high = (low, middle) if estimate(middle) >= arl else (middle, high)
        return high


def _rise(arl: float, horizon: int) -> int:
    """Ticks left to the rise: so few against ``arl`` that hardly any run alarms among them, and half the horizon at most."""
    return int(min(_LONGEST_RISE, horizon // 2, arl / 20))


def block_bootstrap(streams: Array, paths: int, horizon: int, rng: np.random.Generator, block: float | None = None) -> Array:
    """``paths`` resampled streams of ``horizon`` ticks by the stationary bootstrap (Politis and Romano 1994).

    ``streams`` is (S, L) or (S, L, d); the result (paths, horizon) or (paths, horizon, d). Blocks have the mean length ``block``, by default
    ``L^(1/3)``, the rate at which it should grow; 1 draws single ticks. Strong dependence asks for more, see
    :func:`detection.suggest`. A block stays inside one stream and wraps round. Raises ``ValueError`` for values that are not finite.
    """
    streams = np.asarray(streams, dtype=np.float64)
    if streams.ndim < 2 or streams.size == 0:
        raise ValueError(f"streams must have shape (S, L) or (S, L, d) with at least one tick, got {streams.shape}")
    if not np.isfinite(streams).all():
        raise ValueError(f"streams must be finite, got {int((~np.isfinite(streams)).sum())} values that are not")
    num, length = streams.shape[:2]
    mean_block = length ** (1 / 3) if block is None else block
    if not 1 <= mean_block <= length:
        raise ValueError(f"block must lie between 1 and the {length} ticks of a stream, got {block!r}")
    starts = rng.random((paths, horizon)) < 1 / mean_block
    starts[:, 0] = True
    ticks = np.broadcast_to(np.arange(horizon), (paths, horizon))
    started = np.maximum.accumulate(np.where(starts, ticks, 0), axis=1)
    pick = np.take_along_axis(rng.integers(num * length, size=(paths, horizon)), started, axis=1)
    resampled: Array = streams[pick // length, (pick + ticks - started) % length]
    return resampled
