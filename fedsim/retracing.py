"""A stored run's training, gone through again: every draw is a function of (seed, purpose, client, round), so any round can be had back, exactly.

Exports :class:`Retraced`, the way to any round, :func:`taken_apart`, what single clients do in it, and :func:`training_of`.
"""

# n clients of a unit, P parameters, B examples of a batch, S scalars a client keeps

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.encoding import packages_of
from fedsim.lanes import LoopBlock
from fedsim.local_training import Unit, example_order, train_unit
from fedsim.merging import Merging
from fedsim.plan import Plan
from fedsim.records import Round
from fedsim.rounds import Training, TrainState
from fedsim.runs.run import Run
from fedsim.runs.store import RunStore
from fedsim.runtime.client_state import retain
from fedsim.runtime.executor import NOTHING, Executor, Needs, Shared, Work
from fedsim.runtime.serial import SerialExecutor
from fedsim.stages import TRAIN, Origin
from fedsim.updates import Vector

if TYPE_CHECKING:
    from fedsim.simulation import Simulation


class Retraced:
    """The training of a stored run, to be done again from the seed's model or from a stored one.

    ``local`` is prepared in this process; ``training`` with ``executor``, which does whole rounds. ``differences`` names what is not as it was when the
    run was made: versions, code, data, model.
    """

    def __init__(self, run: Run, executor: Executor | None = None):
        self.simulation: Simulation = run.simulation
        self._store = RunStore.open(run.path, trusted=packages_of(self.simulation))
        self._scratch = TemporaryDirectory(prefix="fedsim-")
        self._directory = Path(self._scratch.name)
        self.local = training_of(self.simulation, SerialExecutor(), self._directory)
        self.training = self.local if executor is None else training_of(self.simulation, executor, self._directory)
        self.differences = self._differences()

    def starts(self) -> list[int]:
        """Rounds before which a state is at hand: 0, and those of stored checkpoints with all that clients keep."""
        return sorted({0} | {index for index in self.checkpoints() if self._is_start(self.stored(index))})

    def checkpoints(self) -> list[int]:
        """Rounds before which a model is stored, ascending."""
        return self._store.checkpoints("train")

    def stored(self, round: int) -> TrainState:
        """The stored state before ``round``."""
        state: TrainState = self._store.checkpoint("train", round)
        return state

    def start(self, round: int) -> TrainState:
        """The state at hand before ``round``, one of :meth:`starts`; what clients keep is copied, so the run is not touched."""
        if round == 0:
            return self.local.init()
        state = self.stored(round)
        for segment in () if state.clients is None else state.clients.segments:
            name = f"{segment.number:07d}.npy"
            shutil.copyfile(self._store.client_directory / name, self._directory / name)
        return state

    def step(self, state: TrainState) -> tuple[TrainState, Round]:
        """One whole round."""
        after, record = self.training.step(state)
        kept = [s.clients for s in (state, after) if s.clients is not None]
        if kept:
            retain(self._directory, kept)
        return after, record

    def before(self, round: int) -> TrainState:
        """The state before ``round``, from the nearest start."""
        state = self.start(max(s for s in self.starts() if s <= round))
        while state.round < round:
            state, _ = self.step(state)
        return state

    def _is_start(self, state: TrainState) -> bool:
        return self.local.log is None or state.clients is not None

    def _differences(self) -> list[str]:
        found = self._store.latest_checkpoint("origin")
        return [] if found is None else [n for n in Origin.of(self.simulation, gpu=False).differences(found[1]) if n != "reactions"]


def training_of(simulation: "Simulation", executor: Executor, directory: Path | None = None) -> Training:
    """The training of ``simulation``, which reads the test split only after its last round."""
    parts = {name: getattr(simulation, name) for name in TRAIN} | {"evaluate_every": simulation.rounds}
    return Training.prepare(**parts, executor=executor, directory=directory)


