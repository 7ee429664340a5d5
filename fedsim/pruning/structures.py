"""What can leave a model: structures, the slices of weights they own, and what a model costs without them.

A *structure* is a coupled set of weights that leaves with no change of interface: a hidden unit, a filter group, a head
group. Structures of one *block* own equal shares of the same weights, so every cost is a function of how many
structures of each block are left: a weight keeps the product of its kept extents, and overlaps (a row of one block
crossing a column of another) are counted once. :func:`fedsim.pruning.tracing.structure_map` builds the map of an MLP or
CNN, :func:`fedsim.llm.structures.language_structures` that of a language model.
"""

# S structures, W weights, K blocks, n structures of one block, w positions one structure owns

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedsim.encoding import digest

Cost = Literal["parameters", "flops", "bytes", "kv_bytes"]
COSTS: tuple[Cost, ...] = ("parameters", "flops", "bytes", "kv_bytes")
Role = Literal["producer", "consumer"]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Structure:
    """One structure by name: ``index`` counts within its block."""

    block: str
    kind: str
    index: int


@dataclass(frozen=True)
class Slice:
    """Positions ``indices`` along ``dim`` of a weight that one structure owns."""

    parameter: str
    dim: int
    indices: tuple[int, ...]
    role: Role


@dataclass(frozen=True, eq=False)
class Member:
    """What each structure of a block owns of one weight: row i of ``positions`` (n, w) along ``dim``.

    A consumer reads the structure's output, so its positions are also features of its module's input.
    """

    weight: str
    dim: int
    positions: Ints
    role: Role


@dataclass(frozen=True)
class Resize:
    """Surgery lowers ``attribute`` of ``module`` by ``each`` for every structure that leaves."""

    module: str
    attribute: str
    each: int


@dataclass(frozen=True, eq=False)
class Block:
    """Interchangeable structures. ``published`` is the normalising constant of arXiv:2510.18030's code, where it has one.

    In a stack of layers ``layer`` says which. A structure that attends costs ``pair_flops`` for every pair of a query and a key, and
    ``kv_bytes`` of cache a token. Modules of ``vacated`` give way to what their function returns once all structures left.
    """

    name: str
    kind: str
    members: tuple[Member, ...]
    resizes: tuple[Resize, ...]
    published: float | None = None
    layer: int | None = None
    pair_flops: int = 0
    kv_bytes: int = 0
    vacated: tuple[tuple[str, Callable[[nn.Module], nn.Module]], ...] = ()

    def __len__(self) -> int:
        return len(self.members[0].positions)

    def cost(self, cost: str, tokens: int) -> int:
        """What one structure costs beside its weights, in an example of ``tokens`` tokens."""
        return {"flops": self.pair_flops * tokens**2, "kv_bytes": self.kv_bytes}.get(cost, 0)


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer. ``flops`` is per scalar and example: 2 x the output positions of a Linear or convolution, else 0."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    flops: int
    trainable: bool
    parameter: bool = True

    def coefficient(self, cost: str) -> int:
        """What one scalar of this weight costs."""
        if cost == "flops":
            return self.flops
        if cost == "kv_bytes":
            return 0
        itemsize = {"bfloat16": 2}.get(self.dtype) or np.dtype(self.dtype).itemsize
        return int(self.parameter) * (itemsize if cost == "bytes" else 1)


