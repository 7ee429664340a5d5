"""When clients can take part: by chance, by the hour of their day, or by a trace; and the draw of a cohort among those who can.

Exports :class:`Independent`, :class:`Always`, :class:`Diurnal`, :class:`Trace` and :func:`draw_cohort`. Each is asked about some clients at a
simulated time, so a draw costs what the cohort costs, however large the fleet.
"""

# C clients of the fleet, n clients asked, R rows of a trace

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.fleet import Fleet, read_columns
from fedsim.randomness import rng_for, uniforms

Bools = NDArray[np.bool_]
Clients = NDArray[np.int64]
_HOUR, _DAY = 3600.0, 86400.0
TRIES = 1000
_FIRST_LOOK = 4096  # candidates asked at first: a small fleet is asked whole


class Availability(Protocol):
    """Who can take part at a simulated time; a frozen dataclass."""

    def present(self, fleet: Fleet, clients: Clients, clock: float, round: int, seed: int, attempt: int) -> Bools:
        """Whether each of ``clients`` (n,) can take part at ``clock`` seconds, a function of its arguments alone."""
        ...

    def next_look(self, fleet: Fleet, clock: float) -> float:
        """The time (> ``clock``) at which a server that found nobody asks again. ``ValueError`` if nobody ever comes."""
        ...


@dataclass(frozen=True)
class Always:
    """Everybody, at any time."""

    def present(self, fleet: Fleet, clients: Clients, clock: float, round: int, seed: int, attempt: int) -> Bools:
        return np.ones(len(clients), bool)

    def next_look(self, fleet: Fleet, clock: float) -> float:
        raise AssertionError("somebody is always there")


@dataclass(frozen=True, kw_only=True)
class Independent:
    """Every round anew, with the probability of the fleet's column ``availability``; a server that finds nobody asks again after ``retry_seconds``."""

    retry_seconds: float = 60.0

    def __post_init__(self) -> None:
        _check_retry(self.retry_seconds)

    def present(self, fleet: Fleet, clients: Clients, clock: float, round: int, seed: int, attempt: int) -> Bools:
        return _by_chance(fleet.availability[clients], clients, round, seed, attempt)

    def next_look(self, fleet: Fleet, clock: float) -> float:
        return clock + self.retry_seconds


