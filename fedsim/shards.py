"""Which examples each client holds."""

# C clients of the fleet, n clients asked, N examples, k places

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedsim.sampling import runs

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Shards:
    """Client ``c`` holds ``offsets[c + 1] - offsets[c]`` examples: here ``indices[offsets[c]:offsets[c + 1]]``; ``indices`` (N,), ``offsets`` (C + 1,).

    A subclass may find them otherwise, in :meth:`examples`.
    """

    indices: Ints
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def sizes(self) -> Ints:
        """Examples of each client (C,)."""
        return np.diff(self.offsets)

    def examples(self, clients: Ints, places: Ints) -> Ints:
        """The ``places[i, j]``-th example (n, k) of each of ``clients`` (n,), counted from 0. ``IndexError`` for a place outside a shard."""
        check_places(self.sizes[clients], places)
        found: Ints = self.indices[self.offsets[clients][:, None] + places]
        return found

    def shard(self, client: int) -> Ints:
        """All examples of one client."""
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} is not in 0..{len(self) - 1}")
        only: Ints = self.examples(np.array([client]), np.arange(self.sizes[client])[None])[0]
        return only

    def histogram(self, values: NDArray[np.integer], num: int, clients: Ints | None = None) -> Ints:
        """Counts (n, num) of the ``values`` (N,) in ``0..num - 1`` that the examples of each of ``clients`` (n,; all by default) have."""
        values = _checked(values, num)
        clients = np.arange(len(self)) if clients is None else np.asarray(clients)
        sizes = self.sizes[clients]
        counts = np.zeros((len(clients), num), np.int64)
        holders = np.flatnonzero(sizes)
        for chosen in runs(sizes[holders]):
            rows = holders[chosen]
            places = np.arange(sizes[rows].max())[None]
            there = places < sizes[rows, None]
            found = values[self.examples(clients[rows], np.where(there, places, 0))]
            cells = (np.arange(len(rows))[:, None] * num + found)[there]
            counts[rows] = np.bincount(cells, minlength=len(rows) * num).reshape(-1, num)
        return counts

    def totals(self, values: NDArray[np.integer], num: int) -> NDArray[np.float64]:
        """Counts (num,) of the ``values`` (N,) in ``0..num - 1`` over all clients' examples."""
        return np.bincount(_checked(values, num)[self.indices], minlength=num).astype(np.float64)


def check_places(sizes: Ints, places: Ints) -> None:
    """``IndexError`` unless ``places`` (n, k) lie in shards of ``sizes`` (n,)."""
    outside = (places < 0) | (places >= sizes[:, None])
    if outside.any():
        row = int(np.argmax(outside.any(axis=1)))
        raise IndexError(f"place {places[row][outside[row]][0]} is not in a shard of {sizes[row]} examples")


def _checked(values: NDArray[np.integer], num: int) -> NDArray[np.integer]:
    values = np.asarray(values)
    if len(values) and not 0 <= values.min() <= values.max() < num:
        raise ValueError(f"values must lie in 0..{num - 1}, got {values.min()} to {values.max()}")
    return values
