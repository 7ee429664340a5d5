"""One statistic for many streams: has *something* in this fleet, or in this device class, changed?

A shift shared by many streams, too weak to be seen in one, is seen in their sum; a strong shift of a few in their maximum. Exports the
statistics ``SumOfStatistics``, ``MaxOfStatistics``, ``TopR``, ``SoftThresholdSum`` (Mei 2010; Liu, Zhang, Mei 2019) and
``MixtureOfStatistics`` (Xie, Siegmund 2013), ``FleetDetector``, which applies one to each group of streams, and ``calibrate_fleet``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, log, log1p
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.calibration import RunLengths, block_bootstrap
from detection.detector import Detector, Mask, checked_mask
from detection.laws import Array, Law

S = TypeVar("S")
_BLOCK = 65_536  # streams simulated at once
_RESAMPLED = 2**23  # observations resampled at once


class FleetStatistic(Protocol):
    """A function of the local statistics that does not depend on their order."""

    def __call__(self, z: Array) -> Array:
        """Statistics (...,) of fleets with local statistics ``z`` (..., N)."""
        ...


@dataclass(frozen=True, kw_only=True)
class SumOfStatistics:
    """``sum_i Z_i``: for a change that all streams share."""

    def __call__(self, z: Array) -> Array:
        """(..., N) -> (...,)."""
        return np.asarray(z.sum(axis=-1))


@dataclass(frozen=True, kw_only=True)
class MaxOfStatistics:
    """``max_i Z_i``: for a change of one stream, and the same as a threshold for each stream."""

    def __call__(self, z: Array) -> Array:
        """(..., N) -> (...,)."""
        return np.asarray(z.max(axis=-1))


@dataclass(frozen=True, kw_only=True)
class TopR:
    """Sum of the ``r`` highest ``Z_i`` (of all, in a smaller fleet): for a change of about ``r`` streams."""

    r: int

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1 stream, got {self.r!r}")

    def __call__(self, z: Array) -> Array:
        """(..., N) -> (...,)."""
        left_out = z.shape[-1] - self.r
        return np.asarray((z if left_out <= 0 else np.partition(z, left_out, axis=-1)[..., left_out:]).sum(axis=-1))


@dataclass(frozen=True, kw_only=True)
class SoftThresholdSum:
    """``sum_i max(Z_i - c, 0)``: for a change of an unknown number of streams; ``c`` keeps the noise of the others out."""

    c: float

    def __post_init__(self) -> None:
        if not self.c >= 0:
            raise ValueError(f"c must be at least 0, got {self.c!r}")

    def __call__(self, z: Array) -> Array:
        """(..., N) -> (...,)."""
        return np.asarray(np.maximum(z - self.c, 0.0).sum(axis=-1))


@dataclass(frozen=True, kw_only=True)
class MixtureOfStatistics:
    """``sum_i log(1 - p0 + p0 exp(Z_i))``: for a change of about the share ``p0`` of the streams, without a sharp cut."""

    p0: float

    def __post_init__(self) -> None:
        if not 0 < self.p0 <= 1:
            raise ValueError(f"p0 must lie in (0, 1], got {self.p0!r}")

    def __call__(self, z: Array) -> Array:
        """(..., N) -> (...,)."""
        if self.p0 == 1:
            return np.asarray(z.sum(axis=-1))
        return np.asarray(np.logaddexp(log1p(-self.p0), log(self.p0) + z).sum(axis=-1))


@dataclass(frozen=True, kw_only=True, eq=False)
class FleetDetector(Generic[S]):
    """``statistic`` of the ``local`` statistics of each group of streams; a group alarms while it is at its threshold or above.

    ``groups`` (N,) holds the group of each stream, a device class, as ``0 .. G - 1``; ``thresholds`` (G,). The state is that of ``local``.

    **Absent streams** leave their statistic as it was: it stays a function of what the stream has shown, on a clock of its own, whoever
    else is there. So an absence that does not depend on the observations changes no stream's law in control and loses no evidence; it
    makes false alarms and detections later in ticks alike (``availability`` of :func:`calibrate_fleet`). Evidence of a stream that has
    left for good stays in its group's statistic until :meth:`restart_streams`.
    """

    local: Detector[S]
    statistic: FleetStatistic
    groups: NDArray[np.integer[Any]]
    thresholds: Array

    def __post_init__(self) -> None:
        groups = _checked_groups(self.groups)
        thresholds = np.asarray(self.thresholds, dtype=np.float64)
        if thresholds.shape != (groups.max() + 1,) or not (thresholds > 0).all():
            raise ValueError(f"thresholds must be one positive number for each of {groups.max() + 1} groups, got {self.thresholds!r}")
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "thresholds", thresholds)

    @classmethod
    def fit(
        cls,
        *,
        local: Detector[S],
        statistic: FleetStatistic,
        groups: ArrayLike,
        source: Law | ArrayLike,
        arl: float,
        rng: np.random.Generator,
        availability: ArrayLike = 1.0,
        paths: int = 200,
        horizon: int = 1000,
    ) -> Self:
        """``arl`` ticks between false alarms of *each* group, all streams being like ``source`` in control: see :func:`calibrate_fleet`.

        ``availability`` is one probability, or one for each stream (N,). Groups of one size and availability share a simulation.
        """
        groups = _checked_groups(groups)
        present = np.broadcast_to(np.asarray(availability, dtype=np.float64), groups.shape)
        found: dict[bytes, float] = {}
        thresholds = []
        for group in range(groups.max() + 1):
            own = np.sort(present[groups == group])
            if own.tobytes() not in found:
                found[own.tobytes()] = calibrate_fleet(
                    local, statistic, len(own), source, arl=arl, rng=rng, availability=own, paths=paths, horizon=horizon
                )
            thresholds.append(found[own.tobytes()])
        return cls(local=local, statistic=statistic, groups=groups, thresholds=np.array(thresholds))

    @cached_property
    def members(self) -> tuple[NDArray[np.intp], ...]:
        """Streams of each group, in order."""
        order = np.argsort(self.groups, kind="stable")
        return tuple(np.split(order, np.cumsum(np.bincount(self.groups))[:-1]))

    def init(self) -> S:
        """State of a fleet that has seen nothing."""
        return self.local.init(len(self.groups))

    def step(self, state: S, x: ArrayLike, active: Mask | None = None) -> S:
        """State after one observation (N,) or (N, d) of each ``active`` stream, see :meth:`Detector.step`."""
        return self.local.step(state, x, active)

    def statistics(self, state: S) -> Array:
        """The statistic of each group (G,)."""
        z = self.local.statistic(state)
        return np.array([float(self.statistic(z[rows])) for rows in self.members])

    def alarms(self, state: S) -> Mask:
        """Groups (G,) at or above their threshold."""
        return self.statistics(state) >= self.thresholds

    def restart(self, state: S, mask: Mask) -> S:
        """All streams of the groups of ``mask`` (G,) as new."""
        return self.restart_streams(state, checked_mask(mask, len(self.thresholds), "mask")[self.groups])

    def restart_streams(self, state: S, mask: Mask) -> S:
        """The streams of ``mask`` (N,) as new."""
        return self.local.restart(state, mask)


def calibrate_fleet(
    local: Detector[Any],
    statistic: FleetStatistic,
    streams: int,
    source: Law | ArrayLike,
    *,
    arl: float,
    rng: np.random.Generator,
    availability: ArrayLike = 1.0,
    paths: int = 200,
    horizon: int = 1000,
    certified: bool = True,
) -> float:
    """Threshold at which a fleet of ``streams`` independent streams has a false alarm once in ``arl`` ticks, by simulation.

    ``source`` is the law in control, or in-control streams (S, L) or (S, L, d) of which each path of each stream is a stationary bootstrap
    (see :func:`detection.block_bootstrap`): what streams have in common is lost, so take it out first (:func:`detection.common_movement`).
    Each stream is present at a tick with probability ``availability``, one number or one a stream (N,). ``paths`` fleets are watched for
    ``horizon`` ticks, from fresh states, for all thresholds at once; ``certified`` uses the lower 95 % end of the estimate. Raises
    ``ValueError`` where the paths are too short for ``arl``, and for no streams.
    """
    if streams < 1:
        raise ValueError(f"streams must be at least 1, got {streams!r}")
    present = np.asarray(availability, dtype=np.float64)
    if present.shape not in {(), (streams,)} or not ((present > 0) & (present <= 1)).all():
        raise ValueError(f"availability must lie in (0, 1], one number or {streams}, got {availability!r}")
    if not arl >= 2:
        raise ValueError(f"arl must be at least 2 ticks, got {arl!r}")
    at_once = max(1, _BLOCK // streams if isinstance(source, Law) else _RESAMPLED // (streams * horizon))
    fleets = [min(at_once, paths - at_once * k) for k in range(ceil(paths / at_once))]
    maxima = [_running_maxima(local, statistic, (num, streams), source, rng, present, horizon) for num in fleets]
    return RunLengths(np.concatenate(maxima)).threshold(arl, certified=certified)


def _checked_groups(groups: ArrayLike) -> NDArray[np.integer[Any]]:
    found = np.asarray(groups)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or not len(found):
        raise ValueError(f"groups must be integers of shape (N,), N >= 1, got {found.dtype} of shape {found.shape}")
    if found.min() < 0 or not np.bincount(found).all():
        raise ValueError(f"groups must number 0 .. {found.max()} without a gap, got {np.unique(found).tolist()}")
    return found


def _running_maxima(
    local: Detector[S],
    statistic: FleetStatistic,
    shape: tuple[int, int],
    source: Law | ArrayLike,
    rng: np.random.Generator,
    availability: Array,
    horizon: int,
) -> Array:
    """Highest statistic so far (fleets, horizon) of ``shape`` = (fleets, streams)."""
    num = shape[0] * shape[1]
    state, present = local.init(num), np.broadcast_to(availability, shape).ravel()
    maxima = np.empty((shape[0], horizon))
    for tick, x in enumerate(_observations(source, num, horizon, rng)):
        state = local.step(state, x, rng.random(num) < present if (present < 1).any() else None)
        maxima[:, tick] = statistic(local.statistic(state).reshape(shape))
    return np.asarray(np.maximum.accumulate(maxima, axis=1))


def _observations(source: Law | ArrayLike, num: int, horizon: int, rng: np.random.Generator) -> Iterator[Array]:
    """``num`` in-control observations at each tick."""
    if isinstance(source, Law):
        return (source.sample(rng, num) for _ in range(horizon))
    return iter(np.moveaxis(block_bootstrap(np.asarray(source, dtype=np.float64), num, horizon, rng), 1, 0))
