"""Generalised likelihood ratios over a window: the size of the change is estimated, not designed for (Lai 1995).

Observations are standard normal before the change. Exports ``WindowGLR`` (a change of mean) and ``MeanVarianceGLR`` (of mean and variance).
"""

from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from detection.detector import Detector, Ticks
from detection.laws import Array

SIDES = ("up", "down", "both")
_LEAST_VARIANCE = 1e-12
_LARGEST = 1e100  # what a square can hold


@dataclass(frozen=True, eq=False)
class WindowState:
    """``N`` streams: column ``m - 1`` of ``sums`` (N, W) is the sum of the last ``m`` observations (of all, where there are fewer);
    ``statistic`` (N,), the number ``length`` (N,) of last observations that attains it, 0 for none, and ``clock`` (N,)."""

    sums: Array
    statistic: Array
    length: NDArray[np.int64]
    clock: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class WindowGLR(Detector[WindowState]):
    """``max_{m <= window} max_mu (mu S_m - m mu^2 / 2)``, ``S_m`` the sum of the last ``m`` observations, ``mu`` any shift of a size in ``sizes``.

    With all sizes it is ``max_m S_m^2 / (2 m)``; with one size and ``side="up"`` it is the CUSUM for that shift, as long as its excursions
    fit the window. ``side`` is ``"up"``, ``"down"`` or ``"both"``. Costs ``window`` operations a stream and tick;
    :class:`detection.FOCuS` has no window and costs about the logarithm of the stream's length.

    >>> glr = WindowGLR(threshold=4.0, window=50)
    >>> state = glr.init(1)
    >>> for x in (0.0, -1.0, 2.0, 2.0):
    ...     state = glr.step(state, [x])
    >>> glr.statistic(state), glr.changed_at(state)
    (array([4.]), array([3]))
    """

    window: int = 100
    side: str = "up"
    sizes: tuple[float, float] = (0.0, inf)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_side(self.side)
        if self.window < 1:
            raise ValueError(f"window must be at least 1 observation, got {self.window!r}")
        low, high = self.sizes
        if not (0 <= low <= high and high > 0 and low < inf):
            raise ValueError(f"sizes must be an interval (low, high) of shifts with 0 <= low <= high and high > 0, got {self.sizes!r}")

    def statistic(self, state: WindowState) -> Array:
        """The generalised log-likelihood ratio (N,)."""
        return state.statistic

    def changed_at(self, state: WindowState) -> Ticks:
        """First observation of the stretch that attains the maximum."""
        return state.clock - state.length + 1

    def _fresh(self, streams: int) -> WindowState:
        none = np.zeros(streams, np.int64)
        return WindowState(np.zeros((streams, self.window)), np.zeros(streams), none, none)

    def _next(self, state: WindowState, x: Array) -> WindowState:
        sums, clock = _shifted(state.sums, one_number(x)), state.clock + 1
        statistic, length = _highest(self._ratio(sums), clock)
        return WindowState(sums, statistic, length, clock)

    def _ratio(self, sums: Array) -> Array:
        towards = np.abs(sums) if self.side == "both" else sums if self.side == "up" else -sums
        low, high = self.sizes
        lengths = np.arange(1.0, self.window + 1.0)
        if low == 0 and high == inf:
            towards = np.maximum(towards, 0.0)
            return towards * towards / (2.0 * lengths)
        shift = np.clip(towards / lengths, low, high)
        # a sum of all observations, filed under more than there are, is no evidence that fewer do not give better
        return np.asarray(shift * towards - 0.5 * lengths * shift * shift)


@dataclass(frozen=True, eq=False)
class MomentsState:
    """A :class:`WindowState` of the observations, ``first``, and the sums ``squares`` (N, W) of their squares."""

    first: WindowState
    squares: Array


@dataclass(frozen=True, kw_only=True)
class MeanVarianceGLR(Detector[MomentsState]):
    """``max_{shortest <= m <= window} (Q_m - m - m log v_m) / 2``, with ``Q_m`` the sum of squares and ``v_m`` the variance of the last ``m``.

    Sees a mean or a variance that moves either way. ``shortest`` guards against the tiny variance that few values can have by chance; a
    variance below 1e-12 counts as 1e-12, so that a constant stretch gives a large finite statistic, and an observation beyond 1e100 as
    1e100. Hawkins and Zamba (2005).
    """

    window: int = 100
    shortest: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.shortest <= self.window:
            raise ValueError(f"shortest must lie between 2 and window = {self.window!r}, got {self.shortest!r}")

    def statistic(self, state: MomentsState) -> Array:
        """The generalised log-likelihood ratio (N,)."""
        return state.first.statistic

    def changed_at(self, state: MomentsState) -> Ticks:
        """First observation of the stretch that attains the maximum."""
        return state.first.clock - state.first.length + 1

    def _fresh(self, streams: int) -> MomentsState:
        none = np.zeros(streams, np.int64)
        first = WindowState(np.zeros((streams, self.window)), np.zeros(streams), none, none)
        return MomentsState(first, np.zeros((streams, self.window)))

    def _next(self, state: MomentsState, x: Array) -> MomentsState:
        x = np.clip(one_number(x), -_LARGEST, _LARGEST)
        sums, squares = _shifted(state.first.sums, x), _shifted(state.squares, x * x)
        clock = state.first.clock + 1
        lengths = np.arange(1, self.window + 1)
        variance = np.maximum(squares / lengths - (sums / lengths) ** 2, _LEAST_VARIANCE)
        ratio = 0.5 * (squares - lengths * (1.0 + np.log(variance)))
        ratio[(lengths < self.shortest) | (lengths > clock[:, None])] = 0.0
        statistic, length = _highest(ratio, clock)
        return MomentsState(WindowState(sums, statistic, length, clock), squares)


def check_side(side: str) -> None:
    """Raises ``ValueError`` unless ``side`` is one of ``SIDES``."""
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")


def one_number(x: Array) -> Array:
    """``x`` itself where it is (N,), else ``ValueError``: for detectors of numbers."""
    if x.ndim != 1:
        raise ValueError(f"x must hold one number for each stream, got vectors: shape {x.shape}")
    return x


def _shifted(sums: Array, x: Array) -> Array:
    """Sums of the last ``1 .. W`` observations, ``x`` the newest; the oldest is added first, so a row's sum is that of a plain loop."""
    after = np.empty_like(sums)
    after[:, 0] = x
    np.add(sums[:, :-1], x[:, None], out=after[:, 1:])
    return after


def _highest(ratio: Array, clock: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64]]:
    """Highest value of each row, at least 0, and how many observations attain it (0 where none is above 0)."""
    best = ratio.argmax(axis=1)
    statistic = np.maximum(np.take_along_axis(ratio, best[:, None], axis=1)[:, 0], 0.0)
    return statistic, np.where(statistic > 0.0, np.minimum(best + 1, clock), 0)
