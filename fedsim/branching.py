"""Fork a stored run: the same world up to a tick, another policy from there."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.driver import drive
from fedsim.encoding import packages_of
from fedsim.policies import Policy, Switch, SwitchState
from fedsim.runs.run import Run
from fedsim.runs.schema import SCHEMAS, column
from fedsim.runs.store import RunStore, run_directory
from fedsim.runtime.executor import Executor
from fedsim.serving import ServingState

if TYPE_CHECKING:
    from fedsim.simulation import Simulation


def fork(
    run: Run, *, at: int, policy: Policy, out: str | Path | None = None, executor: Executor | None = None, progress: bool = True
) -> Run:
    """``run`` served by its own policy up to tick ``at`` and by ``policy`` from then on, as a run of its own beside it (or under ``out``).

    Training, submodels and all ticks before the last checkpoint up to ``at`` are taken over. The same policy gives the same
    tables. Raises ``ValueError`` for a tick outside the run and ``CheckpointError`` where the run was not served that far.
    """
    forked, place = _forked(run, at, policy), _place(run, out)
    with RunStore.create(place, forked, recipe=run.recipe, trusted=packages_of(forked)) as store:
        if store.latest_checkpoint("deploy") is None:
            _take_over(RunStore.open(run.path, trusted=packages_of(forked)), store, at, len(forked.fleet), policy)
    return drive(forked, place, executor=executor, progress=progress, recipe=run.recipe)


def fork_directory(run: Run, *, at: int, policy: Policy, out: str | Path | None = None) -> Path:
    """Where :func:`fork` stores the run it makes of the same arguments."""
    return run_directory(_place(run, out), _forked(run, at, policy))


def _forked(run: Run, at: int, policy: Policy) -> "Simulation":
    simulation: Simulation = run.simulation
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < simulation.serving.ticks:
        raise ValueError(f"at must be a tick of the run, 0 to {simulation.serving.ticks - 1}, got {at!r}")
    return replace(simulation, policy=Switch(first=simulation.policy, then=policy, at=at))


def _place(run: Run, out: str | Path | None) -> Path:
    return run.path.resolve().parent if out is None else Path(out)


def _take_over(source: RunStore, store: RunStore, at: int, num_clients: int, policy: Policy) -> None:
    """Copy what the two runs have in common: first the rows, then the checkpoints that make them count, so a killed fork can be resumed."""
    index = max((i for i in source.checkpoints("serve") if i <= at), default=None)
    for table in SCHEMAS:
        rows = source.table(table)
        if table in ("ticks", "events"):
            rows = rows.filter(_before(rows["tick"], index or 0))
        if len(rows):
            store.write_part(table, index or 0 if table in ("ticks", "events") else 0, {n: column(rows, n) for n in rows.column_names})
    trained = source.checkpoints("train")[-1]
    store.save_checkpoint("train", trained, source.checkpoint("train", trained))
    if index is not None:
        store.save_checkpoint("serve", index, _switched(source.checkpoint("serve", index), num_clients, policy), keep=True)
    store.save_checkpoint("deploy", 0, source.checkpoint("deploy", 0))


def _switched(state: ServingState, num_clients: int, policy: Policy) -> ServingState:
    first = state.policy
    return replace(state, policy=SwitchState(quiet_until=first.quiet_until, first=first, then=policy.init(num_clients)))


def _before(ticks: Any, index: int) -> Any:
    import pyarrow.compute as pc

    return pc.less(ticks, index)
