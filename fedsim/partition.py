"""How a data set is divided among clients: exactly (every example belongs to one client) and as a function of the seed.

Exports the partitions :class:`IID`, :class:`LabelShards`, :class:`Dirichlet`, :class:`ByKey`, :class:`BySize`; for fleets larger than the data see :mod:`fedsim.resampled`.
Only ``Dirichlet(minimum=0)`` and ``BySize`` with zeros leave clients empty; training sets those aside.
"""

# C clients, N examples, V distinct values of a key

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.randomness import rng_for
from fedsim.shards import Ints as Ints
from fedsim.shards import Shards as Shards
from fedsim.tasks.base import Dataset


class Partition(Protocol):
    """A rule that divides a data set; ``key`` is the key whose values it divides by, ``None`` where there is none."""

    @property
    def key(self) -> str | None: ...

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards: ...


@dataclass(frozen=True)
class IID:
    """A random share for each client; sizes differ by one at most."""

    @property
    def key(self) -> None:
        return None

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        _check_clients(dataset, num_clients)
        return _dealt(_even(len(dataset), num_clients), rng_for(seed, "partition", "iid"))


@dataclass(frozen=True)
class LabelShards:
    """Every client holds examples of exactly ``labels_per_client`` labels.

    Each label is cut into pieces of near-equal size, as many as its share of all examples asks for, and each client is dealt
    pieces of different labels. McMahan et al. (2017), arXiv:1602.05629, section 3, who cut without regard to label borders.
    """

    labels_per_client: int = 2

    def __post_init__(self) -> None:
        if self.labels_per_client < 1:
            raise ValueError(f"labels_per_client must be at least 1, got {self.labels_per_client!r}")

    @property
    def key(self) -> str:
        return "label"

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        _check_clients(dataset, num_clients)
        label, counts = values_of(dataset, "label")
        total, most = num_clients * self.labels_per_client, np.minimum(counts, num_clients)
        if not len(counts) <= total <= most.sum():
            raise ValueError(
                f"{num_clients} clients of {self.labels_per_client} labels need {total} pieces, but {len(counts)} labels give {len(counts)} to {most.sum()} "
                f"(one a client and label, none empty); change labels_per_client or the number of clients"
            )
        rng = rng_for(seed, "partition", "labels")
        pieces = _apportion(counts.astype(float), total, np.ones_like(counts), most)
        hands = _deal_labels(pieces, num_clients, self.labels_per_client, rng)
        table = np.zeros((num_clients, len(counts)), np.int64)
        for v, count in enumerate(counts):
            holders = rng.permutation(np.flatnonzero(hands[:, v]))  # at random, so that the odd examples do not go to low ids
            table[holders, v] = _even(int(count), len(holders))
        return _assigned(label, table, rng)


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """For every value of the key ``by``, the clients' shares are one draw from a symmetric Dirichlet law with parameter ``alpha``.

    Small ``alpha``: a client holds few values, and sizes differ widely. Yurochkin et al. (2019), arXiv:1905.12022; there, draws
    are repeated until no client is too small, which hardly ever ends with many clients. Here a client below ``minimum``
    takes examples, of the value it holds most of where it can, from the client that has most of them. ``minimum=0`` leaves the draw as it is, empty clients included.
    """

    alpha: float = 0.3
    by: str = "label"
    minimum: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha!r}")
        if self.minimum < 0:
            raise ValueError(f"minimum must be at least 0 examples, got {self.minimum!r}")

    @property
    def key(self) -> str:
        return self.by

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        _check_clients(dataset, num_clients, self.minimum)
        value, counts = values_of(dataset, self.by)
        rng = rng_for(seed, "partition", "dirichlet")
        shares = rng.dirichlet(np.full(num_clients, self.alpha), size=len(counts)).T
        bounds = np.rint(np.cumsum(shares, axis=0) * counts).astype(np.int64)
        bounds[-1] = counts  # the sum of shares is 1 only up to rounding
        table = np.diff(bounds, axis=0, prepend=0)
        _raise_to_minimum(table, shares, self.minimum)
        return _assigned(value, table, rng)


