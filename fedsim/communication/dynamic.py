"""Two upload intervals in one round: a chosen group uploads every ``high`` steps, the others every ``low``.

:class:`DynamicFL` chooses the group by its labels (Le, Diao, Wang, Tarokh, Ding, Anwar, 2024, arXiv:2409.04986); :class:`RandomGroup` and
:class:`FastestGroup` are the controls a claim about that choice needs.
"""

from dataclasses import dataclass, field
from math import ceil, floor, isfinite
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.communication.groups import Candidates, Distance, DynaComm, Exact, Search, choose_group
from fedsim.communication.schedules import Cohort, Schedule, sync_points
from fedsim.randomness import rng_for

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Bytes:
    """A server budget for the group's uploads and downloads in a round."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a budget must be >= 1 byte, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class TwoLevel:
    """A group uploads every ``high`` steps, the others every ``low`` (``None``: once) or, with ``skip``, not at all.

    Clients outside the group keep their own model until their own point. In the round's last merge their weight is
    multiplied by ``discount``: 1 is the paper's, 0 ignores them. A group of one is a round without a group.
    """

    high: int = 1
    low: int | None = None
    skip: bool = False
    discount: float = 1.0

    needs_labels: ClassVar[bool] = False
    uniform: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.high < 1:
            raise ValueError(f"high must be >= 1, got {self.high}")
        if self.low is not None and self.low < self.high:
            raise ValueError(f"low must be None or >= high = {self.high}, got {self.low}")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount must be in [0, 1], got {self.discount}")

    def validate(self, cohort: int, steps: int, transfer: int) -> None:
        if self.high > steps:
            raise ValueError(f"high must be <= local_steps = {steps}, got {self.high}")

    def largest(self, cohort: int) -> int:
        """The most clients a group of this cohort may hold."""
        raise NotImplementedError

    def choose(self, cohort: Cohort, round: int, seed: int) -> tuple[Positions, float]:
        """Positions of the group, ascending, and its distance to the fleet's label law (``nan``: not measured)."""
        raise NotImplementedError

    def most_uploads(self, cohort: int, steps: int) -> int:
        """Uploads of a round whose group is as large as it may be."""
        group = self.largest(cohort)
        rest = 0 if self.skip else (cohort - group) * len(self._low_points(steps))
        return group * len(sync_points(self.high, steps)) + rest

    def assign(self, cohort: Cohort, round: int, seed: int) -> Schedule:
        group, distance = self.choose(cohort, round, seed)
        low = self._low_points(cohort.steps)
        notes = (
            [f"low = {self.low} is clipped to the round's {cohort.steps} steps"]
            if self.low is not None and self.low > cohort.steps and round == 0
            else []
        )
        if len(group) < 2:
            notes.append("no group of two or more within the budget: every client uploads at the low interval")
            return Schedule(points=(low,) * len(cohort), note="; ".join(notes))
        inside = np.isin(np.arange(len(cohort)), group)
        high = sync_points(self.high, cohort.steps)
        points = tuple(high if often else () if self.skip else low for often in inside)
        return Schedule(
            points=points, group=group, distance=distance, share_at_end=np.where(inside, 1.0, self.discount), note="; ".join(notes)
        )

    def _low_points(self, steps: int) -> tuple[int, ...]:
        return sync_points(min(self.low or steps, steps), steps)


