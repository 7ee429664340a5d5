"""Drives a Simulation into a run directory: part files, checkpoints, progress; picks up where a killed driver stopped.

Order of commits: part files first, then the checkpoint that makes them count. On resume, parts past the last checkpoint
are dropped and written anew with the same rows.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import stages
from fedsim.encoding import packages_of
from fedsim.errors import CheckpointError
from fedsim.records import Record
from fedsim.rounds import TrainState
from fedsim.runs.progress import Progress
from fedsim.runs.run import Run
from fedsim.runs.schema import column, tabulate
from fedsim.runs.store import RunStore
from fedsim.runtime.client_state import retain
from fedsim.runtime.executor import Executor
from fedsim.serving import TICKS_PER_BLOCK, Memo
from fedsim.simulation import Simulation, check, deploy_stage, deployment_record, serve_steps, train_steps, world
from fedsim.stages import Origin, StageStore
from fedsim.submodels import Deployed

ROUNDS_PER_CHECKPOINT = 10
_TRAIN_TABLES, _SERVE_TABLES = ("rounds", "clients"), ("ticks", "events")
Tables = dict[str, dict[str, NDArray[Any]]]


def drive(
    simulation: Simulation,
    out: str | Path,
    *,
    executor: Executor | None = None,
    progress: bool = True,
    recipe: str | None = None,
    memo: Memo | None = None,
) -> Run:
    """See :func:`fedsim.simulate`; ``memo`` is shared by the runs of a comparison."""
    with RunStore.create(out, simulation, recipe=recipe, trusted=packages_of(simulation)) as store:
        return _drive(simulation, store, executor, progress, memo)


def drive_stored(path: str | Path, *, executor: Executor | None, progress: bool, trusted: tuple[str, ...]) -> Run:
    """Continue the run in the directory ``path``, wherever it was moved."""
    store = RunStore.open(path, trusted=trusted)
    simulation = store.simulation()
    store.lock()
    with store:
        return _drive(simulation, store, executor, progress, None)


@contextmanager
def given_or_ray(executor: Executor | None) -> Iterator[Executor]:
    """``executor``, left open for its owner, or a Ray executor on all cores that is closed at the end; a GPU, where there is one, is shared by all."""
    if executor is not None:
        yield executor
        return
    from fedsim.runtime.ray import RayExecutor

    with RayExecutor(gpus_per_worker=gpu_share(os.cpu_count() or 1)) as own:
        yield own


def gpu_share(workers: int) -> float:
    """The share of a GPU each of ``workers`` reserves for reactions; 0 where there is none."""
    import torch

    return min(1.0, torch.cuda.device_count() / workers)


def _drive(simulation: Simulation, store: RunStore, executor: Executor | None, progress: bool, memo: Memo | None) -> Run:
    run = Run(store.path, simulation=simulation, trusted=packages_of(simulation))
    if store.status() == "complete":
        _same_origin(store, Origin.of(simulation, gpu=False), ignore="reactions")
        return run
    check(simulation)
    with given_or_ray(executor) as workers, Progress(simulation, shown=progress) as bars:
        _Drive(simulation, store, workers, bars, memo).all()
    return run


def _same_origin(store: RunStore, origin: Origin, ignore: str = "") -> None:
    """Note where the numbers of this run come from; ``CheckpointError`` where those already there come from elsewhere."""
    found = store.latest_checkpoint("origin")
    if found is None:
        store.save_checkpoint("origin", 0, origin, keep=True)
    elif differing := [name for name in origin.differences(found[1]) if name != ignore]:
        listed = ", ".join(f"{name} ({getattr(found[1], name)} then, {getattr(origin, name)} now)" for name in differing)
        raise CheckpointError(f"{store.path} was made by other code or from other data: {listed}; give the run another name or place")


class _Drive:
    def __init__(self, simulation: Simulation, store: RunStore, executor: Executor, bars: Progress, memo: Memo | None):
        self.simulation, self.store, self.executor, self.bars, self.memo = simulation, store, executor, bars, memo
        self.shared = StageStore(store.path.parent / "stages", packages_of(simulation))
        self.origin = Origin.of(simulation, gpu=executor.gpus_per_worker > 0)

    def all(self) -> None:
        _same_origin(self.store, self.origin)
        trained = self._train()
        self._serve(trained.params, self._deploy(trained))
        self.store.mark_complete()

    def _train(self) -> TrainState:
        name = stages.train_digest(self.simulation, self.origin)
        state: TrainState | None = self._resumed("train", _TRAIN_TABLES)
        if state is None and (finished := self.shared.get("train", name)) is not None:
            state = finished["state"]
            assert state is not None
            self._commit("train", state.round, state, finished["tables"])
        self.bars.begin("train", state.round if state else 0)
        if state is None or state.round < self.simulation.rounds:
            steps = train_steps(self.simulation, self.executor, state, self.store.client_directory)
            state = self._follow("train", steps, ROUNDS_PER_CHECKPOINT)
        assert state is not None
        if not self.shared.path("train", name).exists():
            # what clients keep lies in this run's directory and ends with training
            self.shared.put("train", name, {"state": replace(state, clients=None), "tables": {t: self._columns(t) for t in _TRAIN_TABLES}})
        return state

    def _deploy(self, trained: TrainState) -> Deployed:
        name = stages.deploy_digest(self.simulation, self.origin)
        self.bars.begin("deploy")
        deployed: Deployed | None = self._resumed("deploy", ())
        if deployed is None:
            finished = self.shared.get("deploy", name)
            if finished is None:
                deployed, recovery = deploy_stage(self.simulation, trained, self.executor)
                tables = tabulate([*recovery, deployment_record(self.simulation, trained.params, deployed)])
                finished = {"deployed": deployed, "tables": tables}
                self.shared.put("deploy", name, finished)
            # the true changes are of this run's world, not of the submodels it shares
            deployed, tables = finished["deployed"], finished["tables"] | {"truth": self._truth()}
            for table, columns in tables.items():
                # recovery adds rounds behind those of training
                self.store.write_part(table, self.simulation.rounds + 1 if table in _TRAIN_TABLES else 0, columns)
            self.store.save_checkpoint("deploy", 0, deployed)
        assert deployed is not None
        self.bars.advance("deploy", 1)
        return deployed

    def _serve(self, params: NDArray[np.floating], deployed: Deployed) -> None:
        state = self._resumed("serve", _SERVE_TABLES)
        self.bars.begin("serve", state.tick if state else 0)
        self._follow("serve", serve_steps(self.simulation, params, deployed, self.executor, state, self.memo), TICKS_PER_BLOCK)

    def _follow(self, stage: str, steps: Any, every: int) -> Any:
        """Commit ``steps`` each ``every`` of them, at the last, and at Ctrl-C; the last state."""
        pending: list[Record] = []
        step = None
        last = {"train": self.simulation.rounds, "serve": self.simulation.serving.ticks}[stage]
        try:
            for step in steps:
                pending.extend(step.records)
                self.bars.advance(stage, step.index, step.records)
                if step.index % every == 0 or step.index == last:
                    # those of serving are kept, because each is a point from which another policy can go on
                    self._commit(stage, step.index, step.state, tabulate(pending), keep=stage == "serve")
                    pending = []
        except KeyboardInterrupt:
            if pending and step is not None:
                self._commit(stage, step.index, step.state, tabulate(pending))
            raise
        return step.state if step is not None else None

    def _resumed(self, stage: str, tables: tuple[str, ...]) -> Any:
        """State of the last checkpoint of ``stage``, or ``None``; rows past it are dropped, unless a later stage wrote them."""
        index, state = self.store.latest_checkpoint(stage) or (-1, None)
        if stage != "train" or not self.store.checkpoints("deploy"):
            for table in tables:
                self.store.drop_parts_after(table, index)
        return state

    def _commit(self, stage: str, index: int, state: Any, tables: Tables, *, keep: bool = False) -> None:
        for table, columns in tables.items():
            self.store.write_part(table, index, columns)
        self.store.save_checkpoint(stage, index, state, keep=keep)
        if stage == "train" and state.clients is not None:
            self._prune_client_states()

    def _prune_client_states(self) -> None:
        """Leave the segments that a stored checkpoint reads."""
        kept = [self.store.checkpoint("train", index).clients for index in self.store.checkpoints("train")]
        retain(self.store.client_directory, [states for states in kept if states is not None])

    def _columns(self, table: str) -> dict[str, NDArray[Any]]:
        rows = self.store.table(table)
        return {name: column(rows, name) for name in rows.column_names}

    def _truth(self) -> dict[str, NDArray[Any]]:
        """Each client's change by each drift of the scenario, for the scores."""
        changes = world(self.simulation).changes
        if not changes.size:
            return {"client": np.arange(len(changes)), "drift": np.full(len(changes), -1), "change_at": np.full(len(changes), -1)}
        clients, drifts = np.indices(changes.shape)
        return {"client": clients.ravel(), "drift": drifts.ravel(), "change_at": changes.ravel()}
