"""The worker's side: a process that lives long, keeps a cache and the shared values it has unpacked, and runs units one after another."""

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedsim.runtime.executor import Recent
from fedsim.runtime.sending import Pickle, sendable

KEPT_JOBS = 4
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt


@dataclass(frozen=True, eq=False)
class Result:
    """What a unit gave: a ``value``, or an ``error`` with its causes. ``peak`` is the most memory its worker ever held, in bytes."""

    value: Any = None
    error: tuple[BaseException, ...] = ()
    peak: int = 0


class Actor:
    """One torch thread. ``fetch`` reads a reference; without ``gpus`` every GPU is hidden, so that no unit can use one it does not need."""

    def __init__(self, fetch: Callable[[Any], Any], pickle: Pickle, gpus: float, setup: Callable[[], object] | None):
        if gpus == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch

        torch.set_num_threads(1)
        _keep_freed_memory()
        self._fetch, self._pickle = fetch, pickle
        self._cache = Recent()
        self._jobs = 0
        self._values: dict[Any, tuple[int, Any]] = {}
        if setup is not None:
            setup()

    def pid(self) -> int:
        return os.getpid()

    def prepare(self, job: list[Any]) -> None:
        """Unpack what the units of ``job`` will read."""
        self._unpack(job[0])

    def run(self, job: list[Any], unit: Any) -> Result:
        """What a map's function makes of ``unit``. ``job`` holds the reference to that function and to the shared values."""
        fn, shared = self._unpack(job[0])
        try:
            return Result(value=fn(unit, shared, self._cache), peak=_peak())
        except Exception as error:
            return Result(error=sendable(error, self._pickle), peak=_peak())

    def _unpack(self, job: Any) -> tuple[Any, dict[str, Any]]:
        """Lets go of what the last jobs did not read: a value held here keeps its memory in the object store."""
        if job not in self._values:
            self._jobs += 1
            self._values = {k: v for k, v in self._values.items() if v[0] > self._jobs - KEPT_JOBS}
        fn, handles = self._value(job)
        return fn, {name: self._value(held) for name, held in handles.items()}

    def _value(self, reference: Any) -> Any:
        value = self._values[reference][1] if reference in self._values else self._fetch(reference)
        self._values[reference] = self._jobs, value
        return value


def _keep_freed_memory() -> None:
    """Let glibc, where it is the allocator, keep up to 256 MiB of what a unit frees: given back, every page of it would be faulted in again by the next."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another allocator, another system
        return
    mallopt(_TRIM_THRESHOLD, 256 * 2**20)
    mallopt(_MMAP_THRESHOLD, 32 * 2**20)


def _peak() -> int:
    """Of this process; the system counts KiB, macOS bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
