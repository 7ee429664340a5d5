"""One in-control law for a whole fleet: losses of unequal location, scale and shape become standard normal scores.

``u = Phi^-1(F((y - m_i) / s_i))``, ``y = log(loss + floor)``: ``m_i`` and ``s_i`` belong to the client and are shrunk towards the fleet
(empirical Bayes), the shape ``F`` is pooled over the fleet's standardised residuals. So a client needs few calibration values.
"""

from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from detection.laws import Array

Mask = NDArray[np.bool_]
_POOL = 2**16  # order statistics kept of the pooled residuals: finer than a clip at 4 can tell
_MAD, _HUBER = 1.4826, 1.345
_FOREIGN_DEGREES = 4.0  # what the fleet's variance is worth against a client that contradicts it
SCALES = ("log", "identity")


@dataclass(frozen=True, kw_only=True)
class NormalScores:
    """How losses become normal scores; :meth:`fit` learns the rest from in-control losses.

    ``clip`` bounds the scores, and is where ``+inf`` goes. ``scale`` is ``"log"`` for losses (never negative) or ``"identity"`` for signals
    of any sign. ``robust`` takes Huber's location and the median absolute deviation, for calibration that may hold outliers. A client
    with fewer than ``min_calibration`` values is flagged as sparse: its location and scale lean on the fleet's.
    """

    clip: float = 4.0
    scale: str = "log"
    robust: bool = False
    min_calibration: int = 30

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip!r}")
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, got {self.scale!r}")
        if self.min_calibration < 2:
            raise ValueError(f"min_calibration must be at least 2, got {self.min_calibration!r}")

    def fit(self, losses: ArrayLike, observed: Mask | None = None) -> "FittedScores":
        """Scores learned from in-control ``losses`` (N, n) of N clients, of which those ``observed`` (N, n) are there (all by default).

        Raises ``ValueError`` for ``nan`` or infinite values, for negative losses on the log scale, for a fleet whose losses are all
        alike, and for losses of a few discrete values.
        """
        losses, observed = _matrix(losses, observed)
        _check_values(losses, observed, self.scale)
        floor = _floor(losses[observed]) if self.scale == "log" else 0.0
        y = _transformed(np.where(observed, losses, 1.0), floor, self.scale)
        location, deviation, down = _moments(y, observed, robust=self.robust)
        counts = observed.sum(axis=1)
        prior = _prior(location, deviation, counts)
        location, deviation = prior.shrunk(location, deviation, counts)
        y -= location[:, None]
        y /= deviation[:, None]
        residuals = y[observed]
        del y  # a fleet's losses are large
        residuals.sort()
        return FittedScores(
            config=self,
            prior=prior,
            floor=floor,
            location=location,
            deviation=deviation,
            counts=counts.astype(np.int64),
            down_weighted=down,
            pool=_thinned(residuals),
        )