@dataclass(frozen=True)
class ByKey:
    """Clients hold whole values of a key, such as speakers or domains.

    As many clients as values: client ``c`` holds the ``c``-th value in ascending order. Fewer: each client holds several
    values, of near-equal total size. More: every client holds part of one value, and a value has clients by its size.
    """

    key: str

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        _check_clients(dataset, num_clients)
        value, counts = values_of(dataset, self.key)
        rng = rng_for(seed, "partition", "key")
        table = np.zeros((num_clients, len(counts)), np.int64)
        if num_clients <= len(counts):
            table[self._holders(counts, num_clients, rng), np.arange(len(counts))] = counts
            return _assigned(value, table, rng)
        clients = _apportion(counts.astype(float), num_clients, np.ones_like(counts), counts)
        for v, holders in enumerate(np.split(rng.permutation(num_clients), np.cumsum(clients)[:-1])):
            table[holders, v] = _even(int(counts[v]), len(holders))
        return _assigned(value, table, rng)

    @staticmethod
    def _holders(counts: Ints, num_clients: int, rng: np.random.Generator) -> Ints:
        """The client (V,) of each value: largest value first, always to the client with the fewest examples."""
        if num_clients == len(counts):
            return np.arange(num_clients)
        load = [(0, int(c)) for c in rng.permutation(num_clients)]
        heapq.heapify(load)
        holders = np.empty(len(counts), np.int64)
        for v in np.argsort(-counts, kind="stable"):
            size, client = heapq.heappop(load)
            holders[v] = client
            heapq.heappush(load, (size + int(counts[v]), client))
        return holders


@dataclass(frozen=True, kw_only=True)
class BySize:
    """Random shares of given ``sizes`` (one a client, summing to the data set), or of power-law sizes.

    With ``exponent``, the r-th largest client has a size in proportion to ``r ** -exponent``, at least one example; ranks are random.
    """

    sizes: Sequence[int] | None = None
    exponent: float | None = None

    def __post_init__(self) -> None:
        if (self.sizes is None) == (self.exponent is None):
            raise ValueError(f"give either sizes or exponent, got sizes={self.sizes!r} and exponent={self.exponent!r}")
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(int(s) for s in self.sizes))
            if min(self.sizes, default=0) < 0:
                raise ValueError(f"sizes must not be negative, got {min(self.sizes)}")
        if self.exponent is not None and not 0.0 <= self.exponent < float("inf"):
            raise ValueError(f"exponent must be finite and at least 0, got {self.exponent!r}")

    @property
    def key(self) -> None:
        return None

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        rng = rng_for(seed, "partition", "size")
        if self.sizes is None:
            _check_clients(dataset, num_clients)
            return _dealt(rng.permutation(self._power_law(len(dataset), num_clients)), rng)
        _check_clients(dataset, num_clients, minimum=0)
        if len(self.sizes) != num_clients or sum(self.sizes) != len(dataset):
            raise ValueError(
                f"sizes must hold {num_clients} entries that sum to {len(dataset)}, the number of examples; got {len(self.sizes)} that sum to {sum(self.sizes)}"
            )
        return _dealt(np.asarray(self.sizes, np.int64), rng)

    def _power_law(self, total: int, num_clients: int) -> Ints:
        assert self.exponent is not None
        weights = np.maximum(np.arange(1, num_clients + 1, dtype=np.float64) ** -self.exponent, 1e-200)  # 0 would have no scale
        return _apportion(weights, total, np.ones(num_clients, np.int64), np.full(num_clients, total))


def _check_clients(dataset: Dataset, num_clients: int, minimum: int = 1) -> None:
    if num_clients < 1:
        raise ValueError(f"the number of clients must be at least 1, got {num_clients}")
    if not len(dataset):
        raise ValueError("the data set has no examples to divide")
    if num_clients * minimum > len(dataset):
        raise ValueError(
            f"{num_clients} clients with at least {minimum} example(s) each need {num_clients * minimum} examples, but there are {len(dataset)}"
        )


def values_of(dataset: Dataset, key: str) -> tuple[Ints, Ints]:
    """Each example's value (N,) as a rank among the distinct values, and their counts (V,)."""
    if key not in dataset.keys:
        raise ValueError(f"the data set has no key {key!r}; its keys are {', '.join(sorted(dataset.keys)) or 'none'}")
    _, ranks, counts = np.unique(dataset.keys[key], return_inverse=True, return_counts=True)
    return ranks.astype(np.int64), counts.astype(np.int64)


