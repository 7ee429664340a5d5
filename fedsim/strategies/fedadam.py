"""FedAdam (Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, 2021, arXiv:2003.00295, algorithm 2)."""

from dataclasses import dataclass

import numpy as np

from fedsim.strategies.base import Due, Strategy, check_server
from fedsim.updates import Vector


@dataclass(frozen=True, kw_only=True)
class FedAdam(Strategy):
    """Adam on the server, which takes the mean difference D for a gradient.

    ``m = beta1 m + (1 - beta1) D``, ``v = beta2 v + (1 - beta2) D^2``, ``w += server_lr m / (sqrt(v) + tau)``; v starts at ``tau^2`` and nothing
    corrects the bias of the start. Flower's FedAdam corrects it and starts v at 0.
    """

    server_lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_server(self.server_lr, beta1=self.beta1, beta2=self.beta2)
        if not 0 < self.tau < float("inf"):
            raise ValueError(f"tau must be positive and finite, got {self.tau}")

    def init(self, params: Vector) -> tuple[Vector, Vector]:
        return np.zeros_like(params), np.full_like(params, self.tau**2)

    def second(self, before: Vector, square: Vector) -> Vector:
        """The second moment (P,) after a squared mean difference."""
        return self.beta2 * before + (1 - self.beta2) * square

    def server(
        self, params: Vector, state: tuple[Vector, Vector], mean: Vector, due: Due, last: bool
    ) -> tuple[Vector, tuple[Vector, Vector]]:
        first, before = state
        difference = mean - params
        first = np.asarray(self.beta1 * first + (1 - self.beta1) * difference, params.dtype)
        second = np.asarray(self.second(before, difference**2), params.dtype)
        return np.asarray(params + self.server_lr * first / (np.sqrt(second) + self.tau), params.dtype), (first, second)
