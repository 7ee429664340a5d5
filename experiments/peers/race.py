"""Engines that take turns on one job: paired ratios, and none at all where the engines end with different test losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from statistics import median

import numpy as np

from experiments.peers.job import Job, Vector
from experiments.study import Claim
from fedsim.runs.text import aligned

Engine = Callable[[], tuple[list[float], Vector]]


@dataclass(frozen=True)
class Raced:
    """What one engine did: median ``seconds`` of a round after the first in each repetition, the very ``first`` round, the test ``loss``."""

    seconds: tuple[float, ...]
    first: float
    loss: float

    @property
    def median(self) -> float:
        return median(self.seconds)


def race(job: Job, engines: Mapping[str, Engine], repeats: int, *, tolerance: float = 1e-5) -> dict[str, Raced]:
    """Every engine once in each repetition; the order turns. ``RuntimeError`` where their losses differ by more than the relative ``tolerance``."""
    names = list(engines)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, float] = {}
    losses: dict[str, float] = {}
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            found, params = engines[name]()
            seconds[name].append(median(found[1:]))
            first.setdefault(name, found[0])
            losses.setdefault(name, job.test_loss(params))
    same_loss(job, losses, tolerance)
    return {name: Raced(tuple(seconds[name]), first[name], losses[name]) for name in names}


def same_loss(job: Job, losses: Mapping[str, float], tolerance: float) -> None:
    """``RuntimeError`` unless all losses agree to the relative ``tolerance``."""
    values = np.array(list(losses.values()))
    if not np.ptp(values) <= tolerance * abs(values).min():  # nor where one is not a number
        raise RuntimeError(f"{job.name}: the engines end with different test losses, so they did not do the same work: {dict(losses)}")


def table(job: Job, found: Mapping[str, Raced]) -> str:
    """Clients a second, and how many times those of the first engine they are: median, least and most of the repetitions' ratios."""
    base = next(iter(found.values()))
    rows = []
    for name, own in found.items():
        ratios = [a / b for a, b in zip(base.seconds, own.seconds, strict=True)]
        spread = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        rows.append([name, f"{job.cohort / own.median:,.0f}", spread, f"{1e3 * own.first:.0f} ms", f"{own.loss:.6f}"])
    title = f"{job.name}: cohort {job.cohort}, {job.steps} steps on {job.batch} examples, {len(base.seconds)} repetitions"
    return f"{title}\n{aligned(['engine', 'clients/s', 'x the first', 'first round', 'test loss'], rows)}\n"


def faster(name: str, slow: Sequence[float], fast: Sequence[float], bar: str, note: str = "") -> Claim:
    """How many times faster, the median of the pairs' ratios; least and most are in the note."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    spread = f"{len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f}"
    return Claim(name=name, value=median(ratios), spread=nan, bar=bar, seeds=1, note="; ".join(filter(None, [spread, note])))


def unmeasured(name: str, bar: str, why: object) -> Claim:
    """A claim that could not be measured does not hold."""
    return Claim(name=name, value=nan, spread=nan, bar=bar, seeds=1, note=f"not measured: {why}")