@dataclass(frozen=True, eq=False)
class StructureMap:
    """The structures of one architecture, in the fixed order that breaks ties; ``skipped`` says what is not prunable and why.

    Weights stand in ``named_parameters`` order, then buffers. FLOPs are 2 x multiply-adds of Linear and convolution
    modules in one example's forward pass, and of attention for an example of ``tokens`` tokens; biases, normalisation,
    activations and pooling count nothing. Bytes are those of parameters, not of buffers; ``kv_bytes`` those of the cache, a token.
    """

    weights: tuple[Weight, ...]
    blocks: tuple[Block, ...]
    skipped: Mapping[str, str]
    tokens: int = 0

    def __len__(self) -> int:
        return len(self.block_of)

    @cached_property
    def block_of(self) -> Ints:
        """Block of every structure, (S,)."""
        return np.repeat(np.arange(len(self.blocks)), [len(b) for b in self.blocks])

    @cached_property
    def starts(self) -> Ints:
        """First structure of each block, and S at the end: (K + 1,)."""
        return np.concatenate([[0], np.cumsum([len(b) for b in self.blocks])]).astype(np.int64)

    @cached_property
    def structures(self) -> tuple[Structure, ...]:
        return tuple(Structure(b.name, b.kind, i) for b in self.blocks for i in range(len(b)))

    def slices(self, structure: int) -> tuple[Slice, ...]:
        """Everything that leaves with structure number ``structure``."""
        block = int(self.block_of[structure])
        row = structure - int(self.starts[block])
        return tuple(Slice(m.weight, m.dim, tuple(m.positions[row].tolist()), m.role) for m in self.blocks[block].members)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the weights' names, shapes and types and of what every structure owns."""
        weights = [(w.name, w.shape, w.dtype, w.trainable, w.parameter) for w in self.weights]
        members = [(b.name, b.kind, m.weight, m.dim, m.role, m.positions) for b in self.blocks for m in b.members]
        return digest(weights, members)

    def check(self, model: nn.Module) -> None:
        """``ValueError`` if the model's weights are not those the map was made from."""
        found = {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in [*model.named_parameters(), *model.named_buffers()]}
        expected = {w.name: (w.shape, w.dtype) for w in self.weights}
        if found != expected:
            differing = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            raise ValueError(
                f"the model does not have the weights of this structure map: {differing[:3]} differ (model {digest(sorted(found.items()))},"
                f" map {digest(sorted(expected.items()))}); trace the model with structure_map"
            )

    @cached_property
    def parameters_of(self) -> Ints:
        """Parameters each structure owns in the dense model, (S,)."""
        owned = [
            sum(prod(w.shape) // w.shape[m.dim] * m.positions.shape[1] for m in b.members if (w := self._by_name[m.weight]).parameter)
            for b in self.blocks
        ]
        return np.asarray(owned, np.int64)[self.block_of]

    def removed_counts(self, kept: Bools) -> Ints:
        """Structures missing from each block, (..., K), for kept masks (..., S)."""
        if not self.blocks:
            return np.zeros((*kept.shape[:-1], 0), np.int64)
        return np.add.reduceat(~kept, self.starts[:-1], axis=-1, dtype=np.int64)

    def cost(self, cost: Cost, removed: Ints) -> Ints:
        """Exact cost (...,) of the whole model with ``removed`` (..., K) structures of each block gone."""
        total = np.zeros(removed.shape[:-1], np.int64)
        for weight in self.weights:
            if coefficient := weight.coefficient(cost):
                kept: Ints | int = coefficient * prod(weight.shape)
                for dim, extent in enumerate(weight.shape):
                    if extent and (owners := self._owners.get((weight.name, dim))):
                        kept = kept // extent * (extent - sum(width * removed[..., block] for block, width in owners))
                total = total + kept
        for number, block in enumerate(self.blocks):
            if each := block.cost(cost, self.tokens):
                total = total + each * (len(block) - removed[..., number])
        return total

    def pair_flops(self, removed: Ints) -> Ints:
        """FLOPs (...,) of attention for one pair of a query and a key."""
        each, number = np.array([b.pair_flops for b in self.blocks], np.int64), np.diff(self.starts)
        return np.asarray(((number - removed) * each).sum(-1), np.int64)

    def share(self, cost: Cost, removed: Ints) -> NDArray[np.float64]:
        """Removed cost as a share of all that structures own: *sparsity* when the cost is parameters."""
        dense, prunable = self._dense_and_prunable[cost]
        return (dense - self.cost(cost, removed)) / max(prunable, 1)

    def prunable(self, cost: Cost) -> int:
        """What all structures together cost: the unit of :meth:`share`."""
        return self._dense_and_prunable[cost][1]

    def after_each(self, kept: Bools, order: Ints) -> Ints:
        """Removed counts (R, K) after each removal of ``order`` (R,) in turn, starting from ``kept``."""
        steps = self.block_of[order][:, None] == np.arange(len(self.blocks))
        return self.removed_counts(kept) + np.cumsum(steps, axis=0, dtype=np.int64)

    def along(self, order: Ints, figures: Callable[[Ints], NDArray[Any]], *, at_once: int = 4096) -> NDArray[Any]:
        """``figures`` (R,) of the removed counts after each removal of ``order`` (R,) from the dense model, (``at_once``, K) of them in memory."""
        kept, found = np.ones(len(self), np.bool_), []
        for start in range(0, max(len(order), 1), at_once):
            some = order[start : start + at_once]
            found.append(figures(self.after_each(kept, some)))
            kept[some] = False
        return np.concatenate(found)

    def positions(self, block: int, member: Member, kept: Bools) -> tuple[Ints, Ints]:
        """Positions of ``member`` along its dimension that (stay, leave) under ``kept`` (S,); unowned ones count as neither."""
        alive = kept[self.starts[block] : self.starts[block + 1]]
        return member.positions[alive].reshape(-1), member.positions[~alive].reshape(-1)

    @cached_property
    def attends(self) -> bool:
        """Whether attention is among what can leave: the map of a language model."""
        return any(block.pair_flops for block in self.blocks)

    def cut(self, kept: Bools) -> "StructureMap":
        """The map of the model that surgery leaves: structures ``kept`` (S,) in their order, blocks that lost all of theirs gone."""
        stay: dict[tuple[str, int], Bools] = {}
        shapes = {w.name: w.shape for w in self.weights}
        for number, block in enumerate(self.blocks):
            for m in block.members:
                mark = stay.setdefault((m.weight, m.dim), np.ones(shapes[m.weight][m.dim], np.bool_))
                mark[self.positions(number, m, kept)[1]] = False
        weights = tuple(
            replace(w, shape=tuple(int(stay[w.name, d].sum()) if (w.name, d) in stay else n for d, n in enumerate(w.shape)))
            for w in self.weights
        )
        renumbered = {key: np.cumsum(mark) - 1 for key, mark in stay.items()}
        blocks = []
        for number, block in enumerate(self.blocks):
            alive = kept[self.starts[number] : self.starts[number + 1]]
            if alive.any():
                members = (replace(m, positions=renumbered[m.weight, m.dim][m.positions[alive]]) for m in block.members)
                blocks.append(replace(block, members=tuple(members)))
        return StructureMap(weights, tuple(blocks), self.skipped, self.tokens)

    @cached_property
    def _dense_and_prunable(self) -> dict[Cost, tuple[int, int]]:
        none, all_of_them = np.zeros(len(self.blocks), np.int64), np.diff(self.starts)
        dense = {cost: int(self.cost(cost, none)) for cost in COSTS}
        return {cost: (dense[cost], dense[cost] - int(self.cost(cost, all_of_them))) for cost in COSTS}

    @cached_property
    def _by_name(self) -> dict[str, Weight]:
        return {w.name: w for w in self.weights}

    @cached_property
    def _owners(self) -> dict[tuple[str, int], list[tuple[int, int]]]:
        owners: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for number, block in enumerate(self.blocks):
            for m in block.members:
                owners.setdefault((m.weight, m.dim), []).append((number, m.positions.shape[1]))
        return owners
