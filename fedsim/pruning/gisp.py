"""GISP, global iterative structured pruning (arXiv:2510.18030): one score for every structure of the model, removed in steps."""

from dataclasses import dataclass, field

from fedsim.pruning.importance import FirstOrder, Importance
from fedsim.pruning.schedule import Pruner


@dataclass(frozen=True, kw_only=True)
class GISP(Pruner):
    """Remove the globally least important structures, recompute gradients, repeat; every level is a prefix of one order.

    The removed share of prunable parameters grows linearly over ``steps``. Departures from the authors' code: the schedule
    counts parameters instead of structures, and the default importance for MLPs and CNNs is the mean over examples of the
    absolute gate gradient, per parameter the structure owns.
    """

    steps: int = 10
    importance: Importance = field(default_factory=FirstOrder)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number, at least 1, got {self.steps!r}")

    def plan(self) -> tuple[Importance, int]:
        return self.importance, self.steps