@dataclass(frozen=True, kw_only=True)
class DynamicFL(TwoLevel):
    """The group whose pooled label histogram is nearest to the fleet's, within the server's and the clients' budgets.

    ``budget``: the group's largest share of the cohort, or :class:`Bytes` a round for its transfers. ``clients``: who can afford ``high``: "all"; a share of
    the fleet drawn once (the paper's Fix-x); or "by-link", those it takes no longer than the cohort's slowest client takes at ``low``.
    """

    budget: float | Bytes = 0.3
    clients: Literal["all", "by-link"] | float = "all"
    search: Search = field(default_factory=DynaComm)
    tolerance: float = 0.1
    distance: Distance = "kl"

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.budget, Bytes) and not 0 < self.budget <= 1:
            raise ValueError(f"budget must be a share of the cohort in (0, 1], or Bytes(count), got {self.budget}")
        if self.clients not in ("all", "by-link") and not (isinstance(self.clients, float | int) and 0 < self.clients <= 1):
            raise ValueError(f"clients must be 'all', 'by-link' or a share of the fleet in (0, 1], got {self.clients!r}")
        if not (self.tolerance >= 0 and isfinite(self.tolerance)):
            raise ValueError(f"tolerance must be >= 0 nats, got {self.tolerance}")
        if self.distance not in ("kl", "squared"):
            raise ValueError(f"distance must be 'kl' or 'squared', got {self.distance!r}")

    def validate(self, cohort: int, steps: int, transfer: int) -> None:
        super().validate(cohort, steps, transfer)
        if isinstance(self.search, Exact):
            self.search.check(cohort, self._largest(cohort, steps, transfer))
        if self._largest(cohort, steps, transfer) < 2:
            raise ValueError(
                f"budget = {self.budget} leaves a cohort of {cohort} a group of fewer than two, which merges nothing; raise budget or cohort"
            )

    def largest(self, cohort: int) -> int:
        if isinstance(self.budget, Bytes):
            raise ValueError("how many uploads a budget in bytes pays for depends on the model; give budget as a share of the cohort")
        return floor(self.budget * cohort + 1e-9)

    def choose(self, cohort: Cohort, round: int, seed: int) -> tuple[Positions, float]:
        if cohort.counts is None or cohort.totals is None:
            raise ValueError(
                'DynamicFL reads label counts, and this task\'s data has no key "label"; use RandomGroup, FastestGroup or Uniform'
            )
        transfer = cohort.upload + cohort.download
        candidates = Candidates(
            counts=cohort.counts,
            law=cohort.totals / cohort.totals.sum(),
            capable=self._capable(cohort, seed),
            costs=np.full(len(cohort), float(self._cost(cohort.steps, transfer))),
            budget=float(self.budget.count) if isinstance(self.budget, Bytes) else float("inf"),
            largest=self._largest(len(cohort), cohort.steps, transfer),
            distance=self.distance,
        )
        return choose_group(candidates, self.search, self.tolerance, rng_for(seed, "group", round))

    def _largest(self, cohort: int, steps: int, transfer: int) -> int:
        if isinstance(self.budget, Bytes):
            return min(cohort, self.budget.count // self._cost(steps, transfer))
        return self.largest(cohort)

    def _cost(self, steps: int, transfer: int) -> int:
        """Bytes of one member's transfers in a round."""
        return len(sync_points(self.high, steps)) * transfer

    def _capable(self, cohort: Cohort, seed: int) -> NDArray[np.bool_]:
        if self.clients == "all":
            return np.ones(len(cohort), bool)
        if self.clients == "by-link":
            return np.asarray(_seconds(cohort, self.high) <= _seconds(cohort, self.low or cohort.steps).max())
        able = rng_for(seed, "capable").permutation(cohort.fleet_size)[: ceil(float(self.clients) * cohort.fleet_size - 1e-9)]
        return np.isin(cohort.clients, able)


@dataclass(frozen=True, kw_only=True)
class RandomGroup(TwoLevel):
    """A group of ``size`` clients drawn from the cohort: what any group of that size does."""

    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 2:
            raise ValueError(f"size must be >= 2, got {self.size}")

    def largest(self, cohort: int) -> int:
        return min(self.size, cohort)

    def choose(self, cohort: Cohort, round: int, seed: int) -> tuple[Positions, float]:
        drawn = rng_for(seed, "group", round).permutation(len(cohort))[: self.size]
        return np.sort(drawn), float("nan")


@dataclass(frozen=True, kw_only=True)
class FastestGroup(RandomGroup):
    """The ``size`` clients that finish a round at ``high`` first, whatever they hold."""

    def choose(self, cohort: Cohort, round: int, seed: int) -> tuple[Positions, float]:
        order = np.argsort(_seconds(cohort, self.high), kind="stable")
        return np.sort(order[: self.size]), float("nan")


def _seconds(cohort: Cohort, interval: int) -> NDArray[np.float64]:
    """Seconds (n,) each client needs alone for a round at this interval."""
    uploads = len(sync_points(min(interval, cohort.steps), cohort.steps))
    return cohort.steps * cohort.step_seconds + uploads * (cohort.up_seconds + cohort.down_seconds)
