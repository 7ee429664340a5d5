"""First-order importance: how much the loss would move if a structure's output, or its weights, went to zero.

GISP (arXiv:2510.18030) sums |weight x gradient| over the weights of a structure and divides by a constant per kind of
structure: ``FirstOrder(aggregate="sum_abs", normalise="published", reduce="mean_then_abs")``. ``gate`` instead takes |dL/dxi| of a factor xi on the structure's output, which equals the sum of weight x gradient
over the weights that read it; it comes from activations x output gradients alone, without any weight gradient.
"""

# S structures, B batch, F input features of a consumer, n structures of one block

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.errors import FedsimError
from fedsim.pruning.gates import Tap, gated, structure_products
from fedsim.pruning.structures import Bools, Member, StructureMap

Objective = Callable[[nn.Module, Any], Tensor]
Scores = NDArray[np.float64]
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
    """

    aggregate: Aggregate = "gate"
    normalise: Normalise = "parameters"
    reduce: Reduce = "abs_then_mean"

    def __post_init__(self) -> None:
        for name, allowed in (("aggregate", Aggregate), ("normalise", Normalise), ("reduce", Reduce)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}")
        if self.aggregate == "taylor2" and self.reduce != "mean_then_abs":
            raise ValueError(f"aggregate='taylor2' is signed before its square term and needs reduce='mean_then_abs', got {self.reduce!r}")

    def scores(self, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
        """Scores (S,) by the mean loss of ``objective`` over ``batches``; ``FedsimError`` for a non-finite loss or gradient."""
        measure = _gate_scores if self.aggregate in ("gate", "gate_abs") else _weight_scores
        with torch.enable_grad():
            raw = measure(self, model, smap, objective, batches, kept)
        return normalised(raw, self.normalise, smap, kept)


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


def _gate_scores(
    method: FirstOrder, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools
) -> Scores:
    total, count = np.zeros(len(smap)), 0
    with gated(model, smap, kept) as taps:
        for number, batch in enumerate(batches):
            taps.clear()
            losses = _finite_losses(objective, model, batch, number)
            gradients = torch.autograd.grad(losses.sum(), [tap.output for tap in taps], materialize_grads=True, allow_unused=True)
            moved = _block_products(smap, taps, gradients, positionwise=method.aggregate == "gate_abs")
            if method.reduce == "abs_then_mean":
                moved = [m.abs() for m in moved]
            batch_sum = torch.cat([m.sum(0, dtype=torch.float64) for m in moved]).cpu().numpy()
            _require_finite(batch_sum, number)
            total += batch_sum
            count += len(losses)
    return np.abs(total) / count


def _block_products(smap: StructureMap, taps: Sequence[Tap], gradients: Sequence[Tensor], *, positionwise: bool) -> list[Tensor]:
    """For every block dL/dxi (B, n) of each example, summed over its consumers."""
    moved: dict[int, Tensor] = {}
    for tap, gradient in zip(taps, gradients, strict=True):
        product = structure_products(tap, gradient, positionwise=positionwise)
        moved[tap.block] = moved[tap.block] + product if tap.block in moved else product
    missing = [smap.blocks[b].name for b in range(len(smap.blocks)) if b not in moved]
    if missing:
        raise ValueError(f"the objective never runs the consumers of blocks {missing}, so they have no importance")
    return [moved[b] for b in range(len(smap.blocks))]


def _weight_scores(
    method: FirstOrder, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools
) -> Scores:
    owned = {m.weight for b in smap.blocks for m in b.members}
    weights = {w.name: model.get_parameter(w.name) for w in smap.weights if w.parameter and w.name in owned}
    with gated(model, smap, kept), _requiring_grad(weights.values()):
        importance = _parameter_importance(method, model, weights, objective, batches)
    per_block = []
    for block in smap.blocks:
        parts = [_per_structure(importance[m.weight], m) for m in block.members if m.weight in importance]
        per_block.append(torch.stack(parts).sum(0))
    return torch.cat(per_block).double().cpu().numpy()


def _parameter_importance(
    method: FirstOrder, model: nn.Module, weights: dict[str, nn.Parameter], objective: Objective, batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Importance of every scalar of ``weights``, in float32 or wider."""
    gradients = [torch.zeros_like(w, dtype=_wide(w)) for w in weights.values()]
    squares = [torch.zeros_like(g) for g in gradients] if method.aggregate == "taylor2" else []
    each = method.aggregate == "taylor2" or method.reduce == "abs_then_mean"
    count = 0
    for number, batch in enumerate(batches):
        for part in _examples(batch) if each else (batch,):
            losses = _finite_losses(objective, model, part, number)
            count += len(losses)
            for i, new in enumerate(torch.autograd.grad(losses.sum(), list(weights.values()), materialize_grads=True, allow_unused=True)):
                gradients[i] += new.abs() if method.reduce == "abs_then_mean" else new
                if squares:
                    squares[i] += new.to(gradients[i].dtype) ** 2
        _require_finite(np.asarray([float(g.sum()) for g in gradients]), number)
    importance: dict[str, Tensor] = {}
    for i, (name, weight) in enumerate(weights.items()):
        first = weight.detach().to(gradients[i].dtype) * (gradients[i] / count)
        if method.aggregate == "taylor2":
            first = first - 0.5 * weight.detach().to(first.dtype) ** 2 * (squares[i] / count)
        importance[name] = first**2 if method.aggregate == "sum_squares" else first.abs()
    return importance


def _per_structure(importance: Tensor, member: Member) -> Tensor:
    """Sum over what each structure owns of one parameter, (n,)."""
    rows = importance.movedim(member.dim, 0).flatten(1).sum(1) if importance.ndim > 1 else importance
    return rows[torch.from_numpy(member.positions).to(rows.device)].sum(1)


def _finite_losses(objective: Objective, model: nn.Module, batch: Any, number: int) -> Tensor:
    losses = objective(model, batch)
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"the objective must return one loss per example, got shape {tuple(losses.shape)} for calibration batch {number}")
    if not bool(torch.isfinite(losses).all()):
        example = int(torch.nonzero(~torch.isfinite(losses))[0, 0])
        raise FedsimError(
            f"the loss of example {example} of calibration batch {number} is {float(losses[example].detach())}; nothing was pruned"
        )
    return losses


def _require_finite(values: Scores, number: int) -> None:
    if not np.isfinite(values).all():
        raise FedsimError(f"a gradient became non-finite in calibration batch {number}; nothing was pruned")


def _examples(batch: Any) -> Iterator[Any]:
    """The batch one example at a time, in the same (named) tuple type."""
    for i in range(len(batch[0])):
        yield type(batch)(*(part[i : i + 1] for part in batch))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def _requiring_grad(weights: Any) -> Iterator[None]:
    """Gradients of frozen parameters inside the block."""
    frozen = [w for w in weights if not w.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
