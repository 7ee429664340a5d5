"""The merges of one round, as a flow of data: work whose inputs are known is sent out together, and points are merged in order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from fedsim.clock import by_point, step_flops
from fedsim.communication import Schedule
from fedsim.local_training import Outcome, Unit, train_unit
from fedsim.runtime.batching import Segment, blocks, chains, segments, unit_size
from fedsim.runtime.executor import Shared
from fedsim.strategies import Due
from fedsim.updates import Partial, Vector, mean, normalised, tree_sum

if TYPE_CHECKING:
    from fedsim.rounds import Training, TrainState

_CHEAP_FLOPS = 2e9  # of a segment between merges: below it, a trip through the executor costs more than it saves


@dataclass(eq=False)
class Merging:
    """A round under way. ``steps`` (n,): local steps of each client of the cohort; ``losses`` (n,) sums its losses over them.

    ``carry``: momenta of clients between their points; ``memory``: what they keep beyond the round; ``blocks``: digests of their blocks in their
    last merge. Both are of clients by position.
    """

    training: "Training"
    before: "TrainState"
    clients: NDArray[np.int64]
    steps: NDArray[np.int64]
    schedule: Schedule

    def __post_init__(self) -> None:
        self.params: Vector = self.before.params
        self.server: Any = self.before.server
        self.losses = np.zeros(len(self.clients))
        self.blocks = np.full(len(self.clients), "", "U16")
        self.models: dict[str, Shared] = {}
        self.nodes: dict[Segment, Partial] = {}
        self.carry: dict[int, Vector] = {}
        self.memory: dict[int, Vector] = {}

    def run(self) -> tuple[Vector, Any]:
        """The server's model and state after the round's last merge."""
        self.due = dict(by_point(self.schedule.points))
        self.order = list(self.due)
        self.weights = {point: self._weights(point) for point in self.order}
        self.shares = {point: self.training.share_of(self.clients[due]) for point, due in self.due.items()}
        waiting = self._plan()
        self.merged = 0
        self._hand_out(0)
        while waiting:
            ready = [s for s in waiting if self._is_ready(s)]
            self._execute(ready)
            waiting = [s for s in waiting if s not in ready]
            self._merge_in_order()
            needed = {f"model {s.start}" for s in waiting} | {f"model {self.merged}"}
            self.models = {name: held for name, held in self.models.items() if name in needed}
        return self.params, self.server

    def _plan(self) -> list[Segment]:
        """Segments, chained where one worker should keep them."""
        levels = self.training.levels
        cut = segments(self.schedule.points, None if levels is None else levels[self.clients].tolist())
        chained = [s for s in chains(cut) if len(s.points) == 1 or self._stays(s)]
        inside = {(s.members, p) for s in chained for p in s.points}
        return chained + [s for s in cut if (s.members, s.end) not in inside]

    def _stays(self, segment: Segment) -> bool:
        training = self.training
        count = len(blocks(len(segment.members), training.lanes))
        if training.unit_blocks is not None:
            return count <= training.unit_blocks
        flops = self._flops(segment, len(segment.members)) / len(segment.points)
        return count == 1 or training.executor.workers == 1 or flops < _CHEAP_FLOPS

    def _flops(self, segment: Segment, clients: int) -> float:
        """Predicted cost of so many of the segment's clients."""
        step = step_flops(self.training.shapes[segment.shape].forward_flops, self.training.strategy.batch_size)
        return float((segment.end - segment.start) * clients * step)

    def _is_ready(self, segment: Segment) -> bool:
        """Its start is merged; and, if it merges on the way, so is every earlier point, because the server's rule takes them in order."""
        if segment.start > self.merged:
            return False
        return len(segment.points) == 1 or all(p <= self.merged for p in self.order if p < segment.points[0])

    def _execute(self, ready: Sequence[Segment]) -> None:
        queue = [(segment, part) for segment in ready for part in self._parts(segment)]
        costs = [self._flops(segment, part.stop - part.start) for segment, part in queue]
        units = _Units(self, queue)
        training = self.training
        shared = {"state": self.server, **{k: v for k, v in training.shared.items() if k != "test"}, **self.models}
        outcomes = training.executor.map(train_unit, units, shared, training.needs, costs)
        grouped: dict[Segment, list[Outcome]] = {}
        for (segment, part), outcome in zip(queue, outcomes, strict=True):
            self._note(segment, part, outcome)
            grouped.setdefault(segment, []).append(outcome)
        for segment, pieces in grouped.items():
            self.nodes[segment] = tree_sum([p.node for p in pieces])
            if pieces[0].merged is not None:
                self.params, self.server = pieces[0].merged
                self.merged = segment.points[-2]

    def _parts(self, segment: Segment) -> list[slice]:
        """Members of each unit: an aligned run of a power of two of blocks."""
        training = self.training
        cut = blocks(len(segment.members), training.lanes)
        if len(segment.points) > 1:
            return [slice(0, len(segment.members))]
        size = training.unit_blocks or unit_size(len(cut), training.executor.workers, self._flops(segment, training.lanes))
        return [slice(cut[i][0], cut[min(i + size, len(cut)) - 1][1]) for i in range(0, len(cut), size)]

    def unit(self, segment: Segment, part: slice) -> Unit:
        members = list(segment.members[part])
        carried = [self.carry[m] for m in members if m in self.carry]
        training = self.training
        return Unit(
            seed=training.seed,
            round=self.before.round,
            draws=np.full(len(members), self.before.round),
            shape=segment.shape,
            clients=self.clients[members],
            steps=self.steps[members],
            lanes=training.lanes,
            model=f"model {segment.start}",
            server=f"model {self.merged}",
            start=segment.start,
            points=segment.points,
            weights=np.stack([self.weights[p][members] for p in segment.points]),
            shares=np.array([self.shares[p] for p in segment.points]),
            carry=np.stack(carried) if carried else None,
            memory=self._remembered(members),
            last=self.order[-1],
        )

    def _note(self, segment: Segment, part: slice, outcome: Outcome) -> None:
        members = segment.members[part]
        self.losses[list(members)] += outcome.losses
        self.blocks[list(members)] = outcome.blocks
        if outcome.carry is not None:
            self.carry.update(zip(members, outcome.carry, strict=True))
        if outcome.memory is not None:
            self.memory.update(zip(members, outcome.memory, strict=True))

    def _remembered(self, members: Sequence[int]) -> Vector | None:
        """What the members keep, (n, S + S'), as they left their last merge, of this round or an earlier one."""
        log = self.training.log
        if log is None:
            return None
        assert self.before.clients is not None
        rows = log.read(self.before.clients, self.clients[members])
        for position, member in enumerate(members):
            if member in self.memory:
                rows[position] = self.memory[member]
        return rows

    def _merge_in_order(self) -> None:
        """Merge every point whose segments are all there, up to the first that lacks one."""
        for point in [p for p in self.order if p > self.merged]:
            ending = sorted((s for s in self.nodes if s.end == point), key=lambda s: (s.last_start, s.shape))
            if sum(len(s.members) for s in ending) < len(self.due[point]):
                return
            root = tree_sum([self.nodes.pop(s) for s in ending])
            due = Due(self.clients[self.due[point]], self.weights[point][self.due[point]], self.shares[point])
            self.params, self.server = self.training.strategy.server(
                self.params, self.server, mean(root, self.params), due, point == self.order[-1]
            )
            self.merged = point
            if point != self.order[-1]:
                self._hand_out(point)

    def _hand_out(self, point: int) -> None:
        self.models[f"model {point}"] = self.training.executor.share(self.params)

    def _weights(self, point: int) -> NDArray[np.float64]:
        """Weights (n,) of the clients due at ``point``, normalised over them; 0 for the others."""
        due = self.due[point]
        raw = (
            np.ones(len(due))
            if self.training.strategy.weighting == "uniform"
            else self.training.shards.sizes[self.clients[due]].astype(np.float64)
        )
        if point == self.order[-1] and self.schedule.share_at_end is not None:
            raw = raw * self.schedule.share_at_end[due]
        weights = np.zeros(len(self.clients))
        weights[due] = normalised(raw)
        return weights


class _Units(Sequence[Unit]):
    """The units of a map, each built when it is sent: what their clients keep need not all be in memory at once."""

    def __init__(self, merging: Merging, queue: Sequence[tuple[Segment, slice]]):
        self._merging, self._queue = merging, queue

    def __len__(self) -> int:
        return len(self._queue)

    @overload
    def __getitem__(self, index: int) -> Unit: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Unit]: ...

    def __getitem__(self, index: int | slice) -> Unit | Sequence[Unit]:
        if isinstance(index, slice):
            return _Units(self._merging, self._queue[index])
        return self._merging.unit(*self._queue[index])
