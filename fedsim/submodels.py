"""The trained dense model as workers hold it, and the variants of it that clients serve with."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedsim import encoding
from fedsim.parameters import Layout
from fedsim.pruning import Pruner, StructureMap, Submodel
from fedsim.tasks import Task

Vector = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Variant:
    """A submodel as it serves: its structures and, where they are not the dense model's, its own weights (Q,)."""

    submodel: Submodel
    weights: Vector | None = None

    @cached_property
    def digest(self) -> str:
        """Tells variants of one dense model apart."""
        return encoding.digest(self.submodel.kept, self.weights)


@dataclass(frozen=True, eq=False)
class Deployed:
    """``level`` (C,) indexes the deployment's levels, ``variant`` (C,) indexes ``variants``."""

    level: NDArray[np.int64]
    variant: NDArray[np.int64]
    variants: tuple[Variant, ...]


@dataclass(frozen=True, eq=False)
class DenseModel:
    """The trained ``module``, its structures and its flat parameters (P,): what every submodel is cut from.

    ``digest`` names the task, its parameters and the way their structures are traced.
    """

    module: nn.Module
    smap: StructureMap
    layout: Layout
    params: Vector
    digest: str

    @classmethod
    def of(cls, task: Task, params: Vector, pruner: Pruner, device: str = "cpu") -> "DenseModel":
        module = task.build(0)
        layout = Layout.of(module)
        layout.load(module, params)
        module.eval()
        smap = task.structures(module, couple_residual=pruner.couple_residual)
        return cls(module.to(device), smap, layout, params, encoding.digest(task, params, smap.fingerprint))

    def sliced(self, variant: Variant) -> nn.Module:
        """The variant as a module of its own, in evaluation mode."""
        small = variant.submodel.sliced(self.module, self.smap)
        if variant.weights is not None:
            Layout.of(small).load(small, variant.weights)
        return small.eval()

    def cached_slice(self, variant: Variant, cache: MutableMapping[Any, Any]) -> nn.Module:
        """:meth:`sliced`, kept by the worker while it is in use."""
        key = ("slice", self.digest, variant.digest)
        if key not in cache:
            cache[key] = self.sliced(variant)
        found: nn.Module = cache[key]
        return found


def dense_model(shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> DenseModel:
    """The dense model of ``shared`` ("task", "params" (P,), "gisp", and "model", its digest; on "device"), built once in a worker."""
    key = ("dense", shared["model"], shared.get("device", "cpu"))
    if key not in cache:
        cache[key] = DenseModel.of(shared["task"], shared["params"], shared["gisp"], key[2])
    found: DenseModel = cache[key]
    return found
