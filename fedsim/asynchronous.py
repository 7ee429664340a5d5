"""Asynchronous training as an event loop in simulated time: clients come back when they are done, and the server updates when its buffer is full.

Who comes back when follows from times alone, so the clients of one update train in parallel, grouped by the model they were sent. Arrivals go by
(time, client); all of one instant are taken in before anybody is sent out at it.
"""

# C clients of the fleet, m in flight, n of a buffer, V versions in flight, P parameters

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim.availability import TRIES
from fedsim.communication import Uniform
from fedsim.local_training import Unit, train_unit
from fedsim.randomness import rng_for
from fedsim.records import Round
from fedsim.runtime.batching import blocks, unit_size
from fedsim.strategies import Due, FedBuff
from fedsim.updates import Vector, tree_sum

if TYPE_CHECKING:
    from fedsim.rounds import Training, TrainState

Ints = NDArray[np.int64]
_BLIND_DRAWS = 64


@dataclass(frozen=True, eq=False)
class Flight:
    """Who is training: ``clients`` (m,), the ``version`` (m,) each was sent, when it is ``back`` (m,) and the ``number`` (m,) of its sending.

    ``sent`` counts sendings, ``looks`` the times that too few were there to be sent out. ``versions`` (V,), ascending, and ``models`` (V, P) are those still in use.
    """

    clients: Ints
    version: Ints
    back: NDArray[np.float64]
    number: Ints
    sent: int
    looks: int
    versions: Ints
    models: Vector


def begin(training: "Training", params: Vector) -> Flight:
    """Nobody is in flight yet. ``ValueError`` for more than there are clients with data, and for what needs rounds."""
    rule = _rule(training)
    if rule.concurrency > len(training.holders):
        raise ValueError(f"concurrency={rule.concurrency} is more than the {len(training.holders)} clients with data")
    if training.log is not None or training.deadline is not None or training.dropout is not None or training.communication != Uniform():
        raise ValueError(
            "FedBuff has no rounds: deadlines, dropout, schedules with several uploads and compressions with memory do not go with it"
        )
    none = np.empty(0, np.int64)
    return Flight(none, none, np.empty(0), none, 0, 0, np.array([0]), params[None])


def update(training: "Training", state: "TrainState") -> tuple["TrainState", Round]:
    """The server's next update."""
    flight, taken, clock = _gather(training, state)
    arrived = Arrived(flight.clients[taken], flight.version[taken], flight.number[taken], state.round)
    weights = _rule(training).weights(arrived.staleness)
    total, losses, digests = _train(training, state, flight, arrived, weights)
    params, _ = training.strategy.server(state.params, None, total, Due(arrived.clients, weights, 0.0), True)
    after = replace(state, params=params, server=_landed(flight, taken, state.round + 1, params), round=state.round + 1, clock=clock)
    return after, _record(training, state, after, arrived, losses, digests)


@dataclass(frozen=True, eq=False)
class Arrived:
    """The buffer's clients (n,) in order of arrival, the version each began from, the number of its sending, and the server's version ``now``."""

    clients: Ints
    version: Ints
    number: Ints
    now: int

    @property
    def staleness(self) -> Ints:
        """Updates of the server since each was sent out (n,)."""
        return self.now - self.version


def _rule(training: "Training") -> FedBuff:
    assert isinstance(training.strategy, FedBuff)
    return training.strategy


def _gather(training: "Training", state: "TrainState") -> tuple[Flight, Ints, float]:
    """Let time go until the buffer is full: the flight, the rows of those in the buffer in order of arrival, and the time."""
    rule, flight, clock, taken, asked = _rule(training), state.server, state.clock, np.empty(0, np.int64), False
    while len(taken) < rule.buffer:
        back = flight.back.copy()
        back[taken] = np.inf
        first = np.lexsort((flight.clients, back))[:1]
        if not asked and not (len(first) and back[first[0]] <= clock):
            flight, clock = _send(training, flight, taken, clock, state.round)
            asked = True
        else:
            clock = max(clock, float(back[first[0]]))
            taken, asked = np.concatenate([taken, first]), False
    return flight, taken, clock


def _send(training: "Training", flight: Flight, taken: Ints, clock: float, version: int) -> tuple[Flight, float]:
    """Send idle clients out until as many are in flight as shall be, or nobody idle can be asked: those missing are looked for again when somebody is back.

    With nobody in flight the server waits until it finds somebody. Raises ``ValueError`` if nobody comes.
    """
    busy = set(np.delete(flight.clients, taken).tolist())
    chosen: list[int] = []
    looks = flight.looks
    for _ in range(TRIES):
        while len(busy) < _rule(training).concurrency:
            found = _idle(training, busy, clock, flight.sent + len(chosen), looks)
            if found is None:
                looks += 1  # whoever is asked for this place again, draws again
                break
            busy.add(found)
            chosen.append(found)
        if busy:
            break
        clock = training.availability.next_look(training.fleet, clock)
    else:
        raise ValueError(
            f"no client was available in {TRIES} looks before update {version}, up to {clock:g} simulated seconds; raise availability"
        )
    if not chosen:
        return replace(flight, looks=looks), clock
    clients = np.array(chosen)
    cohort = training.cohort(clients, training.strategy.steps(training.shards.sizes[clients]))
    back = clock + cohort.down_seconds + cohort.steps * cohort.step_seconds + cohort.up_seconds
    added = {"clients": clients, "version": np.full(len(clients), version), "back": back, "number": flight.sent + np.arange(len(clients))}
    columns = {name: np.concatenate([getattr(flight, name), values]) for name, values in added.items()}
    return replace(flight, **columns, sent=flight.sent + len(clients), looks=looks), clock


