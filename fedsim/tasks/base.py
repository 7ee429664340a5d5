"""A task = data + model + a loss for every example.

Exports :class:`Task`, the data it yields (:class:`Dataset`, :class:`Splits`, :class:`Batch`) and :func:`hold_out`.
"""

# N examples of a data set, B of a batch, K classes

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedsim.pruning.structures import StructureMap


class Batch(NamedTuple):
    """Inputs (B, ...) and targets (B,) of some examples."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs (N, ...), targets (N,) and integer ``keys`` (N,) by which examples can be partitioned or drawn.

    One-dimensional targets are also the key "label" unless another is given. Raises ``ValueError`` for arrays of unequal
    length, for keys that are not integers and, naming the first index, for inputs that are not finite.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    keys: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = dict(self.keys)
        if "label" not in keys and self.targets.ndim == 1 and self.targets.dtype.kind in "iu":
            keys["label"] = self.targets
        for name, values in {"targets": self.targets, **keys}.items():
            if len(values) != len(self.inputs):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.inputs)} inputs; there must be one for each")
        for name, values in keys.items():
            if values.ndim != 1 or values.dtype.kind not in "iu":
                raise ValueError(f"key {name!r} must hold one integer an example, got shape {values.shape} of {values.dtype}")
        check_finite(self.inputs, "inputs")
        object.__setattr__(self, "keys", keys)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: ArrayLike) -> Batch:
        """The examples at ``indices`` (B,), copied into memory that torch allocates: kernels may round by alignment. ``IndexError`` outside the data."""
        rows = np.asarray(indices, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"indices must lie in 0..{len(self) - 1}, got {rows.min()} to {rows.max()}")
        return Batch(_taken(self.inputs, rows), _taken(self.targets, rows))


def _taken(values: NDArray[Any], rows: NDArray[np.int64]) -> Tensor:
    """``values[rows]`` as a tensor; rows are known to lie inside."""
    found = torch.empty((len(rows), *values.shape[1:]), dtype=_TORCH_TYPES[values.dtype.name])
    np.take(values, rows, axis=0, out=found.numpy(), mode="clip")
    return found


_TORCH_TYPES = {
    np.dtype(name).name: getattr(torch, name)
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
}


class Splits(NamedTuple):
    """Examples to train on (the fleet's shards) and examples never trained on (evaluation, served streams)."""

    train: Dataset
    test: Dataset


class Task:
    """Base of tasks, for classification; a user's own is a frozen dataclass with ``num_classes``, ``load`` and ``build``.

    Other tasks also override ``losses`` and ``correct``.
    """

    num_classes: int

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the values of the key "domain"; one nameless domain unless a task says otherwise."""
        return ("",)

    def load(self) -> Splits:
        """The data: a function of the task's fields. Called through :meth:`data`, once in a process."""
        raise NotImplementedError(f"{type(self).__name__} must define load() -> Splits")

    def build(self, seed: int) -> nn.Module:
        """An untrained model whose parameters are a function of ``seed`` alone; leaves torch's global generator as it was."""
        raise NotImplementedError(f"{type(self).__name__} must define build(seed) -> Module")

    def data(self) -> Splits:
        """:meth:`load`, kept for the last few equal tasks (for the same object, where a task cannot be hashed)."""
        key = self._key()
        if key in _LOADED:
            _LOADED.move_to_end(key)
            return _LOADED[key][1]
        splits = self.load()
        _LOADED[key] = (self, splits)
        while len(_LOADED) > _MOST_LOADED:
            _LOADED.popitem(last=False)
        return splits

    @property
    def example(self) -> Tensor:
        """One training input (1, ...), for tracing a model."""
        return self.data().train.batch([0]).inputs

    @property
    def skew_key(self) -> str:
        """The key in whose values the clients of a skewed fleet differ: what upload schedules read."""
        return "label"

    def structures(self, model: nn.Module, *, couple_residual: bool = False) -> "StructureMap":
        """What can be pruned from ``model``, built by this task."""
        from fedsim.pruning.tracing import structure_map

        return structure_map(model, self.example, couple_residual=couple_residual)

    def self_targets(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What ``model`` itself would answer (B,): targets where there are no labels."""
        return self.logits(model, inputs).argmax(-1)

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Unnormalised log-probabilities (B, K)."""
        logits: Tensor = model(inputs)
        return logits

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of each example (B,), in nats."""
        return F.cross_entropy(self.logits(model, batch.inputs), batch.targets, reduction="none")

    def correct(self, model: nn.Module, batch: Batch) -> Tensor:
        """1.0 where the most probable class is the target, else 0.0 (B,); its mean is the accuracy."""
        return (self.logits(model, batch.inputs).argmax(-1) == batch.targets).float()

    def _key(self) -> Any:
        try:
            hash(self)
        except TypeError:
            return id(self)
        return self


class Wrapped(Task):
    """Base of tasks that change the model of ``task`` and nothing else."""

    task: Task

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.task.num_classes

    @property
    def domain_names(self) -> tuple[str, ...]:
        return self.task.domain_names

    @property
    def example(self) -> Tensor:
        return self.task.example

    @property
    def skew_key(self) -> str:
        return self.task.skew_key

    def load(self) -> Splits:
        return self.task.data()

    def structures(self, model: nn.Module, *, couple_residual: bool = False) -> "StructureMap":
        return self.task.structures(model, couple_residual=couple_residual)

    def self_targets(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return self.task.self_targets(model, inputs)

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return self.task.logits(model, inputs)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.losses(model, batch)

    def correct(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.correct(model, batch)


def hold_out(labels: NDArray[np.int64], share: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and to hold out, ascending; ``share`` of each label (rounded) is held out."""
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held[rng.permutation(members)[: round(share * len(members))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def check_share(name: str, share: float) -> None:
    """``ValueError`` unless ``share`` lies strictly between 0 and 1."""
    if not 0.0 < share < 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {share!r}")


def check_finite(inputs: NDArray[Any], what: str) -> None:
    """``ValueError`` naming the first example of ``inputs`` (N, ...) that holds a NaN or an infinity."""
    if inputs.dtype.kind != "f" or not inputs.size:
        return
    with np.errstate(invalid="ignore"):
        sums = inputs.reshape(len(inputs), -1).sum(axis=1, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(sums))
    if len(bad):
        raise ValueError(
            f"{what}[{bad[0]}] is not finite ({len(bad)} of {len(inputs)} examples hold NaN or infinity); remove or repair them"
        )


# Values keep their task alive, so that an id used as a key cannot be given to another object.
_LOADED: OrderedDict[Any, tuple[Task, Splits]] = OrderedDict()
_MOST_LOADED = 4
