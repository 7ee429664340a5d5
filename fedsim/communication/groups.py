"""DynamicFL's choice of the clients that upload often: a group whose pooled labels look like the whole fleet's.

Le, Diao, Wang, Tarokh, Ding, Anwar (2024), arXiv:2409.04986. Departures: near-ties are drawn at random, because a strict minimum picks
the same labels in every round when classes are slightly unequal; a group of one is never chosen, because it changes nothing.
"""

# n clients of a cohort, K labels, M candidate groups, R permutations, G largest group

import itertools
from dataclasses import dataclass
from math import comb
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Distance = Literal["kl", "squared"]
_MOST_SUBSETS = 200_000


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a search may choose from: label counts (n, K), the fleet's law (K,), who may join (n,), what each costs (n,), and the limits."""

    counts: Floats
    law: Floats
    capable: Flags
    costs: Floats
    budget: float
    largest: int
    distance: Distance = "kl"


class Search(Protocol):
    """Finds groups: members (M, n) bool of two or more clients within the limits, and their distances (M,) to the law."""

    def groups(self, candidates: Candidates, rng: np.random.Generator) -> tuple[Flags, Floats]: ...


def group_distance(pooled: Floats, law: Floats, distance: Distance = "kl") -> Floats:
    """Distance of pooled counts (..., K) to ``law`` (K,): KL divergence in nats, or the squared difference.

    ``inf`` where the counts are all zero or hold a label the law gives no mass.

    >>> float(group_distance(np.array([3.0, 1.0]), np.array([0.75, 0.25])))
    0.0
    """
    from scipy.special import rel_entr

    totals = pooled.sum(-1, keepdims=True)
    shares = pooled / np.where(totals > 0, totals, 1.0)
    values = (rel_entr(shares, law) if distance == "kl" else (shares - law) ** 2).sum(-1)
    return np.where(totals[..., 0] > 0, values, np.inf)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Every group; ``ValueError`` beyond 200,000 of them."""

    def groups(self, candidates: Candidates, rng: np.random.Generator) -> tuple[Flags, Floats]:
        able = np.flatnonzero(candidates.capable)
        largest = min(candidates.largest, len(able))
        self.check(len(able), largest)
        found = [_subsets(candidates, able, size) for size in range(2, largest + 1)]
        if not found:
            return _nothing(candidates)
        return np.concatenate([m for m, _ in found]), np.concatenate([d for _, d in found])

    def check(self, clients: int, largest: int) -> None:
        """``ValueError`` where there are too many groups of at most ``largest`` of ``clients``."""
        count = sum(comb(clients, size) for size in range(2, largest + 1))
        if count > _MOST_SUBSETS:
            raise ValueError(
                f"Exact would look at {count:,} groups of {clients} clients (limit {_MOST_SUBSETS:,}); use DynaComm() or a smaller budget"
            )


@dataclass(frozen=True, kw_only=True)
class DynaComm:
    """The paper's search: over each of some random orders, a table of the best group of each size so far, to which the next client may be added.

    ``swap`` then exchanges members of the best group while that helps.
    """

    permutations: int = 10
    swap: bool = False

    def __post_init__(self) -> None:
        if self.permutations < 1:
            raise ValueError(f"permutations must be >= 1, got {self.permutations}")

    def groups(self, candidates: Candidates, rng: np.random.Generator) -> tuple[Flags, Floats]:
        able = np.flatnonzero(candidates.capable)
        largest = min(candidates.largest, len(able))
        if largest < 2:
            return _nothing(candidates)
        orders = np.stack([rng.permutation(able) for _ in range(self.permutations)])
        members, distances = _prefix_tables(candidates, orders, largest)
        if self.swap and len(distances):
            best = _exchanged(candidates, members[int(np.argmin(distances))])
            members = np.concatenate([members, best[None]])
            distances = np.append(distances, _distances(candidates, best[None]))
        return members, distances


def choose_group(candidates: Candidates, search: Search, tolerance: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], float]:
    """Positions of the chosen group, ascending, and its distance; none and ``nan`` where no group of two or more is feasible.

    Every group found within ``tolerance`` of the best is equally good: one is drawn.
    """
    members, distances = search.groups(candidates, rng)
    if not len(distances) or not np.isfinite(distances.min()):
        return np.empty(0, np.int64), float("nan")
    near = np.unique(members[distances <= distances.min() + tolerance], axis=0)
    chosen = near[int(rng.integers(len(near)))]
    return np.flatnonzero(chosen), float(_distances(candidates, chosen[None])[0])


def _nothing(candidates: Candidates) -> tuple[Flags, Floats]:
    return np.empty((0, len(candidates.counts)), bool), np.empty(0)


def _distances(candidates: Candidates, members: Flags) -> Floats:
    return group_distance(members.astype(np.float64) @ candidates.counts, candidates.law, candidates.distance)


def _subsets(candidates: Candidates, able: NDArray[np.int64], size: int) -> tuple[Flags, Floats]:
    chosen = np.array(list(itertools.combinations(able.tolist(), size)), np.int64).reshape(-1, size)
    chosen = chosen[candidates.costs[chosen].sum(1) <= candidates.budget]
    members = np.zeros((len(chosen), len(candidates.counts)), bool)
    np.put_along_axis(members, chosen, True, axis=1)
    return members, group_distance(candidates.counts[chosen].sum(1), candidates.law, candidates.distance)


def _prefix_tables(candidates: Candidates, orders: NDArray[np.int64], largest: int) -> tuple[Flags, Floats]:
    """The tables (R, G + 1) of all orders at once; for each order and client, the best group of two or more that its arrival made.

    Those groups hold the tables' best, and its near-ties: the final tables alone would hold the same group in every order.
    """
    count, rows = len(orders), np.arange(len(orders))
    pooled = np.zeros((count, largest + 1, candidates.counts.shape[1]))
    spent = np.full((count, largest + 1), np.inf)
    spent[:, 0] = 0.0
    best = np.full((count, largest + 1), np.inf)
    members = np.zeros((count, largest + 1, len(candidates.counts)), bool)
    made: list[tuple[Flags, Floats]] = []
    for step in range(orders.shape[1]):
        new = orders[:, step]
        filled = min(step + 1, largest)
        joined = pooled[:, :filled] + candidates.counts[new][:, None]
        cost = spent[:, :filled] + candidates.costs[new][:, None]
        distances = group_distance(joined, candidates.law, candidates.distance)
        distances[(cost > candidates.budget) | np.isinf(cost)] = np.inf
        if filled > 1:
            before = 1 + np.argmin(distances[:, 1:], axis=1)
            groups = members[rows, before]
            groups[rows, new] = True
            made.append((groups, distances[rows, before]))
        better = distances < best[:, 1 : filled + 1]
        order, size = np.nonzero(better)
        grown = members[order, size]
        grown[np.arange(len(order)), new[order]] = True
        members[order, size + 1] = grown
        pooled[order, size + 1], spent[order, size + 1], best[order, size + 1] = joined[better], cost[better], distances[better]
    found, far = np.concatenate([g for g, _ in made]), np.concatenate([d for _, d in made])
    return found[np.isfinite(far)], far[np.isfinite(far)]


def _exchanged(candidates: Candidates, members: Flags) -> Flags:
    """First-improvement exchanges of a member with an outsider until none helps."""
    members, improved = members.copy(), True
    while improved:
        improved = False
        inside, outside = np.flatnonzero(members), np.flatnonzero(~members & candidates.capable)
        pooled, spent = candidates.counts[members].sum(0), candidates.costs[members].sum()
        now = group_distance(pooled, candidates.law, candidates.distance)
        for old in inside:
            costs = spent - candidates.costs[old] + candidates.costs[outside]
            distances = group_distance(pooled - candidates.counts[old] + candidates.counts[outside], candidates.law, candidates.distance)
            distances[costs > candidates.budget] = np.inf
            if len(outside) and distances.min() < now - 1e-12:
                members[old], members[outside[int(np.argmin(distances))]] = False, True
                improved = True
                break
    return members
