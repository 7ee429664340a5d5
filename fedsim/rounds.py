"""One federated round as an event loop over synchronisation points: only the clients due at a point upload, and the merge is given back to those.

FedSGD, FedAvg and DynamicFL (Le, Diao, Wang, Tarokh, Ding, Anwar, 2024, arXiv:2409.04986) are the same loop under different schedules. Blocks
and the tree of the fold follow from the cohort; units and workers do not touch a bit.
"""

# C clients of the fleet, n of a cohort, K labels, P parameters

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedsim.clock import busy_seconds, round_seconds, step_flops
from fedsim.communication import Cohort, Payload, Schedule, Uniform, UploadSchedule, summary_bytes, traffic
from fedsim.evaluation import evaluate
from fedsim.fleet import Fleet
from fedsim.lanes import lanes_for, why_not_batched
from fedsim.merging import Merging
from fedsim.model_shapes import ModelShape, model_shapes
from fedsim.parameters import Layout
from fedsim.randomness import rng_for, uniforms
from fedsim.records import Round
from fedsim.runtime.batching import power_of_two
from fedsim.runtime.client_state import ClientLog, ClientStates, retain
from fedsim.runtime.executor import Executor, Shared
from fedsim.shards import Shards
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
    ``lanes_note`` says, where the rule gave 1, why.

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
    evaluate_every: int
    unit_blocks: int | None
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
        evaluate_every: int = 1,
        unit_blocks: int | None = None,
        directory: Path | None = None,
    ) -> Self:
        """Check the parts against each other, measure the model, and share what every round reads. ``evaluate_every`` rounds, and after the last, the test split is read.

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
        width, why = _lanes(task, model, data, strategy.batch_size, lanes)
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
            evaluate_every=evaluate_every,
            unit_blocks=None if unit_blocks is None else power_of_two(unit_blocks, "unit_blocks"),
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
            },
            holders=holders,
            log=ClientLog(where, sizes.memory, layout.dtype) if sizes.memory and where is not None else None,
            scratch=scratch,
        )

    def init(self) -> TrainState:
        """The state before the first round: a model that is a function of the seed."""
        params = self.layout.flatten(self.task.build(self.seed))
        kept = None if self.log is None else ClientStates.empty(len(self.fleet))
        return TrainState(params=params, server=self.strategy.init(params), round=0, clock=0.0, clients=kept)

    def step(self, state: TrainState) -> tuple[TrainState, Round]:
        """One round. Raises ``DivergedError`` or ``ClientError``; ``state`` is then still good."""
        clients, waited = self._draw(state.round)
        steps = self.strategy.steps(self.shards.sizes[clients])
        cohort = self._cohort(clients, steps)
        schedule = self.communication.assign(cohort, state.round, self.seed)
        _check_points(self.communication, schedule, cohort.steps)
        merging = Merging(self, state, clients, steps, schedule)
        params, server = merging.run()
        seconds = round_seconds(schedule.points, cohort.step_seconds, cohort.up_seconds, cohort.down_seconds)
        after = TrainState(
            params=params,
            server=server,
            round=state.round + 1,
            clock=state.clock + seconds,
            clients=self._keep(state, clients, merging.memory),
        )
        notes = [
            self.lanes_note if state.round == 0 else "",
            schedule.note,
            waited,
            *self._short(clients),
            *self._summaries_note(state.round),
        ]
        return after, self._record(state, after, cohort, schedule, merging, "; ".join(filter(None, notes)))

    @property
    def payloads(self) -> tuple[Payload, Payload]:
        """One upload and one download of a client that trains the whole model."""
        return self.shapes[0].payloads

    def costs(self, clients: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Bytes of an upload, bytes of a download and FLOPs of a local step of each client, (n,) each."""
        rows = np.array([(*(p.total for p in s.payloads), step_flops(s.forward_flops, self.strategy.batch_size)) for s in self.shapes])
        up, down, flops = rows.T[:, np.zeros(len(clients), np.int64) if self.levels is None else self.levels[clients]]
        return up, down, flops

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

    def _draw(self, round: int) -> tuple[NDArray[np.int64], str]:
        """The cohort: uniform without replacement among clients that hold data and are available; ascending ids."""
        holders = self.holders
        chance = self.fleet.availability[holders]
        for wait in range(_WAITS):
            present = (
                holders
                if (chance >= 1).all()
                else holders[uniforms(self.seed, "availability", holders, round, 1, part=wait)[:, 0] < chance]
            )
            if len(present):
                break
        else:
            raise ValueError(f"no client was available in {_WAITS} draws of round {round}; raise availability")
        if len(present) > self.strategy.cohort:
            present = np.sort(rng_for(self.seed, "cohort", round).choice(present, self.strategy.cohort, replace=False))
        return present.astype(np.int64), f"nobody was available {wait} times before" if wait else ""

    def _cohort(self, clients: NDArray[np.int64], steps: NDArray[np.int64]) -> Cohort:
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
        """Label histograms (n, K) of ``clients`` (n,)."""
        return self.shards.histogram(self.data.train.keys["label"], self.task.num_classes, clients).astype(np.float64)

    def _short(self, clients: NDArray[np.int64]) -> list[str]:
        return [f"only {len(clients)} of {self.strategy.cohort} clients were available"] if len(clients) < self.strategy.cohort else []

    def _summary_bytes(self, round: int) -> int:
        """Label histograms are sent once, by every client that holds data, before the first round; their time is not on the clock."""
        return 0 if self.totals is None or round > 0 else len(self.holders) * summary_bytes(len(self.totals))

    def _summaries_note(self, round: int) -> list[str]:
        sent = self._summary_bytes(round)
        return [f"bytes_up includes {sent} bytes of label histograms from all {len(self.holders)} clients with data"] if sent else []

    def _record(self, before: TrainState, after: TrainState, cohort: Cohort, schedule: Schedule, merging: Merging, note: str) -> Round:
        took_part = np.array([bool(p) for p in schedule.points])
        up, down, step = self.costs(cohort.clients)
        cost = traffic(schedule.points, up, down)
        flops = took_part * step.astype(np.float64) * merging.steps
        losses = np.where(took_part, merging.losses / merging.steps, np.nan)
        due = after.round % self.evaluate_every == 0 or after.round == self.rounds
        test_loss, accuracy = (
            evaluate(self.executor, self.shared, after.params, len(self.data.test), self.seed) if due else (np.nan, np.nan)
        )
        return Round(
            round=before.round,
            cohort=cohort.clients,
            group=cohort.clients[schedule.group],
            distance=schedule.distance,
            train_loss=float(np.average(losses[took_part], weights=self.shards.sizes[cohort.clients[took_part]])),
            test_loss=test_loss,
            test_accuracy=accuracy,
            uploads=int(cost.uploads.sum()),
            bytes_up=int(cost.bytes_up.sum()) + self._summary_bytes(before.round),
            bytes_down=int(cost.bytes_down.sum()),
            cost_ratio=schedule.uploads / (len(cohort) * cohort.steps),
            flops=float(flops.sum()),
            seconds=after.clock - before.clock,
            clock=after.clock,
            note=note,
            clients={
                "client": cohort.clients,
                "train_loss": losses,
                "uploads": cost.uploads,
                "bytes_up": cost.bytes_up,
                "bytes_down": cost.bytes_down,
                "flops": flops,
                "seconds": busy_seconds(schedule.points, cohort.step_seconds, cohort.up_seconds, cohort.down_seconds),
                "block": merging.blocks,
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


def _check_points(communication: UploadSchedule, schedule: Schedule, steps: int) -> None:
    """A client's points rise and end with the round; ``ValueError`` naming the schedule where they do not."""
    for points in schedule.points:
        if points and (list(points) != sorted(set(points)) or points[0] < 1 or points[-1] != steps):
            raise ValueError(f"{communication!r} gave sync points {points}; they must rise from 1 and end at local_steps={steps}")


def _lanes(task: Task, model: nn.Module, data: Splits, batch_size: int, lanes: int | None) -> tuple[int, str]:
    """Width of the blocks, and where it was left to the rule and the rule says 1, why clients train one at a time."""
    batch = data.train.batch(np.arange(batch_size) % len(data.train))
    model.train()
    if lanes is not None:
        if power_of_two(lanes, "lanes") > 1 and (reason := why_not_batched(task, model, batch)) is not None:
            raise ValueError(f"this model cannot train as {lanes} lanes of one program ({reason}); use lanes=1") from reason
        return lanes, ""
    chosen = lanes_for(task, model, batch)
    if chosen > 1:
        return chosen, ""
    reason = why_not_batched(task, model, batch)
    why = "its layers are faster alone" if reason is None else f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
    return 1, f"clients train one at a time, not as lanes of one program ({why})"


def _label_totals(task: Task, data: Splits, shards: Shards) -> NDArray[np.float64]:
    """The fleet's label counts (K,)."""
    if "label" not in data.train.keys:
        raise ValueError(
            'the schedule reads label counts, and the task\'s data has no key "label"; use RandomGroup, FastestGroup or Uniform'
        )
    return shards.totals(data.train.keys["label"], task.num_classes)
