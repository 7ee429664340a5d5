"""The model shapes that the clients of a training hold: the whole model, or it and its narrower submodels; what each sends and computes."""

# C clients, P parameters of the model, Q of a submodel

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedsim.clock import forward_flops
from fedsim.communication import Payload
from fedsim.fleet import Fleet
from fedsim.local_training import Shape
from fedsim.nesting import Narrowed, narrowed
from fedsim.parameters import Layout
from fedsim.strategies import Strategy
from fedsim.tasks.base import Task
from fedsim.uploads import Sizes


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelShape:
    """A model shape that clients train, one upload and one download of it, and the FLOPs of an example's forward pass."""

    trained: Shape
    payloads: tuple[Payload, Payload]
    forward_flops: int

    @classmethod
    def of(
        cls, task: Task, model: nn.Module, strategy: Strategy, server: Any, coordinates: NDArray[np.int64] | None = None
    ) -> "ModelShape":
        layout = Layout.of(model)
        sizes = Sizes.of(strategy, layout, server)
        return cls(
            trained=Shape(task, sizes, coordinates),
            payloads=_payloads(strategy, layout, sizes),
            forward_flops=forward_flops(model, task.example),
        )


def model_shapes(
    task: Task, fleet: Fleet, strategy: Strategy, model: nn.Module, seed: int
) -> tuple[tuple[ModelShape, ...], NDArray[np.int64] | None]:
    """The shapes that clients train, the whole model first, and which of them each client trains, (C,)."""
    server = strategy.init(Layout.of(model).flatten(model))
    whole = ModelShape.of(task, model, strategy, server)
    if strategy.widths is None:
        return (whole,), None
    if whole.trained.sizes.memory or type(strategy).shift is not Strategy.shift:
        raise ValueError(f"widths go with strategies and compressions that keep no state on clients, got {strategy!r}")
    smap, submodels = narrowed(task, strategy.widths)
    shapes = [whole]
    for submodel in submodels[1:]:
        narrow = Narrowed(task, submodel, smap, strategy.widths.scale)
        shapes.append(ModelShape.of(narrow, narrow.build(seed), strategy, server, submodel.indices(smap)))
    return tuple(shapes), strategy.widths.levels(fleet, smap, submodels, seed)


def _payloads(strategy: Strategy, layout: Layout, sizes: Sizes) -> tuple[Payload, Payload]:
    """One upload and one download; a compressed upload carries its scalars uncompressed."""
    up, down = strategy.payload(layout)
    if strategy.compression is not None:
        up = Payload(parameters=strategy.compression.wire_bytes(sizes.upload, np.dtype(layout.dtype).itemsize), scalars=up.scalars)
    return up, down
