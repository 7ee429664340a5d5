"""Stages of a run named by the digest of all they depend on, so equal stages are computed once and shared.

``train -> deploy -> serve``: each digest covers the parts of the Simulation the stage reads and the digest of the stage before.
"""

import inspect
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fedsim
from fedsim import encoding
from fedsim.errors import CheckpointError
from fedsim.parameters import Layout

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

TRAIN = (
    "task",
    "fleet",
    "strategy",
    "communication",
    "rounds",
    "evaluate_every",
    "lanes",
    "device",
    "availability",
    "deadline",
    "dropout",
    "seed",
)
DEPLOY = ("deployment", "capacity", "recovery_rounds")


@dataclass(frozen=True)
class Origin:
    """What decides a run's numbers beside its Simulation: versions, the user's own code, the data, the model, and where reactions run."""

    fedsim: str
    torch: str
    code: str
    data: str
    model: str
    reactions: str

    @classmethod
    def of(cls, simulation: "Simulation", *, gpu: bool) -> "Origin":
        task = simulation.task
        module = task.build(simulation.seed)
        return cls(
            fedsim=fedsim.__version__,
            torch=torch.__version__,
            code=encoding.digest([_source(value) for value in encoding.classes_of(simulation)]),
            data=encoding.digest(*((split.inputs, split.targets) for split in task.data())),
            model=encoding.digest(Layout.of(module).flatten(module)),
            reactions="cuda" if gpu else "cpu",
        )

    def differences(self, other: "Origin") -> list[str]:
        """Names of the fields in which two origins differ."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]


def train_digest(simulation: "Simulation", origin: Origin) -> str:
    """Digest of the trained model: what it was trained on, by whom, how, for how long, from which seed, by which code."""
    return encoding.digest("train", replace(origin, reactions=""), *(getattr(simulation, name) for name in TRAIN))


def deploy_digest(simulation: "Simulation", origin: Origin) -> str:
    """Digest of the fleet's submodels."""
    return encoding.digest("deploy", train_digest(simulation, origin), *(getattr(simulation, name) for name in DEPLOY))


def _source(value: Any) -> str:
    """Source text of a user's class or function; its name where there is none (a session typed by hand)."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return f"{value.__module__}:{value.__qualname__}"


@dataclass(frozen=True)
class StageStore:
    """Finished stages as files of one directory, shared by every run beside it."""

    directory: Path
    trusted: tuple[str, ...] = ()

    def get(self, name: str, digest: str) -> Any:
        """The stored stage, or ``None``. Raises ``CheckpointError`` when its file is damaged."""
        path = self.path(name, digest)
        try:
            return encoding.load(path, trusted=("fedsim", "detection", *self.trusted)) if path.exists() else None
        except CheckpointError as error:
            raise CheckpointError(f"{error}; delete {path} to compute the stage again") from error

    def put(self, name: str, digest: str, value: Any) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        encoding.save(self.path(name, digest), value)

    def path(self, name: str, digest: str) -> Path:
        return self.directory / f"{name}-{digest}.npz"
