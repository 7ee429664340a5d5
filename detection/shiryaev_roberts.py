"""Shiryaev-Roberts: the evidence for a change summed over all its possible starts, where CUSUM takes the best one (Shiryaev 1963; Roberts 1966)."""

from dataclasses import dataclass
from math import exp, inf, log, log1p
from typing import Self

import numpy as np

from detection.detector import Detector, DetectorState, Ticks
from detection.increment import Increment, Quadratic, score_increment
from detection.laws import Array, Gaussian, Law
from detection.multiplier import gaussian, multiplier_for
from detection.uncertainty import UncertaintySet

METHODS = ("exact", "floor")


@dataclass(frozen=True, eq=False)
class ShiryaevState:
    """``N`` streams: ``log_sum`` (N,), the logarithm of the statistic, and the CUSUM of the same increments, which knows the best start."""

    log_sum: Array
    cusum: DetectorState


@dataclass(frozen=True, kw_only=True)
class ShiryaevRoberts(Detector[ShiryaevState]):
    """``R_0 = head_start``, ``R_t = (1 + R_{t-1}) exp(z(x_t)) = sum_k prod_{k <= s <= t} exp(z(x_s))``, kept as its logarithm.

    ``z`` is any ``increment`` with ``E exp(z) <= 1`` in control: a scaled difference of scores, a log-likelihood ratio, or the ``increment``
    of a fitted CUSUM. ``R_t - t - head_start`` then has no upward drift, so the run length in control is at least ``exp(threshold) -
    head_start``. ``R_t`` is not an e-value: ``E R_t`` may reach ``t + head_start``. A head start speeds up the reaction to early changes
    (SR-r; Moustakides, Polunchenko and Tartakovsky 2011).

    >>> from detection import Gaussian, likelihood_increment
    >>> detector = ShiryaevRoberts(increment=likelihood_increment(Gaussian(0, 1), Gaussian(1, 1)), threshold=7.0)
    >>> state = detector.step(detector.init(1), [0.5])
    >>> detector.statistic(state)
    array([0.])
    """

    increment: Increment
    head_start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.head_start < exp(min(self.threshold, 700.0)):
            raise ValueError(f"head_start must lie in [0, exp(threshold)), got {self.head_start!r} at threshold {self.threshold!r}")

    @classmethod
    def fit(
        cls,
        *,
        pre: UncertaintySet,
        post: UncertaintySet,
        arl: float = 10_000.0,
        clip: float | None = 4.0,
        method: str = "exact",
        head_start: float = 0.0,
    ) -> Self:
        """Scores of the *centres* of the two sets, with ``arl`` ticks between false alarms at the centre of ``pre``: no promise elsewhere.

        ``method`` is ``"exact"`` (:func:`shiryaev_run_length`) or ``"floor"``, ``log(arl + head_start)``, safe and loose. Another law or
        data: construct with an increment and a threshold of your own, and see :func:`detection.calibrated`. Raises ``ValueError`` where
        the centres coincide or cannot be told apart.
        """
        if not arl >= 2:
            raise ValueError(f"arl must be at least 2 ticks, got {arl!r}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if not head_start >= 0:
            raise ValueError(f"head_start must not be negative, got {head_start!r}")
        before, plain = pre.centre(), score_increment(pre.centre(), post.centre(), clip)
        increment = plain.scaled(multiplier_for(plain, (before,)))
        floor = log(arl + head_start)
        threshold = floor if method == "floor" else _exact_threshold(increment, before, arl, head_start, floor)
        return cls(increment=increment, threshold=threshold, head_start=head_start)

    @property
    def takes_infinity(self) -> bool:
        """Where the increment clips."""
        return getattr(self.increment, "clip", None) is not None

    def statistic(self, state: ShiryaevState) -> Array:
        """``log R`` (N,); ``-inf`` at the start without a head start."""
        return state.log_sum

    def changed_at(self, state: ShiryaevState) -> Ticks:
        """The most likely start: one after the observation at which the CUSUM of the same increments was last 0."""
        return (state.cusum.clock - state.cusum.rising + 1).astype(np.int64)

    def _fresh(self, streams: int) -> ShiryaevState:
        none = np.zeros(streams, np.int32)
        start = log(self.head_start) if self.head_start else -inf
        return ShiryaevState(np.full(streams, start), DetectorState(np.zeros(streams), none, none))

    def _next(self, state: ShiryaevState, x: Array) -> ShiryaevState:
        z = self.increment(x)
        cusum = state.cusum.statistic + z
        rising = np.where(cusum > 0.0, state.cusum.rising + np.int32(1), np.int32(0))
        best = DetectorState(np.where(cusum > 0.0, cusum, 0.0), rising, state.cusum.clock + np.int32(1))
        return ShiryaevState(np.logaddexp(0.0, state.log_sum) + z, best)


def shiryaev_run_length(increment: Increment, law: Law, threshold: float, *, head_start: float = 0.0, states: int = 400) -> float:
    """Mean number of independent observations from ``law`` until ``log R`` reaches ``threshold``, by a Markov chain on ``log(1 + R)``.

    The run length in control, or the mean delay from a fresh start under a changed law. Raises ``ValueError`` where the increment's
    distribution is not known: another than a quadratic of a Gaussian number.
    """
    if not isinstance(increment, Quadratic):
        raise ValueError(f"the distribution of the increment {increment!r} is not known; use method='floor' or calibrate by simulation")
    null = gaussian(law)
    edges = np.linspace(0.0, float(np.logaddexp(0.0, threshold)), states + 1)
    middles = 0.5 * (edges[1:] + edges[:-1])
    heights = np.log(np.expm1(edges[1:]))  # log R at the upper edges; -inf at the lowest
    chain = _transitions(increment, null, heights, middles)
    start = _transitions(increment, null, heights, np.array([log1p(head_start)]))[0]
    return float(1.0 + start @ np.linalg.solve(np.eye(states) - chain, np.ones(states)))


def _transitions(increment: Quadratic, law: Gaussian, heights: Array, places: Array) -> Array:
    """Probability of moving from ``log(1 + R)`` at each of ``places`` into each cell of the next ``log R``, which end at ``heights``."""
    z = heights[None, :] - places[:, None]
    below = increment.cumulative(law, z)
    for value, mass in zip(*increment.atoms(law), strict=True):
        below = below + mass * (value <= z)
    return np.diff(below, axis=1, prepend=0.0)


def _exact_threshold(increment: Increment, law: Law, arl: float, head_start: float, floor: float) -> float:
    from scipy.optimize import brentq

    def excess(threshold: float) -> float:
        return log(shiryaev_run_length(increment, law, threshold, head_start=head_start) / arl)

    low = max(1e-3, log(head_start) + 1e-3 if head_start else 1e-3)
    return low if excess(low) >= 0 else float(brentq(excess, low, floor + 1e-3, xtol=1e-6)) + 2e-6
