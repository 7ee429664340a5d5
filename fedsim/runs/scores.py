"""What a run was worth, from its tables alone: accuracy, delay, false alarms, cost and harm. Undefined quantities are ``nan``.

The unit is one client-tick: one client's batch at one tick. A client's change point is the first tick at which its law
differs; alarms before it, or on a client that never changes, are false; the first one after it is the detection, later ones
are repeats. A redeployment repairs a change when it was asked for at the change or later. Where ``statistic`` is ``nan`` the
client was not watched, so no alarm could have rung: rates of false alarms are over watched client-ticks alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.runs.schema import column
from fedsim.runs.survival import Survival, kaplan_meier, poisson_interval

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

NEVER = np.iinfo(np.int64).max
_NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Figures of one run. Accuracies are shares, rates per 1,000 watched in-control client-ticks, delays in ticks, harm in nats.

    ``accuracy_*`` is over the clients that change: before their change, from it on, and at the end; ``dense_*`` is the dense
    model on the same batches, ``fleet_*`` all clients, before and after the first change anywhere. ``harm`` sums loss minus
    dense loss over all clients from the first change on, ``harm_positive`` only where it is a loss, ``harm_changed`` over
    changed clients from their change on. Delays are undefined where most changes were repaired before any alarm.
    ``run_length`` is the number of watched in-control client-ticks per false alarm. ``precision`` is the share of
    redeployments after which a client was better off. Bytes are summed over clients: ``bytes_train`` up and down,
    ``bytes_deploy`` the submodels the fleet starts with, ``bytes_redeploy`` what reactions moved.
    """

    num_clients: int = 0
    num_changed: int = 0
    num_ticks: int = 0
    test_accuracy: float = _NAN
    accuracy_before: float = _NAN
    accuracy_after: float = _NAN
    accuracy_end: float = _NAN
    dense_before: float = _NAN
    dense_after: float = _NAN
    dense_end: float = _NAN
    fleet_before: float = _NAN
    fleet_after: float = _NAN
    fleet_end: float = _NAN
    median_delay: float = _NAN
    mean_delay: float = _NAN
    median_repair: float = _NAN
    detected: int = 0
    misses: int = 0
    repeats: int = 0
    false_alarms: int = 0
    false_alarm_rate: float = _NAN
    false_alarm_low: float = _NAN
    false_alarm_high: float = _NAN
    run_length: float = _NAN
    asked: int = 0
    redeployed: int = 0
    rejected: int = 0
    precision: float = _NAN
    bytes_train: int = 0
    bytes_deploy: int = 0
    bytes_redeploy: int = 0
    worker_seconds: float = 0.0
    harm: float = _NAN
    harm_positive: float = _NAN
    harm_changed: float = _NAN

    @property
    def megabytes_redeploy(self) -> float:
        """What reactions moved: calibration windows up, submodels down."""
        return self.bytes_redeploy / 1e6


def score(*, rounds: Any, ticks: Any, events: Any, truth: Any, deployments: Any = None, tail: int = 50) -> Scores:
    """Scores of a run; "the end" is the last ``tail`` ticks, or the last fifth where that is shorter.

    Without ``deployments``, ``bytes_deploy`` is 0.
    """
    world = World.of(ticks, truth)
    accuracies: dict[str, Any] = _accuracies(ticks, world, tail) if len(ticks) else {}
    return Scores(
        num_clients=len(world.clients),
        num_changed=int(np.sum(world.change != NEVER)),
        num_ticks=len(np.unique(column(ticks, "tick"))),
        test_accuracy=_last_finite(column(rounds, "test_accuracy")),
        bytes_train=int(column(rounds, "bytes_up").sum() + column(rounds, "bytes_down").sum()),
        bytes_deploy=0 if deployments is None else int(column(deployments, "bytes").sum()),
        **accuracies,
        **_detection(ticks, events, world),
        **_reaction(ticks, events),
        **_harm(ticks, world),
    )


@dataclass(frozen=True, eq=False)
class World:
    """Clients (C,) in order, the tick of each one's first change (``NEVER`` without one) and of its last batch (-1 without one)."""

    clients: Ints
    change: Ints
    last: Ints

    @classmethod
    def of(cls, ticks: Any, truth: Any) -> "World":
        tick, client = column(ticks, "tick"), column(ticks, "client")
        clients = np.union1d(client, column(truth, "client"))
        last = np.full(len(clients), -1)
        np.maximum.at(last, np.searchsorted(clients, client), tick)
        change = np.full(len(clients), NEVER)
        starts = column(truth, "change_at")
        real = (starts >= 0) & (starts <= tick.max(initial=-1))
        np.minimum.at(change, np.searchsorted(clients, column(truth, "client")[real]), starts[real])
        return cls(clients, change, last)

    def change_of(self, client: Ints) -> Ints:
        """Change points of the clients named in ``client``; ``NEVER`` for a client that never served."""
        if not len(self.clients):
            return np.full(len(client), NEVER)
        index = np.minimum(np.searchsorted(self.clients, client), len(self.clients) - 1)
        return np.where(self.clients[index] == client, self.change[index], NEVER)

    @property
    def first_change(self) -> int:
        """The first change anywhere; ``NEVER`` without one."""
        return int(self.change.min(initial=NEVER))


