"""Many trainings of one study on all cores: a trial is a value, its curves come back. One process a core, one torch thread each."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.communication import UploadSchedule
from fedsim.errors import DivergedError
from fedsim.fleet import Fleet
from fedsim.rounds import Training
from fedsim.runtime import SerialExecutor
from fedsim.strategies import Strategy
from fedsim.tasks import Task

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One training. ``lanes`` as in :meth:`fedsim.rounds.Training.prepare`."""

    task: Task
    fleet: Fleet
    strategy: Strategy
    communication: UploadSchedule
    rounds: int
    seed: int
    evaluate_every: int = 1
    lanes: int | None = None


@dataclass(frozen=True, eq=False)
class Curves:
    """A training by round (R,): test accuracy (``nan`` where not read, and from the round that diverged on), uploads, bytes and clock until then."""

    accuracy: Floats
    uploads: Floats
    bytes_up: Floats
    bytes_down: Floats
    clock: Floats
    cost_ratio: Floats

    @property
    def bytes(self) -> Floats:
        return self.bytes_up + self.bytes_down

    def final(self) -> float:
        """Mean accuracy of the evaluations in the last quarter of the simulated time: of 20 equal rounds the last 5."""
        late = self.clock > 0.75 * self.clock[-1] * (1 + 1e-9)
        read = self.accuracy[late & ~np.isnan(self.accuracy)]
        return float("nan") if np.isnan(self.accuracy[-1]) else float(read.mean())

    def best(self) -> float:
        """The largest accuracy of any round, which looks at the test data to stop: optimistic, but what the literature prints."""
        return float(np.nanmax(self.accuracy, initial=0.0))


def train(trial: Trial) -> Curves:
    """Train in this process."""
    training = Training.prepare(
        task=trial.task,
        fleet=trial.fleet,
        strategy=trial.strategy,
        communication=trial.communication,
        rounds=trial.rounds,
        seed=trial.seed,
        executor=SerialExecutor(),
        lanes=trial.lanes,
        evaluate_every=trial.evaluate_every,
    )
    state, rows = training.init(), []
    try:
        while state.round < trial.rounds:
            state, done = training.step(state)
            rows.append((done.test_accuracy, done.uploads, done.bytes_up, done.bytes_down, done.seconds, done.cost_ratio))
    except DivergedError:
        rows.append((float("nan"), 0, 0, 0, 1e-9, 0))
    accuracy, uploads, up, down, seconds, ratio = np.array(rows, np.float64).T
    return Curves(accuracy, uploads.cumsum(), up.cumsum(), down.cumsum(), seconds.cumsum(), ratio)


class Trainers:
    """Processes that train; made by :func:`trainers`."""

    def __init__(self, pool: ProcessPoolExecutor):
        self._pool = pool

    def train(self, trials: Sequence[Trial]) -> list[Curves]:
        """Curves of each trial, in order."""
        return list(self._pool.map(train, trials))


@contextmanager
def trainers() -> Iterator[Trainers]:
    """One process a core, kept for a whole study because each loads torch anew."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=context, initializer=_one_thread) as pool:
        yield Trainers(pool)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
