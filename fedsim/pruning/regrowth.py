"""Re-pruning without growing: swap the kept structures that matter least for removed ones that would matter more.

The gradient of a gate at 0 is exact for a removed structure in one backward pass of the masked dense model, so both sides of a swap are
scored by the same pass. Swaps are between structures that cost alike in every measure. Where blocks cross, as the layers of an MLP do, a
structure costs what the other block's size makes it cost, so a round whose swaps raise any cost is not taken. Nor is one that does not
lower the calibration loss.
"""

# S structures

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsim.pruning.gates import gated
from fedsim.pruning.gradients import Objective, Scores, finite_losses
from fedsim.pruning.importance import gate_gradients
from fedsim.pruning.schedule import Pruner, least_kept, spared_by
from fedsim.pruning.structures import COSTS, Bools, Ints, StructureMap
from fedsim.pruning.submodel import Submodel
from fedsim.pruning.tracing import evaluating


@dataclass(frozen=True, eq=False)
class Regrown:
    """The ``submodel`` found, its calibration ``losses`` (falling, one more than rounds were taken), and the ``passes`` that took.

    A backward pass counts as two.
    """

    submodel: Submodel
    losses: tuple[float, ...]
    passes: int


def regrown(
    pruner: Pruner,
    model: nn.Module,
    smap: StructureMap,
    objective: Objective,
    batches: Sequence[Any],
    submodel: Submodel,
    *,
    rounds: int = 4,
    share: float = 0.1,
) -> Regrown:
    """``submodel`` with up to ``share`` of its removed structures swapped in each of ``rounds``, by the losses of ``objective`` over ``batches``.

    Protected blocks lose none, others keep ``min_keep`` of ``pruner``. No cost grows; in a language model, whose blocks do not cross, none
    moves. A round that does not lower the loss, or raises a cost, is tried again with half its swaps; the search ends where one swap is
    refused. The model is left as it was. Raises ``ValueError`` for no examples or a submodel of another model.
    """
    kept = submodel.checked(smap).copy()
    if not batches or any(not len(batch[0]) for batch in batches):
        raise ValueError("calibration needs at least one example in every batch, got none")
    if rounds < 1 or not 0 < share <= 1:
        raise ValueError(f"rounds must be at least 1 and share lie in (0, 1], got {rounds!r} and {share!r}")
    spared, alike, limits = spared_by(pruner, smap), _alike(smap), _costs(smap, kept)
    with evaluating(model):
        losses, passes = [_loss(model, smap, objective, batches, kept)], 1
        for _ in range(rounds):
            gains = -gate_gradients(model, smap, objective, batches, kept)
            passes += 3
            out, into = _swaps(pruner, smap, gains, kept, spared, alike)
            number = min(len(out), max(1, round(share * int((~kept).sum()))))
            while number:
                tried = kept.copy()
                tried[out[:number]], tried[into[:number]] = False, True
                if all(cost <= limit for cost, limit in zip(_costs(smap, tried), limits, strict=True)):
                    loss = _loss(model, smap, objective, batches, tried)
                    passes += 1
                    if loss < losses[-1]:
                        kept = tried
                        losses.append(loss)
                        break
                number //= 2
            if not number:
                break
    return Regrown(Submodel(kept, smap.fingerprint, submodel.level), tuple(losses), passes)


def _alike(smap: StructureMap) -> Ints:
    """A number (S,) for each structure, the same for those of one kind that cost alike in the dense model."""
    one_gone = np.eye(len(smap.blocks), dtype=np.int64)
    costs = zip(*(smap.cost(cost, one_gone).tolist() for cost in COSTS), strict=True)
    groups: dict[tuple[object, ...], int] = {}
    numbers = [groups.setdefault((block.kind, *each), len(groups)) for block, each in zip(smap.blocks, costs, strict=True)]
    return np.asarray(numbers, np.int64)[smap.block_of]


def _costs(smap: StructureMap, kept: Bools) -> list[int]:
    removed = smap.removed_counts(kept)
    return [int(smap.cost(cost, removed)) for cost in COSTS]


def _swaps(
    pruner: Pruner, smap: StructureMap, gains: Scores, kept: Bools, spared: Bools, alike: Ints
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Structures to leave and to come back, pair by pair, the largest first-order gain first, ties in the fixed order."""
    left = np.diff(smap.starts) - smap.removed_counts(kept)
    free = left - np.array([least_kept(b, pruner.min_keep) for b in smap.blocks])
    out: list[int] = []
    into: list[int] = []
    for group in np.unique(alike):
        inside = np.flatnonzero(kept & ~spared & (alike == group))
        inside = inside[np.argsort(np.abs(gains[inside]), kind="stable")]
        outside = np.flatnonzero(~kept & (alike == group))
        outside = outside[np.argsort(-gains[outside], kind="stable")]
        leaving = [s for s in inside.tolist() if _take(free, int(smap.block_of[s]))]
        pairs = [(a, b) for a, b in zip(leaving, outside.tolist(), strict=False) if gains[b] > abs(gains[a])]
        out += [a for a, _ in pairs]
        into += [b for _, b in pairs]
    order = np.argsort([abs(gains[a]) - gains[b] for a, b in zip(out, into, strict=True)], kind="stable").astype(np.int64)
    return np.array(out, np.int64)[order], np.array(into, np.int64)[order]


def _take(free: NDArray[np.int64], block: int) -> bool:
    """Whether one more structure may leave the block."""
    free[block] -= 1
    return bool(free[block] >= 0)


def _loss(model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> float:
    """Mean calibration loss of the masked model."""
    with torch.no_grad(), gated(model, smap, kept, record=False):
        found = [finite_losses(objective, model, batch, number).double() for number, batch in enumerate(batches)]
    return float(torch.cat(found).mean())
