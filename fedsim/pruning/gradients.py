"""Weight x gradient of every structure, with no more gradients in memory at once than asked for.

A gradient is folded into its structures and freed as soon as the backward pass has made it. With several calibration batches
the mean gradient must be whole before its absolute value is taken, so an accumulator stands beside each weight of the pass;
where all of them would not fit, the weights take turns and the calibration set is passed over several times, same bits.
"""

# S structures

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.errors import FedsimError
from fedsim.pruning.structures import StructureMap

Objective = Callable[[nn.Module, Any], Tensor]
Scores = NDArray[np.float64]
OwnedSums = Sequence[tuple[int, Scores]]  # first structure of a block, and what each (n,) of it owns of one weight
WeightAggregate = Literal["sum_abs", "sum_squares", "taylor2"]


def weight_scores(
    model: nn.Module,
    smap: StructureMap,
    objective: Objective,
    batches: Sequence[Any],
    *,
    aggregate: WeightAggregate,
    each: bool,
    gradient_bytes: int | None,
) -> Scores:
    """Importance (S,) summed over the weights a structure owns, by the mean loss over ``batches``, in float32 or wider.

    ``each`` averages absolute gradients of single examples. ``gradient_bytes`` bounds the accumulators held at once (one weight's at least).
    """
    weights = owned_weights(model, smap)
    sums: dict[str, OwnedSums] = {}
    for names in _turns(weights, gradient_bytes, 2 if aggregate == "taylor2" else 1):
        fold = _Fold(aggregate, each, smap, sums, {name: weights[name] for name in names}, _number_of_examples(batches))
        with _only(model, fold.weights.values()):
            fold.run(model, objective, batches)
    return added_up(smap, sums)


@dataclass(eq=False)
class _Fold:
    """Gradients of ``weights`` over the calibration set, folded into what their structures own of each: ``found``, by weight."""

    aggregate: WeightAggregate
    each: bool
    smap: StructureMap
    found: dict[str, OwnedSums]
    weights: Mapping[str, nn.Parameter]
    examples: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    broken: bool = False
    last: bool = False

    def run(self, model: nn.Module, objective: Objective, batches: Sequence[Any]) -> None:
        single = self.each or self.aggregate == "taylor2"
        handles = [w.register_post_accumulate_grad_hook(self._hook(name)) for name, w in self.weights.items()]  # type: ignore[no-untyped-call]
        try:
            for number, batch in enumerate(batches):
                parts = list(examples_of(batch)) if single else [batch]
                for i, part in enumerate(parts):
                    self.last = number == len(batches) - 1 and i == len(parts) - 1
                    losses = finite_losses(objective, model, part, number)
                    losses.sum().backward(inputs=list(self.weights.values()))  # type: ignore[no-untyped-call]
                if self.broken:
                    raise FedsimError(f"a gradient became non-finite in calibration batch {number}; nothing was pruned")
            for name in list(self.sums):  # weights that the last example did not reach
                self._finish(name, self.sums.pop(name))
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            gradient = weight.grad
            assert gradient is not None, "the hook runs after a gradient was accumulated"
            weight.grad = None
            self._take(name, gradient.to(_wide(gradient)))

        return take

    def _take(self, name: str, gradient: Tensor) -> None:
        self.broken |= not bool(gradient.sum().isfinite())
        if self.aggregate == "taylor2":
            _accumulate(self.squares, name, gradient**2)
        summed = _accumulate(self.sums, name, gradient.abs() if self.each else gradient)
        if self.last:
            self._finish(name, summed)
            del self.sums[name]

    def _finish(self, name: str, summed: Tensor) -> None:
        self.found[name] = first_order(
            *(self.smap, name, self.weights[name], summed / self.examples, self.aggregate),
            square=self.squares.pop(name) / self.examples if self.aggregate == "taylor2" else None,
        )


