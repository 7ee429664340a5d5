"""A long run on two Ray workers, one of them killed every tenth round: the same bits as a calm run, memory that does not grow, and the time kills cost."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from experiments.peers.job import JOBS, Job
from experiments.study import Claim, main
from fedsim.encoding import digest
from fedsim.randomness import rng_for
from fedsim.runtime import RayExecutor

EVERY, SETTLED = 10, 20


def run(quick: bool, out: Path) -> list[Claim]:
    """120 rounds with ``quick``, else 500."""
    rounds = 120 if quick else 500
    job = replace(JOBS[0], cohort=128, steps=20)
    calm, calm_times, calm_memory = soak(job, rounds, kill=False)
    rough, rough_times, _ = soak(job, rounds, kill=True)
    driver, workers = (_slope(column) for column in np.array(calm_memory).T)
    lost = sum(rough_times) / sum(calm_times)
    print(
        f"{rounds} rounds of {job.cohort} clients: calm {sum(calm_times):.0f} s, with a kill every {EVERY} rounds {sum(rough_times):.0f} s; median rounds "
        f"{1e3 * median(calm_times):.0f} and {1e3 * median(rough_times):.0f} ms; memory of driver and workers grows by {driver:.3f} and {workers:.3f} MB a round\n",
        flush=True,
    )
    return [
        _claim(
            f"{rounds} rounds with a worker killed every {EVERY}: digests that differ from the calm run's", float(rough != calm), "<= 0"
        ),
        _claim("memory of the driver, growth a round after the first 20", driver, "<= 0.05 MB"),
        _claim("memory of two workers together, growth a round after the first 20", workers, "<= 0.1 MB"),
        _claim("rounds a minute with kills / without", 1 / lost, ">= 0.7", "one worker of two killed every 10 rounds"),
    ]


def soak(job: Job, rounds: int, kill: bool) -> tuple[str, list[float], list[tuple[float, float]]]:
    """Digest of the final state, seconds of each round, and memory of driver and workers in MB after each."""
    with RayExecutor(workers=2) as executor:
        training = job.training(executor)
        state, times, memory = training.init(), [], []
        for r in range(rounds):
            if kill and r % EVERY == EVERY - 1:
                os.kill(executor.pids()[int(rng_for(0, "kill", r).integers(2))], signal.SIGKILL)
            start = time.perf_counter()
            state, _ = training.step(state)
            times.append(time.perf_counter() - start)
            memory.append((_rss([os.getpid()]), 0.0 if kill else _rss(executor.pids())))
        return digest(state), times, memory


def _rss(pids: Sequence[int]) -> float:
    return sum(psutil.Process(pid).memory_full_info().uss for pid in pids) / 2**20


def _slope(values: np.ndarray) -> float:
    """Least-squares growth a round once settled."""
    settled = values[SETTLED:]
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0])


def _claim(name: str, value: float, bar: str, note: str = "") -> Claim:
    return Claim(name=name, value=value, spread=nan, bar=bar, seeds=1, note=note)


if __name__ == "__main__":
    sys.exit(main("bench_soak", run))
