"""Times to an event when some are cut off before it (Kaplan, Meier 1958), and exact intervals of a Poisson rate (Garwood 1936)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Survival:
    """Share of clients still waiting: ``survival[i]`` from ``times[i]`` on, 1 before ``times[0]``; followed up to ``end``."""

    times: NDArray[np.float64]
    survival: NDArray[np.float64]
    end: float

    def quantile(self, share: float) -> float:
        """First time by which at least ``share`` of the clients had the event; ``nan`` when the curve ends above."""
        reached = self.times[self.survival <= 1 - share + 1e-12]
        return float(reached[0]) if len(reached) else float("nan")

    @property
    def median(self) -> float:
        """Time by which half had the event, or ``nan``."""
        return self.quantile(0.5)

    @property
    def restricted_mean(self) -> float:
        """Mean of ``min(time, end)``: the area under the curve; ``nan`` without clients."""
        edges = np.concatenate([[0.0], self.times, [self.end]])
        return float(np.sum(np.diff(edges) * np.concatenate([[1.0], self.survival])))


def kaplan_meier(times: ArrayLike, observed: ArrayLike) -> Survival:
    """Survival curve of ``times`` (n,), where ``observed`` (n,) tells an event from a censored time.

    A client censored at ``t`` is still at risk at ``t``.

    >>> kaplan_meier([1, 2, 3, 4], [True, False, True, True]).survival.tolist()
    [0.75, 0.375, 0.0]
    """
    t, seen = np.asarray(times, np.float64), np.asarray(observed, bool)
    if t.shape != seen.shape or t.ndim != 1:
        raise ValueError(f"times and observed must be two vectors of one length, got shapes {t.shape} and {seen.shape}")
    events, counts = np.unique(t[seen], return_counts=True)
    at_risk = len(t) - np.searchsorted(np.sort(t), events, side="left")
    staying: NDArray[np.float64] = np.cumprod(1 - counts / at_risk, dtype=np.float64)
    return Survival(events, staying, float(t.max()) if len(t) else float("nan"))


def poisson_interval(count: int, exposure: float, level: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval of the rate behind ``count`` events in ``exposure``; ``nan`` without exposure."""
    from scipy.special import gammaincinv

    if exposure <= 0:
        return float("nan"), float("nan")
    low = gammaincinv(count, (1 - level) / 2) if count else 0.0
    return float(low / exposure), float(gammaincinv(count + 1, (1 + level) / 2) / exposure)
