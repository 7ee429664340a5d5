"""What a run yields: one record per round, deployment, tick, alarm, request, redeployment and rejection."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Round:
    """One federated round. ``wasted_bytes`` and ``wasted_flops`` are what clients spent that were too slow or vanished. Bytes are sums over clients (round 0 adds the label histograms a schedule may ask for), ``seconds`` and ``clock`` are simulated; test figures are ``nan`` when not evaluated."""

    round: int
    cohort: NDArray[np.int64]
    group: NDArray[np.int64]
    distance: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    uploads: int
    bytes_up: int
    bytes_down: int
    cost_ratio: float
    flops: float
    wasted_bytes: int
    wasted_flops: float
    seconds: float
    clock: float
    note: str
    clients: Columns


@dataclass(frozen=True, kw_only=True, eq=False)
class Deployment:
    """The submodels the fleet starts to serve with, as columns over all clients (C,)."""

    clients: Columns


@dataclass(frozen=True, kw_only=True, eq=False)
class Tick:
    """One prequential tick: columns over the clients active in it."""

    tick: int
    clients: Columns


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to one client at a tick; fields that do not apply are ``nan``, 0 or empty."""

    tick: int
    client: int
    kind: str = ""
    detail: str = ""
    job: int = -1
    statistic: float = float("nan")
    changed_at: int = -1
    ready_at: int = -1
    bytes: int = 0
    seconds: float = 0.0
    loss_dense: float = float("nan")
    loss_stale: float = float("nan")
    loss_candidate: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class Alarm(Event):
    """The detector's statistic of this client crossed its threshold."""

    kind: str = "alarm"


@dataclass(frozen=True, kw_only=True)
class Request(Event):
    """A policy asked for an action; its calibration window starts now."""

    kind: str = "request"


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """A worker took the job; it will be done at ``ready_at``."""

    kind: str = "started"


@dataclass(frozen=True, kw_only=True)
class Redeployment(Event):
    """A candidate passed the gate and now serves; ``bytes`` crossed the downlink."""

    kind: str = "redeployment"


@dataclass(frozen=True, kw_only=True)
class Rejected(Event):
    """The gate refused a candidate: it did not beat the deployed submodel on the held-out third."""

    kind: str = "rejected"


Record = Round | Deployment | Tick | Event
