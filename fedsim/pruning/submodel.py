"""One submodel of a dense model: which structures are kept, and the surgery, masks and flat vectors that follow from it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsim.encoding import digest
from fedsim.pruning.structures import Bools, Cost, Ints, StructureMap


@dataclass(frozen=True, eq=False)
class Submodel:
    """``kept`` (S,) structures of the model with this ``fingerprint``; ``level`` is what was asked for, ``sparsity`` what came out.

    A value: equal if all fields are, and small. Everything about weights needs the :class:`StructureMap` it belongs to
    and raises ``ValueError`` for another one.
    """

    kept: Bools
    fingerprint: str
    level: float = 0.0

    @classmethod
    def dense(cls, smap: StructureMap) -> "Submodel":
        """Nothing removed."""
        return cls(np.ones(len(smap), np.bool_), smap.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Submodel) and digest(self) == digest(other)

    def __hash__(self) -> int:
        return hash(digest(self))

    def checked(self, smap: StructureMap) -> Bools:
        """``kept``; ``ValueError`` unless ``smap`` is the map it belongs to."""
        if smap.fingerprint != self.fingerprint:
            raise ValueError(f"submodel of model {self.fingerprint} used with the structure map of model {smap.fingerprint}")
        return self.kept

    def indices(self, smap: StructureMap) -> Ints:
        """Positions (Q,) of the kept scalars in the dense flat vector of trainable parameters (``Layout`` order)."""
        leaving = _leaving(smap, self.checked(smap))
        return np.flatnonzero(np.concatenate([_mark(w.shape, leaving.get(w.name, ())) for w in smap.weights if w.trainable]))

    def slice(self, vector: NDArray[np.floating], smap: StructureMap) -> NDArray[np.floating]:
        """The submodel's flat parameters (..., Q) of dense ones (..., P)."""
        return vector[..., self.indices(smap)]

    def scatter(self, small: NDArray[np.floating], into: NDArray[np.floating], smap: StructureMap) -> NDArray[np.floating]:
        """A copy of the dense ``into`` (..., P) with the kept coordinates taken from ``small`` (..., Q)."""
        dense = into.copy()
        dense[..., self.indices(smap)] = small
        return dense

    def parameters(self, smap: StructureMap) -> int:
        """Parameters of the sliced module."""
        return self.cost("parameters", smap)

    def flops(self, smap: StructureMap) -> int:
        """FLOPs of one example's forward pass: 2 x multiply-adds of Linear and convolution modules."""
        return self.cost("flops", smap)

    def bytes(self, smap: StructureMap) -> int:
        """Bytes of the sliced module's parameters."""
        return self.cost("bytes", smap)

    def cost(self, cost: Cost, smap: StructureMap) -> int:
        return int(smap.cost(cost, smap.removed_counts(self.checked(smap))))

    def sparsity(self, smap: StructureMap) -> float:
        """Removed parameters / parameters that belong to structures."""
        return float(smap.share("parameters", smap.removed_counts(self.checked(smap))))

    def model_sparsity(self, smap: StructureMap) -> float:
        """Removed parameters / all parameters of the model."""
        return 1 - self.parameters(smap) / Submodel.dense(smap).parameters(smap)

    @contextmanager
    def masked(self, model: nn.Module, smap: StructureMap) -> Iterator[nn.Module]:
        """``model`` with the consumer columns of removed structures set to 0 inside the block, its weights put back after it.

        Zero columns alone make a structure inert, whatever its producers' biases and normalisation do.
        """
        kept = self.checked(smap)
        smap.check(model)
        saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for number, block in enumerate(smap.blocks):
                for member in block.members:
                    leaving = smap.positions(number, member, kept)[1]
                    if member.role == "consumer" and len(leaving):
                        weight = model.get_parameter(member.weight).data
                        saved.append((weight, weight.clone()))
                        weight.index_fill_(member.dim, torch.from_numpy(leaving).to(weight.device), 0)
            yield model
        finally:
            for weight, original in reversed(saved):
                weight.copy_(original)

    def sliced(self, model: nn.Module, smap: StructureMap) -> nn.Module:
        """A copy of ``model`` without the removed structures: smaller weights, plain modules, the same interface."""
        kept = self.checked(smap)
        smap.check(model)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        cut = {id(tensors[name]): _cut(tensors[name], leaving) for name, leaving in _leaving(smap, kept).items()}
        small = copy.deepcopy(model, cut)  # a memo: what is cut already is not copied, so the dense weights never exist twice
        for number, block in enumerate(smap.blocks):
            removed = len(block) - int(kept[smap.starts[number] : smap.starts[number + 1]].sum())
            for resize in block.resizes if removed else ():
                module = small.get_submodule(resize.module)
                setattr(module, resize.attribute, getattr(module, resize.attribute) - removed * resize.each)
        for name, vacate in _vacated(smap, kept):
            small.set_submodule(name, vacate(small.get_submodule(name)))
        return small


def cut_to(model: nn.Module, smap: StructureMap, kept: Bools) -> tuple[nn.Module, StructureMap]:
    """The model of the structures ``kept`` (S,) alone, and its map; ``model`` itself, not a copy, where that is all of them."""
    return (model, smap) if kept.all() else (Submodel(kept, smap.fingerprint).sliced(model, smap), smap.cut(kept))


def lacking(old: Submodel | None, new: Submodel, smap: StructureMap) -> int:
    """Bytes that turn a client's ``old`` submodel into ``new``: the parameters it does not hold, and one bit per structure.

    ``old=None`` is a client that holds nothing.
    """
    mask = ceil(len(smap) / 8)
    if old is None:
        return new.bytes(smap) + mask
    shared = old.checked(smap) & new.checked(smap)
    return new.bytes(smap) - int(smap.cost("bytes", smap.removed_counts(shared))) + mask


def _vacated(smap: StructureMap, kept: Bools) -> Iterator[tuple[str, Callable[[nn.Module], nn.Module]]]:
    """Modules of blocks that lost all their structures, and what to make of them."""
    for number, block in enumerate(smap.blocks):
        if not kept[smap.starts[number] : smap.starts[number + 1]].any():
            yield from block.vacated


def _leaving(smap: StructureMap, kept: Bools) -> dict[str, list[tuple[int, Ints]]]:
    """(dim, positions) that leave each weight that loses some."""
    leaving: dict[str, list[tuple[int, Ints]]] = {}
    for number, block in enumerate(smap.blocks):
        for member in block.members:
            if len(positions := smap.positions(number, member, kept)[1]):
                leaving.setdefault(member.weight, []).append((member.dim, positions))
    return leaving


def _mark(shape: tuple[int, ...], leaving: Sequence[tuple[int, Ints]]) -> Bools:
    """True (numel,) at the scalars of a weight that stay."""
    mark = np.ones(shape, np.bool_)
    for dim, positions in leaving:
        mark[(slice(None),) * dim + (positions,)] = False
    return mark.reshape(-1)


def _cut(tensor: torch.Tensor, leaving: Sequence[tuple[int, Ints]]) -> torch.Tensor:
    """A copy of a parameter or buffer without the positions that leave along each dimension."""
    cut = tensor.detach()
    for dim in sorted({dim for dim, _ in leaving}):
        stay = np.ones(tensor.shape[dim], np.bool_)
        stay[np.concatenate([positions for d, positions in leaving if d == dim])] = False
        cut = cut.index_select(dim, torch.from_numpy(np.flatnonzero(stay)).to(tensor.device))
    return nn.Parameter(cut, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
