"""The order in which structures leave a model: every prefix is a submodel, so all levels nest by construction."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.encoding import digest
from fedsim.errors import CapacityError, CheckpointError
from fedsim.pruning.structures import COSTS, Bools, Cost, Ints, Structure, StructureMap
from fedsim.pruning.submodel import Submodel

FORMAT = "fedsim.pruning.trajectory/1"


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningTrajectory:
    """Structures ``removed`` (R,) in order, as positions in the map's fixed order, with the score and step (from 1; 0: before) of each.

    ``shares[cost]`` (R,) is the share of all prunable cost gone after each removal; for parameters, the sparsity. Costs that no
    structure has are not there.
    ``fingerprint`` names the model. A value: equal if all fields are.
    """

    removed: Ints
    scores: NDArray[np.float64]
    step_of: Ints
    shares: Mapping[str, NDArray[np.float64]]
    num_structures: int
    fingerprint: str

    @classmethod
    def of(cls, smap: StructureMap, removed: Ints, scores: NDArray[np.float64], step_of: Ints) -> "PruningTrajectory":
        """Removals with the costs that follow from ``smap``."""
        shares: dict[str, NDArray[np.float64]] = {
            cost: smap.along(removed, partial(smap.share, cost)) for cost in COSTS if smap.prunable(cost)
        }
        return cls(removed=removed, scores=scores, step_of=step_of, shares=shares, num_structures=len(smap), fingerprint=smap.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PruningTrajectory) and digest(self) == digest(other)

    def __hash__(self) -> int:
        return hash(digest(self))

    def at(self, level: float, cost: Cost = "parameters") -> Submodel:
        """The submodel of the longest prefix that removes at most ``level`` of the prunable ``cost``: short of it by less than one structure.

        ``ValueError`` for a level outside [0, 1); ``CapacityError`` for one beyond the end of the trajectory, or before the submodel
        it went on from (whose removals are of step 0).
        """
        if not 0 <= level < 1:
            raise ValueError(f"level must lie in [0, 1), got {level!r}")
        if cost not in self.shares:
            raise ValueError(f"cost must be one of {sorted(self.shares)}, got {cost!r}")
        share = self.shares[cost]
        reach = float(share[-1]) if len(share) else 0.0
        if level > reach + 1e-12:
            raise CapacityError(
                f"level {level} of {cost} lies beyond the trajectory, which removes {reach:.4f}; add it to the pruner's levels"
            )
        number = int(np.searchsorted(share, level + 1e-12, side="right"))
        if number < self._given:
            raise CapacityError(f"level {level} of {cost} lies before the trajectory, which goes on from {share[self._given - 1]:.4f}")
        kept: Bools = np.ones(self.num_structures, np.bool_)
        kept[self.removed[:number]] = False
        return Submodel(kept, self.fingerprint, float(level))

    def within(self, limit: float, smap: StructureMap, cost: Cost | Callable[[StructureMap, Ints], NDArray[Any]] = "bytes") -> Submodel:
        """The largest submodel whose ``cost``, in its own units, is at most ``limit``; see :mod:`fedsim.pruning.budgets`.

        None is larger than the submodel the trajectory went on from. Raises ``CapacityError`` with what the smallest needs where none fits.
        """
        self.structures(smap)
        measure = partial(smap.cost, cost) if isinstance(cost, str) else partial(cost, smap)
        dense = measure(np.zeros((1, len(smap.blocks)), np.int64))
        figures = np.concatenate([dense, smap.along(self.removed, measure)])[self._given :]
        fitting = np.flatnonzero(figures <= limit)
        if not len(fitting):
            raise CapacityError(
                f"{cost} is at least {figures.min():,.6g} along this trajectory, over the limit of {limit:,.6g}; prune further"
            )
        number = self._given + int(fitting[0])
        kept: Bools = np.ones(self.num_structures, np.bool_)
        kept[self.removed[:number]] = False
        return Submodel(kept, self.fingerprint, float(self.shares["parameters"][number - 1]) if number else 0.0)

    @property
    def _given(self) -> int:
        """Structures that the submodel it went on from lacks."""
        return int((self.step_of == 0).sum())

    def structures(self, smap: StructureMap) -> tuple[Structure, ...]:
        """The removed structures by name."""
        if smap.fingerprint != self.fingerprint:
            raise ValueError(f"trajectory of model {self.fingerprint} used with the structure map of model {smap.fingerprint}")
        return tuple(smap.structures[i] for i in self.removed)

    def save(self, path: str | Path) -> None:
        """Write one JSON file, complete or not at all."""
        arrays = {"removed": self.removed, "scores": self.scores, "step_of": self.step_of}
        value = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "num_structures": self.num_structures,
            **{name: array.tolist() for name, array in arrays.items()},
            "shares": {cost: share.tolist() for cost, share in self.shares.items()},
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        temporary.write_text(json.dumps(value, allow_nan=False))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path, smap: StructureMap | None = None) -> "PruningTrajectory":
        """Read what :meth:`save` wrote: ``CheckpointError`` if damaged, ``ValueError`` if it is not of the model of ``smap``."""
        try:
            value = json.loads(Path(path).read_text())
            if value["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {value['format']!r}, expected {FORMAT!r}")
            trajectory = cls(
                removed=np.asarray(value["removed"], np.int64),
                scores=np.asarray(value["scores"], np.float64),
                step_of=np.asarray(value["step_of"], np.int64),
                shares={cost: np.asarray(share, np.float64) for cost, share in value["shares"].items()},
                num_structures=int(value["num_structures"]),
                fingerprint=str(value["fingerprint"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is missing, damaged or not a pruning trajectory: {error}") from error
        if damage := trajectory._damage():
            raise CheckpointError(f"{path} is damaged: {damage}")
        if smap is not None and smap.fingerprint != trajectory.fingerprint:
            raise ValueError(f"{path} is a trajectory of model {trajectory.fingerprint}, not of model {smap.fingerprint}")
        return trajectory

    def _damage(self) -> str | None:
        """What cannot be true of an order of removal."""
        number, arrays = len(self.removed), {"scores": self.scores, "step_of": self.step_of, **self.shares}
        if self.removed.ndim != 1 or any(array.shape != self.removed.shape for array in arrays.values()):
            return f"its arrays must be of one length, got {dict(removed=self.removed.shape, **{n: a.shape for n, a in arrays.items()})}"
        if number and not 0 <= self.removed.min() <= self.removed.max() < self.num_structures:
            return f"removed structures must lie in 0..{self.num_structures - 1}, got {self.removed.min()} to {self.removed.max()}"
        if len(np.unique(self.removed)) < number:
            return "a structure is removed twice"
        return None
