"""FedDyn (Acar, Zhao, Matas, Mattina, Whatmough, Saligrama, 2021, arXiv:2111.04263, algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedsim.strategies.base import Due, Strategy, Trained
from fedsim.updates import Vector


@dataclass(frozen=True, kw_only=True)
class FedDyn(Strategy):
    """Local SGD on ``f_i(x) - <g_i, x> + alpha / 2 |x - y|^2``: a linear term kept by the client makes local and global optima agree.

    After a merge ``g_i -= alpha (x_i - y)``; the server keeps ``h -= alpha share mean(x_i - y)``, ``share`` that of the fleet that was due, and
    hands out ``mean(x_i) - h / alpha``.
    """

    alpha: float = 0.1

    mixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")

    def init(self, params: Vector) -> Vector:
        return np.zeros_like(params)

    def client_size(self, num_parameters: int) -> int:
        return num_parameters

    def shift(self, client: Tensor, server: Vector) -> Tensor:
        return -client

    def direction(self, gradient: Tensor, weights: Tensor, start: Tensor, shift: Tensor | None) -> Tensor:
        assert shift is not None
        return (gradient + shift).add(weights - start, alpha=self.alpha)

    def finish(self, trained: Trained) -> tuple[Tensor, Tensor]:
        return trained.end, trained.client - self.alpha * (trained.end - trained.start)

    def server(self, params: Vector, state: Vector, mean: Vector, due: Due, last: bool) -> tuple[Vector, Vector]:
        kept = state - self.alpha * due.share * (mean - params)
        return np.asarray(mean - kept / self.alpha, params.dtype), np.asarray(kept, params.dtype)
