"""One federated round as an event loop over synchronisation points: only the clients due at a point upload, and the merge is given back to those.

FedSGD, FedAvg and DynamicFL (Le, Diao, Wang, Tarokh, Ding, Anwar, 2024, arXiv:2409.04986) are the same loop under different schedules. Blocks
and the tree of the fold follow from the cohort; units and workers do not touch a bit.
"""

# C clients of the fleet, n of a cohort, K labels, P parameters

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsim import asynchronous
from fedsim.availability import Availability, Independent, draw_cohort
from fedsim.clock import step_flops
from fedsim.communication import Cohort, Payload, Uniform, UploadSchedule, summary_bytes
from fedsim.errors import CapacityError
from fedsim.evaluation import evaluate
from fedsim.fleet import Fleet
from fedsim.lanes import lanes_for, why_not_batched
from fedsim.merging import Merging
from fedsim.model_shapes import ModelShape, model_shapes
from fedsim.parameters import Layout
from fedsim.plan import Plan
from fedsim.records import Round
from fedsim.runtime.batching import power_of_two
from fedsim.runtime.client_state import ClientLog, ClientStates, retain
from fedsim.runtime.executor import Executor, Needs, Shared
from fedsim.runtime.serial import SerialExecutor
from fedsim.shards import Shards
from fedsim.stragglers import Deadline, Dropout
from fedsim.strategies import Strategy
from fedsim.tasks.base import Splits, Task
from fedsim.updates import Vector

