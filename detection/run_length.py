"""Exact run lengths of a reflected statistic, by a Markov chain on the distribution of its increment (Brook and Evans 1972).

The mean, the whole distribution, thresholds for either, delays from a fresh start (Lorden) and long after it (Pollak) or for
a change at random (Shiryaev), and Siegmund's formula.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from math import inf, log

import numpy as np

from detection.increment import Increment, Quadratic, QuadraticForm
from detection.laws import Array, Gaussian, Law
from detection.multiplier import gaussian

_STATES, _COARSE, _MOST = 400, 100, 1600
_CELLS = 8  # of a lattice step, where the increment is curved
_SETTLED = 1e-9  # relative change of the hazard in a tick at which the chain has forgotten its start
_BEYOND = 1e12  # the chain's linear system keeps about four digits up to here


def exact_run_length(increment: Increment, law: Law, threshold: float, *, states: int | None = None) -> float:
    """Mean number of independent observations from ``law`` until the statistic, started at 0, reaches ``threshold``.

    The run length in control, or the mean delay ``T - nu + 1`` under a changed law. ``inf`` beyond 1e12. The clip's atoms are exact
    up to the lattice. Raises ``ValueError`` where the increment's distribution is not known.
    """
    states = _enough(increment, law, threshold) if states is None else states
    chain = _chain(increment, law, threshold, states)
    try:
        run_length = float(np.linalg.solve(np.eye(states) - chain, np.ones(states))[0])
    except np.linalg.LinAlgError:
        return inf
    return run_length if 1.0 - 1e-9 <= run_length <= _BEYOND else inf


def run_length_distribution(increment: Increment, law: Law, threshold: float, horizon: int, *, states: int = _STATES) -> Array:
    """``P(T <= t)`` for ``t = 1 .. horizon``, (horizon,): the run length in control, or the delay under a changed law, from a statistic at 0.

    The chain is stepped until its hazard has settled; from there on the run length is geometric. Raises ``ValueError`` as
    :func:`exact_run_length` does, and for a horizon below 1.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1 tick, got {horizon!r}")
    chain = _chain(increment, law, threshold, states)
    alarm = np.clip(1.0 - chain.sum(axis=1), 0.0, 1.0)
    hazards, place = np.empty(horizon), np.eye(1, states)[0]
    for tick in range(horizon):
        hazards[tick] = place @ alarm
        if hazards[tick] >= 1.0 or (tick and abs(hazards[tick] - hazards[tick - 1]) <= _SETTLED * hazards[tick]):
            hazards[tick:] = hazards[tick]
            break
        place = place @ chain
        place /= place.sum()
    with np.errstate(divide="ignore"):  # a certain alarm is log1p(-1)
        return np.asarray(-np.expm1(np.cumsum(np.log1p(-np.minimum(hazards, 1.0)))))


def exact_threshold_for_probability(increment: Increment, laws: Sequence[Law], probability: float, horizon: int) -> float:
    """Least threshold at which a false alarm within ``horizon`` ticks has at most ``probability`` under every one of ``laws``.

    ``increment`` must have ``E exp(z) <= 1`` under each, so that ``log(horizon / probability)`` is enough. Raises ``ValueError`` for a
    probability outside (0, 1), and as :func:`exact_run_length` does.
    """
    from scipy.optimize import brentq

    if not 0 < probability < 1:
        raise ValueError(f"probability must lie in (0, 1), got {probability!r}")

    def excess(threshold: float) -> float:
        return max(float(run_length_distribution(increment, law, threshold, horizon)[-1]) for law in laws) - probability

    low, high = 1e-3, log(horizon / probability)
    if excess(low) <= 0:
        return low
    while excess(high) > 0:
        high *= 1.5
    return float(brentq(excess, low, high, xtol=1e-6)) + 2e-6


