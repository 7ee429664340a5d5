"""Long-lived Ray actors as workers. Ray places processes and moves objects; what runs where is decided here, and lost work is queued again.

Ray's own retries are off: they wait for the same actor to restart. A unit is a pure function, so another worker may compute it.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import TracebackType
from typing import Any, Self

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
)
from ray.experimental import get_local_object_locations

from fedsim.errors import FedsimError, WorkerError
from fedsim.runtime import resources
from fedsim.runtime.actor import Actor, Result
from fedsim.runtime.dispatch import ATTEMPTS, Dispatch, Member
from fedsim.runtime.executor import NOTHING, Needs, Shared, Work, needs_of
from fedsim.runtime.sending import chained, last_lines, unsendable

_POLL_SECONDS = 1.0
_UNPICKLABLE = (TypeError, cloudpickle.pickle.PicklingError)
_FULL = (ObjectStoreFullError, OutOfDiskError)


class RayExecutor:
    """``workers`` actors (default: one per GPU if any is asked for, else one per core) of the cluster at ``address``.

    ``address=None`` joins the cluster this process is connected to or that ``RAY_ADDRESS`` names, as it does in a script sent by
    ``ray job submit``; where there is none it starts one that ends with the executor. "auto" joins one that runs on this machine: ``ray start --head`` on one
    machine and ``ray start --address=HEAD:6379`` on each other make it, and then the driver may run on any of them.

    ``gpus_per_worker=0.25`` lets four workers share a GPU. ``gpu_workers`` of the workers have that share (a whole GPU if none is given), the others
    none; all draw from one queue, where units that need a GPU wait for a worker that has one. ``setup`` runs once in every worker before its first
    unit. ``twice`` lets an idle worker do a slow unit again at the end of a map; the first result counts. After ``patience_seconds`` of silence
    the cluster is asked whether replacements can still be placed. Raises ``CapacityError`` for resources the cluster lacks, at once, and
    ``WorkerError`` for workers that cannot start.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        gpus_per_worker: float = 0.0,
        setup: Callable[[], object] | None = None,
        patience_seconds: float = 60.0,
        gpu_workers: int | None = None,
        twice: bool = False,
    ):
        resources.check_arguments(workers, gpus_per_worker, gpu_workers)
        if gpu_workers is not None and gpus_per_worker == 0:
            gpus_per_worker = 1.0
        self.gpus_per_worker, self._setup, self._patience, self._twice = float(gpus_per_worker), setup, patience_seconds, twice
        self._members: list[_Worker] = []
        self._owner = _connect(address, workers, self.gpus_per_worker * (gpu_workers or workers or 1))
        try:
            have = ray.cluster_resources()
            shares = resources.gpu_shares(workers, self.gpus_per_worker, gpu_workers, have)
            resources.check_cluster(shares, have)
            self.workers, self._store = len(shares), resources.Store(_smallest_store())
            self._members += [self._start(gpus) for gpus in shares]
            self._await_start()
        except BaseException:
            self.close()
            raise

    def share(self, value: Any) -> Shared:
        shared = Shared(_put(value, "a shared value"))
        self._store.hold(shared, _bytes_stored(shared.held))
        return shared

    def map(
        self,
        fn: Work,
        units: Sequence[Any],
        shared: Mapping[str, Any],
        needs: Needs | Sequence[Needs] = NOTHING,
        costs: Sequence[float] | None = None,
    ) -> list[Any]:
        """``needs`` of all units, or one a unit."""
        each = needs_of(units, needs, costs)
        most = max((need.gpus for need in each), default=0.0)
        if most > self.gpus_per_worker:
            raise resources.share_too_small(most, self.gpus_per_worker)
        handles = {name: value.held if isinstance(value, Shared) else _put(value, name) for name, value in shared.items()}
        job = [_put((fn, handles), getattr(fn, "__qualname__", "fn"))]
        return _Map(self, job, units, Dispatch(self._members, each, costs, self._twice)).results()

    def pids(self) -> list[int]:
        """Process ids of the workers, on their own machines."""
        return list(ray.get([m.actor.pid.remote() for m in self._members], timeout=self._patience))

    def close(self) -> None:
        """End the workers, and the cluster if the executor started it. What others started goes on."""
        if ray.is_initialized():
            for member in self._members:
                ray.kill(member.actor)
            if self._owner:
                ray.shutdown()
        self._members.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self, gpus: float, job: list[Any] | None = None) -> "_Worker":
        """In the background. One that replaces another unpacks its ``job`` before it counts as started."""
        options = {"max_restarts": 0, "max_task_retries": 0, "num_cpus": 1, "num_gpus": gpus}
        kind = ray.remote(**options, enable_task_events=False)(_Actor)  # the record of every call would fill the workers' memory
        try:
            actor = kind.remote(gpus, self._setup)
        except _UNPICKLABLE as error:
            raise unsendable(self._setup, "setup", cloudpickle.dumps, error) from error
        return _Worker(gpus=gpus, started=False, actor=actor, hello=actor.hello.remote(job))

    def _await_start(self) -> None:
        try:
            nodes = ray.get([m.hello for m in self._members], timeout=self._patience)
        except GetTimeoutError:
            raise resources.not_started([m.gpus for m in self._members], self._patience, ray.available_resources()) from None
        except RayActorError as error:
            raise WorkerError(f"stage start: a worker could not start: {_cause(error)}") from error
        for member, node in zip(self._members, nodes, strict=True):
            member.node, member.started = node, True

    def _replace(self, member: "_Worker", job: list[Any]) -> None:
        ray.kill(member.actor)
        self._members[self._members.index(member)] = self._start(member.gpus, job)


