"""What a federated strategy is: a local rule, a server rule and what crosses the wire. It knows no schedule and no runtime."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.communication.cost import Payload
from fedsim.parameters import Layout
from fedsim.updates import Vector

ServerState = Any


@dataclass(frozen=True, eq=False)
class Due:
    """Who a merge concerns: client ids (n,) and their normalised weights (n,), float64. Inside a chain, the same for every worker."""

    clients: NDArray[np.int64]
    weights: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Local SGD shared by the family; a strategy overrides ``direction``, ``init``, ``server`` and ``payload`` as it needs.

    ``local_steps`` steps a round (E) on batches of exactly ``batch_size``; ``clip`` bounds the gradient's norm; momentum starts at zero every
    round. ``weighting`` merges by sample count or equally. ``mixed``: legal where clients of a round have different sync points.
    """

    client_lr: float = 0.05
    cohort: int = 20
    local_steps: int = 64
    batch_size: int = 16
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    weighting: Literal["samples", "uniform"] = "samples"

    mixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("cohort", "local_steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not 0 < self.client_lr < float("inf"):
            raise ValueError(f"client_lr must be positive and finite, got {self.client_lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be >= 0 and finite, got {self.weight_decay}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be None or > 0, got {self.clip}")
        if self.weighting not in ("samples", "uniform"):
            raise ValueError(f"weighting must be 'samples' or 'uniform', got {self.weighting!r}")

    def init(self, params: Vector) -> ServerState:
        """The server's state before the first round; encodable."""
        return None

    def direction(self, gradient: Tensor, weights: Tensor, start: Tensor) -> Tensor:
        """What local SGD steps along, one parameter at a time; ``start`` is the model handed out. Lanes, if any, lead ``gradient`` and ``weights``."""
        return gradient

    def server(self, params: Vector, state: ServerState, mean: Vector, due: Due, last: bool) -> tuple[Vector, ServerState]:
        """The server's model and state after the merge ``mean`` (P,) of the clients due; ``last``: the round's last point."""
        raise NotImplementedError(f"{type(self).__name__} must define server")

    def payload(self, layout: Layout) -> tuple[Payload, Payload]:
        """One upload and one download of a client that holds the whole model; the upload carries the sample count (8 bytes)."""
        return Payload(parameters=layout.bytes, scalars=8), Payload(parameters=layout.bytes)
