"""Long-lived Ray actors as workers. Ray places processes and moves objects; what runs where is decided here, and lost work is queued again.

Ray's own retries are off: they wait for the same actor to restart. A unit is a pure function, so another worker may compute it.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from fedsim.errors import CapacityError, WorkerError
from fedsim.runtime.executor import NOTHING, Needs, Recent, Shared, Work

IN_FLIGHT = 2  # the second call hides the first one's round trip
ATTEMPTS = 3
KEPT_JOBS = 4


class _Worker:
    """The actor: one torch thread, a cache, and the shared values it has unpacked."""

    def __init__(self, setup: Callable[[], object] | None):
        import torch

        torch.set_num_threads(1)
        self._cache = Recent()
        self._jobs = 0
        self._values: dict[Any, tuple[int, Any]] = {}
        if setup is not None:
            setup()

    def pid(self) -> int:
        return os.getpid()

    def run(self, job: list[Any], unit: Any) -> "_Result":
        try:
            self._begin(job[0])
            fn, handles = self._value(job[0])
            shared = {name: self._value(held) for name, held in handles.items()}
            return _Result(value=fn(unit, shared, self._cache))
        except Exception as error:
            return _Result(error=_portable(error))

    def _begin(self, job: Any) -> None:
        """Let go of what the last jobs did not read: a value held here keeps its memory in the object store."""
        if job not in self._values:
            self._jobs += 1
            self._values = {k: v for k, v in self._values.items() if v[0] > self._jobs - KEPT_JOBS}

    def _value(self, reference: Any) -> Any:
        value = self._values[reference][1] if reference in self._values else ray.get(reference)
        self._values[reference] = self._jobs, value
        return value


@dataclass(frozen=True, eq=False)
class _Result:
    """What a unit gave: a value, or the exception with the chain of its causes, which pickling would drop."""

    value: Any = None
    error: tuple[BaseException, ...] = ()


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it: its actor, and the calls in flight with their units, oldest first.

    One that replaces another is given nothing until it has ``started``: the others go on meanwhile.
    """

    actor: ActorHandle
    started: Any
    ready: bool = False
    calls: dict[Any, int] = field(default_factory=dict)


