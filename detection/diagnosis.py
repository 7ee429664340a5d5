"""A server-side shock, or drift of some clients? The fleet's common movement is taken out first, then each is looked for on its own.

A change that everyone sees (a bad model pushed out, a new label rule) moves all streams at one tick; read client by client it looks like
drift everywhere. The trimmed mean of the fleet at each tick follows the shock and hardly the drift of a few, and what is left of each
stream after subtracting it follows the drift alone. Exports ``diagnose``, ``Diagnosis``, ``CommonShock`` and ``common_movement``.
"""

from dataclasses import dataclass
from math import log, pi, sqrt
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from detection.detector import Mask, ReflectedSum, Ticks
from detection.e_processes import EProcess, PolynomialPrior, e_bh
from detection.laws import Array

Kind = Literal["mean", "scale", "none"]


@dataclass(frozen=True, kw_only=True)
class CommonShock:
    """The fleet moved together by ``size`` standard deviations (up is positive) from tick ``at`` on, counted from 1."""

    at: int
    size: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis:
    """What moved in a window of ``T`` ticks of ``N`` clients.

    ``shock`` is the common movement, if any. ``changed`` (N,) are the clients that drifted on their own, ``since`` (N,) the estimated first
    changed tick of each of them, counted from 1 (0 for the others). ``raw`` (N,) are the clients found without removing the common
    movement. ``kind`` says what changed in the drifted clients, ``mean`` and ``scale`` how much, pooled over them (``nan`` without any).
    """

    shock: CommonShock | None
    changed: Mask
    since: Ticks
    raw: Mask
    kind: Kind
    mean: float
    scale: float
    common: Array

    @property
    def onset_spread(self) -> float:
        """Ticks between the quartiles of the drifted clients' change estimates: small for one cause at one time, ``nan`` without any."""
        if not self.changed.any():
            return float("nan")
        low, high = np.quantile(self.since[self.changed], (0.25, 0.75))
        return float(high - low)

    def __str__(self) -> str:
        share = f"{int(self.changed.sum())} of {len(self.changed)} clients drifted"
        drift = f"{share} ({self.kind}), onsets within {self.onset_spread:g} ticks" if self.changed.any() else share
        shock = "no common shock" if self.shock is None else f"common shock of {self.shock.size:+.2f} at tick {self.shock.at}"
        return f"{shock}; {drift}"


def diagnose(
    u: ArrayLike,
    active: Mask | None = None,
    *,
    detector: ReflectedSum,
    alpha: float = 0.1,
    trim: float = 0.1,
    tolerance: float = 0.25,
    least: int = 20,
) -> Diagnosis:
    """Tell a common shock from client drift in standardised observations ``u`` (T, N), standard normal in control.

    Clients are found by e-BH at ``alpha`` on the e-processes of ``detector``'s increment, of ``u`` less the common movement: on standard
    normal streams the false share is at most ``alpha``, up to what estimating the movement from finitely many clients costs. A shock is
    reported, wrongly with probability ``alpha`` at most, where the movement's mean leaves ``[-tolerance, tolerance]``. The tolerance is
    for drift that leaks into the trimmed mean: up to 0.09 when 5 % of the clients shift, 0.21 when 10 % do, more beyond the share trimmed.
    Drift of so many is a common movement by this definition, and ``raw`` then names the clients. Clients that changed and came back
    before the end of the window lose their evidence; changes are seen in the detector's direction.

    Where device classes move differently, diagnose each on its own. Ticks with fewer than ``least`` active clients have no common movement
    (``nan``) and are left out. Raises ``ValueError`` for other shapes, infinite or ``nan`` active values, and where no tick is left.
    """
    values, there = _window(u, active)
    if not (0 < alpha < 1 and 0 <= trim < 0.5 and tolerance > 0 and least >= 2):
        raise ValueError(
            f"0 < alpha < 1, 0 <= trim < 0.5, tolerance > 0 and least >= 2 are needed, got {alpha=}, {trim=}, {tolerance=}, {least=}"
        )
    there = there & (there.sum(axis=1) >= least)[:, None]
    if not there.any():
        raise ValueError(f"no tick has {least} active clients; lower least or watch longer")
    common = common_movement(values, there, trim=trim)
    own = values - np.where(np.isnan(common), 0.0, common)[:, None]
    raw, _ = _drifted(values, there, detector, alpha)
    changed, since = _drifted(own, there, detector, alpha)
    kind, mean, scale = _kind(own, there, changed, since)
    shock = _shock(common, there.sum(axis=1), alpha, trim, tolerance)
    return Diagnosis(shock=shock, changed=changed, since=since, raw=raw, kind=kind, mean=mean, scale=scale, common=common)