@dataclass(frozen=True)
class Prior:
    """What the fleet says of a client not yet seen: location ``mean`` worth ``strength`` values, log-scale variance ``variance`` worth
    ``degrees`` degrees of freedom; ``inf`` where clients do not differ."""

    mean: float
    strength: float
    variance: float
    degrees: float

    def shrunk(self, location: Array, deviation: Array, counts: NDArray[np.int64]) -> tuple[Array, Array]:
        """Clients' locations and deviations pulled towards the fleet's, the more the fewer their ``counts``."""
        scale = self._scale(deviation, counts, np.full(len(counts), self.degrees))
        return self._place(location, counts, np.full(len(counts), self.strength)), scale

    def shrunk_unless_contradicted(self, location: Array, deviation: Array, counts: NDArray[np.int64]) -> tuple[Array, Array]:
        """As :meth:`shrunk`, but a client whose own values leave the fleet's law behind is pulled less: its spread between clients is then
        its own squared distance (positive-part James-Stein), its variance is held by few degrees of freedom."""
        ratio, noise = self._log_ratio(deviation, counts)
        spread = scipy.special.polygamma(1, self.degrees / 2) if isfinite(self.degrees) else 0.0
        foreign = ratio**2 > 4 * (noise + spread)
        scale = self._scale(deviation, counts, np.where(foreign, min(self.degrees, _FOREIGN_DEGREES), self.degrees))
        error = scale**2 / np.maximum(counts, 1)
        distance = (location - self.mean) ** 2 - error
        strength = np.minimum(self.strength, np.divide(scale**2, distance, out=np.full(len(counts), inf), where=distance > 0))
        return self._place(location, counts, strength), scale

    def _place(self, location: Array, counts: NDArray[np.int64], strength: Array) -> Array:
        own = np.where(counts > 0, 1.0 / (1.0 + strength / np.maximum(counts, 1)), 0.0)
        return self.mean + own * (np.where(counts > 0, location, self.mean) - self.mean)

    def _scale(self, deviation: Array, counts: NDArray[np.int64], degrees: Array) -> Array:
        own = np.maximum(counts - 1, 0) / (np.maximum(counts - 1, 0) + degrees)
        return np.sqrt(self.variance + own * (np.where(counts > 1, deviation**2, self.variance) - self.variance))

    def _log_ratio(self, deviation: Array, counts: NDArray[np.int64]) -> tuple[Array, Array]:
        """Logarithm of each client's variance over the fleet's, without bias, and its sampling variance; 0 where there is no variance."""
        half = np.maximum(counts - 1, 1) / 2
        known = (counts > 1) & (deviation > 0)
        logs = 2 * np.log(np.where(known, deviation, 1.0)) - np.log(self.variance) - scipy.special.digamma(half) + np.log(half)
        return np.where(known, logs, 0.0), scipy.special.polygamma(1, half)


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedScores:
    """The in-control law of N clients: ``location``, ``deviation`` (N,), the number ``counts`` (N,) of values each rests on, how many of
    them were ``down_weighted`` (N,), and the fleet's sorted standardised residuals ``pool``."""

    config: NormalScores
    prior: Prior
    floor: float
    location: Array
    deviation: Array
    counts: NDArray[np.int64]
    down_weighted: NDArray[np.int64]
    pool: Array

    @property
    def sparse(self) -> Mask:
        """Clients with fewer than ``min_calibration`` values."""
        return self.counts < self.config.min_calibration

    def transform(self, losses: ArrayLike) -> Array:
        """Scores of ``losses`` (N,) or (N, T), in ``[-clip, clip]``; ``+inf`` gives ``clip``, ``nan`` (not observed) stays ``nan``.

        Raises ``ValueError`` for ``-inf``, for negative losses on the log scale, and for another number of clients.
        """
        losses = np.asarray(losses, dtype=np.float64)
        if losses.ndim not in (1, 2) or len(losses) != len(self.location):
            raise ValueError(f"losses must have {len(self.location)} rows, one for each client, got shape {losses.shape}")
        check_sign(losses, self.config.scale)
        columns = (slice(None),) if losses.ndim == 1 else (slice(None), None)
        r = (_transformed(losses, self.floor, self.config.scale) - self.location[columns]) / self.deviation[columns]
        u = self.scores_of(r)
        np.copyto(u, self.config.clip, where=losses == np.inf)
        np.copyto(u, np.nan, where=np.isnan(losses))
        return u

    def scores_of(self, residuals: Array) -> Array:
        """Scores of standardised ``residuals`` of any shape: normal quantiles of their mid-ranks in the pool, in ``[-clip, clip]``."""
        below = 0.5 * (np.searchsorted(self.pool, residuals, side="left") + np.searchsorted(self.pool, residuals, side="right"))
        quantiles: Array = scipy.special.ndtri((below + 0.5) / (len(self.pool) + 1))
        return np.clip(quantiles, -self.config.clip, self.config.clip)

    def refit(self, rows: Mask, losses: ArrayLike, observed: Mask | None = None) -> "FittedScores":
        """Location and scale of the clients in ``rows`` (N,) learned anew from their in-control ``losses`` (rows.sum(), n), shrunk towards
        the same fleet unless they contradict it (a changed client may have left the fleet's law); pooled shape, prior and every other client keep their bits. Raises as :meth:`NormalScores.fit` does."""
        rows = np.asarray(rows)
        if rows.dtype != np.bool_ or rows.shape != self.location.shape:
            raise ValueError(f"rows must be booleans of shape {self.location.shape}, got {rows.dtype} of shape {rows.shape}")
        losses, observed = _matrix(losses, observed)
        if len(losses) != rows.sum():
            raise ValueError(f"losses must have one row for each of the {int(rows.sum())} clients in rows, got shape {losses.shape}")
        _check_values(losses, observed, self.config.scale)
        y = _transformed(np.where(observed, losses, 1.0), self.floor, self.config.scale)
        location, deviation, down = _moments(y, observed, robust=self.config.robust)
        counts = observed.sum(axis=1)
        location, deviation = self.prior.shrunk_unless_contradicted(location, deviation, counts)
        return replace(
            self,
            location=_replaced(self.location, rows, location),
            deviation=_replaced(self.deviation, rows, deviation),
            counts=_replaced(self.counts, rows, counts),
            down_weighted=_replaced(self.down_weighted, rows, down),
        )


def _matrix(losses: ArrayLike, observed: Mask | None) -> tuple[Array, Mask]:
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 2 or losses.size == 0:
        raise ValueError(f"losses must have shape (clients, values) with at least one of each, got {losses.shape}")
    observed = np.ones(losses.shape, dtype=bool) if observed is None else np.asarray(observed, dtype=bool)
    if observed.shape != losses.shape:
        raise ValueError(f"observed must have the shape of losses {losses.shape}, got {observed.shape}")
    return losses, observed


def _check_values(losses: Array, observed: Mask, scale: str) -> None:
    bad = observed & ~np.isfinite(losses)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} calibration losses are nan or infinite, the first in row {int(bad.any(axis=1).argmax())}; mark them unobserved"
        )
    check_sign(np.where(observed, losses, np.nan), scale)