def late_delay(increment: Increment, null: Law, change: Law, threshold: float, *, states: int = _STATES) -> float:
    """Mean delay after a change to ``change`` that comes long after the start without a false alarm under ``null`` (Pollak's).

    The statistic then has its quasi-stationary law, above 0: at most the delay from a fresh start, :func:`exact_run_length` (Lorden's).
    """
    place = np.full(states, 1.0 / states)
    control, changed = (_chain(increment, law, threshold, states) for law in (null, change))
    for _ in range(10_000):
        after = place @ control
        after /= after.sum()
        if np.abs(after - place).sum() < 1e-12:
            break
        place = after
    return float(place @ np.linalg.solve(np.eye(states) - changed, np.ones(states)))


def random_change(
    increment: Increment, null: Law, change: Law, threshold: float, every: float, *, states: int = _STATES
) -> tuple[float, float]:
    """Mean false alarms before, and mean delay after, a change that comes with probability ``1 / every`` at each tick (Shiryaev's setting).

    The statistic restarts at 0 after an alarm; the delay counts observations used. Raises ``ValueError`` for ``every`` not above 1.
    """
    if not every > 1:
        raise ValueError(f"every must be above 1 tick, got {every!r}")
    control, changed = (_chain(increment, law, threshold, states) for law in (null, change))
    alarm = np.maximum(1.0 - control.sum(axis=1), 0.0)
    control[:, 0] += alarm
    stay = 1.0 - 1.0 / every
    visits = np.linalg.solve(np.eye(states) - stay * control.T, np.eye(1, states)[0])  # ticks before the change spent in each state
    delay = np.linalg.solve(np.eye(states) - changed, np.ones(states))
    return float(stay * visits @ alarm), float(visits @ delay / every)


def siegmund_run_length(increment: Increment, law: Law, threshold: float) -> float:
    """Siegmund's (1985) corrected approximation for a linear increment of a Gaussian: ``(exp(-2 d h) - 1 + 2 d h) / (2 d^2)``.

    ``d`` is the drift and ``h = threshold + 1.166`` in standard deviations of the increment. Raises ``ValueError`` for another increment.
    """
    scalar, own = _on_the_line(increment, law)
    if scalar.curvature != 0 or scalar.clip is not None:
        raise ValueError(f"Siegmund's formula is for linear increments without a clip, got {increment!r}")
    deviation = abs(scalar.slope) * float(np.sqrt(own.variance))
    drift, height = scalar.mean(own) / deviation, threshold / deviation + 1.166
    if abs(drift) < 1e-9:
        return height**2
    return float((np.expm1(-2 * drift * height) + 2 * drift * height) / (2 * drift**2))


def exact_threshold(increment: Increment, laws: Sequence[Law], arl: float) -> float:
    """Least threshold whose exact run length is at least ``arl`` under every one of ``laws``.

    ``increment`` must have ``E exp(z) <= 1`` under each, so that ``log(arl)`` is enough; that floor is returned, with a warning, for
    ``arl`` above 1e12, where the chain is ill-conditioned. Raises ``ValueError`` for ``arl < 2``.
    """
    if not 2 <= arl < inf:
        raise ValueError(f"arl must be at least 2 ticks, and finite, got {arl!r}")
    if arl > _BEYOND:
        warnings.warn(f"arl={arl:.3g} is beyond the exact chain (1e12); using the safe threshold log(arl)", RuntimeWarning, stacklevel=2)
        return log(arl)
    worst, threshold = _worst(increment, laws, log(arl)), 0.0
    while worst is not None:
        threshold = _root(increment, worst, arl)
        laws = [law for law in laws if law != worst]
        other = _worst(increment, laws, threshold)
        caught = other is not None and exact_run_length(increment, other, threshold) < arl * (1 - 1e-6)
        worst = other if caught else None
    return threshold


def worst_null(increment: Increment, laws: Sequence[Law], threshold: float) -> tuple[Law, float]:
    """The law among ``laws`` with the shortest run length, and that run length."""
    law = _worst(increment, laws, threshold)
    assert law is not None
    return law, exact_run_length(increment, law, threshold)


def worst_delay(increment: Increment, laws: Sequence[Law], threshold: float) -> tuple[Law, float]:
    """The law among ``laws`` with the longest mean delay, and that delay (observations used, from a statistic at 0)."""
    law = max(laws, key=lambda member: exact_run_length(increment, member, threshold, states=_COARSE))
    return law, exact_run_length(increment, law, threshold)


