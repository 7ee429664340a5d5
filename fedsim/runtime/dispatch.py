"""Which unit goes to which worker, and what becomes of the units of a worker that is lost. Bookkeeping alone: nothing here runs or waits.

One queue, units that need a GPU first, then the costliest (Graham 1969). A worker takes the first unit it can run, and a second one ahead of
time while the queue is long; the last units wait for whoever is free first.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from fedsim.runtime.executor import Needs

IN_FLIGHT = 2  # the second call hides the first one's round trip
ATTEMPTS = 3
_SLOW = 3.0  # times what a unit should take by the median pace, after which it may be done twice
_LAST = 2  # units a worker that wait for whoever is free first


@dataclass(eq=False, kw_only=True)
class Member:
    """A worker as the driver sees it: what it has, where it is once it ``started``, and the calls sent to it with their units, oldest first.

    ``None`` in place of a unit: nobody waits for that call any more.
    """

    gpus: float = 0.0
    node: str = ""
    started: bool = True
    calls: dict[Any, int | None] = field(default_factory=dict)

    def forget(self) -> None:
        """Nobody waits for its calls any more, though they keep it busy."""
        self.calls = dict.fromkeys(self.calls)


class Dispatch:
    """The units of one map over ``members``, a list whose owner replaces those that are lost. ``costs`` are predictions in any unit; ``None``: all alike.

    With ``twice`` an idle worker does a unit again, once the queue is empty, that has been away for three times as long as others of its cost.
    """

    def __init__(self, members: Sequence[Member], needs: Sequence[Needs], costs: Sequence[float] | None = None, twice: bool = False):
        self.members, self.twice = members, twice
        self.remaining = len(needs)
        self.losses: dict[int, list[str]] = {}
        self._gpus = [need.gpus for need in needs]
        self._costs = [1.0] * len(needs) if costs is None else [float(cost) for cost in costs]
        self._queue = deque(sorted(range(len(needs)), key=lambda i: (-self._gpus[i], -self._costs[i])))
        self._sent: dict[int, float] = {}
        self._copied: set[int] = set()
        self._alone: set[int] = set()
        self._paces: list[float] = []

    def next(self, now: float) -> tuple[Member, int] | None:
        """A worker with room and the unit it should get at ``now`` (seconds); ``None`` until something changes. Tell :meth:`sent`."""
        free = [m for m in self.members if m.started and len(m.calls) < IN_FLIGHT]
        for member in sorted(free, key=lambda m: (len(m.calls), self._ahead(m))):
            if member.calls and len(self.members) > 1 and len(self._queue) < _LAST * len(self.members):
                break
            for place, unit in enumerate(self._queue):
                if self._gpus[unit] <= member.gpus and self._is_quiet(member, unit):
                    del self._queue[place]
                    return member, unit
        return self._copy([m for m in free if not m.calls], now) if self.twice and not self._queue else None

    def sent(self, member: Member, unit: int, call: Any, now: float) -> None:
        member.calls[call] = unit
        self._sent.setdefault(unit, now)

    def arrived(self, member: Member, call: Any, now: float) -> int | None:
        """The unit whose result this is; ``None`` if nobody waits for it."""
        unit = member.calls.pop(call)
        if unit is None:
            return None
        self.remaining -= 1
        if unit in self._copied:
            for other in self.members:
                other.calls |= {c: None for c, u in other.calls.items() if u == unit}
        self._paces.append((now - self._sent[unit]) / max(self._costs[unit], 1e-9))
        return unit

    def lost(self, member: Member, cause: str, memory: bool = False) -> int | None:
        """Put the units of a lost worker at the head of the queue. The oldest call was running, so its unit alone is under suspicion, and returned.

        Lost for want of ``memory``, it will be tried again while nothing else runs on its node.
        """
        units = list(member.calls.values())
        member.calls.clear()
        elsewhere = {unit for other in self.members for unit in other.calls.values()}
        again = [unit for unit in units if unit is not None and unit not in elsewhere]
        self._queue.extendleft(reversed(again))
        for unit in again:
            self._sent.pop(unit)
            self._copied.discard(unit)
        suspect = units[0] if units else None
        if suspect is not None:
            self.losses.setdefault(suspect, []).append(cause)
            if memory:
                self._alone.add(suspect)
        return suspect

    def idle(self) -> bool:
        """Whether no worker has a call."""
        return not any(m.calls for m in self.members)

    def _ahead(self, member: Member) -> float:
        """Predicted cost of what it has not finished."""
        return sum(0.0 if unit is None else self._costs[unit] for unit in member.calls.values())

    def _is_quiet(self, member: Member, unit: int) -> bool:
        """A unit that once ran out of memory gets a node to itself."""
        if not self._alone:
            return True
        there = [u for m in self.members if m.node == member.node for u in m.calls.values()]
        return not there if unit in self._alone else not self._alone.intersection(there)

    def _copy(self, idle: Sequence[Member], now: float) -> tuple[Member, int] | None:
        if not idle or not self._paces:
            return None
        usual = median(self._paces)
        away = {unit for m in self.members for unit in m.calls.values() if unit is not None} - self._copied - self._alone
        slow = [unit for unit in away if now - self._sent[unit] > _SLOW * usual * self._costs[unit]]
        for unit in sorted(slow, key=lambda u: self._sent[u]):
            for member in idle:
                if self._gpus[unit] <= member.gpus:
                    self._copied.add(unit)
                    return member, unit
        return None
