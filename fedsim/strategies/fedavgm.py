"""FedAvgM: federated averaging with server momentum (Hsu, Qi, Brown, 2019, arXiv:1909.06335)."""

from dataclasses import dataclass

import numpy as np

from fedsim.strategies.base import Due, Strategy, check_server
from fedsim.updates import Vector


@dataclass(frozen=True, kw_only=True)
class FedAvgM(Strategy):
    """``m = beta m + D``, ``w += server_lr m``, with ``D`` the mean difference.

    ``beta = 0`` and ``server_lr = 1`` is FedAvg.
    """

    beta: float = 0.9
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_server(self.server_lr, beta=self.beta)

    def init(self, params: Vector) -> Vector:
        return np.zeros_like(params)

    def server(self, params: Vector, state: Vector, mean: Vector, due: Due, last: bool) -> tuple[Vector, Vector]:
        momentum = np.asarray(self.beta * state + (mean - params), params.dtype)
        return np.asarray(params + self.server_lr * momentum, params.dtype), momentum
