"""Federated strategies, one file each."""

from fedsim.strategies.base import Due, Strategy
from fedsim.strategies.fedavg import FedAvg

__all__ = ["Due", "FedAvg", "Strategy"]
