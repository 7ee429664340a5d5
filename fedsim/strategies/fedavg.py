"""Federated averaging (McMahan, Moore, Ramage, Hampson, Agüera y Arcas, 2017, arXiv:1602.05629)."""

from dataclasses import dataclass

from fedsim.strategies.base import Due, ServerState, Strategy
from fedsim.updates import Vector


@dataclass(frozen=True, kw_only=True)
class FedAvg(Strategy):
    """Plain local SGD; the merge of the clients due is the model. With a merge after every step it is synchronous FedSGD."""

    def server(self, params: Vector, state: ServerState, mean: Vector, due: Due, last: bool) -> tuple[Vector, ServerState]:
        return mean, state
