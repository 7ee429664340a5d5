"""Drives a Simulation into a run directory: part files, checkpoints, progress; picks up where a killed driver stopped.

Order of commits: part files first, then the checkpoint that makes them count. On resume, parts past the last checkpoint
are dropped and written anew with the same rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import stages
from fedsim.encoding import packages_of
from fedsim.records import Record
from fedsim.runs.progress import Progress
from fedsim.runs.run import Run
from fedsim.runs.schema import column, tabulate
from fedsim.runs.store import RunStore
from fedsim.runtime.executor import Executor
from fedsim.serving import TICKS_PER_BLOCK, Memo
from fedsim.simulation import Simulation, deploy_stage, deployment_record, serve_steps, train_steps, world
from fedsim.stages import StageStore
from fedsim.submodels import Deployed

ROUNDS_PER_CHECKPOINT = 10
_TRAIN_TABLES, _SERVE_TABLES = ("rounds", "clients"), ("ticks", "events")


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
    trusted = packages_of(simulation)
    with RunStore.create(out, simulation, recipe=recipe, trusted=trusted) as store:
        if store.status() != "complete":
            with given_or_ray(executor) as workers, Progress(simulation, shown=progress) as bars:
                _Drive(simulation, store, StageStore(Path(out) / "stages", trusted), workers, bars, memo).all()
    return Run(store.path, simulation=simulation, trusted=trusted)


@contextmanager
def given_or_ray(executor: Executor | None) -> Iterator[Executor]:
    """``executor``, left open for its owner, or a Ray executor that is closed at the end."""
    if executor is not None:
        yield executor
        return
    from fedsim.runtime.ray import RayExecutor

    with RayExecutor() as own:
        yield own


class _Drive:
    def __init__(self, simulation: Simulation, store: RunStore, shared: StageStore, executor: Executor, bars: Progress, memo: Memo | None):
        self.simulation, self.store, self.shared, self.executor, self.bars, self.memo = simulation, store, shared, executor, bars, memo

    def all(self) -> None:
        params = self._train()
        self._serve(params, self._deploy(params))
        self.store.mark_complete()

    def _train(self) -> NDArray[np.floating]:
        name = stages.train_digest(self.simulation)
        state = self._resumed("train", _TRAIN_TABLES)
        if state is None and (finished := self.shared.get("train", name)) is not None:
            state = finished["state"]
            self._commit("train", state.round, state, finished["tables"])
        done = state.round if state else 0
        self.bars.begin("train", done)
        pending: list[Record] = []
        for step in train_steps(self.simulation, self.executor, state) if done < self.simulation.rounds else ():
            state = step.state
            pending.extend(step.records)
            self.bars.advance("train", step.index, step.records)
            if step.index % ROUNDS_PER_CHECKPOINT == 0 or step.index == self.simulation.rounds:
                self._commit("train", step.index, state, tabulate(pending))
                pending = []
        assert state is not None
        if not self.shared.path("train", name).exists():
            self.shared.put("train", name, {"state": state, "tables": {t: self._columns(t) for t in _TRAIN_TABLES}})
        params: NDArray[np.floating] = state.params
        return params

    def _deploy(self, params: NDArray[np.floating]) -> Deployed:
        name = stages.deploy_digest(self.simulation)
        self.bars.begin("deploy")
        deployed: Deployed | None = self._resumed("deploy", ())
        if deployed is None:
            deployed = self.shared.get("deploy", name)
            if deployed is None:
                deployed = deploy_stage(self.simulation, params, self.executor)
                self.shared.put("deploy", name, deployed)
            self._commit("deploy", 0, deployed, tabulate([deployment_record(self.simulation, params, deployed)]) | {"truth": self._truth()})
        self.bars.advance("deploy", 1)
        return deployed

    def _serve(self, params: NDArray[np.floating], deployed: Deployed) -> None:
        state = self._resumed("serve", _SERVE_TABLES)
        self.bars.begin("serve", state.tick if state else 0)
        pending: list[Record] = []
        for step in serve_steps(self.simulation, params, deployed, self.executor, state, self.memo):
            pending.extend(step.records)
            self.bars.advance("serve", step.index, step.records)
            if step.index % TICKS_PER_BLOCK == 0 or step.index == self.simulation.serving.ticks:
                # kept, because each is a point from which another policy can go on
                self._commit("serve", step.index, step.state, tabulate(pending), keep=True)
                pending = []

    def _resumed(self, stage: str, tables: tuple[str, ...]) -> Any:
        """State of the last checkpoint of ``stage``, or ``None``; rows past it are dropped."""
        index, state = self.store.latest_checkpoint(stage) or (-1, None)
        for table in tables:
            self.store.drop_parts_after(table, index)
        return state

    def _commit(self, stage: str, index: int, state: Any, tables: dict[str, dict[str, NDArray[Any]]], *, keep: bool = False) -> None:
        for table, columns in tables.items():
            self.store.write_part(table, index, columns)
        self.store.save_checkpoint(stage, index, state, keep=keep)

    def _columns(self, table: str) -> dict[str, NDArray[Any]]:
        rows = self.store.table(table)
        return {name: column(rows, name) for name in rows.column_names}

    def _truth(self) -> dict[str, NDArray[Any]]:
        """Each client's change by each drift of the scenario, for the scores."""
        changes = world(self.simulation).changes
        clients, drifts = np.indices(changes.shape)
        if not changes.size:
            return {"client": np.arange(len(changes)), "drift": np.full(len(changes), -1), "change_at": np.full(len(changes), -1)}
        return {"client": clients.ravel(), "drift": drifts.ravel(), "change_at": changes.ravel()}
