"""What a federated strategy is: a local rule, a server rule and what crosses the wire. It knows no schedule and no runtime."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.communication.compression import Compression
from fedsim.communication.cost import Payload
from fedsim.parameters import Layout
from fedsim.updates import Vector

if TYPE_CHECKING:
    from fedsim.nesting import Widths

ServerState = Any


@dataclass(frozen=True, eq=False)
class Due:
    """Who a merge concerns: client ids (n,), their normalised weights (n,), float64, and the ``share`` of the whole fleet's weight they hold.

    Under ``weighting="samples"`` the share is their examples among all examples, else their number among all clients with data.
    """

    clients: NDArray[np.int64]
    weights: NDArray[np.float64]
    share: float


@dataclass(frozen=True, eq=False)
class Trained:
    """``n`` clients between two merges: the model handed out ``start`` (P,), where each ended ``end`` (n, P), the local ``steps`` (n,) it took.

    ``client`` (n, S) is the state each kept from its last merge, zeros before the first, and ``server`` the server's state at hand-out.
    """

    start: Tensor
    end: Tensor
    steps: Tensor
    client: Tensor
    server: ServerState


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Local SGD shared by the family; a strategy overrides what it changes: ``init``, ``shift``, ``direction``, ``finish``, ``server``, ``payload``.

    Local rules and ``finish`` see torch tensors on the device that trains, clients in rows; the server's rules see NumPy vectors.

    ``local_steps`` steps a round (E) on batches of exactly ``batch_size``; with ``local_epochs`` a client of ``n_i`` examples takes
    ``floor(local_epochs n_i / batch_size)`` instead, at least one. ``clip`` bounds the gradient's norm; momentum starts at zero every
    round. ``compression`` is applied to what a client uploads, as a difference from the model handed out; with ``widths`` a client trains and
    uploads the part of the model that its device allows. ``weighting`` merges by sample
    count or equally. ``mixed``: legal where clients of a round have different sync points; ``asynchronous``: there are no rounds.
    """

    client_lr: float = 0.05
    cohort: int = 20
    local_steps: int = 64
    batch_size: int = 16
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    local_epochs: float | None = None
    compression: Compression | None = None
    widths: "Widths | None" = None
    weighting: Literal["samples", "uniform"] = "samples"

    mixed: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = False

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
        if self.local_epochs is not None and not 0 < self.local_epochs < float("inf"):
            raise ValueError(f"local_epochs must be None or positive and finite, got {self.local_epochs}")
        if self.weighting not in ("samples", "uniform"):
            raise ValueError(f"weighting must be 'samples' or 'uniform', got {self.weighting!r}")

    def init(self, params: Vector) -> ServerState:
        """The server's state before the first round; encodable."""
        return None

    def client_size(self, num_parameters: int) -> int:
        """Scalars S a client keeps from one merge to its next; 0: none."""
        return 0

    def shift(self, client: Tensor, server: ServerState) -> Tensor | None:
        """What ``direction`` adds at every local step, (n, P), from the clients' states (n, S) and the server's; ``None``: nothing."""
        return None

    def direction(self, gradient: Tensor, weights: Tensor, start: Tensor, shift: Tensor | None) -> Tensor:
        """What local SGD steps along, elementwise and one parameter at a time. ``start`` is the model handed out; lanes, if any, lead the others."""
        return gradient if shift is None else gradient + shift

    def finish(self, trained: Trained) -> tuple[Tensor, Tensor | None]:
        """What each client uploads, (n, M), and the state it keeps, (n, S) or ``None`` for none. By default it uploads its model, M = P."""
        return trained.end, None

    def server(self, params: Vector, state: ServerState, mean: Vector, due: Due, last: bool) -> tuple[Vector, ServerState]:
        """The server's model and state after the merge ``mean`` (M,) of what the clients due uploaded; ``last``: the round's last point."""
        raise NotImplementedError(f"{type(self).__name__} must define server")

    def steps(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Local steps a round (n,) of clients that hold ``sizes`` (n,) examples."""
        if self.local_epochs is None:
            return np.full(len(sizes), self.local_steps, np.int64)
        return np.maximum(1, np.floor(self.local_epochs * sizes / self.batch_size)).astype(np.int64)

    def payload(self, layout: Layout) -> tuple[Payload, Payload]:
        """One upload and one download of a client that holds the whole model; the upload carries the sample count (8 bytes)."""
        return Payload(parameters=layout.bytes, scalars=8), Payload(parameters=layout.bytes)


def check_server(server_lr: float, **betas: float) -> None:
    """``ValueError`` unless ``server_lr`` is positive and finite and the ``betas`` lie in [0, 1)."""
    if not 0 < server_lr < float("inf"):
        raise ValueError(f"server_lr must be positive and finite, got {server_lr}")
    for name, value in betas.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
