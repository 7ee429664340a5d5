"""FedNova (Wang, Liu, Liang, Joshi, Poor, 2020, arXiv:2007.07481): normalised averaging of clients that take unequal local steps."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.communication.cost import Payload
from fedsim.parameters import Layout
from fedsim.strategies.base import Due, ServerState, Strategy, Trained
from fedsim.updates import Vector


@dataclass(frozen=True, kw_only=True)
class FedNova(Strategy):
    """``w -= tau_eff sum p_i (y - x_i) / a_i`` with ``tau_eff = sum p_i a_i`` (equation 7): no client pulls harder for stepping more often.

    ``a_i`` is the weight that ``tau`` steps of SGD with momentum ``rho`` give a gradient, ``[tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho)``, or ``tau``
    without momentum. Where all take the same steps it is FedAvg. An upload carries the normalised difference and ``a_i``.
    """

    mixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay:
            raise ValueError(f"FedNova normalises plain SGD and momentum: weight_decay must be 0, got {self.weight_decay}")

    def accumulated(self, steps: Tensor) -> Tensor:
        """``a_i`` (n,), float64, of local ``steps`` (n,).

        >>> FedNova(momentum=0.9).accumulated(torch.tensor([1, 5])).numpy().round(4).tolist()
        [1.0, 13.1441]
        """
        tau, rho = steps.double(), self.momentum
        return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)

    def finish(self, trained: Trained) -> tuple[Tensor, None]:
        weight = self.accumulated(trained.steps).to(trained.end.dtype)[:, None]
        return torch.cat([(trained.end - trained.start) / weight, weight], dim=1), None

    def server(self, params: Vector, state: ServerState, mean: Vector, due: Due, last: bool) -> tuple[Vector, ServerState]:
        return np.asarray(params + mean[-1] * mean[:-1], params.dtype), state

    def payload(self, layout: Layout) -> tuple[Payload, Payload]:
        """The upload carries the sample count and ``a_i``, 8 bytes each."""
        return Payload(parameters=layout.bytes, scalars=16), Payload(parameters=layout.bytes)