def _worst(increment: Increment, laws: Sequence[Law], threshold: float) -> Law | None:
    return min(laws, key=lambda law: exact_run_length(increment, law, threshold, states=_COARSE), default=None)


def _root(increment: Increment, law: Law, arl: float) -> float:
    """Least threshold for ``arl`` under ``law``: on a coarse chain first, then on the fine one, which is 50 times as dear, close by."""
    from scipy.optimize import brentq

    @cache
    def excess(threshold: float, states: int | None = None) -> float:
        return log(min(exact_run_length(increment, law, threshold, states=states), 10 * _BEYOND) / arl)

    low, high = 1e-3 * log(arl), log(arl)
    if excess(low, _COARSE) >= 0 and excess(low) >= 0:
        return low
    while excess(high, _COARSE) < 0:
        high *= 1.5
    near = high if excess(low, _COARSE) >= 0 else float(brentq(excess, low, high, args=(_COARSE,), xtol=1e-4))
    below = above = 0.01
    while near - below > low and excess(near - below) >= 0:
        below *= 4
    while excess(near + above) < 0:
        above *= 4
    return float(brentq(excess, max(near - below, low), near + above, xtol=1e-7)) + 2e-7


def _enough(increment: Increment, law: Law, threshold: float) -> int:
    """States for a lattice of an eighth of the increment's deviation: rounding to it adds a twelfth of a step's square to the variance."""
    scalar, own = _on_the_line(increment, law)
    deviation = abs(scalar.slope) * float(np.sqrt(own.variance))  # type: ignore[arg-type]
    return _STATES if scalar.curvature or deviation == 0 else int(np.clip(8 * threshold / deviation, _STATES, _MOST))


def _chain(increment: Increment, law: Law, threshold: float, states: int) -> Array:
    """Probabilities of moving between lattice states below the threshold, (states, states); the first is 0."""
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold!r}")
    scalar, null = _on_the_line(increment, law)
    lags, below = _lattice(scalar, null, threshold / (states - 0.5), states)
    chain: Array = np.lib.stride_tricks.sliding_window_view(lags, states)[::-1].copy()
    chain[:, 0] = (below + np.cumsum(lags))[states - 1 - np.arange(states)]
    return chain


def _on_the_line(increment: Increment, law: Law) -> tuple[Quadratic, Gaussian]:
    """``increment`` and ``law`` as they are on the line; a linear increment of ``R^d`` as the Gaussian number it is."""
    null = gaussian(law)
    if isinstance(increment, Quadratic):
        return increment, null
    if isinstance(increment, QuadraticForm) and not np.any(increment.curvature):
        slope = np.asarray(increment.slope)
        return Quadratic(curvature=0.0, slope=1.0, offset=0.0), Gaussian(increment.mean(null), float(slope @ null.covariance @ slope))
    raise ValueError(f"the distribution of the increment {increment!r} is not known; use method='simulate' or 'bootstrap'")


def _lattice(increment: Quadratic, law: Gaussian, width: float, states: int) -> tuple[Array, float]:
    """Probabilities of increments of ``-(states-1) .. states-1`` lattice steps, and of all below.

    The smooth part is rounded to the nearest cell, a whole step of a linear increment and an eighth of a step of a curved one, whose
    density has a pole at its least value. Cells and atoms are shared by the two steps next to them, which keeps their means.
    """
    cells = 1 if increment.curvature == 0 else _CELLS
    edges = np.arange((0.5 - states) * cells, (states - 0.5) * cells + 1) * (width / cells)
    smooth = increment.cumulative(law, edges)
    values, masses = increment.atoms(law)
    place = np.concatenate((0.5 * (edges[1:] + edges[:-1]), values)) / width
    masses = np.concatenate((np.diff(smooth), masses))
    step = np.floor(place)
    share = place - step
    lags = np.clip(np.concatenate((step, step + 1)).astype(np.int64) + states, 0, 2 * states)
    found: Array = np.bincount(lags, np.concatenate((masses * (1 - share), masses * share)), 2 * states + 1).astype(np.float64)
    return found[1:-1], float(smooth[0] + found[0])
