"""Which submodel a device can hold: budgets in bytes, FLOPs and download time from its memory, compute and link."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import CapacityError
from fedsim.fleet import Fleet

_WEAK, _STRONG = 0.05, 0.95


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How a device's columns turn into the largest level it can hold.

    ``scale="relative"`` treats the task's model as a stand-in for one that fills the fleet's strong devices: the 5 % weakest
    hold the smallest level, the 5 % strongest the dense model, and a device between them in memory, compute and downlink
    (the scarcest of the three counts, on a logarithmic scale) holds what lies between. It always fits.
    ``scale="absolute"`` compares real figures: weights within ``memory_share`` of the memory and, where given, the forward
    pass of one example within ``latency_seconds`` and the download within ``download_seconds``.
    """

    scale: Literal["relative", "absolute"] = "relative"
    memory_share: float = 0.1
    latency_seconds: float | None = None
    download_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.scale not in ("relative", "absolute"):
            raise ValueError(f"scale must be 'relative' or 'absolute', got {self.scale!r}")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share must lie in (0, 1], got {self.memory_share}")
        for name in ("latency_seconds", "download_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive or None, got {value}")

    def levels(self, fleet: Fleet, sizes: NDArray[np.int64], flops: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index (C,) of the largest submodel each client holds, among levels of ``sizes`` bytes and ``flops`` a forward pass.

        Both are (L,), or (C, L) where clients have submodels of their own, ordered from dense to smallest. Raises
        ``CapacityError`` naming the first device that holds none.
        """
        shape = (len(fleet), sizes.shape[-1])
        sizes, flops = np.broadcast_to(sizes, shape), np.broadcast_to(flops, shape)
        if self.scale == "relative":
            shares = sizes / sizes[:, :1]
            fits = shares <= self._shares(fleet, float(shares[:, -1].max()))[:, None] * (1 + 1e-9)
        else:
            fits = sizes <= self.memory_share * fleet.memory[:, None]
            if self.latency_seconds is not None:
                fits &= flops / fleet.flops[:, None] <= self.latency_seconds
            if self.download_seconds is not None:
                fits &= sizes / fleet.down[:, None] <= self.download_seconds
        if not fits.any(axis=1).all():
            client = int(np.argmin(fits.any(axis=1)))
            raise CapacityError(self._refusal(fleet, client, int(sizes[client, -1]), float(flops[client, -1])))
        return np.asarray(np.argmax(fits, axis=1))

    def _shares(self, fleet: Fleet, smallest: float) -> NDArray[np.float64]:
        """Share (C,) of the dense model each device may hold, between ``smallest`` and 1."""
        ranks = [_between(np.log(column)) for column in (fleet.memory, fleet.flops, fleet.down)]
        return np.asarray(np.exp((1 - np.minimum.reduce(ranks)) * np.log(smallest)))

    def _refusal(self, fleet: Fleet, client: int, size: int, flops: float) -> str:
        device = fleet.device_names[int(fleet.device[client])]
        return (
            f"client {client} ({device}: {fleet.memory[client]:.3g} bytes of memory, {fleet.flops[client]:.3g} FLOP/s, {fleet.down[client]:.3g} bytes/s down) "
            f"holds no level; the smallest needs {size:,} bytes and {flops:.3g} FLOPs. Add a smaller level or raise memory_share, latency_seconds or download_seconds"
        )


def _between(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Position of each value between the weak and the strong quantile, clipped to [0, 1]; 1 where all are equal."""
    low, high = np.quantile(values, [_WEAK, _STRONG])
    if high - low < 1e-12:
        return np.ones_like(values)
    return np.asarray(np.clip((values - low) / (high - low), 0.0, 1.0))
