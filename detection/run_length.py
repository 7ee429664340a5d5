"""Exact average run length of a reflected statistic, by a Markov chain on the distribution of its increment (Brook and Evans 1972)."""

import warnings
from collections.abc import Sequence
from math import inf, log

import numpy as np

from detection.increment import Increment, Quadratic, QuadraticForm
from detection.laws import Array, Gaussian, Law
from detection.multiplier import gaussian

_STATES, _COARSE = 400, 100
_BEYOND = 1e12  # the chain's linear system keeps about four digits up to here


def exact_run_length(increment: Increment, law: Law, threshold: float, *, states: int = _STATES) -> float:
    """Mean number of independent observations from ``law`` until the statistic, started at 0, reaches ``threshold``.

    The run length in control, or the mean delay ``T - nu + 1`` under a changed law. ``inf`` beyond 1e12. The clip's atoms are exact
    up to the lattice. Raises ``ValueError`` where the increment's distribution is not known.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold!r}")
    scalar, null = _on_the_line(increment, law)
    width = threshold / (states - 0.5)
    lags, below = _lattice(scalar, null, width, states)
    chain = lags[(states - 1) + np.arange(states)[None, :] - np.arange(states)[:, None]]
    chain[:, 0] = (below + np.cumsum(lags))[states - 1 - np.arange(states)]
    try:
        run_length = float(np.linalg.solve(np.eye(states) - chain, np.ones(states))[0])
    except np.linalg.LinAlgError:
        return inf
    return run_length if 1.0 - 1e-9 <= run_length <= _BEYOND else inf


def exact_threshold(increment: Increment, laws: Sequence[Law], arl: float) -> float:
    """Least threshold whose exact run length is at least ``arl`` under every one of ``laws``.

    ``increment`` must have ``E exp(z) <= 1`` under each, so that ``log(arl)`` is enough; that floor is returned, with a warning, for
    ``arl`` above 1e12, where the chain is ill-conditioned. Raises ``ValueError`` for ``arl < 2``.
    """
    if not arl >= 2:
        raise ValueError(f"arl must be at least 2 ticks, got {arl!r}")
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
    from scipy.optimize import brentq

    def excess(threshold: float) -> float:
        return log(min(exact_run_length(increment, law, threshold), 10 * _BEYOND) / arl)

    low, high = 1e-3 * log(arl), log(arl)
    if excess(low) >= 0:
        return low
    while excess(high) < 0:
        high *= 1.5
    return float(brentq(excess, low, high, xtol=1e-7)) + 2e-7


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

    The smooth part is rounded to the nearest step; an atom is shared by its two neighbours, which keeps its mean.
    """
    edges = np.arange(0.5 - states, states) * width
    smooth = increment.cumulative(law, edges)
    lags, below = np.diff(smooth), float(smooth[0])
    for value, mass in zip(*increment.atoms(law), strict=True):
        step = int(np.floor(value / width))
        share = value / width - step
        for lag, part in ((step, mass * (1 - share)), (step + 1, mass * share)):
            if lag <= -states:
                below += part
            elif lag < states:
                lags[lag + states - 1] += part
    return lags, below
