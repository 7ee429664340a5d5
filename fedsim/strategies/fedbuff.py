"""FedBuff: buffered asynchronous aggregation (Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, 2022, arXiv:2106.06639)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.communication.cost import Payload
from fedsim.parameters import Layout
from fedsim.strategies.base import Due, ServerState, Strategy, Trained, check_server
from fedsim.updates import Vector


@dataclass(frozen=True, kw_only=True)
class FedBuff(Strategy):
    """The server updates whenever ``buffer`` clients have come back: ``w += server_lr / buffer sum u_i / (1 + staleness_i)^staleness_power``.

    ``concurrency`` clients train at any time; one that comes back is replaced at once. ``u_i`` is what a client's local steps added to the model it
    was sent, its staleness the number of the server's updates since. A round is one update; ``cohort`` is not used. See :mod:`fedsim.asynchronous`.
    """

    buffer: int = 10
    concurrency: int = 100
    server_lr: float = 1.0
    staleness_power: float = 0.5

    asynchronous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_server(self.server_lr)
        for name in ("buffer", "concurrency"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not 0 <= self.staleness_power < float("inf"):
            raise ValueError(f"staleness_power must be >= 0 and finite, got {self.staleness_power}")
        if self.widths is not None:
            raise ValueError(f"FedBuff trains whole models: widths must be None, got {self.widths!r}")

    def finish(self, trained: Trained) -> tuple[Tensor, None]:
        return trained.end - trained.start, None

    def weights(self, staleness: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weights (n,) of updates of the given ``staleness`` (n,)."""
        return np.asarray(1.0 / (self.buffer * (1.0 + staleness) ** self.staleness_power))

    def server(self, params: Vector, state: ServerState, mean: Vector, due: Due, last: bool) -> tuple[Vector, ServerState]:
        """``mean`` is the weighted sum of the buffer."""
        return np.asarray(params + self.server_lr * mean, params.dtype), state

    def payload(self, layout: Layout) -> tuple[Payload, Payload]:
        """The upload carries the sample count and the version it began from, the download its version, 8 bytes each."""
        return Payload(parameters=layout.bytes, scalars=16), Payload(parameters=layout.bytes, scalars=8)
