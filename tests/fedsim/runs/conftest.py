"""Tables of a made-up run, realistic enough to be read: a fleet that trains, is pruned, drifts in part and is repaired."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from fedsim.records import Alarm, Event, Redeployment, Rejected, Request, Started
from fedsim.runs.schema import arrow_table, tabulate

DEVICES = ("budget phone", "mid phone", "flagship", "tablet")
LEARNING = 20  # ticks until a detector knows its client
LEVELS = np.array([0.6, 0.6, 0.4, 0.0])


def make_tables(
    *, clients: int = 100, ticks: int = 250, change_at: int = 100, changed: int = 30, rounds: int = 40, policy: str = "alarm", seed: int = 0
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    fleet = np.arange(clients)
    nu = np.full(clients, -1)
    nu[rng.permutation(clients)[:changed]] = change_at
    events, repaired_at = _events(rng, nu, ticks, policy)
    columns = _rounds(rng, rounds) | _deployment(rng, fleet) | _ticks(rng, nu, repaired_at, ticks, _in_flight(events)) | tabulate(events)
    columns["truth"] = {"client": fleet, "drift": np.where(nu >= 0, 0, -1), "change_at": nu}
    return {name: arrow_table(name, columns.get(name, tabulate([Event(tick=0, client=0)])["events"])) for name in _ORDER} | (
        {} if events else {"events": arrow_table("events", tabulate([Event(tick=0, client=0)])["events"]).slice(0, 0)}
    )


_ORDER = ("rounds", "clients", "deployments", "truth", "ticks", "events")


def _rounds(rng: np.random.Generator, rounds: int) -> dict[str, dict[str, Any]]:
    at = np.arange(rounds)
    tested = (at % 2 == 1) | (at == rounds - 1)
    accuracy = np.where(tested, 0.93 - 0.8 * np.exp(-at / 7) + rng.normal(0, 0.008, rounds), np.nan)
    cohort = 20
    client = np.concatenate([rng.permutation(100)[:cohort] for _ in at])
    per_client = {
        "round": np.repeat(at, cohort),
        "client": client,
        "train_loss": rng.gamma(4, 0.1, rounds * cohort),
        "uploads": rng.choice([1, 64], rounds * cohort, p=[0.8, 0.2]),
    }
    bytes_up = per_client["uploads"] * 90_000
    per_client |= {
        "bytes_up": bytes_up,
        "bytes_down": bytes_up,
        "flops": np.full(rounds * cohort, 1.2e9),
        "block": np.full(rounds * cohort, "0123456789abcdef"),
        "seconds": rng.gamma(3, 0.4, rounds * cohort),
    }
    total = lambda name: np.add.reduceat(per_client[name], at * cohort)  # noqa: E731
    seconds = np.maximum.reduceat(per_client["seconds"], at * cohort)
    rows = {
        "round": at,
        "distance": 0.2 + rng.random(rounds) * 0.1,
        "train_loss": 0.2 + 2.1 * np.exp(-at / 8),
        "test_loss": np.where(tested, 0.25 + 2 * np.exp(-at / 8), np.nan),
        "test_accuracy": accuracy,
        "uploads": total("uploads"),
        "bytes_up": total("bytes_up"),
        "bytes_down": total("bytes_down"),
        "cost_ratio": np.full(rounds, 0.3),
        "flops": total("flops"),
        "wasted_bytes": np.zeros(rounds, np.int64),
        "wasted_flops": np.zeros(rounds),
        "seconds": seconds,
        "clock": np.cumsum(seconds),
        "note": np.full(rounds, ""),
    }
    return {"rounds": rows, "clients": per_client}


def _deployment(rng: np.random.Generator, fleet: np.ndarray) -> dict[str, dict[str, Any]]:
    kind = rng.choice(len(DEVICES), len(fleet), p=[0.4, 0.3, 0.2, 0.1])
    level = np.maximum(0.0, LEVELS[kind] - 0.2 * (rng.random(len(fleet)) < 0.2))
    parameters = (85_000 * (1 - level)).astype(np.int64)
    return {
        "deployments": {
            "client": fleet,
            "device": np.array(DEVICES)[kind],
            "group": kind,
            "level": level,
            "sparsity": level,
            "parameters": parameters,
            "bytes": 4 * parameters,
            "flops": 2.0 * parameters,
        }
    }


def _events(rng: np.random.Generator, nu: np.ndarray, ticks: int, policy: str) -> tuple[list[Event], np.ndarray]:
    """Alarms with geometric delays and a few false ones; each leads to a job, unless the policy never acts."""
    alarms = [(int(n + rng.geometric(0.4) - 1), int(c)) for c, n in enumerate(nu) if n >= 0 and rng.random() < 0.95]
    alarms += [(int(t), int(c)) for t, c in zip(rng.integers(30, ticks, 6), rng.permutation(np.flatnonzero(nu < 0))[:6], strict=True)]
    repaired, events = np.full(len(nu), ticks), []
    starts = {"never": [], "alarm": alarms, "oracle": [(int(n), int(c)) for c, n in enumerate(nu) if n >= 0]}[policy]
    events += [Alarm(tick=t, client=c, statistic=12.0) for t, c in alarms if t < ticks]
    for job, (t, c) in enumerate(sorted(starts)):
        done = t + 5 + job % 4
        if done >= ticks:
            continue
        events += [Request(tick=t, client=c, job=job), Started(tick=t + 4, client=c, job=job, seconds=3.5, ready_at=done)]
        if nu[c] < 0 or rng.random() < 0.05:
            events.append(Rejected(tick=done, client=c, job=job, loss_dense=0.2, loss_stale=0.4, loss_candidate=0.5))
        else:
            events.append(Redeployment(tick=done, client=c, job=job, bytes=42_000, loss_dense=0.2, loss_stale=2.0, loss_candidate=0.4))
            repaired[c] = done
    return sorted(events, key=lambda e: (e.tick, e.client)), repaired


def _in_flight(events: list[Event]) -> list[tuple[int, int, int]]:
    """Client, tick of the request and tick of its end, for each job."""
    asked = {event.job: event.tick for event in events if event.kind == "request"}
    return [(e.client, asked[e.job], e.tick) for e in events if e.kind in ("redeployment", "rejected")]


def _ticks(
    rng: np.random.Generator, nu: np.ndarray, repaired: np.ndarray, ticks: int, in_flight: list[tuple[int, int, int]]
) -> dict[str, dict[str, Any]]:
    tick, client = (a.ravel() for a in np.meshgrid(np.arange(ticks), np.arange(len(nu)), indexing="ij"))
    hurt = (nu[client] >= 0) & (tick >= nu[client]) & (tick < repaired[client])
    count = len(tick)
    accuracy = rng.binomial(16, np.where(hurt, 0.15, 0.92)) / 16
    dense = rng.binomial(16, 0.96, count) / 16
    unwatched = tick < LEARNING
    for who, start, end in in_flight:
        unwatched |= (client == who) & (tick > start) & (tick <= end)
    return {
        "ticks": {
            "tick": tick,
            "client": client,
            "loss": np.where(hurt, 2.4, 0.3) * rng.gamma(12, 1 / 12, count),
            "accuracy": accuracy,
            "statistic": np.where(unwatched, np.nan, rng.gamma(1, 1, count)),
            "dense_loss": 0.2 * rng.gamma(12, 1 / 12, count),
            "dense_accuracy": dense,
        }
    }


@pytest.fixture(scope="session")
def made_up_run() -> Callable[..., dict[str, Any]]:
    return make_tables


@pytest.fixture(scope="session")
def tables() -> Mapping[str, Any]:
    return make_tables()