@dataclass(frozen=True, eq=False)
class Part:
    """A unit, from one merge to the next, and the values ``shared`` with it; of one client where it is trained here."""

    unit: Unit
    shared: Mapping[str, Any]

    def of(self, client: int) -> "Part":
        """The same for one of its clients alone."""
        at = int(np.flatnonzero(self.unit.clients == client)[-1])
        return Part(cut_down(self.unit, slice(at, at + 1)), self.shared)

    def block_at(self, position: int) -> "Part":
        """The same for the block in which the unit's client number ``position`` trains."""
        low = position // self.unit.lanes * self.unit.lanes
        return Part(cut_down(self.unit, slice(low, low + self.unit.lanes)), self.shared)

    @property
    def data(self) -> Any:
        """The data set that is trained on."""
        return self.shared["train"]

    @property
    def model(self) -> Vector:
        """The model (P,) that was handed out, or what the client holds of it."""
        whole, held = self.shared[self.unit.model], self.shared["shapes"][self.unit.shape].coordinates
        return np.asarray(whole if held is None else whole[held])

    def load(self, block: LoopBlock) -> None:
        """Hand the model out to ``block``, with the client's own part of the local rule."""
        strategy, kept = self.shared["strategy"], self.shared["shapes"][self.unit.shape].sizes.strategy
        memory = np.empty((1, 0), self.model.dtype) if self.unit.memory is None else self.unit.memory[:, :kept]
        block.load(torch.tensor(self.model), strategy.shift(torch.tensor(memory), self.shared["state"]))

    def batches(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The client's local steps up to the merge, each with its examples (B,)."""
        unit, batch_size = self.unit, self.shared["strategy"].batch_size
        last = min(unit.points[-1], int(unit.steps[0]))
        if last > unit.start:
            rows = example_order(unit.seed, self.shared["shards"], unit.clients, unit.draws, (unit.start, last), batch_size)
            yield from zip(range(unit.start, last), rows[0], strict=True)


def taken_apart(training: Training, state: TrainState, clients: Collection[int]) -> list[Part]:
    """The units of the round after ``state`` in which any of ``clients`` trains, in the order of their merges; none of clients that take no part.

    Goes no further into the round than it must. ``training`` must have been prepared with an executor of this process.
    """
    wanted = set(clients)
    if training.strategy.asynchronous:  # all that come back train at once
        tap = _Tap(training.executor, wanted, 0)
        with suppress(_FoundError):
            replace(training, executor=tap).step(state)
        return tap.parts
    plan = Plan.of(training, training.draw(state.round, state.clock)[0], state.round)
    merges = sum(len(points) for member, points in zip(plan.clients.tolist(), plan.schedule.points, strict=True) if member in wanted)
    tap = _Tap(training.executor, wanted, merges)
    if merges and not plan.failed:
        with suppress(_FoundError):
            _Unchained(replace(training, executor=tap), state, plan.clients, plan.steps, plan.schedule).run()
    return tap.parts


class _Unchained(Merging):
    """A round in which every merge is the driver's, so that each unit ends at one."""

    def _stays(self, segment: Any) -> bool:
        return False


class _FoundError(Exception):
    """All units that were looked for have come by: the round need not go on."""


class _Tap:
    """An executor that notes the units of the ``wanted`` clients, and ends the round once they have come by ``missing`` times, or with its first units."""

    workers = 1
    gpus_per_worker = 0.0

    def __init__(self, inner: Executor, wanted: set[int], missing: int):
        self.inner, self.wanted, self.missing = inner, wanted, missing
        self.parts: list[Part] = []

    def share(self, value: Any) -> Shared:
        return self.inner.share(value)

    def map(
        self,
        fn: Work,
        units: Sequence[Any],
        shared: Mapping[str, Any],
        needs: Needs | Sequence[Needs] = NOTHING,
        costs: Sequence[float] | None = None,
    ) -> list[Any]:
        if fn is train_unit:
            values = {name: value.held if isinstance(value, Shared) else value for name, value in shared.items()}
            for unit in units:
                self._note(unit, values)
            if self.missing <= 0:
                raise _FoundError
        return self.inner.map(fn, units, shared, needs, costs)

    def _note(self, unit: Unit, values: Mapping[str, Any]) -> None:
        if here := self.wanted.intersection(unit.clients.tolist()):
            self.parts.append(Part(unit, values))
            self.missing -= len(here)

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> "_Tap":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def cut_down(unit: Unit, part: slice) -> Unit:
    """The unit of some of its clients, whose weights stay what they were."""
    return replace(
        unit,
        draws=unit.draws[part],
        clients=unit.clients[part],
        steps=unit.steps[part],
        weights=unit.weights[:, part],
        carry=None if unit.carry is None else unit.carry[part],
        memory=None if unit.memory is None else unit.memory[part],
    )
