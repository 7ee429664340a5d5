"""What a round will be before anybody trains: who takes part, when each uploads, how long it takes and what it costs. All of it follows from times alone."""

# n clients drawn for the round

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from fedsim.clock import round_seconds
from fedsim.communication import Cohort, Schedule, UploadSchedule, traffic
from fedsim.stragglers import done_by

if TYPE_CHECKING:
    from fedsim.rounds import Training

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A round's ``cohort`` (n,) and ``schedule``; clients that are too slow have no points, those that vanish lose their later ones.

    ``steps`` (n,) is how many local steps a client would take, ``trained`` (n,) how many go into its uploads. ``uploads``, ``bytes_up``, ``bytes_down``, ``flops``
    and ``busy`` seconds are (n,); the wasted share of them is that of clients whose work, or last work, was not merged. ``failed``: nothing is merged.
    """

    cohort: Cohort
    schedule: Schedule
    steps: Ints
    trained: Ints
    seconds: float
    uploads: Ints
    bytes_up: Ints
    bytes_down: Ints
    flops: Floats
    busy: Floats
    wasted_bytes: int
    wasted_flops: float
    failed: bool
    notes: tuple[str, ...]

    @classmethod
    def of(cls, training: "Training", clients: Ints, round: int) -> Self:
        """The plan of ``round`` for ``clients`` (n,), ascending."""
        steps = training.strategy.steps(training.shards.sizes[clients])
        cohort = training.cohort(clients, steps)
        schedule = training.communication.assign(cohort, round, training.seed)
        _check_points(training.communication, schedule, cohort.steps)
        stays = steps if training.dropout is None else training.dropout.steps(training.seed, clients, round, steps)
        in_time, ended = (np.ones(len(clients), bool), None) if training.deadline is None else _in_time(training, cohort, steps, stays)
        points = schedule.points
        if ended is not None or (stays < steps).any():
            points = tuple(_merged(*own) for own in zip(points, stays < steps, stays, in_time, strict=True))
        trained = np.minimum([p[-1] if p else 0 for p in points], steps)
        lost = _lost(cohort, steps, stays, trained, in_time, ended)
        return cls._costed(training, cohort, replace(schedule, points=points), steps, trained, lost, ended)

    @property
    def clients(self) -> Ints:
        return self.cohort.clients

    @classmethod
    def _costed(
        cls, training: "Training", cohort: Cohort, schedule: Schedule, steps: Ints, trained: Ints, lost: "Lost", ended: float | None
    ) -> Self:
        up, down, flops = training.costs(cohort.clients)
        cost = traffic(schedule.points, up, down)
        lost_up, lost_down = np.rint(lost.uploads * up).astype(np.int64), np.rint(lost.downloads * down).astype(np.int64)
        own_step = cohort.step_seconds * (cohort.steps / steps)
        failed = int((cost.uploads > 0).sum()) < (1 if training.deadline is None else training.deadline.min_clients)
        return cls(
            cohort=cohort,
            schedule=schedule,
            steps=steps,
            trained=trained,
            seconds=_seconds(cohort, schedule, own_step, lost) if ended is None else ended,
            uploads=cost.uploads,
            bytes_up=cost.bytes_up + lost_up,
            bytes_down=cost.bytes_down + lost_down,
            flops=(trained + lost.steps) * flops,
            busy=(trained + lost.steps) * own_step
            + (cost.uploads + lost.uploads) * cohort.up_seconds
            + (cost.uploads + lost.downloads) * cohort.down_seconds,
            wasted_bytes=int((lost_up + lost_down).sum()),
            wasted_flops=float((lost.steps * flops).sum()),
            failed=failed,
            notes=(*lost.notes, *(["the round failed, the model stays: too few clients uploaded"] if failed else [])),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Lost:
    """Work (n,) that was done in vain, in downloads, local steps and uploads, or parts of them."""

    downloads: Floats
    steps: Floats
    uploads: Floats
    notes: tuple[str, ...]


def _lost(cohort: Cohort, steps: Ints, stays: Ints, trained: Ints, in_time: NDArray[np.bool_], ended: float | None) -> Lost:
    """What clients did after their last upload: those that vanish, on a model they had just received; those sent home at ``ended``, up to then."""
    vanished = (stays < steps) & in_time
    downloads, work, uploads = vanished.astype(np.float64), np.where(vanished, stays - trained, 0.0), np.zeros(len(cohort))
    notes = [f"{int(vanished.sum())} clients vanished"] if vanished.any() else []
    if ended is not None and not in_time.all():
        shares = done_by(ended, cohort.down_seconds, cohort.steps * cohort.step_seconds, cohort.up_seconds)
        downloads = np.where(in_time, downloads, shares.download)
        work = np.where(in_time, work, np.minimum(shares.compute * steps, stays))
        uploads = np.where(in_time | (stays < steps), 0.0, shares.upload)
        notes.append(f"{int((~in_time).sum())} of {len(cohort)} clients were too slow or vanished")
    return Lost(downloads=downloads, steps=work, uploads=uploads, notes=tuple(notes))


def _seconds(cohort: Cohort, schedule: Schedule, own_step: Floats, lost: Lost) -> float:
    """Until the last merge; where there is none, until the server has seen the last client vanish."""
    if any(schedule.points):
        return round_seconds(schedule.points, cohort.step_seconds, cohort.up_seconds, cohort.down_seconds)
    return float((cohort.down_seconds + lost.steps * own_step).max())


def _in_time(training: "Training", cohort: Cohort, steps: Ints, stays: Ints) -> tuple[NDArray[np.bool_], float]:
    """Who uploads before the deadline, or is not waited for because it vanished, and when the round ends."""
    assert training.deadline is not None
    times = cohort.down_seconds + cohort.steps * cohort.step_seconds + cohort.up_seconds
    return training.deadline.select(np.where(stays < steps, np.inf, times), training.strategy.cohort)


def _merged(points: tuple[int, ...], vanishes: bool, stays: int, in_time: bool) -> tuple[int, ...]:
    """Of a client's sync points those that it reaches; none if it is not waited for."""
    if not in_time:
        return ()
    return tuple(p for p in points if p <= stays) if vanishes else points


def _check_points(communication: UploadSchedule, schedule: Schedule, steps: int) -> None:
    """A client's points rise and end with the round; ``ValueError`` naming the schedule where they do not."""
    for points in set(schedule.points):
        if points and (list(points) != sorted(set(points)) or points[0] < 1 or points[-1] != steps):
            raise ValueError(f"{communication!r} gave sync points {points}; they must rise from 1 and end at local_steps={steps}")
