"""Evidence that may be read at any tick, and rejections over a whole fleet whose false share is bounded whatever the dependence.

An e-value is a non-negative number of mean at most 1 where nothing changed; an e-process is one at every stopping time (Ramdas, Grunwald,
Vovk, Shafer 2023, arXiv:2210.01948). Exports ``EProcess``, its priors ``PolynomialPrior`` and ``GeometricPrior``, the e-BH procedure
``e_bh`` (Wang, Ramdas 2022, arXiv:2009.02824), and ``mean_e`` and ``product_e`` of groups of streams.
"""

from dataclasses import dataclass
from math import log, log1p
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.detector import Detector, DetectorState, Mask, ReflectedSum, Ticks
from detection.increment import Increment
from detection.laws import Array


class ChangePrior(Protocol):
    """Weights of the possible change times ``k = 1, 2, ...``, which sum to 1 at most."""

    def log_weight(self, k: Any) -> Array:
        """``log w_k``, elementwise."""
        ...

    def log_unspent(self, t: Any) -> Array:
        """``log(1 - sum_{k <= t} w_k)``, elementwise; 0 at ``t = 0``."""
        ...


@dataclass(frozen=True, kw_only=True)
class PolynomialPrior:
    """``w_k = 1 / (k (k + 1))``: of the evidence of a change at tick ``k``, about ``2 log k`` is lost. Needs no guess of when."""

    def log_weight(self, k: Any) -> Array:
        """``-log k - log(k + 1)``."""
        return np.asarray(-np.log(k) - np.log1p(k))

    def log_unspent(self, t: Any) -> Array:
        """``-log(t + 1)``."""
        return np.asarray(-np.log1p(t))


