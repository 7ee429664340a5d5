"""A data set where clients train: on the CPU the arrays themselves, on a GPU a copy of them, made once in a process."""

# N examples, B of a batch

from collections.abc import MutableMapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fedsim.tasks.base import Batch, Dataset

_SHARE = 0.4  # of a GPU's free memory that a data set may take; a larger one stays on the host and is sent batch by batch


class Examples(Protocol):
    """What gives batches."""

    def batch(self, indices: ArrayLike) -> Batch:
        """The examples at ``indices`` (B,), where they train. ``IndexError`` outside the data."""


class Mounted:
    """``dataset`` on ``device``, as far as it fits into ``room`` bytes; see :class:`Examples`."""

    def __init__(self, dataset: Dataset, device: torch.device, room: float):
        self._dataset, self._device = dataset, device
        fits = dataset.inputs.nbytes + dataset.targets.nbytes <= room
        arrays = (dataset.inputs, dataset.targets)
        self._held = Batch(*(torch.tensor(values, device=device) for values in arrays)) if fits else None

    def batch(self, indices: ArrayLike) -> Batch:
        rows = np.asarray(indices, np.int64)
        if self._held is None:
            return Batch(*(self._sent(part) for part in self._dataset.batch(rows)))
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._dataset):  # a GPU would stop for good
            raise IndexError(f"indices must lie in 0..{len(self._dataset) - 1}, got {rows.min()} to {rows.max()}")
        places = torch.from_numpy(rows).to(self._device)
        return Batch(*(part.index_select(0, places) for part in self._held))

    def _sent(self, values: Tensor) -> Tensor:
        """Copied while the GPU still computes on what came before: the host only queues its work."""
        return (values.pin_memory() if self._device.type == "cuda" else values).to(self._device, non_blocking=True)


def mounted(dataset: Dataset, device: torch.device, cache: MutableMapping[Any, Any]) -> Examples:
    """The examples of ``dataset`` on ``device``; kept in ``cache`` while the worker sees the same data."""
    if device.type == "cpu":
        return dataset
    kept = cache.get("mounted")
    if kept is None or kept[0] is not dataset:
        free, _ = torch.cuda.mem_get_info(device)
        kept = cache["mounted"] = (dataset, Mounted(dataset, device, _SHARE * free))
    examples: Mounted = kept[1]
    return examples
