"""FedProx (Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, 2018, arXiv:1812.06127)."""

from dataclasses import dataclass

from torch import Tensor

from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """Local SGD on ``f_i(x) + mu / 2 |x - y|^2``, y the model handed out; ``mu = 0`` is FedAvg bit for bit."""

    mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"mu must be >= 0 and finite, got {self.mu}")

    def direction(self, gradient: Tensor, weights: Tensor, start: Tensor, shift: Tensor | None) -> Tensor:
        return gradient.add(weights - start, alpha=self.mu) if self.mu else gradient