@dataclass(frozen=True, kw_only=True)
class Diurnal:
    """Devices that take part around ``peak_hour`` of their own day, when they charge on a free network.

    The probability is the fleet's column ``availability`` at the peak and falls along a bell of standard deviation ``width_hours`` to ``floor`` of it.
    A client's local hour is the simulated clock's, which starts at midnight, plus 24 hours times its ``region_u`` (a longitude), or plus a
    draw of its own where its place is unknown.
    """

    peak_hour: float = 2.0
    width_hours: float = 3.0
    floor: float = 0.05
    retry_seconds: float = 600.0

    def __post_init__(self) -> None:
        if not 0 <= self.peak_hour < 24:
            raise ValueError(f"peak_hour must lie in [0, 24), got {self.peak_hour}")
        if not 0 < self.width_hours < float("inf"):
            raise ValueError(f"width_hours must be positive and finite, got {self.width_hours}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor}")
        _check_retry(self.retry_seconds)

    def chance(self, fleet: Fleet, clients: Clients, clock: float, seed: int) -> NDArray[np.float64]:
        """The probability (n,) of each client at ``clock``."""
        place = fleet.region[clients, 0]
        unknown = uniforms(seed, "time zone", clients, 0, 1)[:, 0]
        hour = clock / _HOUR + 24.0 * np.where(np.isnan(place), unknown, place)
        apart = (hour - self.peak_hour + 12.0) % 24.0 - 12.0
        bell = np.exp(-0.5 * (apart / self.width_hours) ** 2)
        return np.asarray(fleet.availability[clients] * (self.floor + (1.0 - self.floor) * bell))

    def present(self, fleet: Fleet, clients: Clients, clock: float, round: int, seed: int, attempt: int) -> Bools:
        return _by_chance(self.chance(fleet, clients, clock, seed), clients, round, seed, attempt)

    def next_look(self, fleet: Fleet, clock: float) -> float:
        return clock + self.retry_seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Recorded intervals: client ``who[r]`` is there from ``start[r]`` until just before ``end[r]`` seconds, (R,) each; nobody else, at no other time.

    Rows stand by client, then by time, without overlap. With ``by="device"``, ``who`` are device classes, all of whose clients are there together. With
    ``period_seconds`` the trace repeats. Raises ``ValueError`` naming the first bad row.
    """

    who: NDArray[np.int64]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    by: str = "client"
    period_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("who", np.int64), ("start", np.float64), ("end", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name)).astype(kind))
        if self.by not in ("client", "device"):
            raise ValueError(f"by must be 'client' or 'device', got {self.by!r}")
        if not len(self.who) == len(self.start) == len(self.end) or not len(self.who):
            raise ValueError(
                f"a trace needs rows of who, start and end, got {len(self.who)}, {len(self.start)} and {len(self.end)} of them"
            )
        latest = self.period_seconds if self.period_seconds is not None else float("inf")
        if not latest > 0:
            raise ValueError(f"period_seconds must be positive or None, got {self.period_seconds}")
        _check_rows(np.isfinite(self.start) & np.isfinite(self.end), "start and end must be finite", self)
        _check_rows(self.who >= 0, "who must be at least 0", self)
        _check_rows(self.start >= 0, "start must be at least 0 seconds", self)
        _check_rows(self.end > self.start, "end must come after start", self)
        _check_rows(self.end <= latest, f"end must not pass the period of {latest:g} seconds", self)
        same = self.who[1:] == self.who[:-1]
        in_order = np.where(same, self.start[1:] >= self.end[:-1], self.who[1:] > self.who[:-1])
        _check_rows(np.concatenate([[True], in_order]), "rows must stand by client, then by time, without overlap", self)

    @classmethod
    def read(cls, path: str | Path, fleet: Fleet | None = None, period_seconds: float | None = None) -> "Trace":
        """From a Parquet or CSV file with columns ``start, end`` and either ``client`` (numbers) or ``device`` (names of ``fleet``'s device classes)."""
        columns = read_columns(Path(path))
        missing = [name for name in ("start", "end") if name not in columns]
        if missing or not {"client", "device"} & set(columns):
            raise ValueError(f"{path} must have columns start, end and client or device, it has {', '.join(columns)}")
        start, end = np.asarray(columns["start"]), np.asarray(columns["end"])
        if "client" in columns:
            return cls(who=np.asarray(columns["client"]), start=start, end=end, period_seconds=period_seconds)
        if fleet is None:
            raise ValueError(f"{path} names device classes: give the fleet they belong to")
        names = np.asarray(columns["device"]).astype(str).tolist()
        unknown = sorted(set(names) - set(fleet.device_names))
        if unknown:
            raise ValueError(f"{path} names device classes {unknown}, the fleet has {fleet.device_names}")
        index = np.array([fleet.device_names.index(name) for name in names])
        return cls(who=index, start=start, end=end, by="device", period_seconds=period_seconds)

    def present(self, fleet: Fleet, clients: Clients, clock: float, round: int, seed: int, attempt: int) -> Bools:
        who = clients if self.by == "client" else fleet.device[clients].astype(np.int64)
        now = self._within(clock)
        row = np.searchsorted(self._keys, who + 1j * now, side="right") - 1
        inside = (row >= 0) & (self.who[row] == who)
        return np.asarray(inside & (now < self.end[row]))

    def next_look(self, fleet: Fleet, clock: float) -> float:
        now = self._within(clock)
        later = self.start[self.start > now]
        if len(later):
            return max(float(clock + (later.min() - now)), math.nextafter(clock, math.inf))
        if self.period_seconds is None:
            raise ValueError(f"nobody of the trace is there after {clock:g} simulated seconds; lengthen the trace or give period_seconds")
        return max(float(clock + (self.period_seconds - now) + self.start.min()), math.nextafter(clock, math.inf))

    def _within(self, clock: float) -> float:
        return clock if self.period_seconds is None else math.fmod(clock, self.period_seconds)

    @cached_property
    def _keys(self) -> NDArray[np.complex128]:
        """Rows by client, then by time: the order of complex numbers, which is exact where one float for both would round."""
        return np.asarray(self.who + 1j * self.start)


def draw_cohort(
    availability: Availability, fleet: Fleet, holders: Clients, size: int, *, clock: float, round: int, seed: int
) -> tuple[Clients, float]:
    """A cohort of at most ``size`` clients, ascending, and when it was found: uniform without replacement among the ``holders`` present.

    Candidates are asked in random order, more of them while too few are there, at last all. A server that finds nobody asks again when
    :meth:`Availability.next_look` says. Raises ``ValueError`` if nobody comes.
    """
    for attempt in range(TRIES):
        present = _present(availability, fleet, holders, size, clock, round, seed, attempt)
        if len(present):
            if len(present) > size:
                present = np.sort(rng_for(seed, "cohort", round).choice(present, size, replace=False))
            return present.astype(np.int64), clock
        clock = availability.next_look(fleet, clock)
    raise ValueError(f"no client was available in {TRIES} looks of round {round}, up to {clock:g} simulated seconds; raise availability")


def _present(
    availability: Availability, fleet: Fleet, holders: Clients, size: int, clock: float, round: int, seed: int, attempt: int
) -> Clients:
    """Ascending: a uniform draw of those present, at least ``size`` of them unless all were asked."""
    asked = max(_FIRST_LOOK, 4 * size)
    while asked < len(holders):
        order = rng_for(seed, "candidates", round, attempt, asked).choice(len(holders), asked, replace=False)
        candidates = holders[np.sort(order)]
        present = candidates[availability.present(fleet, candidates, clock, round, seed, attempt)]
        if len(present) >= size:
            return present
        asked *= 4
    return holders[availability.present(fleet, holders, clock, round, seed, attempt)]


def _by_chance(chance: NDArray[np.float64], clients: Clients, round: int, seed: int, attempt: int) -> Bools:
    if (chance >= 1).all():
        return np.ones(len(clients), bool)
    return np.asarray(uniforms(seed, "availability", clients, round, 1, part=attempt)[:, 0] < chance)


def _check_retry(seconds: float) -> None:
    if not 0 < seconds < float("inf"):
        raise ValueError(f"retry_seconds must be positive and finite, got {seconds}")


def _check_rows(good: Any, rule: str, trace: Trace) -> None:
    bad = np.flatnonzero(~np.asarray(good))
    if len(bad):
        r = int(bad[0])
        raise ValueError(
            f"row {r} of the trace (who {trace.who[r]}, {trace.start[r]:g} to {trace.end[r]:g} s): {rule} ({len(bad)} bad of {len(good)})"
        )
