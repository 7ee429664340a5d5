"""Which streams have changed so far, decided at every tick, with a bound on the false share of the whole history of discoveries."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from detection.detector import Detector, Mask, Ticks, checked_mask
from detection.e_processes import e_bh


@dataclass(frozen=True, eq=False)
class Discoveries:
    """``N`` streams: the state of their e-processes, the fleet's tick at which each was ``found`` (N,), 0 for not yet, and its ``tick`` (N,)."""

    process: Any
    found: Ticks
    tick: Ticks


@dataclass(frozen=True, kw_only=True)
class StoppedEBH:
    """e-BH at every tick; the evidence of a discovered stream is frozen, so the set of discoveries only grows.

    ``E sup_t (false / all discoveries up to t) <= alpha``: false is a stream found before it changed, and the supremum is over all ticks,
    so one may look whenever one likes. For a frozen stream ``1 / |R_t|`` is greatest when it is found, where it is at most ``alpha E / N``; and
    ``E`` stopped there has mean at most 1. This needs ``E exp(z_t) <= 1`` given the whole fleet's past for an :class:`EProcess`, and the stream's own
    past for an :class:`AdjustedEProcess`. ``process`` is either.
    """

    process: Detector[Any]
    alpha: float

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie in (0, 1), got {self.alpha!r}")

    def init(self, streams: int) -> Discoveries:
        """Nothing seen, nothing found."""
        none = np.zeros(streams, np.int64)
        return Discoveries(self.process.init(streams), none, none)

    def step(self, state: Discoveries, x: ArrayLike, active: Mask | None = None) -> Discoveries:
        """One tick of the fleet: observations ``x`` (N,) or (N, d) of the ``active`` streams (all by default). What is found is not read."""
        watched = state.found == 0
        present = watched if active is None else watched & checked_mask(active, len(watched), "active")
        process = self.process.step(state.process, x, present)
        tick = state.tick + 1
        return Discoveries(
            process, np.where(watched & e_bh(log_e=self.process.statistic(process), alpha=self.alpha), tick, state.found), tick
        )

    def discoveries(self, state: Discoveries) -> Mask:
        """Streams found so far (N,)."""
        return state.found > 0

    def changed_at(self, state: Discoveries) -> Ticks:
        """Estimated first changed observation of each stream (N,), from the evidence up to its discovery."""
        return self.process.changed_at(state.process)

    def restart(self, state: Discoveries, mask: Mask) -> Discoveries:
        """The streams of ``mask`` (N,) as new, not found.

        The promise is about a fleet restarted as a whole. Restarting only what was found takes true discoveries out of the count while false
        ones stay, and the false share of what is left may exceed ``alpha``: keep the record of such epochs yourself.
        """
        mask = checked_mask(mask, len(state.found), "mask")
        return Discoveries(self.process.restart(state.process, mask), np.where(mask, 0, state.found), state.tick)
