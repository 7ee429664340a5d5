"""Training gone through without training: the engine itself, with an executor whose clients return at once, having learnt nothing.

Who takes part, when each uploads and how long that takes follow from the seed and from times alone, never from what is learnt. So what the rounds
book here is what the run will book.
"""

# n clients, T local steps

import heapq
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from fedsim.evaluation import evaluate_unit
from fedsim.local_training import Outcome, Unit, train_unit
from fedsim.records import Round
from fedsim.rounds import Training
from fedsim.runtime.batching import blocks, padded
from fedsim.runtime.executor import NOTHING, Needs, Shared, Work
from fedsim.updates import Partial


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What training will book: sums over its rounds, and the simulated clock at its end. ``clients`` of them took part at least once."""

    uploads: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    wasted_bytes: int = 0
    flops: float = 0.0
    wasted_flops: float = 0.0
    clock: float = 0.0
    clients: int = 0


@dataclass(frozen=True)
class Pace:
    """Seconds of a worker: ``block`` for each block between two merges, and ``step`` for each local step of a lane of the whole model."""

    block: float
    step: float


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Training gone through. ``totals`` are of all rounds, exact where all were ``planned``, else extrapolated from the first ones.

    So are ``compute``, the seconds of the busiest worker at a given pace, ``maps``, how often the driver waits for workers, and the ``driver``'s own seconds.
    """

    planned: int
    totals: Totals
    compute: float
    maps: float
    driver: float

    @classmethod
    def of(cls, training: Training, pace: Pace, workers: int, seconds: float) -> "DryRun":
        """At least one round, and no new one after ``seconds``."""
        training.init()  # what it refuses because of what clients keep, it must still refuse
        nobody = _Nobody(training, pace, workers)
        dry = replace(training, executor=nobody, log=None)
        state, sums, seen, start = dry.init(), Totals(), np.zeros(len(training.fleet), bool), time.perf_counter()
        while state.round < training.rounds and (state.round == 0 or time.perf_counter() - start < seconds):
            state, record = dry.step(state)
            seen[record.cohort] = True
            sums = _added(sums, record)
        factor = training.rounds / state.round
        return cls(
            planned=state.round,
            totals=_scaled(sums, factor, int(seen.sum()), len(training.holders)),
            compute=nobody.seconds * factor,
            maps=nobody.maps * factor,
            driver=(time.perf_counter() - start) * factor,
        )


class _Nobody:
    """An executor that trains nobody: every client returns at once, having learnt nothing. It notes the work it was given.

    ``seconds`` are those the busiest worker would need; ``maps`` counts the times the driver waits.
    """

    gpus_per_worker = 0.0

    def __init__(self, training: Training, pace: Pace, workers: int):
        self.pace, self.workers, self.lanes = pace, workers, training.lanes
        self.scales = [shape.forward_flops / max(1, training.shapes[0].forward_flops) for shape in training.shapes]
        self.nothing = np.zeros(training.shapes[0].trained.sizes.upload, training.layout.dtype)
        self.seconds, self.maps = 0.0, 0

    def share(self, value: Any) -> Shared:
        return Shared(value)

    def map(
        self,
        fn: Work,
        units: Sequence[Any],
        shared: Mapping[str, Any],
        needs: Needs | Sequence[Needs] = NOTHING,
        costs: Sequence[float] | None = None,
    ) -> list[Any]:
        if fn is evaluate_unit:
            return [[(0.0, 0.0)] * len(unit) for unit in units]
        assert fn is train_unit, fn
        work = list(units)
        self.seconds += _longest([self._seconds(unit) for unit in work], self.workers)
        self.maps += 1
        return [self._outcome(unit, shared) for unit in work]

    def _seconds(self, unit: Unit) -> float:
        cut = blocks(len(unit.clients), self.lanes)
        lanes = sum(padded(high - low, self.lanes) for low, high in cut)
        steps = min(unit.points[-1], int(unit.steps.max())) - unit.start
        return len(cut) * len(unit.points) * self.pace.block + self.scales[unit.shape] * lanes * steps * self.pace.step

    def _outcome(self, unit: Unit, shared: Mapping[str, Any]) -> Outcome:
        n, merged = len(unit.clients), None
        if len(unit.points) > 1:
            merged = shared[unit.server].held, shared["state"]
        node = Partial(self.nothing, float(unit.weights[-1].sum()))
        return Outcome(node=node, losses=np.zeros(n), merged=merged, carry=None, memory=None, blocks=np.full(n, "", "U16"))

    def close(self) -> None:
        """There is nothing to close."""

    def __enter__(self) -> "_Nobody":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _longest(costs: Sequence[float], workers: int) -> float:
    """What the busiest of ``workers`` gets where the longest go first, each to who is free first."""
    loads = [0.0] * min(workers, max(1, len(costs)))
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


def _added(sums: Totals, record: Round) -> Totals:
    names = [f.name for f in fields(Totals) if f.name not in ("clock", "clients")]
    return replace(sums, **{name: getattr(sums, name) + getattr(record, name) for name in names}, clock=record.clock)


def _scaled(sums: Totals, factor: float, clients: int, holders: int) -> Totals:
    """The sums of some rounds as those of all; of ``holders`` drawn evenly, so many are seen as if each round drew anew."""
    if factor == 1.0:
        return replace(sums, clients=clients)
    values = {f.name: getattr(sums, f.name) * factor for f in fields(Totals)}
    values |= {name: round(value) for name, value in values.items() if isinstance(getattr(sums, name), int)}
    unseen = (1.0 - clients / holders) ** factor if clients < holders else 0.0
    return Totals(**values | {"clients": round(holders * (1.0 - unseen))})
