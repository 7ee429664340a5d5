"""Average run lengths too long to wait for, 1e6 ticks and far beyond, with standard errors.

``tilted_run_length`` for reflected sums: a run is a chain of excursions from 0, so ``ARL = E[length of an excursion] / P(it reaches the
threshold)`` (Wald). The rare probability is simulated under the tilted law ``dP* = exp(z) dP``, under which the statistic drifts up, and
each excursion that gets there counts ``exp(-Z)`` (Siegmund 1976). ``split_run_length`` for any detector: multilevel splitting, which
starts many runs afresh from where a few got halfway (Kahn and Harris 1951; Cerou and Guyader 2007).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import scipy

from detection.detector import Detector, ReflectedSum
from detection.increment import Increment, Quadratic
from detection.laws import Array, Gaussian, Law
from detection.states import take

_CELLS = 200_000  # of the table a tilted Gaussian is drawn from
_POOL, _BATCHES = 200_000, 10
_LONGEST = 1_000_000
Draw = Callable[[np.random.Generator, int], Array]


@dataclass(frozen=True, kw_only=True)
class RareRunLength:
    """An estimated average run length ``arl`` in ticks and its ``standard_error``."""

    arl: float
    standard_error: float


def tilted_run_length(
    detector: ReflectedSum, law: Law, rng: np.random.Generator, *, excursions: int = 20_000, threshold: float | None = None
) -> RareRunLength:
    """Average run length of ``detector`` under ``law`` in control, by importance sampling; ``threshold`` instead of its own where given.

    The tilt is ``exp(theta z)`` with ``E exp(theta z) = 1``. For a quadratic of a Gaussian number, clipped or not, it is drawn from a fine
    table. For any other law it is drawn from 10 pools of 200,000 increments each, whose disagreement is part of the standard error. Raises
    ``ValueError`` where the statistic does not drift down under ``law`` or never rises.
    """
    height = detector.threshold if threshold is None else threshold
    if isinstance(detector.increment, Quadratic) and isinstance(law, Gaussian) and not law.dimension:
        values, weights = _table(detector.increment, law)
        return _estimate(values, weights, height, rng, excursions)
    parts = []
    for _ in range(_BATCHES):
        values = np.sort(detector.increment(law.sample(rng, _POOL)))
        parts.append(_estimate(values, np.full(_POOL, 1.0 / _POOL), height, rng, max(excursions // _BATCHES, 100)).arl)
    return _from_rates(1.0 / np.array(parts), 0.0)


def split_run_length(
    detector: Detector[Any],
    law: Law,
    rng: np.random.Generator,
    *,
    particles: int = 1000,
    horizon: int = 1000,
    repeats: int = 10,
    threshold: float | None = None,
) -> RareRunLength:
    """Average run length of any ``detector`` under ``law``, by splitting its runs of ``horizon`` ticks at levels of the statistic.

    Each level is what a quarter of the runs reach. The run length is taken to be exponential once the first quarter of ``horizon`` is over,
    which is left to the statistic to rise from its start; take ``horizon`` long against four times the detector's memory and short against
    the ARL. The standard error is that of ``repeats`` estimates. Raises ``ValueError`` where no run gets beyond a level, for a horizon
    below 4 and for fewer than 2 repeats.
    """
    if horizon < 4 or repeats < 2:
        raise ValueError(f"horizon must be at least 4 ticks and repeats at least 2, got {horizon!r} and {repeats!r}")
    height = detector.threshold if threshold is None else threshold
    if height <= 0:
        raise ValueError(f"threshold must be positive, got {height!r}")
    start = horizon // 4
    shares = np.array([_split(detector, law, rng, particles, horizon, height, start) for _ in range(repeats)])
    share = float(shares.sum(axis=1).max())
    if share > 0.9:
        raise ValueError(f"{share:.0%} of the runs alarm within horizon={horizon} ticks: this is not rare, shorten the horizon")
    if not shares[:, 1].any():
        raise ValueError(f"no run alarmed after its first {start} ticks: use more particles or a longer horizon")
    early = float(shares[:, 0].mean())
    return _from_rates(-np.log1p(-shares[:, 1] / (1.0 - early)) / (horizon - start), early, start)


def _from_rates(rates: Array, early: float, start: int = 0) -> RareRunLength:
    """From estimated alarms per tick after ``start``, before which a share ``early`` of runs alarms.

    The rates are averaged, not the run lengths: an estimated rate is nearly unbiased, its inverse is not.
    """
    rate = float(rates.mean())
    arl = start * (1.0 - early / 2.0) + (1.0 - early) / rate
    error = float(rates.std(ddof=1)) / (sqrt(len(rates)) * rate)
    return RareRunLength(arl=arl, standard_error=arl * error)


def _estimate(values: Array, weights: Array, height: float, rng: np.random.Generator, excursions: int) -> RareRunLength:
    """From the increments' ``values``, ascending, and their probabilities ``weights``."""
    theta = _root(values, weights)
    tilted = weights * np.exp(theta * values)
    plain, up = _drawn(values, weights), _drawn(values, tilted / tilted.sum())
    ticks = _excursions(plain, height, rng, excursions)[1].astype(np.float64)
    ends, _ = _excursions(up, height, rng, excursions)
    counts = np.where(ends >= height, np.exp(-theta * ends), 0.0)
    length, chance = float(ticks.mean()), float(counts.mean())
    error = sqrt((ticks.std() / length) ** 2 + (counts.std() / chance) ** 2) / sqrt(excursions)
    return RareRunLength(arl=length / chance, standard_error=length / chance * error)