@dataclass(frozen=True, eq=False)
class Delays:
    """For each changed client that served after its change: ticks until ``observed``, or until it was lost sight of."""

    client: Ints
    ticks: Ints
    observed: Mask
    repaired: Mask

    @property
    def survival(self) -> Survival:
        """Share of changed clients not detected yet, by ticks since the change."""
        return kaplan_meier(self.ticks, self.observed)


def detection_delays(*, ticks: Any, events: Any, truth: Any) -> Delays:
    """Ticks from each change to its first alarm; censored at a redeployment asked for since (the change is repaired) or at the client's last batch."""
    return _delays(events, World.of(ticks, truth))


def repair_delays(*, ticks: Any, events: Any, truth: Any) -> Delays:
    """Ticks from each change to the client's first redeployment asked for since; censored at the client's last batch."""
    world = World.of(ticks, truth)
    return _waits(world, _first_after_change(events, "redeployment", world), np.full(len(world.clients), NEVER))


def by_tick(tick: Ints, values: Floats, keep: Mask | None = None) -> tuple[Ints, Floats]:
    """Mean of the finite ``values`` of each tick, over the rows to ``keep``: ticks (T,) and means (T,)."""
    keep = np.isfinite(values) if keep is None else keep & np.isfinite(values)
    distinct, index = np.unique(tick[keep], return_inverse=True)
    return distinct, np.bincount(index, values[keep], len(distinct)) / np.maximum(np.bincount(index, minlength=len(distinct)), 1)


def accuracy_over_time(*, ticks: Any, truth: Any) -> tuple[Ints, Floats]:
    """Accuracy of the clients that change (of all, where none does) at each tick: ticks (T,) and means (T,)."""
    changed = World.of(ticks, truth).change_of(column(ticks, "client")) != NEVER
    return by_tick(column(ticks, "tick"), column(ticks, "accuracy"), changed if changed.any() else None)


