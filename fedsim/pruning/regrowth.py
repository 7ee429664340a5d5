"""Re-pruning at a fixed size: swap the kept structures that matter least for removed ones that would matter more.

The gradient of a gate at 0 is exact for a removed structure in one backward pass of the masked dense model, so both sides of a swap are
scored by the same pass. Swaps stay within a kind, whose structures cost alike, and are taken only while the calibration loss falls.
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
from fedsim.pruning.structures import Bools, StructureMap
from fedsim.pruning.submodel import Submodel
from fedsim.pruning.tracing import evaluating


@dataclass(frozen=True, eq=False)
class Regrown:
    """The ``submodel`` found, its calibration ``losses`` (one more than swaps were taken, falling), and the forward ``passes`` that took."""

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

    Protection and ``min_keep`` are those of ``pruner``. A round that does not lower the loss is tried again with half its swaps; the
    search ends where one swap does not. The model is left as it was. Raises ``ValueError`` for no examples or a submodel of another model.
    """
    kept = submodel.checked(smap).copy()
    if not batches or any(not len(batch[0]) for batch in batches):
        raise ValueError("calibration needs at least one example in every batch, got none")
    if rounds < 1 or not 0 < share <= 1:
        raise ValueError(f"rounds must be at least 1 and share lie in (0, 1], got {rounds!r} and {share!r}")
    spared = spared_by(pruner, smap)
    with evaluating(model):
        losses, passes = [_loss(model, smap, objective, batches, kept)], 1
        for _ in range(rounds):
            gains = -gate_gradients(model, smap, objective, batches, kept)
            passes += 3
            out, into = _swaps(pruner, smap, gains, kept, spared)
            number = min(len(out), max(1, round(share * int((~kept).sum()))))
            while number:
                tried = kept.copy()
                tried[out[:number]], tried[into[:number]] = False, True
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


def _swaps(pruner: Pruner, smap: StructureMap, gains: Scores, kept: Bools, spared: Bools) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Structures to leave and to come back, pair by pair, the largest first-order gain first, ties in the fixed order."""
    kinds = np.asarray([f"{b.kind} of {int(smap.parameters_of[smap.starts[i]])}" for i, b in enumerate(smap.blocks)])[smap.block_of]
    left = np.diff(smap.starts) - smap.removed_counts(kept)
    free = left - np.array([least_kept(b, pruner.min_keep) for b in smap.blocks])
    out: list[int] = []
    into: list[int] = []
    for kind in np.unique(kinds):
        inside = np.flatnonzero(kept & ~spared & (kinds == kind))
        inside = inside[np.argsort(np.abs(gains[inside]), kind="stable")]
        outside = np.flatnonzero(~kept & (kinds == kind))
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