class _Actor(Actor):
    """With Ray's ways to read and to pickle."""

    def __init__(self, gpus: float, setup: Callable[[], object] | None):
        super().__init__(ray.get, cloudpickle.dumps, gpus, setup)

    def hello(self, job: list[Any] | None) -> str:
        """The node it is on."""
        if job is not None:
            self.prepare(job)
        return str(ray.get_runtime_context().get_node_id())


@dataclass(eq=False, kw_only=True)
class _Worker(Member):
    """``hello`` arrives when the actor has started."""

    actor: ActorHandle
    hello: Any


class _Map:
    """One map under way: sends units as :class:`Dispatch` says, and takes results as they come."""

    def __init__(self, executor: RayExecutor, job: list[Any], units: Sequence[Any], dispatch: Dispatch):
        self.executor, self.job, self.units, self.dispatch = executor, job, units, dispatch
        self.found: dict[int, Any] = {}
        self.starved: set[int] = set()
        self.failed_starts = 0
        self.result_bytes, self.peak = 0, 0
        self.heard = time.monotonic()

    def results(self) -> list[Any]:
        try:
            while self.dispatch.remaining:
                self._send()
                self._collect()
        except BaseException:
            self._abandon()
            raise
        return [self.found[i] for i in range(len(self.units))]

    def _send(self) -> None:
        while chosen := self.dispatch.next(time.monotonic()):
            member, unit = chosen
            assert isinstance(member, _Worker)
            self.dispatch.sent(member, unit, self._submit(member, unit), time.monotonic())

    def _submit(self, member: "_Worker", unit: int) -> Any:
        value = self.units[unit]
        try:
            return member.actor.run.remote(self.job, value)
        except _UNPICKLABLE as error:
            raise unsendable(value, f"unit {unit}", cloudpickle.dumps, error) from error
        except _FULL as error:
            raise resources.store_full(_cause(error)) from error

    def _collect(self) -> None:
        members = self.executor._members
        expected = {call: member for member in members for call in member.calls} | {m.hello: m for m in members if not m.started}
        done, _ = ray.wait(list(expected), num_returns=1, timeout=min(_POLL_SECONDS, self.executor._patience))
        if done:
            self.heard = time.monotonic()
        elif self.dispatch.idle() and time.monotonic() - self.heard > self.executor._patience:
            raise resources.not_replaced(self.executor._patience, ray.cluster_resources())
        for call in done:
            member = expected[call]
            if call is member.hello and not member.started:
                self._welcome(member)
            else:
                self._take(member, call)

    def _welcome(self, member: "_Worker") -> None:
        """A replacement has started, or could not."""
        try:
            member.node = ray.get(member.hello, timeout=self.executor._patience)
        except RayError as error:
            self.failed_starts += 1
            if self.failed_starts == ATTEMPTS:
                raise WorkerError(f"stage start: workers that replace lost ones could not start: {_cause(error)}") from error
            self.executor._replace(member, self.job)
        else:
            member.started, self.failed_starts = True, 0

    def _take(self, member: "_Worker", call: Any) -> None:
        try:
            result: Result = ray.get(call, timeout=self.executor._patience)
        except RayError as error:
            if not isinstance(error, TaskCancelledError | RayTaskError | ObjectStoreFullError | OutOfDiskError) or isinstance(
                error, ObjectLostError
            ):
                self._lost(member, error)
            elif (unit := self.dispatch.arrived(member, call, time.monotonic())) is not None:
                raise self._outside(unit, error) from error
            return
        unit = self.dispatch.arrived(member, call, time.monotonic())
        if unit is None:
            return
        if result.error:
            raise chained(result.error)
        self.found[unit] = result.value
        self.peak = max(self.peak, result.peak)
        self.result_bytes += _bytes_stored(call)
        self.executor._store.check(self.result_bytes)

    def _outside(self, unit: int, error: RayError) -> FedsimError:
        """What failed outside the user's function: its result cannot be sent or stored, or the call cannot be read."""
        if isinstance(error, _FULL):
            return resources.store_full(_cause(error))
        return WorkerError(f"stage run: {self._name(unit)}: {_cause(error)}")

    def _lost(self, member: "_Worker", error: RayError) -> None:
        starved = isinstance(error, OutOfMemoryError)
        unit = self.dispatch.lost(member, _cause(error), starved)
        self.executor._replace(member, self.job)
        if unit is None:
            return
        causes = self.dispatch.losses[unit]
        if starved and unit in self.starved:
            raise resources.out_of_memory(self._name(unit), self.peak, causes[-1])
        if starved:
            self.starved.add(unit)
        if len(causes) == ATTEMPTS:
            listed = "; ".join(f"{i + 1}: {c}" for i, c in enumerate(causes))
            raise WorkerError(f"stage run: {self._name(unit)} was lost {ATTEMPTS} times ({listed})")

    def _abandon(self) -> None:
        """Take back calls that have not begun; one that runs ends by itself, and its result is dropped."""
        for member in self.executor._members:
            for call in member.calls:
                ray.cancel(call)
            member.forget()

    def _name(self, unit: int) -> str:
        return f"unit {unit} ({str(self.units[unit])[:200]})"


