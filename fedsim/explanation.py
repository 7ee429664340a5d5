"""What a simulation will cost, before it starts: bytes, FLOPs and simulated seconds by a dry run, seconds of this machine from a measured block, memory by counting.

What is booked is exact, see :mod:`fedsim.dry_run`; seconds are an estimate, given with the spread of what it rests on.
"""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedsim.deployment import CLIENTS_PER_UNIT, prune_clients
from fedsim.dry_run import DryRun, Pace, Totals
from fedsim.errors import FedsimError
from fedsim.evaluation import BATCH, evaluate_unit
from fedsim.pruning import Submodel
from fedsim.retracing import training_of
from fedsim.rounds import Training
from fedsim.runs.text import aligned, duration, plural, size
from fedsim.runtime.batching import padded
from fedsim.runtime.executor import Executor
from fedsim.runtime.serial import SerialExecutor
from fedsim.serving import TICKS_PER_BLOCK, ServeUnit, serve_block
from fedsim.simulation import check, world
from fedsim.submodels import DenseModel, Variant
from fedsim.tuning import Bench, first_clients

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

_REPETITIONS, _TRIAL_SECONDS = 5, 0.3
_PROCESS = 300_000_000  # bytes of a worker with torch before it has done anything
_TRIP = 0.005  # seconds a map over workers takes beside the work
_MONITORED = 2000  # clients on which a tick's array code is timed