@dataclass(frozen=True, kw_only=True)
class GeometricPrior:
    """``w_k = rate (1 - rate)^(k - 1)``: for changes expected within about ``1 / rate`` ticks; later ones lose ``rate`` a tick."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must lie in (0, 1), got {self.rate!r}")

    def log_weight(self, k: Any) -> Array:
        """``log rate + (k - 1) log(1 - rate)``."""
        return np.asarray(log(self.rate) + (np.asarray(k) - 1.0) * log1p(-self.rate))

    def log_unspent(self, t: Any) -> Array:
        """``t log(1 - rate)``."""
        return np.asarray(np.asarray(t) * log1p(-self.rate))


@dataclass(frozen=True, eq=False)
class EState:
    """``N`` streams: ``log_spent`` (N,), the logarithm of the evidence of the change times up to now, and the ``cusum`` of the same
    increments, which knows the best start."""

    log_spent: Array
    cusum: DetectorState


@dataclass(frozen=True, kw_only=True)
class EProcess(Detector[EState]):
    """``E_t = sum_{k <= t} w_k prod_{k <= s <= t} exp(z(x_s)) + 1 - sum_{k <= t} w_k``, kept as its logarithm.

    The sum obeys ``S_t = (S_{t-1} + w_t) exp(z_t)``. ``z`` is any ``increment`` with ``E exp(z) <= 1`` in control given the past: a
    log-likelihood ratio, or a difference of scores under its multiplier. ``E_t`` is then a supermartingale from 1, and ever reaches
    ``1 / alpha`` with probability ``alpha`` at most (Ville): unlike a CUSUM, which alarms sooner or later, it need not be restarted or
    calibrated. ``statistic`` is ``log E``, ``threshold`` is ``log(1 / alpha)``. Ticks are a stream's own: it loses no prior while inactive.

    >>> from detection import Gaussian, likelihood_increment
    >>> process = EProcess.at_level(0.05, increment=likelihood_increment(Gaussian(0, 1), Gaussian(1, 1)))
    >>> process.log_e(process.step(process.init(2), [0.5, 0.5]))
    array([0., 0.])
    """

    increment: Increment
    prior: ChangePrior = PolynomialPrior()

    @classmethod
    def at_level(cls, alpha: float, *, increment: Increment, prior: ChangePrior = PolynomialPrior()) -> Self:
        """An alarm in control has probability ``alpha`` at most, over all time. Raises ``ValueError`` for a level outside (0, 1)."""
        return cls(increment=increment, prior=prior, threshold=-log(_checked_level(alpha)))

    @classmethod
    def of(cls, detector: ReflectedSum, alpha: float = 0.05) -> Self:
        """On the increment of a fitted ``detector``."""
        return cls.at_level(alpha, increment=detector.increment)

    @property
    def takes_infinity(self) -> bool:
        """Where the increment clips."""
        return getattr(self.increment, "clip", None) is not None

    def log_e(self, state: EState) -> Array:
        """``log E`` (N,); 0 at the start."""
        return np.asarray(np.logaddexp(state.log_spent, self.prior.log_unspent(state.cusum.clock)))

    def statistic(self, state: EState) -> Array:
        """``log E`` (N,)."""
        return self.log_e(state)

    def changed_at(self, state: EState) -> Ticks:
        """The most likely start: one after the observation at which the CUSUM of the same increments was last 0."""
        return (state.cusum.clock - state.cusum.rising + 1).astype(np.int64)

    def _fresh(self, streams: int) -> EState:
        none = np.zeros(streams, np.int32)
        return EState(np.full(streams, -np.inf), DetectorState(np.zeros(streams), none, none))

    def _next(self, state: EState, x: Array) -> EState:
        z = self.increment(x)
        clock = state.cusum.clock + np.int32(1)
        cusum = np.maximum(state.cusum.statistic + z, 0.0)
        rising = np.where(cusum > 0.0, state.cusum.rising + np.int32(1), np.int32(0))
        spent = np.logaddexp(state.log_spent, self.prior.log_weight(clock)) + z
        return EState(spent, DetectorState(cusum, rising, clock))


def e_bh(e: ArrayLike | None = None, alpha: float = 0.1, *, log_e: ArrayLike | None = None, weights: ArrayLike | None = None) -> Mask:
    """Streams (N,) rejected by e-BH: with ``k`` the largest for which ``k e_(k) >= N / alpha``, those with ``e >= N / (alpha k)``.

    Give e-values ``e`` (N,) or their logarithms ``log_e``. ``weights`` (N,), which average 1 and are fixed before the data, multiply the
    e-values: larger for device classes where changes are expected. Takes milliseconds for a million streams, few of them changed.

    **What is promised.** The expected share of false ones among the rejected is at most ``alpha``, "false" meaning unchanged so far: at a
    fixed tick, under any dependence between streams; at a data-dependent tick, if ``E exp(z_t) <= 1`` holds given the *whole fleet's* past
    (independent streams, or streams after removal of their common movement); with an estimated null it is as good as the confidence set
    the null comes from. After a restart a stream has a new e-process, and the promise is for that epoch. ``(1 + R) exp(z)``, the
    Shiryaev-Roberts statistic, is *not* an e-value until divided by ``t`` at a fixed ``t``.

    Raises ``ValueError`` for none or both of ``e`` and ``log_e``, for ``nan`` and negative e-values, and for other weights.

    >>> e_bh([40.0, 1.0, 25.0, 0.2], alpha=0.1)
    array([ True, False,  True, False])
    """
    _checked_level(alpha)
    values, logarithmic = _e_values(e, log_e)
    if weights is not None:
        w = _checked_weights(weights, len(values))
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(w > 0.0, values + np.log(w), -np.inf) if logarithmic else np.where(w > 0.0, values * w, 0.0)
    num = len(values)
    least = -log(alpha) if logarithmic else 1.0 / alpha
    hopeful = np.sort(values[values >= least])[::-1]  # no other can be rejected: N / (alpha k) is least at k = N
    k = np.arange(1, len(hopeful) + 1)
    needed = log(num / alpha) - np.log(k) if logarithmic else num / (alpha * k)
    passed = np.flatnonzero(hopeful >= needed)
    return values >= needed[passed[-1]] if len(passed) else np.zeros(num, np.bool_)


def mean_e(log_e: ArrayLike, groups: NDArray[np.integer[Any]], num_groups: int) -> Array:
    """Logarithm of the average e-value of each group (G,): an e-value for "no stream of it has changed", under any dependence.

    ``groups`` (N,) holds the group of each stream, in ``range(num_groups)``; an empty group gives 0, an e-value of 1.
    """
    values, count = _grouped(log_e, groups, num_groups)
    highest = np.full(num_groups, -np.inf)
    np.maximum.at(highest, groups, values)
    shift = np.where(np.isfinite(highest), highest, 0.0)
    total = np.bincount(groups, np.exp(values - shift[groups]), num_groups)
    with np.errstate(divide="ignore"):
        return np.where(count == 0, 0.0, shift + np.log(total) - np.log(np.maximum(count, 1)))


def product_e(log_e: ArrayLike, groups: NDArray[np.integer[Any]], num_groups: int) -> Array:
    """Logarithm of the product of the e-values of each group (G,): an e-value where the streams are independent, and far stronger
    than the average where many have changed. Arguments as for :func:`mean_e`."""
    values, _ = _grouped(log_e, groups, num_groups)
    total: Array = np.bincount(groups, values, num_groups).astype(np.float64, copy=False)
    return total


def _e_values(e: ArrayLike | None, log_e: ArrayLike | None) -> tuple[Array, bool]:
    if (e is None) == (log_e is None):
        raise ValueError("give e-values or log_e, one of the two")
    values = np.asarray(e if log_e is None else log_e, dtype=np.float64)
    name, floor = ("e", 0.0) if log_e is None else ("log_e", -np.inf)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} must have shape (N,) with N >= 1, got {values.shape}")
    bad = ~(values >= floor)
    if bad.any():
        raise ValueError(
            f"{name} must hold e-values at least 0, none nan; {int(bad.sum())} are not, the first is stream {int(bad.argmax())}"
        )
    return values, log_e is not None


def _checked_weights(weights: ArrayLike, num: int) -> Array:
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (num,) or not (w >= 0).all() or abs(w.mean() - 1.0) > 1e-9:
        raise ValueError(f"weights must be {num} numbers at least 0 that average 1, got shape {w.shape} with mean {w.mean():g}")
    return w


def _checked_level(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha!r}")
    return alpha


def _grouped(log_e: ArrayLike, groups: NDArray[np.integer[Any]], num_groups: int) -> tuple[Array, NDArray[np.intp]]:
    values, _ = _e_values(None, log_e)
    if groups.shape != values.shape or groups.min() < 0 or groups.max() >= num_groups:
        raise ValueError(f"groups must hold a group in range({num_groups}) for each of {len(values)} streams, got shape {groups.shape}")
    return values, np.bincount(groups, minlength=num_groups)
