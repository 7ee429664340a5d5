"""SCAFFOLD, option II (Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, 2020, arXiv:1910.06378, algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.communication.cost import Payload
from fedsim.parameters import Layout
from fedsim.strategies.base import Due, Strategy, Trained, check_server
from fedsim.updates import Vector


@dataclass(frozen=True, kw_only=True)
class Scaffold(Strategy):
    """Local SGD along ``g_i(x) - c_i + c``: control variates take the clients' drift out.

    A client keeps ``c_i`` (P,), the server ``c`` (P,); both start at 0. After ``K`` steps ``c_i' = c_i - c + (y - x_i) / (K client_lr)``; the server
    moves by ``server_lr`` times the mean difference, and ``c`` by the mean change of the ``c_i`` times the share of the fleet that was due. Both
    means follow ``weighting``: two different ones would have the wrong fixed point. An upload carries the model and the change of ``c_i``.
    """

    server_lr: float = 1.0

    mixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_server(self.server_lr)
        for name, plain in (("momentum", 0.0), ("weight_decay", 0.0), ("clip", None)):
            if getattr(self, name) != plain:
                raise ValueError(f"Scaffold's control variates need plain SGD: {name} must be {plain}, got {getattr(self, name)}")

    def init(self, params: Vector) -> Vector:
        return np.zeros_like(params)

    def client_size(self, num_parameters: int) -> int:
        return num_parameters

    def shift(self, client: Tensor, server: Vector) -> Tensor:
        return torch.tensor(server, device=client.device) - client

    def finish(self, trained: Trained) -> tuple[Tensor, Tensor]:
        server = torch.tensor(trained.server, device=trained.end.device)
        rate = (trained.steps * self.client_lr).to(trained.end.dtype)[:, None]
        control = trained.client - server + (trained.start - trained.end) / rate
        return torch.cat([trained.end, control - trained.client], dim=1), control

    def server(self, params: Vector, state: Vector, mean: Vector, due: Due, last: bool) -> tuple[Vector, Vector]:
        model, change = np.split(mean, 2)
        moved = model if self.server_lr == 1.0 else params + self.server_lr * (model - params)
        return moved.astype(params.dtype), (state + due.share * change).astype(params.dtype)

    def payload(self, layout: Layout) -> tuple[Payload, Payload]:
        model = layout.bytes
        return Payload(parameters=model, control=model, scalars=8), Payload(parameters=model, control=model)