@dataclass(frozen=True)
class Estimate:
    """Seconds: the median of the measurements it rests on, and what their lowest and highest would give."""

    median: float
    low: float
    high: float

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.median + other.median, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> "Estimate":
        return Estimate(self.median * factor, self.low * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{duration(self.median)} ({duration(self.low)} to {duration(self.high)})"


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A plan with its costs. ``refused`` says why it cannot run, and is empty where it can; the rest is then as described.

    ``totals`` are exact where all ``rounds`` were ``planned``, else extrapolated from the first ones. ``seconds`` of this machine, by stage; ``memory`` in bytes, by holder.
    """

    refused: str = ""
    rounds: int = 0
    planned: int = 0
    totals: Totals = dataclasses.field(default_factory=Totals)
    seconds: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
    memory: Mapping[str, int] = dataclasses.field(default_factory=dict)
    workers: int = 1
    lanes: int = 1
    gpus: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the dry run went through every round."""
        return self.planned == self.rounds

    def table(self) -> str:
        """All of it, as text."""
        if self.refused:
            return "\n".join([f"refused: {self.refused}", *self.notes])
        t = self.totals
        basis = "exact" if self.exact else f"extrapolated from the first {self.planned:,} rounds"
        booked = [
            ["sent", size(t.bytes_up)],
            ["received", size(t.bytes_down)],
            ["of both, in vain", size(t.wasted_bytes)],
            ["FLOPs", f"{t.flops:.3g}"],
            ["simulated time", duration(t.clock)],
            ["uploads", f"{t.uploads:,}"],
            ["clients that take part", f"{t.clients:,}"],
        ]
        times = [[name, str(estimate)] for name, estimate in self.seconds.items()]
        held = [[name, size(count)] for name, count in self.memory.items()]
        gpu = f"{self.gpus:g} of a GPU for each worker" if self.gpus else "no GPU needed"
        where = f"on this machine, {plural(self.workers, 'worker')}, {plural(self.lanes, 'lane')}, {gpu}"
        return "\n\n".join(
            [
                aligned([f"training, {self.rounds:,} rounds ({basis})", ""], booked),
                aligned([where, "median (lowest to highest)"], times),
                aligned(["memory", ""], held),
                *(["\n".join(self.notes)] if self.notes else []),
            ]
        )


def explain(
    simulation: "Simulation", executor: Executor | None = None, *, workers: int | None = None, seconds: float = 30.0
) -> Explanation:
    """What ``simulation`` will cost on ``executor``, or on ``workers`` of this machine (default: one a core); nothing is stored.

    The dry run ends after ``seconds`` and extrapolates from there, which it says. The trial measures in this process: other machines differ.
    """
    count = (executor.workers if executor else workers) or os.cpu_count() or 1
    with warnings.catch_warnings(record=True) as said, SerialExecutor() as local:
        warnings.simplefilter("always")
        try:
            checks = _timed(
                lambda: check(replace(simulation, monitoring=replace(simulation.monitoring)))
            )  # a design is kept by its monitoring
            training = training_of(simulation, local)
            pace, spread = _pace(training)
            dry = DryRun.of(training, pace, count, seconds)
        except (ValueError, FedsimError) as error:
            return Explanation(refused=" ".join(str(error).split()))
        stages = {
            "check the plan": Estimate(checks, checks, checks),
            "train": _train_seconds(training, dry, spread, count, simulation.evaluate_every),
            **_later_seconds(simulation, training, count),
        }
    return Explanation(
        rounds=simulation.rounds,
        planned=dry.planned,
        totals=dry.totals,
        seconds={**stages, "together": sum(stages.values(), Estimate(0.0, 0.0, 0.0))},
        memory=_memory(simulation, training, dry.totals.clients),
        workers=count,
        lanes=training.lanes,
        gpus=executor.gpus_per_worker if executor else 0.0,
        notes=(*dict.fromkeys(str(w.message) for w in said), *_notes(simulation, training, count)),
    )


def _pace(training: Training) -> tuple[Pace, Estimate]:
    """Of one block of the first round's clients, from one local step and from many; and its spread, as multiples of the median."""
    clients = first_clients(training)[: training.lanes]
    bench, lanes = Bench(training, clients), padded(len(clients), training.lanes)
    bench.seconds(training.lanes, 1)
    whole = int(training.strategy.steps(training.shards.sizes[clients]).max())
    steps = int(np.clip(_TRIAL_SECONDS / bench.seconds(training.lanes, 1), 2, max(2, whole)))
    many, one = (_trial(lambda: bench.seconds(training.lanes, count)) for count in (steps, 1))  # noqa: B023 - called at once
    step = max(0.0, many.median - one.median) / (steps - 1)
    return Pace(max(0.0, one.median - step), step / lanes), many * (1.0 / many.median)


def _train_seconds(training: Training, dry: DryRun, spread: Estimate, workers: int, evaluate_every: int) -> Estimate:
    """The busiest worker's blocks, the driver's own work, the trips between them, and the evaluations."""
    own = dry.driver + (dry.maps * _TRIP if workers > 1 else 0.0)
    evaluations = training.rounds // evaluate_every + (training.rounds % evaluate_every > 0)
    return spread * dry.compute + Estimate(own, own, own) + _test_seconds(training, workers) * evaluations


def _test_seconds(training: Training, workers: int) -> Estimate:
    """One evaluation on the test split."""
    examples = len(training.data.test)
    params = training.layout.flatten(training.task.build(training.seed))
    inputs = {"task": training.task, "test": training.data.test, "params": params, "seed": training.seed}
    unit, batches = [(0, min(BATCH, examples))], -(-examples // BATCH)
    return _trial(lambda: _timed(lambda: training.executor.map(evaluate_unit, [unit], inputs))) * (batches / min(workers, batches))


def _later_seconds(simulation: "Simulation", training: Training, workers: int) -> dict[str, Estimate]:
    """Deployment, from one client's calibration; serving, from one client's block of ticks and one tick of watching, without reactions."""
    task, pruner, fleet, local = simulation.task, simulation.deployment, simulation.fleet, training.executor
    params = training.layout.flatten(task.build(training.seed))
    dense = DenseModel.of(task, params, pruner)
    shared = {"task": task, "params": params, "gisp": pruner, "model": dense.digest, "stream": world(simulation)}
    own = training.shards.shard(int(training.holders[0])) if pruner.calibration == "client" else np.arange(len(training.data.train))
    calibration, sets = own[: pruner.calibration_examples], len(fleet) if pruner.calibration == "client" else 1
    deploy = _trial(lambda: _timed(lambda: local.map(prune_clients, [[calibration]], shared)))
    ticks = min(TICKS_PER_BLOCK, simulation.serving.ticks)
    unit = ServeUnit(0, ticks, (int(training.holders[0]),), (Variant(Submodel.dense(dense.smap)),))
    serve = _trial(lambda: _timed(lambda: local.map(serve_block, [unit], shared)))
    active = np.logical_or.reduce([simulation.serving.active(t, len(fleet), simulation.seed) for t in range(ticks)])
    passes = int(active.sum()) * -(-simulation.serving.ticks // TICKS_PER_BLOCK) * (1 if max(pruner.levels) == 0 else 2)
    watch = _watch_seconds(simulation) * simulation.serving.ticks
    return {
        "deploy": deploy * (sets / min(workers, -(-sets // CLIENTS_PER_UNIT))),
        "serve": serve * (passes / min(workers, passes)) + watch,
    }


def _watch_seconds(simulation: "Simulation") -> Estimate:
    """One tick of the monitor over the fleet."""
    count = min(_MONITORED, len(simulation.fleet))
    state, losses, everyone = simulation.monitoring.init(count), np.ones(count), np.ones(count, bool)
    return _trial(lambda: _timed(lambda: simulation.monitoring.step(state, losses, everyone))) * (len(simulation.fleet) / count)


def _trial(seconds: Callable[[], float]) -> Estimate:
    """Median and range of a few measurements, after one that warms up."""
    seconds()
    found = sorted(seconds() for _ in range(_REPETITIONS))
    return Estimate(found[_REPETITIONS // 2], found[0], found[-1])


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _memory(simulation: "Simulation", training: Training, clients: int) -> dict[str, int]:
    """Bytes by holder. A strategy's state of a client is written when it first takes part; twice as many rows may lie on disk before they are merged."""
    num, kept = len(simulation.fleet), training.shapes[0].trained.sizes.memory * np.dtype(training.layout.dtype).itemsize
    found = {
        "model": training.layout.bytes,
        "data, here and once for all workers": sum(_bytes(part) for part in training.data),
        "fleet and shards": _bytes(simulation.fleet) + _bytes(training.shards) + (8 * num if kept else 0),
        "watching the fleet": num * (_bytes(simulation.monitoring.init(1)) + 8 * simulation.monitoring.calibration),
        "each worker": _PROCESS + training.layout.bytes + _block_bytes(training),
    }
    return found | ({"what clients keep, on disk": 2 * kept * clients} if kept else {})


def _bytes(value: Any) -> int:
    """Of all arrays in a dataclass, a mapping or a tuple."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    parts: Sequence[Any] = ()
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, tuple):
        parts = value
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, f.name) for f in dataclasses.fields(value)]
    return sum(map(_bytes, {id(part): part for part in parts}.values()))


def _block_bytes(training: Training) -> int:
    """A block of lanes at work: weights, gradients, momenta and shifts, and what the backward pass needs."""
    strategy, model = training.strategy, training.task.build(training.seed).train()
    held = {p.data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in held:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    train = training.data.train
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.random.fork_rng(devices=[]):
        training.task.losses(model, train.batch(np.arange(strategy.batch_size) % len(train))).mean()
    copies = 2 + (strategy.momentum > 0) + (training.shapes[0].trained.sizes.strategy > 0)
    return training.lanes * (copies * training.layout.bytes + sum(saved.values()))


def _notes(simulation: "Simulation", training: Training, workers: int) -> list[str]:
    notes = [training.lanes_note] if training.lanes_note else []
    if workers > 1:
        notes.append("starting Ray adds some seconds")
    if simulation.recovery_rounds:
        notes.append(
            f"recovery_rounds={simulation.recovery_rounds} for each pruned level come on top: what they cost depends on what is pruned"
        )
    notes.append("re-pruning is not in the seconds: how often depends on alarms")
    return notes
