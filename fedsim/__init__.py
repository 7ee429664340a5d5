"""Simulate fleets of heterogeneous clients that train, serve and drift, on Ray.

Names are imported where first used, so ``import fedsim`` and ``fedsim --help`` cost nothing they do not need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "fedsim.capacity": ("Capacity",),
    "fedsim.communication": ("Bytes", "DynaComm", "DynamicFL", "Exact", "FastestGroup", "FedSGD", "Intervals", "RandomGroup", "Uniform"),
    "fedsim.communication.compression": ("ErrorFeedback", "Quantised", "Sign", "TopK"),
    "fedsim.branching": ("fork",),
    "fedsim.comparison": ("PolicyComparison", "compare"),
    "fedsim.drift": (
        "Abrupt", "At", "ClassPrior", "Clients", "Contrast", "DomainSwitch", "Drift", "Everyone", "Fraction", "GaussianBlur", "GaussianNoise",
        "Geometric", "Gradual", "InGroups", "InRegion", "Incremental", "Invert", "LabelNoise", "LabelSwap", "OnDevices", "Rotation",
        "Spreading", "Staggered", "UniformStart",
    ),
    "fedsim.errors": ("CapacityError", "CheckpointError", "ClientError", "CollapsedError", "DivergedError", "FedsimError", "WorkerError"),
    "fedsim.fleet": ("DeviceClass", "Fleet"),
    "fedsim.monitoring": ("Monitoring",),
    "fedsim.partition": ("IID", "ByKey", "BySize", "Dirichlet", "LabelShards"),
    "fedsim.policies": ("ActingPolicy", "Never", "Oracle", "Periodic", "Policy", "Proposal", "RepruneOnAlarm", "Switch", "View"),
    "fedsim.pruning": ("GISP", "FirstOrder"),
    "fedsim.reactions": ("Adapt", "Reprune"),
    "fedsim.records": ("Alarm", "Deployment", "Event", "Redeployment", "Rejected", "Request", "Round", "Started", "Tick"),
    "fedsim.runs.run": ("Run",),
    "fedsim.runtime.ray": ("RayExecutor",),
    "fedsim.runtime.serial": ("SerialExecutor",),
    "fedsim.simulation": ("Simulation", "resume", "run", "simulate"),
    "fedsim.availability": ("Always", "Diurnal", "Independent", "Trace"),
    "fedsim.explanation": ("Explanation", "explain"),
    "fedsim.nesting": ("Widths",),
    "fedsim.replaying": ("LocalStep", "Replay", "replay"),
    "fedsim.tuning": ("Tuning", "tune"),
    "fedsim.verification": ("Mismatch", "Verification", "verify"),
    "fedsim.resampled": ("Resampled",),
    "fedsim.stragglers": ("Deadline", "Dropout"),
    "fedsim.strategies": (
        "FedAdam", "FedAvg", "FedAvgM", "FedBuff", "FedDyn", "FedNova", "FedProx", "FedYogi", "HeteroFL", "Scaffold",
    ),
    "fedsim.stream": ("All", "Bernoulli", "Sampled", "Serving"),
    "fedsim.workers": ("Workers",),
}  # fmt: skip
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
_PACKAGES = ("drift", "llm", "pruning", "strategies", "tasks")

if TYPE_CHECKING:
    from fedsim import drift as drift
    from fedsim import llm as llm
    from fedsim import pruning as pruning
    from fedsim import strategies as strategies
    from fedsim import tasks as tasks

__all__ = [*_HOME, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _PACKAGES:
        return import_module(f"fedsim.{name}")
    raise AttributeError(f"module 'fedsim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
