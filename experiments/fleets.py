"""Simulated fleets of standard normal streams, some of which gain a standard deviation, and the scores of what is found in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.detector import Detector
from detection.discoveries import StoppedEBH
from fedsim.randomness import rng_for

Array = NDArray[np.float64]
Ticks = NDArray[np.int64]

NEVER = 2**31  # the change of a stream that never changes
BLOCK = 50_000  # streams that share one generator: a stream's values do not depend on how many are processed at once


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a rule finds in each of R fleets: false share (R,), its highest value over all ticks (``nan``: not known), power, mean delay
    (observations used; only fleets with a true discovery)."""

    name: str
    false: Array
    highest: Array
    power: Array
    delay: Array

    def cells(self) -> list[str]:
        """For a table: mean +- standard error."""
        known = [a for a in (self.false, self.highest, self.power) if not np.isnan(a).any()]
        shares = [f"{a.mean():.4f} +- {error(a):.4f}" for a in known]
        return [self.name, *(shares if len(shares) == 3 else (shares[0], "–", shares[1])), f"{self.delay.mean():.1f}"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Peaks:
    """CUSUM of one fleet, enough for the first alarms under any threshold: ``quiet`` (M,) the highest value of each stream that never
    changes; ``paths`` (T, K) the running maximum of each that does, ``nu`` (K,) when."""

    quiet: Array
    paths: Array
    nu: Ticks

    def alarms(self, threshold: float) -> tuple[Ticks, Ticks]:
        """First alarms (0 for none; a quiet stream's at tick 1, when is not known) and changes of all streams (M + K,)."""
        reached = self.paths >= threshold
        first = np.where(reached.any(axis=0), reached.argmax(axis=0) + 1, 0)
        found = np.concatenate([(self.quiet >= threshold).astype(np.int64), first])
        return found, np.concatenate([np.full(len(self.quiet), NEVER), self.nu])


def changes(rng: np.random.Generator, streams: int, changed: int, first: int, last: int) -> Ticks:
    """Tick from which each stream (N,) has changed: for the first ``changed`` of them drawn from ``first .. last``, else ``NEVER``."""
    nu = np.full(streams, NEVER)
    nu[:changed] = rng.integers(first, last + 1, changed)
    return nu


def observations(purpose: str, fleet: int, nu: Ticks, ticks: int, correlation: float = 0.0) -> Iterator[Array]:
    """Values (N,) at ticks 1, 2, ...; all streams share a part of variance ``correlation``."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(nu), BLOCK)]
    rngs = [rng_for(0, purpose, fleet, block) for block in range(len(blocks))]
    common = rng_for(0, purpose, fleet, "common")
    for tick in range(1, ticks + 1):
        x = np.empty(len(nu))
        for rows, rng in zip(blocks, rngs, strict=True):
            rng.standard_normal(out=x[rows])
        if correlation:
            x = sqrt(1.0 - correlation) * x + sqrt(correlation) * common.standard_normal()
        x += nu <= tick
        yield x


def discovered(
    rules: Sequence[StoppedEBH], local: Detector[Any], purpose: str, fleet: int, nu: Ticks, ticks: int
) -> tuple[list[Ticks], Peaks]:
    """Tick at which each rule finds each stream, 0 for never, (N,) a rule; and the ``local`` statistics of the same fleet."""
    states, z = [rule.init(len(nu)) for rule in rules], local.init(len(nu))
    moved = nu < NEVER
    peak, paths = np.zeros(len(nu)), np.empty((ticks, int(moved.sum())))
    for tick, x in enumerate(observations(purpose, fleet, nu, ticks)):
        states = [rule.step(state, x) for rule, state in zip(rules, states, strict=True)]
        z = local.step(z, x)
        np.maximum(peak, local.statistic(z), out=peak)
        paths[tick] = peak[moved]
    return [state.found for state in states], Peaks(quiet=peak[~moved], paths=paths, nu=nu[moved])


def scores(name: str, fleets: Sequence[tuple[Ticks, Ticks]]) -> Scores:
    """Of pairs (found, nu) of ticks (N,), one a fleet; finding a stream before it changes is false."""
    rows = np.array([_scored(found, nu) for found, nu in fleets]).T
    return Scores(name=name, false=rows[0], highest=rows[1], power=rows[2], delay=rows[3][~np.isnan(rows[3])])


def thresholded(name: str, fleets: Sequence[Peaks], threshold: float) -> Scores:
    """One threshold for every stream."""
    measured = scores(name, [fleet.alarms(threshold) for fleet in fleets])
    return replace(measured, highest=np.full(len(fleets), np.nan))


def matched(name: str, fleets: Sequence[Peaks], fdr: float) -> Scores:
    """The least threshold, to 0.001, whose measured FDR is at most ``fdr``: chosen by one who knows what changed."""
    low, high = 0.0, max(float(max(f.quiet.max(), f.paths.max())) for f in fleets) + 1e-9
    while high - low > 1e-3:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if thresholded(name, fleets, middle).false.mean() <= fdr else (middle, high)
    return thresholded(f"{name} {high:.2f}", fleets, high)


def error(samples: Array) -> float:
    """Standard error of the mean."""
    return float(samples.std(ddof=1) / sqrt(len(samples)))


def _scored(found: Ticks, nu: Ticks) -> tuple[float, float, float, float]:
    any_, true = found > 0, found >= nu
    order = np.argsort(found[any_], kind="stable")
    at, false = found[any_][order], np.cumsum(~true[any_][order])
    last = np.flatnonzero(np.diff(at, append=NEVER))  # what is found at one tick is found together
    shares = false[last] / (last + 1.0)
    delay = float((found - nu + 1)[true].mean()) if true.any() else float("nan")
    return float(shares[-1]) if len(shares) else 0.0, float(shares.max(initial=0.0)), float(true.sum() / max((nu < NEVER).sum(), 1)), delay