def first_order(
    smap: StructureMap, name: str, weight: Tensor, mean: Tensor, aggregate: WeightAggregate, *, square: Tensor | None = None
) -> OwnedSums:
    """Importance of every scalar of the weight ``name``, of its ``mean`` gradient and mean ``square``, added up by structure."""
    weight = weight.detach().to(mean)
    first = weight * mean
    if square is not None:
        first = first - 0.5 * weight**2 * square
    importance = first**2 if aggregate == "sum_squares" else first.abs()
    found = []
    for number, block in enumerate(smap.blocks):
        for member in block.members:
            if member.weight == name:
                rows = importance.movedim(member.dim, 0).flatten(1).sum(1) if importance.ndim > 1 else importance
                owned = rows[torch.from_numpy(member.positions).to(rows.device)].double().sum(1)
                found.append((int(smap.starts[number]), owned.cpu().numpy()))
    return found


def added_up(smap: StructureMap, sums: Mapping[str, OwnedSums]) -> Scores:
    """Scores (S,), the weights in the order of the map: whichever gradient was ready first changes no bit."""
    total = np.zeros(len(smap))
    for weight in smap.weights:
        for start, owned in sums.get(weight.name, ()):
            total[start : start + len(owned)] += owned
    return total


def batch_gradients(model: nn.Module, smap: StructureMap, objective: Objective, batch: Any, number: int) -> dict[str, Tensor]:
    """Gradients of the summed loss of calibration batch ``number``, for every weight that structures own, in float32 or wider."""
    weights = owned_weights(model, smap)
    with _only(model, weights.values()):
        losses = finite_losses(objective, model, batch, number)
        found = torch.autograd.grad(losses.sum(), list(weights.values()), materialize_grads=True, allow_unused=True)
    if not all(bool(g.sum().isfinite()) for g in found):
        raise FedsimError(f"a gradient became non-finite in calibration batch {number}; nothing was pruned")
    return {name: g.to(_wide(g)) for name, g in zip(weights, found, strict=True)}


def owned_weights(model: nn.Module, smap: StructureMap) -> dict[str, nn.Parameter]:
    """Parameters that structures own, by name, in the order of the map."""
    owned = {m.weight for b in smap.blocks for m in b.members}
    return {w.name: model.get_parameter(w.name) for w in smap.weights if w.parameter and w.name in owned}


def finite_losses(objective: Objective, model: nn.Module, batch: Any, number: int) -> Tensor:
    """Losses (B,) of calibration batch ``number``; ``FedsimError`` for one that is not finite, ``ValueError`` for another shape."""
    losses = objective(model, batch)
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"the objective must return one loss per example, got shape {tuple(losses.shape)} for calibration batch {number}")
    if not bool(torch.isfinite(losses).all()):
        example = int(torch.nonzero(~torch.isfinite(losses))[0, 0])
        raise FedsimError(
            f"the loss of example {example} of calibration batch {number} is {float(losses[example].detach())}; nothing was pruned"
        )
    return losses


def examples_of(batch: Any) -> Iterator[Any]:
    """The batch one example at a time, a named tuple of the same type or a plain one."""
    made = getattr(type(batch), "_make", tuple)
    for i in range(len(batch[0])):
        yield made(part[i : i + 1] for part in batch)


def _number_of_examples(batches: Sequence[Any]) -> int:
    return sum(len(batch[0]) for batch in batches)


def _accumulate(into: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    into[name] = into[name].add_(value) if name in into else value
    return into[name]


def _turns(weights: Mapping[str, nn.Parameter], gradient_bytes: int | None, accumulators: int) -> Iterator[list[str]]:
    """Names of weights whose accumulators fit together, from the last layer to the first: later layers need no graph of earlier ones."""
    turn: list[str] = []
    held = 0
    for name, weight in reversed(list(weights.items())):
        size = accumulators * weight.numel() * torch.empty(0, dtype=_wide(weight)).element_size()
        if turn and gradient_bytes is not None and held + size > gradient_bytes:
            yield turn
            turn, held = [], 0
        turn.append(name)
        held += size
    if turn:
        yield turn


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def _only(model: nn.Module, weights: Any) -> Iterator[None]:
    """Inside the block only ``weights`` require gradients, and hold none from before."""
    chosen = {id(w) for w in weights}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
