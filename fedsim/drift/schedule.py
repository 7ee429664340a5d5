"""When a drift starts and whom it hits; with a change and an onset, a :class:`Drift`.

Exports: Affected, At, Clients, Drift, DriftSchedule, Everyone, Fraction, Geometric, InGroups, InRegion, OnDevices, Spreading,
Staggered, Start, UniformStart.
"""

# C clients of the fleet, n affected clients, T ticks, B examples a tick

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.drift.changes import Change
from fedsim.drift.onset import Abrupt, Onset, at_least
from fedsim.fleet import Fleet
from fedsim.randomness import uniforms

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Start(ABC):
    """When: the change point of each affected client."""

    @abstractmethod
    def ticks(self, fleet: Fleet, clients: Ints, seed: int, part: int) -> Ints:
        """First tick (n,) at which the law of each of ``clients`` (n,) differs."""


@dataclass(frozen=True)
class At(Start):
    """Everyone at tick ``tick``."""

    tick: int

    def __post_init__(self) -> None:
        at_least(self, "tick", 0)

    def ticks(self, fleet: Fleet, clients: Ints, seed: int, part: int) -> Ints:
        return np.full(len(clients), self.tick, np.int64)


@dataclass(frozen=True)
class Geometric(Start):
    """``after`` + k with probability rho (1 - rho)^k, k = 0, 1, ...: the prior of Bayesian quickest detection (Shiryaev 1963)."""

    rho: float
    after: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho must lie in (0, 1], got {self.rho!r}")
        at_least(self, "after", 0)

    def ticks(self, fleet: Fleet, clients: Ints, seed: int, part: int) -> Ints:
        if self.rho == 1:
            return np.full(len(clients), self.after, np.int64)
        survival = 1.0 - _per_client(seed, "start", clients, part)
        return self.after + _whole(np.log(survival) / np.log1p(-self.rho))


@dataclass(frozen=True)
class UniformStart(Start):
    """Each client at its own tick, uniform on ``first`` .. ``last``, both included."""

    first: int
    last: int

    def __post_init__(self) -> None:
        at_least(self, "first", 0)
        at_least(self, "last", self.first)

    def ticks(self, fleet: Fleet, clients: Ints, seed: int, part: int) -> Ints:
        return self.first + _whole(_per_client(seed, "start", clients, part) * (self.last - self.first + 1))


@dataclass(frozen=True)
class Staggered(Start):
    """Affected clients one after the other, by number: the i-th at ``first`` + i ``gap``."""

    gap: int
    first: int = 0

    def __post_init__(self) -> None:
        at_least(self, "gap", 0)
        at_least(self, "first", 0)

    def ticks(self, fleet: Fleet, clients: Ints, seed: int, part: int) -> Ints:
        return self.first + self.gap * np.arange(len(clients), dtype=np.int64)


@dataclass(frozen=True)
class Spreading(Start):
    """A front that leaves ``center`` (in the unit square) at tick ``at`` and moves ``speed`` a tick; it hits a client on the first tick it has reached it."""

    center: tuple[float, float]
    speed: float
    at: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "center", _point(self.center))
        if not 0 < self.speed < np.inf:
            raise ValueError(f"speed must be positive and finite, got {self.speed!r}")
        at_least(self, "at", 0)

    def ticks(self, fleet: Fleet, clients: Ints, seed: int, part: int) -> Ints:
        return self.at + _whole(np.ceil(_distances(fleet, self.center)[clients] / self.speed))


class Affected(ABC):
    """Who: the clients a drift hits."""

    @abstractmethod
    def ids(self, fleet: Fleet, seed: int, part: int) -> Ints:
        """Client numbers (n,), ascending."""


@dataclass(frozen=True)
class Everyone(Affected):
    """All clients."""

    def ids(self, fleet: Fleet, seed: int, part: int) -> Ints:
        return np.arange(len(fleet), dtype=np.int64)


@dataclass(frozen=True)
class Fraction(Affected):
    """The nearest whole number of clients to ``share`` of the fleet, drawn without replacement; smaller shares are subsets of larger ones."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share!r}")

    def ids(self, fleet: Fleet, seed: int, part: int) -> Ints:
        everyone = np.arange(len(fleet), dtype=np.int64)
        order = np.argsort(_per_client(seed, "affected", everyone, part), kind="stable")
        return np.sort(order[: round(self.share * len(fleet))])


@dataclass(frozen=True)
class Clients(Affected):
    """Exactly these client numbers."""

    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", tuple(int(n) for n in self.numbers))
        if not self.numbers or min(self.numbers) < 0:
            raise ValueError(f"numbers must hold at least one client, none negative, got {self.numbers!r}")

    def ids(self, fleet: Fleet, seed: int, part: int) -> Ints:
        if max(self.numbers) >= len(fleet):
            raise ValueError(f"Clients names client {max(self.numbers)}, but the fleet has clients 0 to {len(fleet) - 1}")
        return np.unique(np.asarray(self.numbers, np.int64))


@dataclass(frozen=True)
class OnDevices(Affected):
    """Clients whose device class is one of ``names``."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", (self.names,) if isinstance(self.names, str) else tuple(self.names))

    def ids(self, fleet: Fleet, seed: int, part: int) -> Ints:
        unknown = sorted(set(self.names) - set(fleet.device_names))
        if unknown or not self.names:
            raise ValueError(f"OnDevices.names must be device classes of the fleet, {tuple(fleet.device_names)}, got {self.names!r}")
        wanted = [i for i, name in enumerate(fleet.device_names) if name in self.names]
        return np.flatnonzero(np.isin(fleet.device, wanted)).astype(np.int64)


