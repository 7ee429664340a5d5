"""Pruning with the calibration set split over workers: the same trajectory, bit for bit, as in one process on one thread.

Each batch is a unit that returns the sum of its gradients; the driver adds them up in the order of the batches and only then takes
absolute values. (Workers that averaged |weight x gradient| of their own would be another estimator.)
"""

# S structures

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.encoding import digest
from fedsim.parameters import Layout
from fedsim.pruning import GISP, FirstOrder, OneShot, PruningTrajectory, StructureMap
from fedsim.pruning.gates import gated
from fedsim.pruning.gradients import Objective, Scores, added_up, batch_gradients, first_order, owned_weights
from fedsim.pruning.importance import Importance, normalised
from fedsim.pruning.structures import Bools
from fedsim.pruning.submodel import cut_to
from fedsim.pruning.tracing import evaluating
from fedsim.runtime.executor import Executor
from fedsim.tasks.base import Batch, Task


def trajectory_on_workers(
    pruner: GISP | OneShot, task: Task, model: nn.Module, batches: Sequence[Batch], executor: Executor, objective: Objective | None = None
) -> PruningTrajectory:
    """``pruner.trajectory`` of ``model``, built by ``task``, with a unit of work for each of ``batches``; by ``task.losses`` unless ``objective`` says otherwise.

    The driver holds the gradients of one batch a worker and their sum, a worker those of one batch, whatever ``gradient_bytes`` says: it
    changes no bit, and is for one process. Raises ``ValueError`` for an importance that is no mean gradient of weights once its defaults
    are those for the model, and for frozen parameters, which would not travel.
    """
    smap = task.structures(model, couple_residual=pruner.couple_residual)
    method = _splittable(pruner.importance, smap)
    if frozen := [name for name, parameter in model.named_parameters() if not parameter.requires_grad]:
        raise ValueError(
            f"workers are sent trainable parameters only, and {frozen[:3]} of the model are frozen; let them require gradients"
        )
    params = Layout.of(model).flatten(model)
    key = digest(task, params, pruner.couple_residual)
    shared = {
        **{"task": executor.share(task), "params": executor.share(params), "model": key, "objective": objective},
        **{"couple_residual": pruner.couple_residual, "compact": method.compact},
    }
    split = _OnWorkers(method, executor, shared)
    return replace(pruner, importance=split).trajectory(model, smap, objective or task.losses, batches)


def gradients_of(unit: tuple[int, Batch, Bools], shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> dict[str, NDArray[Any]]:
    """Summed gradients of one batch for the weights that structures own, of the model with only the structures kept (S,)."""
    number, batch, kept = unit
    key = ("calibrating", shared["model"])
    if key not in cache:
        module = shared["task"].build(0)
        Layout.of(module).load(module, shared["params"])
        cache[key] = module.eval(), shared["task"].structures(module, couple_residual=shared["couple_residual"])
    dense, whole = cache[key]
    module, smap, alive = _alive(dense, whole, kept, cut=shared["compact"])
    own = Batch(*(torch.from_numpy(np.array(part)) for part in batch))
    with evaluating(module), gated(module, smap, alive, record=False):
        found = batch_gradients(module, smap, shared["objective"] or shared["task"].losses, own, number)
    return {name: gradient.cpu().numpy() for name, gradient in found.items()}


@dataclass(frozen=True)
class _OnWorkers:
    """``method``, resolved, with its gradients computed by ``executor``."""

    method: FirstOrder
    executor: Executor
    shared: Mapping[str, Any]

    def scores(self, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
        assert self.method.aggregate == "sum_abs" or self.method.aggregate == "sum_squares", "checked before"
        summed, examples = self._summed(batches, kept), sum(len(batch[0]) for batch in batches)
        small, left, alive = _alive(model, smap, kept, cut=self.shared["compact"])
        sums = {
            name: first_order(left, name, weight, summed.pop(name) / examples, self.method.aggregate)
            for name, weight in owned_weights(small, left).items()
        }
        raw = np.zeros(len(smap))
        raw[kept if len(alive) < len(smap) else slice(None)] = added_up(left, sums)
        return normalised(raw, self.method.normalise, smap, kept)

    def _summed(self, batches: Sequence[Any], kept: Bools) -> dict[str, Tensor]:
        """Gradients of all batches, added in their order; those of as many batches as there are workers are held at once."""
        total: dict[str, Tensor] = {}
        for start in range(0, len(batches), self.executor.workers):
            some = enumerate(batches[start : start + self.executor.workers], start)
            units = [(number, Batch(*(part.cpu().numpy() for part in batch)), kept) for number, batch in some]
            for found in self.executor.map(gradients_of, units, self.shared):
                for name, gradient in found.items():
                    own = torch.from_numpy(np.array(gradient))
                    total[name] = total[name].add_(own) if name in total else own
        return total


def _splittable(importance: Importance, smap: StructureMap) -> FirstOrder:
    """``importance`` with its defaults for ``smap`` written out. ``ValueError`` unless gradients can be added up before it."""
    if not isinstance(importance, FirstOrder):
        raise ValueError(f"calibration is split over workers for FirstOrder importance, got {importance!r}")
    method = importance.resolved(smap)
    for name, allowed in (("aggregate", ("sum_abs", "sum_squares")), ("reduce", ("mean_then_abs",))):
        if getattr(method, name) not in allowed:
            raise ValueError(
                f"calibration is split over workers for {name} in {allowed}, and for this model it is {getattr(method, name)!r}"
            )
    return method


def _alive(model: nn.Module, smap: StructureMap, kept: Bools, *, cut: bool) -> tuple[nn.Module, StructureMap, Bools]:
    """The model to differentiate, its map, and which of its structures are not silenced: all of them where the rest is ``cut`` out."""
    if not cut:
        return model, smap, kept
    small, left = cut_to(model, smap, kept)
    return small, left, np.ones(len(left), np.bool_)
