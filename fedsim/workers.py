"""Simulated workers: jobs wait for a free one, in the order they came, and take the time their FLOPs need.

All times are ticks. A queue is a value; nothing here reads a clock.
"""

from bisect import insort
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Job number ``job``, handed in at tick ``submitted``, in need of a worker for ``service`` ticks."""

    job: int
    submitted: int
    service: int


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A worker takes ``job`` at tick ``start`` and is done with it at ``finish``."""

    job: int
    start: int
    finish: int


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Jobs no worker has taken yet, in order of arrival, and the finish ticks of those being worked on."""

    waiting: tuple[Ticket, ...] = ()
    busy_until: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.waiting)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """``count`` workers (``None``: as many as there are jobs) of ``flops`` FLOP/s each, without preemption, first come first served.

    A job takes ``startup_seconds`` plus its FLOPs; a tick lasts ``tick_seconds``. Raises ``ValueError`` for a count below 1.
    """

    count: int | None = None
    flops: float = 1e12
    startup_seconds: float = 0.5
    tick_seconds: float = 1.0
    priority: Literal["fifo"] = "fifo"

    def __post_init__(self) -> None:
        if self.count is not None and (isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1):
            raise ValueError(f"count must be a whole number of workers, at least 1, or None for no queue, got {self.count!r}")
        for name in ("flops", "tick_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        if not 0 <= self.startup_seconds < float("inf"):
            raise ValueError(f"startup_seconds must be non-negative and finite, got {self.startup_seconds!r}")
        if self.priority != "fifo":
            raise ValueError(f"priority must be 'fifo', got {self.priority!r}")

    def seconds(self, flops: float) -> float:
        """Simulated seconds of one worker for a job of ``flops``."""
        return self.startup_seconds + flops / self.flops

    def service_ticks(self, flops: float) -> int:
        """Whole ticks a job of ``flops`` holds a worker."""
        return ceil(self.seconds(flops) / self.tick_seconds)

    def init(self) -> Queue:
        return Queue()

    def submit(self, queue: Queue, tick: int, job: int, flops: float) -> Queue:
        """Put job number ``job`` at the end of the queue at ``tick``, which must not lie before an earlier submission."""
        if queue.waiting and tick < queue.waiting[-1].submitted:
            raise ValueError(f"jobs must be submitted in order of time, got tick {tick} after {queue.waiting[-1].submitted}")
        return replace(queue, waiting=(*queue.waiting, Ticket(job=job, submitted=tick, service=self.service_ticks(flops))))

    def step(self, queue: Queue, tick: int) -> tuple[Queue, tuple[Assignment, ...]]:
        """Hand jobs to workers up to and including ``tick``; each starts as soon as it is first in line and a worker is free.

        How often this is called does not change when a job starts.
        """
        busy, taken = sorted(queue.busy_until), []
        for ticket in queue.waiting:
            full = self.count is not None and len(busy) == self.count
            start = max(ticket.submitted, busy[0]) if full else ticket.submitted
            if start > tick:
                break
            taken.append(Assignment(job=ticket.job, start=start, finish=start + ticket.service))
            if full:
                del busy[0]
            insort(busy, start + ticket.service)
        still_busy = tuple(finish for finish in busy if finish > tick)
        return Queue(waiting=queue.waiting[len(taken) :], busy_until=still_busy), tuple(taken)

    def deployed_at(self, asked: int, latency: int, finish: int, download_seconds: float = 0.0) -> int:
        """The tick a result serves from: neither before ``asked + latency`` nor before its job is done, plus the download."""
        return max(asked + latency, finish) + ceil(download_seconds / self.tick_seconds)
