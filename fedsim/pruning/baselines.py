"""What GISP must beat: a random order, weight magnitude, one look at the gradients, and published rules that look at activations.

Exports: FLAP, LLMPruner, Magnitude, OneShot, Random, ShortGPT, Uniform, WandaSP, compensate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.pruning.activations import Moments, moments, positions
from fedsim.pruning.gradients import finite_losses
from fedsim.pruning.importance import FirstOrder, Importance, Objective, Scores
from fedsim.pruning.schedule import Progress, Pruner
from fedsim.pruning.structures import Bools, Member, StructureMap
from fedsim.pruning.submodel import Submodel, cut_to
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


@dataclass(frozen=True, kw_only=True)
class LLMPruner(Pruner):
    """LLM-Pruner (arXiv:2305.11627): one look at the mean over examples of |weight x gradient|, the ends of a deep stack protected."""

    protect_first: float = 0.125
    protect_last: int = 2

    def plan(self) -> tuple[Importance, int]:
        return FirstOrder(aggregate="sum_abs", normalise="none", reduce="abs_then_mean"), 1


@dataclass(frozen=True, kw_only=True)
class WandaSP(Pruner):
    """Wanda-sp, Wanda (arXiv:2306.11695) for structures: the same share of every block leaves, by |weight| x norm of the input it meets.

    A structure scores the sum over its columns of mean |weight| x the column's norm over the calibration set.
    """

    def plan(self) -> tuple[Importance, int]:
        return _Evenly(_OfTheKept(_weights_meet_inputs)), 1


@dataclass(frozen=True, kw_only=True)
class FLAP(Pruner):
    """FLAP (arXiv:2312.11983): structures whose inputs fluctuate least leave, and a bias can stand in for their mean (:func:`compensate`).

    A structure scores the mean over its columns of variance x squared norm of the column, standardised within its block, then ranked
    over the whole model.
    """

    def plan(self) -> tuple[Importance, int]:
        return _OfTheKept(_fluctuation), 1


@dataclass(frozen=True, kw_only=True)
class ShortGPT(Pruner):
    """ShortGPT (arXiv:2403.03853): whole layers leave, those first that turn their input least (1 - mean cosine of input and output).

    Needs a map of layers, ``language_structures(model, tokens, units=("layer",))``.
    """

    def plan(self) -> tuple[Importance, int]:
        return _OfTheKept(_block_influence), 1


@dataclass(frozen=True, kw_only=True)
class Uniform(Pruner):
    """The order of ``base`` inside every block, the same share of each: what a global ranking must beat.

    Calibrates as ``base`` does; levels and what must stay are its own. ``ValueError`` for a ``base`` that sets them otherwise, and for
    a map whose blocks hold one structure each.
    """

    base: Pruner

    def __post_init__(self) -> None:
        super().__post_init__()
        for common in fields(Pruner):
            value = getattr(self.base, common.name)
            if value != common.default and value != getattr(self, common.name):
                raise ValueError(
                    f"Uniform decides {common.name} for its base, which sets {value!r} against {getattr(self, common.name)!r}; give it to Uniform"
                )

    def plan(self) -> tuple[Importance, int]:
        importance, steps = self.base.plan()
        return _Evenly(importance), steps

    def flops(self, smap: StructureMap, examples: int) -> float:
        return replace(self.base, levels=self.levels).flops(smap, examples)

    def calibration_for(self, batches: Sequence[Any], progress: Progress) -> Sequence[Any]:
        return self.base.calibration_for(batches, progress)


def compensate(small: nn.Module, model: nn.Module, smap: StructureMap, submodel: Submodel, seen: Mapping[str, Moments]) -> None:
    """Add to the consumers of ``small``, cut from ``model`` by ``submodel``, the mean of what they no longer read, as a bias.

    ``seen`` are :func:`fedsim.pruning.activations.moments` of the dense model. A consumer without a bias gets one, so a saved folder
    needs an architecture that has it. Raises ``ValueError`` for convolutions, whose borders have other means.
    """
    kept = submodel.checked(smap)
    for number, block in enumerate(smap.blocks):
        for member in block.members:
            leaving = smap.positions(number, member, kept)[1]
            if member.role == "consumer" and len(leaving):
                _add_bias(small.get_submodule(member.weight.rpartition(".")[0]), model, member, leaving, seen[member.weight])


def _add_bias(consumer: Any, model: nn.Module, member: Member, leaving: Any, seen: Moments) -> None:
    weight = model.get_parameter(member.weight).detach()
    if weight.ndim != 2:
        raise ValueError(f"{member.weight} is a convolution, whose borders read other means; a bias cannot stand in for its inputs")
    columns = torch.from_numpy(leaving).to(weight.device)
    lost = weight.index_select(member.dim, columns).double().movedim(member.dim, 0).T @ seen.mean[columns]
    old = torch.zeros_like(lost) if consumer.bias is None else consumer.bias.detach().double()
    consumer.bias = nn.Parameter((old + lost).to(weight.dtype))


@dataclass(frozen=True)
class _Evenly:
    """Ranks of ``base`` inside each block over its size, so that all blocks lose the same share at every level."""

    base: Importance

    def scores(self, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
        if len(smap) == len(smap.blocks):
            raise ValueError("every block of this map holds one structure, so taking the same share of each ranks nothing")
        found = self.base.scores(model, smap, objective, batches, kept)
        shares = np.zeros(len(smap))
        for start, stop in pairwise(smap.starts.tolist()):
            order = np.argsort(np.where(kept[start:stop], found[start:stop], -np.inf), kind="stable")
            shares[start + order] = (np.arange(stop - start) + 1) / (stop - start)
        return shares


@dataclass(frozen=True)
class _OfTheKept:
    """``rule`` applied to the model that is left: what removed structures did, and what they weigh, tells nothing about the others."""

    rule: Callable[[nn.Module, StructureMap, Objective, Sequence[Any]], Scores]

    def scores(self, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
        found = np.zeros(len(smap))
        found[kept] = self.rule(*cut_to(model, smap, kept), objective, batches)
        return found


def _weights_meet_inputs(model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any]) -> Scores:
    seen = moments(model, smap, objective, batches)
    return _by_columns(model, smap, seen, lambda weight, m: weight.abs().mean(1) * m.norm, mean=False)


def _fluctuation(model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any]) -> Scores:
    seen = moments(model, smap, objective, batches)
    raw = _by_columns(model, smap, seen, lambda weight, m: (weight**2).sum(1) * m.variance, mean=True)
    standard = np.zeros(len(smap))
    for start, stop in pairwise(smap.starts.tolist()):
        spread = raw[start:stop].std(ddof=1) if stop - start > 1 else 0.0
        standard[start:stop] = (raw[start:stop] - raw[start:stop].mean()) / (spread if spread > 0 else 1.0)
    return np.asarray(standard - standard.min())


def _by_columns(
    model: nn.Module, smap: StructureMap, seen: Mapping[str, Moments], figure: Callable[[Tensor, Moments], Tensor], *, mean: bool
) -> Scores:
    """Scores (S,) added up (or averaged) over a structure's columns from the ``figure`` (F,) of each; weights come as (F, rest)."""
    total = np.zeros(len(smap))
    for number, block in enumerate(smap.blocks):
        for member in block.members:
            if member.role == "consumer":
                weight = model.get_parameter(member.weight).detach().double().movedim(member.dim, 0).flatten(1)
                columns = figure(weight, seen[member.weight]).cpu().numpy()[member.positions]
                total[smap.starts[number] : smap.starts[number + 1]] += columns.mean(1) if mean else columns.sum(1)
    return total


