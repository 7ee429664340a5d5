"""Shards for fleets larger than the data: drawn from the data set when somebody asks for them, never stored."""

# C clients of the fleet, n clients asked, N examples, V values of a key, k places

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv

from fedsim.partition import values_of
from fedsim.randomness import rng_for, uniforms
from fedsim.sampling import ranks, runs
from fedsim.shards import Ints, Shards, check_places
from fedsim.tasks.base import Dataset

_TINY = 2.0**-54  # keeps a draw of 0 away from the logarithm


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """Every client draws its examples from the data set, with replacement; two clients may hold the same example.

    A client holds ``size`` examples, or, with ``spread``, a log-normal number of median ``size`` and log standard deviation ``spread``, at
    least 1. With ``alpha``, it draws the values of the key ``by`` by shares of its own, from a Dirichlet law around the data set's shares: symmetric
    with parameter ``alpha`` where all values are equally frequent. Hsu, Qi, Brown (2019), arXiv:1909.06335, whose parameter is ``alpha`` times the number of values.
    Without ``alpha``, all examples are equally likely. A client's shard is a function of the seed and its number, whatever the size of the fleet.
    """

    size: int
    spread: float = 0.0
    by: str = "label"
    alpha: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size must be a whole number of examples, at least 1, got {self.size!r}")
        if not 0.0 <= self.spread < float("inf"):
            raise ValueError(f"spread must be finite and at least 0, got {self.spread!r}")
        if self.alpha is not None and not 0.0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be None, or positive and finite, got {self.alpha!r}")

    @property
    def key(self) -> str | None:
        return None if self.alpha is None else self.by

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> "Drawn":
        if num_clients < 1:
            raise ValueError(f"the number of clients must be at least 1, got {num_clients}")
        if not len(dataset):
            raise ValueError("the data set has no examples to draw from")
        value, counts = (np.zeros(len(dataset), np.int64), np.array([len(dataset)])) if self.alpha is None else values_of(dataset, self.by)
        return Drawn(
            indices=np.argsort(value, kind="stable"),
            offsets=np.concatenate([[0], np.cumsum(self._sizes(num_clients, seed))]),
            counts=counts,
            alpha=self.alpha,
            seed=seed,
        )

    def _sizes(self, num_clients: int, seed: int) -> Ints:
        if not self.spread:
            return np.full(num_clients, self.size)
        factors = np.exp(self.spread * rng_for(seed, "partition", "sizes").standard_normal(num_clients))
        sizes: Ints = np.maximum(np.rint(self.size * factors), 1).astype(np.int64)
        return sizes


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawn(Shards):
    """Shards that are functions of ``seed`` and the client. ``indices`` (N,) are the data set's examples sorted by value, ``counts`` (V,) of each."""

    counts: Ints
    alpha: float | None
    seed: int

    def examples(self, clients: Ints, places: Ints) -> Ints:
        sizes = self.sizes[clients]
        check_places(sizes, places)
        found = np.empty(places.shape, np.int64)
        for rows in runs(np.minimum(sizes, places.shape[1])):
            width = int(sizes[rows].max())
            if width <= places.shape[1]:  # a place is asked for more than once: draw the shards as they are, then look them up
                whole = self._found(clients[rows], self._coins(clients[rows], width))
                found[rows] = np.take_along_axis(whole, places[rows], axis=1)
            else:
                found[rows] = self._found(clients[rows], self._coins_at(clients[rows], places[rows]))
        return found

    def totals(self, values: NDArray[np.integer], num: int) -> NDArray[np.float64]:
        """What is expected over all draws of laws and examples, which takes no pass over the fleet."""
        return super().totals(values, num) * (float(self.offsets[-1]) / len(self.indices))

    def laws(self, clients: Ints) -> NDArray[np.float64]:
        """The share (n, V) of each value by which ``clients`` (n,) draw."""
        num = len(self.counts)
        if self.alpha is None:
            return np.ones((len(clients), num))
        shape = self.alpha * num * self.counts / self.counts.sum()
        coins = uniforms(self.seed, "partition-law", clients, 0, 2 * num) + _TINY
        # Gamma(a) = Gamma(a + 1) U^(1/a), in logarithms: for small a all factors of a client may lie below the smallest number
        logs = np.log(gammaincinv(shape + 1.0, coins[:, :num])) + np.log(coins[:, num:]) / shape
        shares = np.exp(logs - logs.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def _coins(self, clients: Ints, width: int) -> NDArray[np.float64]:
        """Draws (n, width) of the first places."""
        pairs = np.arange(-(-width // 2))
        coins = uniforms(self.seed, "partition-examples", np.repeat(clients, len(pairs)), np.tile(pairs, len(clients)), 2)
        return coins.reshape(len(clients), -1)[:, :width]

    def _coins_at(self, clients: Ints, places: Ints) -> NDArray[np.float64]:
        """The same draws at ``places`` (n, k)."""
        pair, second = np.divmod(places.ravel(), 2)
        coins = uniforms(self.seed, "partition-examples", np.repeat(clients, places.shape[1]), pair, 2)
        return coins[np.arange(len(coins)), second].reshape(places.shape)

    def _found(self, clients: Ints, coins: NDArray[np.float64]) -> Ints:
        """Examples (n, k) by inversion: a coin's place among the shares says which value, its place inside that share which example."""
        edges = np.cumsum(self.laws(clients), axis=1)
        edges /= edges[:, -1:]
        value = ranks(edges[:, :-1], coins) if len(self.counts) > 1 else np.zeros(coins.shape, np.int64)
        low = np.take_along_axis(np.pad(edges[:, :-1], ((0, 0), (1, 0))), value, axis=1)
        high = np.take_along_axis(edges, value, axis=1)
        inside = ((coins - low) / (high - low) * self.counts[value]).astype(np.int64)
        firsts = np.cumsum(self.counts) - self.counts
        found: Ints = self.indices[firsts[value] + np.minimum(inside, self.counts[value] - 1)]
        return found