_WAITS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainState:
    """Where training stands after ``round`` rounds: parameters (P,), the server's state, and the simulated clock in seconds.

    ``clients``: where the states lie that clients keep between rounds; ``None`` where they keep none.
    """

    params: Vector
    server: Any
    round: int
    clock: float
    clients: ClientStates | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """Everything rounds need that does not change between them; made by :meth:`prepare`. ``lanes`` is the width of a block: it decides bits.
    ``lanes_note`` says, where the rule gave 1, why. ``device`` is where clients train.

    ``unit_blocks`` (a power of two, ``None``: by number of workers) decides only where work runs. ``holders``: the clients with data, ascending.
    ``log`` holds what clients keep between rounds, if they keep anything; ``scratch`` is its directory where no other was given.
    ``totals`` (K,): the fleet's label counts, where the schedule reads them. ``levels`` (C,) indexes ``shapes``: what each client trains, where not all train the whole model, which is the first of them.
    """

    task: Task
    fleet: Fleet
    strategy: Strategy
    communication: UploadSchedule
    rounds: int
    seed: int
    executor: Executor
    lanes: int
    lanes_note: str
    device: Literal["cpu", "cuda"]
    evaluate_every: int
    unit_blocks: int | None
    availability: Availability
    deadline: Deadline | None
    dropout: Dropout | None
    data: Splits
    shards: Shards
    layout: Layout
    shapes: tuple[ModelShape, ...]
    levels: NDArray[np.int64] | None
    totals: NDArray[np.float64] | None
    shared: Mapping[str, Shared]
    holders: NDArray[np.int64]
    log: ClientLog | None
    scratch: TemporaryDirectory[str] | None

    @classmethod
    def prepare(
        cls,
        *,
        task: Task,
        fleet: Fleet,
        strategy: Strategy,
        communication: UploadSchedule,
        rounds: int,
        seed: int,
        executor: Executor,
        lanes: int | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        evaluate_every: int = 1,
        unit_blocks: int | None = None,
        availability: Availability | None = None,
        deadline: Deadline | None = None,
        dropout: Dropout | None = None,
        directory: Path | None = None,
    ) -> Self:
        """Check the parts against each other, measure the model, and share what every round reads. ``evaluate_every`` rounds, and after the last, the test split is read.

        ``device`` is where clients train: "cuda" needs workers with a GPU, and rounds otherwise than a CPU.
        ``directory`` keeps the states of clients between rounds; a temporary one, which keeps those of the last two rounds, unless given.

        Raises ``ValueError`` for a fleet without data, a strategy that cannot follow the schedule, and a model that cannot run in ``lanes``.
        """
        for name, value in (("rounds", rounds), ("evaluate_every", evaluate_every)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        data = task.data()
        shards = fleet.shards(data.train)
        holders = np.flatnonzero(shards.sizes > 0)
        if not len(holders):
            raise ValueError(f"all {len(fleet)} shards are empty: no client can train")
        model = task.build(seed)
        layout = Layout.of(model)
        shapes, levels = model_shapes(task, fleet, strategy, model, seed)
        sizes = shapes[0].trained.sizes
        _check_schedule(strategy, communication, min(strategy.cohort, len(holders)), sum(p.total for p in shapes[0].payloads))
        scratch = TemporaryDirectory(prefix="fedsim-") if sizes.memory and directory is None else None
        where = Path(scratch.name) if scratch is not None else directory
        if deadline is not None and dropout is not None and np.isinf(deadline.seconds):
            raise ValueError(
                "a deadline of infinite seconds waits for those that dropout lets vanish: give deadline.seconds a finite number"
            )
        if deadline is not None and communication != Uniform():
            raise ValueError(f"a deadline needs one upload a round, at its end: use Uniform(), not {communication!r}")
        _check_device(device, executor)
        width, why = _lanes(task, model, data, strategy.batch_size, lanes, device)
        return cls(
            task=task,
            fleet=fleet,
            strategy=strategy,
            communication=communication,
            rounds=rounds,
            seed=seed,
            executor=executor,
            lanes=width,
            lanes_note=why,
            device=device,
            evaluate_every=evaluate_every,
            unit_blocks=None if unit_blocks is None else power_of_two(unit_blocks, "unit_blocks"),
            availability=Independent() if availability is None else availability,
            deadline=deadline,
            dropout=dropout,
            data=data,
            shards=shards,
            layout=layout,
            shapes=shapes,
            levels=levels,
            totals=_label_totals(task, data, shards) if communication.needs_labels else None,
            shared={
                "task": executor.share(task),
                "train": executor.share(data.train),
                "test": executor.share(data.test),
                "shards": executor.share(shards),
                "strategy": executor.share(strategy),
                "shapes": executor.share(tuple(shape.trained for shape in shapes)),
                "device": executor.share(device),
            },
            holders=holders,
            log=ClientLog(where, sizes.memory, layout.dtype) if sizes.memory and where is not None else None,
            scratch=scratch,
        )

    @property
    def needs(self) -> Needs:
        """What a unit of training needs of its worker."""
        return Needs(gpus=self.executor.gpus_per_worker if self.device == "cuda" else 0.0)

    def init(self) -> TrainState:
        """The state before the first round: a model that is a function of the seed."""
        params = self.layout.flatten(self.task.build(self.seed))
        kept = None if self.log is None else ClientStates.empty(len(self.fleet))
        server = asynchronous.begin(self, params) if self.strategy.asynchronous else self.strategy.init(params)
        return TrainState(params=params, server=server, round=0, clock=0.0, clients=kept)

    def step(self, state: TrainState) -> tuple[TrainState, Round]:
        """One round. Raises ``DivergedError`` or ``ClientError``; ``state`` is then still good."""
        if self.strategy.asynchronous:
            return asynchronous.update(self, state)
        clients, begins = self.draw(state.round, state.clock)
        plan = Plan.of(self, clients, state.round)
        ends = begins + plan.seconds
        if plan.failed:
            return replace(state, round=state.round + 1, clock=ends), self._record(
                state, None, ends, plan, self._notes(state, plan, begins)
            )
        merging = Merging(self, state, plan.clients, plan.steps, plan.schedule)
        params, server = merging.run()
        kept = self._keep(state, clients, merging.memory)
        after = TrainState(params=params, server=server, round=state.round + 1, clock=ends, clients=kept)
        return after, self._record(state, merging, ends, plan, self._notes(state, plan, begins))

    def draw(self, round: int, clock: float) -> tuple[NDArray[np.int64], float]:
        """The clients asked to take part, ascending, and the time from which enough of them are there."""
        wanted = self.strategy.cohort
        number = wanted if self.deadline is None else self.deadline.drawn(wanted)
        return draw_cohort(self.availability, self.fleet, self.holders, number, clock=clock, round=round, seed=self.seed)

    @property
    def payloads(self) -> tuple[Payload, Payload]:
        """One upload and one download of a client that trains the whole model."""
        return self.shapes[0].payloads

    def costs(self, clients: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Bytes of an upload, bytes of a download and FLOPs of a local step of each client, (n,) each."""
        rows = np.array([(*(p.total for p in s.payloads), step_flops(s.forward_flops, self.strategy.batch_size)) for s in self.shapes])
        up, down, flops = rows.T[:, np.zeros(len(clients), np.int64) if self.levels is None else self.levels[clients]]
        return up, down, flops

    def tested(self, round: int, params: Vector) -> tuple[float, float]:
        """Loss and accuracy on the test split after ``round`` rounds; ``nan`` where none is due."""
        if round % self.evaluate_every and round != self.rounds:
            return np.nan, np.nan
        return evaluate(self.executor, self.shared, params, len(self.data.test), self.seed)

    def share_of(self, clients: NDArray[np.int64]) -> float:
        """The share of the whole fleet's weight that ``clients`` (n,) hold."""
        if self.strategy.weighting == "uniform":
            return len(clients) / len(self.holders)
        return float(self.shards.sizes[clients].sum() / self.shards.sizes.sum())

    def _keep(self, state: TrainState, clients: NDArray[np.int64], memory: Mapping[int, Vector]) -> ClientStates | None:
        """Write what the round's clients keep."""
        if self.log is None or not memory:
            return state.clients
        assert state.clients is not None
        positions = sorted(memory)
        after = self.log.write(state.clients, state.round, clients[positions], np.stack([memory[p] for p in positions]))
        if self.scratch is not None:
            retain(self.log.directory, [state.clients, after])
        return after

    def cohort(self, clients: NDArray[np.int64], steps: NDArray[np.int64]) -> Cohort:
        """What a schedule may know; who takes fewer local steps than the most is quicker at each."""
        largest_up, largest_down = self.payloads
        up, down, flops = self.costs(clients)
        return Cohort(
            clients=clients,
            steps=int(steps.max()),
            fleet_size=len(self.fleet),
            upload=largest_up.total,
            download=largest_down.total,
            step_seconds=flops / self.fleet.flops[clients] * (steps / steps.max()),
            up_seconds=up / self.fleet.up[clients],
            down_seconds=down / self.fleet.down[clients],
            counts=None if self.totals is None else self._label_counts(clients),
            totals=self.totals,
        )

    def _label_counts(self, clients: NDArray[np.int64]) -> NDArray[np.float64]:
        """Histograms (n, K) of what ``clients`` (n,) hold of each value of the task's skew key."""
        assert self.totals is not None, "the schedule reads counts"
        return self.shards.histogram(self.data.train.keys[self.task.skew_key], len(self.totals), clients).astype(np.float64)

    def _notes(self, state: TrainState, plan: "Plan", begins: float) -> str:
        sent = self._summary_bytes(state.round)
        notes = [
            self.lanes_note if state.round == 0 else "",
            plan.schedule.note,
            f"nobody was available for {begins - state.clock:g} seconds before" if begins > state.clock else "",
            f"only {len(plan.clients)} of {self.strategy.cohort} clients were available"
            if len(plan.clients) < self.strategy.cohort
            else "",
            *plan.notes,
            f"bytes_up includes {sent} bytes of label histograms from all {len(self.holders)} clients with data" if sent else "",
        ]
        return "; ".join(filter(None, notes))

    def _summary_bytes(self, round: int) -> int:
        """Label histograms are sent once, by every client that holds data, before the first round; their time is not on the clock."""
        return 0 if self.totals is None or round > 0 else len(self.holders) * summary_bytes(len(self.totals))

    def _record(self, before: TrainState, merging: Merging | None, ends: float, plan: "Plan", note: str) -> Round:
        round = before.round + 1
        cohort, uploads = plan.cohort, plan.uploads
        took_part = uploads > 0
        losses = np.full(len(cohort), np.nan)
        blocks = np.full(len(cohort), "", "U16")
        if merging is not None:
            losses[took_part] = merging.losses[took_part] / plan.trained[took_part]
            blocks = merging.blocks
        test_loss, accuracy = self.tested(round, before.params if merging is None else merging.params)
        merged = took_part.any() and merging is not None
        return Round(
            round=before.round,
            cohort=cohort.clients,
            group=cohort.clients[plan.schedule.group],
            distance=plan.schedule.distance,
            train_loss=float(np.average(losses[took_part], weights=self.shards.sizes[cohort.clients[took_part]])) if merged else np.nan,
            test_loss=test_loss,
            test_accuracy=accuracy,
            uploads=int(uploads.sum()),
            bytes_up=int(plan.bytes_up.sum()) + self._summary_bytes(before.round),
            bytes_down=int(plan.bytes_down.sum()),
            cost_ratio=float(uploads.sum() / (len(cohort) * cohort.steps)),
            flops=float(plan.flops.sum()),
            wasted_bytes=int(plan.wasted_bytes),
            wasted_flops=float(plan.wasted_flops),
            seconds=ends - before.clock,
            clock=ends,
            note=note,
            clients={
                "client": cohort.clients,
                "train_loss": losses,
                "uploads": uploads,
                "bytes_up": plan.bytes_up,
                "bytes_down": plan.bytes_down,
                "flops": plan.flops,
                "seconds": plan.busy,
                "block": blocks,
            },
        )


def _check_schedule(strategy: Strategy, communication: UploadSchedule, cohort: int, transfer: int) -> None:
    if strategy.local_epochs is not None and communication != Uniform():
        raise ValueError(
            f"local_epochs={strategy.local_epochs:g} needs one upload a round, at its end: use Uniform(), not {communication!r}"
        )
    communication.validate(cohort, strategy.local_steps, transfer)
    if not (strategy.mixed or communication.uniform):
        raise ValueError(
            f"{type(strategy).__name__} needs one schedule for all clients of a round, but {communication!r} mixes them; use Uniform"
        )


def _check_device(device: str, executor: Executor) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not (executor.gpus_per_worker > 0 or (isinstance(executor, SerialExecutor) and torch.cuda.is_available())):
        raise CapacityError(
            "training on device='cuda' needs workers with a GPU: RayExecutor(gpus_per_worker=...), or a GPU in this process"
        )


def _lanes(task: Task, model: nn.Module, data: Splits, batch_size: int, lanes: int | None, device: str) -> tuple[int, str]:
    """Width of the blocks, and where it was left to the rule and the rule says 1, why clients train one at a time."""
    batch = data.train.batch(np.arange(batch_size) % len(data.train))
    model.train()
    if lanes is not None:
        if power_of_two(lanes, "lanes") > 1 and (reason := why_not_batched(task, model, batch)) is not None:
            raise ValueError(f"this model cannot train as {lanes} lanes of one program ({reason}); use lanes=1") from reason
        return lanes, ""
    chosen = lanes_for(task, model, batch, device)
    if chosen > 1:
        return chosen, ""
    reason = why_not_batched(task, model, batch)
    why = (
        "its layers are not known to be faster so; lanes= may be set"
        if reason is None
        else f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
    )
    return 1, f"clients train one at a time, not as lanes of one program ({why})"


def _label_totals(task: Task, data: Splits, shards: Shards) -> NDArray[np.float64]:
    """The fleet's counts (K,) of the values of the task's skew key, labels unless the task says otherwise."""
    key = task.skew_key
    if key not in data.train.keys:
        raise ValueError(
            f"the schedule reads {key} counts, and the task's data has no key {key!r}; use RandomGroup, FastestGroup or Uniform"
        )
    values = data.train.keys[key]
    return shards.totals(values, task.num_classes if key == "label" else int(values.max()) + 1)
