"""First-order importance: how much the loss would move if a structure's output, or its weights, went to zero.

GISP (arXiv:2510.18030) sums |weight x gradient| over the weights of a structure and divides by a constant per kind of
structure: ``FirstOrder(aggregate="sum_abs", normalise="published", reduce="mean_then_abs")``. ``gate`` instead takes |dL/dxi| of a factor xi on the structure's output, which equals the sum of weight x gradient
over the weights that read it; it comes from activations x output gradients alone, without any weight gradient.
"""

# S structures, B batch, F input features of a consumer, n structures of one block

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.errors import FedsimError
from fedsim.pruning.gates import Tap, gated, structure_products
from fedsim.pruning.gradients import Objective as Objective
from fedsim.pruning.gradients import Scores as Scores
from fedsim.pruning.gradients import finite_losses, weight_scores
from fedsim.pruning.structures import Bools, StructureMap
from fedsim.pruning.submodel import cut_to

Aggregate = Literal["gate", "gate_abs", "sum_abs", "sum_squares", "taylor2"]
Normalise = Literal["block_l2", "block_mean", "type_mean", "parameters", "published", "none"]
Reduce = Literal["mean_then_abs", "abs_then_mean"]


class Importance(Protocol):
    """What decides the order of removal."""

    def scores(self, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
        """Non-negative scores (S,) with only ``kept`` structures alive; lowest leaves first, those of removed ones are ignored."""
        ...


@dataclass(frozen=True, kw_only=True)
class FirstOrder:
    """First-order importance of every structure.

    ``aggregate``: ``gate`` |dL/dxi|; ``gate_abs`` the same with the absolute value at every output position (pixel, token);
    ``sum_abs`` sum of |w g| over the structure's parameters; ``sum_squares`` of (w g)^2; ``taylor2`` of |w g - w^2 F / 2| with
    the empirical Fisher diagonal F. ``reduce``: whether examples are averaged before the absolute value (or square).
    ``normalise`` divides by: ``block_l2`` the norm of the block's alive scores, ``block_mean`` their mean, ``type_mean`` the
    mean over all blocks of that kind, ``parameters`` the parameters the structure owns, ``published`` the constants of
    arXiv:2510.18030's code. Per-example weight gradients (``abs_then_mean``, ``taylor2``) cost one backward pass an example.

    Each field left ``None`` takes what measured best for the model (:meth:`resolved`): ``gate`` and ``abs_then_mean`` for MLPs and CNNs;
    ``sum_abs``, ``mean_then_abs`` and ``compact`` where attention is among the structures; ``mean_then_abs`` under ``taylor2``. ``compact``
    scores the model with its removed structures cut out instead of silenced: kept ones score the same to rounding, removed ones 0; cheaper
    the more is gone, for a copy of what is left. ``gradient_bytes`` bounds the accumulated gradients of weights held at once (not those of
    gates); the rest of the weights wait for another pass over the calibration set.
    """

    aggregate: Aggregate | None = None
    normalise: Normalise = "parameters"
    reduce: Reduce | None = None
    compact: bool | None = None
    gradient_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("aggregate", Aggregate), ("normalise", Normalise), ("reduce", Reduce)):
            value = getattr(self, name)
            if value not in get_args(allowed) and (value is not None or name == "normalise"):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {value!r}")
        if self.aggregate == "taylor2" and self.reduce == "abs_then_mean":
            raise ValueError(f"aggregate='taylor2' is signed before its square term and needs reduce='mean_then_abs', got {self.reduce!r}")
        if self.gradient_bytes is not None and self.gradient_bytes < 1:
            raise ValueError(f"gradient_bytes must be at least 1, got {self.gradient_bytes!r}")

    def scores(self, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
        """Scores (S,) by the mean loss of ``objective`` over ``batches``; ``FedsimError`` for a non-finite loss or gradient."""
        method = self.resolved(smap)
        with torch.enable_grad():
            if method.compact:
                raw = np.zeros(len(smap))
                small, left = cut_to(model, smap, kept)
                raw[kept] = method._raw(small, left, objective, batches, np.ones(len(left), np.bool_))
            else:
                raw = method._raw(model, smap, objective, batches, kept)
        return normalised(raw, self.normalise, smap, kept)

    def resolved(self, smap: StructureMap) -> "FirstOrder":
        """The same importance with the defaults for a model of ``smap`` written out."""
        aggregate = self.aggregate or ("sum_abs" if smap.attends else "gate")
        reduce = self.reduce or ("mean_then_abs" if smap.attends or aggregate == "taylor2" else "abs_then_mean")
        compact = smap.attends if self.compact is None else self.compact
        return replace(self, aggregate=aggregate, reduce=reduce, compact=compact)

    def _raw(self, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
        """Scores (S,) before they are made comparable, of ``model`` with only ``kept`` alive; all fields resolved."""
        each = self.reduce == "abs_then_mean"
        if self.aggregate == "gate" or self.aggregate == "gate_abs":
            return _gate_scores(model, smap, objective, batches, kept, positionwise=self.aggregate == "gate_abs", each=each)
        assert self.aggregate is not None, "resolved before scoring"
        with gated(model, smap, kept, record=False):
            return weight_scores(
                *(model, smap, objective, batches), aggregate=self.aggregate, each=each, gradient_bytes=self.gradient_bytes
            )


def normalised(raw: Scores, normalise: Normalise, smap: StructureMap, kept: Bools) -> Scores:
    """``raw`` (S,) made comparable between blocks; a block without any signal keeps its zeros."""
    scale = _scale(raw, normalise, smap, kept)
    comparable: Scores = raw / np.where(scale > 0, scale, 1.0)[smap.block_of]
    return comparable


def _scale(raw: Scores, normalise: Normalise, smap: StructureMap, kept: Bools) -> Scores:
    """The divisor of each block, (K,)."""
    if normalise == "none":
        return np.ones(len(smap.blocks))
    if normalise == "published":
        return np.asarray([_published(b.kind, b.published) for b in smap.blocks])
    if normalise == "parameters":
        return smap.parameters_of[smap.starts[:-1]].astype(np.float64)
    alive = np.where(kept, raw, 0.0)
    if normalise == "block_l2":
        return np.sqrt(np.bincount(smap.block_of, alive**2))
    total = np.bincount(smap.block_of, alive).astype(np.float64)
    number = np.bincount(smap.block_of, kept).astype(np.float64)
    if normalise == "type_mean":
        same = np.asarray([[a.kind == b.kind for b in smap.blocks] for a in smap.blocks], np.float64)
        total, number = same @ total, same @ number
    mean: Scores = total / np.maximum(number, 1)
    return mean


def _published(kind: str, constant: float | None) -> float:
    if constant is None:
        raise ValueError(f"normalise='published' has no constant for structures of kind {kind!r}; use 'parameters'")
    return constant


def gate_gradients(model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
    """dL/dxi (S,) of the mean loss, with its sign: at 1 for ``kept`` structures, at 0 for removed ones."""
    return _gate_sums(model, smap, objective, batches, kept, positionwise=False, each=False)


def _gate_scores(
    model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools, *, positionwise: bool, each: bool
) -> Scores:
    return np.abs(_gate_sums(model, smap, objective, batches, kept, positionwise=positionwise, each=each))


def _gate_sums(
    model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools, *, positionwise: bool, each: bool
) -> Scores:
    total, count = np.zeros(len(smap)), 0
    with torch.enable_grad(), gated(model, smap, kept) as taps:
        for number, batch in enumerate(batches):
            taps.clear()
            losses = finite_losses(objective, model, batch, number)
            seen = list(taps)  # a checkpointed layer runs again in the backward pass, and its hooks with it
            gradients = torch.autograd.grad(losses.sum(), [tap.output for tap in seen], materialize_grads=True, allow_unused=True)
            moved = _block_products(smap, seen, gradients, len(losses) if each else 1, positionwise=positionwise)
            if each:
                moved = [m.abs() for m in moved]
            batch_sum = torch.cat([m.sum(0, dtype=torch.float64).cpu() for m in moved]).numpy()
            _require_finite(batch_sum, number)
            total += batch_sum
            count += len(losses)
    return total / count


def _block_products(
    smap: StructureMap, taps: Sequence[Tap], gradients: Sequence[Tensor], examples: int, *, positionwise: bool
) -> list[Tensor]:
    """For every block dL/dxi (B, n) of each of B ``examples``, or (1, n) of all of them, summed over its consumers."""
    moved: dict[int, Tensor] = {}
    for tap, gradient in zip(taps, gradients, strict=True):
        product = _by_example(structure_products(tap, gradient, positionwise=positionwise), examples, tap.member.weight)
        moved[tap.block] = moved[tap.block] + product if tap.block in moved else product
    missing = [smap.blocks[b].name for b in range(len(smap.blocks)) if b not in moved]
    if missing:
        raise ValueError(f"the objective never runs the consumers of blocks {missing}, so they have no importance")
    return [moved[b] for b in range(len(smap.blocks))]


def _by_example(product: Tensor, examples: int, weight: str) -> Tensor:
    """(rows, n) added up to (B, n), in float64 where an example has several rows, one after another: its answers, or its tokens."""
    if len(product) == examples:
        return product
    if len(product) % examples:
        raise ValueError(f"{weight} reads {len(product)} rows for {examples} losses; importance needs as many rows of each example")
    return product.reshape(examples, -1, product.shape[1]).sum(1, dtype=torch.float64)


def _require_finite(values: Scores, number: int) -> None:
    if not np.isfinite(values).all():
        raise FedsimError(f"a gradient became non-finite in calibration batch {number}; nothing was pruned")
