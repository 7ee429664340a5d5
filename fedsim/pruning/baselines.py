"""What GISP must beat: a random order, weight magnitude, and one look at the gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from fedsim.pruning.importance import FirstOrder, Importance, Objective, Scores
from fedsim.pruning.schedule import Pruner
from fedsim.pruning.structures import Bools, StructureMap
from fedsim.randomness import rng_for


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """Structures leave in a random order, a function of ``seed`` alone; the data are not looked at."""

    seed: int = 0

    def plan(self) -> tuple[Importance, int]:
        return _RandomScores(self.seed), 1


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruner):
    """Structures leave by mean squared weight, smallest first; the data are not looked at."""

    def plan(self) -> tuple[Importance, int]:
        return _MeanSquare(), 1


@dataclass(frozen=True, kw_only=True)
class OneShot(Pruner):
    """All structures leave by one look at the gradients of the dense model: GISP with a single step."""

    importance: Importance = field(default_factory=FirstOrder)

    def plan(self) -> tuple[Importance, int]:
        return self.importance, 1


@dataclass(frozen=True)
class _RandomScores:
    seed: int

    def scores(self, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
        return 1.0 + rng_for(self.seed, "random pruning").permutation(len(smap)).astype(np.float64)


@dataclass(frozen=True)
class _MeanSquare:
    def scores(self, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
        parameters = dict(model.named_parameters())
        blocks = []
        for block in smap.blocks:
            total = np.zeros(len(block))
            for member in block.members:
                if member.weight in parameters:
                    squares = parameters[member.weight].detach().double().cpu().numpy() ** 2
                    rows = np.moveaxis(squares, member.dim, 0).reshape(squares.shape[member.dim], -1).sum(1)
                    total += rows[member.positions].sum(1)
            blocks.append(total)
        return np.concatenate(blocks) / smap.parameters_of
