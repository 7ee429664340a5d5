"""Federated strategies, one file each."""

from fedsim.strategies.base import Due, ServerState, Strategy, Trained
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.heterofl import HeteroFL

__all__ = ["Due", "FedAvg", "HeteroFL", "ServerState", "Strategy", "Trained"]
