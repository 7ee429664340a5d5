"""FedYogi (Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, 2021, arXiv:2003.00295, algorithm 2)."""

from dataclasses import dataclass

import numpy as np

from fedsim.strategies.fedadam import FedAdam
from fedsim.updates import Vector


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """FedAdam with ``v -= (1 - beta2) D^2 sign(v - D^2)``, which forgets large differences additively; v stays positive."""

    def second(self, before: Vector, square: Vector) -> Vector:
        return before - (1 - self.beta2) * square * np.sign(before - square)
