"""The reference executor: everything in this process, one unit after another."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from fedsim.errors import CapacityError
from fedsim.runtime.executor import NOTHING, Needs, Recent, Shared, Work, needs_of, one_thread


class SerialExecutor:
    """Runs units in order in this process, on one torch thread as every worker does. Runs first in tests, and is how one debugs."""

    workers = 1
    gpus_per_worker = 0.0

    def __init__(self) -> None:
        self._cache = Recent()

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
        """Units go in order, whatever they cost."""
        _check(max((need.gpus for need in needs_of(units, needs, costs)), default=0.0))
        values = {name: value.held if isinstance(value, Shared) else value for name, value in shared.items()}
        with one_thread():
            return [fn(unit, values, self._cache) for unit in units]

    def close(self) -> None:
        self._cache = Recent()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _check(gpus: float) -> None:
    if gpus == 0:
        return
    import torch

    if gpus > torch.cuda.device_count():
        raise CapacityError(
            f"a unit needs {gpus:g} GPU, this machine has {torch.cuda.device_count()}; ask for none, or use a machine with one"
        )
