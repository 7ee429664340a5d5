"""What workers ask of machines, and the error for each thing that is lacking."""

import warnings
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

from fedsim.errors import CapacityError
from fedsim.runtime.executor import Shared

_CROWDED = 0.5
_LARGER_STORE = "ray.init(object_store_memory=BYTES) before the executor, or ray start --object-store-memory BYTES, makes it larger"


def check_arguments(workers: int | None, gpus_per_worker: float, gpu_workers: int | None) -> None:
    """``ValueError`` for numbers that no cluster could satisfy."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be >= 1 or None, got {workers}")
    if not gpus_per_worker >= 0:
        raise ValueError(f"gpus_per_worker must be >= 0, got {gpus_per_worker}")
    if gpu_workers is not None and not 1 <= gpu_workers <= (workers or gpu_workers):
        raise ValueError(f"gpu_workers must be between 1 and workers ({workers}), or None, got {gpu_workers}")


def gpu_shares(workers: int | None, gpus_per_worker: float, gpu_workers: int | None, have: Mapping[str, float]) -> tuple[float, ...]:
    """Each worker's share of a GPU, those that have one first, on a cluster that has so many ``CPU`` and ``GPU``.

    >>> gpu_shares(4, 1.0, 1, {"CPU": 8.0, "GPU": 2.0})
    (1.0, 0.0, 0.0, 0.0)
    >>> gpu_shares(None, 0.5, None, {"CPU": 8.0, "GPU": 2.0})
    (0.5, 0.5, 0.5, 0.5)
    """
    if workers is None:
        per_gpu = gpus_per_worker > 0 and gpu_workers is None
        workers = max(1, int(have.get("GPU", 0.0) / gpus_per_worker if per_gpu else have.get("CPU", 1.0)))
    with_gpu = 0 if gpus_per_worker == 0 else workers if gpu_workers is None else min(gpu_workers, workers)
    return (gpus_per_worker,) * with_gpu + (0.0,) * (workers - with_gpu)


def check_cluster(shares: Sequence[float], have: Mapping[str, float]) -> None:
    """``CapacityError`` unless workers of one CPU each with these ``shares`` of GPUs fit into what the cluster has."""
    with_gpu = sum(share > 0 for share in shares)
    for name, workers, wanted in (("CPU", len(shares), float(len(shares))), ("GPU", with_gpu, sum(shares))):
        if wanted > have.get(name, 0.0):
            raise CapacityError(
                f"{workers} workers need {wanted:g} {name}, the cluster has {have.get(name, 0.0):g}; ask for fewer workers or join a larger cluster"
            )


def check_this_machine(wanted: float) -> None:
    """Before a cluster is started here: its GPUs are those torch sees."""
    import torch

    have = torch.cuda.device_count()
    if wanted > have:
        raise CapacityError(
            f"the workers need {wanted:g} GPU, this machine has {have}; use gpus_per_worker=0, or give the address of a cluster that has them"
        )


def share_too_small(needed: float, have: float) -> CapacityError:
    """A unit needs a larger share of a GPU than any worker has."""
    return CapacityError(f"a unit needs {needed:g} GPU, the workers have {have:g} each; start RayExecutor(gpus_per_worker={needed:g})")


def not_started(shares: Sequence[float], seconds: float, free: Mapping[str, float]) -> CapacityError:
    """Others hold what the workers need."""
    gpus = f" and {max(shares):g} GPU" if any(shares) else ""
    return CapacityError(
        f"{len(shares)} workers of 1 CPU{gpus} did not start in {seconds:g} s; free now: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"
    )


def not_replaced(seconds: float, have: Mapping[str, float]) -> CapacityError:
    """No worker is left, and the nodes that could hold one are gone."""
    return CapacityError(
        f"no worker could be placed again in {seconds:g} s; the cluster has {have.get('CPU', 0):g} CPU and {have.get('GPU', 0):g} GPU left"
    )


def out_of_memory(unit: str, peak: int, cause: str) -> CapacityError:
    """A ``unit`` fits no node even alone; workers that finished others held ``peak`` bytes at most."""
    return CapacityError(
        f"{unit} was killed twice because its node ran out of memory, the second time with no other unit there; workers that finished units held up to "
        f"{peak / 2**20:.0f} MiB; use fewer workers a node, smaller lanes, or nodes with more memory ({cause})"
    )


def store_full(cause: str) -> CapacityError:
    """Nothing can be put, and what is there cannot be moved to disk."""
    return CapacityError(f"an object store is full and its disk takes no more; {_LARGER_STORE} ({cause})")


class Store:
    """Says once when what is held takes more than half of the smallest object store of ``capacity`` bytes: any node may need a copy of it."""

    def __init__(self, capacity: float):
        self._capacity = capacity
        self._shared: WeakKeyDictionary[Shared, int] = WeakKeyDictionary()
        self._said = False

    def hold(self, shared: Shared, size: int) -> None:
        """``shared`` takes ``size`` bytes for as long as somebody has its handle."""
        self._shared[shared] = size
        self.check(0)

    def check(self, results: int) -> None:
        """``results``: bytes of a map's results beside the shared values."""
        held = sum(self._shared.values()) + results
        if self._said or held <= _CROWDED * self._capacity:
            return
        self._said = True
        warnings.warn(
            f"shared values and results fill {held / 2**20:.0f} MiB of an object store of {self._capacity / 2**20:.0f} MiB; past its size Ray moves them to "
            f"disk, which is slow; {_LARGER_STORE}",
            RuntimeWarning,
            stacklevel=2,
        )