def _excursions(draw: Draw, height: float, rng: np.random.Generator, num: int) -> tuple[Array, np.ndarray]:
    """Where walks from 0 end, at 0 or below or at ``height`` or above, and after how many steps."""
    walk, ticks, going = np.zeros(num), np.zeros(num, np.int64), np.arange(num)
    for tick in range(1, _LONGEST):
        walk[going] += draw(rng, len(going))
        ticks[going] = tick
        going = going[(walk[going] > 0) & (walk[going] < height)]
        if not len(going):
            return walk, ticks
    raise ValueError(f"an excursion of the statistic lasted over {_LONGEST:,} ticks: it hardly drifts down before the change")


def _table(increment: Increment, law: Gaussian) -> tuple[Array, Array]:
    """Increments of even cells of a standard normal number, ascending, and the cells' probabilities, far into both tails."""
    edges = np.linspace(-14.0, 14.0, _CELLS + 1)
    middles = 0.5 * (edges[1:] + edges[:-1])
    weights = np.abs(np.diff(scipy.special.ndtr(-np.abs(edges))))  # of the nearer tail, so that nothing is lost; 0 is an edge
    values = increment(float(law.mean) + np.sqrt(float(law.variance)) * middles)  # type: ignore[arg-type]
    order = np.argsort(values, kind="stable")
    return values[order], weights[order] / weights.sum()


def _root(values: Array, weights: Array) -> float:
    """``theta > 0`` with ``E exp(theta z) = 1``."""
    from scipy.optimize import brentq

    drift = float(weights @ values)
    if not drift < 0 < values[-1]:
        raise ValueError(
            f"the statistic must drift down before the change and be able to rise, got drift {drift:+.4g}, highest {values[-1]:.4g}"
        )

    def excess(theta: float) -> float:
        scaled = theta * values
        return float(np.log(weights @ np.exp(scaled - scaled[-1])) + scaled[-1]) / theta

    low, high = 1.0, 1.0
    while excess(low) >= 0:
        low /= 2
    while excess(high) < 0:
        high *= 2
    return float(brentq(excess, low, high, xtol=1e-12))


def _drawn(values: Array, weights: Array) -> Draw:
    """Draws of ``values`` with probabilities ``weights``, by inversion."""
    total = np.cumsum(weights)
    total /= total[-1]
    return lambda rng, num: values[np.searchsorted(total, rng.random(num), side="right").clip(max=len(values) - 1)]


def _split(
    detector: Detector[Any], law: Law, rng: np.random.Generator, particles: int, horizon: int, height: float, start: int
) -> tuple[float, float]:
    """Probabilities of reaching ``height`` first within ``start`` ticks, and after them but within ``horizon``."""
    state, clock, chance, level = detector.init(particles), np.zeros(particles, np.int64), 1.0, -np.inf
    while True:
        highest = _highest(detector, state, clock, law, rng, horizon)
        target = min(float(np.quantile(highest, 0.75)), height)
        if target <= level:
            raise ValueError(f"no run got beyond the level {level:.4g} of {height:.4g}: use more particles or a longer horizon")
        state, clock, reached = _first_at(detector, state, clock, law, rng, horizon, target)
        if not reached.any():
            raise ValueError(f"no run of {particles} got from the level {level:.4g} to {target:.4g}: use more particles")
        if target >= height:
            early = reached & (clock <= start)
            return chance * float(early.mean()), chance * float((reached & ~early).mean())
        chance *= float(reached.mean())
        chosen = rng.choice(np.flatnonzero(reached), size=particles)
        state, clock, level = take(state, chosen), clock[chosen], target


def _highest(detector: Detector[Any], state: Any, clock: np.ndarray, law: Law, rng: np.random.Generator, horizon: int) -> Array:
    """Highest statistic of each run from ``state`` on, up to the horizon."""
    highest = np.asarray(detector.statistic(state))
    for tick in range(int(clock.min()), horizon):
        active = clock + (tick - clock.min()) < horizon
        state = detector.step(state, law.sample(rng, len(clock)), active)
        highest = np.maximum(highest, detector.statistic(state))
    return highest


def _first_at(
    detector: Detector[Any], state: Any, clock: np.ndarray, law: Law, rng: np.random.Generator, horizon: int, target: float
) -> tuple[Any, np.ndarray, np.ndarray]:
    """Each run stopped where its statistic first reaches ``target``: states, clocks, and which got there within the horizon."""
    clock = clock.copy()
    while True:
        active = (detector.statistic(state) < target) & (clock < horizon)
        if not active.any():
            return state, clock, detector.statistic(state) >= target
        state = detector.step(state, law.sample(rng, len(clock)), active)
        clock += active
