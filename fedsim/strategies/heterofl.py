"""Federated averaging of nested submodels (HeteroFL; Diao, Ding, Tarokh, 2021, arXiv:2010.01264)."""

from dataclasses import dataclass, field

from fedsim.nesting import Widths
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class HeteroFL(FedAvg):
    """Every client trains the first share of each hidden layer that its device holds; a parameter is the mean over those who hold it.

    The authors' mean is unweighted, ``weighting="uniform"``; their mask of the logits of absent labels is not part of it.
    """

    widths: Widths | None = field(default_factory=Widths)
