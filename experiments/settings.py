"""Upload schedules compared on scikit-learn's digits: rates chosen on seeds of their own, uniform schedules that spend what another method spends."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from experiments.study import standard_error
from experiments.training import Curves, Trainers, Trial
from fedsim.communication import Cohort, Schedule, Uniform, UploadSchedule
from fedsim.fleet import Fleet
from fedsim.partition import LabelShards
from fedsim.randomness import rng_for
from fedsim.runs.text import aligned
from fedsim.strategies import FedAvg
from fedsim.tasks import Digits

CLIENTS, STEPS, BATCH, ROUNDS = 100, 64, 5, 20
MLP, LINEAR = (32,), ()
RATES: Mapping[tuple[int, ...], tuple[float, ...]] = {MLP: (0.3, 0.5, 1.0), LINEAR: (0.3, 1.0, 3.0)}
TUNING_SEEDS = (1000, 1001)
SLOW, FASTER = 1e4, 64.0  # bytes/s of a slow link, and the ratio of a fast one


@dataclass(frozen=True, kw_only=True)
class UniformTotal:
    """Uniform schedules whose uploads a client and round average ``uploads`` >= 1: whole numbers that vary from round to round."""

    uploads: float

    needs_labels: ClassVar[bool] = False
    uniform: ClassVar[bool] = True

    def validate(self, cohort: int, steps: int, transfer: int) -> None:
        if not 1 <= self.uploads <= steps:
            raise ValueError(f"uploads must lie in 1..{steps}, got {self.uploads}")

    def assign(self, cohort: Cohort, round: int, seed: int) -> Schedule:
        until, before = (int(np.floor(self.uploads * r + 0.5)) for r in (round + 1, round))
        return Uniform(uploads=until - before).assign(cohort, round, seed)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A schedule; ``rate_as`` names the method whose rate it takes, ``matches`` the one whose uploads it spends."""

    name: str
    schedule: UploadSchedule
    rate_as: str = ""
    matches: str = ""
    rounds: int = ROUNDS


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the study: a model (``hidden`` widths), a partition, a cohort and the methods to compare."""

    title: str
    hidden: tuple[int, ...]
    labels: int
    cohort: int
    methods: tuple[Method, ...]
    fast_share: float = 0.0

    def fleet(self, seed: int) -> Fleet:
        """Devices that compute in no time, so that the clock tells links alone; a random ``fast_share`` has fast ones."""
        links = np.full(CLIENTS, SLOW)
        links[rng_for(seed, "fast links").permutation(CLIENTS)[: round(self.fast_share * CLIENTS)]] *= FASTER
        columns = {"flops": np.full(CLIENTS, 1e15), "memory": np.full(CLIENTS, 1e9), "up": links, "down": links}
        return Fleet.from_table(columns, partition=LabelShards(self.labels), seed=seed)

    def trial(self, method: Method, rate: float, seed: int, schedule: UploadSchedule | None = None) -> Trial:
        return Trial(
            task=Digits(hidden=self.hidden, seed=seed),
            fleet=self.fleet(seed),
            strategy=FedAvg(client_lr=rate, cohort=self.cohort, local_steps=STEPS, batch_size=BATCH),
            communication=schedule or method.schedule,
            rounds=method.rounds,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """A method's rate, and its curves by fresh seed."""

    method: Method
    rate: float
    curves: tuple[Curves, ...]

    @property
    def finals(self) -> list[float]:
        """Accuracy of each seed in percent."""
        return [100 * c.final() for c in self.curves]

    def mean(self, of: str) -> NDArray[np.float64]:
        """A column of the curves by round, mean over seeds."""
        return np.asarray(np.mean([getattr(c, of) for c in self.curves], axis=0))


Results = Mapping[str, Result]


def measure(setting: Setting, seeds: Sequence[int], pool: Trainers) -> dict[str, Result]:
    """Choose rates, train on fresh seeds, print the table."""
    start = time.perf_counter()
    rates = choose_rates(setting, pool)
    free = [m for m in setting.methods if not m.matches]
    trained = pool.train([setting.trial(m, rates[m.rate_as or m.name], seed) for m in free for seed in seeds])
    curves = {m.name: tuple(trained[i * len(seeds) : (i + 1) * len(seeds)]) for i, m in enumerate(free)}
    matched = [
        (m, seed, UniformTotal(uploads=_uploads(curves[m.matches][i], setting)))
        for m in setting.methods
        if m.matches
        for i, seed in enumerate(seeds)
    ]
    trained = pool.train([setting.trial(m, rates[m.rate_as or m.name], seed, schedule) for m, seed, schedule in matched])
    for (m, _, _), found in zip(matched, trained, strict=True):
        curves[m.name] = (*curves.get(m.name, ()), found)
    results = {m.name: Result(method=m, rate=rates[m.rate_as or m.name], curves=curves[m.name]) for m in setting.methods}
    print(f"{setting.title} ({len(seeds)} seeds, {time.perf_counter() - start:.0f} s)\n{described(results)}\n", flush=True)
    return results


def choose_rates(setting: Setting, pool: Trainers) -> dict[str, float]:
    """For each method without another's rate: the best of its model's RATES on the tuning seeds; one that diverges is never chosen."""
    rates = RATES[setting.hidden]
    tuned = [m for m in setting.methods if not m.rate_as]
    trained = iter(pool.train([setting.trial(m, rate, seed) for m in tuned for rate in rates for seed in TUNING_SEEDS]))
    means = {m.name: [fmean(next(trained).final() for _ in TUNING_SEEDS) for _ in rates] for m in tuned}
    return {name: rates[int(np.argmax(np.nan_to_num(values, nan=-1.0)))] for name, values in means.items()}


def described(results: Results) -> str:
    header = ["method", "rate", "accuracy %", "best round %", "uploads", "MB up", "MB down", "cost ratio", "simulated s"]
    return aligned(header, [_row(result) for result in results.values()])


def _row(result: Result) -> list[str]:
    rate = f"{result.rate:g}" + (" as" if result.method.rate_as else "")
    last = {name: result.mean(name)[-1] for name in ("uploads", "bytes_up", "bytes_down", "clock")}
    return [
        result.method.name,
        rate,
        f"{fmean(result.finals):.1f} +- {standard_error(result.finals):.1f}",
        f"{100 * fmean(c.best() for c in result.curves):.1f}",
        f"{last['uploads']:,.0f}",
        f"{last['bytes_up'] / 1e6:.2f}",
        f"{last['bytes_down'] / 1e6:.2f}",
        f"{result.mean('cost_ratio').mean():.3f}",
        f"{last['clock']:.0f}",
    ]


def _uploads(curves: Curves, setting: Setting) -> float:
    """Uploads a client of the cohort and round."""
    return float(curves.uploads[-1] / (len(curves.uploads) * setting.cohort))
