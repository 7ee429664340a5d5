"""Each client's stream of examples: drawn by its own law, changed by drift, a pure function of (seed, client, tick).

Nothing a policy does can reach a stream, so policies are compared on identical examples.

Exports: Laws, Serving, Stream, and the activities of :mod:`fedsim.activity`.
"""

# C clients, N test examples, K cells, V values of the partition's key, J drifts, T ticks, B examples a tick

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.activity import Activity as Activity
from fedsim.activity import All as All
from fedsim.activity import Bernoulli as Bernoulli
from fedsim.activity import Sampled as Sampled
from fedsim.drift import Cells, Change, Draws, Drift, DriftSchedule
from fedsim.fleet import Fleet
from fedsim.randomness import rng_for, uniforms
from fedsim.runtime.batching import power_of_two
from fedsim.sampling import ranks
from fedsim.shards import Shards
from fedsim.tasks import Dataset, Task

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The time after deployment: ``ticks`` ticks in which each active client meets ``batch`` examples, under ``drift``.

    ``labels="immediate"``: an example's label arrives in its own tick. ``lanes``: how many clients of one submodel are evaluated as one
    program, a power of two; ``None``: 1 for fleets below 4,096 and for submodels of each client's own, else 256 where the model allows it.
    Raises ``ValueError`` naming a field out of range.
    """

    ticks: int = 500
    batch: int = 16
    drift: Drift | tuple[Drift, ...] = ()
    labels: Literal["immediate"] = "immediate"
    activity: Activity = field(default_factory=All)
    lanes: int | None = None

    def __post_init__(self) -> None:
        for name in ("ticks", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        object.__setattr__(self, "drift", (self.drift,) if isinstance(self.drift, Drift) else tuple(self.drift))
        if not all(isinstance(d, Drift) for d in self.drifts):
            raise ValueError(f"drift must be a Drift or several, got {self.drift!r}")
        if self.labels != "immediate":
            raise ValueError(f"labels must be 'immediate', got {self.labels!r}")
        if not isinstance(self.activity, Activity):
            raise ValueError(f"activity must be All(), Sampled(num) or Bernoulli(p), got {self.activity!r}")
        if self.lanes is not None:
            power_of_two(self.lanes, "lanes")

    @property
    def drifts(self) -> tuple[Drift, ...]:
        """The scenario, always as a tuple."""
        return self.drift if isinstance(self.drift, tuple) else (self.drift,)

    def active(self, tick: int, num_clients: int, seed: int) -> NDArray[np.bool_]:
        """Flags (C,) of the clients that are active at ``tick``."""
        return self.activity.active(tick, num_clients, seed)

    def schedules(self, fleet: Fleet, seed: int) -> tuple[DriftSchedule, ...]:
        """Who changes when, one schedule for each drift."""
        return tuple(d.schedule(fleet, self.ticks, seed, part) for part, d in enumerate(self.drifts))


@dataclass(frozen=True, eq=False, kw_only=True)
class Laws:
    """In-control laws: client c draws value ``values[v]`` of the test set's ``key`` with probability ``shares[c, v]``, uniformly inside it.

    ``key=None`` is one value for all examples: the uniform law. Rows of ``shares`` (C, V) need not sum to 1.
    """

    key: str | None
    values: Ints
    shares: Floats

    @classmethod
    def of(cls, key: str | None, shards: Shards, train: Dataset, test: Dataset) -> "Laws":
        """The shares of ``key``'s values in each client's training shard.

        Raises ``ValueError`` for a client none of whose values occurs in the test set.
        """
        if key is None:
            return cls(key=None, values=np.zeros(1, np.int64), shares=np.ones((len(shards), 1)))
        values = np.unique(test.keys[key])
        present = np.isin(train.keys[key], values)
        position = np.where(present, np.searchsorted(values, train.keys[key]), len(values))
        shares = shards.histogram(position, len(values) + 1)[:, :-1].astype(np.float64)
        if not shares.any(axis=1).all():
            client = int(np.argmin(shares.any(axis=1)))
            reason = "holds no training example" if shards.sizes[client] == 0 else f"holds only values of {key!r} that the test split lacks"
            raise ValueError(
                f"client {client} {reason}, so there is nothing it could be served; choose another partition or a larger minimum"
            )
        return cls(key=key, values=values, shares=shares)


@dataclass(frozen=True, eq=False, kw_only=True)
class Stream:
    """Draws from the test set ``dataset`` by each client's law, under the drifts of ``schedules``; ``batch`` examples a tick.

    Changes of a sampling law come before changes of the examples; within each kind, several drifts on a client apply in
    the order of their starts. ``num_classes`` and ``domain_names`` where the test set may lack some. Raises ``ValueError`` for a change the data do not allow.
    """

    dataset: Dataset
    laws: Laws
    schedules: tuple[DriftSchedule, ...] = ()
    batch: int
    seed: int
    num_classes: int = 0
    domain_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.dataset) == 0:
            raise ValueError("a stream needs test examples to draw from, got an empty dataset")
        for schedule in self.schedules:
            schedule.drift.change.check(self.dataset.inputs, self.cells)

    @classmethod
    def of(cls, task: Task, fleet: Fleet, serving: Serving, seed: int) -> "Stream":
        """The fleet's stream: laws from its training shards, examples from the task's test split."""
        train, test = task.data()
        laws = Laws.of(fleet.partition.key, fleet.shards(train), train, test)
        return cls(
            dataset=test,
            laws=laws,
            schedules=serving.schedules(fleet, seed),
            batch=serving.batch,
            seed=seed,
            num_classes=task.num_classes,
            domain_names=tuple(task.domain_names),
        )

    def draw(self, client: int, first_tick: int, num_ticks: int) -> tuple[NDArray[np.floating], Ints]:
        """Inputs (T, B, ...) and targets (T, B) of ticks ``first_tick`` .. ``first_tick + num_ticks - 1``."""
        return self.draw_at(client, np.arange(first_tick, first_tick + num_ticks))

    def draw_at(self, client: int, ticks: ArrayLike) -> tuple[NDArray[np.floating], Ints]:
        """Inputs (T, B, ...) and targets (T, B) of any ``ticks`` (T,): a tick's draws do not depend on the others asked for."""
        inputs, targets = self.draw_many(np.array([client]), ticks)
        return inputs[0], targets[0]

    def draw_many(self, clients: Ints, ticks: ArrayLike) -> tuple[NDArray[np.floating], Ints]:
        """Inputs (n, T, B, ...) and targets (n, T, B) of ``ticks`` (T,) for each of ``clients`` (n,): what each would get alone."""
        ticks = np.asarray(ticks, np.int64)
        shape = (len(clients), len(ticks), self.batch)
        inputs = np.empty((*shape, *self.dataset.inputs.shape[1:]), self.dataset.inputs.dtype)
        targets = np.empty((*shape, *self.dataset.targets.shape[1:]), self.dataset.targets.dtype)
        for order, members in self._by_order(clients):
            inputs[members], targets[members] = self._drawn(clients[members], ticks, order)
        return inputs, targets

    @cached_property
    def changes(self) -> Ints:
        """First tick (C, J) from which each drift makes a difference to each client, -1 for never. Not for policies.

        A drift that leaves a client's law as it was (a switch to the domain it lives in) counts as none.
        """
        found = np.full((len(self.laws.shares), len(self.schedules)), -1, np.int64)
        for order, clients in self._by_order(np.arange(len(found))):
            if not set(order) & set(self._of_law):
                self._note_changes(found, order, clients)
                continue
            for client in clients.tolist():
                weights = self.law(client)
                for j in order:
                    change = self.schedules[j].drift.change
                    if change.alters(weights, self.cells, self._law_rng(j, client)):
                        found[client, j] = self.schedules[j].nu[client]
                    weights = change.law(weights, self.cells, self._law_rng(j, client))
        return found

    @cached_property
    def change_points(self) -> Ints:
        """nu (C,): the first tick at which each client's law differs from the one it started with, -1 for never."""
        never = np.iinfo(np.int64).max
        first = np.where(self.changes < 0, never, self.changes).min(axis=1, initial=never)
        return np.where(first == never, -1, first)

    def law(self, client: int, drifts: Iterable[int] = ()) -> Floats:
        """Probability of each cell (K,) for a client, after the changes of ``drifts`` in the order given."""
        weights: Floats = self.laws.shares[client][self._value_of_cell] * self._share_of_value
        weights /= weights.sum()
        for j in drifts:
            weights = self.schedules[j].drift.change.law(weights, self.cells, self._law_rng(j, client))
        return weights

    @cached_property
    def cells(self) -> Cells:
        """The test set cut into groups of examples alike in the partition's key, label and domain."""
        _, first, counts = np.unique(self._columns, axis=1, return_index=True, return_counts=True)
        labels, domains = self._columns[1, first], self._columns[2, first]
        keys = self.dataset.keys
        return Cells(
            labels=labels,
            domains=domains,
            counts=counts,
            num_classes=max(self.num_classes, int(labels.max()) + 1) if "label" in keys else 0,
            num_domains=max(len(self.domain_names), int(domains.max()) + 1) if "domain" in keys else 0,
            domain_names=self.domain_names,
        )

    def _drawn(self, clients: Ints, ticks: Ints, order: tuple[int, ...]) -> tuple[NDArray[np.floating], Ints]:
        """Inputs (n, T, B, ...) and targets (n, T, B) of clients (n,) hit by the drifts of ``order``."""
        owners, times = np.repeat(clients, len(ticks)), np.tile(ticks, len(clients))
        mixes = [(j, self.schedules[j].strength(owners, times, self.batch, self.seed, j)) for j in order]
        rows = self._rows(clients, ticks, mixes)
        inputs, targets = self.dataset.inputs[rows], self.dataset.targets[rows]
        for j, strength in mixes:
            hit = strength.any(axis=1)
            if hit.any():
                draws = Draws(
                    seed=self.seed, client=owners[hit], ticks=times[hit], batch=self.batch, part=j, num_classes=self.cells.num_classes
                )
                inputs[hit], targets[hit] = self.schedules[j].drift.change.apply(inputs[hit], targets[hit], strength[hit], draws)
        shape = (len(clients), len(ticks))
        return inputs.reshape(*shape, *inputs.shape[1:]), targets.reshape(*shape, *targets.shape[1:])

    def _rows(self, clients: Ints, ticks: Ints, mixes: list[tuple[int, Floats]]) -> Ints:
        """Test examples (n T, B) to draw: the law is chosen by which drifts hold for an example, then a cell, then one of its members."""
        coins = uniforms(self.seed, "stream", np.repeat(clients, len(ticks)), np.tile(ticks, len(clients)), 2 * self.batch)
        which, member = coins[:, : self.batch], coins[:, self.batch :]
        pattern = np.zeros(which.shape, np.int64)
        mixes = [(j, strength) for j, strength in mixes if j in self._of_law]
        for bit, (_, strength) in enumerate(mixes):
            pattern |= (strength > 0).astype(np.int64) << bit
        cell = np.empty(which.shape, np.int64)
        by_client = (len(clients), -1)
        for code in np.unique(pattern):
            here = pattern == code
            having = np.flatnonzero(here.reshape(by_client).any(axis=1))
            edges = self._edges(clients[having], [j for bit, (j, _) in enumerate(mixes) if code >> bit & 1])
            found = np.zeros((len(clients), which.size // len(clients)), np.int64)
            found[having] = ranks(edges, which.reshape(by_client)[having])
            cell[here] = found.reshape(which.shape)[here]
        counts = self.cells.counts
        return np.asarray(self._members[(np.cumsum(counts) - counts)[cell] + (member * counts[cell]).astype(np.int64)])

    def _edges(self, clients: Ints, drifts: list[int]) -> Floats:
        """Cumulative law (n, K) of each client after the changes of ``drifts``."""
        if drifts:
            laws = np.stack([self.law(int(c), drifts) for c in clients])
        else:
            laws = self.laws.shares[clients][:, self._value_of_cell] * self._share_of_value
            laws /= laws.sum(axis=1, keepdims=True)
        cumulative = np.cumsum(laws, axis=1)
        return np.asarray(cumulative / cumulative[:, -1:])

    def _note_changes(self, found: Ints, order: tuple[int, ...], clients: Ints) -> None:
        """What drifts that leave the sampling law alone change for ``clients`` (n,): once for each law there is."""
        _, first, same = np.unique(self.laws.shares[clients], axis=0, return_index=True, return_inverse=True)
        for j in order:
            change, nu = self.schedules[j].drift.change, self.schedules[j].nu[clients]
            alters = [change.alters(self.law(int(c)), self.cells, self._law_rng(j, int(c))) for c in clients[first]]
            found[clients, j] = np.where(np.array(alters)[same.reshape(-1)], nu, -1)

    def _by_order(self, clients: Ints) -> list[tuple[tuple[int, ...], Ints]]:
        """Positions of ``clients`` (n,) by the drifts that ever hit them, in order of start, then of place in the scenario."""
        if not self.schedules:
            return [((), np.arange(len(clients)))]
        starts = np.stack([s.nu[clients] for s in self.schedules], axis=1)
        never = len(self.schedules)
        order = np.argsort(np.where(starts < 0, np.iinfo(np.int64).max, starts), axis=1, kind="stable")
        order[np.arange(never) >= (starts >= 0).sum(axis=1)[:, None]] = never
        code = order @ (never + 1) ** np.arange(never)
        _, first, group = np.unique(code, return_index=True, return_inverse=True)
        return [(tuple(j for j in order[i].tolist() if j < never), np.flatnonzero(group == g)) for g, i in enumerate(first)]

    @cached_property
    def _of_law(self) -> tuple[int, ...]:
        """The drifts that change a sampling law."""
        return tuple(j for j, s in enumerate(self.schedules) if type(s.drift.change).law is not Change.law)

    def _law_rng(self, drift: int, client: int) -> np.random.Generator:
        return rng_for(self.seed, "drift-law", drift, client)

    @cached_property
    def _columns(self) -> Ints:
        """Partition value, label and domain of every test example, (3, N); 0 where the data have no such key."""
        keys = self.dataset.keys
        nothing = np.zeros(len(self.dataset), np.int64)
        value = nothing if self.laws.key is None else np.searchsorted(self.laws.values, keys[self.laws.key])
        return np.stack([value, keys.get("label", nothing), keys.get("domain", nothing)]).astype(np.int64)

    @cached_property
    def _members(self) -> Ints:
        """Test examples (N,) sorted by cell, by number inside a cell."""
        return np.lexsort(self._columns[::-1])

    @cached_property
    def _value_of_cell(self) -> Ints:
        first = self._members[np.cumsum(self.cells.counts) - self.cells.counts]
        return np.asarray(self._columns[0, first])

    @cached_property
    def _share_of_value(self) -> Floats:
        """Share (K,) of each cell among the examples of its partition value."""
        return self.cells.counts / np.bincount(self._value_of_cell, self.cells.counts)[self._value_of_cell]
