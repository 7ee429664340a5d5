"""Structured pruning: structures, importance, nested trajectories, submodels and surgery."""

from fedsim.pruning.baselines import FLAP, LLMPruner, Magnitude, OneShot, Random, ShortGPT, Uniform, WandaSP, compensate
from fedsim.pruning.gisp import GISP
from fedsim.pruning.importance import FirstOrder
from fedsim.pruning.regrowth import Regrown, regrown
from fedsim.pruning.schedule import Pruner
from fedsim.pruning.structures import Structure, StructureMap
from fedsim.pruning.submodel import Submodel, lacking
from fedsim.pruning.tracing import structure_map
from fedsim.pruning.trajectory import PruningTrajectory

__all__ = [
    "FLAP",
    "GISP",
    "FirstOrder",
    "LLMPruner",
    "Magnitude",
    "OneShot",
    "Pruner",
    "PruningTrajectory",
    "Random",
    "Regrown",
    "ShortGPT",
    "Structure",
    "StructureMap",
    "Submodel",
    "Uniform",
    "WandaSP",
    "compensate",
    "lacking",
    "regrown",
    "structure_map",
]