def _block_influence(model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any]) -> Scores:
    if any(block.kind != "layer" for block in smap.blocks):
        raise ValueError("ShortGPT removes whole layers and needs a map of them; make it with units=('layer',)")
    sums, numbers = np.zeros(len(smap)), np.zeros(len(smap))
    with torch.no_grad():
        for number, batch in enumerate(batches):
            with _cosines(model, smap, batch, sums, numbers):
                finite_losses(objective, model, batch, number)
    return np.asarray(1 - sums / np.maximum(numbers, 1))


@contextmanager
def _cosines(model: nn.Module, smap: StructureMap, batch: Any, sums: Scores, numbers: Scores) -> Iterator[None]:
    """Hooks that add to ``sums`` and ``numbers`` (S,) the cosines of every layer's inputs and outputs."""

    def watch(number: int) -> Any:
        def take(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            before: Tensor = args[0] if args else kwargs["hidden_states"]
            after: Tensor = output if isinstance(output, Tensor) else output[0]
            cosines = positions(batch, F.cosine_similarity(before.double(), after.double(), dim=-1)[..., None])
            sums[number] += float(cosines.sum())
            numbers[number] += len(cosines)

        return take

    handles = [model.get_submodule(block.name).register_forward_hook(watch(i), with_kwargs=True) for i, block in enumerate(smap.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
