"""How a drift sets in after its change point.

Exports: Abrupt, Gradual, Incremental, Onset, at_least.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Onset(ABC):
    """How a drift sets in. ``morphs``: the change itself grows; otherwise each example is old or new."""

    morphs: ClassVar[bool] = False

    @abstractmethod
    def ramp(self, since: Ints) -> Floats:
        """alpha in [0, 1] at ``since`` ticks after the change point; 0 before it, positive from 0 on."""


@dataclass(frozen=True)
class Abrupt(Onset):
    """All at once: 1 from the change point on."""

    def ramp(self, since: Ints) -> Floats:
        return (since >= 0).astype(np.float64)


@dataclass(frozen=True)
class Gradual(Onset):
    """Each example follows the new law with probability (t - nu + 1) / width, up to 1."""

    width: int

    def __post_init__(self) -> None:
        at_least(self, "width", 1)

    def ramp(self, since: Ints) -> Floats:
        return np.clip((since + 1) / self.width, 0.0, 1.0)


@dataclass(frozen=True)
class Incremental(Gradual):
    """Every example follows the change at strength (t - nu + 1) / width, up to 1; for changes that come in degrees."""

    morphs: ClassVar[bool] = True


def at_least(owner: object, name: str, lowest: int) -> None:
    """``ValueError`` unless the field ``name`` of ``owner`` is a whole number of at least ``lowest``."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < lowest:
        raise ValueError(f"{type(owner).__name__}.{name} must be a whole number, at least {lowest}, got {value!r}")