class RayExecutor:
    """``workers`` actors (default: one per GPU if any is asked for, else one per core) of the cluster at ``address``.

    ``address=None`` joins the cluster this process is connected to, or starts one that ends with the executor; "auto" joins a running one. ``gpus_per_worker=0.25`` lets four
    workers share a GPU. ``setup`` runs once in every worker before its first unit. After ``patience_seconds`` of silence the cluster is
    asked whether replacements can still be placed. Raises ``CapacityError`` for resources the cluster lacks, at once, and ``WorkerError`` for
    workers that cannot start.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        gpus_per_worker: float = 0.0,
        setup: Callable[[], object] | None = None,
        patience_seconds: float = 60.0,
    ):
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be >= 1 or None, got {workers}")
        if not gpus_per_worker >= 0:
            raise ValueError(f"gpus_per_worker must be >= 0, got {gpus_per_worker}")
        self.gpus_per_worker, self._setup, self._patience = float(gpus_per_worker), setup, patience_seconds
        self._owner = _connect(address, workers, self.gpus_per_worker)
        try:
            self.workers = workers or _default_workers(self.gpus_per_worker)
            _check_capacity(self.workers, self.gpus_per_worker)
            self._members = [self._start() for _ in range(self.workers)]
            self._await_start()
        except BaseException:
            self.close()
            raise

    def share(self, value: Any) -> Shared:
        return Shared(_put(value, "a shared value"))

    def map(self, fn: Work, units: Sequence[Any], shared: Mapping[str, Any], needs: Needs = NOTHING) -> list[Any]:
        if needs.gpus > self.gpus_per_worker:
            raise CapacityError(
                f"a unit needs {needs.gpus:g} GPU, the workers have {self.gpus_per_worker:g} each; start RayExecutor(gpus_per_worker={needs.gpus:g})"
            )
        handles = {name: value.held if isinstance(value, Shared) else _put(value, name) for name, value in shared.items()}
        job = [_put((fn, handles), getattr(fn, "__qualname__", "fn"))]
        return _Map(self, job, units).results()

    def pids(self) -> list[int]:
        """Process ids of the workers, on their own machines."""
        return list(ray.get([m.actor.pid.remote() for m in self._members]))

    def close(self) -> None:
        for member in getattr(self, "_members", []):
            ray.kill(member.actor)
        self._members = []
        if self._owner and ray.is_initialized():
            ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self) -> _Member:
        kind = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=1, num_gpus=self.gpus_per_worker)(_Worker)
        actor = kind.remote(self._setup)
        return _Member(actor, actor.pid.remote())

    def _await_start(self) -> None:
        try:
            ray.get([m.started for m in self._members], timeout=self._patience)
            for member in self._members:
                member.ready = True
        except GetTimeoutError:
            free = ray.available_resources()
            raise CapacityError(
                f"{self.workers} workers of 1 CPU and {self.gpus_per_worker:g} GPU did not start in {self._patience:g} s; free now: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"
            ) from None
        except RayActorError as error:
            raise WorkerError(f"stage start: a worker could not start: {_last_lines(error)}") from error

    def _replace(self, member: _Member) -> None:
        self._members[self._members.index(member)] = self._start()


class _Map:
    """One map under way: workers pull units, at most two in flight each; a lost unit goes to the head of the queue."""

    def __init__(self, executor: RayExecutor, job: list[Any], units: Sequence[Any]):
        self.executor, self.job, self.units = executor, job, units
        self.queue = deque(range(len(units)))
        self.found: dict[int, Any] = {}
        self.losses: dict[int, list[str]] = {}
        self.heard = time.monotonic()

    def results(self) -> list[Any]:
        try:
            while len(self.found) < len(self.units):
                self._feed()
                self._collect()
        except BaseException:
            self._abandon()
            raise
        return [self.found[i] for i in range(len(self.units))]

    def _feed(self) -> None:
        members = [member for member in self.executor._members if member.ready]
        for depth in range(IN_FLIGHT):
            for member in members:
                if self.queue and len(member.calls) == depth:
                    index = self.queue.popleft()
                    member.calls[self._submit(member, index)] = index

    def _submit(self, member: _Member, index: int) -> Any:
        try:
            return member.actor.run.remote(self.job, self.units[index])
        except (TypeError, cloudpickle.pickle.PicklingError) as error:
            raise _unpicklable(self.units[index], f"unit {index}", error) from error

    def _collect(self) -> None:
        calls = {call: member for member in self.executor._members for call in member.calls}
        starting = {member.started: member for member in self.executor._members if not member.ready}
        done, _ = ray.wait([*calls, *starting], num_returns=1, timeout=min(1.0, self.executor._patience))
        if done:
            self.heard = time.monotonic()
        elif time.monotonic() - self.heard > self.executor._patience:
            self._check_alive()
        for reference in done:
            if reference in starting:
                starting[reference].ready = True  # or it could not start, which its first call will say
            elif reference in calls[reference].calls:
                self._take(calls[reference], reference)

    def _take(self, member: _Member, call: Any) -> None:
        try:
            result = ray.get(call)
        except RayTaskError as error:  # outside the user's function: its result cannot be sent, or the call cannot be read
            raise WorkerError(f"stage run: {self._name(member.calls[call])}: {_last_lines(error)}") from error
        except RayError as error:
            self._lost(member, error)
            return
        index = member.calls.pop(call)
        if result.error:
            _raise_chained(result.error)
        self.found[index] = result.value

    def _lost(self, member: _Member, error: RayError) -> None:
        """Queue the member's units again and replace it. The oldest was running, so it alone is under suspicion."""
        indices = list(member.calls.values())
        member.calls.clear()
        self.queue.extendleft(reversed(indices))
        causes = self.losses.setdefault(indices[0], [])
        causes.append(_last_lines(error))
        if isinstance(error, OutOfMemoryError) and sum("memory" in cause for cause in causes) == 2:
            raise CapacityError(
                f"{self._name(indices[0])} was killed twice because its node ran out of memory; use fewer workers a node, smaller lanes, or nodes with more memory ({causes[-1]})"
            )
        if len(causes) == ATTEMPTS:
            listed = "; ".join(f"{i + 1}: {c}" for i, c in enumerate(causes))
            raise WorkerError(f"stage run: {self._name(indices[0])} was lost {ATTEMPTS} times ({listed})")
        ray.kill(member.actor)
        self.executor._replace(member)

    def _check_alive(self) -> None:
        """``CapacityError`` if every worker still waits to be placed; otherwise units are merely long."""
        self.heard = time.monotonic()
        started, _ = ray.wait([m.started for m in self.executor._members], num_returns=1, timeout=0)
        if not started:
            have = ray.cluster_resources()
            raise CapacityError(
                f"no worker could be placed again; the cluster has {have.get('CPU', 0):g} CPU and {have.get('GPU', 0):g} GPU left"
            )

    def _abandon(self) -> None:
        """Take back calls that have not begun; one that runs ends by itself, and its result is dropped."""
        for member in self.executor._members:
            for call in member.calls:
                ray.cancel(call)
            member.calls.clear()

    def _name(self, index: int) -> str:
        return f"unit {index} ({str(self.units[index])[:200]})"