def _accuracies(ticks: Any, world: World, tail: int) -> dict[str, float]:
    tick, change = column(ticks, "tick"), world.change_of(column(ticks, "client"))
    changes = change != NEVER
    end = tick > tick.max() - min(tail, max(1, len(np.unique(tick)) // 5))
    own = {"before": changes & (tick < change), "after": changes & (tick >= change), "end": changes & (tick >= change) & end}
    fleet = {"before": tick < world.first_change, "after": tick >= world.first_change, "end": end}
    accuracy, dense = column(ticks, "accuracy"), column(ticks, "dense_accuracy")
    return {
        f"{name}_{when}": _mean(values[rows])
        for name, values, spans in (("accuracy", accuracy, own), ("dense", dense, own), ("fleet", accuracy, fleet))
        for when, rows in spans.items()
    }


def _detection(ticks: Any, events: Any, world: World) -> dict[str, Any]:
    found = _delays(events, world)
    repaired = _waits(world, _first_after_change(events, "redeployment", world), np.full(len(world.clients), NEVER))
    telling = found.observed.sum() >= found.repaired.sum()  # else the curve rests on the few whom the policy left alone
    alarm = column(events, "kind") == "alarm"
    early = column(events, "tick")[alarm] < world.change_of(column(events, "client")[alarm])
    false_alarms = int(early.sum())
    watched = np.isfinite(column(ticks, "statistic"))
    exposure = int(np.sum(watched & (column(ticks, "tick") < world.change_of(column(ticks, "client")))))
    low, high = poisson_interval(false_alarms, exposure / 1000)
    return {
        "median_delay": found.survival.median if telling else _NAN,
        "mean_delay": found.survival.restricted_mean if telling else _NAN,
        "median_repair": repaired.survival.median,
        "detected": int(found.observed.sum()),
        "misses": int(np.sum(~found.observed & ~found.repaired)),
        "repeats": int((~early).sum() - found.observed.sum()),
        "false_alarms": false_alarms,
        "false_alarm_rate": 1000 * false_alarms / exposure if exposure else _NAN,
        "false_alarm_low": low,
        "false_alarm_high": high,
        "run_length": exposure / false_alarms if false_alarms else _NAN,
    }


def _delays(events: Any, world: World) -> Delays:
    alarm = _first_after_change(events, "alarm", world)
    return _waits(world, alarm, _first_after_change(events, "redeployment", world))


def _waits(world: World, event: Ints, repair: Ints) -> Delays:
    """An event counts when it comes no later than the repair: the alarm that caused it cannot come after it."""
    served = (world.change != NEVER) & (world.last >= world.change)
    start, end = world.change[served], world.last[served]
    event, repair = event[served], repair[served]
    observed = (event != NEVER) & (event <= repair)
    repaired = ~observed & (repair != NEVER)
    until = np.where(observed, event, np.where(repaired, repair, end + 1))
    return Delays(world.clients[served], until - start, observed, repaired)


def _first_after_change(events: Any, kind: str, world: World) -> Ints:
    tick, client = column(events, "tick"), column(events, "client")
    change = world.change_of(client)
    rows = (column(events, "kind") == kind) & (_asked_at(events) >= change)
    first = np.full(len(world.clients), NEVER)
    np.minimum.at(first, np.searchsorted(world.clients, client[rows]), tick[rows])
    return first


def _asked_at(events: Any) -> Ints:
    """For each event the tick at which its job was requested: what the job could know. Its own tick where it has none."""
    job, tick = column(events, "job"), column(events, "tick")
    requests = np.flatnonzero((column(events, "kind") == "request") & (job >= 0))
    if not len(requests):
        return tick
    requests = requests[np.argsort(job[requests])]
    index = requests[np.minimum(np.searchsorted(job[requests], job), len(requests) - 1)]
    return np.where(job[index] == job, tick[index], tick)


def _reaction(ticks: Any, events: Any) -> dict[str, Any]:
    kind = column(events, "kind")
    return {
        "asked": int(np.sum(kind == "request")),
        "redeployed": int(np.sum(kind == "redeployment")),
        "rejected": int(np.sum(kind == "rejected")),
        "precision": _mean((gains(ticks=ticks, events=events) > 0).astype(np.float64)),
        "bytes_redeploy": int(column(events, "bytes").sum()),
        "worker_seconds": _worker_seconds(column(events, "job"), column(events, "seconds")),
    }


def _worker_seconds(job: Ints, seconds: Floats) -> float:
    """Each job counts once, however many of its events state its seconds."""
    jobs, index = np.unique(job[job >= 0], return_inverse=True)
    longest = np.zeros(len(jobs))
    np.maximum.at(longest, index, seconds[job >= 0])
    return float(longest.sum())


def gains(*, ticks: Any, events: Any, window: int = 10) -> Floats:
    """What each redeployment gained: its client's mean loss over the dense model's, ``window`` ticks before minus after.

    The span before begins no earlier than the job's request. Without dense losses, the loss itself. Those
    whose client served on one side only are left out.
    """
    kind, job, tick, client = (column(events, name) for name in ("kind", "job", "tick", "client"))
    requested = dict(zip(job[kind == "request"].tolist(), tick[kind == "request"].tolist(), strict=True))
    histories = _histories(ticks)
    result = []
    for at, who, which in zip(*(c[kind == "redeployment"].tolist() for c in (tick, client, job)), strict=True):
        when, loss = histories.get(who, (np.empty(0), np.empty(0)))
        start = min(at - 1, max(at - window, requested.get(which, -1)))
        before, after = (when >= start) & (when < at), (when >= at) & (when < at + window)
        result.append(_mean(loss[before]) - _mean(loss[after]))
    gained = np.array(result, np.float64)
    return gained[np.isfinite(gained)]


def _histories(ticks: Any) -> dict[int, tuple[Ints, Floats]]:
    tick, client, loss, dense = (column(ticks, name) for name in ("tick", "client", "loss", "dense_loss"))
    excess = loss - np.where(np.isfinite(dense), dense, 0.0) if np.isfinite(dense).any() else loss
    order = np.argsort(client, kind="stable")
    distinct, starts = np.unique(client[order], return_index=True)
    pieces = np.split(order, starts[1:])
    return {int(c): (tick[rows], excess[rows]) for c, rows in zip(distinct, pieces, strict=False)}


def _harm(ticks: Any, world: World) -> dict[str, Any]:
    tick, excess = column(ticks, "tick"), column(ticks, "loss") - column(ticks, "dense_loss")
    known = np.isfinite(excess)
    start = 0 if world.first_change == NEVER else world.first_change
    change = world.change_of(column(ticks, "client"))
    everyone, changed = known & (tick >= start), known & (tick >= change)
    return {
        "harm": _total(excess[everyone]),
        "harm_positive": _total(np.maximum(excess[everyone], 0)),
        "harm_changed": _total(excess[changed]),
    }


def _mean(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else _NAN


def _total(values: Floats) -> float:
    return float(values.sum()) if len(values) else _NAN


def _last_finite(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else _NAN
