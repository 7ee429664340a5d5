"""Federated strategies, one file each."""

from fedsim.strategies.base import Due, ServerState, Strategy, Trained
from fedsim.strategies.fedavg import FedAvg

__all__ = ["Due", "FedAvg", "ServerState", "Strategy", "Trained"]
