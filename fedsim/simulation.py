"""A whole experiment as one frozen value, and the generator that runs it: train, deploy, serve."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.availability import Availability, Independent
from fedsim.capacity import Capacity
from fedsim.communication import Uniform, UploadSchedule
from fedsim.deployment import deploy, record, recover
from fedsim.fleet import Fleet
from fedsim.monitoring import Monitoring
from fedsim.parameters import Layout
from fedsim.policies import Never, Policy
from fedsim.pruning import GISP, Pruner
from fedsim.records import Deployment, Record, Round
from fedsim.rounds import Training, TrainState
from fedsim.runtime.executor import Executor
from fedsim.serving import Memo, Server, ServingState
from fedsim.stragglers import Deadline, Dropout
from fedsim.strategies import Strategy
from fedsim.stream import Serving, Stream
from fedsim.submodels import DenseModel, Deployed
from fedsim.tasks import Task
from fedsim.workers import Workers

if TYPE_CHECKING:
    from fedsim.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Everything that decides a run's numbers. Two equal Simulations give equal tables, on any machine of one kind.

    ``rounds`` of training with ``strategy`` under the upload schedule ``communication``; submodels from ``deployment`` for
    devices that ``capacity`` measures, universal ones trained for ``recovery_rounds`` more; ``serving`` with
    ``monitoring`` and ``policy``, whose jobs queue for ``workers``. ``lanes`` is the width of batched client blocks
    (``None``: by rule from the model), ``device`` where they train. ``availability`` says when clients take part in training, ``deadline`` how long a round waits for them,
    ``dropout`` how often one vanishes. Raises ``ValueError`` for parts that contradict each other.
    """

    task: Task
    fleet: Fleet
    strategy: Strategy
    communication: UploadSchedule = field(default_factory=Uniform)
    rounds: int = 50
    evaluate_every: int = 5
    lanes: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    availability: Availability = field(default_factory=Independent)
    deadline: Deadline | None = None
    dropout: Dropout | None = None
    deployment: Pruner = field(default_factory=GISP)
    capacity: Capacity = field(default_factory=Capacity)
    recovery_rounds: int = 0
    serving: Serving = field(default_factory=Serving)
    monitoring: Monitoring = field(default_factory=Monitoring)
    policy: Policy = field(default_factory=Never)
    workers: Workers = field(default_factory=Workers)
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("evaluate_every", 1), ("recovery_rounds", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.recovery_rounds and self.deployment.calibration == "client":
            raise ValueError("recovery_rounds trains universal submodels and needs GISP(calibration='global'), got calibration='client'")
        if self.monitoring.calibration >= self.serving.ticks:
            raise ValueError(
                f"monitoring.calibration={self.monitoring.calibration} leaves nothing of serving.ticks={self.serving.ticks} to watch"
            )


@dataclass(frozen=True, eq=False)
class Step:
    """One indivisible advance of a stage: the records it yields and the state from which the next one follows."""

    stage: str
    index: int
    state: Any
    records: tuple[Record, ...]


def run(simulation: Simulation, executor: Executor | None = None) -> Iterator[Record]:
    """Run ``simulation`` and yield its records in order; nothing is stored.

    A ``for`` loop over it is the place for what other tools make callbacks. ``executor`` defaults to the serial one.
    """
    from fedsim.runtime.serial import SerialExecutor

    check(simulation)
    workers = executor or SerialExecutor()
    for step in train_steps(simulation, workers):
        yield from step.records
    trained = step.state
    deployed, recovery = deploy_stage(simulation, trained, workers)
    yield from recovery
    yield deployment_record(simulation, trained.params, deployed)
    for step in serve_steps(simulation, trained.params, deployed, workers):
        yield from step.records


def check(simulation: Simulation) -> None:
    """What can be known before any work starts: raises ``ValueError`` or ``CapacityError`` where a part cannot do what another asks of it.

    The untrained model is traced and pruned once, so an unreachable level or a device that holds none is named now. Warns of
    changes that come before the monitor has learnt what is normal.
    """
    task, fleet, pruner = simulation.task, simulation.fleet, simulation.deployment
    simulation.monitoring.fitted  # noqa: B018 - an impossible design raises
    simulation.serving.active(0, len(fleet), simulation.seed)
    train = task.data().train
    sizes = fleet.shards(train).sizes
    if pruner.calibration == "client" and not sizes.all():
        raise ValueError(f"client {int(np.argmin(sizes))} holds no data to calibrate its submodel on; use GISP(calibration='global')")
    module = task.build(simulation.seed)
    dense = DenseModel.of(task, Layout.of(module).flatten(module), pruner)
    sample = train.batch(np.arange(min(8, len(train))))
    trajectory = pruner.trajectory(dense.module, dense.smap, task.losses, [sample])
    removed = dense.smap.removed_counts(np.stack([trajectory.at(level).kept for level in pruner.levels]))
    simulation.capacity.levels(fleet, dense.smap.cost("bytes", removed), dense.smap.cost("flops", removed))
    changes = world(simulation).changes
    early = (changes >= 0) & (changes < simulation.monitoring.calibration)
    if early.any():
        warnings.warn(
            f"{int(early.any(axis=1).sum())} clients change before tick {simulation.monitoring.calibration}, while the monitor learns what is normal for them",
            stacklevel=3,
        )


def simulate(
    simulation: Simulation,
    out: str | Path = "runs",
    *,
    executor: Executor | None = None,
    progress: bool = True,
    recipe: str | None = None,
) -> "Run":
    """Run ``simulation`` into its own directory under ``out`` and return the stored run.

    An equal simulation found there is continued from its last checkpoint, or returned if it is complete. Stages that an
    earlier run under ``out`` has computed (the trained model, the submodels) are taken over. ``executor`` defaults to
    Ray on all cores. It never changes a number, except that a GPU reserved for reactions rounds differently from a CPU: the two do not mix in one run. Raises ``CheckpointError`` for a damaged or foreign directory.
    """
    from fedsim.driver import drive

    return drive(simulation, out, executor=executor, progress=progress, recipe=recipe)


def resume(path: str | Path, *, executor: Executor | None = None, progress: bool = True, trusted: tuple[str, ...] = ()) -> "Run":
    """Continue the run stored in the directory ``path``; its tables end as if it had never stopped.

    ``trusted`` names the packages of a user's own classes in it, which are imported. Raises ``CheckpointError`` for a damaged run,
    and for one made by other code or from other data.
    """
    from fedsim.driver import drive_stored

    return drive_stored(path, executor=executor, progress=progress, trusted=trusted)


def train_steps(
    simulation: Simulation, executor: Executor, state: TrainState | None = None, directory: Path | None = None
) -> Iterator[Step]:
    """One step a round, from ``state`` on; what clients keep between rounds lies under ``directory``, or in a temporary one."""
    training = Training.prepare(
        task=simulation.task,
        fleet=simulation.fleet,
        strategy=simulation.strategy,
        communication=simulation.communication,
        rounds=simulation.rounds,
        evaluate_every=simulation.evaluate_every,
        lanes=simulation.lanes,
        device=simulation.device,
        availability=simulation.availability,
        deadline=simulation.deadline,
        dropout=simulation.dropout,
        seed=simulation.seed,
        executor=executor,
        directory=directory,
    )
    state = state or training.init()
    while state.round < simulation.rounds:
        state, finished = training.step(state)
        yield Step("train", state.round, state, (finished,))


def deploy_stage(simulation: Simulation, trained: TrainState, executor: Executor) -> tuple[Deployed, list[Round]]:
    """The submodels the fleet starts to serve with, and the rounds of their recovery, if any."""
    deployed = deploy(
        task=simulation.task,
        fleet=simulation.fleet,
        pruner=simulation.deployment,
        capacity=simulation.capacity,
        params=trained.params,
        seed=simulation.seed,
        executor=executor,
    )
    return recover(simulation, trained, deployed, executor) if simulation.recovery_rounds else (deployed, [])


def deployment_record(simulation: Simulation, params: NDArray[np.floating], deployed: Deployed) -> Deployment:
    """The deploy stage as a record."""
    dense = DenseModel.of(simulation.task, params, simulation.deployment)
    return record(deployed, dense, simulation.fleet, simulation.deployment.levels)


def world(simulation: Simulation) -> Stream:
    """The fleet's streams; with the true change points, which are for scores alone."""
    return Stream.of(simulation.task, simulation.fleet, simulation.serving, simulation.seed)


def serve_steps(
    simulation: Simulation,
    params: NDArray[np.floating],
    deployed: Deployed,
    executor: Executor,
    state: ServingState | None = None,
    memo: Memo | None = None,
) -> Iterator[Step]:
    """One step a tick, from ``state`` on; ``memo`` shares losses with other policies in the same world."""
    server = Server.prepare(simulation, world(simulation), params, deployed, executor, memo)
    state = state or server.init()
    while state.tick < simulation.serving.ticks:
        state, records = server.step(state)
        yield Step("serve", state.tick, state, records)
    if state.monitor.scores is None:
        warnings.warn(
            f"nobody was ever watched: {simulation.monitoring.calibration} calibration ticks a client were never reached in {state.tick} ticks",
            stacklevel=2,
        )


__all__ = ["Round", "Simulation", "Step", "resume", "run", "simulate"]
