"""Clients that train nested submodels of one model, each as wide as its device allows (HeteroFL; Diao, Ding, Tarokh, 2021, arXiv:2010.01264).

A submodel keeps the first share of every hidden layer's units or channels, so narrower ones lie inside wider ones, and the merge
averages each parameter over the clients that hold it.
"""

# C clients, n structures of a block

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.capacity import Capacity
from fedsim.fleet import Fleet
from fedsim.pruning import StructureMap, Submodel
from fedsim.randomness import rng_for
from fedsim.tasks.base import Task, Wrapped


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Submodels that keep the first ``rates`` (descending, from 1) of every hidden layer; a client trains the widest its device holds.

    Who holds which follows from ``capacity``, or is drawn once with probability ``shares`` where given. With ``scale`` a cut layer's output
    is divided by its kept share while training, so that its sums keep their size.
    """

    rates: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    capacity: Capacity = field(default_factory=Capacity)
    shares: tuple[float, ...] | None = None
    scale: bool = True

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in pairwise(self.rates))
        if not (self.rates and self.rates[0] == 1.0 and falling and self.rates[-1] > 0):
            raise ValueError(f"rates must fall from 1 and stay above 0, got {self.rates}")
        if self.shares is not None and not (len(self.shares) == len(self.rates) and min(self.shares) >= 0 and sum(self.shares) > 0):
            raise ValueError(f"shares must hold one weight >= 0 for each of the {len(self.rates)} rates, got {self.shares}")

    def levels(self, fleet: Fleet, smap: StructureMap, submodels: Sequence[Submodel], seed: int) -> NDArray[np.int64]:
        """Index (C,) of each client's submodel. Raises ``CapacityError`` for a device that holds none."""
        if self.shares is not None:
            edges = np.cumsum(self.shares) / sum(self.shares)
            return np.searchsorted(edges[:-1], rng_for(seed, "widths").random(len(fleet)), side="right")
        removed = smap.removed_counts(np.stack([s.kept for s in submodels]))
        return self.capacity.levels(fleet, smap.cost("bytes", removed), smap.cost("flops", removed))


@dataclass(frozen=True, eq=False)
class Narrowed(Wrapped):
    """``task`` with its model cut to ``submodel``; with ``scale`` every cut layer's output is divided by its kept share while training."""

    task: Task
    submodel: Submodel
    smap: StructureMap
    scale: bool

    def build(self, seed: int) -> nn.Module:
        small = self.submodel.sliced(self.task.build(seed), self.smap)
        if self.scale:
            for name, share in _kept_shares(self.submodel, self.smap).items():
                small.get_submodule(name).register_forward_hook(_Rescaled(share))
        return small


@dataclass(frozen=True)
class _Rescaled:
    """A forward hook that makes up for the units a narrow layer lacks, so that its sums are of the wide layer's size."""

    share: float

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output / self.share if module.training else output


def narrowed(task: Task, widths: Widths) -> tuple[StructureMap, tuple[Submodel, ...]]:
    """The structures of the task's model, and the submodel of each rate: the first ``ceil(rate n)`` of every block's ``n`` structures.

    Raises ``ValueError`` for a model without a hidden layer that can be narrowed.
    """
    smap = task.structures(task.build(0))
    if not smap.blocks:
        raise ValueError(
            f"widths need a hidden layer that can be narrowed; the model of {type(task).__name__} has none: {dict(smap.skipped)}"
        )
    kept = [np.concatenate([np.arange(len(block)) < ceil(rate * len(block)) for block in smap.blocks]) for rate in widths.rates]
    return smap, tuple(Submodel(k, smap.fingerprint, 1.0 - rate) for k, rate in zip(kept, widths.rates, strict=True))


def _kept_shares(submodel: Submodel, smap: StructureMap) -> dict[str, float]:
    """By module whose outputs are cut: the share of them that is kept."""
    computing = {w.name for w in smap.weights if w.flops}
    shares = {}
    for number, block in enumerate(smap.blocks):
        share = float(submodel.kept[smap.starts[number] : smap.starts[number + 1]].mean())
        shares.update({m.weight.rpartition(".")[0]: share for m in block.members if m.role == "producer" and m.weight in computing})
    return {name: share for name, share in shares.items() if share < 1.0}