def _idle(training: "Training", busy: set[int], clock: float, number: int, look: int) -> int | None:
    """An idle client that is available at ``clock``, each equally likely; ``None`` where there is none. ``look`` counts looks in vain before: it decides the coins."""
    holders, rng = training.holders, rng_for(training.seed, "sent out", number)
    for client in holders[rng.integers(len(holders), size=_BLIND_DRAWS)].tolist():
        if client not in busy and _present(training, np.array([client]), clock, number, look)[0]:
            return int(client)
    idle = np.setdiff1d(holders, list(busy))
    idle = idle[_present(training, idle, clock, number, look)]
    return int(rng.choice(idle)) if len(idle) else None


def _present(training: "Training", clients: Ints, clock: float, number: int, look: int) -> NDArray[np.bool_]:
    return training.availability.present(training.fleet, clients, clock, number, training.seed, look)


def _train(
    training: "Training", state: "TrainState", flight: Flight, arrived: Arrived, weights: NDArray[np.float64]
) -> tuple[Vector, NDArray[np.float64], NDArray[np.str_]]:
    """The weighted sum of the buffer's updates (P,), each client's mean loss (n,) and the digest of its block (n,)."""
    groups = [np.flatnonzero(arrived.version == v) for v in np.unique(arrived.version)]
    parts = [part for members in groups for part in _parts(training, members)]
    units = [_unit(training, arrived, part, weights) for part in parts]
    models = {f"model {v}": training.executor.share(flight.models[i]) for i, v in enumerate(flight.versions.tolist())}
    shared = {"state": None, **{k: v for k, v in training.shared.items() if k != "test"}, **models}
    outcomes = training.executor.map(train_unit, units, shared, training.needs)
    losses, digests = np.zeros(len(arrived.clients)), np.full(len(arrived.clients), "", "U16")
    for part, outcome in zip(parts, outcomes, strict=True):
        losses[part], digests[part] = outcome.losses, outcome.blocks
    sums, at = [], 0
    for members in groups:
        count = len(_parts(training, members))
        sums.append(tree_sum([outcome.node for outcome in outcomes[at : at + count]]))
        at += count
    steps = training.strategy.steps(training.shards.sizes[arrived.clients])
    return tree_sum(sums).total, losses / steps, digests


def _parts(training: "Training", members: Ints) -> list[Ints]:
    """Members of each unit: an aligned run of a power of two of blocks."""
    cut = blocks(len(members), training.lanes)
    size = training.unit_blocks or unit_size(len(cut), training.executor.workers, _block_flops(training))
    return [members[cut[i][0] : cut[min(i + size, len(cut)) - 1][1]] for i in range(0, len(cut), size)]


def _block_flops(training: "Training") -> float:
    return float(training.strategy.local_steps * training.lanes * training.costs(training.holders[:1])[2][0])


def _unit(training: "Training", arrived: Arrived, part: Ints, weights: NDArray[np.float64]) -> Unit:
    clients = arrived.clients[part]
    steps = training.strategy.steps(training.shards.sizes[clients])
    last = int(steps.max())
    return Unit(
        seed=training.seed,
        round=arrived.now,
        draws=arrived.number[part],
        shape=0,
        clients=clients,
        steps=steps,
        lanes=training.lanes,
        model=f"model {arrived.version[part[0]]}",
        server=f"model {arrived.version[part[0]]}",
        start=0,
        points=(last,),
        weights=weights[None, part],
        shares=np.zeros(1),
        carry=None,
        memory=None,
        last=last,
    )


def _landed(flight: Flight, taken: Ints, version: int, params: Vector) -> Flight:
    """The flight without those taken in, with the models still in use and the new one."""
    columns = {name: np.delete(getattr(flight, name), taken) for name in ("clients", "version", "back", "number")}
    used = np.isin(flight.versions, columns["version"])
    versions, models = np.append(flight.versions[used], version), np.concatenate([flight.models[used], params[None]])
    return Flight(**columns, sent=flight.sent, looks=flight.looks, versions=versions, models=models)


def _record(
    training: "Training",
    before: "TrainState",
    after: "TrainState",
    arrived: Arrived,
    losses: NDArray[np.float64],
    digests: NDArray[np.str_],
) -> Round:
    """Bytes, FLOPs and seconds of those in the buffer, booked when they come back."""
    clients = arrived.clients
    steps = training.strategy.steps(training.shards.sizes[clients])
    up, down, step_flops = training.costs(clients)
    cohort = training.cohort(clients, steps)
    flops = steps * step_flops.astype(np.float64)
    test_loss, accuracy = training.tested(after.round, after.params)
    note = f"staleness {arrived.staleness.mean():.3g} on average, {arrived.staleness.max()} at most"
    return Round(
        round=before.round,
        cohort=clients,
        group=np.empty(0, np.int64),
        distance=float("nan"),
        train_loss=float(np.average(losses, weights=training.shards.sizes[clients])),
        test_loss=test_loss,
        test_accuracy=accuracy,
        uploads=len(clients),
        bytes_up=int(up.sum()),
        bytes_down=int(down.sum()),
        cost_ratio=float(1.0 / steps.mean()),
        flops=float(flops.sum()),
        wasted_bytes=0,
        wasted_flops=0.0,
        seconds=after.clock - before.clock,
        clock=after.clock,
        note=note,
        clients={
            "client": clients,
            "train_loss": losses,
            "uploads": np.ones(len(clients), np.int64),
            "bytes_up": up,
            "bytes_down": down,
            "flops": flops,
            "seconds": cohort.down_seconds + cohort.steps * cohort.step_seconds + cohort.up_seconds,
            "block": digests,
        },
    )
