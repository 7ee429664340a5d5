"""Thresholds for a target average run length: exact where the null is known, else from simulated or resampled increments in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from detection.increment import Increment
from detection.laws import Array, Law
from detection.run_length import exact_threshold

METHODS = ("exact", "simulate", "bootstrap", "floor")


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
    if not arl >= 2:
        raise ValueError(f"arl must be at least 2 ticks, got {arl!r}")
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
        return RunLengths.of(increment(block_bootstrap(streams, paths, horizon, rng))).threshold(arl, certified=certified)
    simulated = (increment(law.sample(rng, paths * horizon)).reshape(paths, horizon) for law in laws)
    return max(RunLengths.of(z).threshold(arl, certified=certified) for z in simulated)


@dataclass(frozen=True, eq=False)
class RunLengths:
    """Run lengths at every threshold at once: ``maxima`` (paths, horizon) holds the running maximum of each statistic.

    A path that ends without an alarm is censored, not an alarm. A statistic restarted by alarms forgets its start, so its run length is
    nearly exponential, and total ticks over alarms estimates its mean whatever the horizon.
    """

    maxima: Array

    @classmethod
    def of(cls, increments: Array) -> "RunLengths":
        """From in-control increments (paths, horizon)."""
        statistic = np.zeros(len(increments))
        peak = np.zeros(len(increments))
        maxima = np.empty_like(increments)
        for tick, z in enumerate(increments.T):
            statistic = np.maximum(statistic + z, 0.0)
            peak = np.maximum(peak, statistic)
            maxima[:, tick] = peak
        return cls(maxima)

    def counts(self, threshold: float) -> tuple[int, int]:
        """Ticks watched up to the alarm or the end, over all paths, and alarms."""
        quiet = (self.maxima < threshold).sum(axis=1)
        alarmed = quiet < self.maxima.shape[1]
        return int(quiet.sum() + alarmed.sum()), int(alarmed.sum())

    def average(self, threshold: float) -> float:
        """Estimated average run length; ``nan`` without an alarm."""
        ticks, alarms = self.counts(threshold)
        return ticks / alarms if alarms else float("nan")

    def certified(self, threshold: float, confidence: float = 0.95) -> float:
        """Lower confidence end of the average run length, ``2 ticks / chi2_{2 alarms + 2}``."""
        from scipy.special import gammaincinv

        ticks, alarms = self.counts(threshold)
        return ticks / float(gammaincinv(alarms + 1, confidence))

    def threshold(self, arl: float, *, certified: bool = True) -> float:
        """Least threshold (to 1e-9 of the highest peak) whose estimated run length reaches ``arl``. Raises ``ValueError`` where none does."""
        estimate = self.certified if certified else self.average
        high = float(np.nextafter(self.maxima.max(), np.inf)) if certified else float(self.maxima.max())
        if not estimate(high) >= arl:
            watched = self.maxima.size
            raise ValueError(
                f"arl={arl:g} needs longer watching than {watched} ticks in control (paths x horizon): about {3.5 * arl:.0f} or more"
            )
        low = 0.0
        while high - low > 1e-9 * high:
            middle = 0.5 * (low + high)
            low, high = (low, middle) if estimate(middle) >= arl else (middle, high)
        return high


def block_bootstrap(streams: Array, paths: int, horizon: int, rng: np.random.Generator) -> Array:
    """``paths`` resampled streams of ``horizon`` ticks by the stationary bootstrap (Politis and Romano 1994), blocks of mean ``L^(1/3)``.

    ``streams`` is (S, L) or (S, L, d); the result (paths, horizon) or (paths, horizon, d). A block stays inside one stream and wraps round.
    """
    streams = np.asarray(streams, dtype=np.float64)
    if streams.ndim < 2 or streams.size == 0:
        raise ValueError(f"streams must have shape (S, L) or (S, L, d) with at least one tick, got {streams.shape}")
    num, length = streams.shape[:2]
    starts = rng.random((paths, horizon)) < length ** (-1 / 3)
    starts[:, 0] = True
    ticks = np.broadcast_to(np.arange(horizon), (paths, horizon))
    started = np.maximum.accumulate(np.where(starts, ticks, 0), axis=1)
    pick = np.take_along_axis(rng.integers(num * length, size=(paths, horizon)), started, axis=1)
    resampled: Array = streams[pick // length, (pick + ticks - started) % length]
    return resampled
