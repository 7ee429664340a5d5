"""Structured pruning: structures, importance, nested trajectories, submodels and surgery."""

from fedsim.pruning.baselines import Magnitude, OneShot, Random
from fedsim.pruning.gisp import GISP
from fedsim.pruning.importance import FirstOrder
from fedsim.pruning.schedule import Pruner
from fedsim.pruning.structures import Structure, StructureMap
from fedsim.pruning.submodel import Submodel, lacking
from fedsim.pruning.tracing import structure_map
from fedsim.pruning.trajectory import PruningTrajectory

__all__ = [
    "GISP",
    "FirstOrder",
    "Magnitude",
    "OneShot",
    "Pruner",
    "PruningTrajectory",
    "Random",
    "Structure",
    "StructureMap",
    "Submodel",
    "lacking",
    "structure_map",
]