def _smallest_store() -> float:
    return float(min(node["Resources"].get("object_store_memory", inf) for node in ray.nodes() if node["Alive"]))


def _bytes_stored(reference: Any) -> int:
    """0 for what is small and travels with its message."""
    found = get_local_object_locations([reference]).get(reference, {})
    return found.get("object_size") or 0 if found.get("node_ids") else 0


def _connect(address: str | None, workers: int | None, gpus: float) -> bool:
    """Connect to a cluster; whether the connection, and a cluster started for it, is ours to end."""
    if ray.is_initialized():
        if address is not None:
            raise ValueError(
                f"this process is already connected to a Ray cluster; call ray.shutdown() before address={address!r}, or give none to join"
            )
        return False
    address = address or os.environ.get("RAY_ADDRESS") or None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        if gpus > 0:
            resources.check_this_machine(gpus)
        options |= {"include_dashboard": False, "num_cpus": max(workers or 0, os.cpu_count() or 1)}
    ray.init(address=address or "local", **options)  # None would join any cluster that runs on this machine
    return True


def _put(value: Any, name: str) -> Any:
    try:
        return ray.put(value)
    except _UNPICKLABLE as error:
        raise unsendable(value, name, cloudpickle.dumps, error) from error
    except _FULL as error:
        raise resources.store_full(_cause(error)) from error


def _cause(error: RayError) -> str:
    return last_lines(error, only_errors=isinstance(error, ActorDiedError | RayTaskError))
