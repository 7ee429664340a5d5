"""Iterative global pruning: score, remove the lowest few of the whole model, score what is left again."""

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from fedsim.errors import CapacityError, FedsimError
from fedsim.pruning.importance import Importance, Objective, Scores
from fedsim.pruning.structures import Block, Bools, Ints, StructureMap
from fedsim.pruning.submodel import Submodel, cut_to
from fedsim.pruning.tracing import evaluating
from fedsim.pruning.trajectory import PruningTrajectory

DEEP = 10  # layers from which the ends of a stack are protected


@dataclass(frozen=True, kw_only=True, eq=False)
class Progress:
    """A trajectory on its way: the dense ``model``, its map, what is ``kept`` (S,) before ``step`` (from 1), the sparsity then and a step ago.

    ``first`` tells the step that looks first (steps that a start has behind it are left out), ``deployed`` is the submodel in service, where the caller gave one.
    """

    model: nn.Module
    smap: StructureMap
    kept: Bools
    step: int
    first: bool
    sparsity: float
    before: float
    deployed: nn.Module | None

    def pruned(self) -> nn.Module:
        """The model as far as it is pruned, in evaluation mode."""
        return cut_to(self.model, self.smap, self.kept)[0]


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """Base of all pruning methods: which levels are wanted and what must stay; a subclass says how structures are ranked.

    ``levels`` are sparsities in [0, 1), rising. ``min_keep`` structures stay in every block; 0 lets a whole attention or MLP go. The blocks of every module in ``protect`` (``"model.layers.1"``, which is not layer 10) stay whole; so do, in a stack of at least 10 layers, the first
    ``protect_first`` (a share, rounded down) and the last ``protect_last``, as in the code of arXiv:2510.18030. ``calibration`` says whose examples rank the structures of a deployment (the fleet's or
    the client's own) and ``calibration_examples`` how many; ``couple_residual`` is that of ``structure_map``.
    """

    levels: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    min_keep: int = 1
    protect: tuple[str, ...] = ()
    protect_first: float = 0.1
    protect_last: int = 1
    calibration: Literal["global", "client"] = "global"
    calibration_examples: int = 256
    couple_residual: bool = False

    def __post_init__(self) -> None:
        if not self.levels or any(not 0 <= level < 1 for level in self.levels) or sorted(set(self.levels)) != list(self.levels):
            raise ValueError(f"levels must be rising sparsities in [0, 1), got {self.levels!r}")
        for name, least in (("min_keep", 0), ("protect_last", 0), ("calibration_examples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        if not 0 <= self.protect_first < 1:
            raise ValueError(f"protect_first must be a share of the layers in [0, 1), got {self.protect_first!r}")
        if self.calibration not in ("global", "client"):
            raise ValueError(f"calibration must be 'global' or 'client', got {self.calibration!r}")

    def plan(self) -> tuple[Importance, int]:
        """The importance that ranks structures, and in how many steps they leave."""
        raise NotImplementedError(f"{type(self).__name__} must define plan()")

    def trajectory(
        self,
        model: nn.Module,
        smap: StructureMap,
        objective: Objective,
        batches: Sequence[Any],
        *,
        deployed: nn.Module | None = None,
        start: Submodel | None = None,
    ) -> PruningTrajectory:
        """Order of removal up to the highest level, by losses (B,) of ``objective(model, batch)`` over ``batches``; no training.

        The model is left as it was. ``start`` is a submodel to go on from: what it lacks comes first. Methods that calibrate on what a
        model writes itself ask ``deployed`` for it, where it is given. ``ValueError`` for no examples, ``CapacityError`` for a level ``min_keep`` and ``protect``
        do not allow, ``FedsimError`` for a non-finite loss or gradient.
        """
        smap.check(model)
        if not batches or any(not len(batch[0]) for batch in batches):
            raise ValueError("calibration needs at least one example in every batch, got none")
        with evaluating(model):
            return self._remove(model, smap, objective, batches, deployed, start)

    def flops(self, smap: StructureMap, examples: int) -> float:
        """FLOPs of a trajectory calibrated on ``examples``: a forward and a backward pass of the dense model in every step."""
        return 3.0 * float(smap.cost("flops", np.zeros(len(smap.blocks), np.int64))) * examples * self.plan()[1]

    def calibration_for(self, batches: Sequence[Any], progress: Progress) -> Sequence[Any]:
        """What a step calibrates on, given what the step before did; the same again unless a method renews it."""
        return batches

    def _remove(
        self,
        model: nn.Module,
        smap: StructureMap,
        objective: Objective,
        batches: Sequence[Any],
        deployed: nn.Module | None,
        start: Submodel | None,
    ) -> PruningTrajectory:
        (importance, steps), spared, target = self.plan(), spared_by(self, smap), self.levels[-1]
        kept = np.ones(len(smap), np.bool_) if start is None else start.checked(smap).copy()
        gone = np.flatnonzero(~kept)
        removed, scores, step_of = [gone], [np.zeros(len(gone))], [np.zeros(len(gone), np.int64)]
        before = sparsity = float(smap.share("parameters", smap.removed_counts(kept)))
        for step in range(1, steps + 1):
            goal = target * step / steps
            if goal <= sparsity + 1e-12:
                continue
            first = len(step_of) == 1
            progress = Progress(
                model=model, smap=smap, kept=kept, step=step, first=first, sparsity=sparsity, before=before, deployed=deployed
            )
            batches = self.calibration_for(batches, progress)
            score = _score(importance, step, model, smap, objective, batches, kept)
            order = _within_min_keep(_order(score, kept, spared), smap, kept, self.min_keep)
            chosen = order[: _number_to_goal(smap, kept, order, goal)]
            kept[chosen] = False
            removed.append(chosen)
            scores.append(score[chosen])
            step_of.append(np.full(len(chosen), step, np.int64))
            before, sparsity = sparsity, float(smap.share("parameters", smap.removed_counts(kept)))
        return PruningTrajectory.of(smap, np.concatenate(removed), np.concatenate(scores), np.concatenate(step_of))


def spared_by(pruner: Pruner, smap: StructureMap) -> Bools:
    """Structures (S,) of protected blocks. ``CapacityError`` if the highest level cannot be reached without them."""
    whole = _at_the_ends(pruner, smap)
    for module in pruner.protect:
        inside = np.asarray([f"{block.name}.".startswith(f"{module.rstrip('.')}.") for block in smap.blocks], np.bool_)
        if not inside.any():
            raise ValueError(f"protect names no block inside {module!r}; prunable blocks are {[block.name for block in smap.blocks]}")
        whole |= inside
    most = np.asarray(
        [0 if w else max(len(b) - least_kept(b, pruner.min_keep), 0) for b, w in zip(smap.blocks, whole, strict=True)], np.int64
    )
    reach = float(smap.share("parameters", most))
    if pruner.levels[-1] > reach:
        raise CapacityError(
            f"level {pruner.levels[-1]} cannot be reached: at most {reach:.4f} of the prunable parameters can leave with"
            f" min_keep={pruner.min_keep}, protect={pruner.protect}, protect_first={pruner.protect_first} and protect_last={pruner.protect_last}"
            f" (not prunable: {dict(smap.skipped)})"
        )
    return whole[smap.block_of]


def _at_the_ends(pruner: Pruner, smap: StructureMap) -> Bools:
    """Blocks (K,) of the first and last layers of a deep stack, that stay whole."""
    layers = np.asarray([-1 if b.layer is None else b.layer for b in smap.blocks], np.int64)
    depth = int(layers.max(initial=-1)) + 1
    if depth < DEEP:
        return np.zeros(len(layers), np.bool_)
    return (layers >= 0) & ((layers < int(pruner.protect_first * depth)) | (layers >= depth - pruner.protect_last))


def least_kept(block: Block, min_keep: int) -> int:
    """Structures that stay in ``block``: whole layers may go, and a convolution needs a channel."""
    return {"layer": 0, "filters": max(min_keep, 1)}.get(block.kind, min_keep)


def _score(
    importance: Importance, step: int, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools
) -> Scores:
    try:
        score = importance.scores(model, smap, objective, batches, kept)
    except FedsimError as error:
        raise FedsimError(f"pruning step {step}: {error}") from error
    if not np.isfinite(score[kept]).all():
        raise FedsimError(f"pruning step {step}: {type(importance).__name__} returned scores that are not finite; nothing was pruned")
    if not score[kept].any():
        warnings.warn(f"all {int(kept.sum())} structures score 0 in pruning step {step}; they leave in the fixed order", stacklevel=2)
    return score


def _order(score: Scores, kept: Bools, spared: Bools) -> Ints:
    """Candidates, lowest score first; ties in the fixed order."""
    candidates = np.flatnonzero(kept & ~spared)
    return candidates[np.argsort(score[candidates], kind="stable")]


def _within_min_keep(order: Ints, smap: StructureMap, kept: Bools, min_keep: int) -> Ints:
    """``order`` without those that would leave their block with fewer than ``min_keep``."""
    allowed = np.zeros(len(order), np.bool_)
    alive = np.diff(smap.starts) - smap.removed_counts(kept)
    for block, num in enumerate(alive):
        allowed[np.flatnonzero(smap.block_of[order] == block)[: max(int(num) - least_kept(smap.blocks[block], min_keep), 0)]] = True
    return order[allowed]


def _number_to_goal(smap: StructureMap, kept: Bools, order: Ints, goal: float) -> int:
    """How many of ``order`` leave until the sparsity is at least ``goal``; found by halving, as it never falls while more leave."""
    gone = smap.removed_counts(kept)

    def reached(number: int) -> bool:
        more = np.bincount(smap.block_of[order[:number]], minlength=len(gone))
        return bool(smap.share("parameters", gone + more) >= goal - 1e-12)

    return bisect_left(range(len(order)), True, key=reached)
