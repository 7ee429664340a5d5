"""Page-Hinkley: a CUSUM of deviations from the running mean, for streams whose mean before the change is not known (Page 1954; Hinkley 1971)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detection.detector import Detector, Ticks
from detection.glr import check_side, one_number
from detection.laws import Array


@dataclass(frozen=True, eq=False)
class PageHinkleyState:
    """``N`` streams: running ``mean``, fading sums ``rise`` and ``fall`` of deviations, the ``lowest`` rise and ``highest`` fall so far with the
    observations ``lowest_at`` and ``highest_at`` they came with, and ``clock``."""

    mean: Array
    rise: Array
    fall: Array
    lowest: Array
    highest: Array
    lowest_at: NDArray[np.int64]
    highest_at: NDArray[np.int64]
    clock: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PageHinkley(Detector[PageHinkleyState]):
    """``U_t = alpha U_{t-1} + x_t - mean_t - delta``; the statistic is ``U_t - min U``, mirrored for falls, 0 for ``min_instances - 1`` ticks.

    ``delta`` is the deviation tolerated, ``alpha`` forgets, ``side`` is ``"up"``, ``"down"`` or ``"both"``. Restarted after each alarm, it
    alarms at the ticks of river's ``PageHinkley(mode=side)`` bit for bit, but for a statistic that equals the threshold exactly, which is
    an alarm here. Its run length in control depends on the scale of the stream: standardise, or calibrate the threshold.
    """

    threshold: float = 50.0
    delta: float = 0.005
    alpha: float = 1 - 0.0001
    min_instances: int = 30
    side: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_side(self.side)
        if not self.delta >= 0:
            raise ValueError(f"delta must not be negative, got {self.delta!r}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {self.alpha!r}")
        if self.min_instances < 1:
            raise ValueError(f"min_instances must be at least 1, got {self.min_instances!r}")

    def statistic(self, state: PageHinkleyState) -> Array:
        """Height above the lowest rise, or depth below the highest fall, whichever is more and watched."""
        ups, downs = _heights(state)
        height = {"up": ups, "down": downs, "both": np.maximum(ups, downs)}[self.side]
        return np.where(state.clock >= self.min_instances, height, 0.0)

    def changed_at(self, state: PageHinkleyState) -> Ticks:
        """One after the observation with the lowest rise (highest fall)."""
        ups, downs = _heights(state)
        rises = (ups >= downs) if self.side == "both" else np.full(len(ups), self.side == "up")
        return np.where(rises, state.lowest_at, state.highest_at) + 1

    def _fresh(self, streams: int) -> PageHinkleyState:
        zeros, none, far = np.zeros(streams), np.zeros(streams, np.int64), np.full(streams, np.inf)
        return PageHinkleyState(zeros, zeros, zeros, far, -far, none, none, none)

    def _next(self, state: PageHinkleyState, x: Array) -> PageHinkleyState:
        clock = state.clock + 1
        mean = state.mean + (1.0 / clock) * (one_number(x) - state.mean)
        rise = self.alpha * state.rise + (x - mean) - self.delta
        fall = self.alpha * state.fall + (x - mean) + self.delta
        return PageHinkleyState(
            mean=mean,
            rise=rise,
            fall=fall,
            lowest=np.minimum(state.lowest, rise),
            highest=np.maximum(state.highest, fall),
            lowest_at=np.where(rise < state.lowest, clock, state.lowest_at),
            highest_at=np.where(fall > state.highest, clock, state.highest_at),
            clock=clock,
        )


def _heights(state: PageHinkleyState) -> tuple[Array, Array]:
    return state.rise - state.lowest, state.highest - state.fall
