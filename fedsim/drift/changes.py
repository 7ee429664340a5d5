"""What changes when the world drifts: a change alters the pictures, the labels, or the law by which a client's pool is sampled.

Every change takes a *strength* per example in [0, 1]; at strength 0 it is the identity, bit for bit. Picture corruptions are
in :mod:`fedsim.drift.pictures`.

Exports: Cells, Change, ClassPrior, DomainSwitch, Draws, LabelNoise, LabelSwap.
"""

# T ticks, B examples a tick, K cells

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.randomness import rng_for, uniforms

Floats = NDArray[np.float64]
Inputs = NDArray[np.floating]
Targets = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Cells:
    """Groups of examples alike in every key: their ``labels``, ``domains`` and ``counts`` (K,).

    ``num_classes`` is 0 where the data has no key "label", ``num_domains`` is 0 where it has no key "domain".
    """

    labels: NDArray[np.int64]
    domains: NDArray[np.int64]
    counts: NDArray[np.int64]
    num_classes: int
    num_domains: int
    domain_names: tuple[str, ...] = ()

    def by_label(self, weights: Floats) -> Floats:
        """Probability of each class under cell probabilities ``weights`` (K,)."""
        return np.asarray(np.bincount(self.labels, weights, self.num_classes), np.float64)

    def by_domain(self, weights: Floats) -> Floats:
        """Probability of each domain under cell probabilities ``weights`` (K,)."""
        return np.asarray(np.bincount(self.domains, weights, self.num_domains), np.float64)

    def inside(self) -> Floats:
        """Share (K,) of each cell among the examples of its label and domain: the uniform law inside that pair."""
        pair = self.labels * (self.domains.max(initial=0) + 1) + self.domains
        return np.asarray(self.counts / np.bincount(pair, self.counts)[pair])


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Random numbers of drift number ``part`` at ``ticks`` (T,) of one ``client``, or of one client each (T,), ``batch`` examples a tick.

    Functions of (seed, client, tick) alone.
    """

    seed: int
    client: int | NDArray[np.int64]
    ticks: NDArray[np.int64]
    batch: int
    part: int = 0
    num_classes: int = 0

    def uniforms(self, purpose: str, size: int = 1) -> Floats:
        """Draws in [0, 1), (T, B, size)."""
        flat = uniforms(self.seed, f"drift-{purpose}", self._clients, self.ticks, self.batch * size, part=self.part)
        return flat.reshape(len(self.ticks), self.batch, size)

    def normals(self, shape: tuple[int, ...]) -> Inputs:
        """Standard normal draws, (T, B, *shape)."""
        pairs = zip(self._clients.tolist(), self.ticks.tolist(), strict=True)
        generators = (rng_for(self.seed, "drift-noise", self.part, client, tick) for client, tick in pairs)
        return np.stack([g.standard_normal((self.batch, *shape), np.float32) for g in generators])

    def at(self, rows: NDArray[np.bool_]) -> "Draws":
        """Those of the ``rows`` (T,) alone."""
        return replace(self, client=self._clients[rows], ticks=self.ticks[rows])

    @property
    def _clients(self) -> NDArray[np.int64]:
        return np.broadcast_to(self.client, len(self.ticks))


class Change:
    """Base of all changes: the identity. ``morphs`` says whether strengths between 0 and 1 mean something."""

    morphs: ClassVar[bool] = False

    def check(self, inputs: Inputs, cells: Cells) -> None:
        """Raise ``ValueError`` if the change cannot act on these data."""

    def law(self, weights: Floats, cells: Cells, rng: np.random.Generator) -> Floats:
        """The client's new law over cells (K,), from its old one; sums to 1."""
        return weights

    def apply(self, inputs: Inputs, targets: Targets, strength: Floats, draws: Draws) -> tuple[Inputs, Targets]:
        """Changed ``inputs`` (T, B, ...) and ``targets`` (T, B) for ``strength`` (T, B) in [0, 1]; same shapes and dtypes."""
        return inputs, targets

    def alters(self, weights: Floats, cells: Cells, rng: np.random.Generator) -> bool:
        """Whether a client whose law over cells is ``weights`` (K,) sees any difference at full strength."""
        return not np.allclose(self.law(weights, cells, rng), weights, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class LabelSwap(Change):
    """A new meaning of the labels, P(x) untouched: classes ``0 .. cycle-1`` each become the next, or ``pairs`` trade places.

    Invisible without labels. Raises ``ValueError`` unless exactly one of the two is given.
    """

    cycle: int | None = None
    pairs: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if (self.cycle is None) == (self.pairs is None):
            raise ValueError(f"LabelSwap takes exactly one of cycle= and pairs=, got cycle={self.cycle!r}, pairs={self.pairs!r}")
        if self.cycle is not None and self.cycle < 2:
            raise ValueError(f"cycle must be at least 2 classes, got {self.cycle!r}")
        if self.pairs is not None:
            object.__setattr__(self, "pairs", tuple((int(a), int(b)) for a, b in self.pairs))
            named = [label for pair in self.pairs for label in pair]
            if not named or len(set(named)) < len(named) or min(named) < 0:
                raise ValueError(f"pairs must name each class at most once, as non-negative numbers, got {self.pairs!r}")

    def check(self, inputs: Inputs, cells: Cells) -> None:
        highest = int(self._moved().max())
        if highest >= cells.num_classes:
            raise ValueError(f"{self} moves class {highest}, but the task has {cells.num_classes} classes")

    def apply(self, inputs: Inputs, targets: Targets, strength: Floats, draws: Draws) -> tuple[Inputs, Targets]:
        table = self._table(max(int(targets.max()) + 1, int(self._moved().max()) + 1))
        return inputs, np.where(strength > 0, table[targets], targets)

    def alters(self, weights: Floats, cells: Cells, rng: np.random.Generator) -> bool:
        return bool(cells.by_label(weights)[self._moved()].sum() > 0)

    def _moved(self) -> NDArray[np.int64]:
        return np.arange(self.cycle) if self.cycle is not None else np.ravel(np.asarray(self.pairs))

    def _table(self, size: int) -> Targets:
        table = np.arange(size)
        if self.cycle is not None:
            table[: self.cycle] = np.roll(table[: self.cycle], -1)
        for a, b in self.pairs or ():
            table[[a, b]] = b, a
        return table


@dataclass(frozen=True)
class LabelNoise(Change):
    """With probability ``rate`` (in [0, 1]) a label is replaced by another class, drawn uniformly."""

    rate: float
    morphs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must lie in [0, 1], got {self.rate!r}")

    def check(self, inputs: Inputs, cells: Cells) -> None:
        if cells.num_classes < 2:
            raise ValueError(f"LabelNoise needs a task of at least 2 classes, got {cells.num_classes}")

    def apply(self, inputs: Inputs, targets: Targets, strength: Floats, draws: Draws) -> tuple[Inputs, Targets]:
        coins = draws.uniforms("labels", 2)
        step = 1 + (coins[..., 1] * (draws.num_classes - 1)).astype(np.int64)
        return inputs, np.where(coins[..., 0] < self.rate * strength, (targets + step) % draws.num_classes, targets)

    def alters(self, weights: Floats, cells: Cells, rng: np.random.Generator) -> bool:
        return self.rate > 0


@dataclass(frozen=True)
class ClassPrior(Change):
    """A client meets other shares of the classes, P(x | class) untouched. Give exactly one of

    ``keep``: only so many of the classes it has, drawn for each client, in their old proportions;
    ``weights``: these shares for every client (any positive scale);
    ``alpha``: shares from a symmetric Dirichlet law, drawn for each client.
    A class new to the client is drawn from its domains in their old proportions.
    """

    keep: int | None = None
    weights: tuple[float, ...] | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if sum(v is not None for v in (self.keep, self.weights, self.alpha)) != 1:
            raise ValueError(f"ClassPrior takes exactly one of keep=, weights= and alpha=, got {self}")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep must be at least 1 class, got {self.keep!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha!r}")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
            if not all(0 <= w < np.inf for w in self.weights) or not sum(self.weights) > 0:
                raise ValueError(f"weights must be non-negative and finite with a positive sum, got {self.weights!r}")

    def check(self, inputs: Inputs, cells: Cells) -> None:
        if self.weights is not None and len(self.weights) != cells.num_classes:
            raise ValueError(f"ClassPrior has {len(self.weights)} weights, but the task has {cells.num_classes} classes")
        if cells.num_classes < (self.keep or 1):
            raise ValueError(f"{self} asks for more classes than the task has ({cells.num_classes})")

    def law(self, weights: Floats, cells: Cells, rng: np.random.Generator) -> Floats:
        old = cells.by_label(weights)
        given_label = np.divide(weights, old[cells.labels], out=np.zeros_like(weights), where=old[cells.labels] > 0)
        unseen = (old == 0)[cells.labels] * cells.inside()
        if cells.num_domains:
            unseen = unseen * cells.by_domain(weights)[cells.domains]
        total = np.bincount(cells.labels, unseen, cells.num_classes)[cells.labels]
        given_label += np.divide(unseen, total, out=np.zeros_like(weights), where=total > 0)
        new = self._prior(old, rng)[cells.labels] * given_label
        if not new.sum() > 0:
            raise ValueError(f"{self} leaves a client without any example to draw; give weight to a class the test split has")
        return np.asarray(new / new.sum())

    def _prior(self, old: Floats, rng: np.random.Generator) -> Floats:
        if self.weights is not None:
            return np.asarray(self.weights)
        if self.alpha is not None:
            return rng.dirichlet(np.full(len(old), self.alpha))
        present = np.flatnonzero(old)
        kept = rng.permutation(present)[: self.keep]
        return np.where(np.isin(np.arange(len(old)), kept), old, 0.0)


@dataclass(frozen=True)
class DomainSwitch(Change):
    """A client moves to another domain, its shares of the classes untouched.

    ``to`` is a domain's name or number; ``None`` draws, for each client, one of the domains it has least of.
    """

    to: str | int | None = None

    def check(self, inputs: Inputs, cells: Cells) -> None:
        if cells.num_domains < 2:
            raise ValueError(
                f"DomainSwitch needs data with a key 'domain' of at least 2 values, got {cells.num_domains}; a Task gives it by domains"
            )
        if self.to is not None:
            self._number(cells)

    def law(self, weights: Floats, cells: Cells, rng: np.random.Generator) -> Floats:
        shares = cells.by_domain(weights)
        target = self._number(cells) if self.to is not None else int(rng.permutation(np.flatnonzero(shares == shares.min()))[0])
        there = np.where(cells.domains == target, cells.inside(), 0.0)
        labels = cells.by_label(weights)[cells.labels] if cells.num_classes else np.ones(len(weights))
        new = labels * there
        if not new.sum() > 0:
            raise ValueError(f"domain {target} has no test example of any class a client meets, so DomainSwitch cannot move it there")
        return np.asarray(new / new.sum())

    def _number(self, cells: Cells) -> int:
        known: Mapping[str | int, int] = {name: i for i, name in enumerate(cells.domain_names)}
        number = known.get(self.to, -1) if isinstance(self.to, str) else self.to
        if number is None or not 0 <= number < cells.num_domains:
            raise ValueError(
                f"DomainSwitch.to must be a domain of the task, one of {cells.domain_names or tuple(range(cells.num_domains))}, got {self.to!r}"
            )
        return number
