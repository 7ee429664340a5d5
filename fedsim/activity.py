"""Which clients are active at a tick of serving.

Exports: Activity, All, Bernoulli, Sampled.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.randomness import uniforms


class Activity(ABC):
    """Which clients are active at a tick; depends on the seed and the tick alone."""

    @abstractmethod
    def active(self, tick: int, num_clients: int, seed: int) -> NDArray[np.bool_]:
        """Flags (C,)."""


@dataclass(frozen=True)
class All(Activity):
    """Every client at every tick."""

    def active(self, tick: int, num_clients: int, seed: int) -> NDArray[np.bool_]:
        return np.ones(num_clients, bool)


@dataclass(frozen=True)
class Sampled(Activity):
    """Exactly ``num`` clients, without replacement."""

    num: int

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"num must be at least 1 client, got {self.num!r}")

    def active(self, tick: int, num_clients: int, seed: int) -> NDArray[np.bool_]:
        if self.num > num_clients:
            raise ValueError(f"Sampled asks for {self.num} active clients, but the fleet has {num_clients}")
        order = np.argsort(_coins(tick, num_clients, seed), kind="stable")
        flags = np.zeros(num_clients, bool)
        flags[order[: self.num]] = True
        return flags


@dataclass(frozen=True)
class Bernoulli(Activity):
    """Each client with probability ``p``, independently."""

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p must lie in (0, 1], got {self.p!r}")

    def active(self, tick: int, num_clients: int, seed: int) -> NDArray[np.bool_]:
        return _coins(tick, num_clients, seed) < self.p


def _coins(tick: int, num_clients: int, seed: int) -> NDArray[np.float64]:
    return uniforms(seed, "active", np.arange(num_clients), tick, 1)[:, 0]
