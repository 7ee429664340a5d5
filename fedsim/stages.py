"""Stages of a run named by the digest of all they depend on, so equal stages are computed once and shared.

``train -> deploy -> serve``: each digest covers the parts of the Simulation the stage reads and the digest of the stage before.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import encoding

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

TRAIN = ("task", "fleet", "strategy", "communication", "rounds", "evaluate_every", "lanes", "seed")
DEPLOY = ("deployment", "capacity", "recovery_rounds")


def train_digest(simulation: "Simulation") -> str:
    """Digest of the trained model: what it was trained on, by whom, how, for how long, from which seed."""
    return encoding.digest("train", *(getattr(simulation, name) for name in TRAIN))


def deploy_digest(simulation: "Simulation") -> str:
    """Digest of the fleet's submodels."""
    return encoding.digest("deploy", train_digest(simulation), *(getattr(simulation, name) for name in DEPLOY))


@dataclass(frozen=True)
class StageStore:
    """Finished stages as files of one directory, shared by every run beside it."""

    directory: Path
    trusted: tuple[str, ...] = ()

    def get(self, name: str, digest: str) -> Any:
        """The stored stage, or ``None``. Raises ``CheckpointError`` when its file is damaged."""
        path = self.path(name, digest)
        return encoding.load(path, trusted=("fedsim", "detection", *self.trusted)) if path.exists() else None

    def put(self, name: str, digest: str, value: Any) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        encoding.save(self.path(name, digest), value)

    def path(self, name: str, digest: str) -> Path:
        return self.directory / f"{name}-{digest}.npz"
