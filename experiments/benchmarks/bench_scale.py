"""A million clients: what a round costs as the fleet grows at a fixed cohort, and as the cohort grows at a fixed fleet.

Every fleet trains in a process of its own; fleets take turns in every repetition. Clients draw their shards from one data set, so that only
the fleet's columns grow. Memory is that of the driver, which is also the worker.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

from experiments.peers.job import Pictures
from experiments.study import Claim, main, plain_log, save_figure
from fedsim.communication import Uniform
from fedsim.fleet import Fleet
from fedsim.resampled import Resampled
from fedsim.rounds import Training
from fedsim.runs.style import BLUE, GREY, WIDE, figure, styled
from fedsim.runs.text import aligned
from fedsim.runtime import RayExecutor, SerialExecutor
from fedsim.strategies import FedAvg

FLEETS, COHORTS = (1_000, 10_000, 100_000, 1_000_000), (100, 1_000, 10_000)
FIXED = 200


def run(quick: bool, out: Path) -> list[Claim]:
    """5 repetitions with ``quick``, else 15."""
    repeats = 5 if quick else 15
    by_fleet = {size: [_process(size, FIXED, 12) for _ in range(1)] for size in FLEETS}
    for _ in range(repeats - 1):
        for size in FLEETS:
            by_fleet[size].append(_process(size, FIXED, 12))
    by_cohort = {cohort: [_process(1_000_000, cohort, max(3, 2_000 // cohort)) for _ in range(3)] for cohort in COHORTS}
    parallel = _process(1_000_000, 10_000, 3, workers=2)
    seconds = {size: median(r["seconds"] for r in found) for size, found in by_fleet.items()}
    rate = {cohort: cohort / median(r["seconds"] for r in found) for cohort, found in by_cohort.items()}
    _print(by_fleet, by_cohort, parallel)
    _draw(by_fleet, rate, out)
    grown = median(r["grown"] for r in by_fleet[FLEETS[-1]]) - median(r["grown"] for r in by_fleet[FLEETS[0]])
    spread = max(
        abs(median(a["seconds"] / b["seconds"] for a, b in zip(by_fleet[size], by_fleet[FLEETS[0]], strict=True)) - 1) for size in FLEETS
    )
    million = by_cohort[10_000]
    return [
        _claim(
            "seconds of a round of 200, fleets of 1e3 to 1e6: largest difference from 1e3",
            spread,
            "<= 0.15",
            f"{1e3 * seconds[1_000_000]:.0f} ms at 1e6",
        ),
        _claim("driver memory, fleet of 1e6 over fleet of 1e3", grown / 2**20, "<= 200 MB"),
        _claim(
            "clients/s at a cohort of 10,000 over those at 100, fleet of 1e6",
            rate[10_000] / rate[100],
            ">= 0.95",
            f"{rate[10_000]:,.0f} against {rate[100]:,.0f}",
        ),
        _claim(
            "fleet of 1e6, cohort 10,000, 3 rounds on one core: seconds a round",
            median(r["seconds"] for r in million),
            "<= 10 s",
            f"two Ray workers {parallel['seconds']:.2f} s; memory grew by {median(r['grown'] for r in million) / 2**20:.0f} MB",
        ),
    ]


def measure(size: int, cohort: int, rounds: int, workers: int) -> dict[str, float]:
    """Median seconds of a round after the first, and how far this process's memory grew from the data set being loaded, in bytes."""
    torch.set_num_threads(1)
    task = Pictures(model="mlp", num=20_000)
    task.data()
    _train(task, Fleet.sample(100, seed=0, partition=Resampled(size=100, alpha=1.0)), FIXED, 2, 0)  # what any training loads
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    fleet = Fleet.sample(size, seed=0, partition=Resampled(size=100, alpha=1.0))
    made = time.perf_counter() - start
    seconds = _train(task, fleet, cohort, rounds, workers)
    return {"seconds": median(seconds[1:]), "fleet": made, "grown": psutil.Process().memory_info().rss - before}


def _train(task: Pictures, fleet: Fleet, cohort: int, rounds: int, workers: int) -> list[float]:
    with RayExecutor(workers=workers) if workers else SerialExecutor() as executor:
        training = Training.prepare(
            task=task,
            fleet=fleet,
            strategy=FedAvg(cohort=cohort, local_steps=5, batch_size=20, client_lr=0.1),
            communication=Uniform(),
            rounds=10**9,
            seed=0,
            executor=executor,
            evaluate_every=10**9,
        )
        state, seconds = training.init(), []
        for _ in range(rounds):
            start = time.perf_counter()
            state, _ = training.step(state)
            seconds.append(time.perf_counter() - start)
    return seconds


def _process(size: int, cohort: int, rounds: int, workers: int = 0) -> dict[str, float]:
    command = [sys.executable, "-m", "experiments.benchmarks.bench_scale", "--measure", *map(str, (size, cohort, rounds, workers))]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    )
    if done.returncode:
        raise RuntimeError(f"fleet {size}, cohort {cohort} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _print(by_fleet: dict[int, list[dict[str, float]]], by_cohort: dict[int, list[dict[str, float]]], parallel: dict[str, float]) -> None:
    rows = [(f"{size:,}", FIXED, found) for size, found in by_fleet.items()]
    rows += [("1,000,000", cohort, found) for cohort, found in by_cohort.items()]
    rows += [("1,000,000, two Ray workers", 10_000, [parallel])]
    table = []
    for name, cohort, found in rows:
        seconds = [r["seconds"] for r in found]
        spread = f"{1e3 * median(seconds):.0f} ms [{1e3 * min(seconds):.0f}, {1e3 * max(seconds):.0f}]"
        grown = f"{median(r['grown'] for r in found) / 2**20:.0f} MB"
        table.append([name, f"{cohort:,}", spread, f"{cohort / median(seconds):,.0f}", grown, f"{median(r['fleet'] for r in found):.2f} s"])
    print(f"{aligned(['fleet', 'cohort', 'a round', 'clients/s', 'memory', 'making the fleet'], table)}\n", flush=True)


@styled
def _draw(by_fleet: dict[int, list[dict[str, float]]], rate: dict[int, float], out: Path) -> None:
    drawn = figure(WIDE, 3.2)
    left, right = drawn.subplots(1, 2)
    values = np.array([[1e3 * r["seconds"] for r in by_fleet[size]] for size in FLEETS])
    left.plot(FLEETS, np.median(values, axis=1), color=BLUE, marker="o")
    left.fill_between(FLEETS, values.min(1), values.max(1), color=BLUE, alpha=0.2, linewidth=0)
    left.set(xlabel="clients of the fleet", ylabel=f"ms a round of {FIXED}", xscale="log", ylim=(0, None))
    right.plot(list(rate), list(rate.values()), color=GREY, marker="o")
    right.set(xlabel="cohort, fleet of 1,000,000", ylabel="clients/s", xscale="log", ylim=(0, None))
    for axis in (left, right):
        plain_log(axis)
    save_figure(drawn, out / "scale.png")


def _claim(name: str, value: float, bar: str, note: str = "") -> Claim:
    return Claim(name=name, value=value, spread=nan, bar=bar, seeds=1, note=note)


def _entry(arguments: Sequence[str]) -> Any:
    if arguments[:1] == ["--measure"]:
        print(json.dumps(measure(*map(int, arguments[1:]))))
        return 0
    return main("bench_scale", run)


if __name__ == "__main__":
    sys.exit(_entry(sys.argv[1:]))
