"""FOCuS: the Gaussian likelihood ratio over every start of a change and every size, exactly, at logarithmic cost.

For a fixed size the best start is a vertex of the convex hull of the points ``(k, S_k)``, ``S_k`` the sum of the first ``k``
observations. So only hull vertices are kept, about ``log(t)`` of them (``log(t) / 2`` where the mean before the change is known), and each
observation adds one and removes those it covers. Romano, Eckley, Fearnhead and Rigaill (2023), arXiv:2110.08205.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.detector import Detector, Mask, Ticks, checked_mask
from detection.glr import check_side, one_number
from detection.laws import Array
from detection.states import merged

# N streams, H hulls (one for each side watched), K slots for hull vertices; streams run fastest in memory
_SLOTS = 8


@dataclass(frozen=True, eq=False)
class HullState:
    """``N`` streams: ``total`` of all observations, ``clock`` their number, the ``statistic`` and its best start ``since`` (all (N,)).

    Vertex ``j < sizes[i, h]`` of a hull is the tick ``ticks[i, h, j]`` with the sum ``sums[i, h, j]`` of the observations up to it, negated
    on the side of a fall; a slot not in use has the sum ``inf``.
    """

    total: Array
    clock: Array
    statistic: Array
    since: Array
    ticks: Array
    sums: Array
    sizes: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FOCuS(Detector[HullState]):
    """``max_k (S_t - S_k)^2 / (2 (t - k))`` over all ``k < t`` on the watched ``side`` (``"up"``, ``"down"`` or ``"both"``), unit variance.

    ``mean`` is the mean before the change; ``None`` means unknown, and the ratio then compares two means with one: ``max_k k (t - k) / (2 t)
    (after - before)^2``. State grows with the longest hull among the streams: 16 bytes a slot and side.

    >>> focus = FOCuS(threshold=4.0)
    >>> state = focus.init(1)
    >>> for x in (0.0, -1.0, 2.0, 2.0):
    ...     state = focus.step(state, [x])
    >>> focus.statistic(state), focus.changed_at(state)
    (array([4.]), array([3]))
    """

    mean: float | None = 0.0
    side: str = "up"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_side(self.side)
        if self.mean is not None and not np.isfinite(self.mean):
            raise ValueError(f"mean must be a finite number or None for unknown, got {self.mean!r}")

    @property
    def signs(self) -> tuple[float, ...]:
        """+1 for the hull of rises, -1 for that of falls."""
        return {"up": (1.0,), "down": (-1.0,), "both": (1.0, -1.0)}[self.side]

    def statistic(self, state: HullState) -> Array:
        """The generalised log-likelihood ratio (N,)."""
        return state.statistic

    def changed_at(self, state: HullState) -> Ticks:
        """One after the start that attains the maximum; one after the last observation where nothing speaks for a change."""
        return state.since.astype(np.int64) + 1

    def step(self, state: HullState, x: ArrayLike, active: Mask | None = None) -> HullState:
        """As :meth:`Detector.step`; slots double when a hull fills them."""
        slots = state.sums.shape[-1]
        return super().step(_widened(state, 2 * slots) if (state.sizes == slots).any() else state, x, active)

    def restart(self, state: HullState, mask: Mask) -> HullState:
        """The streams of ``mask`` (N,) as new; the others keep their bits."""
        fresh = _widened(self._fresh(len(state.total)), state.sums.shape[-1])
        return merged(checked_mask(mask, len(state.total), "mask"), fresh, state)

    def _fresh(self, streams: int) -> HullState:
        shape = (len(self.signs), _SLOTS, streams)
        ticks, sums = np.full(shape, -1.0), np.full(shape, np.inf)
        ticks[:, 0], sums[:, 0] = 0.0, 0.0  # the change may start with the first observation
        zeros = np.zeros(streams)
        sizes = np.ones((streams, len(self.signs)), np.int64)
        return HullState(zeros, zeros, zeros, zeros, np.moveaxis(ticks, -1, 0), np.moveaxis(sums, -1, 0), sizes)

    def _next(self, state: HullState, x: Array) -> HullState:
        clock = state.clock + 1.0
        total = state.total + (one_number(x) - (self.mean or 0.0))
        ticks, sums, sizes = state.ticks.copy(order="K"), state.sums.copy(order="K"), state.sizes.copy()
        statistic, since = np.zeros_like(total), clock.copy()
        for hull, sign in enumerate(self.signs):
            vertices = _Hull(ticks[:, hull].T, sums[:, hull].T, sizes[:, hull], rising=self.mean is not None)
            vertices.maximise(sign * total, clock, statistic, since)
            vertices.add(clock, sign * total)
        return HullState(total, clock, statistic, since, ticks, sums, sizes)


@dataclass(frozen=True, eq=False)
class _Hull:
    """Lower hulls of N streams, changed in place: ``ticks`` and ``sums`` (K, N), ``sizes`` (N,). ``rising`` keeps edges that rise only:
    the mean before the change is 0, and a rise starts after a lowest sum."""

    ticks: Array
    sums: Array
    sizes: NDArray[np.int64]
    rising: bool

    def maximise(self, total: Array, clock: Array, statistic: Array, since: Array) -> None:
        """Raises ``statistic`` (N,) to the best likelihood ratio of a change after a vertex, and notes that vertex in ``since`` (N,)."""
        ratio = self._known if self.rising else self._unknown
        for slot in range(0 if self.rising else 1, int(self.sizes.max())):
            used = self.sizes > slot
            if 4 * np.count_nonzero(used) > len(used):
                value = ratio(self.ticks[slot], self.sums[slot], total, clock)
                better = value > statistic
                np.copyto(since, self.ticks[slot], where=better)
                np.copyto(statistic, value, where=better)
            else:
                rows = np.flatnonzero(used)
                ticks = self.ticks[slot, rows]
                value = ratio(ticks, self.sums[slot, rows], total[rows], clock[rows])
                better = value > statistic[rows]
                statistic[rows[better]], since[rows[better]] = value[better], ticks[better]

    def add(self, clock: Array, total: Array) -> None:
        """The point ``(clock, total)`` becomes the last vertex; vertices on or above the new edge leave."""
        rows, everyone = np.arange(len(total)), np.arange(len(total))
        while rows.size:
            rows = rows[self._covered(rows, clock[rows], total[rows])]
            self.sizes[rows] -= 1
            self.sums[self.sizes[rows], rows] = np.inf
            rows = rows[self.sizes[rows] > 0]
        self.ticks[self.sizes, everyone], self.sums[self.sizes, everyone] = clock, total
        np.add(self.sizes, 1, out=self.sizes)

    def _covered(self, rows: NDArray[np.intp], clock: Array, total: Array) -> Mask:
        """Whether the last vertex of each of ``rows`` is no vertex once ``(clock, total)`` is there."""
        last = self.sizes[rows] - 1
        before = np.maximum(last - 1, 0)
        tick, height = self.ticks[last, rows], self.sums[last, rows]
        width, rise = tick - self.ticks[before, rows], height - self.sums[before, rows]
        above = rise * (clock - tick) >= (total - height) * width
        return np.where(last > 0, above, (total <= height) & self.rising)

    @staticmethod
    def _known(ticks: Array, sums: Array, total: Array, clock: Array) -> Array:
        gap = np.maximum(total - sums, 0.0)
        return np.asarray(gap * gap / (2.0 * (clock - ticks)))

    @staticmethod
    def _unknown(ticks: Array, sums: Array, total: Array, clock: Array) -> Array:
        gap = np.maximum(total * ticks - sums * clock, 0.0)  # (mean after - mean before) k (t - k)
        return np.asarray(gap * gap / (2.0 * clock * ticks * (clock - ticks)))


def _widened(state: HullState, slots: int) -> HullState:
    """``state`` with room for ``slots`` vertices a hull."""
    streams, hulls, used = state.sums.shape
    ticks, sums = np.full((hulls, slots, streams), -1.0), np.full((hulls, slots, streams), np.inf)
    ticks[:, :used], sums[:, :used] = np.moveaxis(state.ticks, 0, -1), np.moveaxis(state.sums, 0, -1)
    return replace(state, ticks=np.moveaxis(ticks, -1, 0), sums=np.moveaxis(sums, -1, 0))
