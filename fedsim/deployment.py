"""From one trained model to a submodel for every client: the deploy stage."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedsim.capacity import Capacity
from fedsim.fleet import Fleet
from fedsim.pruning import Pruner, Submodel, lacking
from fedsim.randomness import permutations, rng_for
from fedsim.records import Deployment, Round
from fedsim.rounds import Training, TrainState
from fedsim.runtime.executor import Executor
from fedsim.submodels import DenseModel, Deployed, Variant, dense_model
from fedsim.tasks import Batch, Dataset, Task
from fedsim.tasks.base import Wrapped

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

Floats = NDArray[np.floating]
CLIENTS_PER_UNIT = 8
_CALIBRATION_BATCH = 256


def deploy(*, task: Task, fleet: Fleet, pruner: Pruner, capacity: Capacity, params: Floats, seed: int, executor: Executor) -> Deployed:
    """Prune ``params`` (P,) at every level, on the fleet's data or on each client's own, and give each client what it can hold.

    Raises ``CapacityError`` naming a device for which every level is too large.
    """
    dense = DenseModel.of(task, params, pruner)
    train = task.data().train
    calibration = _calibration_sets(pruner, fleet, train, seed)
    chunks = [calibration[i : i + CLIENTS_PER_UNIT] for i in range(0, len(calibration), CLIENTS_PER_UNIT)]
    shared = {"task": executor.share(task), "params": executor.share(params), "gisp": pruner, "model": dense.digest}
    kept = np.concatenate(executor.map(prune_clients, chunks, shared))
    return _assign(dense, kept, pruner, capacity, fleet)


def prune_clients(unit: Sequence[NDArray[np.int64]], shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> NDArray[np.bool_]:
    """Kept structures (n, L, S) at every level, one trajectory for each calibration set of training examples."""
    task, pruner = shared["task"], shared["gisp"]
    dense = dense_model(shared, cache)
    train = task.data().train
    return np.stack([_levels(dense, pruner, task, _batches(train, indices)) for indices in unit])


def record(deployed: Deployed, dense: DenseModel, fleet: Fleet, levels: Sequence[float]) -> Deployment:
    """What was deployed, as columns over clients."""
    unique = [v.submodel for v in deployed.variants]
    columns = {
        "sparsity": np.array([s.sparsity(dense.smap) for s in unique]),
        "parameters": np.array([s.parameters(dense.smap) for s in unique]),
        "bytes": np.array([lacking(None, s, dense.smap) for s in unique]),
        "flops": np.array([float(s.flops(dense.smap)) for s in unique]),
    }
    return Deployment(
        clients={
            "client": np.arange(len(fleet)),
            "device": np.array(fleet.device_names)[fleet.device],
            "group": fleet.group,
            "level": np.asarray(levels, np.float64)[deployed.level],
            **{name: values[deployed.variant] for name, values in columns.items()},
        }
    )


def _levels(dense: DenseModel, pruner: Pruner, task: Task, batches: Sequence[Batch]) -> NDArray[np.bool_]:
    trajectory = pruner.trajectory(dense.module, dense.smap, task.losses, batches)
    return np.stack([trajectory.at(level).kept for level in pruner.levels])


def _calibration_sets(pruner: Pruner, fleet: Fleet, train: Dataset, seed: int) -> list[NDArray[np.int64]]:
    """Training examples to calibrate on: of the whole fleet (one set), or of each client's shard."""
    size = pruner.calibration_examples
    if pruner.calibration == "global":
        return [np.sort(rng_for(seed, "calibration").permutation(len(train))[:size])]
    shards = fleet.shards(train)
    orders = permutations(seed, "calibration", np.arange(len(fleet)), 0, shards.sizes)
    return [shards.shard(c)[orders[c, : min(size, int(shards.sizes[c]))]] for c in range(len(fleet))]


def _batches(data: Dataset, indices: NDArray[np.int64]) -> list[Batch]:
    return [data.batch(indices[i : i + _CALIBRATION_BATCH]) for i in range(0, len(indices), _CALIBRATION_BATCH)]


def _assign(dense: DenseModel, kept: NDArray[np.bool_], pruner: Pruner, capacity: Capacity, fleet: Fleet) -> Deployed:
    """Levels from sizes; a trajectory stops one structure short of its level, so sizes are those of the submodels themselves."""
    removed = dense.smap.removed_counts(kept)
    sizes, flops = dense.smap.cost("bytes", removed), dense.smap.cost("flops", removed)
    level = capacity.levels(fleet, sizes, flops)
    owner = np.arange(len(fleet)) if pruner.calibration == "client" else np.zeros(len(fleet), np.int64)
    num = len(pruner.levels)
    used, variant = np.unique(owner * num + level, return_inverse=True)
    submodels = [
        Submodel(kept[o, i], dense.smap.fingerprint, float(pruner.levels[i])) for o, i in zip(used // num, used % num, strict=True)
    ]
    return Deployed(level=level, variant=variant.reshape(-1), variants=tuple(Variant(s) for s in submodels))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cut(Wrapped):
    """A task whose model is a submodel of ``task``'s trained one: what recovery trains."""

    task: Task
    params: Floats
    pruner: Pruner
    submodel: Submodel

    def build(self, seed: int) -> nn.Module:
        return DenseModel.of(self.task, self.params, self.pruner).sliced(Variant(self.submodel)).train()


def recover(simulation: "Simulation", trained: TrainState, deployed: Deployed, executor: Executor) -> tuple[Deployed, list[Round]]:
    """``deployed`` with every pruned variant trained by the fleet for ``recovery_rounds``, as the dense model was, and the rounds that took.

    Rounds, cohorts and the clock go on where training stopped.
    """
    variants, rounds = [], []
    state = trained
    for variant in deployed.variants:
        if variant.submodel.kept.all():
            variants.append(variant)
            continue
        state, found = _recovered(simulation, trained.params, variant, state, executor)
        variants.append(replace(variant, weights=state.params))
        rounds += found
    return replace(deployed, variants=tuple(variants)), rounds


def _recovered(
    simulation: "Simulation", params: Floats, variant: Variant, state: TrainState, executor: Executor
) -> tuple[TrainState, list[Round]]:
    last = state.round + simulation.recovery_rounds
    training = Training.prepare(
        task=_Cut(task=simulation.task, params=params, pruner=simulation.deployment, submodel=variant.submodel),
        fleet=simulation.fleet,
        strategy=simulation.strategy,
        communication=simulation.communication,
        rounds=last,
        evaluate_every=last,
        lanes=simulation.lanes,
        device=simulation.device,
        availability=simulation.availability,
        deadline=simulation.deadline,
        dropout=simulation.dropout,
        seed=simulation.seed,
        executor=executor,
    )
    state, rounds = replace(training.init(), round=state.round, clock=state.clock), []
    while state.round < last:
        state, found = training.step(state)
        rounds.append(replace(found, note="; ".join(filter(None, [f"recovery of level {variant.submodel.level:g}", found.note]))))
    return state, rounds
