"""Whether in-control streams remember their past, and what to do: dependence left in place multiplies false alarms.

At a lag-1 correlation of 0.1, 0.3, 0.5 a threshold for one false alarm in 1,000 observations gives one in 543, 196, 111.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.laws import Array

Mask = NDArray[np.bool_]
_HARMLESS = 0.03  # lag-1 correlation that costs about a fifth of the run length
_LEFT = 0.1  # of blocks: so little is left of what they were made to remove


@dataclass(frozen=True, kw_only=True)
class Autocorrelation:
    """A fleet's mean lag-1 correlation ``value`` with its confidence interval ``low`` to ``high`` (clients independent)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to do about dependence: ``"none"``, ``"residuals"`` (:class:`detection.Residual`) or ``"blocks"`` of ``block`` values
    (:class:`detection.BatchMeans`), for the ``reason`` given. ``pooled`` is the fleet's lag-1 correlation, ``flagged`` the share of streams whose
    independence is rejected, ``left`` that share after the advice."""

    action: Literal["none", "residuals", "blocks"]
    block: int
    pooled: Autocorrelation
    flagged: float
    left: float
    reason: str


def correlations(x: ArrayLike, lags: int, observed: Mask | None = None) -> Array:
    """Autocorrelations (N, lags) of streams ``x`` (N, n) at lags 1 to ``lags``, each over the pairs that were ``observed`` (N, n).

    ``nan`` for a constant stream and for a stream without a pair. Raises ``ValueError`` for ``lags`` outside ``1 .. n - 1``.
    """
    x, observed = checked(x, observed)
    if not 1 <= lags < x.shape[1]:
        raise ValueError(f"lags must lie between 1 and {x.shape[1] - 1} for streams of {x.shape[1]} values, got {lags!r}")
    count = observed.sum(axis=1)
    away = np.where(observed, x, 0.0)
    away = np.where(observed, away - (away.sum(axis=1) / np.maximum(count, 1))[:, None], 0.0)
    square = (away**2).sum(axis=1)
    found = np.full((len(x), lags), np.nan)
    for lag in range(1, lags + 1):
        pairs = (observed[:, lag:] & observed[:, :-lag]).sum(axis=1)
        share = pairs * count / np.maximum(count - lag, 1)  # of whole streams the usual estimate; missing pairs scale it up
        known = (pairs > 0) & (square > 0)
        np.divide((away[:, lag:] * away[:, :-lag]).sum(axis=1) * count, square * share, out=found[:, lag - 1], where=known)
    return found


def unbiased(correlation: Array, counts: NDArray[np.int64]) -> Array:
    """Lag-1 ``correlation`` (N,) of ``counts`` values without the bias ``-(1 + 4 phi) / n`` of an estimated mean (Marriott and Pope 1954)."""
    return (correlation + 1.0 / counts) / (1.0 - 4.0 / np.maximum(counts, 8))


def pooled_autocorrelation(x: ArrayLike, observed: Mask | None = None, *, confidence: float = 0.95) -> Autocorrelation:
    """Mean lag-1 correlation of in-control streams ``x`` (N, n), bias removed, with a normal interval over streams.

    Raises ``ValueError`` for streams of fewer than 8 values, and where all are constant.
    """
    from scipy.special import ndtri

    x, observed = checked(x, observed)
    counts = observed.sum(axis=1)
    plain = correlations(x, 1, observed)[:, 0]
    usable = ~np.isnan(plain) & (counts >= 8)
    if not usable.any():
        raise ValueError("x must hold a stream of at least 8 observed values that are not all equal")
    phi = unbiased(plain[usable], counts[usable])
    mean = float(phi.mean())
    noise = float((np.maximum(1.0 - mean**2, 0.0) / counts[usable]).mean())
    error = float(np.sqrt(max(phi.var(ddof=1) if len(phi) > 1 else 0.0, noise) / len(phi)))
    reach = float(ndtri(0.5 + confidence / 2)) * error
    return Autocorrelation(value=mean, low=mean - reach, high=mean + reach)


def ljung_box(x: ArrayLike, lags: int = 10, observed: Mask | None = None, *, fitted: int = 0) -> Array:
    """p-values (N,) of independence of each stream, ``Q = n (n + 2) sum r_k^2 / (n - k)`` against chi-squared (Ljung and Box 1978).

    ``fitted`` parameters removed before take as many degrees of freedom. ``nan`` where a correlation is.
    """
    from scipy.special import chdtrc

    if not 0 <= fitted < lags:
        raise ValueError(f"fitted must lie between 0 and {lags - 1} for {lags} lags, got {fitted!r}")
    x, observed = checked(x, observed)
    counts = observed.sum(axis=1).astype(np.float64)[:, None]
    r = correlations(x, lags, observed)
    weight = counts * (counts + 2.0) / np.maximum(counts - np.arange(1, lags + 1), 1.0)
    return np.asarray(chdtrc(lags - fitted, (weight * r**2).sum(axis=1)), dtype=np.float64)


def discoveries(p: ArrayLike, rate: float = 0.05) -> Mask:
    """Which p-values (N,) are rejected at a false discovery ``rate`` (Benjamini and Hochberg 1995); ``nan`` never is.

    >>> discoveries([0.001, 0.02, 0.9]).tolist()
    [True, True, False]
    """
    p = np.asarray(p, dtype=np.float64)
    ordered = np.sort(p[~np.isnan(p)])
    passed = np.flatnonzero(ordered <= rate * np.arange(1, len(ordered) + 1) / max(len(ordered), 1))
    return p <= ordered[passed[-1]] if len(passed) else np.zeros(p.shape, dtype=bool)


def suggest(x: ArrayLike, observed: Mask | None = None, *, lags: int = 10) -> Advice:
    """What to do about the dependence of in-control streams ``x`` (N, n), on the scale that is watched (normal scores, say).

    Residuals of an AR(1) model where they come out independent, else blocks of the least power of two (at most a tenth of ``n``) whose
    means do. Negative correlation makes false alarms rarer: it is left alone. Raises ``ValueError`` for streams of fewer than 20 values.
    """
    x, observed = checked(x, observed)
    if x.shape[1] < 20:
        raise ValueError(f"x must hold at least 20 values of each stream to tell dependence from chance, got {x.shape[1]}")
    lags = min(lags, x.shape[1] // 4)
    pooled = pooled_autocorrelation(x, observed)
    flagged = float(discoveries(ljung_box(x, lags, observed)).mean())
    if pooled.high <= _HARMLESS or (pooled.low <= 0.0 and flagged <= 0.05):
        found = f"mean lag-1 correlation {pooled.value:.3f} ({pooled.low:.3f} to {pooled.high:.3f}), {flagged:.0%} of streams flagged"
        return Advice(action="none", block=1, pooled=pooled, flagged=flagged, left=flagged, reason=f"no harmful dependence: {found}")
    return _remedy(x, observed, lags, pooled, flagged)


def _remedy(x: Array, observed: Mask, lags: int, pooled: Autocorrelation, flagged: float) -> Advice:
    from detection.residuals import Residual, block_means

    residuals = Residual().fit(x, observed).transform(np.where(observed, x, np.nan))
    seen = ~np.isnan(residuals)
    left = float(discoveries(ljung_box(residuals, lags, seen, fitted=1)).mean())
    found = f"lag-1 correlation {pooled.value:.2f} ({pooled.low:.2f} to {pooled.high:.2f}) rejects independence"
    if left <= max(0.05, flagged / 10) and abs(pooled_autocorrelation(residuals, seen).value) <= _LEFT:
        reason = f"{found}; AR(1) residuals are independent in {1 - left:.0%} of streams"
        return Advice(action="residuals", block=1, pooled=pooled, flagged=flagged, left=left, reason=reason)
    whole = np.where(observed, x, np.nan)
    most = max(x.shape[1] // 10, 2)
    sizes = [size for size in (2**k for k in range(1, 30)) if size <= most]
    rest = {size: _after_blocks(block_means(whole, size)) for size in sizes}
    block = next((size for size in sizes if rest[size] <= _LEFT), sizes[-1])
    reason = f"{found}, and AR(1) residuals keep it in {left:.0%} of streams; means of {block} have {rest[block]:.2f} left"
    if rest[block] > _LEFT:
        reason += ": too much, so calibrate by a block bootstrap of these streams as well, or collect longer ones"
    return Advice(action="blocks", block=block, pooled=pooled, flagged=flagged, left=left, reason=reason)


def _after_blocks(means: Array) -> float:
    seen = ~np.isnan(means)
    return pooled_autocorrelation(means, seen).value if (seen.sum(axis=1) >= 8).any() else float("inf")


def checked(x: ArrayLike, observed: Mask | None) -> tuple[Array, Mask]:
    """``x`` as streams (N, n) and which of their values count. Raises ``ValueError`` for other shapes and values that are not finite."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x must have shape (streams, values) with at least one of each, got {x.shape}")
    observed = np.ones(x.shape, dtype=bool) if observed is None else np.asarray(observed, dtype=bool)
    if observed.shape != x.shape:
        raise ValueError(f"observed must have the shape of x {x.shape}, got {observed.shape}")
    bad = observed & ~np.isfinite(x)
    if bad.any():
        first = int(bad.any(axis=1).argmax())
        raise ValueError(f"{int(bad.sum())} observed values are nan or infinite, the first in stream {first}; mark them unobserved")
    return x, observed
