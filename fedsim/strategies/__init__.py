"""Federated strategies: a local rule, a server rule, what crosses the wire and what clients keep."""

from fedsim.strategies.base import Due, ServerState, Strategy, Trained
from fedsim.strategies.fedadam import FedAdam
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavgm import FedAvgM
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.feddyn import FedDyn
from fedsim.strategies.fednova import FedNova
from fedsim.strategies.fedprox import FedProx
from fedsim.strategies.fedyogi import FedYogi
from fedsim.strategies.heterofl import HeteroFL
from fedsim.strategies.scaffold import Scaffold

__all__ = [
    "Due",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedDyn",
    "FedNova",
    "FedProx",
    "FedYogi",
    "HeteroFL",
    "Scaffold",
    "ServerState",
    "Strategy",
    "Trained",
]