def check_sign(losses: Array, scale: str) -> None:
    """Raises ``ValueError`` for losses that ``scale`` cannot take, with their number and the first row."""
    wrong = losses < 0 if scale == "log" else losses == -np.inf
    if wrong.any():
        first = int(np.flatnonzero(wrong.reshape(len(losses), -1).any(axis=1))[0])
        advice = "are negative, which the log scale cannot take: use NormalScores(scale='identity')" if scale == "log" else "are -inf"
        raise ValueError(f"{int(wrong.sum())} losses {advice} (the first in row {first})")


def _floor(losses: Array) -> float:
    positive = losses[losses > 0]
    if positive.size == 0:
        raise ValueError("every calibration loss is 0: a constant stream has no scale to measure a change by")
    return float(positive.min()) / 2


def _transformed(losses: Array, floor: float, scale: str) -> Array:
    return np.log(losses + floor) if scale == "log" else losses


def _moments(y: Array, observed: Mask, *, robust: bool) -> tuple[Array, Array, NDArray[np.int64]]:
    """Location, deviation and number of down-weighted values of each row (0 and 0 where it has no values)."""
    y = np.where(observed, y, 0.0)
    counts = observed.sum(axis=1)
    if robust:
        return _robust_moments(y, observed)
    location = y.sum(axis=1) / np.maximum(counts, 1)
    y -= location[:, None]
    y[~observed] = 0.0
    y *= y
    return location, np.sqrt(y.sum(axis=1) / np.maximum(counts - 1, 1)), np.zeros(len(y), dtype=np.int64)


def _robust_moments(y: Array, observed: Mask) -> tuple[Array, Array, NDArray[np.int64]]:
    location, deviation, down = np.zeros(len(y)), np.zeros(len(y)), np.zeros(len(y), dtype=np.int64)
    for row in np.flatnonzero(observed.any(axis=1)):
        location[row], deviation[row], down[row] = _huber(y[row, observed[row]])
    return location, deviation, down


def _huber(values: Array) -> tuple[float, float, int]:
    """Huber's location at scale MAD, the MAD, and how many values had less than full weight."""
    centre = float(np.median(values))
    scale = _MAD * float(np.median(np.abs(values - centre)))
    if scale == 0:
        return centre, 0.0, int((values != centre).sum())
    for _ in range(50):
        weight = _HUBER / np.maximum(np.abs(values - centre) / scale, _HUBER)
        moved = float((weight * values).sum() / weight.sum())
        if abs(moved - centre) <= 1e-10 * scale:
            break
        centre = moved
    return centre, scale, int((weight < 1).sum())


def _prior(location: Array, deviation: Array, counts: NDArray[np.int64]) -> Prior:
    """Fleet's law of locations (moments) and of variances (moments of their logarithm; Smyth 2004)."""
    spread = (counts > 1) & (deviation > 1e-12 * np.maximum(np.abs(location), 1.0))
    if not spread.any():
        raise ValueError("every client's calibration losses are constant: there is no scale to measure a change by")
    seen = counts > 0
    within = float((deviation[spread] ** 2).mean())
    between = float(location[seen].var(ddof=1) - within * (1.0 / counts[seen]).mean()) if seen.sum() > 1 else 0.0
    variance, degrees = _variance_prior(deviation[spread] ** 2, (counts[spread] - 1) / 2)
    return Prior(mean=float(location[seen].mean()), strength=within / between if between > 0 else inf, variance=variance, degrees=degrees)


def _variance_prior(variances: Array, half: Array) -> tuple[float, float]:
    """Prior variance and degrees of freedom from sample ``variances`` with ``2 half`` degrees; ``inf`` degrees where they agree."""
    logs = np.log(variances) - scipy.special.digamma(half) + np.log(half)
    mean = float(logs.mean())
    excess = float(logs.var(ddof=1) - scipy.special.polygamma(1, half).mean()) if len(logs) > 1 else 0.0
    if excess <= 0:
        return float(np.exp(mean)), inf
    prior_half = _inverse_trigamma(excess)
    return float(np.exp(mean + scipy.special.digamma(prior_half) - np.log(prior_half))), 2 * prior_half


def _inverse_trigamma(value: float) -> float:
    """The ``x > 0`` with ``trigamma(x) = value``: Newton's steps on ``1 / trigamma``, monotone from below."""
    x = 0.5 + 1.0 / value
    for _ in range(50):
        current = float(scipy.special.polygamma(1, x))
        move = current * (1 - current / value) / float(scipy.special.polygamma(2, x))
        x += move
        if abs(move) <= 1e-12 * x:
            break
    return x


def _thinned(residuals: Array) -> Array:
    """At most ``_POOL`` evenly spaced order statistics. Raises ``ValueError`` for residuals of a few discrete values."""
    distinct = 1 + int((np.diff(residuals) > 0).sum())
    if distinct < min(10, len(residuals) / 2):
        raise ValueError(
            f"calibration holds only {distinct} distinct values in {len(residuals)}: normal scores need a continuous signal, not hits and misses"
        )
    if len(residuals) <= _POOL:
        return residuals
    return residuals[((np.arange(_POOL) + 0.5) * (len(residuals) / _POOL)).astype(np.int64)]


def _replaced(column: NDArray[Any], rows: Mask, values: NDArray[Any]) -> NDArray[Any]:
    column = column.copy()
    column[rows] = values
    return column
