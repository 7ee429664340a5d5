"""Weighted means of client updates, folded by one fixed binary tree so that the grouping of work cannot move a bit.

The tree pairs positions (0, 1), (2, 3), ..., carries an odd tail up, and repeats. An aligned run of ``2**j`` leaves is a
node of it, whoever computes that node. Where clients with different starts meet at a point, they are folded by start,
then by client. Parameters a client does not hold (a pruned submodel) leave its weight out, as in
HeteroFL (Diao, Ding, Tarokh, 2021, arXiv:2010.01264).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")
Vector = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Update:
    """One client's parameters ``values`` (P,), its normalised ``weight``, and which coordinates it holds (P,) bool; ``None``: all."""

    values: Vector
    weight: float
    coverage: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight must be finite and >= 0, got {self.weight}")
        if self.coverage is not None and not self.coverage.any():
            raise ValueError("coverage is empty: an update must hold at least one coordinate")


@dataclass(frozen=True, eq=False)
class Partial:
    """A node of the fold: the weighted sum ``total`` (P,), the sum of weights, and per coordinate the weight of its holders.

    ``covered`` is ``None`` while everyone holds everything.
    """

    total: Vector
    weight: float
    covered: Vector | None = None


def normalised(weights: ArrayLike) -> NDArray[np.float64]:
    """``weights`` (n,) divided by their sum, so that a single uploader has weight exactly 1."""
    values = np.asarray(weights, np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(f"weights must be finite and >= 0, got {values.tolist()}")
    total = math.fsum(values)
    if total == 0.0:
        raise ValueError(f"the weights of {len(values)} clients sum to 0, so they have no mean")
    return values / total


def leaf(update: Update) -> Partial:
    """The fold's leaf for one update; half precision is summed in single."""
    dtype = fold_dtype(update.values.dtype)
    total = update.values.astype(dtype, copy=False) * dtype.type(update.weight)
    if update.coverage is None:
        return Partial(total, update.weight)
    return Partial(np.where(update.coverage, total, 0), update.weight, np.where(update.coverage, update.weight, 0.0))


def fold_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Accumulators of a model of this dtype: its own, and float32 for float16."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def tree_sum(parts: Sequence[Partial]) -> Partial:
    """The sum of ``parts`` along the fixed tree; the only fold in the product."""
    return tree(parts, _add)


def tree(items: Sequence[T], add: Callable[[T, T], T]) -> T:
    """Fold ``items`` pairwise, odd tail carried up.

    >>> tree(list("abcde"), lambda a, b: f"({a}{b})")
    '(((ab)(cd))e)'
    """
    if not items:
        raise ValueError("nothing to fold")
    level = list(items)
    while len(level) > 1:
        paired = [add(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(level) & ~1 :]
    return level[0]


def mean(root: Partial, otherwise: Vector) -> Vector:
    """The mean (P,) of normalised updates; ``otherwise`` where no update holds the coordinate.

    Where every client holds a coordinate its weights sum to one and the total is the mean, bit for bit.
    """
    if root.covered is None:
        return root.total.astype(otherwise.dtype, copy=False)
    held = root.covered > 0
    quotient = root.total / np.where(held, root.covered, 1.0)
    chosen = np.where(root.covered == root.weight, root.total, quotient)
    return np.where(held, chosen, otherwise).astype(otherwise.dtype)


def fold(rows: Vector, weights: NDArray[np.float64]) -> Partial:
    """The node over whole updates ``rows`` (n, P): their weighted sum along the fixed tree; half precision is summed in single."""
    dtype = fold_dtype(rows.dtype)
    rows, shares, paired = rows.astype(dtype, copy=False), weights.astype(dtype)[:, None], len(rows) & ~1
    if len(rows) == 1:
        return Partial(rows[0] * shares[0], float(weights[0]))
    level = rows[0:paired:2] * shares[0:paired:2]
    level += rows[1:paired:2] * shares[1:paired:2]  # the leaves and the first sums in one pass over half the memory
    if paired < len(rows):
        level = np.concatenate([level, rows[paired:] * shares[paired:]])
    while len(level) > 1:
        paired = len(level) & ~1
        pairs = level[0:paired:2]
        pairs += level[1:paired:2]
        level = pairs if paired == len(level) else np.concatenate([pairs, level[paired:]])
    return Partial(level[0].copy(), tree([float(w) for w in weights], float.__add__))


def spread(node: Partial, coordinates: NDArray[np.int64], size: int) -> Partial:
    """A node over the ``coordinates`` (Q,) of a vector of ``size`` scalars, as a node over the whole vector."""
    total, covered = np.zeros(size, node.total.dtype), np.zeros(size)
    total[coordinates], covered[coordinates] = node.total, node.weight
    return Partial(total, node.weight, covered)


def _add(a: Partial, b: Partial) -> Partial:
    covered = None
    if a.covered is not None or b.covered is not None:
        covered = np.asarray(_holders(a) + _holders(b))
    return Partial(a.total + b.total, a.weight + b.weight, covered)


def _holders(part: Partial) -> Vector | np.float64:
    return np.float64(part.weight) if part.covered is None else part.covered