def _connect(address: str | None, workers: int | None, gpus: float) -> bool:
    """Connect to a cluster; whether it is ours to shut down."""
    if ray.is_initialized():
        if address is not None:
            raise ValueError(
                f"this process is already connected to a Ray cluster; call ray.shutdown() before address={address!r}, or give none to join"
            )
        return False
    if address is None and gpus > 0:
        _check_local_gpus(gpus * (workers or 1))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": max(workers or 0, os.cpu_count() or 1)}
    ray.init(address=address, **options)
    return True


def _check_local_gpus(wanted: float) -> None:
    """Before a cluster is started on this machine: its GPUs are those torch sees."""
    import torch

    have = torch.cuda.device_count()
    if wanted > have:
        raise CapacityError(
            f"the workers need {wanted:g} GPU, this machine has {have}; use gpus_per_worker=0, or give the address of a cluster that has them"
        )


def _check_capacity(workers: int, gpus: float) -> None:
    have = ray.cluster_resources()
    for name, each in (("CPU", 1.0), ("GPU", gpus)):
        if workers * each > have.get(name, 0.0):
            raise CapacityError(
                f"{workers} workers need {workers * each:g} {name}, the cluster has {have.get(name, 0.0):g}; ask for fewer workers or join a larger cluster"
            )


def _default_workers(gpus: float) -> int:
    have = ray.cluster_resources()
    if gpus > 0:
        return max(1, int(have.get("GPU", 0.0) / gpus))
    return max(1, int(have.get("CPU", 1.0)))


def _put(value: Any, name: str) -> Any:
    try:
        return ray.put(value)
    except (TypeError, cloudpickle.pickle.PicklingError) as error:
        raise _unpicklable(value, name, error) from error


def _unpicklable(value: Any, name: str, error: Exception) -> TypeError:
    path, culprit = _find_unpicklable(value, name)
    return TypeError(
        f"{path}, a {type(culprit).__module__}.{type(culprit).__qualname__}, cannot be sent to a worker ({str(error).splitlines()[0]})"
    )


def _find_unpicklable(value: Any, path: str) -> tuple[str, Any]:
    """The deepest part of ``value`` that does not pickle."""
    if isinstance(value, Mapping):
        parts = [(f"{path}[{k!r}]", v) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    else:
        parts = [(f"{path}.{k}", v) for k, v in getattr(value, "__dict__", {}).items()]
    for where, part in parts:
        if not _pickles(part):
            return _find_unpicklable(part, where)
    return path, value


def _pickles(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True


def _portable(error: BaseException) -> tuple[BaseException, ...]:
    """The exception and its causes, outermost first; one that does not pickle is named by a ``WorkerError`` instead."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and len(chain) < 8:
        chain.append(current if _pickles(current) else WorkerError(f"stage run: {type(current).__qualname__}: {current}"))
        current = current.__cause__
    return tuple(chain)


def _raise_chained(chain: tuple[BaseException, ...]) -> None:
    for error, cause in pairwise(chain):
        error.__cause__ = cause
    raise chain[0]


def _last_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ActorDiedError | RayTaskError) and any("Error" in line for line in lines):
        lines = [line for line in lines if "Error" in line] + lines[-1:]
    return " | ".join(lines[-4:])[-400:]
