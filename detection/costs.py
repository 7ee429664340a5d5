"""How rare false alarms should be: the run length that costs least, from the exact chain.

Alarms cost what the answer to them costs (a repruning, say), late alarms cost the loss paid meanwhile. Changes come at random, every
alarm is answered and restarts the statistic, and the answer to a true one ends the change. What such a policy costs per tick in the
long run is the mean cost between two changes over the mean time between them (renewal and reward).
"""

from dataclasses import dataclass
from math import inf

import numpy as np

from detection.increment import Increment
from detection.laws import Law
from detection.run_length import exact_run_length, exact_threshold, random_change

_GRID, _COARSE = 33, 100


@dataclass(frozen=True, kw_only=True)
class Costs:
    """``alarm``: price of the answer to one alarm, false or true. ``harm``: price of one tick under a change. ``change_every``: mean ticks from
    one state in control to the next change. ``response``: ticks from a true alarm until its answer is in place, harm going on."""

    alarm: float
    harm: float
    change_every: float
    response: float = 0.0

    def __post_init__(self) -> None:
        for name, value, least in (("alarm", self.alarm, 0.0), ("harm", self.harm, 0.0), ("change_every", self.change_every, 1.0)):
            if not least < value < inf:
                raise ValueError(f"{name} must be above {least:g} and finite, got {value!r}")
        if not 0 <= self.response < inf:
            raise ValueError(f"response must be 0 or more ticks, got {self.response!r}")

    def per_tick(self, false_alarms: float, delay: float) -> float:
        """Long-run cost of a tick with ``false_alarms`` a change and a mean ``delay`` in observations used.

        >>> Costs(alarm=10, harm=1, change_every=81).per_tick(1.0, 20.0)
        0.4
        """
        late = delay + self.response
        return (self.alarm * (false_alarms + 1) + self.harm * late) / (self.change_every - 1 + late)


@dataclass(frozen=True, kw_only=True)
class CostOptimum:
    """The cheapest ``threshold``, its run length ``arl`` in control, the ``cost`` per tick, mean ``false_alarms`` for each change and mean ``delay``."""

    threshold: float
    arl: float
    cost: float
    false_alarms: float
    delay: float


def cost_per_tick(increment: Increment, null: Law, change: Law, threshold: float, costs: Costs, *, states: int = 400) -> float:
    """Long-run cost of a tick at ``threshold``. Raises ``ValueError`` where the increment's distribution is not known."""
    return costs.per_tick(*random_change(increment, null, change, threshold, costs.change_every, states=states))


def cost_optimal_arl(
    increment: Increment, null: Law, change: Law, costs: Costs, *, between: tuple[float, float] = (2.0, 1e8)
) -> CostOptimum:
    """The run length ``between`` two whose threshold costs least per tick under the laws ``null`` and ``change``.

    ``increment`` must have ``E exp(z) <= 1`` under ``null``. Raises ``ValueError`` where the least cost lies at an end: alarms so cheap that
    watching is not worth it, or so dear that none is.
    """
    from scipy.optimize import minimize_scalar

    low, high = (exact_threshold(increment, [null], arl) for arl in between)
    grid = np.linspace(low, high, _GRID)
    found = [cost_per_tick(increment, null, change, threshold, costs, states=_COARSE) for threshold in grid]
    best = int(np.argmin(found))
    if best in (0, _GRID - 1):
        raise ValueError(f"the least cost lies at an arl of {between[best > 0]:g}, an end of between={between!r}: {costs!r}")
    search = minimize_scalar(
        lambda threshold: cost_per_tick(increment, null, change, threshold, costs),
        bounds=(grid[best - 1], grid[best + 1]),
        method="bounded",
        options={"xatol": 1e-4},
    )
    threshold = float(search.x)
    false_alarms, delay = random_change(increment, null, change, threshold, costs.change_every)
    arl = exact_run_length(increment, null, threshold)
    return CostOptimum(threshold=threshold, arl=arl, cost=costs.per_tick(false_alarms, delay), false_alarms=false_alarms, delay=delay)