def _even(total: int, parts: int) -> Ints:
    """``parts`` sizes that sum to ``total`` and differ by one at most."""
    return total // parts + (np.arange(parts) < total % parts).astype(np.int64)


def _apportion(weights: NDArray[np.float64], total: int, low: Ints, high: Ints) -> Ints:
    """Whole numbers that sum to ``total``, within ``low`` and ``high``, and otherwise in proportion to ``weights``.

    Rounded to the nearest at the largest common scale that does not exceed the total; what is left goes to the largest remainders.
    """
    assert low.sum() <= total <= high.sum(), "bounds must leave room for the total"

    def at(scale: float) -> Ints:
        return np.clip(np.rint(np.minimum(weights * scale, high)), low, high).astype(np.int64)

    below, above = 0.0, float((high + 1).max() / weights.min())
    while below < (middle := (below + above) / 2) < above:  # until the two are neighbouring numbers
        below, above = (middle, above) if at(middle).sum() <= total else (below, middle)
    result = at(below)
    while (rest := total - int(result.sum())) > 0:
        open_ = np.flatnonzero(result < high)
        order = open_[np.argsort(result[open_] - weights[open_] * below, kind="stable")]
        result[order[:rest]] += 1
    return result


def _deal_labels(pieces: Ints, num_clients: int, each: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Who (C, V) holds a piece of which label: ``each`` different ones a client, ``pieces`` (V,) clients a label.

    Taking the labels with most pieces left, ties at random, never gets stuck (Gale, Ryser).
    """
    left = pieces.copy()
    hands = np.zeros((num_clients, len(pieces)), bool)
    for client in rng.permutation(num_clients):
        chosen = np.lexsort((rng.random(len(pieces)), -left))[:each]
        hands[client, chosen] = True
        left[chosen] -= 1
    return hands


def _raise_to_minimum(table: Ints, shares: NDArray[np.float64], minimum: int) -> None:
    """Move examples in ``table`` (C, V), in place, until every client has ``minimum``; see :class:`Dirichlet`."""
    sizes = table.sum(axis=1)
    poor = np.flatnonzero(sizes < minimum)
    donors = [[(-int(n), int(c)) for c, n in enumerate(column) if n] for column in table.T] if len(poor) else []
    for heap in donors:
        heapq.heapify(heap)
    for client in poor:
        preferred = np.argsort(-(table[client] + shares[client]), kind="stable")
        while sizes[client] < minimum:
            v, donor = next((v, d) for v in preferred if (d := _richest(donors[v], table[:, v], sizes, minimum)) >= 0)
            table[donor, v] -= 1
            table[client, v] += 1
            sizes[donor] -= 1
            sizes[client] += 1


def _richest(heap: list[tuple[int, int]], held: Ints, sizes: Ints, minimum: int) -> int:
    """The client that holds most of one value and can spare an example, -1 if none can. Stale entries are renewed or dropped."""
    while heap:
        count, client = heap[0]
        if sizes[client] <= minimum or not held[client]:
            heapq.heappop(heap)  # nobody who gave down to the minimum ever grows again
        elif -count != held[client]:
            heapq.heapreplace(heap, (-int(held[client]), client))
        else:
            return client
    return -1


def _assigned(value: Ints, table: Ints, rng: np.random.Generator) -> Shards:
    """Shards in which client ``c`` holds ``table[c, v]`` random examples of value ``v``; the table (C, V) counts every example."""
    owner = np.empty(len(value), np.int64)
    clients = np.arange(len(table))
    for v in range(table.shape[1]):
        owner[rng.permutation(np.flatnonzero(value == v))] = np.repeat(clients, table[:, v])
    return _owned(owner, len(table))


def _dealt(sizes: Ints, rng: np.random.Generator) -> Shards:
    """Shards of ``sizes`` (C,), at random."""
    owner = np.empty(int(sizes.sum()), np.int64)
    owner[rng.permutation(len(owner))] = np.repeat(np.arange(len(sizes)), sizes)
    return _owned(owner, len(sizes))


def _owned(owner: Ints, num_clients: int) -> Shards:
    sizes = np.bincount(owner, minlength=num_clients)
    return Shards(np.argsort(owner, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))
