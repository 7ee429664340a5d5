"""Budgets in the units of a device: memory with its cache, FLOPs of a prompt or a token, seconds by a roofline.

A budget is a callable of a map and removed counts (..., K) that gives figures (...,), smaller the more is removed. ``PruningTrajectory.within``
takes one, or the name of a cost.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.pruning.structures import Ints, StructureMap

Figures = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the weights, and of the cache for ``batch`` texts of ``context`` tokens."""

    context: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        _check(context=(self.context, 0), batch=(self.batch, 1))

    def __call__(self, smap: StructureMap, removed: Ints) -> Figures:
        return np.asarray(smap.cost("bytes", removed) + self.context * self.batch * smap.cost("kv_bytes", removed), np.float64)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of ``batch`` prompts of ``tokens`` tokens (``phase="prefill"``), or of one more token after each (``"decode"``)."""

    tokens: int
    batch: int = 1
    phase: Literal["prefill", "decode"] = "prefill"

    def __post_init__(self) -> None:
        _check(tokens=(self.tokens, 1), batch=(self.batch, 1))
        if self.phase not in ("prefill", "decode"):
            raise ValueError(f"phase must be 'prefill' or 'decode', got {self.phase!r}")

    def __call__(self, smap: StructureMap, removed: Ints) -> Figures:
        pairs = smap.pair_flops(removed)
        token = (smap.cost("flops", removed) - pairs * smap.tokens**2) / max(smap.tokens, 1)
        queries = self.tokens if self.phase == "prefill" else 1
        return np.asarray(self.batch * queries * (token + pairs * self.tokens), np.float64)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Time on a device that computes ``flops_per_second`` and reads ``bytes_per_second``: whichever takes longer (a roofline).

    Prefill reads the weights once, a decoding step the weights and the cache of ``tokens`` tokens.
    """

    flops_per_second: float
    bytes_per_second: float
    tokens: int
    batch: int = 1
    phase: Literal["prefill", "decode"] = "decode"

    def __post_init__(self) -> None:
        for name in ("flops_per_second", "bytes_per_second"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        Flops(tokens=self.tokens, batch=self.batch, phase=self.phase)

    def __call__(self, smap: StructureMap, removed: Ints) -> Figures:
        computed = Flops(tokens=self.tokens, batch=self.batch, phase=self.phase)(smap, removed)
        read = Memory(context=self.tokens if self.phase == "decode" else 0, batch=self.batch)(smap, removed)
        return np.asarray(np.maximum(computed / self.flops_per_second, read / self.bytes_per_second))


def _check(**numbers: tuple[object, int]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")