def common_movement(u: Array, active: Mask, *, trim: float = 0.1) -> Array:
    """Mean of each tick (T,) of ``u`` (T, N) over active clients, the share ``trim`` of them left out at each end; ``nan`` where none is.

    >>> common_movement(np.array([[0.0, 1.0, 2.0, 900.0]]), np.array([[True] * 4]), trim=0.25)
    array([1.5])
    """
    ordered = np.sort(np.where(active, u, np.inf), axis=1)
    num = active.sum(axis=1)[:, None]
    cut = np.floor(trim * num)
    place = np.arange(u.shape[1])
    kept = (place >= cut) & (place < num - cut)
    total, count = np.where(kept, ordered, 0.0).sum(axis=1), kept.sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def trimmed_variance(trim: float) -> float:
    """``n`` times the variance of the trimmed mean of ``n`` standard normal numbers, for large ``n``; 1 without trimming.

    The Winsorised variance over ``(1 - 2 trim)^2`` (Huber 1964).
    """
    if trim == 0.0:
        return 1.0
    q = float(-ndtri(trim))
    density = np.exp(-0.5 * q * q) / sqrt(2.0 * pi)
    return float((1.0 - 2.0 * trim - 2.0 * q * density + 2.0 * trim * q * q) / (1.0 - 2.0 * trim) ** 2)


def _window(u: ArrayLike, active: Mask | None) -> tuple[Array, Mask]:
    values = np.asarray(u, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"u must have shape (T, N) with T, N >= 1, got {values.shape}")
    there = np.ones(values.shape, np.bool_) if active is None else np.asarray(active)
    if there.shape != values.shape or there.dtype != np.bool_:
        raise ValueError(f"active must be booleans of shape {values.shape}, got {there.dtype} of shape {there.shape}")
    values = np.where(there, values, 0.0)
    if not np.isfinite(values).all():
        raise ValueError(f"u must be finite where active, {int((~np.isfinite(values)).sum())} values are not; clip or mark them inactive")
    return values, there


def _drifted(u: Array, active: Mask, detector: ReflectedSum, alpha: float) -> tuple[Mask, Ticks]:
    """Clients (N,) found by e-BH at the end of the window, and the tick since which they have changed."""
    process = EProcess.of(detector, alpha)
    state = process.init(u.shape[1])
    for row, there in zip(u, active, strict=True):
        state = process.step(state, row, there)
    changed = e_bh(log_e=process.log_e(state), alpha=alpha)
    return changed, np.where(changed, _ticks_of(process.changed_at(state), active), 0)


def _ticks_of(observation: Ticks, active: Mask) -> Ticks:
    """Tick (N,), from 1, of each client's ``observation``-th active observation; the last tick where there are fewer."""
    reached = active.cumsum(axis=0) >= observation
    return np.where(reached.any(axis=0), reached.argmax(axis=0) + 1, len(active)).astype(np.int64)


def _kind(own: Array, active: Mask, changed: Mask, since: Ticks) -> tuple[Kind, float, float]:
    """What explains the drifted clients' observations after their change better, one mean or one scale a client; both pooled."""
    if not changed.any():
        return "none", float("nan"), float("nan")
    after = active[:, changed] & (np.arange(1, len(own) + 1)[:, None] >= since[changed])
    num = np.maximum(after.sum(axis=0), 1)
    x = np.where(after, own[:, changed], 0.0)
    mean, square = x.sum(axis=0) / num, np.maximum((x * x).sum(axis=0) / num, 1e-12)
    by_mean = float((num * mean * mean).sum())
    by_scale = float((num * (square - 1.0 - np.log(square))).sum())
    spread = float((num * (square - mean * mean)).sum() / num.sum())
    return ("mean" if by_mean >= by_scale else "scale"), float((num * mean).sum() / num.sum()), sqrt(max(spread, 0.0))


def _shock(common: Array, num: NDArray[np.int64], alpha: float, trim: float, tolerance: float) -> CommonShock | None:
    """The better of both directions, by e-processes for a mean beyond ``tolerance`` that average to one e-process."""
    known = np.flatnonzero(~np.isnan(common))
    variance = trimmed_variance(trim) / num[known]
    # for means up to the tolerance E exp(z) <= 1, with equality at the tolerance; strongest against twice the tolerance
    z = [tolerance / variance * (side * common[known] - 1.5 * tolerance) for side in (1.0, -1.0)]
    paths = [_highest_evidence(increments) for increments in z]
    log_e = float(np.max(np.logaddexp(*(evidence for evidence, _ in paths)) - log(2.0)))
    if log_e < -log(alpha):
        return None
    side = int(paths[1][0].max() > paths[0][0].max())
    start = int(paths[side][1])
    before, after = common[known[:start]], common[known[start:]]
    size = float(after.mean() - (before.mean() if len(before) else 0.0))
    return CommonShock(at=int(known[start]) + 1, size=size)


def _highest_evidence(z: Array) -> tuple[Array, int]:
    """``log E`` after each tick (T,), and the index at which the best stretch up to its highest value starts."""
    prior, spent, cusum, start = PolynomialPrior(), -np.inf, 0.0, 0
    log_e, starts = np.empty(len(z)), np.empty(len(z), np.int64)
    for t, increment in enumerate(z):
        spent = np.logaddexp(spent, prior.log_weight(t + 1)) + increment
        start = t if cusum <= 0.0 else start
        cusum = cusum + increment if cusum > 0.0 else increment
        log_e[t], starts[t] = np.logaddexp(spent, prior.log_unspent(t + 1)), start
    return log_e, int(starts[log_e.argmax()])
