"""Pruning with the calibration set split over workers: the same trajectory, bit for bit, as in one process.

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
from torch import nn

from fedsim.encoding import digest
from fedsim.parameters import Layout
from fedsim.pruning import GISP, FirstOrder, OneShot, PruningTrajectory, StructureMap, Submodel
from fedsim.pruning.gradients import Objective, Scores, add_by_structure, batch_gradients, owned_weights
from fedsim.pruning.importance import normalised
from fedsim.pruning.structures import Bools
from fedsim.pruning.tracing import evaluating
from fedsim.runtime.executor import Executor
from fedsim.tasks.base import Batch, Task


def trajectory_on_workers(
    pruner: GISP | OneShot, task: Task, model: nn.Module, batches: Sequence[Batch], executor: Executor, objective: Objective | None = None
) -> PruningTrajectory:
    """``pruner.trajectory`` of ``model``, built by ``task``, with a unit of work for each of ``batches``; by ``task.losses`` unless ``objective`` says otherwise.

    Raises ``ValueError`` for an importance that is no mean gradient of weights.
    """
    method = pruner.importance
    smap = task.structures(model)
    if not isinstance(method, FirstOrder) or (method.aggregate or ("sum_abs" if smap.attends else "gate")) not in (
        "sum_abs",
        "sum_squares",
    ):
        raise ValueError(f"calibration is split over workers for aggregate='sum_abs' and 'sum_squares', got {method!r}")
    if (method.reduce or "mean_then_abs") != "mean_then_abs":
        raise ValueError(f"calibration is split over workers for reduce='mean_then_abs', got {method.reduce!r}")
    params = Layout.of(model).flatten(model)
    shared = {"task": executor.share(task), "params": executor.share(params), "model": digest(task, params), "objective": objective}
    split = _OnWorkers(method, executor, shared)
    return replace(pruner, importance=split).trajectory(model, smap, objective or task.losses, batches)


def gradients_of(unit: tuple[int, Batch, Bools], shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> dict[str, NDArray[Any]]:
    """Summed gradients of one batch for the weights that structures own, of the model cut to the structures kept (S,)."""
    number, batch, kept = unit
    key = ("calibrating", shared["model"])
    if key not in cache:
        module = shared["task"].build(0)
        Layout.of(module).load(module, shared["params"])
        cache[key] = module.eval(), shared["task"].structures(module)
    module, smap = cache[key]
    small, left = (module, smap) if kept.all() else (Submodel(kept, smap.fingerprint).sliced(module, smap), smap.cut(kept))
    own = Batch(*(torch.from_numpy(np.array(part)) for part in batch))
    with evaluating(small):
        found = batch_gradients(small, left, shared["objective"] or shared["task"].losses, own, number)
    return {name: gradient.cpu().numpy() for name, gradient in found.items()}


@dataclass(frozen=True)
class _OnWorkers:
    """``method``, always cut out, with its gradients computed by ``executor``."""

    method: FirstOrder
    executor: Executor
    shared: Mapping[str, Any]

    def scores(self, model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any], kept: Bools) -> Scores:
        units = [(number, Batch(*(part.numpy() for part in batch)), kept) for number, batch in enumerate(batches)]
        found = self.executor.map(gradients_of, units, self.shared)
        small, left = (model, smap) if kept.all() else (Submodel(kept, smap.fingerprint).sliced(model, smap), smap.cut(kept))
        total = np.zeros(len(left))
        examples = sum(len(batch[0]) for batch in batches)
        for name, weight in owned_weights(small, left).items():
            summed = torch.from_numpy(np.array(found[0][name]))
            for later in found[1:]:
                summed.add_(torch.from_numpy(np.array(later[name])))
            first = weight.detach().to(summed.dtype) * (summed / examples)
            add_by_structure(total, left, name, first**2 if self.method.aggregate == "sum_squares" else first.abs())
        raw = np.zeros(len(smap))
        raw[kept] = total
        return normalised(raw, self.method.normalise, smap, kept)