@dataclass(frozen=True)
class InGroups(Affected):
    """Clients whose ``group`` is one of ``values``."""

    values: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", (self.values,) if isinstance(self.values, int) else tuple(int(v) for v in self.values))

    def ids(self, fleet: Fleet, seed: int, part: int) -> Ints:
        unknown = sorted(set(self.values) - set(fleet.group.tolist()))
        if unknown or not self.values:
            raise ValueError(f"InGroups.values must be groups of the fleet, {sorted(set(fleet.group.tolist()))}, got {self.values!r}")
        return np.flatnonzero(np.isin(fleet.group, self.values)).astype(np.int64)


@dataclass(frozen=True)
class InRegion(Affected):
    """Clients within ``radius`` of ``center`` in the unit square."""

    center: tuple[float, float]
    radius: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "center", _point(self.center))
        if not 0 < self.radius < np.inf:
            raise ValueError(f"radius must be positive and finite, got {self.radius!r}")

    def ids(self, fleet: Fleet, seed: int, part: int) -> Ints:
        return np.flatnonzero(_distances(fleet, self.center) <= self.radius).astype(np.int64)


@dataclass(frozen=True)
class Drift:
    """A change x when it starts x whom it hits x how it sets in.

    ``at=200`` stands for ``start=At(200)``, a number for ``clients`` stands for ``Fraction``; by default everyone, at once.

    >>> from fedsim.drift import Drift, Rotation
    >>> Drift(Rotation(90), at=200, clients=0.3).start
    At(tick=200)
    """

    change: Change
    start: Start | None = None
    clients: Affected | float = field(default_factory=Everyone)
    onset: Onset = field(default_factory=Abrupt)
    at: InitVar[int | None] = None

    def __post_init__(self, at: int | None) -> None:
        if (self.start is None) == (at is None):
            raise ValueError(f"Drift takes exactly one of start= and at=, got start={self.start!r}, at={at!r}")
        if at is not None:
            object.__setattr__(self, "start", At(at))
        if isinstance(self.clients, int | float):
            object.__setattr__(self, "clients", Fraction(float(self.clients)))
        for name, kind in (("change", Change), ("start", Start), ("clients", Affected), ("onset", Onset)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"Drift.{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        if self.onset.morphs and not self.change.morphs:
            raise ValueError(f"{type(self.change).__name__} has no degrees, so its onset cannot be Incremental; use Gradual or Abrupt")

    def schedule(self, fleet: Fleet, ticks: int, seed: int, part: int = 0) -> "DriftSchedule":
        """Who changes when, within ``ticks`` ticks. ``part`` tells apart the drifts of one scenario.

        Warns where nobody changes within the horizon; raises ``ValueError`` for clients the fleet does not have.
        """
        assert self.start is not None
        assert isinstance(self.clients, Affected)
        hit = self.clients.ids(fleet, seed, part)
        nu = np.full(len(fleet), -1, np.int64)
        nu[hit] = self.start.ticks(fleet, hit, seed, part)
        nu[nu >= ticks] = -1
        if (nu < 0).all():
            warnings.warn(f"no client changes within {ticks} ticks: {self}", stacklevel=2)
        return DriftSchedule(drift=self, nu=nu)


@dataclass(frozen=True, eq=False, kw_only=True)
class DriftSchedule:
    """``nu`` (C,): the tick each client's law first differs, -1 for never. For the simulator and the scores alone."""

    drift: Drift
    nu: Ints

    def alpha(self, tick: int) -> Floats:
        """How far the drift has set in for each client (C,) at ``tick``."""
        return np.where(self.nu >= 0, self.drift.onset.ramp(tick - self.nu), 0.0)

    def strength(self, client: int | Ints, ticks: Ints, batch: int, seed: int, part: int) -> Floats:
        """Strength (T, B) of the change on the examples of one client at ``ticks`` (T,), or of one client each (T,).

        A drift that sets in gradually draws which of them are new.
        """
        clients = np.broadcast_to(client, ticks.shape)
        nu = self.nu[clients]
        alpha = np.where(nu >= 0, self.drift.onset.ramp(ticks - nu), 0.0)
        strength = np.repeat(alpha[:, None], batch, axis=1)
        between = np.flatnonzero((alpha > 0) & (alpha < 1))
        if len(between) and not self.drift.onset.morphs:
            mix = uniforms(seed, "drift-mix", clients[between], ticks[between], batch, part=part)
            strength[between] = mix < strength[between]
        return strength


def _per_client(seed: int, purpose: str, clients: Ints, part: int) -> Floats:
    return uniforms(seed, f"drift-{purpose}", clients, 0, 1, part=part)[:, 0]


def _distances(fleet: Fleet, center: tuple[float, float]) -> Floats:
    if not np.isfinite(fleet.region).all():
        raise ValueError("the fleet has clients without coordinates (column region); give all of them, or do not drift by region")
    return np.asarray(np.hypot(*(np.asarray(fleet.region, np.float64) - np.asarray(center)).T))


def _whole(ticks: Floats) -> Ints:
    """Rounded down; what no horizon reaches stays within 64 bits."""
    return np.asarray(np.minimum(np.floor(ticks), 2.0**62).astype(np.int64))


def _point(value: Iterable[ArrayLike]) -> tuple[float, float]:
    point = np.asarray(tuple(value), np.float64)
    if point.shape != (2,) or not ((point >= 0) & (point <= 1)).all():
        raise ValueError(f"center must be two numbers in [0, 1], got {value!r}")
    return float(point[0]), float(point[1])
