"""When clients upload. A round is at most E local steps; a client of interval k uploads after every k of them and after the last.

FedSGD is interval 1 for all, FedAvg interval E for all; :mod:`fedsim.communication.dynamic` gives a group its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedsim.communication.dynamic import TwoLevel

Points = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """What a schedule may know of a round's clients (n,): ids, label counts (n, K) and the fleet's (K,), bytes of one transfer, seconds of a step and of a transfer.

    ``counts`` and ``totals`` are ``None`` unless the schedule reads labels: a histogram shows which labels a person holds.
    """

    clients: NDArray[np.int64]
    steps: int
    fleet_size: int
    upload: int
    download: int
    step_seconds: NDArray[np.float64]
    up_seconds: NDArray[np.float64]
    down_seconds: NDArray[np.float64]
    counts: NDArray[np.float64] | None = None
    totals: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.clients)


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """Sync points of each client of the cohort; an empty tuple sits the round out. ``group``: positions of those that upload often.

    ``share_at_end`` (n,) multiplies a client's weight in the round's last merge.
    """

    points: tuple[Points, ...]
    group: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    distance: float = float("nan")
    share_at_end: NDArray[np.float64] | None = None
    note: str = ""

    @property
    def uploads(self) -> int:
        return sum(map(len, self.points))


class UploadSchedule(Protocol):
    """Assigns sync points to a cohort; a frozen dataclass. ``uniform``: all clients of a round share their points.

    ``validate`` raises ``ValueError`` for what cannot work with this cohort size, E, and bytes of one upload and its hand-back.
    """

    needs_labels: ClassVar[bool]

    @property
    def uniform(self) -> bool: ...
    def validate(self, cohort: int, steps: int, transfer: int) -> None: ...
    def assign(self, cohort: Cohort, round: int, seed: int) -> Schedule: ...


def sync_points(interval: int, steps: int) -> Points:
    """``interval``, twice it, ... below ``steps``, and ``steps``.

    >>> sync_points(4, 10)
    (4, 8, 10)
    """
    return (*range(interval, steps, interval), steps)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every client uploads every ``interval`` steps, or ``uploads`` times at even distances; neither: once, at the round's end (FedAvg)."""

    interval: int | None = None
    uploads: int | None = None

    needs_labels: ClassVar[bool] = False
    uniform: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("interval", "uploads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1 or None, got {value}")
        if self.interval is not None and self.uploads is not None:
            raise ValueError(f"give interval or uploads, not both, got interval={self.interval} and uploads={self.uploads}")

    @classmethod
    def of_equal_bytes(cls, dynamic: TwoLevel, cohort: int, steps: int) -> Uniform:
        """The uniform schedule that spends about what ``dynamic`` may: its uploads a round, divided evenly and rounded."""
        return cls(uploads=min(steps, max(1, round(dynamic.most_uploads(cohort, steps) / cohort))))

    def validate(self, cohort: int, steps: int, transfer: int) -> None:
        if self.uploads is not None and self.uploads > steps:
            raise ValueError(f"uploads must be <= local_steps = {steps}, got {self.uploads}")

    def assign(self, cohort: Cohort, round: int, seed: int) -> Schedule:
        return Schedule(points=(self._points(cohort.steps),) * len(cohort))

    def _points(self, steps: int) -> Points:
        if self.uploads is not None:
            return tuple(round(steps * (j + 1) / self.uploads) for j in range(self.uploads))
        return sync_points(min(self.interval or steps, steps), steps)


def FedSGD() -> Uniform:  # noqa: N802 (an algorithm's name)
    """A merge after every local step: synchronous SGD on the cohort's batches."""
    return Uniform(interval=1)


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Sync points written out: one tuple for all, or one for each position of the cohort (which then must be that large)."""

    points: tuple[Points, ...]

    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for own in self.points:
            if not own or own[0] < 1 or any(a >= b for a, b in pairwise(own)):
                raise ValueError(f"points must be increasing local steps from 1 on, got {own}")
        if len({own[-1] for own in self.points}) != 1:
            raise ValueError(f"all points must end at the round's last step, got ends {[own[-1] for own in self.points]}")

    @classmethod
    def explicit(cls, points: Sequence[int] | Sequence[Sequence[int]]) -> Intervals:
        """From one list of steps for all clients, or a list for each."""
        rows = [[p] if isinstance(p, int) else list(p) for p in points]
        if all(isinstance(p, int) for p in points):
            rows = [[p for row in rows for p in row]]
        return cls(points=tuple(tuple(row) for row in rows))

    @property
    def uniform(self) -> bool:
        return len(set(self.points)) == 1

    def validate(self, cohort: int, steps: int, transfer: int) -> None:
        if self.points[0][-1] != steps:
            raise ValueError(f"points must end at local_steps = {steps}, got {self.points[0][-1]}")
        if len(self.points) not in (1, cohort):
            raise ValueError(f"points are given for {len(self.points)} clients, the cohort has {cohort}")

    def assign(self, cohort: Cohort, round: int, seed: int) -> Schedule:
        if len(self.points) == 1:
            return Schedule(points=self.points * len(cohort))
        return Schedule(points=self.points[: len(cohort)])
