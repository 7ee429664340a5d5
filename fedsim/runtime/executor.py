"""Where work runs: a pure function over units, in any process, results in unit order. What it computes never depends on where."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self


@dataclass(frozen=True)
class Needs:
    """What a unit needs of its worker: ``gpus`` is a share, 0.25 lets four workers use one."""

    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not self.gpus >= 0:
            raise ValueError(f"gpus must be >= 0, got {self.gpus}")


NOTHING = Needs()


@dataclass(frozen=True, eq=False)
class Shared:
    """A handle to a value put once; give it to as many maps as you like. Only the executor that made it can read it."""

    held: Any


Work = Callable[[Any, Mapping[str, Any], MutableMapping[Any, Any]], Any]


class Executor(Protocol):
    """Runs ``fn(unit, shared, cache)`` for every unit. ``fn`` is a module-level pure function; arrays arrive read-only.

    ``units`` may be lazy: each is built when it is sent, and not kept. What they need of a worker, and what they are predicted to cost (in any one
    measure), decides which goes where and when; results come in the order of units all the same.
    ``cache`` belongs to the worker and forgets what it has not used for long: built models, mounted data; nothing in it may change a result.
    An exception of ``fn`` ends the map and is raised as it was, with its cause.
    """

    workers: int
    gpus_per_worker: float

    def share(self, value: Any) -> Shared: ...
    def map(
        self,
        fn: Work,
        units: Sequence[Any],
        shared: Mapping[str, Any],
        needs: Needs | Sequence[Needs] = ...,
        costs: Sequence[float] | None = ...,
    ) -> list[Any]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def needs_of(units: Sequence[Any], needs: Needs | Sequence[Needs], costs: Sequence[float] | None) -> Sequence[Needs]:
    """What each unit needs. ``ValueError`` where ``needs`` or ``costs`` are not one a unit."""
    each = [needs] * len(units) if isinstance(needs, Needs) else needs
    for name, given in (("needs", each), ("costs", units if costs is None else costs)):
        if len(given) != len(units):
            raise ValueError(f"{name} must be one for each of {len(units)} units, got {len(given)}")
    if costs is not None and not all(cost >= 0 for cost in costs):
        raise ValueError(f"costs must be numbers >= 0, got {next(cost for cost in costs if not cost >= 0)}")
    return each


class Recent(MutableMapping[Any, Any]):
    """A mapping that keeps the ``size`` entries used last."""

    def __init__(self, size: int = 256):
        self._size = size
        self._entries: OrderedDict[Any, Any] = OrderedDict()

    def __getitem__(self, key: Any) -> Any:
        self._entries.move_to_end(key)
        return self._entries[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def __delitem__(self, key: Any) -> None:
        del self._entries[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside the block, because products split over threads may round differently."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
